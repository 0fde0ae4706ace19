"""MGA-CLIP: multi-granularity attribution for CLIP (Cheng et al.). Only the abstract is public: a coarse branch of path
gradients, a fine branch of patch-text similarity and the patches' own affinity, linked by the channels, and fused. The
formulas are our reading of it.

    path     x_s = b + a_s (x - b), quadrature nodes a_s and weights w_s, S steps; between images, or between the tokens
             that they have at the input of a block
    coarse   G = sum_s w_s dS(x_s)/do;   C_i = ReLU(G . v_i)
    fine     sim_i = ReLU(cos(e_i, t)),  e_i = P norm_f(W_o v_i + b_o)
             A_ij = softmax_j(cos(v_i * w, v_j * w) / tau),  w = |G| / max |G|
             F_i = lambda_i sum_j A_ij sim_j
    fused    minmax(C)**eta minmax(F)**(1 - eta), or eta minmax(C) + (1 - eta) minmax(F)

o is the pooled token's attention output in the last block, v_i and lambda (`spatial_weight`) are those of x itself, i
and j run over patches. With frozen weights dS/do needs the one-token tail above that attention only, so S steps cost S
forward passes, and none backwards through the tower. With one step at a = 1 the coarse map is Grad-ECLIP's without
lambda.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.errors import InputError
from clipfast.methods.base import Explained, Method, MethodInfo, Relu, at_least, choice, combine
from clipfast.methods.paths import Baseline, check_baseline, image_baseline, image_path
from clipfast.methods.quadrature import Rule, quadrature
from clipfast.models.block import Pool
from clipfast.models.image import ImageTower
from clipfast.models.linear_block import MeanTail
from clipfast.models.tail import LinearTail
from clipfast.models.tower import Site
from clipfast.ops.minmax import minmax
from clipfast.ops.spatial_attribution import spatial_weight

Part = Literal["fused", "coarse", "fine"]
Fusion = Literal["geometric", "convex"]


@dataclass(frozen=True)
class CoarseExplained(Explained):
    """The coarse branch of B images. values (B, n, D): v. steps: the tail linearised on the path, (S * B) points at a
    time as `path_points` orders them, each with its weights (S,)."""

    z: Tensor
    values: Tensor
    steps: Sequence[tuple[LinearTail | MeanTail, Tensor]]
    relu: Relu = "each"

    def maps(self, texts: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Maps (B, P, n) for unit text embeddings (P, E) or (B, P, E)."""
        batch, n, _ = self.values.shape
        prompts = texts.shape[-2]
        if out is None:
            out = self.z.new_empty(batch, prompts, n)
        even = torch.ones_like(self.values[..., 0])
        if prompts >= n:
            return combine([even], [self.features()], texts, self.relu, out)
        return combine([even], [self.values], self.gradients(texts), self.relu, out)

    def gradients(self, texts: Tensor) -> Tensor:
        """G (B, P, D): the path's weighted sum of the scores' gradients at the pooled token's attention output.

        Where the mean of the patches is pooled, those at all of theirs are added up.
        """
        batch, _, width = self.values.shape
        texts = texts.expand(batch, -1, -1)
        total = self.values.new_zeros(batch, texts.shape[1], width)
        for tail, weights in self.steps:
            rows = tail.vjp(texts.repeat(len(weights), 1, 1)).unflatten(0, (len(weights), batch))
            total += torch.einsum("s,sbpd->bpd", weights, rows)
        return total

    def features(self) -> Tensor:
        """Attribution features (B, n, E): G . v_i = A_i . t for every text t."""
        batch, n, _ = self.values.shape
        total = self.values.new_zeros(batch, n, self.z.shape[1])
        for tail, weights in self.steps:
            # One step at a time: a pass's steps together would take several times the tower's own memory.
            for step, weight in enumerate(weights):
                total.add_(tail.at(slice(step * batch, (step + 1) * batch)).jvp(self.values) * weight)
        return total

    def prompt_free(self) -> tuple[Tensor, Tensor]:
        return self.features(), torch.ones_like(self.values[..., 0])


@dataclass(frozen=True)
class FineExplained(Explained):
    """The fine branch of B images. patches (B, n, E): e, of length one. weights (B, n): lambda. tau: see MgaClip."""

    z: Tensor
    coarse: CoarseExplained
    patches: Tensor
    weights: Tensor
    tau: float

    def maps(self, texts: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Maps (B, P, n) for unit text embeddings (P, E) or (B, P, E)."""
        if out is None:
            out = self.z.new_empty(len(self.z), texts.shape[-2], self.weights.shape[1])
        for some, room in _few(texts, out):
            room.copy_(self.given(some, self.coarse.gradients(some)))
        return out

    def given(self, texts: Tensor, gradients: Tensor) -> Tensor:
        """The same for gradients G (B, P, D) that are known already."""
        found = (texts.expand(len(self.z), -1, -1) @ self.patches.mT).relu_()
        for p in range(found.shape[1]):
            # A constant factor does not change a cosine: |G| will do for |G| / max |G|.
            rows = F.normalize(self.coarse.values * gradients[:, p, None].abs(), dim=-1)
            affinity = (rows @ rows.mT).div_(self.tau).softmax(-1)
            found[:, p] = self.weights * (affinity @ found[:, p, :, None])[..., 0]
        return found


@dataclass(frozen=True)
class FusedExplained(Explained):
    """Both branches of B images and how they are brought together, see `MgaClip.fuse`."""

    z: Tensor
    fine: FineExplained
    method: MgaClip

    def maps(self, texts: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Maps (B, P, n) for unit text embeddings (P, E) or (B, P, E)."""
        if out is None:
            out = self.z.new_empty(len(self.z), texts.shape[-2], self.fine.weights.shape[1])
        for some, room in _few(texts, out):
            gradients = self.fine.coarse.gradients(some)
            coarse = (gradients @ self.fine.coarse.values.mT).relu_()
            room.copy_(self.method.fuse(coarse, self.fine.given(some, gradients)))
        return out


@dataclass(frozen=True)
class MgaClip(Method):
    """MGA-CLIP. `coarse`, `fine` and `fuse` can be called by themselves.

    part: what maps are made of: "fused", "coarse" or "fine".
    steps: points on the path. rule: how they are placed and weighed, see `quadrature`.
    path: "pixel", or the number of the block at whose input it runs, -1 the last: only the blocks above run for a step.
    baseline: where it begins: "mean", "black", "blur" or a normalised image, as for IntegratedGradients.
    tau: temperature of the affinity between patches.
    fusion: "geometric" or "convex". eta: the coarse branch's share in it, 0 to 1.
    """

    part: Part = "fused"
    steps: int = 16
    rule: Rule = "gausslegendre"
    path: Literal["pixel"] | int = "pixel"
    baseline: Baseline = "mean"
    tau: float = 0.1
    fusion: Fusion = "geometric"
    eta: float = 0.5

    needs: ClassVar = "tokens"
    info: ClassVar = MethodInfo(
        source="Cheng et al. (abstract)",
        forwards="steps + 1",
        backwards="0",
        prompt_free=False,
        agrees="nothing is public; autograd through the whole model in float64, to 1e-10",
        our_reading="all but the abstract's two branches and their link through channels: path, weights and fusion",
    )

    def __post_init__(self) -> None:
        choice(self, "part", "fused", "coarse", "fine")
        choice(self, "fusion", "geometric", "convex")
        quadrature(self.rule, self.steps)
        check_baseline(self.baseline)
        at_least(self, "eta", 0)
        if isinstance(self.path, bool) or not (isinstance(self.path, int) or self.path == "pixel"):
            raise InputError(f"path={self.path!r} must be 'pixel' or the number of a block, such as -3.")
        if not self.eta <= 1:
            raise InputError(f"eta={self.eta} is a share, at most 1.")
        if not (isinstance(self.tau, int | float) and self.tau > 0):
            raise InputError(f"tau={self.tau!r} must be a positive number.")

    @property
    def has_features(self) -> bool:
        return self.part == "coarse"

    def image(self, tower: ImageTower, x: Tensor) -> Explained:
        """Prepare normalised images (B, 3, H, W) for `part`; n is the number of patches, row by row.

        Raises InputError for a baseline that does not fit, and for a block that the tower does not have.
        """
        if self.part == "coarse":
            return self.coarse(tower, x)
        fine = self.fine(tower, x)
        return fine if self.part == "fine" else FusedExplained(fine.z, fine, self)

    def coarse(self, tower: ImageTower, x: Tensor) -> CoarseExplained:
        """The coarse branch of normalised images (B, 3, H, W)."""
        return self.fine(tower, x).coarse

    @torch.no_grad()
    def fine(self, tower: ImageTower, x: Tensor) -> FineExplained:
        """The fine branch of normalised images (B, 3, H, W); it holds the coarse one, whose channels it needs."""
        block = None if self.path == "pixel" else tower.block_index(self.path, "path")
        path = image_path(tower, x, image_baseline(self.baseline, tower, x), block)
        prefix, last = tower.prefix, tower.depth - 1

        def linearize(points: Tensor) -> tuple[Any, Site | None]:
            h = tower.run(path.lift(points), path.block, last)
            if tower.mean:
                return MeanTail.above(tower, h), None
            site = tower.site(h, tower.pooled(h))
            return tower.tail.linearize(site.residual, site.o), site

        tail, site = linearize(path.end)
        if site is None:
            # Every patch is a query: what each finds like itself, on average.
            values, weights = tail.values, tail.lambdas().mean(1)
        else:
            values, weights = site.v[:, prefix:], spatial_weight(site.q, site.k[:, prefix:])
        top = tower.tail.block
        # An attention pool's MLP is part of the way to the joint space; a block's own is not on a value's.
        way = top.branch + top.rest if isinstance(top, Pool) else top.branch
        patches = F.normalize(tower.tail.project(way(values)), dim=-1)
        steps = [(linearize(points)[0], w) for points, w in path.points(tower, self.rule, self.steps)]
        return FineExplained(tail.z, CoarseExplained(tail.z, values, steps), patches, weights, self.tau)

    def fuse(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Maps (..., n) of both branches as one, each min-maxed first; a constant one counts as zero."""
        c, f = minmax(coarse, constant=0.0), minmax(fine, constant=0.0)
        if self.fusion == "convex":
            return self.eta * c + (1 - self.eta) * f
        return c**self.eta * f ** (1 - self.eta)


def _few(texts: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some texts at a time and where their maps go: as many rows as the tower had tokens keep its own memory."""
    count = out.shape[2] + 1
    return zip(texts.split(count, dim=-2), out.split(count, dim=1), strict=True)
