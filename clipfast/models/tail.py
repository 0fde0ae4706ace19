"""From the pooled token's attention output to the normalised embedding, and that map's derivative by hand.

    y = r + branch(o);   e = head(rest(y));   z = e / |e|

For the last block of a vision transformer branch is the output projection, rest the MLP with its residual connection
and head the final norm and projection. No attention is left in it, so rows of its Jacobian cost one token each: n
forward rows give the attribution features of an image, P reverse rows the gradients of P prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.models.block import AttentionBlock
from clipfast.models.layers import Affine, Chain, ChainDerivative, Stage


@dataclass(frozen=True)
class Tail:
    """The rest of the tower above the last attention.

    block: the one that holds that attention. head: what makes an embedding of its output: any final norm, projection.

    Values are computed in float32 (float64 for a float64 model), as is everything elementwise in the derivative; the
    derivative's products run in the trunk's dtype, see `Affine`.
    """

    block: AttentionBlock
    head: Chain

    @classmethod
    def above(cls, block: AttentionBlock, *head: Stage) -> Tail:
        """The tail above a block of the trunk; the head's stages as the model has them, in whatever dtype."""
        trunk = block.dtype
        dtype = torch.float64 if trunk == torch.float64 else torch.float32
        stages = [replace(s, rows=s.weight.to(trunk)) if isinstance(s, Affine) else s for s in head]
        return cls(block.to(dtype), Chain(tuple(stages)).to(dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.block.dtype

    @property
    def device(self) -> torch.device:
        return self.block.out.weight.device

    @property
    def embed_dim(self) -> int:
        """Numbers of an embedding."""
        width = self.block.out.weight.shape[0]
        for stage in (*self.block.rest, *self.head):
            if isinstance(stage, Affine):
                width = stage.weight.shape[0]
        return width

    @property
    def cost(self) -> int:
        """Multiplications of one row through the tail's derivative, from either end."""
        return self.block.branch.cost + self.block.rest.cost + self.head.cost

    def project(self, x: Tensor) -> Tensor:
        """What leaves the last block, (..., D), in the joint space, not normalised: (..., E)."""
        return self.head(x)

    def embed(self, residual: Tensor | None, o: Tensor) -> Tensor:
        """Embeddings (..., E) of attention outputs o (..., D) on top of residual (..., D), not normalised."""
        y = self.block.branch(o)
        return self.head(self.block.rest(y if residual is None else residual + y))

    def __call__(self, residual: Tensor | None, o: Tensor) -> Tensor:
        """The same, of unit length."""
        return F.normalize(self.embed(residual, o), dim=-1)

    def linearize(self, residual: Tensor | None, o: Tensor) -> LinearTail:
        """The tail at one point per image: residual and o (B, D)."""
        y, branch = self.block.branch.linearize(o)
        e, rest = (self.block.rest + self.head).linearize(y if residual is None else residual + y)
        norm = e.norm(dim=-1, keepdim=True)
        return LinearTail(self, branch, rest, e / norm, norm)


@dataclass(frozen=True)
class LinearTail:
    """The tail's derivative at one point of each image.

    branch, rest: of the attention's branch, and of all above it. z (B, E): the tail's value there. norm (B, 1): the
    length of the embedding before it is normalised.
    """

    tail: Tail
    branch: ChainDerivative
    rest: ChainDerivative
    z: Tensor
    norm: Tensor

    def at(self, images: Any) -> LinearTail:
        """Of some of the images."""
        return LinearTail(self.tail, self.branch.at(images), self.rest.at(images), self.z[images], self.norm[images])

    def jvp(self, rows: Tensor) -> Tensor:
        """d/de z(o + e v) for directions v = rows (B, R, D): (B, R, E)."""
        de = self.rest.jvp(self.branch.jvp(rows), owned=True)
        return off_(de, self.z).div_(self.norm[:, None])

    def vjp(self, cotangents: Tensor) -> Tensor:
        """d(z . t)/do for cotangents t (B, R, E), or (R, E) shared by all images: (B, R, D)."""
        return self.branch.vjp(self._residual_rows(cotangents), owned=True).div_(self.norm[:, None])

    def residual_vjp(self, cotangents: Tensor) -> Tensor:
        """d(z . t)/dr for the residual stream r under o; arguments and shape as in `vjp`."""
        return self._residual_rows(cotangents).div_(self.norm[:, None])

    def vjps(self, cotangents: Tensor) -> tuple[Tensor, Tensor]:
        """(`residual_vjp`, `vjp`) in one go."""
        gy = self._residual_rows(cotangents)
        at_output = self.branch.vjp(gy).div_(self.norm[:, None])
        return gy.div_(self.norm[:, None]), at_output

    def _residual_rows(self, cotangents: Tensor) -> Tensor:
        """`residual_vjp` before the division by the embedding's length.

        It comes last: before, half precision would lose small gradients.
        """
        t = cotangents.expand(self.z.shape[0], *cotangents.shape[-2:])
        ge = torch.baddbmm(t, t @ self.z[:, :, None], self.z[:, None, :], alpha=-1)
        return self.rest.vjp(ge, owned=True)


def off_(rows: Tensor, z: Tensor) -> Tensor:
    """Rows (B, R, E) less what of them lies along unit z (B, E), in place."""
    return rows.baddbmm_(rows @ z[:, :, None], z[:, None, :], alpha=-1)
