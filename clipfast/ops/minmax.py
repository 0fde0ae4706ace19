"""Min-max normalisation, with a rule for constants."""

from __future__ import annotations

import torch
from torch import Tensor


def minmax(x: Tensor, *, constant: float, where: Tensor | None = None) -> Tensor:
    """(x - min) / (max - min) over the last dimension of x (..., N); `constant` where max == min.

    where (broadcastable to x): positions that take part; what the others hold is not meaningful.
    """
    low = (x if where is None else x.masked_fill(~where, torch.inf)).amin(-1, keepdim=True)
    high = (x if where is None else x.masked_fill(~where, -torch.inf)).amax(-1, keepdim=True)
    span = high - low
    # Asked this way round, NaN stays NaN instead of passing for a constant.
    flat = span <= 0
    return torch.where(flat, constant, (x - low) / torch.where(flat, 1, span))
