"""Gradients of scores with respect to the attention outputs of a tower's last blocks, at the pooled token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.models.block import Block
from clipfast.models.tail import LinearTail, Tail
from clipfast.models.tower import Site, Tower

Gradients = Callable[[Tensor], list[Tensor]]
"""Cotangents t (R, E) or (B, R, E) -> d(z . t)/do for each explained block, lowest first: (B, R, D)."""


def score_gradients(
    z: Tensor, inputs: Sequence[Tensor], texts: Tensor, *, keep: bool = False
) -> Iterator[list[Tensor]]:
    """For each prompt its scores' gradients with respect to `inputs`, one backward pass a prompt for the whole batch.

    z (B, E): unit embeddings made from `inputs` (B, ...) with gradients enabled, each row from its own row of them.
    texts (P, E) or (B, P, E): unit embeddings. The graph is freed with the last prompt unless
    it is to be kept.
    """
    cotangents = texts.to(z.dtype).expand(len(z), *texts.shape[-2:])
    prompts = cotangents.shape[1]
    for p in range(prompts):
        yield list(torch.autograd.grad(z, list(inputs), cotangents[:, p], retain_graph=keep or p + 1 < prompts))


def site_gradients(
    tower: Tower, sites: Sequence[Site], tail: LinearTail, bottom: Tensor, pooled: Tensor, heads: int | None
) -> Gradients:
    """The cheapest exact way to the gradients at `sites`, those of the tower's last len(sites) blocks.

    tail: linearised at the last site. bottom (B, N, D): input of the lowest of these blocks. pooled (B,): positions.
    heads: None for the blocks' own.
    """
    if len(sites) == 1:
        return lambda cotangents: [tail.vjp(cotangents)]
    dtype = tower.tail.proj.dtype
    blocks = [block.to(dtype) for block in tower.blocks[-len(sites) :]]
    if len(sites) == 2 or tower.causal:
        return _PooledToken(blocks, tower.tail, sites, pooled, heads)
    return _AllTokens(blocks, tower.tail, bottom.to(dtype), pooled, heads)


@dataclass(frozen=True)
class _PooledToken:
    """Gradients at several layers' sites where only the pooled token's own row can carry them.

    True for the last two blocks of any tower, and for every block of a causal tower: no token that the pooled one sees
    ever sees the pooled one. Each cotangent gets a copy of that row, and one backward pass serves all copies; the other
    tokens' keys and values are constants.
    """

    blocks: Sequence[Block]
    tail: Tail
    sites: Sequence[Site]
    pooled: Tensor
    heads: int | None

    def __call__(self, cotangents: Tensor) -> list[Tensor]:
        sites = self.sites
        batch, width = sites[0].q.shape
        cotangents = cotangents.expand(batch, *cotangents.shape[-2:])
        with torch.enable_grad():
            shifts = [
                torch.zeros(batch, cotangents.shape[1], width, dtype=s.q.dtype, device=s.q.device, requires_grad=True)
                for s in sites
            ]
            row = sites[0].residual[:, None].expand_as(shifts[0])
            o = sites[0].o[:, None] + shifts[0]
            for block, above, site, shift in zip(self.blocks, self.blocks[1:], sites[1:], shifts[1:], strict=False):
                row = row + block.out(o)
                row = row + block.mlp(row)
                x = above.norm1(row)
                o = self._attend(above, above.query(x), *above.key_value(x), site) + shift
            z = self.tail(row, o)
            return list(torch.autograd.grad(z, shifts, cotangents))

    def _attend(self, block: Block, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Attention of row copies (B, R, D) to the other tokens as they are and to their own moving k and v."""
        heads = self.heads or block.heads
        split = (heads, q.shape[-1] // heads)
        q = q.unflatten(-1, split) * split[1] ** -0.5
        k, v = k.unflatten(-1, split), v.unflatten(-1, split)
        keys, values = (t.unflatten(-1, split) for t in (site.k, site.v))
        hidden = F.one_hot(self.pooled, site.k.shape[1]).bool()
        if site.mask is not None:
            hidden = hidden | ~site.mask
        scores = torch.einsum("brhd,bnhd->brhn", q, keys).masked_fill(hidden[:, None, None], -torch.inf)
        own = (q * k).sum(-1, keepdim=True)
        a = torch.cat((scores, own), dim=-1).softmax(-1)
        return (torch.einsum("brhn,bnhd->brhd", a[..., :-1], values) + a[..., -1:] * v).flatten(2)


@dataclass(frozen=True)
class _AllTokens:
    """Gradients at three or more layers' sites of a bidirectional tower: they pass through every token above."""

    blocks: Sequence[Block]
    tail: Tail
    bottom: Tensor
    pooled: Tensor
    heads: int | None

    def __call__(self, cotangents: Tensor) -> list[Tensor]:
        h = self.bottom
        batch, tokens, width = h.shape
        rows = torch.arange(batch, device=h.device)
        cotangents = cotangents.expand(batch, *cotangents.shape[-2:])
        with torch.enable_grad():
            at_pooled = F.one_hot(self.pooled, tokens).to(h.dtype)[..., None]
            shifts = [
                torch.zeros(batch, 1, width, dtype=h.dtype, device=h.device, requires_grad=True) for _ in self.blocks
            ]
            for block, shift in zip(self.blocks[:-1], shifts[:-1], strict=True):
                x = block.norm1(h)
                o = block.attend(block.query(x), *block.key_value(x), heads=self.heads)
                h = h + block.out(o + at_pooled * shift)
                h = h + block.mlp(h)
            last = self.blocks[-1]
            x = last.norm1(h)
            o = last.attend(last.query(x[rows, self.pooled])[:, None], *last.key_value(x), heads=self.heads)
            z = self.tail(h[rows, self.pooled], (o + shifts[-1])[:, 0])
            found = [
                torch.autograd.grad(z, shifts, cotangents[:, r], retain_graph=True) for r in range(cotangents.shape[1])
            ]
        return [torch.cat(layer, dim=1) for layer in zip(*found, strict=True)]
