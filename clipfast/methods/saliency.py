"""Saliency (Simonyan et al., Deep Inside Convolutional Networks, ICLR workshop 2014) and SmoothGrad (Smilkov et al.,
2017): how strongly a score answers to each pixel.

    saliency       M(x) = sum over channels of |dS/dx|
    smooth_grad    the mean of M(x + e) over noisy copies, e ~ N(0, (sigma (max x - min x))^2)

S is the cosine of image and text. A transformer runs from the tokens before its first norm on; the patch embedding
below them is linear, and its transpose brings their gradients to the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clipfast.methods.base import Explained, Method, MethodInfo, at_least
from clipfast.models.families import AnyImageTower
from clipfast.models.gradients import score_gradients
from clipfast.models.text import TextTower


@dataclass(frozen=True)
class GradientExplained(Explained):
    """A batch of B inputs whose score's gradients are maps.

    passes: what has run through the tower, or runs through it now: the unit embeddings of S copies of the batch,
    (S * B, E), and the inputs that they were made of, with gradients: tokens (S * B, N, D), or a ResNet's pixels
    (S * B, 3, H, W). lengths: the gradients with respect to those inputs -> maps (S * B, n). Maps are means over
    `copies`, the S of all passes. keep: whether the passes are the same whenever they are asked for.
    """

    z: Tensor
    passes: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    lengths: Callable[[Tensor], Tensor]
    copies: int
    keep: bool

    def maps(self, texts: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Maps (B, P, n) for unit text embeddings (P, E) or (B, P, E)."""
        batch, prompts = len(self.z), texts.shape[-2]
        texts = texts.expand(batch, -1, -1)
        done = 0
        for z, inputs in self.passes():
            copies = len(z) // batch
            for p, (gradient,) in enumerate(score_gradients(z, [inputs], texts.repeat(copies, 1, 1), keep=self.keep)):
                found = self.lengths(gradient.to(self.z.dtype)).unflatten(0, (copies, batch)).sum(0) / self.copies
                if out is None:
                    out = found.new_empty(batch, prompts, found.shape[1])
                out[:, p] = found if done == 0 else out[:, p] + found
            done += copies
        assert out is not None
        return out


@dataclass(frozen=True)
class Saliency(Method):
    """The length of the score's gradient: of a pixel's channels, or of a token's embedding, in the L1 norm.

    Image maps have the input's own size (H, W). No parameters.
    """

    needs: ClassVar = "pixels"
    keeps_activations: ClassVar[bool] = True
    info: ClassVar = MethodInfo(
        source="Simonyan et al., ICLR workshop 2014",
        forwards="1",
        backwards="P",
        prompt_free=False,
        agrees="captum's Saliency, its channels summed, to 1e-9 in float64",
        our_reading="channels are summed where the paper takes their maximum, as CLIP's comparisons do",
    )

    def grid(self, tower: AnyImageTower, size: tuple[int, int]) -> tuple[int, int]:
        return size

    @torch.no_grad()
    def image(self, tower: AnyImageTower, x: Tensor) -> GradientExplained:
        """Prepare normalised images (B, 3, H, W); n is H * W, row by row."""
        z, tokens = _from_tokens(tower, x)
        return GradientExplained(z.detach(), lambda: [(z, tokens)], _pixels(tower, x), 1, keep=True)

    @torch.no_grad()
    def text(self, tower: TextTower, ids: Tensor, words: Tensor) -> GradientExplained:
        """Prepare token ids (B, T); n is T, or less where padding at the end can have no influence."""
        texts = tower.read(ids)
        own, inside = texts.own, words[:, texts.own] > 0
        with torch.enable_grad():
            tokens = texts.h.requires_grad_()
            z = tower.finish(tokens, texts.pooled, mask=texts.mask, visible=texts.visible)

        def attribute(gradient: Tensor) -> Tensor:
            return gradient[:, own].abs().sum(-1) * inside

        return GradientExplained(z.detach(), lambda: [(z, tokens)], attribute, 1, keep=True)


@dataclass(frozen=True)
class SmoothGrad(Method):
    """Saliency, averaged over noisy copies of each image. Image maps have the input's own size (H, W).

    samples: noisy copies. sigma: the noise's standard deviation, as a share of an image's own range from its lowest to
        its highest value. seed: of the noise; every image meets the same noise, so that its map depends neither on the
        batch that it is in nor on its place there.
    """

    samples: int = 25
    sigma: float = 0.15
    seed: int = 0

    needs: ClassVar = "pixels"
    keeps_activations: ClassVar[bool] = True
    info: ClassVar = MethodInfo(
        source="Smilkov et al., 2017",
        forwards="samples + 1",
        backwards="samples x P",
        prompt_free=False,
        agrees="the mean of autograd's gradients over the same noisy copies, to 1e-9 in float64",
        our_reading="what is averaged is the absolute gradient, summed over channels",
    )

    def __post_init__(self) -> None:
        at_least(self, "samples", 1, whole=True)
        at_least(self, "sigma", 0)
        at_least(self, "seed", 0, whole=True)

    def grid(self, tower: AnyImageTower, size: tuple[int, int]) -> tuple[int, int]:
        return size

    @torch.no_grad()
    def image(self, tower: AnyImageTower, x: Tensor) -> GradientExplained:
        """Prepare normalised images (B, 3, H, W); n is H * W, row by row."""
        at_once = max(1, tower.rows_at_once(math.prod(tower.grid_of(x)), gradients=True) // len(x))

        def passes() -> Iterator[tuple[Tensor, Tensor]]:
            generator = torch.Generator(x.device).manual_seed(self.seed)
            spread = self.sigma * (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))
            for first in range(0, self.samples, at_once):
                copies = range(first, min(first + at_once, self.samples))
                yield _from_tokens(tower, torch.cat([x + spread * _noise(x, generator) for _ in copies]))

        return GradientExplained(tower.encode(x), passes, _pixels(tower, x), self.samples, keep=False)


def _from_tokens(tower: AnyImageTower, x: Tensor) -> tuple[Tensor, Tensor]:
    """(unit embeddings with gradients, the linear part that they are made of: `patch`) of images x."""
    # A ResNet's are the caller's own pixels: what is told to gather gradients is a view of them.
    tokens = tower.patch(x).detach()
    with torch.enable_grad():
        return tower.from_patch(tokens.requires_grad_()), tokens


def _pixels(tower: AnyImageTower, x: Tensor) -> Callable[[Tensor], Tensor]:
    size = (x.shape[2], x.shape[3])
    return lambda gradient: tower.to_pixels(gradient, size).abs().sum(1).flatten(1)


def _noise(x: Tensor, generator: torch.Generator) -> Tensor:
    """One copy's noise (3, H, W), drawn in float32 for any dtype so that all see the same."""
    return torch.randn(x.shape[1:], generator=generator, device=x.device).to(x.dtype)
