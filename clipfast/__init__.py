"""clipfast explains CLIP: which patches of an image and which words of a text make their score what it is."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipfast.api import Explainer, explain
    from clipfast.compat.accelerate import accelerate
    from clipfast.engine.ask import ask
    from clipfast.engine.reader import open_run
    from clipfast.engine.run import run
    from clipfast.errors import (
        BackendError,
        ClipfastError,
        ImageError,
        InputError,
        ModelError,
        OutputError,
        TextError,
    )
    from clipfast.models.load import load
    from clipfast.models.model import Model
    from clipfast.ops.dispatch import backend
    from clipfast.results import Attribution, Features, Words

__version__ = "0.1.0"

# Importing torch takes seconds, which `clipfast --help` should not: each name brings its module when it is first used.
_HOMES = {
    "api": ("Explainer", "explain"),
    "compat.accelerate": ("accelerate",),
    "engine.ask": ("ask",),
    "engine.reader": ("open_run",),
    "engine.run": ("run",),
    "errors": ("BackendError", "ClipfastError", "ImageError", "InputError", "ModelError", "OutputError", "TextError"),
    "models.load": ("load",),
    "models.model": ("Model",),
    "ops.dispatch": ("backend",),
    "results": ("Attribution", "Features", "Words"),
}
_MODULES = {name: f"clipfast.{module}" for module, names in _HOMES.items() for name in names}

__all__ = [
    "Attribution",
    "BackendError",
    "ClipfastError",
    "Explainer",
    "Features",
    "ImageError",
    "InputError",
    "Model",
    "ModelError",
    "OutputError",
    "TextError",
    "Words",
    "accelerate",
    "ask",
    "backend",
    "explain",
    "load",
    "open_run",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
