"""Straight paths from a baseline's tokens to an input's own, on which integrated gradients and MGA-CLIP are built."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.errors import InputError
from clipfast.methods.quadrature import quadrature
from clipfast.models.families import AnyImageTower
from clipfast.models.image import ImageTower
from clipfast.ops.path import path_points

Baseline = Literal["mean", "black", "blur"] | Tensor
"""Where a path of images begins. "mean": the data's mean colour, which normalising makes zero. "black". "blur": each
image itself, blurred (`blurred`). Or a normalised image of one's own, broadcastable to (3, H, W)."""

# Fong and Vedaldi blur by 10 pixels where images have 224.
_SIGMA = 10 / 224


def _same(points: Tensor) -> Tensor:
    return points


@dataclass(frozen=True)
class Path:
    """The points start + a (end - start), 0 <= a <= 1, between tokens of one place in a tower.

    start (B, N, D), or (1, N, D) for one that all inputs share. end (B, N, D). block: the block that takes them, once
    `lift` has been applied. tokens: N, which is what a pass costs by.

    Where a tower's stem is not linear, start and end are pixels, (B, 3, H, W), and `lift` is the stem.
    """

    start: Tensor
    end: Tensor
    block: int
    tokens: int
    lift: Callable[[Tensor], Tensor] = _same

    @cached_property
    def delta(self) -> Tensor:
        """end - start, in float32 at least."""
        wide = torch.promote_types(self.end.dtype, torch.float32)
        return self.end.to(wide) - self.start.to(wide)

    def points(self, tower: Any, rule: str, steps: int, *, gradients: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """(points (S * B, N, D) ordered as `path_points` does, their weights (S,)), so many steps at a time as one
        pass of the tower should take: memory does not grow with the number of steps."""
        delta = self.delta
        nodes, weights = (t.to(delta.device, delta.dtype) for t in quadrature(rule, steps))
        at_once = max(1, tower.rows_at_once(self.tokens, gradients=gradients) // len(delta))
        for a, w in zip(nodes.split(at_once), weights.split(at_once), strict=True):
            yield path_points(self.start, delta, a, self.end.dtype), w


def image_path(tower: AnyImageTower, x: Tensor, baseline: Tensor, block: int | None) -> Path:
    """The path between images' tokens, from `baseline` (1 or B, 3, H, W) to x (B, 3, H, W).

    block: at the input of which block; None: before the norm below the first, where tokens are still linear in pixels,
    so that a straight path between tokens is one between images; the only way through convolutions.
    """
    if block is None:
        return Path(tower.patch(baseline), tower.patch(x), 0, math.prod(tower.grid_of(x)), tower.tokens)
    assert isinstance(tower, ImageTower)
    start, end = (tower.run(tower.embed(images), stop=block) for images in (baseline, x))
    return Path(start, end, block, end.shape[1])


def image_baseline(baseline: Baseline, tower: AnyImageTower, x: Tensor) -> Tensor:
    """Where the paths to images x (B, 3, H, W) begin: (1, 3, H, W) where they share it, else (B, 3, H, W).

    Raises InputError for a tensor that does not fit, or where what black is in the model's input is not known.
    """
    size = (1, *x.shape[1:])
    if isinstance(baseline, Tensor):
        try:
            return baseline.detach().to(x.device, x.dtype).expand(size)
        except RuntimeError:
            raise InputError(
                f"a baseline must broadcast to the images' {tuple(x.shape[1:])}, not be {tuple(baseline.shape)}."
            ) from None
    if baseline == "mean":
        return x.new_zeros(size)
    if baseline == "blur":
        return blurred(x, _SIGMA * min(x.shape[-2:]))
    if tower.black is None:
        raise InputError("this tower was read without its preprocessing: give baseline='black' as a tensor instead.")
    return x.new_tensor(tower.black)[:, None, None].expand(size)


def check_baseline(baseline: Any) -> None:
    """Raises InputError unless `baseline` is a Baseline."""
    if not isinstance(baseline, Tensor) and baseline not in ("mean", "black", "blur"):
        raise InputError(f"baseline={baseline!r} must be 'mean', 'black', 'blur' or a normalised image as a tensor.")


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Images (B, 3, H, W) through a Gaussian of so many pixels, cut off at three sigma, edges repeated."""
    radius = math.ceil(3 * sigma)
    wide = torch.promote_types(x.dtype, torch.float32)
    at = torch.arange(-radius, radius + 1, device=x.device, dtype=wide)
    kernel = torch.exp(-0.5 * (at / sigma).square())
    kernel /= kernel.sum()
    rows = F.pad(x.to(wide).flatten(0, 1)[:, None], (radius,) * 4, mode="replicate")
    rows = F.conv2d(F.conv2d(rows, kernel[None, None, None]), kernel[None, None, :, None])
    return rows.unflatten(0, x.shape[:2])[:, :, 0].to(x.dtype)
