"""One pre-norm transformer block, read from a model's weights and run without touching its modules.

The user's modules are never called: hooks, dropout, training mode and fused fast paths stay out of it, and the
model stays exactly as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """LayerNorm over the last dimension. Mixed-precision models keep float32 norms between half-precision layers."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def to(self, dtype: torch.dtype) -> Norm:
        weight, bias = self.weight, self.bias
        return Norm(None if weight is None else weight.to(dtype), None if bias is None else bias.to(dtype), self.eps)

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is not None and self.weight.dtype != x.dtype:
            return F.layer_norm(x.to(self.weight.dtype), x.shape[-1:], self.weight, self.bias, self.eps).to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Activation:
    """An elementwise activation, its in-place form and its derivative."""

    name: str
    value: Callable[[Tensor], Tensor]
    value_: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _gelu_derivative(u: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(u / math.sqrt(2))) + u * torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)


def _gelu_tanh_derivative(u: Tensor) -> Tensor:
    c, a = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(c * (u + a * u**3))
    return 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * c * (1 + 3 * a * u * u)


def _quick_gelu_derivative(u: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * u)
    return s * (1 + 1.702 * u * (1 - s))


GELU = Activation("gelu", F.gelu, torch.ops.aten.gelu_, _gelu_derivative)
GELU_TANH = Activation(
    "gelu_tanh",
    lambda u: F.gelu(u, approximate="tanh"),
    lambda u: torch.ops.aten.gelu_(u, approximate="tanh"),
    _gelu_tanh_derivative,
)
QUICK_GELU = Activation(
    "quick_gelu",
    lambda u: u * torch.sigmoid(1.702 * u),
    lambda u: u.mul_(torch.sigmoid(1.702 * u)),
    _quick_gelu_derivative,
)


@dataclass(frozen=True)
class Block:
    """x = h + s1 * (W_o attention(norm1 h) + b_o);  output = x + s2 * (W_2 act(W_1 norm2 x + b_1) + b_2).

    `scale1` and `scale2` are LayerScale's, or None. Weights are laid out as torch.nn.Linear's: (out, in).
    """

    heads: int
    norm1: Norm
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    scale1: Tensor | None
    norm2: Norm
    fc_weight: Tensor
    fc_bias: Tensor | None
    act: Activation
    proj_weight: Tensor
    proj_bias: Tensor | None
    scale2: Tensor | None

    @property
    def width(self) -> int:
        return self.out_weight.shape[0]

    def to(self, dtype: torch.dtype) -> Block:
        """The block with its weights in `dtype`; weights that are already stay shared."""
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor | Norm):
                changed[field.name] = value.to(dtype)
        return replace(self, **changed)

    def query(self, x: Tensor) -> Tensor:
        """Queries (..., D) of normed tokens (..., D)."""
        d = self.width
        return F.linear(x, self.qkv_weight[:d], None if self.qkv_bias is None else self.qkv_bias[:d])

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (..., D) of normed tokens (..., D): two views of one product."""
        d = self.width
        kv = F.linear(x, self.qkv_weight[d:], None if self.qkv_bias is None else self.qkv_bias[d:])
        return kv[..., :d], kv[..., d:]

    def out(self, o: Tensor) -> Tensor:
        """What attention output o (..., D) adds to the residual stream."""
        y = F.linear(o, self.out_weight, self.out_bias)
        return y if self.scale1 is None else y * self.scale1

    def mlp(self, x: Tensor) -> Tensor:
        """What the MLP adds to the residual stream x (..., D)."""
        u = F.linear(self.norm2(x), self.fc_weight, self.fc_bias)
        # In place saves a pass over the widest tensor of the block; autograd needs u itself for the derivative.
        m = self.act.value(u) if torch.is_grad_enabled() else self.act.value_(u)
        y = F.linear(m, self.proj_weight, self.proj_bias)
        return y if self.scale2 is None else y * self.scale2

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, heads: int | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Softmax attention of queries (B, M, D) over keys and values (B, N, D), heads concatenated: (B, M, D).

        mask: additive, broadcastable to (B, 1, M, N). heads=1 with its scale D**-0.5 is the single-head variant
        that the published Grad-ECLIP code runs.
        """
        h = heads or self.heads
        o = F.scaled_dot_product_attention(_split(q, h), _split(k, h), _split(v, h), attn_mask=mask)
        return o.transpose(1, 2).flatten(2)

    def attention(self, q: Tensor, k: Tensor, *, heads: int | None = None, mask: Tensor | None = None) -> Tensor:
        """The softmax itself, as `attend` applies it: (B, H, M, N)."""
        h = heads or self.heads
        scores = (_split(q, h) * (q.shape[-1] // h) ** -0.5) @ _split(k, h).mT
        return (scores if mask is None else scores + mask).softmax(-1)

    def query_key_value(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, N, D) of the block's input h (B, N, D): three views of one product."""
        q, k, v = F.linear(self.norm1(h), self.qkv_weight, self.qkv_bias).split(self.width, dim=-1)
        return q, k, v

    def above(self, h: Tensor, o: Tensor) -> Tensor:
        """The block's output for its input h and its attention's output o, all (B, N, D)."""
        h = h + self.out(o)
        return h.add_(self.mlp(h)) if not torch.is_grad_enabled() else h + self.mlp(h)

    def __call__(self, h: Tensor, *, heads: int | None = None, mask: Tensor | None = None) -> Tensor:
        """The block's output (B, N, D) for its input h (B, N, D)."""
        return self.above(h, self.attend(*self.query_key_value(h), heads=heads, mask=mask))


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
