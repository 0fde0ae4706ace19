"""Which characters of a user's text became which of a tokenizer's normal form of it.

Tokenizers lower-case, repair encodings, decode HTML entities, decompose, strip accents, and drop punctuation before
they cut a text, and say nothing of it. What they made is compared with what was written, as `diff` compares two files.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby

Span = tuple[int, int]
"""The characters [start, end) of a text."""

_ENTITY = re.compile(r"&(?:#[xX]?[0-9a-fA-F]+|[^\s<&#;]{1,32});?")
_WINDOW = 2048


def align(text: str, normal: Sequence[str]) -> list[Span | None]:
    """For each element of `normal` the characters of `text` that it was made of.

    normal: the normal form's characters, "" for something unknown (a token for all that is not in the vocabulary).

    Spans are in the order of `normal`. Elements made of one character share its span: "½" is three of them after NFKC.
    White space has None, and so has everything where `text` has nothing else. What is left of `text` between two spans
    was dropped.
    """
    units = list(_units(text))
    if not units:
        return [None] * len(normal)
    left = [(c, number) for number, (_, _, folded) in enumerate(units) for c in folded]
    right = [(c, number) for number, element in enumerate(normal) for c in (fold(element) or [element] * bool(element))]
    right = [(c, number) for c, number in right if not c.isspace()]
    found: list[tuple[int, int] | None] = [None] * len(normal)
    for i, j in _common([c for c, _ in left], [c for c, _ in right]):
        unit, element = left[i][1], right[j][1]
        known = found[element]
        found[element] = (unit if known is None else known[0], unit)
    _fill(found, normal, units)
    return [None if place is None else (units[place[0]][0], units[place[1]][1]) for place in found]


def joined(spans: Sequence[Span | None]) -> Span | None:
    """From the first of some spans to the last; None where all are."""
    known = [span for span in spans if span is not None]
    return (min(start for start, _ in known), max(end for _, end in known)) if known else None


@lru_cache(maxsize=1 << 16)
def fold(written: str) -> str:
    """A string without what normal forms differ in: case, compatibility forms, composition, and white space."""
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", written).casefold())
    return "".join(decomposed.split())


def _units(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, folded) of what cannot be taken apart: single characters, and HTML entities. No white space."""
    start = 0
    for entity in _ENTITY.finditer(text):
        written, meant = entity.group(), html.unescape(entity.group())
        if written == meant:
            continue
        # "&copyright" is the entity "&copy" and a word's rest.
        rest = 0
        while rest < len(meant) - 1 and written[-1 - rest] == meant[-1 - rest]:
            rest += 1
        end = entity.end() - rest
        yield from _characters(text, start, entity.start())
        if folded := fold(meant[: len(meant) - rest]):
            yield entity.start(), end, folded
        start = end
    yield from _characters(text, start, len(text))


def _characters(text: str, start: int, end: int) -> Iterator[tuple[int, int, str]]:
    return ((i, i + 1, fold(text[i])) for i in range(start, end) if not text[i].isspace())


def _fill(found: list[tuple[int, int] | None], normal: Sequence[str], units: list[tuple[int, int, str]]) -> None:
    """Elements that occur nowhere stand for the units between their neighbours', or share a neighbour's unit."""
    before = -1
    for missing, several in groupby(range(len(normal)), key=lambda i: found[i] is None):
        numbers = list(several)
        places = [found[i] for i in numbers]
        if not missing:
            before = max(before, *(place[1] for place in places if place is not None))
            continue
        runs = list(_runs(numbers, normal))
        if not runs:
            continue
        behind = found[numbers[-1] + 1] if numbers[-1] + 1 < len(found) else None
        after = len(units) if behind is None else behind[0]
        groups = list(_groups(range(before + 1, after), units))
        if not groups:
            follows = after < len(units) and (before < 0 or normal[numbers[0]].isspace())
            groups = [[after if follows else before]]
        if len(groups) != len(runs):
            groups = [[groups[0][0], groups[-1][-1]]] * len(runs)
        for run, group in zip(runs, groups, strict=True):
            for i in run:
                found[i] = (group[0], group[-1])


def _runs(numbers: list[int], normal: Sequence[str]) -> Iterator[list[int]]:
    """Elements without white space between them; what is unknown may be a word of its own."""
    run: list[int] = []
    for i in numbers:
        if run and (normal[i].isspace() or normal[i] == "" or normal[run[-1]] == ""):
            yield run
            run = []
        if not normal[i].isspace():
            run.append(i)
    if run:
        yield run


def _groups(gap: range, units: list[tuple[int, int, str]]) -> Iterator[list[int]]:
    """Units that follow each other without white space between them."""
    group: list[int] = []
    for i in gap:
        if group and units[group[-1]][1] < units[i][0]:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _common(left: list[str], right: list[str]) -> Iterator[tuple[int, int]]:
    """A longest common subsequence as pairs of indices, the first one where there are several; in windows, so that the
    cost grows with the length and not its square."""
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i] == right[j]:
            yield i, j
            i, j = i + 1, j + 1
            continue
        pairs = _longest(left[i : i + _WINDOW], right[j : j + _WINDOW])
        whole = i + _WINDOW >= len(left) and j + _WINDOW >= len(right)
        if not whole:
            pairs = [(a, b) for a, b in pairs if max(a, b) < _WINDOW // 2]
        yield from ((i + a, j + b) for a, b in pairs)
        if whole:
            return
        if pairs:
            i, j = i + pairs[-1][0] + 1, j + pairs[-1][1] + 1
        elif i + _WINDOW < len(left):
            i += _WINDOW // 2
        else:
            j += _WINDOW // 2


def _longest(left: list[str], right: list[str]) -> list[tuple[int, int]]:
    """One window's: Hyyrö's bit-parallel recurrence, whole rows of the table as integers, from the ends to the starts,
    so that the way back through it goes from the starts and takes the first of several."""
    n, m = len(left), len(right)
    at: dict[str, int] = {}
    for bit, character in enumerate(reversed(left)):
        at[character] = at.get(character, 0) | 1 << bit
    full = (1 << n) - 1
    rows = [full]
    for character in reversed(right):
        row = rows[-1]
        shared = row & at.get(character, 0)
        rows.append(((row + shared) | (row - shared)) & full)
    pairs, i, j = [], 0, 0
    while i < n and j < m:
        if left[i] == right[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif rows[m - j] >> (n - 1 - i) & 1:
            i += 1
        else:
            j += 1
    return pairs
