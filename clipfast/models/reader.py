"""What a tokenizer makes of a text: the tokens, the words, and what was cut off, in the user's own characters."""

from __future__ import annotations

import inspect
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from threading import RLock
from types import FunctionType
from typing import Any, NamedTuple

from clipfast.errors import TextError
from clipfast.models.align import Span, align, joined
from clipfast.models.words import Word, group

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_END = "</w>"
_SPACE = "▁"
# A byte that UTF-8 never has stands for what the tokenizer does not know.
_UNKNOWN = b"\xff"
# transformers' fast tokenizers hold padding and truncation themselves, set anew by each call.
_LOCK = RLock()


class Pieces(NamedTuple):
    """Token ids, and for each the characters of the text that it stands for, None where it stands for none."""

    ids: list[int]
    spans: list[Span | None]


class Cut(NamedTuple):
    """What a context too short did to a text: `kept` of its `tokens` were, and `lost` is the text of the others."""

    tokens: int
    kept: int
    lost: str


class TokenReader:
    """Reads what a tokenizer makes of texts.

    tokenizer: open_clip's and OpenAI's SimpleTokenizer or their `tokenize`, open_clip's HFTokenizer and
        SigLipTokenizer, a transformers tokenizer or processor, fast or slow; or any callable from texts to ids (B, T)
        with one of `decoder` (a mapping from ids to pieces), `convert_ids_to_tokens`, `id_to_token`, and better an
        `encode` from a text to its ids without special ones.
    """

    def __init__(self, tokenizer: Any):
        # A processor reads images too.
        self._tokenizer = tokenizer.tokenizer if hasattr(tokenizer, "image_processor") else tokenizer
        layers = list(_layers(self._tokenizer))
        self._transformers: Any = next((each for each in layers if hasattr(each, "convert_ids_to_tokens")), None)
        named = [each for each in layers if hasattr(each, "decoder") or hasattr(each, "id_to_token")]
        self._inner: Any = next(iter(named), None) if self._transformers is None else self._transformers
        self._clean = _cleaning(tokenizer)

    def ids(self, texts: Sequence[str], context: int) -> Any:
        """What the tokenizer gives for texts; of transformers' own, ids padded and cut to `context`.

        Raises TextError for a text that the tokenizer cannot read, such as one with a lone surrogate.
        """
        call = self._tokenizer
        if call is self._transformers:
            call = partial(call, padding="max_length", truncation=True, max_length=context, return_tensors="pt")
        elif "truncate" in _parameters(call):
            # OpenAI's raises for texts that are too long unless told to cut them, as all others do.
            call = partial(call, truncate=True)
        try:
            if self._tokenizer is self._transformers:
                # It says only that the type is wrong.
                "".join(texts).encode()
            with self._alone():
                found = call(list(texts))
        except UnicodeError as error:
            raise TextError(f"a text cannot be encoded: {error}.") from error
        return found["input_ids"] if self._tokenizer is self._transformers else found

    def words(self, text: str, row: Sequence[int], last: int | None = None) -> list[Word]:
        """The words of a text whose ids are `row` (T,), in reading order; they do not overlap.

        last: only from the tokens before this position. Of a text that was cut, the words that are left, the last one
        as far as its tokens are.

        Raises TextError for a tokenizer that does not say which pieces its ids stand for.
        """
        first, pieces = self._read(text, row)
        special = self._special()
        tokens = enumerate(zip(*pieces, strict=True), start=first)
        known = [(position, span) for position, (token, span) in tokens if token not in special]
        return group(text, [token for token in known if last is None or token[0] < last])

    def cut(self, text: str, row: Sequence[int]) -> Cut | None:
        """What was lost of a text whose ids are `row`; None for nothing, or if the tokenizer does not say."""
        padding = getattr(self._inner, "pad_token_id", None) or 0
        if [padding] * 2 in (list(row[-2:]), list(row[:2])):
            return None
        pieces = self._pieces(text)
        if pieces is None:
            return None
        _, begin, count = _locate(row, pieces.ids)
        if count == len(pieces.ids) or not self._framed(row, pieces.ids):
            return None
        lost = joined(pieces.spans[:begin] + pieces.spans[begin + count :])
        if lost is None:
            return None
        return Cut(len(pieces.ids), count, (text[: lost[1]] if begin else text[lost[0] :]).strip())

    def spell(self, ids: Sequence[int]) -> str:
        """The text of some token ids, as the tokenizer has it. Raises TextError as `words` does."""
        known = [(token, self._bytes(token)) for token in map(int, ids)]
        written = (self._name(token).encode() if piece == _UNKNOWN else piece for token, piece in known)
        return b"".join(written).decode(errors="replace").strip()

    def _alone(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._transformers is None else _LOCK

    def _read(self, text: str, row: Sequence[int]) -> tuple[int, Pieces]:
        """Which of the row's tokens are the text's: the first one's position, and all of them."""
        pieces = self._pieces(text)
        if pieces is not None:
            first, begin, count = _locate(row, pieces.ids)
            if count == len(pieces.ids) or (count and self._framed(row, pieces.ids)):
                some = slice(begin, begin + count)
                return first, Pieces(pieces.ids[some], pieces.spans[some])
        first, last = self._between(row)
        ids = list(row[first:last])
        return first, Pieces(ids, self._spans(text, ids))

    def _pieces(self, text: str) -> Pieces | None:
        """The tokens of the whole text without special ones; None where the tokenizer cannot be asked for them."""
        if self._transformers is None:
            encode = getattr(self._inner, "encode", None)
            ids = None if encode is None else encode(text)
            if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
                return None
            return Pieces(ids, self._spans(text, ids))
        clean = self._clean(text)
        fast = bool(getattr(self._transformers, "is_fast", False))
        with self._alone():
            found = self._transformers(clean, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        ids = [int(token) for token in found["input_ids"]]
        if not fast:
            return Pieces(ids, self._spans(text, ids))
        spans: list[Span | None] = [(start, end) if start < end else None for start, end in found["offset_mapping"]]
        if clean != text:
            origins = align(text, clean)
            spans = [None if span is None else joined(origins[slice(*span)]) for span in spans]
        return Pieces(ids, spans)

    def _spans(self, text: str, ids: Sequence[int]) -> list[Span | None]:
        """Where in the text is what the tokens spell. A character whose bytes are several tokens stands for each."""
        written = [self._bytes(token) for token in ids]
        normal, starts = _decoded(b"".join(written))
        origins = align(text, normal)
        spans, low = [], 0
        for piece in written:
            high = low + len(piece)
            spans.append(joined(origins[bisect_right(starts, low) - 1 : bisect_left(starts, high)]) if piece else None)
            low = high
        return spans

    def _bytes(self, token: int) -> bytes:
        """What a token writes, in UTF-8."""
        if token == getattr(self._inner, "unk_token_id", None):
            return _UNKNOWN
        name = self._name(token)
        ending = b" " if name.endswith(_END) else b""
        name = name.removesuffix(_END)
        letters = getattr(self._inner, "byte_decoder", None)
        if letters is not None and all(letter in letters for letter in name):
            return bytes(letters[letter] for letter in name) + ending
        if byte := _BYTE.fullmatch(name):
            return bytes([int(byte[1], 16)])
        if len(name) > 2 and self._transformers is not None:
            name = name.removeprefix("##")
        return name.replace(_SPACE, " ").encode(errors="replace") + ending

    def _name(self, token: int) -> str:
        for name in ("convert_ids_to_tokens", "id_to_token"):
            if hasattr(self._inner, name):
                return str(getattr(self._inner, name)(token))
        decoder = getattr(self._inner, "decoder", None)
        if not isinstance(decoder, Mapping):
            raise TextError(
                "words cannot be told apart: the tokenizer has no `decoder` from ids to pieces, as open_clip's has, "
                "and is not one of transformers'."
            )
        return str(decoder.get(token, ""))

    def _special(self) -> set[int]:
        """The special tokens that the tokenizer names; what stands for unknown words is none."""
        found = set(getattr(self._inner, "all_special_ids", None) or ())
        found |= {getattr(self._inner, name, None) for name in ("sot_token_id", "eot_token_id")}
        return found - {None, getattr(self._inner, "unk_token_id", None)}

    def _frame(self, length: int) -> list[int]:
        """The row of the text without words: what is around every text's words."""
        try:
            return [int(token) for token in self.ids([""], length)[0]]
        except (TextError, ValueError, RuntimeError, IndexError, TypeError):
            return []

    def _framed(self, row: Sequence[int], ids: list[int]) -> bool:
        """Whether the row is a part of `ids` with special tokens around it."""
        first, _, count = _locate(row, ids)
        frame = self._special() | set(self._frame(len(row)))
        return all(token in frame for token in (*row[:first], *row[first + count :]))

    def _between(self, row: Sequence[int]) -> Span:
        """Where in a row [first, last) is what the row of the text without words has not."""
        frame = self._frame(len(row))
        first = 0
        while first < min(len(frame), len(row)) and row[first] == frame[first]:
            first += 1
        special = self._special() | set(frame)
        last = tail = len(row)
        while tail > first and row[tail - 1] in special:
            tail -= 1
            # Padding may be a word's id too, as "!" in CLIP's: the words end where the first of the frame's rest is.
            if first < len(frame) and row[tail] == frame[first]:
                last = tail
        return first, last


def _layers(tokenizer: Any) -> Iterator[Any]:
    """A tokenizer and what it wraps, outside first."""
    yield tokenizer
    if isinstance(tokenizer, partial):
        yield from _layers(tokenizer.func)
    elif isinstance(tokenizer, FunctionType) and "_tokenizer" in tokenizer.__globals__:
        # The functions `tokenize` of open_clip and of OpenAI's package.
        yield tokenizer.__globals__["_tokenizer"]
    elif getattr(tokenizer, "tokenizer", None) is not None:
        yield from _layers(tokenizer.tokenizer)


def _cleaning(tokenizer: Any) -> Callable[[str], str]:
    """What open_clip's wrappers do to a text before transformers' tokenizer sees it."""
    if type(tokenizer).__name__ == "SigLipTokenizer":
        from open_clip.tokenizer import basic_clean, canonicalize_text

        return lambda text: str(canonicalize_text(basic_clean(text)))
    return getattr(tokenizer, "clean_fn", str)


def _parameters(call: Any) -> Mapping[str, Any]:
    try:
        return inspect.signature(call).parameters
    except (TypeError, ValueError):
        return {}


def _locate(row: Sequence[int], ids: list[int]) -> tuple[int, int, int]:
    """The longest part of `ids`, from its start or else to its end, in a row: (its first position, where it begins in
    `ids`, its length)."""
    best = (0, 0, 0)
    for first in range(len(row)):
        count = 0
        while count < min(len(ids), len(row) - first) and row[first + count] == ids[count]:
            count += 1
        if count > best[2]:
            best = (first, 0, count)
    if best[2] == len(ids):
        return best
    for last in range(len(row), 0, -1):
        count = 0
        while count < min(len(ids), last) and row[last - 1 - count] == ids[-1 - count]:
            count += 1
        if count > best[2]:
            best = (last - count, len(ids) - count, count)
    return best


def _decoded(written: bytes) -> tuple[list[str], list[int]]:
    """Characters, "" for what is none, and the byte that each starts at."""
    characters, starts, at = [], [], 0
    for character in written.decode(errors="surrogateescape"):
        whole = not "\udc80" <= character <= "\udcff"
        characters.append(character if whole else "")
        starts.append(at)
        at += len(character.encode()) if whole else 1
    return characters, starts
