"""Loosened query-key weights times gradient-weighted values: the map of Grad-ECLIP (Zhao et al., ICML 2024, eq. 8-10).

    lambda_i = minmax_i cos(q, k_i)                  once an image
    H_pi     = ReLU(lambda_i * sum_c g_pc v_ic)      = lambda_i * ReLU(v_i . g_p), lambda being in [0, 1]

With attribution features A in the place of v and unit text embeddings in the place of g it is the features form.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.ops.minmax import minmax


def spatial_weight(q: Tensor, k: Tensor, where: Tensor | None = None) -> Tensor:
    """lambda (B, N): the cosine of q (B, D) with k (B, N, D), min-maxed over N.

    where (B, N): positions that take part; the others get 0. A constant cosine gives ones.
    """
    cosine = (F.normalize(k, dim=-1) @ F.normalize(q, dim=-1)[:, :, None])[..., 0]
    weight = minmax(cosine, constant=1.0, where=where)
    return weight if where is None else weight * where


def gradient_weighted(weight: Tensor, v: Tensor, g: Tensor, *, out: Tensor | None = None) -> Tensor:
    """weight_i * (v_i . g_p), signed: (B, P, N).

    weight (B, N), v (B, N, D); g (B, P, D), or (P, D) shared by the batch; out: where to write, (B, P, N).
    """
    # One product per image into its place: a broadcast batched product would first copy the shared g B times.
    rows = weight[..., None] * v
    if out is None:
        out = v.new_empty(v.shape[0], g.shape[-2], v.shape[1])
    for b in range(v.shape[0]):
        torch.mm(g if g.ndim == 2 else g[b], rows[b].T, out=out[b])
    return out


def spatial_attribution(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Maps (B, P, N) of q (B, D), k and v (B, N, D) and g (B, P, D) or (P, D): lambda_i ReLU(v_i . g_p)."""
    return gradient_weighted(spatial_weight(q, k), v, g).relu_()
