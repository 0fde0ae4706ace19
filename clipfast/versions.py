"""Which versions made a result, and on what machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any


def versions(*more: str) -> dict[str, str]:
    """What figures may depend on: clipfast, torch and others that are installed, with `more` by their package names."""
    found = {}
    for name in ("clipfast", "torch", "numpy", "pillow", "open_clip_torch", *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"clipfast": "unknown", **found, "Python": platform.python_version(), "machine": platform.machine()}


def machine() -> dict[str, Any]:
    """What a speed needs beside it: processor, cores, threads, GPU, Python and torch."""
    import torch

    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
