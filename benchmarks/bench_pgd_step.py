"""pgd_step: the step of the inner problem beside the operations that published code spells it out with.

make bench, or: pytest benchmarks/bench_pgd_step.py --benchmark-enable -o python_files='bench_*.py' -s
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from paired import report
from torch import Tensor

from clipfast.ops.pgd_step import Slope, cell_norms, pgd_step, scale_cells_

SHAPE, EPS, STEP, CELL = (16, 3, 224, 224), 4 / 255, 1 / 255, 14


def spelled_out(
    delta: Tensor, velocity: Tensor | None, gradient: Tensor, image: Tensor, inner: float, group: bool
) -> tuple[Tensor, Tensor | None]:
    """The step as a loop over AFT's penalty is written: an operation a line, each with a result of its own."""

    def directed(g: Tensor) -> Tensor:
        return scale_cells_(g.clone(), 1 / cell_norms(g, CELL).clamp(min=1e-12), CELL) if group else g.sign()

    g = gradient - inner * delta
    if g.isnan().any():
        g[g.isnan()] = 0.0
    g = directed(g)
    if velocity is not None:
        velocity = directed(0.9 * velocity + g)
        g = velocity
    delta = delta + STEP * g
    if group:
        delta = scale_cells_(delta, EPS / cell_norms(delta, CELL).clamp(min=EPS), CELL)
    else:
        delta = torch.clamp(delta, -EPS, EPS)
    return torch.clamp(image + delta, 0, 1) - image, velocity


@pytest.mark.benchmark(group="pgd_step")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("bound", ["box", "group"])
def test_a_step(benchmark: Any, bound: str, momentum: float) -> None:
    torch.manual_seed(0)
    gradient, image, zeros = torch.randn(SHAPE), torch.rand(SHAPE), torch.zeros(SHAPE)
    delta, count = torch.zeros(SHAPE), torch.zeros((), dtype=torch.int64)
    velocity = torch.zeros(SHAPE) if momentum else None
    slope, direction = list(Slope(inner=0.25)), "normalized" if bound == "group" else "sign"

    def ours() -> None:
        pgd_step(delta, velocity, gradient, image, count, slope, bound, EPS, STEP, momentum, direction, CELL)

    ours()
    expected, _ = spelled_out(zeros, zeros if momentum else None, gradient, image, 0.25, bound == "group")
    torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-7)
    # One step after the other, as in the loop.
    state = [zeros, zeros if momentum else None]

    def theirs() -> None:
        state[:] = spelled_out(state[0], state[1], gradient, image, 0.25, bound == "group")  # type: ignore[arg-type]

    functions: dict[str, Callable[[], object]] = {"spelled out": theirs, "pgd_step": ours}
    timings = report(benchmark, functions, repeats=15)
    said = ", ".join(f"{n} {t.median * 1e3:.1f} ms ({t.ratio:.2f})" for n, t in timings.items())
    print(f"\n{bound}, momentum {momentum}: {said}")
    assert timings["pgd_step"].ratio <= 1
