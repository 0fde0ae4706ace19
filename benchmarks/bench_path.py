"""path_points and path_accumulate: the definitions against copying as many bytes, and what a call of an op costs.

make bench, or: pytest benchmarks/bench_path.py --benchmark-enable
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from paired import report
from torch import Tensor

from clipfast.ops.path import Points, define_points, path_accumulate, path_points

BATCH, TOKENS, WIDTH, STEPS = 1, 197, 768, 16


def _said(case: str, timings: dict[str, Any], scale: float, unit: str) -> str:
    return f"\n{case}: " + ", ".join(f"{n} {t.median * scale:.2f} {unit} ({t.ratio:.2f})" for n, t in timings.items())


@pytest.mark.benchmark(group="path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_points_against_a_copy(benchmark: Any, dtype: torch.dtype) -> None:
    start, delta = torch.randn(2, BATCH, TOKENS, WIDTH)
    alphas = torch.rand(STEPS)

    def one_by_one() -> Tensor:
        return torch.cat([(start + alpha * delta).to(dtype) for alpha in alphas])

    points = path_points(start, delta, alphas, dtype)
    torch.testing.assert_close(points, one_by_one(), rtol=1e-2, atol=1e-2)
    functions: dict[str, Callable[[], object]] = {
        "copy": points.clone,
        "path_points": lambda: path_points(start, delta, alphas, dtype),
        "one by one": one_by_one,
    }
    timings = report(benchmark, functions, repeats=31)
    print(_said(f"{STEPS} points, {str(dtype).removeprefix('torch.')}", timings, 1e3, "ms"))


@pytest.mark.benchmark(group="path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_sum_against_a_copy(benchmark: Any, dtype: torch.dtype) -> None:
    alphas, total = torch.rand(STEPS), torch.zeros(BATCH, TOKENS, WIDTH)
    grad = torch.randn(STEPS * BATCH, TOKENS, WIDTH).to(dtype)
    functions: dict[str, Callable[[], object]] = {
        "copy": grad.clone,
        "path_accumulate": lambda: path_accumulate(total, grad, alphas),
        "at once": lambda: (alphas[:, None, None, None] * grad.unflatten(0, (STEPS, BATCH)).float()).sum(0),
    }
    timings = report(benchmark, functions, repeats=31)
    print(_said(f"the sum of {STEPS} gradients, {str(dtype).removeprefix('torch.')}", timings, 1e3, "ms"))


@pytest.mark.benchmark(group="path")
def test_what_a_call_costs(benchmark: Any) -> None:
    """The definition called by itself, through checks and dispatch, and through torch.library."""
    start, delta, alphas = torch.randn(1, 8), torch.randn(1, 8), torch.rand(2)
    inputs = Points(start, delta, alphas, torch.empty(2, 1, 8))

    def hundred(function: Callable[[], object]) -> Callable[[], object]:
        return lambda: [function() for _ in range(100)]

    functions = {
        "definition": hundred(lambda: define_points(inputs)),
        "op": hundred(lambda: path_points(start, delta, alphas)),
        "torch.ops": hundred(lambda: torch.ops.clipfast.path_points(start, delta, alphas)),
    }
    timings = report(benchmark, functions, repeats=15)
    print(_said("one call", timings, 1e4, "us"))
