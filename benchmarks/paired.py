"""What the suites add to clipfast's own timer (`clipfast.bench.timer`): figures in pytest-benchmark's report, and the
commit in what is said of the machine."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipfast import versions
from clipfast.bench.timer import Timing, paired


def report(
    benchmark: Any, functions: dict[str, Callable[[], object]], repeats: int = 7, warmup: int = 2
) -> dict[str, Timing]:
    """`paired` inside a pytest-benchmark test: the medians and ratios land in the suite's JSON as `extra_info`.

    `benchmark` is the fixture of that name. Its own clock covers the whole interleaved run, which means nothing by
    itself.
    """
    timings: dict[str, Timing] = benchmark.pedantic(paired, (functions, repeats, warmup), rounds=1, iterations=1)
    for name, timing in timings.items():
        benchmark.extra_info[name] = {"median_seconds": timing.median, "ratio": timing.ratio}
    return timings


def machine() -> dict[str, Any]:
    """What a figure needs beside it: processor, cores, threads, GPU, versions and commit."""
    return {**versions.machine(), "commit": _commit()}


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
