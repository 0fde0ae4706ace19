"""The parquet files of a run: which columns they have, and tables of explained batches.

    shards/     key, prompt, text (where images have texts of their own), score, map (and its scale, offset),
                grid_h, grid_w, and the geometry: a row for each image and prompt
    features/   key, grid_h, grid_w, the geometry, layers, patches, weights, embedding and the values' parts: a row for
                each image

An image's rows follow each other, in one row group.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from clipfast.data.arrow import pyarrow
from clipfast.data.geometry import Geometry
from clipfast.engine.base import Explained
from clipfast.engine.storage import Codec, Shape
from clipfast.view.files import sync

ABOUT = b"clipfast"
FORMAT = 1
GEOMETRY = {
    "height": "int32", "width": "int32", "left": "double", "top": "double", "right": "double", "bottom": "double",
    "input_h": "int32", "input_w": "int32", "covered_h": "int32", "covered_w": "int32",
}  # fmt: skip
"""Columns of an image's `Geometry`, with their types."""

_REPEATED = frozenset(("key", "prompt", "text", "grid_h", "grid_w", "layers", "patches", *GEOMETRY))
# A row group is what one look into a file reads and decompresses: about 1,000 maps or less than this many bytes.
_ROWS = 1000
MAP_GROUP, FEATURE_GROUP = 16_000_000, 4_000_000


class RowFile:
    """A parquet file that grows by tables and shows only once it is `publish`ed.

    place: where it will be. group: bytes of values in a row group at most, where that is one image or more. Row groups
    end where an image ends and depend on the rows alone, not on the tables they came in.
    """

    def __init__(self, place: Path, group: int):
        self.place = place
        self.rows = 0
        self.published = False
        self._part = place.with_name(f".{place.name[:100]}.{secrets.token_hex(4)}.part")
        self._group_bytes = group
        self._cost = self._group = 0
        self._pending: list[Any] = []
        self._writer: Any = None
        self._schema: Any = None

    def add(self, table: Any, counts: np.ndarray, nbytes: int) -> None:
        """Add a table of b images with `counts` (b,) rows each, `nbytes` of values in each row."""
        if self._schema is None:
            self._schema = table.schema
        cost = counts * max(nbytes, self._group_bytes // _ROWS)
        begins = self._cost + np.cumsum(cost) - cost
        groups = begins // self._group_bytes
        firsts = np.cumsum(counts) - counts
        done = 0
        for first in firsts[np.diff(groups, prepend=self._group) > 0].tolist():
            self._pending.append(table.slice(done, first - done))
            self._flush()
            done = first
        self._pending.append(table.slice(done))
        self.rows += len(table)
        if len(counts):
            self._cost, self._group = int(begins[-1] + cost[-1]), int(groups[-1])

    def close(self) -> None:
        """Write what is left, and the footer."""
        self._flush()
        if self._writer is not None:
            self._writer.close()

    def publish(self) -> int:
        """Have the closed file synced and in its place; returns its size in bytes."""
        sync(self._part)
        size = self._part.stat().st_size
        self._part.replace(self.place)
        self.published = True
        sync(self.place.parent)
        return size

    def discard(self) -> None:
        """Leave nothing, published or not."""
        self._pending = []
        if self._writer is not None and self._writer.is_open:
            with suppress(OSError):
                self._writer.close()
        for path in (self._part, *((self.place,) if self.published else ())):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _flush(self) -> None:
        arrow, parquet = pyarrow()
        table = arrow.concat_tables(self._pending) if self._pending else None
        self._pending = []
        if table is None or not len(table):
            return
        if self._writer is None:
            self.place.parent.mkdir(parents=True, exist_ok=True)
            self._writer = parquet.ParquetWriter(
                self._part,
                self._schema,
                compression="zstd",
                use_dictionary=[name for name in table.column_names if name in _REPEATED],
                write_statistics=["key"],
            )
        self._writer.write_table(table, row_group_size=len(table))


def map_table(batch: Explained, codec: Codec, grid: Shape | None) -> tuple[Any, np.ndarray]:
    """A batch's maps as a table, and how many rows each image has.

    grid: (h, w) of all maps of the run, which then have one width on the disk, or None.
    """
    arrow, _ = pyarrow()
    asked = batch.prompts >= 0
    counts = asked.sum(1)
    images = np.repeat(np.arange(len(counts)), counts)
    shape = batch.maps.shape[2:]
    maps = batch.maps.reshape(-1, *shape) if asked.all() else batch.maps[asked]
    columns = {"key": _repeated(batch.keys, images), "prompt": batch.prompts[asked].astype(np.int32)}
    if batch.texts is not None:
        columns["text"] = arrow.array([text for texts in batch.texts for text in texts], "string")
    columns["score"] = batch.scores[asked].astype(np.float32)
    for name, part in codec.encode(maps).items():
        columns["map" if name == "values" else name] = _column(part, fixed=grid is not None)
    columns |= _geometry(batch.geometries, shape, images)
    return arrow.table(columns, metadata=_about(maps=codec.name)), counts


def feature_table(batch: Explained, codec: Codec) -> Any:
    """A batch's attribution features as a table."""
    arrow, _ = pyarrow()
    assert batch.features is not None
    values, weights, embeddings = batch.features
    layers = values.shape[1] if values.ndim == 4 else 0
    columns = {
        "key": arrow.array(batch.keys, "string"),
        **_geometry(batch.geometries, batch.maps.shape[2:], np.arange(len(values))),
    }
    columns |= {
        "layers": np.full(len(values), layers, np.int16),
        "patches": np.full(len(values), values.shape[-2], np.int32),
        "weights": _column(weights.astype("<f4"), fixed=False),
        "embedding": _column(embeddings.astype("<f4"), fixed=False),
    }
    columns |= {f"values_{name}": _column(part, fixed=False) for name, part in codec.encode(values).items()}
    return arrow.table(columns, metadata=_about(features=codec.name, relu=batch.relu))


def _about(**names: str) -> dict[bytes, bytes]:
    return {ABOUT: json.dumps({"format": FORMAT, **names}).encode()}


def _column(part: np.ndarray, fixed: bool) -> Any:
    """Numbers (N,) as they are; arrays (N, ...) as the bytes of each."""
    arrow, _ = pyarrow()
    if part.ndim == 1:
        return arrow.array(part)
    data = arrow.py_buffer(np.ascontiguousarray(part))
    width = part.dtype.itemsize * prod(part.shape[1:])
    if fixed:
        return arrow.FixedSizeBinaryArray.from_buffers(arrow.binary(width), len(part), [None, data])
    offsets = arrow.py_buffer(np.arange(len(part) + 1, dtype=np.int32) * width)
    return arrow.BinaryArray.from_buffers(arrow.binary(), len(part), [None, offsets, data])


def _repeated(texts: list[str], rows: np.ndarray) -> Any:
    """The texts of these rows, as arrow's strings."""
    arrow, _ = pyarrow()
    own = arrow.array(texts, "string")
    return own if len(rows) == len(texts) else arrow.DictionaryArray.from_arrays(rows, own).dictionary_decode()


def _geometry(geometries: Sequence[Geometry], grid: Shape, images: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of the geometry, a row for each of `images`."""
    table = np.array([(g.height, g.width, *g.box, *g.input, *g.covered) for g in geometries], np.float64)
    columns = table.reshape(-1, len(GEOMETRY)).T[:, images]
    sides = {f"grid_{side}": np.full(len(images), n, np.int16) for side, n in zip("hw", grid, strict=True)}
    return sides | {name: column.astype(kind) for (name, kind), column in zip(GEOMETRY.items(), columns, strict=True)}
