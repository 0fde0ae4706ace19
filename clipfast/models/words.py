"""The words of a text, from its tokens and the characters that they stand for.

A word is what Unicode's default word boundaries (UAX #29) leave whole in the text, so that every tokenizer finds the
same words: "isn't", "3.5", "," and "👍🏽" are one word each. An underscore separates words. Two things join words:
a token that reaches over a boundary, and a user-perceived character (grapheme cluster). In scripts without spaces
(Chinese, Japanese, Thai) nearly every character is a word to Unicode, so that the words there are the tokenizer's own
pieces, of whole characters even where it cuts bytes. What a tokenizer drops (SigLIP's drops punctuation) is in no word,
and neither are special tokens: start, end, padding, separators, language codes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import regex

from clipfast.models.align import Span

_CLUSTER = regex.compile(r"\X")
_BOUNDARY = regex.compile(r"\b|(?<=_)|(?=_)|(?<=\s)(?=\S)|(?<=\S)(?=\s)", regex.V1 | regex.WORD)


class Word(NamedTuple):
    """text: the user's characters [start, end). positions: of its tokens in the row of ids, ascending."""

    text: str
    positions: list[int]
    start: int
    end: int


def group(text: str, tokens: Sequence[tuple[int, Span | None]]) -> list[Word]:
    """The words of a text, in reading order, from its tokens' positions and the characters that each stands for.

    A token for no character, such as SentencePiece's mark of a word's start, goes with the token behind it.
    """
    clusters = [0, *(cluster.end() for cluster in _CLUSTER.finditer(text))]
    edges = sorted({0, len(text)} | ({edge.start() for edge in _BOUNDARY.finditer(text)} & set(clusters)))
    trimmed = [(position, None if span is None else _trimmed(text, span)) for position, span in tokens]
    crossed = {
        edge
        for _, span in trimmed
        if span is not None
        for edge in edges[bisect_right(edges, span[0]) : bisect_left(edges, span[1])]
    }
    edges = [edge for edge in edges if edge not in crossed]
    found: dict[int, tuple[list[int], int, int]] = {}
    waiting: list[int] = []
    for position, span in trimmed:
        waiting.append(position)
        if span is None:
            continue
        word = bisect_right(edges, span[0])
        positions, start, end = found.get(word, ([], *span))
        found[word] = ([*positions, *waiting], min(start, span[0]), max(end, span[1]))
        waiting = []
    words = []
    for _, (positions, start, end) in sorted(found.items()):
        start = clusters[bisect_right(clusters, start) - 1]
        end = clusters[bisect_left(clusters, end)]
        start, end = _trimmed(text, (start, end)) or (start, end)
        words.append(Word(text[start:end], positions, start, end))
    return words


def _trimmed(text: str, span: Span) -> Span | None:
    """A span without white space at its ends; None for nothing else."""
    start, end = span
    written = text[start:end]
    start, end = end - len(written.lstrip()), start + len(written.rstrip())
    return (start, end) if start < end else None
