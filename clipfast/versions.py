"""Which versions made a result."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata


def versions(*more: str) -> dict[str, str]:
    """What figures may depend on: clipfast, torch and others that are installed, with `more` by their package names."""
    found = {name: _version(name) for name in ("clipfast", "torch", "numpy", "pillow", "open_clip_torch", *more)}
    known = {name: version for name, version in found.items() if version is not None}
    return {"clipfast": "unknown", **known, "Python": platform.python_version(), "machine": platform.machine()}


@cache
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
