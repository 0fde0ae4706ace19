"""Attention itself as a map, of one block or rolled out over all: what a tower looks at, whatever the prompt.

    attention   mean over heads of a_h,cls,i                                          a = softmax(q k / sqrt(d))
    rollout     e_cls R,  R = product over blocks, the top one first, of (A_l + I) / 2,  A_l = mean over heads

Rows of A_l + I sum to 2, so that halving normalises them (Abnar and Zuidema, ACL 2020). On the text side the row is
EOT's, and the causal mask stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.methods.base import Explained, Method, MethodInfo, choice
from clipfast.methods.tokens import Tokens, image_tokens, text_tokens
from clipfast.models.block import AttentionBlock, Block
from clipfast.models.image import ImageTower
from clipfast.models.text import TextTower
from clipfast.models.tower import Site, Tower

# Attention probabilities at a time: all heads of a few images, or a head of a large one.
PIECE = 2**22


def pooled_attention(block: AttentionBlock, site: Site, heads: int | None = None) -> Tensor:
    """The pooled token's attention to every token, of each head: (B, H, N)."""
    mask = None
    if site.mask is not None:
        mask = torch.where(site.mask, 0.0, -torch.inf).to(site.q.dtype)[:, None, None, :]
    return block.attention(site.q[:, None], site.k, heads=heads, mask=mask)[:, :, 0]


def head_groups(block: AttentionBlock, elements: int) -> Iterator[tuple[slice, int]]:
    """A few heads at a time, of which one takes `elements` numbers: (their channels, how many they are)."""
    size, step = block.width // block.heads, max(1, PIECE // max(1, elements))
    for first in range(0, block.heads, step):
        count = min(step, block.heads - first)
        yield slice(first * size, (first + count) * size), count


@dataclass(frozen=True)
class SharedExplained(Explained):
    """One map (B, n) for every prompt."""

    z: Tensor
    shared: Tensor

    def maps(self, texts: Tensor, *, out: Tensor | None = None) -> Tensor:
        every = self.shared[:, None].expand(-1, texts.shape[-2], -1)
        return every.clone() if out is None else out.copy_(every)


@dataclass(frozen=True)
class Attention(Method):
    """The pooled token's attention in one block, the mean of its heads. The same for every prompt.

    layer: the block, from the bottom, or from the top where negative.
    heads: "model", or "single": that block read as one head of width D with scale D**-0.5, as the released Grad-ECLIP
        code reads it; scores stay the model's.
    """

    layer: int = -1
    heads: Literal["model", "single"] = "model"

    info: ClassVar = MethodInfo(
        source="a baseline of Zhao et al., ICML 2024",
        forwards="1",
        backwards="0",
        prompt_free=True,
        agrees="the Grad-ECLIP authors' released self-attention map to 1e-9 in float64, with heads='single'",
    )

    def __post_init__(self) -> None:
        choice(self, "heads", "model", "single")

    def image(self, tower: ImageTower, x: Tensor) -> Explained:
        return self._explain(tower, *image_tokens(tower, x))

    def text(self, tower: TextTower, ids: Tensor, words: Tensor) -> Explained:
        return self._explain(tower, *text_tokens(tower, ids, words))

    @torch.no_grad()
    def _explain(self, tower: Tower, h: Tensor, tokens: Tokens) -> Explained:
        index = tower.block_index(self.layer, "layer")
        h = tower.run(h, stop=index, mask=tokens.mask)
        site = tower.site(h, tokens.pooled, index=index, visible=tokens.visible)
        attention = pooled_attention(tower.blocks[index], site, 1 if self.heads == "single" else None)
        if index == tower.depth - 1:
            z = tower.tail(site.residual, site.o)
        else:
            z = tower.finish(h, tokens.pooled, index, mask=tokens.mask, visible=tokens.visible)
        return SharedExplained(z, tokens.place(attention.mean(1)))


@dataclass(frozen=True)
class Rollout(Method):
    """Attention multiplied up through the blocks, half of each taken as passing straight on. The same for every prompt.

    start_layer: the lowest block that takes part, from the bottom, or from the top where negative. What the Grad-ECLIP
        scripts call rollout starts at the last (-1), where its map is half the `attention` map.
    """

    start_layer: int = 0

    # Every block's queries and keys wait for the row that comes down from the top.
    keeps_activations: ClassVar[bool] = True
    info: ClassVar = MethodInfo(
        source="Abnar and Zuidema, ACL 2020",
        forwards="1",
        backwards="0",
        prompt_free=True,
        agrees="the product of full matrices, written out in the test, to 1e-10 in float64",
    )

    def image(self, tower: ImageTower, x: Tensor) -> Explained:
        return self._explain(tower, *image_tokens(tower, x))

    def text(self, tower: TextTower, ids: Tensor, words: Tensor) -> Explained:
        return self._explain(tower, *text_tokens(tower, ids, words))

    @torch.no_grad()
    def _explain(self, tower: Tower, h: Tensor, tokens: Tokens) -> Explained:
        first = tower.block_index(self.start_layer, "start_layer")
        h = tower.run(h, stop=first, mask=tokens.mask)
        below: list[tuple[Block, Tensor, Tensor]] = []
        for layer, output in tower.layers(h, first, tower.depth - 1, mask=tokens.mask):
            below.append((layer.block, layer.q, layer.k))
            h = output
        site = tower.site(h, tokens.pooled, visible=tokens.visible)
        row = pooled_attention(tower.blocks[-1], site).mean(1)
        row = (row + F.one_hot(tokens.pooled, row.shape[-1])) / 2
        # Only the pooled token's row of the product is read, so that a row is all that goes down from the top.
        for block, q, k in reversed(below):
            row = (row + _step(block, q, k, row, tokens.mask)) / 2
        return SharedExplained(tower.tail(site.residual, site.o), tokens.place(row))


def _step(block: Block, q: Tensor, k: Tensor, row: Tensor, mask: Tensor | None) -> Tensor:
    """row (B, N) times the block's attention, the mean over heads: (B, N)."""
    total = torch.zeros_like(row)
    for channels, heads in head_groups(block, q.shape[0] * q.shape[1] ** 2):
        attention = block.attention(q[..., channels], k[..., channels], heads=heads, mask=mask).to(row.dtype)
        total += torch.einsum("bj,bhji->bi", row, attention)
    return total / block.heads
