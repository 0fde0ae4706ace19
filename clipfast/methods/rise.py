"""RISE: randomized input sampling for explanation (Petsiuk, Das and Saenko, BMVC 2018).

    H = 1 / (N p) * sum_k S(x * M_k) M_k

M_k: a random grid of s x s cells, each kept with probability p, brought up bilinearly to a little more than the image
and cropped at a random place. What is hidden gets zero, the mean colour.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clipfast.errors import InputError
from clipfast.methods.base import Explained, LinearExplained, Method, MethodInfo, Relu, at_least
from clipfast.methods.masking import (
    Coalitions,
    encode_images,
    every_pair,
    every_subset,
    explain_words,
    merge_repeated,
)
from clipfast.models.families import AnyImageTower
from clipfast.models.text import TextTower

# Masks at a time where maps are summed up.
MASKS = 64


@dataclass(frozen=True)
class Masks:
    """N masks for images of one size, drawn; as pictures they are made when they are asked for.

    grids (N, s, s) bool: whether a cell is kept. shifts (N, 2): rows and columns cropped before the image begins.
    cells: a cell's height and width in pixels. size: (H, W).
    """

    grids: Tensor
    shifts: Tensor
    cells: tuple[int, int]
    size: tuple[int, int]

    def __call__(self, start: int, stop: int, like: Tensor) -> Tensor:
        """Masks start..stop-1, (stop - start, H, W), on the device and in the dtype of `like`."""
        grids = self.grids[start:stop].to(like)
        rows, columns = (self._taps(axis, start, stop).to(like) for axis in (0, 1))
        return rows @ grids @ columns.mT

    def _taps(self, axis: int, start: int, stop: int) -> Tensor:
        """What each pixel along an axis takes from each of the grid's cells: (stop - start, H or W, s)."""
        cells = self.grids.shape[1]
        last = cells - 1
        pixels = torch.arange(self.size[axis], dtype=torch.float64) + self.shifts[start:stop, axis, None]
        at = (pixels + 0.5) * cells / ((cells + 1) * self.cells[axis]) - 0.5
        # Mirrored at the centres of the outermost cells, as the authors' resize does it.
        at = last - (last - at.abs()).abs()
        return (1 - (at[..., None] - torch.arange(cells)).abs()).clamp(min=0)


@dataclass(frozen=True)
class RiseExplained(Explained):
    """A batch of B images with the embeddings (B, N, E) of each under N masks."""

    z: Tensor
    masked: Tensor
    masks: Masks
    p: float
    relu: Relu = "none"

    def maps(self, texts: Tensor, *, out: Tensor | None = None) -> Tensor:
        scores = texts.to(self.z.dtype) @ self.masked.mT  # (B, P, N)
        if out is None:
            out = self.z.new_empty(*scores.shape[:2], math.prod(self.masks.size))
        return self._sum(scores, out)

    def prompt_free(self) -> tuple[Tensor, Tensor]:
        """Values (B, H * W, E) and weights, all one: 100 MB for an image of 224 x 224 pixels and an E of 512."""
        batch, _, embed = self.masked.shape
        values = self._sum(self.masked.mT, self.z.new_empty(batch, embed, math.prod(self.masks.size))).mT
        return values, values.new_ones(values.shape[:2])

    def _sum(self, scores: Tensor, out: Tensor) -> Tensor:
        """Masks weighted by scores (B, P, N), into out (B, P, H * W)."""
        count = scores.shape[-1]
        out.zero_()
        for start in range(0, count, MASKS):
            masks = self.masks(start, min(start + MASKS, count), self.z).flatten(1)
            for image, score in zip(out, scores[..., start : start + MASKS], strict=True):
                image.addmm_(score, masks, alpha=1 / (count * self.p))
        return out


@dataclass(frozen=True)
class Rise(Method):
    """RISE. Every image gets the same masks, on any device and in a batch of any size; maps are of pixels.

    masks: N, how many. cells: s, the cells along each side. p: the probability of keeping a cell. seed: of the masks.

    Words: each is kept with probability p, and what is not kept is taken out of the sequence. Where the masks are no
    fewer than the sets of words, every set is encoded once and weighs what it is probable: the mean without its noise.

    Raises InputError for numbers out of range.
    """

    masks: int = 2000
    cells: int = 8
    p: float = 0.5
    seed: int = 0

    info: ClassVar = MethodInfo(
        source="Petsiuk et al., BMVC 2018",
        forwards="masks + 1",
        backwards="0",
        prompt_free=True,
        agrees="the authors' code restated in SciPy with the same grids and shifts: 1e-10 in float64",
        our_reading="words that are not kept leave the sequence and the tokens behind them move up",
    )

    needs: ClassVar = "pixels"

    def __post_init__(self) -> None:
        at_least(self, "masks", 1, whole=True)
        at_least(self, "cells", 2, whole=True)
        at_least(self, "seed", 0, whole=True)
        at_least(self, "p", 0)
        if not 0 < self.p < 1:
            raise InputError(f"p={self.p!r} must be a probability between 0 and 1, neither of them.")

    @property
    def has_features(self) -> bool:
        return True

    def grid(self, tower: AnyImageTower, size: tuple[int, int]) -> tuple[int, int]:
        return size

    @torch.no_grad()
    def image(self, tower: AnyImageTower, x: Tensor) -> RiseExplained:
        """Prepare normalised images (B, 3, H, W); n is the number of pixels, row by row."""
        masks = self.draw((x.shape[2], x.shape[3]))

        def masked(images: Tensor, numbers: Tensor) -> Tensor:
            first = int(numbers[0])
            pictures = masks(first, int(numbers[-1]) + 1, x)
            return x[images] * pictures[numbers - first, None]

        z = encode_images(tower, x, *every_pair(len(x), self.masks), masked)
        return RiseExplained(tower.encode(x), z.unflatten(0, (self.masks, len(x))).transpose(0, 1), masks, self.p)

    @torch.no_grad()
    def text(self, tower: TextTower, ids: Tensor, words: Tensor) -> LinearExplained:
        """Prepare token ids (B, T)."""
        return explain_words(tower, ids, words, self._coalitions)

    def draw(self, size: tuple[int, int]) -> Masks:
        """The masks of images of `size` (H, W)."""
        generator = torch.Generator().manual_seed(self.seed)
        grids = torch.rand(self.masks, self.cells, self.cells, generator=generator, dtype=torch.float64) < self.p
        cells = (-(-size[0] // self.cells), -(-size[1] // self.cells))
        shifts = [torch.randint(cell, (self.masks,), generator=generator) for cell in cells]
        return Masks(grids, torch.stack(shifts, dim=1), cells, size)

    def _coalitions(self, words: int) -> Coalitions:
        if 2**words <= self.masks:
            members = every_subset(words)
            kept = members.sum(-1)
            weights = self.p**kept * (1 - self.p) ** (words - kept)
        else:
            generator = torch.Generator().manual_seed(self.seed)
            drawn = torch.rand(self.masks, words, generator=generator, dtype=torch.float64) < self.p
            members, counts = merge_repeated(drawn)
            weights = counts / self.masks
        return Coalitions(members, (members * weights[:, None].double() / self.p).mT)
