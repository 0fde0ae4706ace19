"""How far calls raise a process's memory, by the kernel's own count of resident pages (Linux).

Resident pages see what a hook on one allocator would not: workspaces of the matrix library, numpy, copies made in C++.
The process is fresh, each call has been made once before (weights are paged in, libraries have their workspaces), and
allocations are kept out of the heap (MALLOC_MMAP_THRESHOLD_), so that freed memory goes back to the kernel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""What such a process must be started with."""


def resident_peak(call: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that one call adds at its peak, its results included, and the results."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    results = call()
    return resident("VmHWM") - before, results


def resident(key: str) -> int:
    """Bytes of this process: VmRSS, what is resident now, or VmHWM, what was at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def peaks(model: str, pretrained: str | None, cases: Sequence[dict[str, Any]]) -> list[int] | None:
    """Bytes that each case adds at its peak, on the CPU in one fresh process; None where they cannot be had.

    cases: method (None for the bare encode), batch, prompts, precision and backend of each.
    """
    if sys.platform != "linux":
        return None
    asked = json.dumps({"model": model, "pretrained": pretrained, "cases": list(cases)})
    command = [sys.executable, "-m", "clipfast.bench.memory"]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, input=asked, capture_output=True, text=True)
    return None if done.returncode else json.loads(done.stdout.splitlines()[-1])


def _measure(asked: dict[str, Any]) -> list[int]:
    from clipfast.bench.cases import Setting
    from clipfast.models.load import load

    loaded = load(asked["model"], asked["pretrained"], device="cpu")
    found = []
    for case in asked["cases"]:
        setting = Setting.of(loaded, case["batch"], case["prompts"])
        if case["method"] is None:
            call = setting.encode(case["precision"])
        else:
            call = setting.explain(case["method"], case["prompts"], case["precision"], case["backend"])
        call()
        found.append(resident_peak(call)[0])
    return found


if __name__ == "__main__":
    print(json.dumps(_measure(json.load(sys.stdin))))
