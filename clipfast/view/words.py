"""Words coloured by what they do to the score: green for it, red against it, plain where they do nothing.

Where a method only says how much a word counts, and not which way, one colour stands for that.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from rich.text import Text

from clipfast.errors import InputError

# Vermilion and bluish green: a red and a green that differ in lightness and blue too, for eyes that confuse the two.
AGAINST = (213, 66, 34)
FOR = (0, 145, 105)
COUNTS = (86, 92, 200)
_LIGHTEST = 0.04


def strengths(values: Sequence[float]) -> list[float]:
    """Values as signed strengths -1..1 on one symmetric scale: the largest magnitude is 1, zero stays zero.

    Raises InputError for a value that is not finite.
    """
    if not all(math.isfinite(v) for v in values):
        raise InputError("a word's value is not finite: NaN or infinity cannot be coloured.")
    top = max((abs(v) for v in values), default=0.0)
    return [v / top if top else 0.0 for v in values]


def legend(signed: bool) -> str:
    """What the colours mean, in a few words."""
    return "green for the score, red against it" if signed else "the stronger the colour, the more a word counts"


def terminal(words: Sequence[tuple[str, float]], *, signed: bool = True) -> Text:
    """The words as one line of rich text, the background in steps from white to the full colour.

    words: (word, value) in reading order. signed: whether values say which way a word counts.

    Raises InputError for a value that is not finite.
    """
    line = Text()
    for (word, _), strength in zip(words, strengths([v for _, v in words]), strict=True):
        if line:
            line.append(" ")
        line.append(word, style=_style(strength, signed))
    return line


def _style(strength: float, signed: bool) -> str:
    if abs(strength) < _LIGHTEST:
        return ""
    colour = _colour(strength, signed)
    mixed = [round(255 + (c - 255) * abs(strength)) for c in colour]
    ink = "white" if abs(strength) > 0.6 else "black"
    return f"{ink} on #{mixed[0]:02x}{mixed[1]:02x}{mixed[2]:02x}"


def _colour(strength: float, signed: bool) -> tuple[int, int, int]:
    if not signed:
        return COUNTS
    return FOR if strength > 0 else AGAINST


def markup(words: Sequence[tuple[str, float]], *, signed: bool = True) -> str:
    """The words as HTML spans that need no style sheet, escaped; the value is each word's tooltip.

    words, signed: as for `terminal`.

    Raises InputError for a value that is not finite.
    """
    spans = []
    for (word, value), strength in zip(words, strengths([v for _, v in words]), strict=True):
        r, g, b = _colour(strength, signed)
        style = f"background:rgba({r},{g},{b},{abs(strength):.3f});border-radius:.25em;padding:.1em .3em"
        spans.append(f'<span style="{style}" title="{value:{"+" if signed else ""}.4g}">{html.escape(word)}</span>')
    return " ".join(spans)
