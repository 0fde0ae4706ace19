"""The parquet files of a run, read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from clipfast.data.arrow import pyarrow
from clipfast.data.geometry import Geometry
from clipfast.engine.rows import ABOUT, FORMAT, GEOMETRY
from clipfast.engine.storage import Codec, Parts, Shape, feature_codec, map_codec
from clipfast.errors import InputError


@dataclass(frozen=True)
class Rows:
    """N rows of a run, all of one grid: each an image and a prompt.

    keys: the images', N. prompts (N,): numbers of the run's texts. texts: each row's own, where images have their own.
    scores (N,), maps (N, h, w): float32. geometry (N, 10): the columns `rows.GEOMETRY`.
    """

    keys: list[str]
    prompts: np.ndarray
    texts: list[str] | None
    scores: np.ndarray
    maps: np.ndarray
    geometry: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class FeatureRows:
    """The attribution features of N images of one grid, float32: see `results.Features`. geometry (N, 10)."""

    keys: list[str]
    values: np.ndarray
    weights: np.ndarray
    embeddings: np.ndarray
    geometry: np.ndarray
    grid: tuple[int, int]
    relu: str


class RowReader:
    """A committed parquet file, opened by one process. Raises InputError where it is missing, damaged or foreign.

    holds: "maps" or "features".
    """

    def __init__(self, path: Path, holds: str):
        _, parquet = pyarrow()
        self.path = path
        with self._reading():
            self._file = parquet.ParquetFile(path)
            self.about = json.loads(self._file.schema_arrow.metadata[ABOUT])
            if self.about["format"] != FORMAT:
                raise ValueError(f"its format is {self.about['format']}, not {FORMAT}")
            self.codec = (map_codec if holds == "maps" else feature_codec)(self.about[holds])
            groups = [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]
        self.starts = np.concatenate(([0], np.cumsum(groups, dtype=np.int64)))
        self._latest: tuple[int, Any] = (-1, None)

    @cached_property
    def offsets(self) -> np.ndarray:
        """(images + 1,): the first row of each image, and the number of rows."""
        return self._images()[1]

    def keys(self) -> list[str]:
        """The images in order."""
        return self._images()[0]

    def image(self, number: int) -> Any:
        """The rows of one image, as a table."""
        first, stop = self.offsets[number : number + 2].tolist()
        group = int(np.searchsorted(self.starts, first, side="right")) - 1
        return self.group(group).slice(first - int(self.starts[group]), stop - first)

    def groups(self) -> Iterator[Any]:
        """All rows, a table for each row group."""
        return map(self.group, range(len(self.starts) - 1))

    def column(self, name: str) -> Iterator[Any]:
        """A column alone, a part for each row group; the others are not read."""
        for number in range(len(self.starts) - 1):
            with self._reading():
                column = self._file.read_row_group(number, columns=[name], use_threads=False)[name]
            yield column

    def group(self, number: int) -> Any:
        """A row group as a table; the latest is kept, for its images are often asked for one after the other."""
        if self._latest[0] != number:
            with self._reading():
                self._latest = number, self._file.read_row_group(number, use_threads=False)
        return self._latest[1]

    def close(self) -> None:
        self._file.close()

    def _images(self) -> tuple[list[str], np.ndarray]:
        with self._reading():
            column = self._file.read(["key"], use_threads=False)["key"].combine_chunks().dictionary_encode()
        numbers = column.indices.to_numpy(zero_copy_only=False)
        keys: list[str] = column.dictionary.to_pylist()
        firsts = np.flatnonzero(np.diff(numbers, prepend=-1))
        if len(firsts) != len(keys):
            raise InputError(f"{self.path} is damaged: an image's rows do not follow each other.")
        return keys, np.append(firsts, len(numbers)).astype(np.int32)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        arrow, _ = pyarrow()
        again = "remove its marker (the .json of that name in shards/) and run the same command again"
        try:
            yield
        except FileNotFoundError:
            raise InputError(f"{self.path} is missing, though it was committed: {again}.") from None
        except (OSError, KeyError, TypeError, ValueError, arrow.ArrowException) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise InputError(f"{self.path} is damaged or foreign ({reason}): {again}.") from error


def rows_of(table: Any, codec: Codec) -> Iterator[Rows]:
    """A table of shards/ as rows, in order, those of one grid at a time."""
    for part, grid in _by_grid(table):
        parts = {}
        for name, (dtype, shape) in codec.layout(grid).items():
            parts[name] = _array(part["map" if name == "values" else name], dtype, shape)
        yield Rows(
            keys=part["key"].to_pylist(),
            prompts=_numbers(part["prompt"]),
            texts=part["text"].to_pylist() if "text" in part.column_names else None,
            scores=_numbers(part["score"]),
            maps=codec.decode(parts, grid),
            geometry=_geometry_columns(part),
        )


def embeddings_of(column: Any) -> np.ndarray:
    """The embeddings (N, E), float32, of a part of that column of features/."""
    return _bytes(column).view("<f4").astype(np.float32)


def features_of(table: Any, codec: Codec, relu: str) -> Iterator[FeatureRows]:
    """A table of features/, in order, images of one grid at a time."""
    for part, grid in _by_grid(table):
        layers, patches = (int(part[name][0].as_py()) for name in ("layers", "patches"))
        embeddings = embeddings_of(part["embedding"])
        shape: Shape = (*((layers,) if layers else ()), patches, embeddings.shape[1])
        parts: Parts = {
            name: _array(part[f"values_{name}"], dtype, own) for name, (dtype, own) in codec.layout(shape).items()
        }
        yield FeatureRows(
            keys=part["key"].to_pylist(),
            values=codec.decode(parts, shape),
            weights=_array(part["weights"], np.dtype("<f4"), shape[:-1]).astype(np.float32),
            embeddings=embeddings,
            geometry=_geometry_columns(part),
            grid=grid,
            relu=relu,
        )


def geometry(row: np.ndarray) -> Geometry:
    """A row (10,) of the columns `rows.GEOMETRY` as what they describe."""
    height, width, left, top, right, bottom, *sides = row.tolist()
    h, w, covered_h, covered_w = map(int, sides)
    return Geometry(int(height), int(width), (left, top, right, bottom), (h, w), (covered_h, covered_w))


def _by_grid(table: Any) -> Iterator[tuple[Any, tuple[int, int]]]:
    """The table cut where the grid changes."""
    sides = np.stack([_numbers(table["grid_h"]), _numbers(table["grid_w"])], 1)
    cuts = [0, *(np.flatnonzero((np.diff(sides, axis=0) != 0).any(1)) + 1).tolist(), len(sides)]
    for start, stop in pairwise(cuts):
        if stop > start:
            yield table.slice(start, stop - start), (int(sides[start, 0]), int(sides[start, 1]))


def _array(column: Any, dtype: np.dtype[Any], shape: Shape) -> np.ndarray:
    """A part of `Codec.layout`: numbers (N,), or arrays (N, *shape) out of their bytes."""
    return _bytes(column).view(dtype).reshape(-1, *shape) if shape else _numbers(column)


def _bytes(column: Any) -> np.ndarray:
    """A binary column whose values all have one length: uint8 (N, length)."""
    arrow, _ = pyarrow()
    values = column.combine_chunks()
    count = len(values)
    if arrow.types.is_fixed_size_binary(values.type):
        width = values.type.byte_width
        start, data = values.offset * width, values.buffers()[1]
    else:
        offsets = np.frombuffer(values.buffers()[1], np.int32)[values.offset : values.offset + count + 1]
        start, data = int(offsets[0]), values.buffers()[2]
        width = (int(offsets[-1]) - start) // max(count, 1)
    return np.frombuffer(data, np.uint8, count * width, start).reshape(count, width)


def _numbers(column: Any) -> np.ndarray:
    return column.combine_chunks().to_numpy(zero_copy_only=False)


def _geometry_columns(table: Any) -> np.ndarray:
    return np.stack([_numbers(table[name]).astype(np.float64) for name in GEOMETRY], 1)
