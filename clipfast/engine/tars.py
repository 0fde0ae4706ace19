"""WebDataset tars as a source: each tar a shard, read once from its beginning to its end."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, BinaryIO

from clipfast.data.keys import Numbering, numbered
from clipfast.data.places import MAX_BYTES, is_url, joined, open_binary, sentence
from clipfast.data.tars import PICTURES, TarError, captions, members, sample_name
from clipfast.engine.base import Failure, Item, Shard
from clipfast.engine.listing import CAPTION, Listed, Wanted, shard_id
from clipfast.errors import InputError

# So many tars without a picture, and nobody meant them.
_PEEKED = 4

# What a sample is called, and its files by ending: their bytes, or how many where they were not read.
_Sample = tuple[str, dict[str, bytes | int]]


class Tars(Listed):
    """Samples of tar files; see `clipfast.data.tars`. root: what the tars' names are relative to.

    Keys are the tar's name and the sample's. Files that belong to no picture are passed over; a tar that is cut, or
    cannot be read, gives what is whole before that, and one Failure.

    Raises InputError where none of the first tars holds a picture, or the first sample lacks a column.
    """

    def __init__(self, place: str, root: str, names: Sequence[str], wanted: Wanted):
        self._place, self._root, self._names, self._wanted = place, root, list(names), wanted
        self._stems = numbered(re.sub(r"\.tar$", "", _clean(name)) for name in self._names)
        if wanted.image or wanted.key:
            raise InputError(f"{place} has no columns of images or keys: leave {wanted.image or wanted.key!r} out.")
        found = [next(self._read(name, {*wanted.columns, "json"}), None) for name in self._names[:_PEEKED]]
        first = next((one for one in found if isinstance(one, tuple)), None)
        if first is not None:
            self._check(*first)
        else:
            why = next((one.reason for one in found if isinstance(one, Failure)), None)
            why = why or f"{joined(root, self._names[0])} holds no pictures (.{', .'.join(PICTURES)})."
            raise InputError(why if len(found) == 1 else f"{why} The tars after it have none either.")

    def _check(self, name: str, held: dict[str, bytes | int]) -> None:
        """Raises InputError where the first sample lacks a column, or holds it under another name."""
        try:
            fields = json.loads(held.get("json") or "{}")  # type: ignore[arg-type]
        except (ValueError, TypeError):
            return
        there = [*(ending for ending in held if ending not in (*PICTURES, "json")), *fields]
        lacking = next((c for c in self._wanted.columns if c not in (*there, CAPTION)), None)
        if lacking is not None:
            raise InputError(
                f"{self._place} has no column {lacking!r}: its first sample, {name}, has {', '.join(there) or 'none'}."
            )

    def config(self) -> dict[str, Any]:
        return {"kind": "tars", "place": self._place}

    def _cut(self) -> Iterator[Shard]:
        left = self._wanted.limit
        for number, name in enumerate(self._names):
            room = images = None
            if left is not None:
                # One more than is wanted says whether the limit cuts this tar.
                found = sum(not isinstance(one, Failure) for one in islice(self._read(name), left + 1))
                images = min(found, left)
                room = left if found > left else None
                left -= images
            place = joined(self._root, name)
            size = os.path.getsize(place) if not is_url(place) and os.path.exists(place) else None
            cut = () if room is None else (f"the first {room}",)
            yield Shard(shard_id(number, name, *cut), number, (number, room), images, size)
            if left == 0:
                return

    def items(self, shard: Shard) -> Iterator[Item | Failure]:
        number, room = shard.holds
        endings = {*PICTURES, *self._wanted.columns}
        if self._wanted.columns:
            endings |= {"json"} | ({"txt"} if CAPTION in self._wanted.columns else set())
        unique = Numbering()
        for sample in islice(self._read(self._names[number], endings), room):
            if isinstance(sample, Failure):
                yield sample
            else:
                yield self._item(unique(f"{self._stems[number]}/{_clean(sample[0])}"), sample[1])

    def _item(self, key: str, held: dict[str, bytes | int]) -> Item | Failure:
        picture = next(held[ending] for ending in PICTURES if ending in held)
        if isinstance(picture, int):
            return Failure(key, f"{key} has {picture:,} bytes: no picture is as large.")
        if not picture:
            return Failure(key, f"{key} is empty: 0 bytes.")
        read = {ending: data for ending, data in held.items() if isinstance(data, bytes)}
        try:
            columns = {column: _column(column, read) for column in self._wanted.columns}
        except (ValueError, AttributeError) as error:
            return Failure(key, f"the .json of {key} is damaged: {error}.")
        return Item(key, partial(bytes, picture), columns)

    def _read(self, name: str, endings: frozenset[str] | set[str] = frozenset()) -> Iterator[_Sample | Failure]:
        """The samples of a tar that have a picture, in order, with the files of these endings; then what is wrong."""
        place = joined(self._root, name)
        count = 0
        try:
            with open_binary(place) as stream:
                for sample in _grouped(stream, endings):
                    if any(ending in PICTURES for ending in sample[1]):
                        count += 1
                        yield sample
        except TarError as error:
            used = f": the {count} samples before that are used" if count else ""
            yield Failure(_clean(name), f"{place} is no whole, uncompressed tar, {error}{used}.")
        except FileNotFoundError:
            yield Failure(_clean(name), f"{place} does not exist.")
        except InputError:
            raise
        except Exception as error:
            # Each of fsspec's file systems fails in a way of its own.
            yield Failure(_clean(name), f"{place} cannot be read: {sentence(error)}.")


def _grouped(stream: BinaryIO, endings: frozenset[str] | set[str]) -> Iterator[_Sample]:
    """Neighbouring files of one name; an ending that comes a second time begins a sample of its own.

    Raises TarError as `members` does, after the last sample's files that are whole.
    """
    current, held = "", dict[str, bytes | int]()
    damage: TarError | None = None
    archive = members(stream, ended=True)
    while damage is None:
        try:
            member = next(archive, None)
        except TarError as error:
            damage, member = error, None
        if member is None:
            break
        name, ending = sample_name(member.name)
        if not name.rpartition("/")[2]:
            continue
        if name != current or ending in held:
            if held:
                yield current, held
            current, held = name, {}
        held[ending] = member.size
        if ending in endings and member.size <= MAX_BYTES:
            stream.seek(member.offset_data)
            held[ending] = stream.read(member.size)
    if held:
        yield current, held
    if damage is not None:
        raise damage


def _column(column: str, held: dict[str, bytes]) -> Any:
    """A column of a sample: its captions, a file's text by its ending, or a field of its .json."""
    if column == CAPTION:
        return captions(held)
    if column in held and column not in PICTURES:
        return held[column].decode(errors="replace").strip()
    return json.loads(held["json"]).get(column) if "json" in held else None


def _clean(name: str) -> str:
    """A name out of an archive as part of a key: a relative path that stays where it is, in printable Unicode."""
    name = name.encode(errors="replace").decode()
    parts = [part for part in re.sub(r"[\x00-\x1f\x7f\\]", "_", name).split("/") if part not in ("", ".", "..")]
    return "/".join(parts) or "_"
