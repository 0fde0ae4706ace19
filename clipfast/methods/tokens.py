"""What a method that explains both sides needs to know of a batch of tokens, and nothing else of the sides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipfast.models.image import ImageTower
from clipfast.models.text import TextTower


@dataclass(frozen=True)
class Tokens:
    """pooled (B,): each sequence's pooled position, or (B, N): weights of a mean.

    keep: the tokens that are places of a map, n of N. mask and visible: who sees whom, as `Tower.run` and `Tower.site`
    take them. inside (B, n): True for the places that are explained; the others get zero.
    """

    pooled: Tensor
    keep: slice
    mask: Tensor | None
    visible: Tensor | None
    inside: Tensor

    def place(self, rows: Tensor) -> Tensor:
        """Numbers for all tokens (B, ..., N) at the places of a map: (B, ..., n)."""
        inside = self.inside.to(rows.dtype)
        return rows[..., self.keep] * inside.unflatten(0, (-1, *[1] * (rows.ndim - 2)))


def image_tokens(tower: ImageTower, x: Tensor) -> tuple[Tensor, Tokens]:
    """Normalised images (B, 3, H, W) as the input h (B, N, D) of block 0; the places of the map are the patches."""
    h = tower.embed(x)
    keep = slice(tower.prefix, None)
    inside = torch.ones_like(h[:, keep, 0], dtype=torch.bool)
    return h, Tokens(tower.pooled(h), keep, None, None, inside)


def text_tokens(tower: TextTower, ids: Tensor, words: Tensor) -> tuple[Tensor, Tokens]:
    """Token ids (B, T), without the padding that can have no influence, as the input h (B, N, D) of block 0.

    Outside `words` (B, T) the map is zero.
    """
    texts = tower.read(ids)
    return texts.h, Tokens(texts.pooled, texts.own, texts.mask, texts.visible, words[:, texts.own] > 0)
