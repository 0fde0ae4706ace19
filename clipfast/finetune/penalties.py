"""Penalties h on adversarial perturbations: what the inner maximisation of adversarial fine-tuning pays for delta.

    max_delta  loss(x + delta) - h(delta)

In the linearised problem, with u the gradient of the loss, its maximum over delta is the conjugate h*(u), so that a
penalty on delta is a regulariser h* of the input gradient. Gong et al., Boosting the Visual Interpretability of CLIP
via Adversarial Fine-Tuning, ICLR 2025, section 3, with Huber_eta(u) = u^2 / (2 eta) up to eta, |u| - eta / 2 beyond:

    Huber        h* = eps sum_i Huber_eta(u_i)
    ElasticNet   h* = eps sum_i Huber_eta(u_i) + eps2 |u|^2
    GroupNorm    h* = eps sum_S Huber_eta(|u_S|)
    Box          h* = eps sum_i |u_i|                       FARE: Schlarmann et al., Robust CLIP, ICML 2024

The classes `Released...` are what the code published with the paper computes under the same names; `penalty` picks by
name and recipe. Perturbations are in pixels in [0, 1], so that 4/255 is the paper's 4; all of (B, C, H, W), all sums
over one image. eps, eta > 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clipfast.errors import InputError, nearest
from clipfast.ops.pgd_step import TINY, Slope, cell_norms, project_, scale_cells_


@dataclass(frozen=True)
class Penalty:
    """A penalty h: a formula inside of a set, infinite outside of it.

    eps: radius of that set ("box": largest pixel; "group": largest L2 norm of a cell), where there is one.
    """

    eps: float

    bound: ClassVar[str]

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0 or not math.isfinite(value):
                raise InputError(f"{name}={value!r} of {type(self).__name__} must be above 0 and finite.")

    @property
    def cells(self) -> int:
        """Pixels along a side of a group; 1 where there are none."""
        return 1

    def slope(self, pixels: int) -> Slope:
        """The derivative of the formula, for images of so many pixels."""
        raise NotImplementedError

    def formula(self, delta: Tensor) -> Tensor:
        """h of each image where it is finite: (B,)."""
        raise NotImplementedError

    def conjugate(self, u: Tensor) -> Tensor:
        """h*(u), the largest <u, delta> - h(delta) over all delta, of each image: (B,)."""
        raise NotImplementedError

    def maximiser(self, u: Tensor) -> Tensor:
        """A delta where <u, delta> - h(delta) is largest, like u."""
        raise NotImplementedError

    def value(self, delta: Tensor) -> Tensor:
        """h of each image, infinite outside of its set: (B,)."""
        return torch.where(self.contains(delta), self.formula(delta), torch.inf)

    def gradient(self, delta: Tensor) -> Tensor:
        """The derivative of h inside of its set, like delta; zero where h has a corner at zero."""
        return self.slope(delta.shape[-2] * delta.shape[-1])(delta)

    def project(self, delta: Tensor) -> Tensor:
        """The point of the set that is nearest to delta."""
        return project_(delta.clone(), self.bound, self.eps, self.cells)

    def contains(self, delta: Tensor) -> Tensor:
        """Which images are in the set, but for rounding: (B,) bool."""
        away = (delta - self.project(delta)).abs().flatten(1).amax(1)
        return away <= 8 * torch.finfo(delta.dtype).eps * self.eps


@dataclass(frozen=True)
class Box(Penalty):
    """h = 0 for |delta_i| <= eps: FARE, and plain l-infinity attacks."""

    bound: ClassVar[str] = "box"

    def slope(self, pixels: int) -> Slope:
        return Slope()

    def formula(self, delta: Tensor) -> Tensor:
        return delta.new_zeros(len(delta))

    def conjugate(self, u: Tensor) -> Tensor:
        return self.eps * _sum(u.abs())

    def maximiser(self, u: Tensor) -> Tensor:
        return self.eps * u.sign()


@dataclass(frozen=True)
class Huber(Penalty):
    """h = eta / (2 eps) |delta|^2 for |delta_i| <= eps."""

    eta: float

    bound: ClassVar[str] = "box"

    def slope(self, pixels: int) -> Slope:
        return Slope(inner=self.eta / self.eps)

    def formula(self, delta: Tensor) -> Tensor:
        return self.eta / (2 * self.eps) * _sum(delta.square())

    def conjugate(self, u: Tensor) -> Tensor:
        return self.eps * _sum(_huber(u.abs(), self.eta))

    def maximiser(self, u: Tensor) -> Tensor:
        return self.eps * (u / self.eta).clamp(-1, 1)


@dataclass(frozen=True)
class ElasticNet(Penalty):
    """With c = eps + 2 eps2 eta, of each v = delta_i: h = eta v^2 / (2 c) for |v| <= c, else
    (|v| - eps)^2 / (4 eps2) + eps eta / 2. Finite everywhere: nothing is projected."""

    eta: float
    eps2: float

    bound: ClassVar[str] = "none"

    @property
    def knee(self) -> float:
        """c, where the formula changes."""
        return self.eps + 2 * self.eps2 * self.eta

    def slope(self, pixels: int) -> Slope:
        outer = 1 / (2 * self.eps2)
        return Slope(inner=self.eta / self.knee, knee=self.knee, outer=outer, level=-self.eps * outer)

    def formula(self, delta: Tensor) -> Tensor:
        size = delta.abs()
        inner = self.eta / (2 * self.knee) * size.square()
        outer = (size - self.eps).square() / (4 * self.eps2) + self.eps * self.eta / 2
        return _sum(torch.where(size <= self.knee, inner, outer))

    def conjugate(self, u: Tensor) -> Tensor:
        return _sum(self.eps * _huber(u.abs(), self.eta) + self.eps2 * u.square())

    def maximiser(self, u: Tensor) -> Tensor:
        return self.eps * (u / self.eta).clamp(-1, 1) + 2 * self.eps2 * u


@dataclass(frozen=True)
class GroupNorm(Penalty):
    """h = eta / (2 eps) |delta|^2 where every group's L2 norm is at most eps, and zero outside of all groups.

    A group is a cell x cell square of one channel, on a grid from the image's first pixel on; pixels behind the last
    whole square belong to none.
    """

    eta: float
    cell: int = 14

    bound: ClassVar[str] = "group"

    @property
    def cells(self) -> int:
        return self.cell

    def slope(self, pixels: int) -> Slope:
        return Slope(inner=self.eta / self.eps)

    def formula(self, delta: Tensor) -> Tensor:
        return self.eta / (2 * self.eps) * _sum(delta.square())

    def conjugate(self, u: Tensor) -> Tensor:
        return self.eps * _sum(_huber(cell_norms(u, self.cell), self.eta))

    def maximiser(self, u: Tensor) -> Tensor:
        return scale_cells_(u.clone(), self.eps / cell_norms(u, self.cell).clamp(min=self.eta), self.cell)


@dataclass(frozen=True)
class ReleasedHuber(Penalty):
    """h = eta / eps times the mean over pixels of the L2 norm of their colour, for |delta_i| <= eps.

    Published as "huber", with eta called eps2. Neither squared nor halved, and a mean where the paper has a sum: so
    weak that, under sign steps, hardly more than the box is left.
    """

    eta: float

    bound: ClassVar[str] = "box"

    def slope(self, pixels: int) -> Slope:
        return Slope(colour=self.eta / (self.eps * pixels))

    def formula(self, delta: Tensor) -> Tensor:
        return self.eta / self.eps * delta.norm(dim=1).mean((1, 2))

    def conjugate(self, u: Tensor) -> Tensor:
        best = self.maximiser(u)
        return _sum(u * best) - self.formula(best)

    def maximiser(self, u: Tensor) -> Tensor:
        """Of each pixel by itself: nothing, or u's colour made longer until the m largest channels are clipped at eps.

        With k the penalty's slope, unclipped channels are u_j n / k for a colour of length n, so that
        n^2 = m eps^2 + n^2 sum_unclipped u_j^2 / k^2. Of the candidates m = 0 ... C the best one is the maximum.
        """
        k = self.slope(u.shape[-2] * u.shape[-1]).colour
        size, channels = u.abs(), u.shape[1]
        smallest_first = size.sort(dim=1).values.square().cumsum(1) / k**2
        best = torch.zeros_like(u)
        gain = torch.zeros_like(u[:, :1])
        for clipped in range(1, channels + 1):
            rest = smallest_first[:, channels - clipped - 1, None] if clipped < channels else torch.zeros_like(gain)
            length = self.eps * (clipped / (1 - rest).clamp(min=TINY)).sqrt()
            one = (size * length / k).clamp(max=self.eps)
            its_gain = (size * one).sum(1, keepdim=True) - k * one.norm(dim=1, keepdim=True)
            best = torch.where(its_gain > gain, one, best)
            gain = torch.maximum(gain, its_gain)
        return best * u.sign()


@dataclass(frozen=True)
class ReleasedElasticNet(Penalty):
    """h = sum_i (|delta_i| - eps)^2 / (4 eps2), everywhere: `ElasticNet` for eta -> 0 outside of [-eps, eps].

    Published as "elastic". Its clamp at zero follows the square, where it does nothing: small perturbations are
    charged as well, and pushed outwards.
    """

    eps2: float

    bound: ClassVar[str] = "none"

    def slope(self, pixels: int) -> Slope:
        outer = 1 / (2 * self.eps2)
        return Slope(knee=0.0, outer=outer, level=-self.eps * outer)

    def formula(self, delta: Tensor) -> Tensor:
        return _sum((delta.abs() - self.eps).square()) / (4 * self.eps2)

    def conjugate(self, u: Tensor) -> Tensor:
        return _sum(self.eps * u.abs() + self.eps2 * u.square())

    def maximiser(self, u: Tensor) -> Tensor:
        return torch.where(u < 0, -self.eps, self.eps) + 2 * self.eps2 * u


@dataclass(frozen=True)
class ReleasedGroupNorm(Penalty):
    """h = 0 where every group's L2 norm is at most eps: published as "group", on the grid of `GroupNorm`."""

    cell: int = 14

    bound: ClassVar[str] = "group"

    @property
    def cells(self) -> int:
        return self.cell

    def slope(self, pixels: int) -> Slope:
        return Slope()

    def formula(self, delta: Tensor) -> Tensor:
        return delta.new_zeros(len(delta))

    def conjugate(self, u: Tensor) -> Tensor:
        return self.eps * _sum(cell_norms(u, self.cell))

    def maximiser(self, u: Tensor) -> Tensor:
        return scale_cells_(u.clone(), self.eps / cell_norms(u, self.cell).clamp(min=TINY), self.cell)


PENALTIES = ("huber", "elastic_net", "group_norm", "none")
RECIPES = ("paper", "released")


def penalty(name: str, recipe: str, *, eps: float, eta: float, eps2: float, cell: int) -> Penalty:
    """The penalty of this name as the paper defines it or as the released code computes it, with what it needs of the
    numbers. Raises InputError for unknown names and for numbers that are not above 0."""
    for field, value, known in (("penalty", name, PENALTIES), ("recipe", recipe, RECIPES)):
        if value not in known:
            raise InputError(f"{field} {value!r} is not known; {nearest(value, known)}")
    if name == "none":
        return Box(eps)
    released = recipe == "released"
    if name == "huber":
        return ReleasedHuber(eps, eta) if released else Huber(eps, eta)
    if name == "elastic_net":
        return ReleasedElasticNet(eps, eps2) if released else ElasticNet(eps, eta, eps2)
    return ReleasedGroupNorm(eps, cell) if released else GroupNorm(eps, eta, cell)


def _huber(size: Tensor, eta: float) -> Tensor:
    """Huber's function of absolute values."""
    return torch.where(size <= eta, size.square() / (2 * eta), size - eta / 2)


def _sum(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)
