"""Towers: what attribution methods need from one side of a CLIP model.

A tower runs its blocks from the model's weights up to the *site*, the attention that writes the pooled token, and
hands out that attention's q, k, v and residual together with the tail above it. Both sides, and every family of models,
look the same to a method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.errors import InputError
from clipfast.models.block import AttentionBlock, Block, Pool
from clipfast.models.tail import Tail

# Tokens in one pass of a tower. On a CPU small batches stay in its caches: a tower is about a tenth cheaper an image
# in batches of 4 than of 28 (ViT-B/16); a GPU wants to be filled.
CPU_TOKENS, GPU_TOKENS = 800, 32768


@dataclass(frozen=True)
class Site:
    """The attention of one block that writes the pooled token, for a batch.

    q (B, D): the pooled token's query. k, v (B, N, D): all tokens, prefix included. o (B, D): the pooled token's
    attention output, heads concatenated, before the output projection. residual (B, D): the pooled token's residual
    stream below that attention, None where there is none (attention pools). mask (B, N): True for tokens that the
    pooled token may attend to, or None for all.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    residual: Tensor | None
    mask: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """What happens in one block: its input h, the q, k and v of its attention, that attention's output o; (B, N, D)."""

    block: Block
    h: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


@dataclass(frozen=True, kw_only=True)
class Tower:
    """One side of the model: blocks, what makes an embedding of the last one's output, and where the pooled token is.

    The last of `blocks` is where the embedding is pooled: a transformer's own last block, or an attention pool above
    it. They run in the trunk's dtype; `tail` and everything at the site in float32, or float64 for a float64 model.

    pooled tokens come as positions (B,), or where the embedding is of a mean over tokens, as weights (B, N).
    """

    blocks: Sequence[AttentionBlock]
    tail: Tail
    causal: bool
    # exp of the model's logit scale: what its softmax over classes multiplies cosines by.
    logit_scale: float

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def trunk(self) -> Sequence[Block]:
        """The blocks in which every token attends: all but an attention pool."""
        return [block for block in self.blocks if isinstance(block, Block)]

    @property
    def width(self) -> int:
        return self.blocks[0].width

    @property
    def embed_dim(self) -> int:
        return self.tail.embed_dim

    @property
    def dtype(self) -> torch.dtype:
        """The trunk's dtype."""
        return self.blocks[0].dtype

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of embeddings, scores and maps."""
        return self.tail.dtype

    @property
    def device(self) -> torch.device:
        return self.tail.device

    def block_index(self, index: int | str, name: str) -> int:
        """The number of the block that a parameter `name` means; negative ones count from the top.

        Raises InputError where there is no such block.
        """
        if not isinstance(index, int) or isinstance(index, bool) or not -self.depth <= index < self.depth:
            raise InputError(
                f"{name}={index!r} is no block of this tower of {self.depth}: "
                f"give a whole number from {-self.depth} to {self.depth - 1}."
            )
        return index % self.depth

    def last_blocks(self, layers: int) -> int:
        """The number of the lowest of the last `layers` blocks. Raises InputError where there are fewer."""
        if layers > self.depth:
            raise InputError(f"layers={layers} was asked for, but this tower has {self.depth} blocks.")
        return self.depth - layers

    def rows_at_once(self, tokens: int, *, gradients: bool = False) -> int:
        """How many inputs of so many tokens one pass should take; fewer on a GPU where their activations are kept."""
        return rows_at_once(self.device, tokens, gradients)

    def run(
        self,
        h: Tensor,
        start: int = 0,
        stop: int | None = None,
        *,
        heads: int | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Blocks start..stop-1 of the trunk on tokens h (B, N, D); stop=None runs to its top."""
        for block in self.trunk[start:stop]:
            h = block(h, heads=heads, mask=mask)
        return h

    def layers(
        self,
        h: Tensor,
        start: int = 0,
        stop: int | None = None,
        *,
        heads: int | None = None,
        mask: Tensor | None = None,
    ) -> Iterator[tuple[Layer, Tensor]]:
        """Blocks start..stop-1 of the trunk, run as they are asked for: (what happened in it, its output (B, N, D)).

        Differentiable in h where gradients are enabled.
        """
        for block in self.trunk[start:stop]:
            q, k, v = block.query_key_value(h)
            o = block.attend(q, k, v, heads=heads, mask=mask)
            out = block.above(h, o)
            yield Layer(block, h, q, k, v, o), out
            h = out

    def finish(
        self,
        h: Tensor,
        pooled: Tensor,
        start: int = 0,
        *,
        heads: int | None = None,
        mask: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """Unit embeddings (B, E) of h (B, N, D), the input of block `start`; the last block runs for the pooled token.

        Differentiable in h where gradients are enabled. Arguments as for `run` and `site`.
        """
        return F.normalize(self.unnormalized(h, pooled, start, heads=heads, mask=mask, visible=visible), dim=-1)

    def unnormalized(
        self,
        h: Tensor,
        pooled: Tensor,
        start: int = 0,
        *,
        heads: int | None = None,
        mask: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """What `finish` gives, before its length is made one."""
        if pooled.ndim == 2:
            return self._mean(self.run(h, start, heads=heads, mask=mask).to(self.result_dtype), pooled)
        h = self.run(h, start, self.depth - 1, heads=heads, mask=mask)
        last = self.blocks[-1]
        if isinstance(last, Pool) and heads is None:
            return self.tail.embed(None, last.output(h).to(self.result_dtype))
        site = self.site(h, pooled, heads=heads, visible=visible)
        return self.tail.embed(site.residual, site.o)

    def top(self, h: Tensor, pooled: Tensor) -> Tensor:
        """Unit embeddings (B, E) of what leaves the trunk, h (B, N, D)."""
        h = h.to(self.result_dtype)
        if isinstance(self.blocks[-1], Pool):
            return self.finish(h.to(self.blocks[-1].dtype), pooled, self.depth - 1)
        if pooled.ndim == 2:
            return F.normalize(self._mean(h, pooled), dim=-1)
        return F.normalize(self.tail.project(h[torch.arange(len(h), device=h.device), pooled]), dim=-1)

    def _mean(self, h: Tensor, weights: Tensor) -> Tensor:
        return self.tail.project((weights.to(h.dtype)[:, None] @ h)[:, 0])

    def project(self, h: Tensor) -> Tensor:
        """What leaves the trunk, h (..., D), each token for itself in the joint space, not normalised: (..., E).

        Through the final norm and projection; where an attention pool lies between, as if it attended to this token
        alone.
        """
        pool = self.blocks[-1]
        if not isinstance(pool, Pool):
            return self.tail.project(h.to(self.result_dtype))
        _, v = pool.key_value(pool.norm1(h.to(pool.dtype)))
        return self.tail.embed(None, v.to(self.result_dtype))

    def site(
        self,
        h: Tensor,
        pooled: Tensor,
        *,
        index: int = -1,
        heads: int | None = None,
        visible: Tensor | None = None,
    ) -> Site:
        """The site of block `index` for its input h (B, N, D): keys and values of all tokens, the rest of the pooled.

        pooled (B,): each sequence's pooled position. visible (B, N): True where the pooled token may look.

        Raises InputError for a tower that pools the mean of its tokens: it has no site.
        """
        _check_site(pooled)
        block = self.blocks[index]
        x = block.norm1(h)
        residual, q = block.pooled_query(h, x, pooled)
        k, v = block.key_value(x)
        del x
        mask = None if visible is None else torch.where(visible, 0.0, -torch.inf).to(q.dtype)[:, None, None, :]
        o = block.attend(q[:, None], k, v, heads=heads, mask=mask)[:, 0]
        return self._wide(Site(q, k, v, o, residual, visible))

    def site_of(self, layer: Layer, pooled: Tensor, *, visible: Tensor | None = None) -> Site:
        """The site of a block that `layers` has run for all tokens. Raises InputError as `site` does."""
        _check_site(pooled)
        rows = torch.arange(layer.h.shape[0], device=layer.h.device)
        q, o, residual = (t[rows, pooled] for t in (layer.q, layer.o, layer.h))
        return self._wide(Site(q, layer.k, layer.v, o, residual, visible))

    def _wide(self, site: Site) -> Site:
        q, k, v, o = (t.to(self.result_dtype) for t in (site.q, site.k, site.v, site.o))
        residual = None if site.residual is None else site.residual.to(self.result_dtype)
        return Site(q, k, v, o, residual, site.mask)


def _check_site(pooled: Tensor) -> None:
    if pooled.ndim == 2:
        raise InputError(
            "this tower pools the mean of its tokens: no single token's attention writes it; of texts, leave_one_out, "
            "kernel_shap, saliency and integrated_gradients explain the words nevertheless."
        )


def rows_at_once(device: torch.device, tokens: int, gradients: bool) -> int:
    """How many inputs of so many tokens one pass on a device should take."""
    room = CPU_TOKENS if device.type != "cuda" else GPU_TOKENS // (8 if gradients else 1)
    return max(1, room // tokens)
