"""From the pooled token's attention output to the normalised embedding, and that map's derivative by hand.

    y = r + s1 * (W_o o + b_o);   x = y + s2 * (W_2 act(W_1 norm2(y) + b_1) + b_2);   e = P norm_f(x);   z = e / |e|

No attention is left in it, so rows of its Jacobian cost one token each: n forward rows give the attribution features
of an image, P reverse rows the gradients of P prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.models.block import Block, Norm


@dataclass(frozen=True)
class Tail:
    """The rest of the tower above the last attention. `proj` is (D, E), `proj_bias` (E,) or None.

    Values are computed in float32 (float64 for a float64 model), as is everything elementwise in the derivative. The
    derivative's products, of many rows, run in the trunk's dtype, with `rows` the same block in it: in float32 they
    would cost a half-precision trunk several times what they cost a float32 one.
    """

    block: Block
    norm: Norm
    proj: Tensor
    rows: Block
    proj_bias: Tensor | None = None

    def project(self, x: Tensor) -> Tensor:
        """Residual stream (..., D) into the joint space, not normalised: (..., E)."""
        e = self.norm(x) @ self.proj
        return e if self.proj_bias is None else e + self.proj_bias

    def embed(self, residual: Tensor, o: Tensor) -> Tensor:
        """Embeddings (..., E) of attention outputs o (..., D) on top of residual (..., D), not normalised."""
        return self.project(self.block.above(residual, o))

    def __call__(self, residual: Tensor, o: Tensor) -> Tensor:
        """The same, of unit length."""
        return F.normalize(self.embed(residual, o), dim=-1)

    def linearize(self, residual: Tensor, o: Tensor) -> LinearTail:
        """The tail at one point per image: residual and o (B, D)."""
        b = self.block
        y = residual + b.out(o)
        x1, r1 = standardize(y, b.norm2.eps)
        u = F.linear(affine(x1, b.norm2), b.fc_weight, b.fc_bias)
        w = F.linear(b.act.value(u), b.proj_weight, b.proj_bias)
        x2, r2 = standardize(y + (w if b.scale2 is None else w * b.scale2), self.norm.eps)
        e = affine(x2, self.norm) @ self.proj
        if self.proj_bias is not None:
            e = e + self.proj_bias
        norm = e.norm(dim=-1, keepdim=True)
        return LinearTail(self, x1, r1, b.act.derivative(u), x2, r2, e / norm, norm)


@dataclass(frozen=True)
class LinearTail:
    """The tail's derivative at one point of each image; `z` (B, E) is its value there."""

    tail: Tail
    x1: Tensor  # (B, D) standardised input of norm2, and 1/sigma (B, 1)
    r1: Tensor
    slope: Tensor  # (B, F) derivative of the activation
    x2: Tensor  # (B, D) the same for the final norm
    r2: Tensor
    z: Tensor  # (B, E)
    norm: Tensor  # (B, 1) length of the embedding before normalisation

    def jvp(self, rows: Tensor) -> Tensor:
        """d/de z(o + e v) for directions v = rows (B, R, D): (B, R, E)."""
        b, w = self.tail.block, self.tail.rows
        dy = product(rows, w.out_weight.T)
        if b.scale1 is not None:
            dy = dy.mul_(b.scale1)
        du = product(gain_(norm_jacobian(dy, self.x1, self.r1), b.norm2), w.fc_weight.T).mul_(self.slope[:, None])
        dw = product(du, w.proj_weight.T)
        del du
        dy = dy.add_(dw if b.scale2 is None else dw.mul_(b.scale2))
        de = product(gain_(norm_jacobian(dy, self.x2, self.r2), self.tail.norm), self.tail.proj.to(w.out_weight.dtype))
        dz = torch.baddbmm(de, de @ self.z[:, :, None], self.z[:, None, :], alpha=-1)
        return dz.div_(self.norm[:, None])

    def vjp(self, cotangents: Tensor) -> Tensor:
        """d(z . t)/do for cotangents t (B, R, E), or (R, E) shared by all images: (B, R, D)."""
        b, w = self.tail.block, self.tail.rows
        gy = self._residual_rows(cotangents)
        return product(gy if b.scale1 is None else gy.mul_(b.scale1), w.out_weight).div_(self.norm[:, None])

    def residual_vjp(self, cotangents: Tensor) -> Tensor:
        """d(z . t)/dr for the residual stream r under o; arguments and shape as in `vjp`."""
        return self._residual_rows(cotangents).div_(self.norm[:, None])

    def vjps(self, cotangents: Tensor) -> tuple[Tensor, Tensor]:
        """(`residual_vjp`, `vjp`) in one go."""
        b, w = self.tail.block, self.tail.rows
        gy = self._residual_rows(cotangents)
        at_output = product(gy if b.scale1 is None else gy * b.scale1, w.out_weight).div_(self.norm[:, None])
        return gy.div_(self.norm[:, None]), at_output

    def _residual_rows(self, cotangents: Tensor) -> Tensor:
        """`residual_vjp` before the division by the embedding's length.

        It comes last: before, half precision would lose small gradients.
        """
        b, w, batch = self.tail.block, self.tail.rows, self.z.shape[0]
        t = cotangents.expand(batch, *cotangents.shape[-2:])
        ge = torch.baddbmm(t, t @ self.z[:, :, None], self.z[:, None, :], alpha=-1)
        proj = self.tail.proj.T.to(w.out_weight.dtype)
        gx = norm_jacobian(gain_(product(ge, proj), self.tail.norm), self.x2, self.r2)
        gm = product(gx if b.scale2 is None else gx * b.scale2, w.proj_weight)
        ga = gain_(product(gm.mul_(self.slope[:, None]), w.fc_weight), b.norm2)
        del gm
        return gx.add_(norm_jacobian(ga, self.x1, self.r1))


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight, multiplied in the weight's dtype and handed back in that of the rows."""
    return (rows.to(weight.dtype) @ weight).to(rows.dtype)


def standardize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (..., D) less its mean and over its deviation, and 1 / sigma (..., 1)."""
    centred = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd, rstd


def affine(x: Tensor, norm: Norm) -> Tensor:
    """A norm's gain and bias on standardised x."""
    x = x if norm.weight is None else x * norm.weight
    return x if norm.bias is None else x + norm.bias


def gain_(x: Tensor, norm: Norm) -> Tensor:
    """x times a norm's gain, in place."""
    return x if norm.weight is None else x.mul_(norm.weight)


def norm_jacobian(rows: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """LayerNorm's Jacobian, rstd (I - 1 1^T / D - x x^T / D), applied to rows (B, R, D); it is symmetric.

    Both rank-one terms go in one pass over the rows.
    """
    basis = torch.stack((torch.ones_like(x), x), dim=1)  # (B, 2, D)
    coefficients = rows @ basis.mT  # (B, R, 2)
    return torch.baddbmm(rows, coefficients, basis, alpha=-1.0 / x.shape[-1]).mul_(rstd[:, None])
