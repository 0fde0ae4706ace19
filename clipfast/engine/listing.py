"""Sources that are lists of files: a folder, a pattern, or names out of a text file or a table."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from clipfast.data.keys import numbered
from clipfast.data.places import MissingError, joined, read_bytes
from clipfast.data.tars import captions
from clipfast.engine.base import Failure, Item, Shard, Source
from clipfast.errors import ImageError

CAPTION = "caption"
"""The column of the text beside an image: photo.txt or photo.json beside photo.jpg, in a folder or in a tar."""


@dataclass(frozen=True)
class Wanted:
    """What a source is opened for.

    shard_size: images a shard. limit: the first so many images only. columns: what items carry beside the picture.
    image, key: the columns of a table that hold the picture and its key, where the user names them.
    """

    shard_size: int
    limit: int | None = None
    columns: tuple[str, ...] = ()
    image: str | None = None
    key: str | None = None

    def config(self) -> dict[str, Any]:
        """Whatever changes which image is called what: all but the limit, and what items carry."""
        return {"shard_size": self.shard_size, "image_column": self.image, "key_column": self.key}


@dataclass
class Listing:
    """Files in order. names: below the source's root, absolute, or addresses; "" where an entry names no file.

    keys: one a name, where they are not the names themselves. columns: one value a name each.
    """

    names: list[str]
    keys: list[str] | None = None
    columns: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Held:
    """A shard's part of a listing; its names are one string, a tenth of the objects that a million names would be."""

    names: str
    keys: str | None
    columns: dict[str, list[Any]]


class Listed(Source):
    """A source that lists its shards once, when they are asked for; and anew in each process that it is sent to."""

    _shards: list[Shard] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": None}

    def shards(self) -> Sequence[Shard]:
        if self._shards is None:
            self._shards = list(self._cut())
        return self._shards

    @abstractmethod
    def _cut(self) -> Iterator[Shard]:
        """The shards, in order."""


class Files(Listed):
    """Images that are files of their own. Their captions, where asked for, lie beside them: photo.txt or photo.json.

    root: what names are relative to. listing: lists the files, anew in each process that asks for the shards; listed:
    what it came to just now.
    """

    def __init__(
        self, kind: str, place: str, root: str, listing: Callable[[], Listing], wanted: Wanted, listed: Listing
    ):
        self._kind, self._place, self._root, self._wanted = kind, place, root, wanted
        self._listing = listing
        self._shards = list(self._cut_up(listed))

    def config(self) -> dict[str, Any]:
        return {"kind": self._kind, "place": self._place, **self._wanted.config()}

    def _cut(self) -> Iterator[Shard]:
        return self._cut_up(self._listing())

    def _cut_up(self, listing: Listing) -> Iterator[Shard]:
        names = _separable(listing.names)
        keys = unique_keys(names if listing.keys is None else _separable(listing.keys))
        count = len(names) if self._wanted.limit is None else min(self._wanted.limit, len(names))
        for number, start in enumerate(range(0, count, self._wanted.shard_size)):
            part = slice(start, min(start + self._wanted.shard_size, count))
            own = None if keys is names else "\0".join(keys[part])
            columns = {column: values[part] for column, values in listing.columns.items()}
            held = _Held("\0".join(names[part]), own, columns)
            yield Shard(shard_id(number, held.names, own or ""), number, held, part.stop - part.start)

    def items(self, shard: Shard) -> Iterator[Item | Failure]:
        held: _Held = shard.holds
        names = held.names.split("\0")
        keys = names if held.keys is None else held.keys.split("\0")
        for i, (key, name) in enumerate(zip(keys, names, strict=True)):
            if not name:
                yield Failure(key, f"{key} is a row that names no image, or lacks cells.")
            elif name.endswith("/") and self._kind == "folder":
                yield Failure(key, f"the folder {joined(self._root, name)} could not be listed.")
            else:
                columns: Mapping[str, Any] = {column: values[i] for column, values in held.columns.items()}
                if CAPTION in self._wanted.columns and CAPTION not in held.columns:
                    columns = Beside(self._root, name)
                yield Item(key, partial(read_bytes, self._root, name), columns)


class Beside(Mapping[str, Any]):
    """The caption in a file beside an image, read when it is asked for, by whoever decodes the image, too."""

    def __init__(self, root: str, name: str):
        self._root, self._name = root, name

    def __getitem__(self, column: str) -> list[str]:
        if column != CAPTION:
            raise KeyError(column)
        stem = self._name.rpartition(".")[0] if "." in self._name.rpartition("/")[2] else self._name
        for ending in ("txt", "json"):
            try:
                held = {ending: read_bytes(self._root, f"{stem}.{ending}")}
            except MissingError:
                continue
            try:
                return captions(held)
            except (ValueError, AttributeError) as error:
                raise ImageError(f"{joined(self._root, stem)}.json is damaged: {error}.") from error
        return []

    def __iter__(self) -> Iterator[str]:
        return iter((CAPTION,))

    def __len__(self) -> int:
        return 1


def _separable(names: list[str]) -> list[str]:
    """Names without the zero that parts them in a shard; no file is called so."""
    return [name.replace("\0", "\ufffd") for name in names] if "\0" in "".join(names) else names


def unique_keys(names: list[str]) -> list[str]:
    """Names as keys: in valid Unicode, equal ones numbered from ~2; the same list where they are so already."""
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        names = [name.encode(errors="surrogateescape").decode(errors="replace") for name in names]
    return names if len(set(names)) == len(names) else numbered(names)


def shard_id(number: int, *lists: str) -> str:
    """A shard's name: its number, and ten digits that stand for what it lists, wherever that lies."""
    digest = hashlib.sha256("\0\0".join(lists).encode(errors="surrogatepass"))
    return f"{number:06d}-{digest.hexdigest()[:10]}"
