"""Where a run's images come from: one spec, whatever lies behind it, becomes a `Source`."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from clipfast.data.images import SUFFIXES, is_image
from clipfast.data.places import absolute, common, exists, is_folder, is_url, joined, matches, split, walk
from clipfast.engine.base import Source
from clipfast.engine.listing import CAPTION, Files, Listing, Wanted
from clipfast.engine.lists import check, chosen_columns, read_csv, read_lines, read_paths, text_lines, together
from clipfast.engine.saved import is_saved, open_saved
from clipfast.engine.table import Table
from clipfast.engine.tables import Tables
from clipfast.engine.tars import Tars
from clipfast.errors import InputError

_KINDS = {
    **dict.fromkeys(SUFFIXES, "image"),
    ".tar": "tar",
    **dict.fromkeys((".parquet", ".pq", ".arrow", ".feather"), "table"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".txt", ".list", ".lst"), "list"),
    **dict.fromkeys((".tgz", ".tbz2", ".txz"), "compressed"),
}
_COMPRESSED = (".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
# What a folder or a pattern is taken for that holds several kinds; tars come with tables of what is in them.
_ORDER = ("image", "tar", "table", "csv", "list", "compressed")
_KNOWN = (
    "a folder, a pattern such as 'photos/**/*.jpg', a list (.txt, .csv, .tsv, .parquet), tars such as 'shards/*.tar', "
    "or hf:FOLDER for a saved data set"
)


def open_source(
    spec: str | Path | Sequence[str],
    *,
    shard_size: int = 1000,
    limit: int | None = None,
    columns: Sequence[str] = (),
    image_column: str | None = None,
    key_column: str | None = None,
) -> Source:
    """A source of images, local or behind any address that fsspec opens (s3://bucket/photos).

    spec: one of

    - a folder, with the folders in it, and a pattern with wildcards or braces, or several files (keys: the paths below
      the folder, below the pattern's last folder without a wildcard, below what the files have in common);
    - a list with one path or address a line, "-" for stdin (keys: the lines; paths start at the list's folder);
    - a table of paths or addresses (.csv, .tsv, .parquet; keys: the same, or its key column);
    - a table of encoded images (.parquet, .arrow; keys: table/row, or its key column), and a data set that Hugging
      Face's `save_to_disk` wrote, also as "hf:FOLDER" (keys: file/row);
    - WebDataset tars (keys: tar/sample), each of them a shard.

    shard_size: images a shard, except for tars. limit: the first so many images only. A shard's id is its number and a
        digest of what it lists; those that a limit leaves whole keep theirs, and the one that it cuts has another.
    columns: what items carry beside the picture: columns of the table or data set, fields of a sample's .json, or
        "caption": for files, the text beside each (photo.txt or photo.json beside photo.jpg).
    image_column, key_column: of a table, where they are not plain from it. Equal keys are numbered from ~2.

    Raises InputError, in one sentence, for what cannot be listed, holds no pictures, or lacks a column.
    """
    for name, value in (("shard_size", shard_size), ("limit", limit)):
        if value is not None and value < 1:
            raise InputError(f"{name}={value} must be at least 1.")
    wanted = Wanted(shard_size, limit, tuple(columns), image_column, key_column)
    specs = [str(spec)] if isinstance(spec, str | Path) else [str(one) for one in spec]
    if not specs or "" in specs:
        raise InputError(f"no source of images was named: give {_KNOWN}.")
    source = _one(specs[0], wanted) if len(specs) == 1 else _several(specs, wanted)
    if not source.shards():
        raise InputError(f"{specs[0]} lists no image.")
    return source


def _one(spec: str, wanted: Wanted) -> Source:
    if spec == "-":
        return _listed("stdin", absolute("."), partial(Listing, text_lines(sys.stdin.buffer)), wanted)
    if spec.startswith("hf:") and not is_url(spec):
        return open_saved(absolute(spec.removeprefix("hf:")), wanted)
    place = absolute(spec)
    if ("{" in spec or glob.has_magic(spec)) and (is_url(spec) or not os.path.exists(place)):
        root, names = matches(place)
        return _named(place, root, names, partial(_matching, place), wanted)
    # Asking a remote store what a file is takes longer than to believe its name.
    if not (is_url(place) and _kind(place)) and is_folder(place):
        return open_saved(place, wanted) if is_saved(place) else _folder(place, wanted)
    if not exists(place):
        raise InputError(f"there is no {place}: name {_KNOWN}.")
    root, name = split(place)
    return _named(place, root, [name], partial(Listing, [name]), wanted)


def _several(specs: list[str], wanted: Wanted) -> Source:
    """Files named one by one, or several patterns, as a shell hands over a pattern without quotes."""
    places: list[str] = []
    for spec in specs:
        if "{" in spec or glob.has_magic(spec):
            root, names = matches(spec)
            places += [joined(root, name) for name in names]
        else:
            places.append(absolute(spec))
    folder = next((place for place in places if not _kind(place) and is_folder(place)), None)
    if folder is not None:
        raise InputError(f"{folder} is a folder among {len(places)} sources: name one folder, or files only.")
    root = common(places)
    names = sorted({place[len(root) :].lstrip("/") if root else place for place in places})
    return _named(f"{len(names)} files in {root}", root, names, partial(Listing, names), wanted)


def _folder(place: str, wanted: Wanted) -> Source:
    names = walk(place, lambda name: _kind(name) in ("image", "tar", "table"))
    if not names:
        raise InputError(
            f"no image was found in {place} and the folders in it: images are recognised by suffix "
            "(.jpg, .png, .webp, .tif, ...)."
        )
    return _named(place, place, names, partial(_walked, place), wanted, "folder")


def _named(
    place: str, root: str, names: list[str], listing: Callable[[], Listing], wanted: Wanted, called: str = "files"
) -> Source:
    """The source that files are, by their names below a root; `listing` lists them anew where they are images.

    Raises InputError where there are none of a known kind, or both pictures and tars.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_kind(name), []).append(name)
    kind = next((kind for kind in _ORDER if kind in kinds), "")
    unlisted = [name for name in names if name.endswith("/")] if called == "folder" else []
    if unlisted and kind != "image":
        raise InputError(f"{joined(root, unlisted[0])} cannot be listed.")
    found = kinds.get(kind, [])
    if kind == "image" and "tar" in kinds:
        raise InputError(
            f"{place} has {len(found):,} pictures and {len(kinds['tar']):,} tars: say which with a pattern, such as "
            f"'{root}/**/*{os.path.splitext(found[0])[1]}' or '{root}/**/*.tar'."
        )
    if kind == "compressed":
        raise InputError(f"{joined(root, found[0])} is compressed: unpack it to a plain .tar, which is read in place.")
    if kind == "tar":
        return Tars(place, root, found, wanted)
    if kind == "table":
        return _tables(place, root, found, wanted)
    if kind == "csv":
        rows = partial(_read, read_csv, root, found, wanted)
        return Files("list", place, root, rows, wanted, check(root, rows(), place))
    if kind == "list":
        lines = partial(_read, read_lines, root, found, wanted)
        return _listed(place, root, lines, wanted)
    # A single file is taken for what the user says it is, whatever its name.
    if not kind and not (len(names) == 1 and joined(root, names[0]) == place):
        raise InputError(_nothing(place, root, names))
    _only_captions(place, wanted)
    listed = sorted([*found, *unlisted]) if unlisted else found or names
    return Files(called, place, root, listing, wanted, Listing(listed))


def _nothing(place: str, root: str, names: list[str]) -> str:
    """The sentence about a pattern that gives nothing to explain."""
    if not names:
        return f"no file matches '{place}': name {_KNOWN}."
    some = joined(root, names[0])
    if is_folder(some):
        return (
            f"'{place}' matches folders, such as {some}: name the folder that holds them, or '{place.rstrip('/')}/*'."
        )
    return f"'{place}' matches {len(names):,} files, such as {some}, and none of them is a picture: name {_KNOWN}."


def _listed(place: str, root: str, listing: Callable[[], Listing], wanted: Wanted) -> Source:
    """A text list: of pictures, or of tars."""
    found = listing()
    if found.names and all(_kind(name) == "tar" for name in found.names):
        return Tars(place, root, found.names, wanted)
    _only_captions(place, wanted)
    return Files("list", place, root, listing, wanted, check(root, found, place))


def _tables(place: str, root: str, names: list[str], wanted: Wanted) -> Source:
    """Parquet and arrow tables: of encoded images, or of paths, as the first that can be read has them."""
    for name in names:
        try:
            with Table(joined(root, name)) as table:
                image, _, _ = chosen_columns(joined(root, name), table.columns(), table.pictures(), wanted)
                if image not in table.pictures():
                    rows = partial(_read, read_paths, root, names, wanted)
                    return Files("list", place, root, rows, wanted, check(root, rows(), place))
        except InputError:
            raise
        except Exception:
            # Damaged, which the source itself tells.
            continue
        break
    return Tables("table", place, root, names, wanted)


def _read(read: Callable[..., Listing], root: str, names: list[str], wanted: Wanted) -> Listing:
    return together(read(root, name, wanted) for name in names)


def _walked(place: str) -> Listing:
    return Listing(walk(place, is_image))


def _matching(pattern: str) -> Listing:
    return Listing([name for name in matches(pattern)[1] if _kind(name) == "image"])


def _only_captions(place: str, wanted: Wanted) -> None:
    column = next(
        (column for column in (*wanted.columns, wanted.image, wanted.key) if column not in (None, CAPTION)), None
    )
    if column is not None:
        raise InputError(
            f"{place} is no table, so it has no column {column!r}: give a .csv or .parquet with that column, or "
            "captions as files beside the images (photo.txt beside photo.jpg)."
        )


def _kind(name: str) -> str:
    """What a file is by its suffix: a value of `_KINDS`, or "" for none of them."""
    kind = _KINDS.get(name[name.rfind(".") :].lower(), "")
    return "compressed" if not kind and name.lower().endswith(_COMPRESSED) else kind
