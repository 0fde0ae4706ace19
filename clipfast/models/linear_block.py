"""A whole block, and a mean over tokens above it, linearised at every token of a batch at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.errors import InputError
from clipfast.models.block import Block
from clipfast.models.image import ImageTower
from clipfast.models.layers import (
    ActivationDerivative,
    AffineDerivative,
    ChainDerivative,
    GatedDerivative,
    NormDerivative,
    Residual,
    product,
)
from clipfast.models.tail import off_
from clipfast.ops.minmax import minmax


@dataclass(frozen=True)
class LinearBlock:
    """A block, and what its derivative from the output down to the attention needs of all tokens of a batch.

    front (of points (B, N)): of the block's MLP, its last linear maps left out, which all tokens share: `shared`.
    branch: of the way from the attention's output. q, k, v (B, N, D): what the attention saw. As in `LinearTail`,
    products run in the trunk's dtype and the rest in float32 (float64 for a float64 model).
    """

    block: Block
    front: ChainDerivative
    shared: ChainDerivative
    branch: ChainDerivative
    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def run(cls, block: Block, h: Tensor, wide: torch.dtype) -> tuple[LinearBlock, Tensor]:
        """The block at its input h (B, N, D), and its output, in `wide`.

        Raises InputError for a block that does not end with an MLP beside a residual connection.
        """
        q, k, v = block.query_key_value(h)
        own = block.to(wide)
        added, branch = own.branch.linearize(block.attend(q, k, v).to(wide))
        if not own.rest.stages or not isinstance(own.rest.stages[0], Residual):
            raise InputError("this takes blocks that add an MLP's output to their input, which this tower's do not.")
        front, back = own.rest.stages[0].inner.split()
        y = h.to(wide) + added
        hidden, derivative = front.linearize(y)
        m, shared = back.linearize(hidden)
        return cls(block, derivative, shared, branch, q, k, v), y + m

    def at(self, images: Any) -> LinearBlock:
        """Of some of the images."""
        chosen = {name: getattr(self, name).at(images) for name in ("front", "shared", "branch")}
        return replace(self, **chosen, q=self.q[images], k=self.k[images], v=self.v[images])

    def gradients(self, rows: Tensor) -> Tensor:
        """Rows (B, C, D), each the gradient at every token's output alike -> dS/do (B, N, C, D)."""
        # The last linear maps are the same at every token: they are gone back through once.
        each = self.shared.vjp(rows)[:, None].expand(-1, self.v.shape[1], -1, -1)
        g = self.front.vjp(each).add_(rows[:, None])
        return self.branch.vjp(g, owned=True)


@dataclass(frozen=True)
class MeanTail:
    """A tower that pools the mean of its patches, linearised above its last attention: z = head(mean_j y_j) / |.|.

    Every patch j is a query, and what is asked of the tower is weighted by lambda_ji, how much patch j's own attention
    is to count for patch i: weights (B, n, n), or None for all alike. Patches only: tokens before them are left out.

    last (of the patches): the last block. head: of what comes above the mean (B, 1, D). z, norm: as in `LinearTail`.
    """

    last: LinearBlock
    head: ChainDerivative
    z: Tensor
    norm: Tensor
    prefix: int

    @classmethod
    def above(cls, tower: ImageTower, h: Tensor) -> MeanTail:
        """At the input h (B, N, D) of the last block. Raises InputError where that one is not an MLP's."""
        block = tower.trunk[-1]
        last, out = LinearBlock.run(block, h, tower.result_dtype)
        # What lies between the MLP and the mean, a norm of every token, is linearised with the patches' outputs.
        rest = block.to(tower.result_dtype).rest.stages[1:]
        if rest:
            raise InputError("this takes towers whose final norm comes behind the mean of their patches.")
        mean = out[:, tower.prefix :].mean(1)
        e, head = tower.tail.head.linearize(mean)
        norm = e.norm(dim=-1, keepdim=True)
        return cls(last, head, e / norm, norm, tower.prefix)

    def at(self, images: Any) -> MeanTail:
        """Of some of the images."""
        last, head = self.last.at(images), self.head.at(images)
        return replace(self, last=last, head=head, z=self.z[images], norm=self.norm[images])

    @property
    def values(self) -> Tensor:
        """v (B, n, D) of the patches."""
        return self._of_patches(self.last.v)

    def lambdas(self) -> Tensor:
        """lambda (B, n, n): for each patch j the cosine of its query with each patch's key i, min-maxed over i."""
        q, k = (F.normalize(self._of_patches(t), dim=-1) for t in (self.last.q, self.last.k))
        return minmax(q @ k.mT, constant=1.0)

    def _of_patches(self, t: Tensor) -> Tensor:
        return t[:, self.prefix :].to(self.z.dtype)

    def vjp(self, cotangents: Tensor, weights: Tensor | None = None) -> Tensor:
        """sum_j lambda_ji d(z . t)/do_j for cotangents t (B, R, E) or (R, E): (B, R, n, D), (B, R, D) for None."""
        rows = cotangents.expand(len(self.z), *cotangents.shape[-2:])
        ge = torch.baddbmm(rows, rows @ self.z[:, :, None], self.z[:, None, :], alpha=-1)
        at_mean = self.head.vjp(ge, owned=True)
        g = self.last.gradients(at_mean)[:, self.prefix :]  # (B, n, R, D)
        n = g.shape[1]
        if weights is None:
            return g.sum(1) / (n * self.norm[:, None])
        total = (weights.mT @ g.flatten(2)).unflatten(2, g.shape[2:]).transpose(1, 2)
        return total / (n * self.norm[:, None, None])

    def jvp(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """sum_j lambda_ji d/de z(o_j + e v_i) for a direction v_i a patch, values (B, n, D): (B, n, E).

        With w_i = W_o v_i, w'_i = w_i less its mean, x_j and r_j a patch's standardised row and 1/sigma, s_j the slope
        of the MLP's activation, a_i = W_1 (gain w'_i), b_j = W_1 (gain x_j), c_ji = x_j . w'_i / D:

            sum_j lambda_ji J_j v_i = w_i sum_j lambda_ji
                                      + W_2 [a_i sum_j lambda_ji r_j s_j - sum_j lambda_ji r_j c_ji s_j b_j]

        so that no product is made for a pair of patches. Each further norm before the MLP's first map adds one b and c.
        """
        *norms, fc, act = self.last.front.stages
        assert isinstance(fc, AffineDerivative) and isinstance(act, ActivationDerivative | GatedDerivative)
        w = self.last.branch.jvp(values)
        # What the norms make of direction i at patch j: r_j (a_i - sum of c_ji b_j).
        a, moved = w, act.slope[:, self.prefix :]
        b: list[Tensor] = []
        c: list[Tensor] = []
        for norm in norms:
            assert isinstance(norm, NormDerivative)
            x = norm.x[:, self.prefix :]
            a, *b = (t - t.mean(-1, keepdim=True) if norm.norm.centred else t for t in (a, *b))
            along = x @ a.mT
            for each, factor in zip(b, c, strict=True):
                along -= (x * each).sum(-1, keepdim=True) * factor
            b, c = [*b, x], [*c, along.div_(x.shape[-1])]
            if norm.norm.weight is not None:
                a, *b = (t * norm.norm.weight for t in (a, *b))
            moved = moved * norm.rstd[:, self.prefix :]  # (B, n, F)
        a, *b = (product(t, fc.weight.T) for t in (a, *b))
        if weights is None:
            counted, total = w * w.shape[1], moved.sum(1, keepdim=True)
        else:
            counted, total = w * weights.sum(1)[..., None], weights.mT @ moved
        hidden = a * total
        for each, factor in zip(b, c, strict=True):
            hidden -= (factor if weights is None else weights * factor).mT @ (moved * each)
        if isinstance(act, GatedDerivative):
            left, right = hidden.chunk(2, dim=-1)
            hidden = left + right
        de = self.head.jvp(counted.add_(self.last.shared.jvp(hidden, owned=True)), owned=True)
        return off_(de, self.z).div_(w.shape[1] * self.norm[:, None])
