"""The compiled modules `clipfast._native` (CPU) and `clipfast._native_cuda`: loaded on first use, never required.

"Was never built" and "was built and does not load" are different problems with different remedies; `problem` keeps
them apart.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

from clipfast.errors import BackendError

# Raised together with CLIPFAST_ABI in CMakeLists.txt whenever a signature in csrc/bindings.cpp changes.
ABI = 2


def module(name: str) -> ModuleType:
    """The compiled module `name` ("_native" or "_native_cuda"); BackendError says why it is not to be had."""
    found, reason = _load(name)
    if found is None:
        raise BackendError(f"{reason}.")
    return found


def problem(name: str) -> str | None:
    """Why the compiled module `name` cannot be used, or None when it can."""
    return _load(name)[1]


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    qualified = f"clipfast.{name}"
    # Looked for first: importing an extension module that does not exist complains of a circular import.
    if importlib.util.find_spec(qualified) is None:
        needs = "a C++ compiler" if name == "_native" else "nvcc"
        remedy = f"install clipfast where there is {needs}, with CLIPFAST_BUILD=strict to see what fails"
        return None, f"{qualified} was not built: {remedy}"
    try:
        found = importlib.import_module(qualified)
    except ImportError as error:
        return None, f"{qualified} was built but does not load ({error}): reinstall clipfast"
    if getattr(found, "abi", None) != ABI:
        return None, f"{qualified} was built from other sources than these: reinstall clipfast"
    return found, None
