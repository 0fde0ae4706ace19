"""Triton form of clipfast/ops/spatial_attribution.py.

A map is a product of patches (rows of v) and prompts (rows of g), scaled by one weight a patch, so lambda can wait for
the end of each tile. Few prompts fit one small tile: a program takes a whole image and finds lambda itself, k and v are
read once, in one launch. Many prompts would have every tile of them find lambda anew, so a launch of its own does that
first, and the tiles of patches are programs of their own, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Patches and dimensions of k that are in registers together.
COSINE_N = 32
COSINE_D = 128
# Up to so many prompts a program finds lambda itself; together with a larger tile that does not fit the registers.
FEW = 32


@triton.jit
def _cosines(
    p_q, p_k, p_where, p_weight, N, D, stride_qd, stride_kn, stride_kd, stride_where,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """cos(q, k_i) of one image into p_weight; the lowest and the highest of those that take part."""
    low = float("inf")
    high = float("-inf")
    nothing = 0.0
    for n in range(0, N, BLOCK_N):
        i = n + tl.arange(0, BLOCK_N)
        p_rows = p_k + i.to(tl.int64)[:, None] * stride_kn
        b_dot = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        b_kk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        b_qq = tl.zeros((BLOCK_D,), tl.float32)
        for d in range(0, D, BLOCK_D):
            j = d + tl.arange(0, BLOCK_D).to(tl.int64)
            b_q = tl.load(p_q + j * stride_qd, mask=j < D, other=0.0).to(tl.float32)
            inside = (i[:, None] < N) & (j[None, :] < D)
            b_k = tl.load(p_rows + j[None, :] * stride_kd, mask=inside, other=0.0).to(tl.float32)
            b_dot += b_k * b_q[None, :]
            b_kk += b_k * b_k
            b_qq += b_q * b_q
        lengths = tl.maximum(tl.sqrt(tl.sum(b_kk, 1)), 1e-12) * tl.maximum(tl.sqrt(tl.sum(b_qq, 0)), 1e-12)
        cosine = tl.sum(b_dot, 1) / lengths
        taking_part = i < N
        if p_where is not None:
            taking_part = taking_part & (tl.load(p_where + i * stride_where, mask=i < N, other=0) != 0)
        low = tl.minimum(low, tl.min(tl.where(taking_part, cosine, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(taking_part, cosine, float("-inf")), 0))
        # min and max pass over NaN; nothing times NaN is NaN, which then reaches the whole map, as in the definition.
        nothing += tl.sum(tl.where(taking_part, cosine, 0.0) * 0.0, 0)
        tl.store(p_weight + i, tl.where(taking_part, cosine, float("-inf")), mask=i < N)
    return low + nothing, high + nothing


@triton.jit
def _loosened(cosine, low, high):
    """minmax of the cosine: one where all are equal, zero where one took no part (minus infinity)."""
    varies = high != low
    weight = tl.where(varies, (cosine - low) / tl.where(varies, high - low, 1.0), 1.0)
    return tl.where(cosine == float("-inf"), 0.0, weight)


@triton.jit
def spatial_weight_kernel(
    p_q, p_k, p_where, p_weight, N, D,
    stride_qb, stride_qd, stride_kb, stride_kn, stride_kd, stride_whereb, stride_where,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """lambda_i = minmax_i cos(q, k_i); one program an image."""
    b = tl.program_id(0).to(tl.int64)
    p_weight += b * N
    if p_where is not None:
        p_where += b * stride_whereb
    low, high = _cosines(
        p_q + b * stride_qb, p_k + b * stride_kb, p_where, p_weight, N, D, stride_qd, stride_kn, stride_kd,
        stride_where, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    # Other threads wrote what this one reads next.
    tl.debug_barrier()
    for n in range(0, N, BLOCK_N):
        i = n + tl.arange(0, BLOCK_N)
        cosine = tl.load(p_weight + i, mask=i < N, other=0.0)
        tl.store(p_weight + i, _loosened(cosine, low, high), mask=i < N)


@triton.jit
def spatial_attribution_kernel(
    p_q, p_k, p_weight, p_v, p_g, p_out, N, D, C, P, tiles,
    stride_qb, stride_qd, stride_kb, stride_kn, stride_kd, stride_wb, stride_wn, stride_vb, stride_vn, stride_vc,
    stride_gb, stride_gp, stride_gc, stride_ob, stride_op, stride_on,
    FIND_WEIGHT: tl.constexpr, RELU: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, COSINE_N: tl.constexpr, COSINE_D: tl.constexpr,
):  # fmt: skip
    """out[b, p, i] = ReLU(lambda[b, i] * sum_c g[b, p, c] v[b, i, c]).

    A program takes `tiles` tiles of BLOCK_N patches and one of BLOCK_P prompts; those of one image follow one another,
    so that its v stays in the cache. FIND_WEIGHT: p_weight is to be filled first, by the one program of the image.
    """
    blocks_p = tl.cdiv(P, BLOCK_P)
    blocks_n = tl.cdiv(N, BLOCK_N * tiles)
    program = tl.program_id(0)
    first_p = (program % blocks_p) * BLOCK_P
    first_n = (program // blocks_p % blocks_n) * BLOCK_N * tiles
    b = (program // blocks_p // blocks_n).to(tl.int64)
    p_weight += b * stride_wb
    low = 0.0
    high = 0.0
    if FIND_WEIGHT:
        low, high = _cosines(
            p_q + b * stride_qb, p_k + b * stride_kb, None, p_weight, N, D, stride_qd, stride_kn, stride_kd, 0,
            COSINE_N, COSINE_D,
        )  # fmt: skip
        # Other threads wrote what this one reads next.
        tl.debug_barrier()

    p = first_p + tl.arange(0, BLOCK_P)
    p_directions = p_g + b * stride_gb + p.to(tl.int64)[None, :] * stride_gp
    for tile in range(tiles):
        i = first_n + tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        p_rows = p_v + b * stride_vb + i[:, None] * stride_vn
        product = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
        for c in range(0, C, BLOCK_C):
            j = c + tl.arange(0, BLOCK_C).to(tl.int64)
            b_v = tl.load(p_rows + j[None, :] * stride_vc, mask=(i[:, None] < N) & (j[None, :] < C), other=0.0)
            b_g = tl.load(p_directions + j[:, None] * stride_gc, mask=(p[None, :] < P) & (j[:, None] < C), other=0.0)
            if WIDEN:
                b_v = b_v.to(tl.float32)
                b_g = b_g.to(tl.float32)
            product = tl.dot(b_v, b_g, product, input_precision=PRECISION)
        weight = tl.load(p_weight + i * stride_wn, mask=i < N, other=0.0).to(tl.float32)
        if FIND_WEIGHT:
            weight = _loosened(weight, low, high)
        product *= weight[:, None]
        if RELU:
            product = tl.where(product < 0.0, 0.0, product)
        p_map = p_out + b * stride_ob + p.to(tl.int64)[None, :] * stride_op + i[:, None] * stride_on
        tl.store(p_map, product, mask=(i[:, None] < N) & (p[None, :] < P))


@dataclass(frozen=True)
class Tile:
    """How a product is cut: patches, prompts and channels in a tile; warps and stages of loading ahead."""

    n: int
    p: int
    c: int
    warps: int
    stages: int


def tile(prompts: int, widen: bool, aligned: bool) -> Tile:
    """The tile for this many prompts.

    widen: float32 products, which take three passes over their halves. aligned: rows begin at multiples of 16 bytes;
    others are loaded one number at a time, whose addresses fill the registers of a larger tile.
    """
    p = 16 if prompts <= 16 else 32 if prompts <= 32 else 64
    if widen or not aligned:
        return Tile(64, p, 32, warps=4, stages=3)
    return Tile(64, p if prompts <= 64 else 128, 64, warps=4, stages=4)


def spatial_weight(q: Tensor, k: Tensor, where: Tensor | None) -> Tensor:
    """lambda (B, N) float32 of q (B, D), k (B, N, D) and where (B, N) bool, of any strides."""
    batch, patches, width = k.shape
    weight = torch.empty(batch, patches, dtype=torch.float32, device=k.device)
    spatial_weight_kernel[(batch,)](
        q,
        k,
        where,
        weight,
        patches,
        width,
        *q.stride(),
        *k.stride(),
        *((0, 0) if where is None else where.stride()),
        BLOCK_N=COSINE_N,
        BLOCK_D=COSINE_D,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=True,
    )
    return weight


def spatial_attribution(
    q: Tensor | None,
    k: Tensor | None,
    weight: Tensor | None,
    v: Tensor,
    g: Tensor,
    out: Tensor,
    *,
    relu: bool,
    precision: str,
    cut: Tile | None = None,
) -> None:
    """out (B, P, N) float32 of v (B, N, C), g (B, P, C), and weight (B, N) or else q (B, D) and k (B, N, D).

    Any strides, those of 0 included. precision: "tf32x3", "tf32" or "ieee", of products that are not half precision on
    both sides.
    """
    batch, prompts, patches = out.shape
    widen = v.dtype != g.dtype or v.dtype == torch.float32
    cut = cut or tile(prompts, widen, _aligned(v) and _aligned(g))
    find_weight = weight is None and prompts <= min(FEW, cut.p)
    if weight is None:
        assert q is not None
        assert k is not None
        weight = out.new_empty(batch, patches) if find_weight else spatial_weight(q, k, None)
    tiles = triton.cdiv(patches, cut.n) if find_weight else 1
    programs = batch * triton.cdiv(prompts, cut.p) * triton.cdiv(patches, cut.n * tiles)
    spatial_attribution_kernel[(programs,)](
        q,
        k,
        weight,
        v,
        g,
        out,
        patches,
        0 if k is None else k.shape[2],
        v.shape[2],
        prompts,
        tiles,
        *((0, 0) if q is None else q.stride()),
        *((0, 0, 0) if k is None else k.stride()),
        *weight.stride(),
        *v.stride(),
        *g.stride(),
        *out.stride(),
        FIND_WEIGHT=find_weight,
        RELU=relu,
        WIDEN=widen,
        PRECISION=precision,
        BLOCK_N=cut.n,
        BLOCK_P=cut.p,
        BLOCK_C=cut.c,
        COSINE_N=COSINE_N,
        COSINE_D=COSINE_D,
        num_warps=cut.warps,
        num_stages=cut.stages,
        enable_fp_fusion=True,
    )


def _aligned(rows: Tensor) -> bool:
    return (
        rows.stride(-1) == 1
        and rows.data_ptr() % 16 == 0
        and all(s * rows.itemsize % 16 == 0 for s in rows.stride()[:-1])
    )
