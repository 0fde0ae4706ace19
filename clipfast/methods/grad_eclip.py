"""Grad-ECLIP: gradient-based visual and textual explanations for CLIP (Zhao et al., ICML 2024).

    lambda_i = minmax_i cos(q, k_i)                  the loosened attention of the pooled token, once an image
    H_i      = ReLU(lambda_i * sum_c g_c v_ic)       g = dS/do at the pooled token's attention output o

S is the cosine of the image with the text. With frozen weights dS/do vanishes everywhere but at the pooled token, so g
needs the one-token tail above the last attention only. That holds one block further down, where the pooled token's own
query, key and value in the last block move with it, and in causal text towers at any depth; elsewhere three layers and
more need the full blocks above, once for each of min(P, E) cotangents. Two exact forms of the same maps:

    reverse    g_p for each prompt, one row through the tail's derivative a prompt
    features   A_i = d/de z(o + e v_i), the derivative of the embedding towards each patch's value, prompt-free;
               then v_i . g_p = A_i . t_p for any text t_p
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.errors import InputError
from clipfast.methods.base import Explained, Method, MethodInfo, Relu, at_least, choice, combine
from clipfast.methods.mean_pooled import explain_mean
from clipfast.models.block import AttentionBlock, Block, Pool
from clipfast.models.gradients import Gradients, site_gradients
from clipfast.models.image import ImageTower
from clipfast.models.tail import LinearTail
from clipfast.models.text import TextTower
from clipfast.models.tower import Site, Tower
from clipfast.ops.spatial_attribution import SHORTEST, spatial_weight

Form = Literal["auto", "reverse", "features"]

Watch = Callable[[Tensor], None]
"""Called with the queries (B, n, D) of each block, the lowest first, at the places that the maps have."""


@dataclass(frozen=True)
class SiteExplained(Explained):
    """A batch of B inputs on which Grad-ECLIP has been prepared: any prompt's map is one or two matrix products away.

    z (B, E): unit embeddings. weights: lambda, (B, n) for each explained layer. values: v, (B, n, D) for each.
    gradients: cotangents (R, E) or (B, R, E) -> dS/do at the pooled token, (B, R, D) for each layer.
    tail: the linearised tail when a single layer is explained; it has the forward form, too. cost: multiplications of
    one row through it, from either end.
    """

    z: Tensor
    weights: Sequence[Tensor]
    values: Sequence[Tensor]
    gradients: Gradients
    tail: LinearTail | None
    cost: int
    relu: Relu

    def maps(self, texts: Tensor, *, form: Form = "auto", out: Tensor | None = None) -> Tensor:
        """Maps (B, P, n) for unit text embeddings (P, E), or (B, P, E) with prompts of their own for each input."""
        batch, n, _ = self.values[0].shape
        prompts = texts.shape[-2]
        if form == "auto":
            form = "features" if self._features_pay(prompts) else "reverse"
        if out is None:
            out = self.z.new_empty(batch, prompts, n)
        if form == "features":
            return combine(self.weights, self.features(), texts, self.relu, out)
        # As many rows at a time as the tower itself had tokens keep the memory that of the encode.
        for start in range(0, prompts, n + 1):
            rows = slice(start, start + n + 1)
            combine(self.weights, self.values, self.gradients(texts[..., rows, :]), self.relu, out[:, rows])
        return out

    def features(self) -> list[Tensor]:
        """Attribution features A (B, n, E), one for each layer: v_i . dS/do = A_i . t for every text t."""
        embed = self.z.shape[1]
        if self.tail is not None and self.values[0].shape[1] <= self._jacobian_rows_worth():
            return [self.tail.jvp(self.values[0])]
        found = [v.new_empty(*v.shape[:2], embed) for v in self.values]
        identity = torch.eye(embed, dtype=self.z.dtype, device=self.z.device)
        step = max(64, self.values[0].shape[1])
        for start in range(0, embed, step):
            for a, v, g in zip(found, self.values, self.gradients(identity[start : start + step]), strict=True):
                a[..., start : start + step] = v @ g.mT
        return found

    def prompt_free(self) -> tuple[Tensor, Tensor]:
        """Everything that maps of later texts need: values (B, n, E) and weights (B, n).

        Where ReLU comes before the sum over L layers they cannot be added up: (B, L, n, E) and (B, L, n).
        """
        features = self.features()
        if len(features) == 1:
            return features[0], self.weights[0]
        if self.relu == "each":
            return torch.stack(features, 1), torch.stack(list(self.weights), 1)
        total = torch.stack([w[..., None] * a for w, a in zip(self.weights, features, strict=True)]).sum(0)
        return total, torch.ones_like(self.weights[0])

    def _jacobian_rows_worth(self) -> int:
        """How many forward rows cost as much as the whole Jacobian from the embedding's side."""
        width, embed, cost = self.values[0].shape[2], self.z.shape[1], self.cost
        return embed * cost // max(1, cost - width * embed)

    def _features_pay(self, prompts: int) -> bool:
        _, n, width = self.values[0].shape
        embed = self.z.shape[1]
        rows = min(n, self._jacobian_rows_worth()) if self.tail is not None else embed
        return rows * self.cost + prompts * n * embed < prompts * (self.cost + n * width)


@dataclass(frozen=True)
class GradEclip(Method):
    """Grad-ECLIP with the parameters of its paper, its released scripts and its notebooks.

    heads: "model", or "single": the explained blocks run as one head of width D with scale D**-0.5, as the released
        code does; it explains a slightly different model.
    spatial: "raw" (cosine of q and k; the paper, the notebooks), "projected" (both through the output projection and
        its bias; the released scripts), "none" (no spatial weight) or "combined": the mean of cos(q, k_i) and of
        mean_j cos(q_j, k_i) over the queries of the places that have maps, which is MMEL's base.
    layers: how many of the last blocks to explain; on the text side None takes the last 8 as the authors do.
    reduce: "relu_then_sum" (the authors' images) or "sum_then_relu" (their texts) over layers; None takes theirs.
    lambda_over: text side: "words" or "all" positions, padding included, take part in the min-max (theirs: all).
    signed: keep the sign instead of the final ReLU.
    """

    heads: Literal["model", "single"] = "model"
    spatial: Literal["raw", "projected", "none", "combined"] = "raw"
    layers: int | None = None
    reduce: Literal["relu_then_sum", "sum_then_relu"] | None = None
    lambda_over: Literal["words", "all"] = "words"
    signed: bool = False

    needs: ClassVar = "tokens"
    info: ClassVar = MethodInfo(
        source="Zhao et al., ICML 2024",
        forwards="1",
        backwards="0",
        prompt_free=True,
        agrees="the authors' released code, images and texts, to 1e-9 in float64, with heads='single', "
        "spatial='projected' (and lambda_over='all'); the defaults, several layers and spatial='combined' with naive "
        "automatic differentiation, to 1e-10",
        our_reading="where the released scripts differ from the paper and the notebooks the paper is the default: the "
        "model's own heads, the cosine of q and k as they are, and lambda min-maxed over words alone; a constant "
        "cosine weighs every place alike.",
    )

    @property
    def has_features(self) -> bool:
        return True

    def __post_init__(self) -> None:
        choice(self, "heads", "model", "single")
        choice(self, "spatial", "raw", "projected", "none", "combined")
        choice(self, "reduce", "relu_then_sum", "sum_then_relu", None)
        choice(self, "lambda_over", "words", "all")
        if self.layers is not None:
            at_least(self, "layers", 1, whole=True)

    @torch.no_grad()
    def image(self, tower: ImageTower, x: Tensor, *, watch: Watch | None = None) -> Any:
        """Prepare normalised images (B, 3, H, W); n is the number of patches, row by row.

        Raises InputError for parameters that a tower without a class token has no use for.
        """
        h = tower.embed(x)
        if tower.mean:
            return self.from_last_block(tower, tower.run(h, stop=tower.depth - 1))
        keep = slice(tower.prefix, None)
        layers = 1 if self.layers is None else self.layers
        return self._explain(tower, h, tower.pooled(h), layers, keep, None, "relu_then_sum", watch)

    @torch.no_grad()
    def from_last_block(self, tower: ImageTower, h: Tensor) -> Any:
        """Like `image`, for images of which the last block's input h (B, N, D) is at hand: no block runs twice.

        Raises InputError where more layers are to be explained, and as `image` does.
        """
        if tower.mean:
            if (self.layers or 1) > 1 or self.heads != "model" or self.spatial not in ("raw", "none"):
                raise InputError(
                    "this tower pools the mean of its patches, which Grad-ECLIP explains with layers=1, heads='model' "
                    "and spatial='raw' or 'none' alone."
                )
            return explain_mean(tower, h, spatial=self.spatial == "raw", signed=self.signed)
        top = replace(tower, blocks=tower.blocks[-1:])
        keep = slice(tower.prefix, None)
        return self._explain(top, h, top.pooled(h), self.layers or 1, keep, None, "relu_then_sum", None)

    @torch.no_grad()
    def text(self, tower: TextTower, ids: Tensor, words: Tensor, *, watch: Watch | None = None) -> SiteExplained:
        """Prepare token ids (B, T); positions outside `words` (B, T) get weight zero.

        n is T, or less where padding at the end can have no influence.
        """
        texts = tower.read(ids, whole=self.lambda_over == "all")
        layers = min(8, tower.depth) if self.layers is None else self.layers
        words, seen = words[:, texts.own] > 0, (texts.mask, texts.visible)
        return self._explain(tower, texts.h, texts.pooled, layers, texts.own, words, "sum_then_relu", watch, *seen)

    def _explain(
        self,
        tower: Tower,
        h: Tensor,
        pooled: Tensor,
        layers: int,
        keep: slice,
        where: Tensor | None,
        reduce: str,
        watch: Watch | None,
        mask: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> SiteExplained:
        heads = 1 if self.heads == "single" else None
        first = tower.last_blocks(layers)
        last = tower.blocks[-1]
        if layers > 1 and isinstance(last, Pool):
            raise InputError(
                f"layers={layers} was asked for, but below its attention pool this tower pools no token: give layers=1."
            )
        if watch is None:
            h = tower.run(h, stop=first, mask=mask)
        else:
            # Read while they are in a CPU's caches and freed before the MLP: `layers` would keep them for the caller.
            for block in tower.trunk[:first]:
                q, k, v = block.query_key_value(h)
                watch(q[:, keep])
                o = block.attend(q, k, v, mask=mask)
                del q, k, v
                h = block.above(h, o)
        bottom = h
        sites, weights = [], []
        for layer, out in tower.layers(h, first, tower.depth - 1, heads=heads, mask=mask):
            h, queries = out, layer.q[:, keep]
            if watch is not None:
                watch(queries)
            sites.append(tower.site_of(layer, pooled, visible=visible))
            weights.append(self._weight(layer.block, sites[-1], queries, keep, where))
        # The last block runs for the pooled token alone, so its other queries are made only where they are needed.
        sites.append(tower.site(h, pooled, heads=heads, visible=visible))
        all_queries = None
        # An attention pool has no query of a place: MMEL reads those of the blocks below it.
        if isinstance(last, Block) and (watch is not None or self.spatial == "combined"):
            all_queries = last.query(last.norm1(h))[:, keep]
            if watch is not None:
                watch(all_queries)
        del h
        weights.append(self._weight(last, sites[-1], all_queries, keep, where))
        tail = tower.tail.linearize(sites[-1].residual, sites[-1].o)
        gradients = site_gradients(tower, sites, tail, bottom, pooled, heads, mask)
        relu: Relu = "each" if (self.reduce or reduce) == "relu_then_sum" else "sum"
        return SiteExplained(
            tail.z,
            weights,
            [site.v[:, keep] for site in sites],
            gradients,
            tail if layers == 1 else None,
            tower.tail.cost,
            "none" if self.signed else relu,
        )

    def _weight(
        self, block: AttentionBlock, site: Site, queries: Tensor | None, keep: slice, where: Tensor | None
    ) -> Tensor:
        """lambda (B, n) of one layer; queries (B, n, D) of the kept places are read for "combined" alone."""
        q, k = site.q, site.k[:, keep]
        if self.spatial == "none":
            return k.new_ones(k.shape[:2]) if where is None else where.to(k.dtype)
        taking_part = None if self.lambda_over == "all" else where
        if self.spatial == "projected":
            out = block.out.to(q.dtype)
            q, k = out(q), out(k)
        if self.spatial == "combined":
            if queries is None:
                raise InputError("spatial='combined' needs the places' own queries, which an attention pool has not.")
            q = _combined(q, queries, taking_part)
        weight = spatial_weight(q, k, taking_part)
        return weight if where is None else weight * where


def _combined(q: Tensor, queries: Tensor, where: Tensor | None) -> Tensor:
    """The direction (B, D) whose cosine with a key is, but for a factor that min-max removes, that of the pooled query
    q (B, D) plus the mean of those of `queries` (B, n, D): no query meets every key, and no prompt takes part."""
    queries = queries.to(q.dtype)
    inverse = torch.linalg.vector_norm(queries, dim=-1).clamp_(min=SHORTEST).reciprocal_()
    shares = inverse / inverse.shape[1] if where is None else inverse * where / where.sum(1, keepdim=True).clamp(min=1)
    return F.normalize(q, dim=-1) + (shares[:, None] @ queries)[:, 0]
