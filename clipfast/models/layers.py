"""What lies between two attentions: small maps that act on every token alone, each with its derivative by hand.

A *stage* is a map of tokens (..., D) to tokens (..., D'). Called, it gives its value, differentiable where gradients
are enabled; `linearize` gives its value and its `Derivative` at points (..., D), for as many directions or cotangents
as wanted. Stages are put together by `Chain` and `Residual`, so that every family's block is a list of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Stage(Protocol):
    """A map of tokens (..., D) -> (..., D')."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def to(self, dtype: torch.dtype) -> Stage:
        """The stage with its weights in `dtype`; those that are in it already stay shared."""

    def linearize(self, x: Tensor) -> tuple[Tensor, Derivative]:
        """The value at points x (..., D), and the derivative there."""


class Derivative:
    """A stage's derivative at points (..., D): rows are (..., R, D), R of them a point.

    owned: the caller has no further use for `rows`, which may be overwritten.
    """

    # The fields that hold something of each point.
    of_points: ClassVar[tuple[str, ...]] = ()

    def jvp(self, rows: Tensor, *, owned: bool = False) -> Tensor:
        """Directions (..., R, D) at the points -> at the values: (..., R, D')."""
        raise NotImplementedError

    def vjp(self, rows: Tensor, *, owned: bool = False) -> Tensor:
        """Cotangents (..., R, D') at the values -> at the points: (..., R, D)."""
        raise NotImplementedError

    def at(self, points: Any) -> Derivative:
        """The derivative at some of the points: `points` indexes their first dimension."""
        chosen: dict[str, Any] = {name: getattr(self, name)[points] for name in self.of_points}
        return replace(self, **chosen)  # type: ignore[type-var]


@dataclass(frozen=True)
class Norm:
    """LayerNorm over the last dimension, or with `centred` false RMSNorm, which leaves the mean where it is.

    Mixed-precision models keep float32 norms between half-precision layers.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centred: bool = True

    def to(self, dtype: torch.dtype) -> Norm:
        weight, bias = self.weight, self.bias
        return replace(
            self,
            weight=None if weight is None else weight.to(dtype),
            bias=None if bias is None else bias.to(dtype),
        )

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is not None and self.weight.dtype != x.dtype:
            return self._norm(x.to(self.weight.dtype)).to(x.dtype)
        return self._norm(x)

    def _norm(self, x: Tensor) -> Tensor:
        if self.centred:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)

    def linearize(self, x: Tensor) -> tuple[Tensor, NormDerivative]:
        derivative = NormDerivative(self, *standardize(x, self.eps, self.centred))
        return affine(derivative.x, self), derivative


@dataclass(frozen=True)
class NormDerivative(Derivative):
    """x (..., D): the points standardised. rstd (..., 1): one over what they were divided by."""

    norm: Norm
    x: Tensor
    rstd: Tensor

    of_points: ClassVar = ("x", "rstd")

    def jvp(self, rows: Tensor, *, owned: bool = False) -> Tensor:
        return gain_(norm_jacobian(rows, self.x, self.rstd, self.norm.centred), self.norm)

    def vjp(self, rows: Tensor, *, owned: bool = False) -> Tensor:
        if not owned and self.norm.weight is not None:
            return norm_jacobian(rows * self.norm.weight, self.x, self.rstd, self.norm.centred)
        return norm_jacobian(gain_(rows, self.norm) if owned else rows, self.x, self.rstd, self.norm.centred)


@dataclass(frozen=True)
class Affine:
    """x W^T + b, with W laid out as torch.nn.Linear's: (out, in).

    rows: the same weight in the trunk's dtype. Where values are wanted in float32 from a half-precision trunk, the
    derivative's products, of many rows, still run in its dtype: in float32 they would cost several times as much.
    """

    weight: Tensor
    bias: Tensor | None = None
    rows: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Affine:
        bias = None if self.bias is None else self.bias.to(dtype)
        return Affine(self.weight.to(dtype), bias, self.weight if self.rows is None else self.rows)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def part(self, rows: slice) -> Affine:
        """Some of the outputs: views of the weights."""
        bias = None if self.bias is None else self.bias[rows]
        return Affine(self.weight[rows], bias, None if self.rows is None else self.rows[rows])

    def linearize(self, x: Tensor) -> tuple[Tensor, AffineDerivative]:
        return self(x), AffineDerivative(self.weight if self.rows is None else self.rows)


@dataclass(frozen=True)
class AffineDerivative(Derivative):
    weight: Tensor

    def jvp(self, rows: Tensor, *, owned: bool = False) -> Tensor:
        return product(rows, self.weight.T)

    def vjp(self, rows: Tensor, *, owned: bool = False) -> Tensor:
        return product(rows, self.weight)

    def at(self, points: Any) -> AffineDerivative:
        return self


@dataclass(frozen=True)
class Scale:
    """x times a factor a channel (LayerScale), or one for all."""

    factor: Tensor

    def to(self, dtype: torch.dtype) -> Scale:
        return Scale(self.factor.to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor

    def linearize(self, x: Tensor) -> tuple[Tensor, ScaleDerivative]:
        return self(x), ScaleDerivative(self.factor)


@dataclass(frozen=True)
class ScaleDerivative(Derivative):
    factor: Tensor

    def jvp(self, rows: Tensor, *, owned: bool = False) -> Tensor:
        return rows.mul_(self.factor) if owned else rows * self.factor

    vjp = jvp

    def at(self, points: Any) -> ScaleDerivative:
        return self


@dataclass(frozen=True)
class Activation:
    """An elementwise activation, its in-place form and its derivative.

    It lies behind an affine map, and without gradients takes that one's place in memory.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    value_: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]

    def to(self, dtype: torch.dtype) -> Activation:
        return self

    def __call__(self, x: Tensor) -> Tensor:
        # In place saves a pass over the widest tensor of a block; autograd needs x itself for the derivative.
        return self.value(x) if torch.is_grad_enabled() else self.value_(x)

    def linearize(self, x: Tensor) -> tuple[Tensor, ActivationDerivative]:
        return self.value(x), ActivationDerivative(self.derivative(x))


@dataclass(frozen=True)
class ActivationDerivative(Derivative):
    """slope (..., F): the activation's derivative at the points."""

    slope: Tensor

    of_points: ClassVar = ("slope",)

    def jvp(self, rows: Tensor, *, owned: bool = False) -> Tensor:
        slope = self.slope[..., None, :]
        return rows.mul_(slope) if owned else rows * slope

    vjp = jvp


@dataclass(frozen=True)
class Gated:
    """act(a) * b of tokens [a, b] (..., 2F), or with `gate_last` a * act(b): SwiGLU, GEGLU."""

    act: Activation
    gate_last: bool = False

    def to(self, dtype: torch.dtype) -> Gated:
        return self

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, dim=-1)
        return (b, a) if self.gate_last else (a, b)

    def __call__(self, x: Tensor) -> Tensor:
        a, b = self._halves(x)
        return self.act.value(a) * b

    def linearize(self, x: Tensor) -> tuple[Tensor, GatedDerivative]:
        a, b = self._halves(x)
        value = self.act.value(a)
        at_a, at_b = self.act.derivative(a) * b, value
        return value * b, GatedDerivative(torch.cat((at_b, at_a) if self.gate_last else (at_a, at_b), dim=-1))


@dataclass(frozen=True)
class GatedDerivative(Derivative):
    """slope (..., 2F): what each half's direction is multiplied with."""

    slope: Tensor

    of_points: ClassVar = ("slope",)

    def jvp(self, rows: Tensor, *, owned: bool = False) -> Tensor:
        slope = self.slope[..., None, :]
        a, b = (rows.mul_(slope) if owned else rows * slope).chunk(2, dim=-1)
        return a + b

    def vjp(self, rows: Tensor, *, owned: bool = False) -> Tensor:
        slope = self.slope[..., None, :]
        half = slope.shape[-1] // 2
        return torch.cat((rows * slope[..., :half], rows * slope[..., half:]), dim=-1)


@dataclass(frozen=True)
class Chain:
    """Stages one after the other; none at all is the identity."""

    stages: tuple[Stage, ...] = ()

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def __add__(self, other: Chain) -> Chain:
        return Chain((*self.stages, *other.stages))

    def split(self) -> tuple[Chain, Chain]:
        """What comes before the last linear maps, and these, which are the same at every point."""
        count = len(self.stages)
        while count and isinstance(self.stages[count - 1], Affine | Scale):
            count -= 1
        return Chain(self.stages[:count]), Chain(self.stages[count:])

    @property
    def cost(self) -> int:
        """Multiplications of one token, but for what is elementwise."""
        nested = sum(stage.inner.cost for stage in self.stages if isinstance(stage, Residual))
        return nested + sum(stage.weight.numel() for stage in self.stages if isinstance(stage, Affine))

    def to(self, dtype: torch.dtype) -> Chain:
        return Chain(tuple(stage.to(dtype) for stage in self.stages))

    def __call__(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x

    def linearize(self, x: Tensor) -> tuple[Tensor, ChainDerivative]:
        found = []
        for stage in self.stages:
            x, derivative = stage.linearize(x)
            found.append(derivative)
        return x, ChainDerivative(tuple(found))


@dataclass(frozen=True)
class ChainDerivative(Derivative):
    stages: tuple[Derivative, ...]

    def jvp(self, rows: Tensor, *, owned: bool = False) -> Tensor:
        for stage in self.stages:
            rows, owned = stage.jvp(rows, owned=owned), True
        return rows

    def vjp(self, rows: Tensor, *, owned: bool = False) -> Tensor:
        for stage in reversed(self.stages):
            rows, owned = stage.vjp(rows, owned=owned), True
        return rows

    def at(self, points: Any) -> ChainDerivative:
        return ChainDerivative(tuple(stage.at(points) for stage in self.stages))


@dataclass(frozen=True)
class Residual:
    """x + inner(x)."""

    inner: Chain

    def to(self, dtype: torch.dtype) -> Residual:
        return Residual(self.inner.to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        return add(self.inner(x), x)

    def linearize(self, x: Tensor) -> tuple[Tensor, ResidualDerivative]:
        value, derivative = self.inner.linearize(x)
        return x + value, ResidualDerivative(derivative)


@dataclass(frozen=True)
class ResidualDerivative(Derivative):
    inner: ChainDerivative

    def jvp(self, rows: Tensor, *, owned: bool = False) -> Tensor:
        inner = self.inner.jvp(rows)
        return rows.add_(inner) if owned else inner.add_(rows)

    def vjp(self, rows: Tensor, *, owned: bool = False) -> Tensor:
        inner = self.inner.vjp(rows)
        return rows.add_(inner) if owned else inner.add_(rows)

    def at(self, points: Any) -> ResidualDerivative:
        return ResidualDerivative(self.inner.at(points))


def add(new: Tensor, x: Tensor) -> Tensor:
    """new + x; in place of `new`, which is the caller's own, where no gradients are wanted."""
    return new + x if torch.is_grad_enabled() else new.add_(x)


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight, multiplied in the weight's dtype and handed back in that of the rows."""
    return (rows.to(weight.dtype) @ weight).to(rows.dtype)


def standardize(x: Tensor, eps: float, centred: bool = True) -> tuple[Tensor, Tensor]:
    """x (..., D) less its mean (where `centred`) and over its deviation, and one over that, (..., 1)."""
    if centred:
        x = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd, rstd


def affine(x: Tensor, norm: Norm) -> Tensor:
    """A norm's gain and bias on standardised x."""
    x = x if norm.weight is None else x * norm.weight
    return x if norm.bias is None else x + norm.bias


def gain_(x: Tensor, norm: Norm) -> Tensor:
    """x times a norm's gain, in place."""
    return x if norm.weight is None else x.mul_(norm.weight)


def norm_jacobian(rows: Tensor, x: Tensor, rstd: Tensor, centred: bool = True) -> Tensor:
    """A norm's Jacobian, rstd (I - 1 1^T / D - x x^T / D), applied to rows (..., R, D); it is symmetric.

    Both rank-one terms go in one pass over the rows. RMSNorm's has the second one alone.
    """
    lead = rows.shape[:-2]
    rows, x, rstd = rows.flatten(0, -3), x.flatten(0, -2), rstd.flatten(0, -2)
    basis = torch.stack((torch.ones_like(x), x), dim=1) if centred else x[:, None]  # (B, 2, D)
    coefficients = rows @ basis.mT  # (B, R, 2)
    found = torch.baddbmm(rows, coefficients, basis, alpha=-1.0 / x.shape[-1]).mul_(rstd[:, None])
    return found.unflatten(0, lead)


def _gelu_derivative(u: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(u / math.sqrt(2))) + u * torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)


def _gelu_tanh_derivative(u: Tensor) -> Tensor:
    c, a = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(c * (u + a * u**3))
    return 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * c * (1 + 3 * a * u * u)


def _quick_gelu_derivative(u: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * u)
    return s * (1 + 1.702 * u * (1 - s))


def _silu_derivative(u: Tensor) -> Tensor:
    s = torch.sigmoid(u)
    return s * (1 + u * (1 - s))


GELU = Activation("gelu", F.gelu, torch.ops.aten.gelu_, _gelu_derivative)
GELU_TANH = Activation(
    "gelu_tanh",
    lambda u: F.gelu(u, approximate="tanh"),
    lambda u: torch.ops.aten.gelu_(u, approximate="tanh"),
    _gelu_tanh_derivative,
)
QUICK_GELU = Activation(
    "quick_gelu",
    lambda u: u * torch.sigmoid(1.702 * u),
    lambda u: u.mul_(torch.sigmoid(1.702 * u)),
    _quick_gelu_derivative,
)
SILU = Activation("silu", F.silu, lambda u: F.silu(u, inplace=True), _silu_derivative)
RELU = Activation("relu", F.relu, torch.relu_, lambda u: (u > 0).to(u.dtype))
TANH = Activation("tanh", torch.tanh, torch.tanh_, lambda u: 1 - torch.tanh(u).square())
