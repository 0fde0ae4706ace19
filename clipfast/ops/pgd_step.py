"""One step of projected gradient ascent on a penalised loss, over pixels, in place.

    g        = d loss/d delta - h'(delta)          what is not finite becomes zero, and is counted
    velocity = d(momentum * velocity + d(g))       d: the sign, unit length, or g itself
    delta    = image clamp(project(delta + step_size * velocity))

Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, eq. 2.1 and section 4, with the
penalty h of adversarial fine-tuning (clipfast/finetune/penalties.py), whose derivative is a `Slope`. Directions are
renewed after the momentum, as published code for CLIP does it; where the direction is the sign, a momentum below 1
then decides only coordinates whose gradient is exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clipfast.errors import InputError, nearest
from clipfast.ops.dispatch import Backend, Op, Triton, registered

DIRECTIONS = ("sign", "normalized", "gradient")
BOUNDS = ("none", "box", "group")
# Below this length a gradient has no direction, as in torch.nn.functional.normalize.
TINY = 1e-12
# Pixels along a side of the largest cell that one program of the Triton kernel holds.
LARGEST_CELL = 64


class Slope(NamedTuple):
    """Derivative of a penalty: odd, linear on both sides of a knee, and a pull towards zero for each pixel's colour.

    inner * v for |v| <= knee; sign(v) (outer |v| + level) beyond; plus colour * v / (L2 norm over the channels of v's
    pixel), which is zero where that norm is.
    """

    inner: float = 0.0
    knee: float = math.inf
    outer: float = 0.0
    level: float = 0.0
    colour: float = 0.0

    def __call__(self, delta: Tensor) -> Tensor:
        """h' at delta (B, C, H, W)."""
        slope = self.inner * delta
        if self.knee < math.inf:
            size = delta.abs()
            slope = torch.where(size <= self.knee, slope, delta.sign() * (self.outer * size + self.level))
        if self.colour:
            norm = delta.norm(dim=1, keepdim=True)
            slope = slope + self.colour * torch.where(norm > 0, delta / norm, 0)
        return slope


@dataclass(frozen=True)
class Step:
    """What every backend gets. Tensors (B, C, H, W) are contiguous; delta, velocity and count are written to."""

    delta: Tensor
    velocity: Tensor | None
    gradient: Tensor
    image: Tensor
    count: Tensor  # () int64
    slope: Slope
    bound: str
    radius: float
    step_size: float
    momentum: float
    direction: str
    cell: int


def define(x: Step) -> Tensor:
    """pgd_step in plain PyTorch: what it means, and what runs where nothing faster can."""
    cell = x.cell if x.bound == "group" else 0
    g = x.gradient - x.slope(x.delta)
    # The sum says in one pass that there is nothing to repair; a GPU would be waited for.
    if g.is_cuda or not g.sum().isfinite():
        x.count.add_((~g.isfinite()).sum())
        g.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    g = directed(g, x.direction, cell)
    if x.velocity is not None:
        g = directed(g.add_(x.velocity, alpha=x.momentum), x.direction, cell)
        x.velocity.copy_(g)
    project_(x.delta.add_(g, alpha=x.step_size), x.bound, x.radius, x.cell)
    return x.delta.clamp_(-x.image, 1 - x.image)


def directed(g: Tensor, direction: str, cell: int = 0) -> Tensor:
    """g (B, C, H, W) as its sign, of unit L2 norm over each cell (over each image for cell=0), or as it is.

    What has no gradient stays zero. Writes to g.
    """
    if direction == "sign":
        return g.sign_()
    if direction == "normalized" and cell:
        return scale_cells_(g, 1 / cell_norms(g, cell).clamp_(min=TINY), cell)
    if direction == "normalized":
        return g.div_(g.flatten(1).norm(dim=1).clamp_(min=TINY)[:, None, None, None])
    return g


def project_(delta: Tensor, bound: str, radius: float, cell: int = 0) -> Tensor:
    """delta (B, C, H, W) in place onto |delta| <= radius ("box"), or onto cells of L2 norm <= radius ("group").

    Pixels outside of all cells become zero.
    """
    if bound == "box":
        return delta.clamp_(-radius, radius)
    if bound == "group":
        return scale_cells_(delta, radius / cell_norms(delta, cell).clamp_(min=radius), cell)
    return delta


def cell_norms(x: Tensor, cell: int) -> Tensor:
    """L2 norms of the whole cell x cell squares of each channel of x (B, C, H, W): (B, C, H // cell, W // cell)."""
    return _cells(x, cell).square().sum((3, 5)).sqrt_()


def scale_cells_(x: Tensor, factors: Tensor, cell: int) -> Tensor:
    """x (B, C, H, W) in place times a factor for each of its cells, and zero outside of them."""
    _cells(x, cell).mul_(factors[:, :, :, None, :, None])
    rows, columns = factors.shape[2] * cell, factors.shape[3] * cell
    x[:, :, rows:].zero_()
    x[:, :, :, columns:].zero_()
    return x


def _cells(x: Tensor, cell: int) -> Tensor:
    """x (B, C, H, W) as (B, C, H // cell, cell, W // cell, cell): a view without the pixels beyond the last cell."""
    rows, columns = x.shape[2] // cell, x.shape[3] // cell
    return x[:, :, : rows * cell, : columns * cell].unflatten(3, (columns, cell)).unflatten(2, (rows, cell))


class TorchStep(Backend[Step]):
    name = "torch"

    def run(self, inputs: Step) -> Tensor:
        return define(inputs)


class TritonStep(Triton[Step]):
    """kernels/pgd_step.py."""

    dtypes = {  # noqa: RUF012
        "delta": frozenset({torch.float32}),
        "velocity": frozenset({torch.float32}),
        "gradient": frozenset({torch.float32, torch.float16, torch.bfloat16}),
        "image": frozenset({torch.float32}),
    }

    def why_not(self, inputs: Step) -> list[str]:
        reasons = super().why_not(inputs)
        if inputs.direction == "normalized" and inputs.bound != "group":
            reasons.append("a direction of unit length over an image needs the whole image first")
        if inputs.bound == "group" and inputs.slope.colour:
            reasons.append("a group is a cell of one channel, and this penalty couples channels")
        if inputs.bound == "group" and inputs.cell > LARGEST_CELL:
            reasons.append(f"a cell of {inputs.cell} pixels is larger than {LARGEST_CELL}")
        return reasons

    def launch(self, inputs: Step) -> Tensor:
        from clipfast.kernels import pgd_step

        x = inputs
        pgd_step.pgd_step(
            x.delta,
            x.velocity,
            x.gradient,
            x.image,
            x.count,
            x.slope,
            x.bound,
            x.radius,
            x.step_size,
            x.momentum,
            x.direction,
            x.cell,
            TINY,
        )
        return x.delta


_step = Op("pgd_step", TritonStep(), TorchStep())


@registered(lambda *arguments, **settings: None, mutates=["delta", "velocity", "count"])
def pgd_step(
    delta: Tensor,
    velocity: Tensor | None,
    gradient: Tensor,
    image: Tensor,
    count: Tensor,
    slope: Sequence[float],
    bound: str,
    radius: float,
    step_size: float,
    momentum: float,
    direction: str,
    cell: int,
) -> None:
    """One step in place: delta and velocity move, and count grows by the gradients that were not finite.

    delta      (B, C, H, W) float32 or float64, contiguous: the perturbation, which with the image stays in [0, 1].
    velocity   like delta, or None for no momentum.
    gradient   of the loss with respect to delta, the penalty's not included; any dtype.
    image      like delta, in [0, 1].
    count      () int64, on the same device.
    slope      the penalty's derivative, the numbers of a `Slope`.
    bound      "box" (|delta| <= radius), "group" (the L2 norm of each cell x cell square of a channel <= radius, and
               zero outside of whole squares) or "none".
    direction  "sign", "normalized" (unit L2 norm over each cell for bound="group", over each image else) or "gradient".

    Raises InputError when names, shapes, dtypes, strides or devices do not fit; nothing is written then.
    """
    for name, value, known in (("bound", bound, BOUNDS), ("direction", direction, DIRECTIONS)):
        if value not in known:
            raise InputError(f"{name} {value!r} of pgd_step is not known; {nearest(value, known)}")
    moving = [delta] if velocity is None else [delta, velocity]
    tensors = [*moving, gradient, image]
    if delta.ndim != 4 or any(t.shape != delta.shape for t in tensors):
        raise InputError(f"delta, velocity, gradient and image must all be (B, C, H, W), not {_shapes(tensors)}.")
    if any(t.device != delta.device for t in [*tensors, count]):
        devices = sorted({str(t.device) for t in [*tensors, count]})
        raise InputError(f"the tensors are on {' and '.join(devices)}; they must be on one device.")
    if delta.dtype not in (torch.float32, torch.float64) or any(t.dtype != delta.dtype for t in [*moving, image]):
        raise InputError("delta, velocity and image must all be float32, or all float64: half precision loses steps.")
    if not all(t.is_contiguous() for t in moving):
        raise InputError("delta and velocity must be contiguous, as they are written to in place.")
    if count.dtype != torch.int64 or count.ndim:
        raise InputError(f"count must be one int64 number, not {tuple(count.shape)} of {count.dtype}.")
    if bound == "group" and not 1 <= cell <= min(delta.shape[2:]):
        raise InputError(f"cell={cell} must be from 1 to the image's shorter side, {min(delta.shape[2:])}.")
    if not delta.numel():
        return
    with torch.no_grad():
        _step(
            Step(
                delta.detach(),
                None if velocity is None else velocity.detach(),
                gradient.detach().contiguous(),
                image.detach().contiguous(),
                count,
                Slope(*slope),
                bound,
                radius,
                step_size,
                momentum,
                direction,
                cell,
            )
        )


def _shapes(tensors: Sequence[Tensor]) -> str:
    return " and ".join(str(tuple(t.shape)) for t in tensors)
