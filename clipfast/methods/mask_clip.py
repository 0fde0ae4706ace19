"""MaskCLIP: extract free dense labels from CLIP (Zhou et al., ECCV 2022), section 3.2.

    y_i = x_i + W_o v_i + b_o            the last block with each patch attending to itself alone
    e_i = P norm(y_i + MLP(y_i))         projected as the class token is
    H_i = cos(e_i, t)

The paper drops the last block's queries and keys and keeps its value and output projections. What is left of that block
around them is not spelt out for transformers: the authors' code keeps the residual stream and the MLP, and so does the
comparison in Grad-ECLIP's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.errors import InputError
from clipfast.methods.base import LinearExplained, Method, MethodInfo, choice
from clipfast.models.block import Pool
from clipfast.models.image import ImageTower


@dataclass(frozen=True)
class MaskClip(Method):
    """MaskCLIP of images, as parameters of the class.

    residual: the residual stream and the MLP of the last block around the value path, as in the authors' code for
        vision transformers; False projects W_o v_i + b_o alone.
    times_kk: multiply by cos(k_cls, k_i), both keys through the output projection and its bias. This is the row called
        MaskCLIP in Grad-ECLIP's comparison, not MaskCLIP's own.
    """

    residual: bool = True
    times_kk: bool = False

    signs: ClassVar[bool] = False
    needs: ClassVar = "tokens"
    info: ClassVar = MethodInfo(
        source="Zhou et al., ECCV 2022",
        forwards="1",
        backwards="0",
        prompt_free=True,
        agrees="Grad-ECLIP's released version of it (times_kk=True) to 1e-9 in float64",
    )

    def __post_init__(self) -> None:
        choice(self, "residual", True, False)
        choice(self, "times_kk", True, False)

    @property
    def has_features(self) -> bool:
        return True

    @torch.no_grad()
    def image(self, tower: ImageTower, x: Tensor) -> LinearExplained:
        """Prepare normalised images (B, 3, H, W); n is the number of patches, row by row."""
        h = tower.run(tower.embed(x), stop=tower.depth - 1)
        if self.times_kk and not tower.has_class_token:
            raise InputError("times_kk=True compares keys with the class token's, which this tower does not have.")
        k, v, z = last_attention(tower, h)
        values = patch_embeddings(tower, h, v, residual=self.residual)
        weights = values.new_ones(values.shape[:2])
        if self.times_kk:
            k = tower.tail.block.out(k)
            weights = F.cosine_similarity(k[:, :1], k[:, tower.prefix :], dim=-1)
        return LinearExplained(z, values, weights, relu="none")


def last_attention(tower: ImageTower, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For the last block's input h (B, N, D): keys and values (B, N, D) of its attention, unit embeddings (B, E).

    Differentiable where gradients are enabled.
    """
    if tower.mean:
        block = tower.blocks[-1]
        k, v = (t.to(tower.result_dtype) for t in block.key_value(block.norm1(h)))
        return k, v, tower.finish(h, tower.pooled(h), tower.depth - 1)
    site = tower.site(h, tower.pooled(h))
    return site.k, site.v, tower.tail(site.residual, site.o)


def patch_embeddings(tower: ImageTower, h: Tensor, v: Tensor, *, residual: bool = True) -> Tensor:
    """Unit embeddings e_i of patches (B, n, E), for the last block's input h and values v (B, N, D) of its attention.

    residual: as for `MaskClip`. An attention pool has none, and its own MLP is always on the way. Differentiable where
    gradients are enabled.
    """
    prefix, block = tower.prefix, tower.blocks[-1]
    path = block.branch(v[:, prefix:].to(h.dtype))
    if isinstance(block, Pool):
        path = block.rest(path)
    elif residual:
        path = block.rest(h[:, prefix:] + path)
    return F.normalize(tower.tail.project(path.to(v.dtype)), dim=-1)
