"""LeGrad: how sensitive each block's own score is to its attention (Bousselham et al., ICCV 2025).

    S_l = cosine of P norm_f(mean over all tokens of block l's output) with the text
    H_i = sum over the last blocks l of the mean over heads h and queries j of ReLU(dS_l/dA_l,hji)

A mean over tokens hands every token the same gradient, one row a prompt; from there the block's MLP, norm and output
projection are gone back through by hand, for all tokens and all prompts, on what one forward pass has left behind.
Then dS/dA_hji = dS/do_jh . v_ih, a few of them at a time: neither the tower nor an autograd graph runs once a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.errors import InputError
from clipfast.methods.attention import head_groups
from clipfast.methods.base import Explained, Method, MethodInfo, at_least
from clipfast.models.block import Block
from clipfast.models.layers import ChainDerivative, Residual
from clipfast.models.tail import Tail
from clipfast.models.tower import ImageTower

# Rows of tokens gone back through an MLP at a time.
ROWS = 1024


@dataclass(frozen=True)
class Linearized:
    """A block, and what its derivative from the output down to the attention needs of all tokens of a batch.

    rest (of points (B, N)): of the block's MLP, its last linear maps left out, which all tokens share: `shared`.
    branch: of the way from the attention's output. v (B, N, D): values. mean (B, D): of the block's output over tokens.
    As in `LinearTail`, products run in the trunk's dtype and the rest in float32 (float64 for a float64 model).
    """

    block: Block
    rest: ChainDerivative
    shared: ChainDerivative
    branch: ChainDerivative
    v: Tensor
    mean: Tensor

    @classmethod
    def run(cls, block: Block, h: Tensor, wide: torch.dtype) -> tuple[Linearized, Tensor]:
        """The block at its input h (B, N, D), and its output.

        Raises InputError for a block that does not end with an MLP beside a residual connection.
        """
        q, k, v = block.query_key_value(h)
        o = block.attend(q, k, v)
        own = block.to(wide)
        added, branch = own.branch.linearize(o.to(wide))
        if len(own.rest.stages) != 1 or not isinstance(own.rest.stages[0], Residual):
            raise InputError("LeGrad explains blocks that add an MLP's output to their input, which these do not.")
        front, back = own.rest.stages[0].inner.split()
        y = h.to(wide) + added
        hidden, rest = front.linearize(y)
        m, shared = back.linearize(hidden)
        output = (y + m).to(h.dtype)
        return cls(block, rest, shared, branch, v, output.mean(1, dtype=wide)), output

    def gradients(self, rows: Tensor) -> Tensor:
        """Rows (B, C, D), each the gradient at every token's output alike -> dS/do (B, N, C, D)."""
        # The last linear maps are the same at every token: they are gone back through once.
        each = self.shared.vjp(rows)[:, None].expand(-1, self.v.shape[1], -1, -1)
        g = self.rest.vjp(each).add_(rows[:, None])
        return self.branch.vjp(g, owned=True)

    def sensitivity(self, rows: Tensor) -> Tensor:
        """The mean over heads and queries of ReLU(dS/dA), for rows (B, C, D) as above: (B, C, N)."""
        found, block = self.gradients(rows), self.block
        batch, tokens, prompts, _ = found.shape
        total = torch.zeros(batch, prompts, tokens, dtype=rows.dtype, device=rows.device)
        for channels, heads in head_groups(block, total.numel() * tokens):
            g = found[..., channels].flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, h, N C, d)
            v = self.v[..., channels].unflatten(-1, (heads, -1)).transpose(1, 2).to(g.dtype)
            total += (g @ v.mT).relu_().unflatten(2, (tokens, prompts)).sum((1, 2), dtype=rows.dtype)
        return total.div_(block.heads * tokens)


@dataclass(frozen=True)
class BlockScores(Explained):
    """layers: the explained blocks. tail: of the tower, for its final norm and projection. prefix: how many tokens."""

    z: Tensor
    layers: Sequence[Linearized]
    tail: Tail
    prefix: int

    @torch.no_grad()
    def maps(self, texts: Tensor, *, out: Tensor | None = None) -> Tensor:
        batch, tokens, _ = self.layers[0].v.shape
        prompts = texts.shape[-2]
        if out is None:
            out = self.z.new_empty(batch, prompts, tokens - self.prefix)
        texts = texts.expand(batch, -1, -1)
        step = max(1, ROWS // (batch * tokens))
        for start in range(0, prompts, step):
            chosen = slice(start, start + step)
            found = torch.stack([self._layer(layer, texts[:, chosen]) for layer in self.layers]).sum(0)
            out[:, chosen] = found[..., self.prefix :]
        return out

    def _layer(self, layer: Linearized, texts: Tensor) -> Tensor:
        with torch.enable_grad():
            mean = layer.mean[:, None].expand(-1, texts.shape[1], -1).clone().requires_grad_()
            rows = torch.autograd.grad(F.normalize(self.tail.project(mean), dim=-1), mean, texts)[0]
        # At unit length: half precision would lose what a mean over tokens makes this small.
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        unit = rows / length.clamp(min=torch.finfo(rows.dtype).tiny)
        return layer.sensitivity(unit).mul_(length / layer.v.shape[1])


@dataclass(frozen=True)
class LeGrad(Method):
    """LeGrad, images only. It explains each block's mean over all tokens, prefix included, not the model's own score.

    layers: how many of the last blocks are explained and summed (the authors' default for CLIP: 2).
    """

    layers: int = 2

    needs: ClassVar = "blocks"
    info: ClassVar = MethodInfo(
        source="Bousselham et al., arXiv 2404.03214",
        forwards="1",
        backwards="P (through the MLP and projection of each of `layers` blocks)",
        prompt_free=False,
        agrees="torchcam's LeGrad to 1e-9 in float64 (its mean over layers times their number); the authors' package "
        "as released, ViT-B/16 in float32, to 1e-6",
        our_reading="no text side: a text's tokens behind EOT would take part in the mean",
    )

    def __post_init__(self) -> None:
        at_least(self, "layers", 1, whole=True)

    @torch.no_grad()
    def image(self, tower: ImageTower, x: Tensor) -> Explained:
        first, wide = tower.last_blocks(self.layers), tower.result_dtype
        h = tower.run(tower.embed(x), stop=first)
        layers = []
        for block in tower.trunk[first:]:
            layer, h = Linearized.run(block, h, wide)
            layers.append(layer)
        z = tower.top(h, tower.pooled(h))
        return BlockScores(z, layers, tower.tail, tower.prefix)
