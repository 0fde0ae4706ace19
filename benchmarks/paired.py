"""The one timer every benchmark uses: functions take turns (A B A B ...), so that a busy machine slows all of them
alike.

A figure worth keeping is a ratio: of each round's times, one round at a time, and then the median over the rounds.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """The times of one function. `seconds` holds one entry a round; `ratio` is the median over the rounds of this
    function's time over the first function's time in the same round."""

    seconds: tuple[float, ...]
    ratio: float

    @property
    def median(self) -> float:
        """Median seconds a call."""
        return statistics.median(self.seconds)


def paired(functions: dict[str, Callable[[], object]], repeats: int = 7, warmup: int = 2) -> dict[str, Timing]:
    """Time the functions in turn, `repeats` rounds after `warmup` untimed ones.

    The first function is the one that `ratio` refers to. Work queued on a GPU is waited for inside each time.
    """
    for _ in range(warmup):
        for function in functions.values():
            _seconds(function)
    rounds = [{name: _seconds(function) for name, function in functions.items()} for _ in range(repeats)]
    first = next(iter(functions))
    return {
        name: Timing(
            seconds=tuple(times[name] for times in rounds),
            ratio=statistics.median(times[name] / times[first] for times in rounds),
        )
        for name in functions
    }


def _seconds(function: Callable[[], object]) -> float:
    on_gpu = torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if on_gpu:
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    # Freed only now: giving a large result back to the system is not part of the function.
    del result
    return elapsed


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
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
