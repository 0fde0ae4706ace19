"""Grad-ECLIP where the embedding is of the mean of the patches (CLIPA, ViTamin): every patch is a query.

    H_i = ReLU( sum_j lambda_ji (g_j . v_i) )      g_j = dS/do_j,   lambda_ji = minmax_i cos(q_j, k_i)

i and j over the patches that are pooled. Both forms of `grad_eclip` are there: for a prompt one row a patch back
through the MLP, or prompt-free features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipfast.methods.base import Explained, Relu, combine
from clipfast.models.image import ImageTower
from clipfast.models.linear_block import MeanTail

# From so many prompts on the features, about 1.3 blocks, are cheaper than the prompts' own rows.
_FEATURES_PAY = 3
# Numbers of gradients at every patch's attention output at a time.
_ROWS = 1 << 24


@dataclass(frozen=True)
class MeanExplained(Explained):
    """B images of a tower that pools the mean. z (B, E). tail: linearised; weights (B, n, n): lambda, None for ones."""

    z: Tensor
    tail: MeanTail
    weights: Tensor | None
    relu: Relu = "each"

    def maps(self, texts: Tensor, *, form: str = "auto", out: Tensor | None = None) -> Tensor:
        """Maps (B, P, n) for unit text embeddings (P, E), or (B, P, E) with prompts of their own for each input."""
        values = self.tail.values
        batch, n, width = values.shape
        if out is None:
            out = self.z.new_empty(batch, texts.shape[-2], n)
        if form == "features" or (form == "auto" and texts.shape[-2] >= _FEATURES_PAY):
            features, even = self.prompt_free()
            return combine([even], [features], texts, self.relu, out)
        step = max(1, _ROWS // (batch * n * 4 * width))
        for start in range(0, texts.shape[-2], step):
            chosen = slice(start, start + step)
            rows = self.tail.vjp(texts[..., chosen, :], self.weights)
            rows = rows if self.weights is not None else rows[:, :, None]
            torch.sum(rows * values[:, None], dim=-1, out=out[:, chosen])
        return out if self.relu == "none" else out.relu_()

    def prompt_free(self) -> tuple[Tensor, Tensor]:
        features = self.tail.jvp(self.tail.values, self.weights)
        return features, torch.ones_like(features[..., 0])


def explain_mean(tower: ImageTower, h: Tensor, *, spatial: bool, signed: bool) -> MeanExplained:
    """Images whose last block's input is h (B, N, D), of a tower that pools the mean of its patches.

    spatial: weighted by lambda.
    """
    tail = MeanTail.above(tower, h)
    return MeanExplained(tail.z, tail, tail.lambdas() if spatial else None, "none" if signed else "each")
