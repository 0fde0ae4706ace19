"""A second path beside the last blocks of an image tower, on which patches keep their place: CLIP Surgery's and GEM's.

    h_l   the tower's own tokens
    y_l = y_{l-1} + W_o a(h_{l-1}) + b_o         y starts as h; a: another attention of the same block; no MLP

The second path adds up attention outputs alone and never feeds back, so both run in one pass, block by block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clipfast.models.tower import ImageTower, Layer

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
    layers = min(LAYERS, tower.depth) if layers is None else layers
    start, last = tower.last_blocks(layers), tower.blocks[-1]
    h = path = tower.run(tower.embed(x), stop=start)
    for layer, above in tower.layers(h, start, tower.depth - 1):
        path = path + layer.block.out(attention(layer))
        h = above
    # In the last block the tower's own path is the class token's.
    q, k, v = last.query_key_value(h)
    o = last.attend(q[:, :1], k, v)
    path = path + last.out(attention(Layer(last, h, q, k, v, o)))
    dtype = tower.tail.proj.dtype
    z = tower.tail(h[:, 0].to(dtype), o[:, 0].to(dtype))
    return z, tower.tail.project(path[:, tower.prefix.shape[0] :].to(dtype))
