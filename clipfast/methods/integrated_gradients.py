"""Integrated gradients (Sundararajan et al., Axiomatic Attribution for Deep Networks, ICML 2017, eq. 1) of CLIP scores.

    A_i = (x_i - b_i) * integral over a in [0, 1] of dS/dx_i at b + a (x - b)
    sum_i A_i = S(x) - S(b)                       completeness; how far a quadrature misses it is reported as `delta`

S is the cosine of image and text, b a baseline. The patch embedding is linear, so a straight path between images is one
between the tokens before the first norm, and so is the sum of gradients along it: the tower runs from those tokens on,
and one transposed convolution a map brings the sum back to the pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from clipfast.errors import InputError
from clipfast.methods.base import Explained, Method, MethodInfo
from clipfast.methods.paths import Baseline, Path, check_baseline, image_baseline, image_path
from clipfast.methods.quadrature import Rule, quadrature
from clipfast.models.families import AnyImageTower
from clipfast.models.gradients import score_gradients
from clipfast.models.text import TextTower
from clipfast.models.tower import Tower
from clipfast.ops.path import path_accumulate

# Sums of gradients that are kept at once: more prompts than these go through the towers again, for the price of one
# forward pass to so many backward ones.
_PROMPTS = 32


@dataclass
class PathExplained(Explained):
    """A batch of B inputs and the path to each: `maps` runs the tower along it, once for every `_PROMPTS` prompts.

    z and z_start (B, E), the latter (1, E) where the paths share their start: unit embeddings of a path's ends.
    encode: points (S * B, N, D) -> their unit embeddings, differentiable. attribute: the integral of the gradients
    (B, N, D) -> maps (B, n).
    """

    z: Tensor
    z_start: Tensor
    tower: Any
    path: Path
    rule: str
    steps: int
    encode: Callable[[Tensor], Tensor]
    attribute: Callable[[Tensor], Tensor]
    _delta: Tensor | None = field(default=None, init=False)

    def maps(self, texts: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Maps (B, P, n) for unit text embeddings (P, E) or (B, P, E)."""
        batch, prompts = len(self.z), texts.shape[-2]
        texts = texts.expand(batch, -1, -1)
        gain = ((self.z - self.z_start)[:, None] @ texts.mT)[:, 0]
        self._delta = torch.empty_like(gain)
        for first in range(0, prompts, _PROMPTS):
            group = range(first, min(first + _PROMPTS, prompts))
            for p, total in zip(group, self._integrals(texts[:, group.start : group.stop]), strict=True):
                found = self.attribute(total)
                if out is None:
                    out = found.new_empty(batch, prompts, found.shape[1])
                out[:, p] = found
                self._delta[:, p] = (self.path.delta * total).flatten(1).sum(1) - gain[:, p]
        assert out is not None
        return out

    def _integrals(self, texts: Tensor) -> Tensor:
        """For texts (B, P, E) the integrals of the scores' gradients along the path: (P, B, N, D)."""
        delta = self.path.delta
        totals = delta.new_zeros(texts.shape[1], *delta.shape)
        for points, weights in self.path.points(self.tower, self.rule, self.steps, gradients=True):
            with torch.enable_grad():
                z = self.encode(points.requires_grad_())
                gradients = score_gradients(z, [points], texts.repeat(len(weights), 1, 1))
                for total, (gradient,) in zip(totals, gradients, strict=True):
                    path_accumulate(total, gradient, weights)
        return totals

    def extras(self) -> dict[str, Tensor]:
        """delta (B, P): the sum of the attribution over all tokens, less S(x) - S(b)."""
        return {} if self._delta is None else {"delta": self._delta}


@dataclass(frozen=True)
class IntegratedGradients(Method):
    """Integrated gradients with captum's rules, in pixels, in tokens or at the input of any block; signed.

    steps: points on the path. rule: how they are placed and weighed, see `quadrature`.
    baseline: images only: "blur" (each image itself under a Gaussian of 10/224 of its shorter side), "mean" (the data's
        mean colour: zero in the model's input, captum's default), "black", or a normalised image as a tensor that
        broadcasts to (3, H, W). From a uniform image a score may stand still and then jump within a small part of the
        path, which 32 steps do not resolve: watch `delta`. Texts begin where the embeddings of their words are zero
        and all positions are there; that path is as uneven, but short texts cost little: take 256 steps.
    at: "pixels": maps have the input's own size (H, W), channels summed. "tokens": the same integral before the norm
        below the first block, the products of difference and gradient summed over each patch's D channels. A number:
        the same at the input of that block, -1 the last, on the straight path between the tokens that baseline and
        input have there; only the blocks above run for every step. Texts: a number as for images, else their token
        embeddings.

    `extras()["delta"]` is the sum of the attribution less S(x) - S(b). In pixels the map holds the whole sum, and so do
    the words of a text without a layer. Inside the tower the class token (SOT and EOT of a text) moves along the path,
    too: its share is part of that sum, not of the map.
    """

    steps: int = 32
    rule: Rule = "gausslegendre"
    baseline: Baseline = "blur"
    at: Literal["pixels", "tokens"] | int = "pixels"

    signed = True
    needs: ClassVar = "pixels"
    keeps_activations: ClassVar[bool] = True
    info: ClassVar = MethodInfo(
        source="Sundararajan et al., ICML 2017",
        forwards="steps + 2",
        backwards="steps x P",
        prompt_free=False,
        agrees="captum's IntegratedGradients and LayerIntegratedGradients, every rule, to 1e-6 in float64",
        our_reading="images begin blurred, texts where their words' embeddings are zero; SOT, EOT and positions stay",
    )

    def __post_init__(self) -> None:
        quadrature(self.rule, self.steps)
        check_baseline(self.baseline)
        if isinstance(self.at, bool) or not (isinstance(self.at, int) or self.at in ("pixels", "tokens")):
            raise InputError(f"at={self.at!r} must be 'pixels', 'tokens' or the number of a block, such as -1.")

    def grid(self, tower: AnyImageTower, size: tuple[int, int]) -> tuple[int, int]:
        return size if self.at == "pixels" else super().grid(tower, size)

    @torch.no_grad()
    def image(self, tower: Any, x: Tensor) -> PathExplained:
        """Prepare normalised images (B, 3, H, W); n is H * W, or the number of patches, row by row.

        Raises InputError for a baseline that does not fit, and for a block that the tower does not have.
        """
        start = image_baseline(self.baseline, tower, x)
        if self.at == "tokens" and not tower.linear:
            raise InputError(f"at='tokens' needs patches linear in the pixels: those of a {tower.kind} are not.")
        path = image_path(tower, x, start, self._block(tower))
        difference = x.to(path.delta.dtype) - start

        def attribute(total: Tensor) -> Tensor:
            if self.at == "pixels":
                return (tower.to_pixels(total, (x.shape[2], x.shape[3])) * difference).sum(1).flatten(1)
            return (path.delta * total).sum(-1)[:, tower.prefix :]

        if isinstance(self.at, str):
            return self._explained(tower, path, tower.from_patch, attribute)
        return self._explained(tower, path, lambda h: tower.finish(h, tower.pooled(h), path.block), attribute)

    @torch.no_grad()
    def text(self, tower: TextTower, ids: Tensor, words: Tensor) -> PathExplained:
        """Prepare token ids (B, T); n is T, or less where padding at the end can have no influence."""
        texts = tower.read(ids)
        inside, mask, block = words[:, texts.own] > 0, texts.mask, self._block(tower)
        start, end = tower.read(ids, blank=words > 0).h, texts.h
        tokens = end.shape[1]
        path = Path(start, end, 0, tokens)
        if block is not None:
            path = Path(tower.run(start, stop=block, mask=mask), tower.run(end, stop=block, mask=mask), block, tokens)

        def encode(points: Tensor) -> Tensor:
            each = texts.at(torch.arange(len(ids)).repeat(len(points) // len(ids)), points)
            return tower.finish(points, each.pooled, path.block, mask=each.mask, visible=each.visible)

        def attribute(total: Tensor) -> Tensor:
            return (path.delta * total).sum(-1)[:, texts.own] * inside

        return self._explained(tower, path, encode, attribute)

    def _block(self, tower: Tower) -> int | None:
        return tower.block_index(self.at, "at") if isinstance(self.at, int) else None

    def _explained(self, tower: Tower, path: Path, encode: Any, attribute: Any) -> PathExplained:
        return PathExplained(
            encode(path.end), encode(path.start), tower, path, self.rule, self.steps, encode, attribute
        )
