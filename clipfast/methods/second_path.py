"""A second path beside the last blocks of an image tower, on which patches keep their place: CLIP Surgery's and GEM's.

    h_l   the tower's own tokens
    y_l = y_{l-1} + W_o a(h_{l-1}) + b_o         y starts as h; a: another attention of the same block; no MLP

The second path adds up attention outputs alone and never feeds back, so both run in one pass, block by block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clipfast.errors import InputError
from clipfast.models.image import ImageTower
from clipfast.models.tower import Layer

# The authors of both methods take the last six blocks.
LAYERS = 6


@torch.no_grad()
def second_path(
    tower: ImageTower, x: Tensor, layers: int | None, attention: Callable[[Layer], Tensor]
) -> tuple[Tensor, Tensor]:
    """(z (B, E), the patches (B, n, E) of the second path in the joint space) of normalised images (B, 3, H, W).

    layers: how many of the last blocks it runs beside; None: six, or all of a tower with fewer.
    attention: a block's q, k, v (B, N, D) -> attention outputs (B, N, D), heads concatenated. Neither is normalised.

    Raises InputError for more layers than the tower has blocks.
    """
    layers = min(LAYERS, len(tower.trunk)) if layers is None else layers
    if layers > len(tower.trunk):
        raise InputError(f"layers={layers} was asked for, but this tower has {len(tower.trunk)} blocks.")
    if not tower.trunk:
        raise InputError(f"a second path needs blocks beside which it runs, and this {tower.kind} has none.")
    start, last = len(tower.trunk) - layers, tower.trunk[-1]
    h = path = tower.run(tower.embed(x), stop=start)
    pooled = tower.pooled(h)
    for layer, above in tower.layers(h, start, None if not tower.has_class_token else -1):
        path = path + layer.block.branch(attention(layer))
        h = above
    if not tower.has_class_token:
        return tower.top(h, pooled), tower.project(path[:, tower.prefix :])
    # In the last block the tower's own path is the class token's.
    q, k, v = last.query_key_value(h)
    o = last.attend(q[:, :1], k, v)
    path = path + last.branch(attention(Layer(last, h, q, k, v, o)))
    dtype = tower.result_dtype
    return tower.tail(h[:, 0].to(dtype), o[:, 0].to(dtype)), tower.project(path[:, tower.prefix :])
