"""Lists of files: lines of a text, and the rows of tables that name them."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, BinaryIO

from clipfast.data.places import is_url, joined, open_binary, reach, sentence
from clipfast.engine.listing import CAPTION, Listing, Wanted
from clipfast.engine.table import Table
from clipfast.errors import InputError

_IMAGES = ("image", "img", "image_path", "path", "filepath", "file_path", "file_name", "filename", "file", "url")
_KEYS = ("key", "__key__")
# Rows that are read, and files that are looked for, at once.
_READ, _LOOKED_FOR = 4096, 20


def text_lines(stream: BinaryIO) -> list[str]:
    """The lines of a list that are not blank; names need not be valid Unicode."""
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape")
    lines = [stripped for line in text if (stripped := line.strip())]
    # Whoever opened it, such as the system its stdin, closes it.
    text.detach()
    return lines


def read_lines(root: str, name: str, wanted: Wanted) -> Listing:
    """A text file with one path or address a line. Raises InputError where it cannot be read."""
    called = joined(root, name)
    with _reading(called), open_binary(called) as stream:
        return Listing(_below(name, text_lines(stream)))


def read_csv(root: str, name: str, wanted: Wanted) -> Listing:
    """The rows of a .csv or .tsv file, whose first line names the columns; tabs, semicolons or commas part them.

    Raises InputError for a file that cannot be read, or lacks a column.
    """
    called = joined(root, name)
    names: list[str] = []
    keys: list[str] = []
    with (
        _reading(called),
        open_binary(called) as stream,
        io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="") as lines,
    ):
        first = lines.readline()
        rows = csv.reader(chain((first,), lines), delimiter=max(",\t;", key=first.count))
        try:
            header = [cell.strip() for cell in next(rows)]
            if not any(header):
                raise InputError(f"{called} is empty, or begins with a blank line: its first line names the columns.")
            image, key, columns = chosen_columns(called, header, [], wanted)
            held: dict[str, list[Any]] = {column: [] for column in columns}
            places = {column: header.index(column) for column in (image, *([key] if key else []), *columns)}
            for row in filter(None, rows):
                cells = [cell.strip() for cell in row] if len(row) == len(header) else [""] * len(header)
                names.append(cells[places[image]])
                keys.append(cells[places[key or image]] or row_key(name, len(keys)))
                for column, values in held.items():
                    values.append(cells[places[column]])
        except csv.Error as error:
            raise InputError(f"{called} is no table of commas or tabs: {error}, in line {rows.line_num}.") from error
    return Listing(_below(name, names), None if keys == names and "/" not in name else keys, held)


def read_paths(root: str, name: str, wanted: Wanted) -> Listing:
    """The rows of a parquet or arrow table whose image column holds paths or addresses.

    Raises InputError for a file that cannot be read, or lacks a column.
    """
    called = joined(root, name)
    names: list[str] = []
    keys: list[str] = []
    with _reading(called), Table(called) as table:
        image, key, columns = chosen_columns(called, table.columns(), table.pictures(), wanted)
        held: dict[str, list[Any]] = {column: [] for column in columns}
        for batch in table.batches([image, *([key] if key else []), *columns], 0, None, _READ):
            found = [str(value or "").strip() for value in table.values(batch, image)]
            own = table.values(batch, key) if key else found
            for one in own:
                keys.append(row_key(name, len(keys)) if one in (None, "") else str(one))
            names += found
            for column, values in held.items():
                values += table.values(batch, column)
    return Listing(_below(name, names), None if keys == names and "/" not in name else keys, held)


def chosen_columns(
    called: str, columns: Sequence[str], pictures: Sequence[str], wanted: Wanted
) -> tuple[str, str | None, list[str]]:
    """The columns of a table that hold the picture and its key, if one does, and those that items carry.

    pictures: those that hold encoded images by their types. Raises InputError where one is missing, or none is plain.
    """
    for column in (wanted.image, wanted.key, *wanted.columns):
        # Files may have their captions beside them.
        if column is not None and column not in columns and (column != CAPTION or pictures):
            raise InputError(f"{called} has no column {column!r}; it has {_some(columns)}.")
    named = {column.lower(): column for column in reversed(columns)}
    images = [named[name] for name in _IMAGES if name in named]
    first = [wanted.image] if wanted.image else [*(c for c in images if c in pictures), *pictures, *images]
    if not first:
        raise InputError(
            f"{called} has no column that is plainly the image's path, address or bytes: name it (image_column); "
            f"it has {_some(columns)}."
        )
    key = wanted.key or next((name for name in _KEYS if name in columns and name != first[0]), None)
    return first[0], key, [column for column in wanted.columns if column in columns]


def row_key(table: str, row: int) -> str:
    """What an image is called whose table gives it no name."""
    return f"{table.rpartition('.')[0] or table}/{row:06d}"


def together(listings: Iterable[Listing]) -> Listing:
    """Several listings as one, in order."""
    found = list(listings)
    if len(found) == 1:
        return found[0]
    keyed = any(one.keys is not None for one in found)
    return Listing(
        [name for one in found for name in one.names],
        [key for one in found for key in (one.names if one.keys is None else one.keys)] if keyed else None,
        {column: [value for one in found for value in one.columns[column]] for column in found[0].columns},
    )


def check(root: str, listing: Listing, called: str) -> Listing:
    """The listing, if its files can be there.

    Raises InputError where none of the first files is, and for an address that fsspec cannot open.
    """
    addresses = {name.partition("://")[0]: name for name in listing.names if "://" in name}
    for address in addresses.values():
        reach(address)
    some = [joined(root, name) for name in listing.names[:_LOOKED_FOR] if name]
    if some and not any(is_url(name) or os.path.exists(name) for name in some):
        raise InputError(
            f"{called} names files that are not there, the first being {some[0]}: relative paths start at its folder."
        )
    return listing


@contextmanager
def _reading(called: str) -> Iterator[None]:
    """One sentence for whatever goes wrong while a list is read. Raises InputError."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{called} does not exist.") from None
    except Exception as error:
        # pyarrow and each of fsspec's file systems fail in ways of their own.
        raise InputError(f"{called} cannot be read: {sentence(error)}.") from error


def _below(table: str, names: list[str]) -> list[str]:
    """Names relative to a table's folder as ones relative to the root that the table's own name is relative to."""
    folder = table.rpartition("/")[0]
    if not folder:
        return names
    return [name if not name or name.startswith("/") or is_url(name) else f"{folder}/{name}" for name in names]


def _some(columns: Sequence[str]) -> str:
    return ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "")
