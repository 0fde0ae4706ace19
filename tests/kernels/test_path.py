from __future__ import annotations

import pytest
import torch

from clipfast.ops.dispatch import backend
from clipfast.ops.path import path_accumulate, path_points

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@DTYPES
def test_compiles(compiled, dtype: torch.dtype) -> None:
    from clipfast.kernels import path

    def points(batch: int, size: int, steps: int) -> None:
        start = torch.empty(batch, size, dtype=dtype)
        path.path_points(start, start, torch.empty(steps), torch.empty(steps, batch, size, dtype=dtype))

    def accumulate(batch: int, size: int, steps: int) -> None:
        grad = torch.empty(steps, batch, size, dtype=dtype)
        path.path_accumulate(torch.empty(batch, size), grad, torch.empty(steps))

    for run in (points, accumulate):
        compiled(f"{dtype}, ViT-B/16, 32 steps", lambda run=run: run(4, 197 * 768, 32))
        compiled(f"{dtype}, 1 image, 1 step, odd size", lambda run=run: run(1, 12345, 1))


@pytest.mark.interpreter
@DTYPES
@pytest.mark.parametrize(("batch", "steps", "shape"), [(2, 3, (1100,)), (1, 1, (7, 5)), (3, 2, (1,))])
def test_agrees_with_the_definition(dtype: torch.dtype, batch: int, steps: int, shape: tuple[int, ...]) -> None:
    start, delta = torch.randn(2, batch, *shape).to(dtype)
    # Rows of another stride than their length, with NaN between them.
    padded = torch.full((batch, 2, *shape), torch.nan, dtype=dtype)
    padded[:, 0] = delta
    alphas = torch.rand(steps)
    with backend("triton"):
        points = path_points(start[:1], padded[:, 0], alphas)
    with backend("torch"):
        expected = path_points(start[:1], delta, alphas)
    # The interpreter truncates to bfloat16 where hardware rounds.
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(points, expected, rtol=tolerance, atol=tolerance)

    grad, weights = torch.randn(steps * batch, *shape).to(dtype), torch.randn(steps)
    totals = torch.full((2, batch, 2, *shape), torch.nan)
    totals[:, :, 0] = torch.randn(batch, *shape)
    for total, name in zip(totals, ("triton", "torch"), strict=True):
        with backend(name):
            path_accumulate(total[:, 0], grad, weights)
    torch.testing.assert_close(totals[0, :, 0], totals[1, :, 0], rtol=1e-6, atol=1e-6)
    assert totals[:, :, 1].isnan().all()
