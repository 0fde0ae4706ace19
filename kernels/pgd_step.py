"""Triton form of clipfast/ops/pgd_step.py: every tensor is read once and written once.

`pgd_step_kernel` takes a block of one image's pixels, channel after channel; `pgd_step_group_kernel` one cell of one
channel, whose norms it needs. Both add what was not finite to one integer, whose sum does not depend on the order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
WARPS = 4


@triton.jit
def penalty_slope(b_delta, inner, knee, outer, level, KNEE: tl.constexpr):
    """inner * v up to the knee, sign(v) (outer |v| + level) beyond."""
    b_slope = inner * b_delta
    if KNEE:
        b_size = tl.abs(b_delta)
        b_beyond = b_sign(b_delta) * (outer * b_size + level)
        b_slope = tl.where(b_size <= knee, b_slope, b_beyond)
    return b_slope


@triton.jit
def b_sign(b_x):
    return tl.where(b_x > 0, 1.0, 0.0) - tl.where(b_x < 0, 1.0, 0.0)


@triton.jit
def is_finite(b_g):
    return tl.abs(b_g) < float("inf")


@triton.jit
def add_to(p_count, b_bad):
    bad = tl.sum(b_bad).to(tl.int64)
    tl.atomic_add(p_count, bad, mask=bad > 0)


@triton.jit
def within_image(b_delta, b_image):
    return tl.minimum(tl.maximum(b_delta, -b_image), 1.0 - b_image)


@triton.jit
def pgd_step_kernel(
    p_delta,
    p_velocity,
    p_gradient,
    p_image,
    p_count,
    C,
    M,
    inner,
    knee,
    outer,
    level,
    colour,
    radius,
    step_size,
    momentum,
    KNEE: tl.constexpr,
    COLOUR: tl.constexpr,
    MOMENTUM: tl.constexpr,
    SIGN: tl.constexpr,
    BOX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """delta = clamp(delta + step_size d(momentum velocity + d(gradient - h'(delta)))), pixel by pixel."""
    blocks = tl.cdiv(M, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    offsets = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < M
    offsets = b * C * M + offsets
    b_colour = tl.zeros((BLOCK,), tl.float32)
    if COLOUR:
        for c in range(C):
            b_delta = tl.load(p_delta + offsets + c * M, mask=inside, other=0.0)
            b_colour += b_delta * b_delta
        b_colour = tl.where(b_colour > 0, colour / tl.sqrt(tl.where(b_colour > 0, b_colour, 1.0)), 0.0)
    b_bad = tl.zeros((BLOCK,), tl.int32)
    for _ in range(C):
        b_delta = tl.load(p_delta + offsets, mask=inside, other=0.0)
        b_image = tl.load(p_image + offsets, mask=inside, other=0.0)
        b_g = tl.load(p_gradient + offsets, mask=inside, other=0.0).to(tl.float32)
        b_g -= penalty_slope(b_delta, inner, knee, outer, level, KNEE) + b_colour * b_delta
        b_bad += tl.where(is_finite(b_g), 0, 1)
        b_g = tl.where(is_finite(b_g), b_g, 0.0)
        if SIGN:
            b_g = b_sign(b_g)
        if MOMENTUM:
            b_g += momentum * tl.load(p_velocity + offsets, mask=inside, other=0.0)
            if SIGN:
                b_g = b_sign(b_g)
            tl.store(p_velocity + offsets, b_g, mask=inside)
        b_delta += step_size * b_g
        if BOX:
            b_delta = tl.minimum(tl.maximum(b_delta, -radius), radius)
        tl.store(p_delta + offsets, within_image(b_delta, b_image), mask=inside)
        offsets += M
    add_to(p_count, b_bad)


@triton.jit
def pgd_step_group_kernel(
    p_delta,
    p_velocity,
    p_gradient,
    p_image,
    p_count,
    H,
    W,
    cell,
    inner,
    knee,
    outer,
    level,
    radius,
    step_size,
    momentum,
    tiny,
    KNEE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    SIGN: tl.constexpr,
    NORMALIZED: tl.constexpr,
    SIDE: tl.constexpr,
):
    """The same with each cell's L2 norm held to the radius; what lies in no whole cell becomes zero."""
    rows, columns = tl.cdiv(H, cell), tl.cdiv(W, cell)
    channel = (tl.program_id(0) // (rows * columns)).to(tl.int64)
    row = tl.program_id(0) // columns % rows
    column = tl.program_id(0) % columns
    whole = ((row + 1) * cell <= H) & ((column + 1) * cell <= W)
    b_y = tl.arange(0, SIDE)[:, None]
    b_x = tl.arange(0, SIDE)[None, :]
    inside = (b_y < cell) & (b_x < cell) & (row * cell + b_y < H) & (column * cell + b_x < W)
    offsets = (channel * H + row * cell + b_y) * W + column * cell + b_x

    b_delta = tl.load(p_delta + offsets, mask=inside, other=0.0)
    b_image = tl.load(p_image + offsets, mask=inside, other=0.0)
    b_g = tl.load(p_gradient + offsets, mask=inside, other=0.0).to(tl.float32)
    b_g -= penalty_slope(b_delta, inner, knee, outer, level, KNEE)
    add_to(p_count, tl.where(is_finite(b_g), 0, 1))
    b_g = tl.where(is_finite(b_g), b_g, 0.0)
    if SIGN:
        b_g = b_sign(b_g)
    if NORMALIZED:
        b_g = whole_cell(b_g / tl.maximum(tl.sqrt(tl.sum(b_g * b_g)), tiny), whole)
    if MOMENTUM:
        b_g += momentum * tl.load(p_velocity + offsets, mask=inside, other=0.0)
        if SIGN:
            b_g = b_sign(b_g)
        if NORMALIZED:
            b_g = whole_cell(b_g / tl.maximum(tl.sqrt(tl.sum(b_g * b_g)), tiny), whole)
        tl.store(p_velocity + offsets, b_g, mask=inside)
    b_delta += step_size * b_g
    b_delta = whole_cell(b_delta * (radius / tl.maximum(tl.sqrt(tl.sum(b_delta * b_delta)), radius)), whole)
    tl.store(p_delta + offsets, within_image(b_delta, b_image), mask=inside)


@triton.jit
def whole_cell(b_x, whole):
    return tl.where(whole, b_x, 0.0)


def pgd_step(
    delta: Tensor,
    velocity: Tensor | None,
    gradient: Tensor,
    image: Tensor,
    count: Tensor,
    slope: tuple[float, float, float, float, float],
    bound: str,
    radius: float,
    step_size: float,
    momentum: float,
    direction: str,
    cell: int,
    tiny: float,
) -> None:
    """Tensors (B, C, H, W) contiguous and float32, gradient of any dtype; count () int64."""
    batch, channels, height, width = delta.shape
    inner, knee, outer, level, colour = slope
    tensors = (delta, delta if velocity is None else velocity, gradient, image, count)
    flags = {"KNEE": knee < float("inf"), "MOMENTUM": velocity is not None, "SIGN": direction == "sign"}
    if bound == "group":
        cells = batch * channels * triton.cdiv(height, cell) * triton.cdiv(width, cell)
        side = triton.next_power_of_2(cell)
        pgd_step_group_kernel[(cells,)](
            *tensors,
            height,
            width,
            cell,
            inner,
            knee,
            outer,
            level,
            radius,
            step_size,
            momentum,
            tiny,
            **flags,
            NORMALIZED=direction == "normalized",
            SIDE=side,
            num_warps=max(1, min(8, side * side // 256)),
            enable_fp_fusion=True,
        )
        return
    size = height * width
    pgd_step_kernel[(batch * triton.cdiv(size, BLOCK),)](
        *tensors,
        channels,
        size,
        inner,
        knee,
        outer,
        level,
        colour,
        radius,
        step_size,
        momentum,
        **flags,
        COLOUR=colour != 0,
        BOX=bound == "box",
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
