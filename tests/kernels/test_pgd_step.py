from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from clipfast.ops.dispatch import backend
from clipfast.ops.pgd_step import TINY, Slope, pgd_step

HUBER, COLOUR = Slope(inner=0.25), Slope(colour=0.02)
ELASTIC = Slope(inner=0.3, knee=0.01, outer=2.0, level=-0.017)


def test_compiles(compiled) -> None:
    from clipfast.kernels import pgd_step as kernel

    def run(slope: Slope, bound: str, direction: str, cell: int = 14, side: int = 224, moving: bool = True) -> None:
        delta, image, gradient = torch.empty(3, 2, 3, side, side)
        numbers = (slope, bound, 0.02, 0.004, 0.9, direction, cell, TINY)
        kernel.pgd_step(delta, delta if moving else None, gradient, image, torch.zeros((), dtype=torch.int64), *numbers)

    compiled("huber, sign, no momentum", lambda: run(HUBER, "box", "sign", moving=False))
    compiled("released huber, sign, momentum", lambda: run(COLOUR, "box", "sign"))
    compiled("elastic net, gradient", lambda: run(ELASTIC, "none", "gradient", side=101))
    compiled("group norm, normalized, cells of 14", lambda: run(HUBER, "group", "normalized"))
    compiled(
        "group norm, sign, cells of 5, odd size", lambda: run(HUBER, "group", "sign", cell=5, side=101, moving=False)
    )
    compiled("group norm, normalized, cells of 64", lambda: run(ELASTIC, "group", "normalized", cell=64))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("slope", "bound", "direction", "dtype"),
    [
        (Slope(), "box", "sign", torch.bfloat16),
        (HUBER, "box", "gradient", torch.float32),
        (COLOUR, "box", "sign", torch.float16),
        (COLOUR, "none", "gradient", torch.float32),
        (ELASTIC, "none", "sign", torch.float32),
        (ELASTIC, "box", "gradient", torch.float32),
        (Slope(knee=0.0, outer=5.0, level=-0.05), "none", "gradient", torch.float32),
        (HUBER, "group", "normalized", torch.float32),
        (ELASTIC, "group", "sign", torch.bfloat16),
        (Slope(), "group", "gradient", torch.float32),
    ],
)
def test_agrees_with_the_definition(slope: Slope, bound: str, direction: str, dtype: torch.dtype) -> None:
    # A cell is a program, and 512 pixels are one.
    larger = (2, 1, 6, 10) if bound == "group" else (2, 2, 34, 33)
    for shape, moving in itertools.product([(1, 3, 7, 9), larger], [False, True]):
        # Between rows of NaN: nothing beyond the tensors is read into the result, or written.
        whole = torch.full((2, shape[0] + 2, *shape[1:]), torch.nan)
        image = torch.rand(shape).mul_(1.4).sub_(0.2).clamp_(0, 1)
        gradient = (0.1 * torch.randn(shape)).to(dtype)
        gradient[0, 0, :2, 0] = torch.tensor([torch.nan, torch.inf])
        gradient[-1, -1, :, -1] = -torch.inf
        gradient[0, :, 3:6, 3:6] = 0
        start = (0.02 * torch.randn(shape)).clamp_(-image, 1 - image)
        start[0, :, :3] = 0
        found: list[Any] = []
        for name in ("triton", "torch"):
            whole[0, 1:-1], whole[1, 1:-1] = start, torch.linspace(-1, 1, start.numel()).view(shape)
            count = torch.tensor(7)
            velocity = whole[1, 1:-1] if moving else None
            with backend(name):
                pgd_step(whole[0, 1:-1], velocity, gradient, image, count, slope, bound, 0.02, 0.004, 0.9, direction, 3)
            assert whole[:, [0, -1]].isnan().all()
            found.append((whole[:, 1:-1].clone(), int(count)))
        assert found[0][1] == found[1][1] == 7 + 2 + shape[2]
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-7)
