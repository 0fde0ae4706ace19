"""Gradients of scores with respect to the attention outputs of a tower's last blocks, at the pooled token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.models.block import Block
from clipfast.models.layers import ChainDerivative, Derivative, product
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
    tower: Tower,
    sites: Sequence[Site],
    tail: LinearTail,
    bottom: Tensor,
    pooled: Tensor,
    heads: int | None,
    mask: Tensor | None = None,
) -> Gradients:
    """The cheapest exact way to the gradients at `sites`, those of the tower's last len(sites) blocks.

    tail: linearised at the last site. bottom (B, N, D): input of the lowest of these blocks. pooled (B,): positions.
    heads: None for the blocks' own. mask: who sees whom, as `Tower.run` takes it.
    """
    if len(sites) == 1:
        return lambda cotangents: [tail.vjp(cotangents)]
    blocks = tower.trunk[-len(sites) :]
    if (len(sites) == 2 or tower.causal) and all(block.qk_norm is None for block in blocks):
        ways = zip(blocks, blocks[1:], sites, sites[1:], strict=False)
        return _PooledToken(tail, [LinearStep.at(*way, pooled, heads) for way in ways])
    dtype, seen = tower.result_dtype, sites[-1].mask
    row = None if seen is None else torch.where(seen, 0.0, -torch.inf).to(dtype)[:, None, None]
    mask = None if mask is None else mask.to(dtype)
    return _AllTokens([block.to(dtype) for block in blocks], tower.tail, bottom.to(dtype), pooled, heads, mask, row)


@dataclass(frozen=True)
class _PooledToken:
    """Gradients at several layers' sites where only the pooled token's own row can carry them.

    True for the last two blocks of any tower, and for every block of a causal tower: no token that the pooled one sees
    ever sees the pooled one. The other tokens' keys and values are constants, so a cotangent is one row through the
    derivatives of the tail and of each step below it, taken at one point for all cotangents.
    """

    tail: LinearTail
    steps: Sequence[LinearStep]

    def __call__(self, cotangents: Tensor) -> list[Tensor]:
        at_residual, at_output = self.tail.vjps(cotangents)
        found = [at_output]
        for step in reversed(self.steps):
            at_residual, at_output = step.vjp(at_residual, at_output)
            found.append(at_output)
        return found[::-1]


@dataclass(frozen=True)
class LinearStep:
    """The derivative of the pooled token's way from one block's attention output o to the next one's, at one point.

    r' = rest(r + branch(o));   o' = attention of norm1(r') to the others and itself
    """

    above: Block
    branch: ChainDerivative
    rest: ChainDerivative
    norm: Derivative  # of the upper block's first norm
    q: Tensor  # (B, H, d)
    k: Tensor  # (B, N, H, d)
    v: Tensor
    a: Tensor  # (B, H, N) the pooled token's attention
    scale: float
    pooled: Tensor

    @classmethod
    def at(cls, below: Block, above: Block, site: Site, upper: Site, pooled: Tensor, heads: int | None) -> LinearStep:
        """Between the sites of two neighbouring blocks; the blocks in the trunk's dtype."""
        wide = below.to(site.o.dtype)
        y, branch = wide.branch.linearize(site.o)
        assert site.residual is not None and upper.residual is not None
        _, rest = wide.rest.linearize(site.residual + y)
        _, norm = above.norm1.to(site.o.dtype).linearize(upper.residual)
        split = (heads or above.heads, -1)
        q, k, v = (t.unflatten(-1, split) for t in (upper.q, upper.k, upper.v))
        scale = above.scale_of(heads)
        scores = torch.einsum("bhd,bnhd->bhn", q * scale, k)
        if upper.mask is not None:
            scores = scores.masked_fill(~upper.mask[:, None], -torch.inf)
        return cls(above, branch, rest, norm, q, k, v, scores.softmax(-1), scale, pooled)

    def vjp(self, at_residual: Tensor, at_output: Tensor) -> tuple[Tensor, Tensor]:
        """From gradients (B, R, D) at r' and o' to those at r and o."""
        g = at_output.unflatten(-1, self.q.shape[1:])
        a = self.a[:, None]
        slopes = torch.einsum("brhd,bnhd->brhn", g, self.v)
        slopes = (slopes - (slopes * a).sum(-1, keepdim=True)).mul_(a).mul_(self.scale)
        rows = torch.arange(len(a), device=a.device)
        # The pooled token's own key and value move with it.
        own, own_a = slopes[rows, :, :, self.pooled], self.a[rows, :, self.pooled]
        towards = (
            torch.einsum("brhn,bnhd->brhd", slopes, self.k),
            own[..., None] * self.q[:, None],
            own_a[:, None, :, None] * g,
        )
        through = product(torch.cat([t.flatten(2) for t in towards], dim=-1), self.above.qkv.weight)
        at_row = self.norm.vjp(through, owned=True).add_(at_residual)
        at_y = self.rest.vjp(at_row, owned=True)
        return at_y, self.branch.vjp(at_y)


@dataclass(frozen=True)
class _AllTokens:
    """Gradients at three or more layers' sites of a bidirectional tower: they pass through every token above."""

    blocks: Sequence[Block]
    tail: Tail
    bottom: Tensor
    pooled: Tensor
    heads: int | None
    mask: Tensor | None
    row: Tensor | None  # the pooled token's own of the mask

    def __call__(self, cotangents: Tensor) -> list[Tensor]:
        h = self.bottom
        batch, tokens, width = h.shape
        cotangents = cotangents.expand(batch, *cotangents.shape[-2:])
        with torch.enable_grad():
            at_pooled = F.one_hot(self.pooled, tokens).to(h.dtype)[..., None]
            shifts = [
                torch.zeros(batch, 1, width, dtype=h.dtype, device=h.device, requires_grad=True) for _ in self.blocks
            ]
            for block, shift in zip(self.blocks[:-1], shifts[:-1], strict=True):
                o = block.attend(*block.query_key_value(h), heads=self.heads, mask=self.mask)
                h = block.above(h, o + at_pooled * shift)
            last = self.blocks[-1]
            x = last.norm1(h)
            residual, q = last.pooled_query(h, x, self.pooled)
            o = last.attend(q[:, None], *last.key_value(x), heads=self.heads, mask=self.row)
            z = self.tail(residual, (o + shifts[-1])[:, 0])
            found = [
                torch.autograd.grad(z, shifts, cotangents[:, r], retain_graph=True) for r in range(cotangents.shape[1])
            ]
        return [torch.cat(layer, dim=1) for layer in zip(*found, strict=True)]
