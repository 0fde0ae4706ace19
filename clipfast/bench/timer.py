"""The one timer every benchmark uses: functions take turns (A B A B ...), so that a busy machine slows all of them
alike.

A figure worth keeping is a ratio: of each round's times, one round at a time, and then the median over the rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

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
            seconds(function)
    rounds = [{name: seconds(function) for name, function in functions.items()} for _ in range(repeats)]
    first = next(iter(functions))
    return {
        name: Timing(
            seconds=tuple(times[name] for times in rounds),
            ratio=statistics.median(times[name] / times[first] for times in rounds),
        )
        for name in functions
    }


def seconds(function: Callable[[], object]) -> float:
    """The time of one call, with the work that it queues on a GPU."""
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
