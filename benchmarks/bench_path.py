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


def _said(case: str, timings: dict[str, Any], scale: float, unit: str) -> str:
    return f"\n{case}: " + ", ".join(f"{n} {t.median * scale:.2f} {unit} ({t.ratio:.2f})" for n, t in timings.items())


@pytest.mark.benchmark(group="path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_definitions_against_a_copy(benchmark: Any, dtype: torch.dtype) -> None:
    batch, tokens, width, steps = 1, 197, 768, 16
    start, delta = torch.randn(2, batch, tokens, width)
    alphas, total = torch.rand(steps), torch.zeros(batch, tokens, width)
    grad = torch.randn(steps * batch, tokens, width).to(dtype)
    other = torch.empty_like(grad)

    def one_by_one() -> Tensor:
        return torch.cat([(start + alpha * delta).to(dtype) for alpha in alphas])

    def summed() -> Tensor:
        return total + (alphas[:, None, None, None] * grad.unflatten(0, (steps, batch)).float()).sum(0)

    torch.testing.assert_close(path_points(start, delta, alphas, dtype), one_by_one(), rtol=1e-2, atol=1e-2)
    functions: dict[str, Callable[[], object]] = {
        "copy": lambda: other.copy_(grad),
        "path_points": lambda: path_points(start, delta, alphas, dtype),
        "one by one": one_by_one,
        "path_accumulate": lambda: path_accumulate(total, grad, alphas),
        "summed at once": summed,
    }
    timings = report(benchmark, functions, repeats=15)
    print(_said(f"{steps} points, {str(dtype).removeprefix('torch.')}", timings, 1e3, "ms"))


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
