"""Triton form of clipfast/ops/path.py: both kernels stream memory, one program a block of one image's row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
WARPS = 4


@triton.jit
def path_points_kernel(
    p_start,
    p_delta,
    p_alphas,
    p_points,
    M,
    S,
    stride_start,
    stride_delta,
    stride_points,
    stride_step,
    BLOCK: tl.constexpr,
):
    """points[s, b, i] = start[b, i] + alphas[s] * delta[b, i]; start and delta are read once for all S points."""
    blocks = tl.cdiv(M, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    offsets = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < M
    b_start = tl.load(p_start + b * stride_start + offsets, mask=inside, other=0.0).to(tl.float32)
    b_delta = tl.load(p_delta + b * stride_delta + offsets, mask=inside, other=0.0).to(tl.float32)
    p_row = p_points + b * stride_points + offsets
    for s in range(S):
        b_point = b_start + tl.load(p_alphas + s) * b_delta
        tl.store(p_row, b_point.to(p_points.dtype.element_ty), mask=inside)
        p_row += stride_step


@triton.jit
def path_accumulate_kernel(
    p_total, p_grad, p_weights, M, S, stride_total, stride_grad, stride_step, BLOCK: tl.constexpr
):
    """total[b, i] += sum_s weights[s] * grad[s, b, i], in the order of the steps."""
    blocks = tl.cdiv(M, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    offsets = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < M
    p_row = p_total + b * stride_total + offsets
    p_step = p_grad + b * stride_grad + offsets
    b_total = tl.load(p_row, mask=inside, other=0.0)
    for s in range(S):
        b_total += tl.load(p_weights + s) * tl.load(p_step, mask=inside, other=0.0).to(tl.float32)
        p_step += stride_step
    tl.store(p_row, b_total, mask=inside)


def path_points(start: Tensor, delta: Tensor, alphas: Tensor, points: Tensor) -> None:
    """start and delta (B, M), alphas (S,) float32, points (S, B, M); contiguous along M, any strides else."""
    steps, batch, size = points.shape
    path_points_kernel[(batch * triton.cdiv(size, BLOCK),)](
        start,
        delta,
        alphas,
        points,
        size,
        steps,
        start.stride(0),
        delta.stride(0),
        points.stride(1),
        points.stride(0),
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )


def path_accumulate(total: Tensor, grad: Tensor, weights: Tensor) -> None:
    """total (B, M) float32, grad (S, B, M), weights (S,) float32; contiguous along M, any strides else."""
    steps, batch, size = grad.shape
    path_accumulate_kernel[(batch * triton.cdiv(size, BLOCK),)](
        total,
        grad,
        weights,
        size,
        steps,
        total.stride(0),
        grad.stride(1),
        grad.stride(0),
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
