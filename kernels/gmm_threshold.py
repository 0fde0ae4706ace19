"""Triton form of clipfast/ops/gmm_threshold.py: a map stays in registers from its scores to its result."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NARROW = tl.constexpr(1e-3)
REGULARISATION = tl.constexpr(1e-6)
TOLERANCE = tl.constexpr(1e-3)
ITERATIONS = tl.constexpr(100)
EMPTY = tl.constexpr(10 * torch.finfo(torch.float64).eps)
ABOVE_ALL = tl.constexpr(0x7F800000)  # the bits of infinity


@triton.jit
def over_row(x):
    """The sum of each row: (R, N) -> (R, 1)."""
    return tl.sum(x, axis=1)[:, None]


@triton.jit
def unit_quartiles(unit, present, n):
    """The quantiles (R, 1) at 1/4 and 3/4 of values in [0, 1], interpolated.

    Positive numbers are ordered as their bits are, so the value at a rank is found bit by bit: the greatest bits with
    no more than `rank` values below them. Both counts share a sum: they are below 2^15.
    """
    bits = tl.where(present, unit.to(tl.int32, bitcast=True), ABOVE_ALL)
    first_rank, last_rank = (n - 1) // 4, (3 * (n - 1)) // 4
    first = tl.zeros([unit.shape[0], 1], tl.int32)
    last = tl.zeros([unit.shape[0], 1], tl.int32)
    for i in range(30):
        step = 1 << (29 - i)
        counts = over_row((bits < first + step).to(tl.int32) + ((bits < last + step).to(tl.int32) << 16))
        first += tl.where((counts & 0xFFFF) <= first_rank, step, 0)
        last += tl.where((counts >> 16) <= last_rank, step, 0)
    counts = over_row((bits <= first).to(tl.int32) + ((bits <= last).to(tl.int32) << 16))
    after_first = tl.min(tl.where(bits > first, bits, ABOVE_ALL), axis=1)[:, None]
    after_last = tl.min(tl.where(bits > last, bits, ABOVE_ALL), axis=1)[:, None]
    after_first = tl.where((counts & 0xFFFF) > first_rank + 1, first, after_first)
    after_last = tl.where((counts >> 16) > last_rank + 1, last, after_last)
    return (
        between(first, after_first, ((n - 1) % 4) * 0.25),
        between(last, after_last, ((3 * (n - 1)) % 4) * 0.25),
    )


@triton.jit
def between(below, above, fraction):
    """below + fraction (above - below) of numbers given by their bits; `above` does not exist where fraction is 0."""
    low = below.to(tl.float32, bitcast=True)
    high = tl.where(fraction == 0, low, above.to(tl.float32, bitcast=True))
    return low + fraction * (high - low)


@triton.jit
def expect(z, present, m0, m1, v0, v1, w0, w1):
    """Posteriors (R, N) of both components, and log(p0 + p1) but for a constant; zeros outside of the map."""
    log0 = tl.log(w0) - 0.5 * tl.log(v0) - (z - m0) * (z - m0) * (0.5 / v0)
    log1 = tl.log(w1) - 0.5 * tl.log(v1) - (z - m1) * (z - m1) * (0.5 / v1)
    ratio = tl.exp(-tl.abs(log1 - log0))
    major = 1.0 / (1.0 + ratio)
    minor = ratio * major
    is_lower = log1 < log0
    r0 = tl.where(present, tl.where(is_lower, major, minor), 0.0)
    r1 = tl.where(present, tl.where(is_lower, minor, major), 0.0)
    likelihood = tl.where(present, tl.where(is_lower, log0, log1) + tl.log(1.0 + ratio), 0.0)
    return r0, r1, likelihood


@triton.jit
def thresholded(scores, present, n, HARD: tl.constexpr):
    """The op on the rows of a tile (R, N), of which `present` (R, N) is in the maps.

    Returns the result and the posterior of the higher component (R, N), and (R, 1): low mean, high mean, low variance,
    high variance, low weight, high weight, iterations.
    """
    low = tl.min(tl.where(present, scores, float("inf")), axis=1)[:, None]
    span = tl.max(tl.where(present, scores, -float("inf")), axis=1)[:, None] - low
    unit = tl.where(present, (scores - low) / tl.where(span == 0, 1.0, span), 0.0)
    unit_mean = over_row(unit) / n
    centred = tl.where(present, unit - unit_mean, 0.0)
    unit_deviation = tl.sqrt(over_row(centred * centred) / n)
    divisor = tl.where(span == 0, 1.0, unit_deviation)
    z = centred / divisor

    first, last = unit_quartiles(unit, present, n)
    narrow = (last - first) / divisor < NARROW
    m0 = (tl.where(narrow, 0.0, first) - unit_mean) / divisor
    m1 = (tl.where(narrow, tl.where(span == 0, 0.0, 1.0), last) - unit_mean) / divisor
    v0 = tl.full(m0.shape, 1.0, tl.float32)
    v1 = tl.full(m0.shape, 1.0, tl.float32)
    w0 = tl.full(m0.shape, 0.5, tl.float32)
    w1 = tl.full(m0.shape, 0.5, tl.float32)
    previous = tl.full(m0.shape, -float("inf"), tl.float32)
    iterations = tl.zeros(m0.shape, tl.int32)
    going = tl.full(m0.shape, 1, tl.int32)
    while tl.max(tl.max(going, axis=1), axis=0) > 0:
        r0, r1, likelihood = expect(z, present, m0, m1, v0, v1, w0, w1)
        mean_likelihood = over_row(likelihood) / n
        mass0, mass1 = over_row(r0) + EMPTY, over_row(r1) + EMPTY
        new0, new1 = over_row(r0 * z) / mass0, over_row(r1 * z) / mass1
        square0 = over_row(r0 * (z - new0) * (z - new0)) / mass0 + REGULARISATION
        square1 = over_row(r1 * (z - new1) * (z - new1)) / mass1 + REGULARISATION
        # A row that has stopped waits for the others of its tile unchanged.
        moves = going > 0
        m0, m1 = tl.where(moves, new0, m0), tl.where(moves, new1, m1)
        v0, v1 = tl.where(moves, square0, v0), tl.where(moves, square1, v1)
        w0 = tl.where(moves, mass0 / (mass0 + mass1), w0)
        w1 = tl.where(moves, mass1 / (mass0 + mass1), w1)
        iterations += going
        # Written so that NaN stops.
        goes_on = (tl.abs(mean_likelihood - previous) >= TOLERANCE) & (iterations < ITERATIONS)
        going = tl.where(goes_on, going, 0)
        previous = mean_likelihood

    swapped = m0 > m1
    low_mean, high_mean = tl.where(swapped, m1, m0), tl.where(swapped, m0, m1)
    low_variance, high_variance = tl.where(swapped, v1, v0), tl.where(swapped, v0, v1)
    low_weight, high_weight = tl.where(swapped, w1, w0), tl.where(swapped, w0, w1)
    _, posterior, _ = expect(z, present, low_mean, high_mean, low_variance, high_variance, low_weight, high_weight)
    above = z - low_mean
    deviation = span * unit_deviation
    height = deviation * tl.where(above < 0, 0.0, above)  # NaN stays NaN
    result = height * ((posterior >= 0.5).to(tl.float32) if HARD else posterior)
    centre = low + span * unit_mean
    return (
        result,
        posterior,
        low_mean * deviation + centre,
        high_mean * deviation + centre,
        low_variance * deviation * deviation,
        high_variance * deviation * deviation,
        low_weight,
        high_weight,
        iterations.to(tl.float32),
    )


@triton.jit
def gmm_threshold_kernel(
    p_scores,
    p_out,
    p_parameters,
    p_posterior,
    M,
    N,
    stride_map,
    stride_score,
    HARD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = (s - low mean)+ r_high, or that height where r_high >= 1/2: ROWS maps a program."""
    maps = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    in_row = maps < M
    present = in_row & (columns < N)
    scores = tl.load(p_scores + maps * stride_map + columns * stride_score, mask=present, other=0.0).to(tl.float32)
    # A tile's last rows may lie past the last map: as maps of zeros they stop early.
    result, posterior, m0, m1, v0, v1, w0, w1, iterations = thresholded(scores, columns < N, N, HARD)
    tl.store(p_out + maps * N + columns, result, mask=present)
    if p_posterior is not None:
        tl.store(p_posterior + maps * N + columns, posterior, mask=present)
    if p_parameters is not None:
        tl.store(p_parameters + maps * 7, m0, mask=in_row)
        tl.store(p_parameters + maps * 7 + 1, m1, mask=in_row)
        tl.store(p_parameters + maps * 7 + 2, v0, mask=in_row)
        tl.store(p_parameters + maps * 7 + 3, v1, mask=in_row)
        tl.store(p_parameters + maps * 7 + 4, w0, mask=in_row)
        tl.store(p_parameters + maps * 7 + 5, w1, mask=in_row)
        tl.store(p_parameters + maps * 7 + 6, iterations, mask=in_row)


def gmm_threshold(
    scores: Tensor, hard: bool, out: Tensor, parameters: Tensor | None = None, posterior: Tensor | None = None
) -> None:
    """scores (M, n), any strides and dtype; out (M, n), parameters (M, 7), posterior (M, n) float32 and contiguous."""
    maps, size = scores.shape
    block = triton.next_power_of_2(size)
    # Eight scores a thread; one warp where that does, since then no sum waits for another warp.
    rows = max(1, 256 // block)
    gmm_threshold_kernel[(triton.cdiv(maps, rows),)](
        scores,
        out,
        parameters,
        posterior,
        maps,
        size,
        scores.stride(0),
        scores.stride(1),
        HARD=hard,
        ROWS=rows,
        BLOCK=block,
        num_warps=max(1, block // 256),
        enable_fp_fusion=True,
    )
