"""Which versions made a result."""

from __future__ import annotations

import platform
from importlib import metadata


def versions(*more: str) -> dict[str, str]:
    """What figures may depend on: clipfast, torch and others that are installed, with `more` by their package names."""
    found = {}
    for name in ("clipfast", "torch", "numpy", "pillow", "open_clip_torch", *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"clipfast": "unknown", **found, "Python": platform.python_version(), "machine": platform.machine()}
