"""Transformer blocks and attention pools, read from a model's weights and run without touching its modules.

The user's modules are never called: hooks, dropout, training mode and fused fast paths stay out of it, and the
model stays exactly as it was.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.models.layers import Affine, Chain, Norm, add


@dataclass(frozen=True)
class Rotary:
    """Rotary position embeddings of the tokens behind the first `prefix` ones.

    sin, cos (n, d): for each place, and each channel of a head; or (H, n, d), for each head. half: channels are turned
    in pairs (i, i + d/2), else in pairs of neighbours.
    """

    sin: Tensor
    cos: Tensor
    prefix: int
    half: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Heads (B, H, N, d), all N tokens, turned."""
        still, moving = x[:, :, : self.prefix], x[:, :, self.prefix :]
        if self.half:
            a, b = moving.chunk(2, dim=-1)
            turned = torch.cat((-b, a), dim=-1)
        else:
            turned = torch.stack((-moving[..., 1::2], moving[..., ::2]), dim=-1).flatten(-2)
        moved = moving * self.cos + turned * self.sin
        return torch.cat((still, moved.to(x.dtype)), dim=2)


@dataclass(frozen=True, kw_only=True)
class AttentionBlock:
    """Tokens h (B, N, D) that go through a norm and attend, and what is made of it: what blocks and pools share.

        o = softmax(scale q k^T) v,  heads concatenated;   output = rest(h + branch(o))

    branch: from the attention's output to what it adds to the residual stream: any inner norm, the output projection,
    any norm or scale behind. rest: all the rest of the block, its own residual connection included.
    scale: None for one over the root of a head's width.
    """

    heads: int
    norm1: Norm | Chain
    branch: Chain
    rest: Chain
    scale: float | None = None

    @property
    def out(self) -> Affine:
        """The output projection alone."""
        return next(stage for stage in self.branch if isinstance(stage, Affine))

    @property
    def width(self) -> int:
        """Channels of the attention's output, all heads together."""
        return self.out.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.out.weight.dtype

    def to(self, dtype: torch.dtype) -> Any:
        """The block with its weights in `dtype`; weights that are already stay shared."""
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor | Norm | Affine | Chain):
                changed[field.name] = value.to(dtype)
        return replace(self, **changed)

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, N, D) of normed tokens x (B, N, D)."""
        raise NotImplementedError

    def pooled_query(self, h: Tensor, x: Tensor, pooled: Tensor) -> tuple[Tensor | None, Tensor]:
        """(residual stream, query), (B, D) each, of the pooled token at positions (B,); x: norm1 of h (B, N, D).

        None for a residual stream where there is none.
        """
        raise NotImplementedError

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, heads: int | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Softmax attention of queries (B, M, D) over keys and values (B, N, D), heads concatenated: (B, M, D).

        mask: additive, broadcastable to (B, H, M, N). heads=1 with its scale D**-0.5 is the single-head variant
        that the published Grad-ECLIP code runs.
        """
        h = heads or self.heads
        o = F.scaled_dot_product_attention(_split(q, h), _split(k, h), _split(v, h), attn_mask=mask, scale=self.scale)
        return o.transpose(1, 2).flatten(2)

    def attention(self, q: Tensor, k: Tensor, *, heads: int | None = None, mask: Tensor | None = None) -> Tensor:
        """The softmax itself, as `attend` applies it: (B, H, M, N)."""
        h = heads or self.heads
        # The caller may ask for a few heads alone: a head's width says what the scale is.
        scale = (q.shape[-1] // h) ** -0.5 if self.scale is None else self.scale
        scores = (_split(q, h) * scale) @ _split(k, h).mT
        return (scores if mask is None else scores + mask).softmax(-1)

    def scale_of(self, heads: int | None = None) -> float:
        """What products of queries and keys are multiplied with."""
        return (self.width // (heads or self.heads)) ** -0.5 if self.scale is None else self.scale

    def above(self, h: Tensor, o: Tensor) -> Tensor:
        """The output for the input h and the attention's output o, all (..., D)."""
        return self.rest(add(self.branch(o), h))


@dataclass(frozen=True, kw_only=True)
class Block(AttentionBlock):
    """One transformer block, in which every token attends.

    qkv: (3D, D'), queries, keys and values in this order. qk_norm: norms of each head's queries and keys.
    """

    qkv: Affine
    qk_norm: tuple[Norm, Norm] | None = None
    rotary: Rotary | None = None

    def query(self, x: Tensor) -> Tensor:
        """Queries (B, N, D) of all normed tokens x (B, N, D)."""
        return self._turned(self.qkv.part(slice(None, self.width))(x), 0)

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two views of one product."""
        k, v = self.qkv.part(slice(self.width, None))(x).split(self.width, dim=-1)
        return self._turned(k, 1), v

    def pooled_query(self, h: Tensor, x: Tensor, pooled: Tensor) -> tuple[Tensor | None, Tensor]:
        rows = torch.arange(h.shape[0], device=h.device)
        q = self.qkv.part(slice(None, self.width))(x[rows, pooled])
        if self.qk_norm is not None:
            q = self.qk_norm[0](q.unflatten(-1, (self.heads, -1))).flatten(-2)
        # A rotary tower's pooled token is one of its prefix, which is not turned.
        return h[rows, pooled], q

    def query_key_value(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, N, D) of the block's input h (B, N, D): three views of one product."""
        q, k, v = self.qkv(self.norm1(h)).split(self.width, dim=-1)
        return self._turned(q, 0), self._turned(k, 1), v

    def _turned(self, x: Tensor, which: int) -> Tensor:
        """Queries (which 0) or keys (1) of all tokens as the attention sees them."""
        if self.qk_norm is None and self.rotary is None:
            return x
        split = _split(x, self.heads)
        if self.qk_norm is not None:
            split = self.qk_norm[which](split)
        if self.rotary is not None:
            split = self.rotary(split)
        return split.transpose(1, 2).flatten(2)

    def __call__(self, h: Tensor, *, heads: int | None = None, mask: Tensor | None = None) -> Tensor:
        """The block's output (B, N, D) for its input h (B, N, D)."""
        return self.above(h, self.attend(*self.query_key_value(h), heads=heads, mask=mask))


@dataclass(frozen=True, kw_only=True)
class Pool(AttentionBlock):
    """An attention pool: one query over all tokens, without a residual stream below it.

    query: (D,), what a learned latent asks; or a map of the normed first token, where that one is the query.
    kv: (2D, D'), keys and values in this order. key_norm: of each head's keys.
    """

    query: Tensor | Affine
    kv: Affine
    key_norm: Norm | None = None

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.kv(x).split(self.width, dim=-1)
        return k if self.key_norm is None else self.key_norm(k.unflatten(-1, (self.heads, -1))).flatten(-2), v

    def output(self, h: Tensor) -> Tensor:
        """The attention's output o (B, D) for tokens h (B, N, D), without keys and values of them all.

        There is one query, so its products with W_k and W_v cost a row a head where keys and values cost one a token:
        q . W_k t = (W_k^T q) . t and sum a W_v t = W_v sum a t. The keys' bias adds the same to all of a softmax.
        """
        x = self.norm1(h)
        _, q = self.pooled_query(h, x, torch.zeros(0))
        if self.key_norm is not None:
            return self.attend(q[:, None], *self.key_value(x))[:, 0]
        k, v = (weight.unflatten(0, (self.heads, -1)) for weight in self.kv.weight.split(self.width))
        rows = torch.einsum("bhd,hdc->bhc", q.unflatten(-1, (self.heads, -1)) * self.scale_of(), k)
        a = (rows @ x.mT).softmax(-1)
        o = torch.einsum("bhc,hdc->bhd", a @ x, v).flatten(1)
        return o if self.kv.bias is None else o + self.kv.bias[self.width :]

    def pooled_query(self, h: Tensor, x: Tensor, pooled: Tensor) -> tuple[None, Tensor]:
        if isinstance(self.query, Tensor):
            return None, self.query.expand(len(x), -1)
        return None, self.query(x[:, 0])


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
