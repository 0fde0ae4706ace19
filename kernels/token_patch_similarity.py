"""Triton form of clipfast/ops/token_patch_similarity.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels.gmm_threshold import thresholded

# Warps and step along E of the fused kernel, by the power of two that holds the patches: those that spill least.
FUSED = {32: (4, 32), 64: (4, 32), 128: (8, 32), 256: (16, 32), 512: (8, 16), 1024: (32, 16)}
SMALLEST_NORM = tl.constexpr(1e-12)


@triton.jit
def similarity(
    p_tokens,
    p_patches,
    tokens,
    patches,
    T,
    N,
    E,
    stride_t,
    stride_te,
    stride_n,
    stride_ne,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The tile t.p / (|t| |p|) of tokens (R,) and patches (C,), (R, C): products first, norms gathered on the way."""
    dots = tl.zeros([tokens.shape[0], patches.shape[0]], tl.float32)
    token_squares = tl.zeros([tokens.shape[0]], tl.float32)
    patch_squares = tl.zeros([patches.shape[0]], tl.float32)
    p_tokens += tokens.to(tl.int64)[:, None] * stride_t
    p_patches += patches.to(tl.int64)[None, :] * stride_n
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        in_tokens = (tokens < T)[:, None] & (e < E)[None, :]
        in_patches = (e < E)[:, None] & (patches < N)[None, :]
        b_tokens = tl.load(p_tokens + e[None, :] * stride_te, mask=in_tokens, other=0.0).to(tl.float32)
        b_patches = tl.load(p_patches + e[:, None] * stride_ne, mask=in_patches, other=0.0).to(tl.float32)
        dots = tl.dot(b_tokens, b_patches, dots, input_precision=PRECISION)
        token_squares += tl.sum(b_tokens * b_tokens, axis=1)
        patch_squares += tl.sum(b_patches * b_patches, axis=0)
    token_norms = tl.maximum(tl.sqrt(token_squares), SMALLEST_NORM)
    patch_norms = tl.maximum(tl.sqrt(patch_squares), SMALLEST_NORM)
    return dots / token_norms[:, None] / patch_norms[None, :]


@triton.jit
def token_patch_similarity_kernel(
    p_tokens,
    p_patches,
    p_out,
    T,
    N,
    E,
    stride_tb,
    stride_t,
    stride_te,
    stride_nb,
    stride_n,
    stride_ne,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """scores[b, t, i] = t . p / (|t| |p|): one tile (BLOCK_T, BLOCK_N) of one image a program."""
    program = tl.program_id(0)
    across, down = tl.cdiv(N, BLOCK_N), tl.cdiv(T, BLOCK_T)
    b = (program // (across * down)).to(tl.int64)
    tokens = (program // across) % down * BLOCK_T + tl.arange(0, BLOCK_T)
    patches = program % across * BLOCK_N + tl.arange(0, BLOCK_N)
    scores = similarity(
        p_tokens + b * stride_tb,
        p_patches + b * stride_nb,
        tokens,
        patches,
        T,
        N,
        E,
        stride_t,
        stride_te,
        stride_n,
        stride_ne,
        PRECISION,
        BLOCK_E,
    )
    rows = (b * T + tokens)[:, None] * N
    tl.store(p_out + rows + patches[None, :], scores, mask=(tokens < T)[:, None] & (patches < N)[None, :])


@triton.jit
def token_patch_threshold_kernel(
    p_tokens,
    p_patches,
    p_out,
    T,
    N,
    E,
    stride_tb,
    stride_t,
    stride_te,
    stride_nb,
    stride_n,
    stride_ne,
    HARD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out[b, t] = gmm_threshold(scores[b, t]): the scores of BLOCK_T tokens and every patch stay in registers."""
    program = tl.program_id(0)
    down = tl.cdiv(T, BLOCK_T)
    b = (program // down).to(tl.int64)
    tokens = program % down * BLOCK_T + tl.arange(0, BLOCK_T)
    patches = tl.arange(0, BLOCK_N)
    scores = similarity(
        p_tokens + b * stride_tb,
        p_patches + b * stride_nb,
        tokens,
        patches,
        T,
        N,
        E,
        stride_t,
        stride_te,
        stride_n,
        stride_ne,
        PRECISION,
        BLOCK_E,
    )
    result, _, _, _, _, _, _, _, _ = thresholded(scores, (patches < N)[None, :], N, HARD)
    rows = (b * T + tokens)[:, None] * N
    tl.store(p_out + rows + patches[None, :], result, mask=(tokens < T)[:, None] & (patches < N)[None, :])


def token_patch_similarity(tokens: Tensor, patches: Tensor, out: Tensor) -> None:
    """tokens (B, T, E) and patches (B, n, E) of any strides and float dtype; out (B, T, n) float32, contiguous."""
    batch, count, _ = tokens.shape
    tiles = triton.cdiv(count, 16) * triton.cdiv(patches.shape[1], 64)
    token_patch_similarity_kernel[(batch * tiles,)](
        *_arguments(tokens, patches, out),
        PRECISION=_precision(tokens, patches),
        BLOCK_T=16,
        BLOCK_N=64,
        BLOCK_E=32,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=True,
    )


def token_patch_threshold(tokens: Tensor, patches: Tensor, hard: bool, out: Tensor) -> None:
    """As `token_patch_similarity`, with maps thresholded as by `gmm_threshold`; n up to 1024."""
    batch, count, _ = tokens.shape
    block = max(32, triton.next_power_of_2(patches.shape[1]))
    warps, step = FUSED[block]
    token_patch_threshold_kernel[(batch * triton.cdiv(count, 16),)](
        *_arguments(tokens, patches, out),
        HARD=hard,
        PRECISION=_precision(tokens, patches),
        BLOCK_T=16,
        BLOCK_N=block,
        BLOCK_E=step,
        num_warps=warps,
        num_stages=2,
        enable_fp_fusion=True,
    )


def _arguments(tokens: Tensor, patches: Tensor, out: Tensor) -> tuple[object, ...]:
    sizes = tokens.shape[1], patches.shape[1], tokens.shape[2]
    return tokens, patches, out, *sizes, *tokens.stride(), *patches.stride()


def _precision(tokens: Tensor, patches: Tensor) -> str:
    # The products of half-precision numbers are exact in TF32; those of float32 take three products to be as good.
    halves = (torch.float16, torch.bfloat16)
    return "tf32" if tokens.dtype in halves and patches.dtype in halves else "tf32x3"
