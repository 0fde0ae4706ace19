"""Every exception clipfast raises on bad input: one sentence that says what was wrong and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ClipfastError(Exception):
    """Base of all of clipfast's own exceptions."""


class InputError(ClipfastError, ValueError):
    """An argument that cannot be used: wrong name, shape, dtype or value."""


class ImageError(InputError):
    """An image that cannot be read or explained; `source` names it."""

    def __init__(self, message: str, source: str | None = None):
        super().__init__(message)
        self.source = source


class TextError(InputError):
    """A text that cannot be encoded: empty, or made of words the tokenizer does not know."""


class ModelError(ClipfastError):
    """A model that cannot be loaded, or whose structure clipfast does not know."""


class OutputError(ClipfastError):
    """Results that cannot be written; `full`: because no room is left, so that stopping and going on later may help."""

    def __init__(self, message: str, full: bool = False):
        super().__init__(message)
        self.full = full


class BackendError(ClipfastError, RuntimeError):
    """A backend the caller named cannot run the op; the message lists every reason."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """The end of an error sentence about an unknown name: the nearest known ones, or all when few or nothing is near.

    >>> nearest("grad_eclp", ["grad_eclip", "grad_cam", "rise"])
    "did you mean 'grad_eclip'?"
    """
    known = list(choices)
    spelled = {choice.lower(): choice for choice in known}
    close = difflib.get_close_matches(name.lower(), spelled, n=3, cutoff=0.6)
    if close:
        # Where one is nearly what was typed, the others would only distract.
        alike = {c: difflib.SequenceMatcher(None, name.lower(), c).ratio() for c in close}
        close = [c for c in close if alike[c] > alike[close[0]] - 0.1]
        return f"did you mean {' or '.join(repr(spelled[c]) for c in close)}?"
    if len(known) <= 30:
        return f"known: {', '.join(known)}."
    return f"{len(known)} names are known, none like it."
