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

from clipfast.methods.attention import head_groups
from clipfast.methods.base import Explained, Method, MethodInfo, at_least
from clipfast.models.image import ImageTower
from clipfast.models.linear_block import LinearBlock
from clipfast.models.tail import Tail

# Rows of tokens gone back through an MLP at a time.
ROWS = 1024


def sensitivity(layer: LinearBlock, rows: Tensor) -> Tensor:
    """The mean over heads and queries of ReLU(dS/dA), for rows (B, C, D), the gradient at every token's output alike:
    (B, C, N)."""
    found, block = layer.gradients(rows), layer.block
    batch, tokens, prompts, _ = found.shape
    total = torch.zeros(batch, prompts, tokens, dtype=rows.dtype, device=rows.device)
    for channels, heads in head_groups(block, total.numel() * tokens):
        g = found[..., channels].flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, h, N C, d)
        v = layer.v[..., channels].unflatten(-1, (heads, -1)).transpose(1, 2).to(g.dtype)
        total += (g @ v.mT).relu_().unflatten(2, (tokens, prompts)).sum((1, 2), dtype=rows.dtype)
    return total.div_(block.heads * tokens)


@dataclass(frozen=True)
class BlockScores(Explained):
    """layers: the explained blocks, each with its output's mean over tokens (B, D).

    tail: of the tower, for its final norm and projection. prefix: how many tokens come before the patches.
    """

    z: Tensor
    layers: Sequence[tuple[LinearBlock, Tensor]]
    tail: Tail
    prefix: int

    @torch.no_grad()
    def maps(self, texts: Tensor, *, out: Tensor | None = None) -> Tensor:
        batch, tokens, _ = self.layers[0][0].v.shape
        prompts = texts.shape[-2]
        if out is None:
            out = self.z.new_empty(batch, prompts, tokens - self.prefix)
        texts = texts.expand(batch, -1, -1)
        step = max(1, ROWS // (batch * tokens))
        for start in range(0, prompts, step):
            chosen = slice(start, start + step)
            found = torch.stack([self._layer(*layer, texts[:, chosen]) for layer in self.layers]).sum(0)
            out[:, chosen] = found[..., self.prefix :]
        return out

    def _layer(self, layer: LinearBlock, mean: Tensor, texts: Tensor) -> Tensor:
        with torch.enable_grad():
            each = mean[:, None].expand(-1, texts.shape[1], -1).clone().requires_grad_()
            rows = torch.autograd.grad(F.normalize(self.tail.project(each), dim=-1), each, texts)[0]
        # At unit length: half precision would lose what a mean over tokens makes this small.
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        unit = rows / length.clamp(min=torch.finfo(rows.dtype).tiny)
        return sensitivity(layer, unit).mul_(length / layer.v.shape[1])


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
            layer, out = LinearBlock.run(block, h, wide)
            layers.append((layer, out.mean(1)))
            h = out.to(tower.dtype)
        z = tower.top(h, tower.pooled(h))
        return BlockScores(z, layers, tower.tail, tower.prefix)
