"""GAME: generic attention-model explainability (Chefer, Gur and Wolf, ICCV 2021), "HilaCAM" where all blocks take part.

    R = I;  R <- R + Abar_l R for blocks from start_layer up;   Abar_l = mean over heads of ReLU(dS/dA_l * A_l)
    H_i = R_cls,i

A is never a leaf of any graph here: dS/dA_hji = dS/do_jh . v_ih, with o the attention's output. In the last block only
the pooled token's row has a gradient, and the linearised tail knows it: one block's map is one-token work, for all
prompts at once. Further down o's gradients come from one backward pass a prompt, and only the pooled token's row of R,
which is all that is read, goes down through the blocks: r <- r + r Abar_l.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.methods.attention import PIECE, head_groups, pooled_attention
from clipfast.methods.base import Explained, Method, MethodInfo, choice
from clipfast.methods.tokens import Tokens, image_tokens, text_tokens
from clipfast.models.gradients import score_gradients
from clipfast.models.image import ImageTower
from clipfast.models.tail import LinearTail
from clipfast.models.text import TextTower
from clipfast.models.tower import Layer, Site, Tower


@dataclass(frozen=True)
class OneBlock(Explained):
    """The last block alone: H_i = mean over heads of a_hi ReLU(g_h . v_ih), with g = dS/do at the pooled token.

    attention (B, H, N): the pooled token's. scale: of the score.
    """

    z: Tensor
    tail: LinearTail
    attention: Tensor
    v: Tensor
    tokens: Tokens
    scale: float

    def maps(self, texts: Tensor, *, out: Tensor | None = None) -> Tensor:
        prompts = texts.shape[-2]
        if out is None:
            out = self.z.new_empty(len(self.z), prompts, self.tokens.inside.shape[1])
        step = max(1, PIECE // self.attention.numel())
        for start in range(0, prompts, step):
            rows = slice(start, start + step)
            found = pooled_relevance(self.tail.vjp(texts[..., rows, :]), self.v, self.attention)
            out[:, rows] = self.tokens.place(found).mul_(self.scale)
        return out


@dataclass(frozen=True)
class ManyBlocks(Explained):
    """Several blocks, the last one for its pooled token only.

    below: the blocks under the last, lowest first. site: the last one's, with `attention` (B, H, N). output (B, E): z
    with the graph down to the lowest block's attention output.
    """

    z: Tensor
    output: Tensor
    below: Sequence[Layer]
    site: Site
    attention: Tensor
    tokens: Tokens
    scale: float

    @torch.no_grad()
    def maps(self, texts: Tensor, *, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = self.z.new_empty(len(self.z), texts.shape[-2], self.tokens.inside.shape[1])
        start = F.one_hot(self.tokens.pooled, self.site.k.shape[1])
        outputs = [*(layer.o for layer in self.below), self.site.o]
        for p, (*gradients, last) in enumerate(score_gradients(self.output, outputs, texts, keep=True)):
            found = pooled_relevance(last[:, None], self.site.v, self.attention)[:, 0]
            row = start + found * self.scale
            for layer, gradient in zip(reversed(self.below), reversed(gradients), strict=True):
                row = row + self._step(layer, gradient, row) * self.scale
            out[:, p] = self.tokens.place(row)
        return out

    def _step(self, layer: Layer, gradient: Tensor, row: Tensor) -> Tensor:
        """row (B, N) times Abar of a block whose attention output has this gradient (B, N, D): (B, N)."""
        total = torch.zeros_like(row)
        block, (batch, tokens, _) = layer.block, layer.q.shape
        for channels, heads in head_groups(block, batch * tokens**2):
            q, k, v, g = (t.detach()[..., channels] for t in (layer.q, layer.k, layer.v, gradient))
            attention = block.attention(q, k, heads=heads, mask=self.tokens.mask)
            g, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (g, v))
            relevance = (g @ v.mT).relu_().mul_(attention).to(row.dtype)
            total += torch.einsum("bj,bhji->bi", row, relevance)
        return total / block.heads


def pooled_relevance(gradient: Tensor, v: Tensor, attention: Tensor) -> Tensor:
    """The pooled token's row of Abar for gradients (B, P, D) at its attention output: (B, P, N).

    v (B, N, D); attention (B, H, N).
    """
    heads = attention.shape[1]
    g, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (gradient, v))
    return (g @ v.mT).relu_().mul_(attention[:, :, None]).mean(1)


@dataclass(frozen=True)
class Chefer(Method):
    """Attention weighted by its gradient and propagated through the blocks.

    start_layer: the lowest block that takes part: -1, the last alone, as the authors do with CLIP; 0 for all, as in
        what others call HilaCAM; any block's number, counted from the top where negative.
    score: "cosine", or "logit": S times the model's logit scale, as the authors' notebook has it. With one block it is
        a factor of the map; with several it also decides how much they weigh against R's identity.

    The authors divide a text's map by its sum; here maps stay as they are.
    """

    start_layer: int = -1
    score: Literal["cosine", "logit"] = "cosine"

    info: ClassVar = MethodInfo(
        source="Chefer et al., ICCV 2021",
        forwards="1",
        backwards="0 (P from a start_layer below the last)",
        prompt_free=False,
        agrees="the recursion over full matrices with autograd at the attention, written out in the test, to 1e-10",
        our_reading="the score is the cosine; the authors' notebook explains the logit (score='logit')",
    )

    @property
    def keeps_activations(self) -> bool:  # type: ignore[override]
        return self.start_layer != -1

    def __post_init__(self) -> None:
        choice(self, "score", "cosine", "logit")

    def image(self, tower: ImageTower, x: Tensor) -> Explained:
        return self._explain(tower, *image_tokens(tower, x))

    def text(self, tower: TextTower, ids: Tensor, words: Tensor) -> Explained:
        return self._explain(tower, *text_tokens(tower, ids, words))

    @torch.no_grad()
    def _explain(self, tower: Tower, h: Tensor, tokens: Tokens) -> Explained:
        first = tower.block_index(self.start_layer, "start_layer")
        scale = tower.logit_scale if self.score == "logit" else 1.0
        h = tower.run(h, stop=first, mask=tokens.mask)
        if first == tower.depth - 1:
            site = tower.site(h, tokens.pooled, visible=tokens.visible)
            tail = tower.tail.linearize(site.residual, site.o)
            return OneBlock(tail.z, tail, pooled_attention(tower.blocks[-1], site), site.v, tokens, scale)
        with torch.enable_grad():
            h, below = h.requires_grad_(), []
            for layer, output in tower.layers(h, first, tower.depth - 1, mask=tokens.mask):
                below.append(layer)
                h = output
            site = tower.site(h, tokens.pooled, visible=tokens.visible)
            z = tower.tail(site.residual, site.o)
        attention = pooled_attention(tower.blocks[-1], site)
        return ManyBlocks(z.detach(), z, below, site, attention, tokens, scale)
