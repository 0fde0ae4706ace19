"""One table on the disk or behind an address: parquet, or arrow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from clipfast.data.arrow import pyarrow
from clipfast.data.places import is_url, open_binary

# Rows that are Python objects at once.
_ROWS = 32


class Table:
    """A parquet file, or one of arrow (a file, or a stream as Hugging Face's data sets are), open for reading.

    Raises OSError, what fsspec's file system raises, or pyarrow's exceptions, for what cannot be opened.
    """

    def __init__(self, place: str):
        arrow, parquet = pyarrow()
        self.place = place
        self._arrow = arrow
        with open_binary(place) as stream:
            start = stream.read(6)
        with ExitStack() as stack:
            if is_url(place):
                file: Any = stack.enter_context(open_binary(place))
            else:
                # Mapped, a stream's rows are found without reading what is before them.
                whole = start[:4] == b"PAR1" or start == b"ARROW1"
                file = stack.enter_context(arrow.OSFile(place) if whole else arrow.memory_map(place))
            self._file, self._parquet, self._reader = file, None, None
            if start[:4] == b"PAR1":
                self._parquet = parquet.ParquetFile(file)
                self.schema = self._parquet.schema_arrow
            elif start == b"ARROW1":
                self._reader = arrow.ipc.open_file(file)
                self.schema = self._reader.schema
            else:
                self.schema = arrow.ipc.open_stream(file).schema
            self._stack = stack.pop_all()

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def remote_stream(self) -> bool:
        """Whether only reading the whole of a remote file says how many rows there are."""
        return self._parquet is None and self._reader is None and is_url(self.place)

    @property
    def rows(self) -> int | None:
        """How many rows there are, where the file says so; else `batches` tells."""
        return None if self._parquet is None else int(self._parquet.metadata.num_rows)

    def columns(self) -> list[str]:
        """The columns' names, and those of the fields in them, such as "image.path"."""
        arrow = self._arrow
        inner = [f"{f.name}.{one.name}" for f in self.schema if arrow.types.is_struct(f.type) for one in f.type]
        return [*self.schema.names, *inner]

    def pictures(self) -> list[str]:
        """The columns that hold encoded images, by their types: bytes, or a record of bytes and path."""
        types = self._arrow.types
        return [
            f.name
            for f in self.schema
            if types.is_binary(f.type)
            or types.is_large_binary(f.type)
            or (types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0)
        ]

    def values(self, batch: Any, column: str) -> list[Any]:
        """A column of a batch as Python objects; of classes that Hugging Face's features name, the names."""
        if column in batch.schema.names:
            found = batch.column(column).to_pylist()
        else:
            outer, _, inner = column.partition(".")
            found = batch.column(outer).field(inner).to_pylist()
        names = self._classes().get(column)
        if names is None:
            return found
        return [names[v] if isinstance(v, int) and 0 <= v < len(names) else v for v in found]

    def _classes(self) -> dict[str, list[str]]:
        about = (self.schema.metadata or {}).get(b"huggingface")
        try:
            features = json.loads(about)["info"]["features"] if about else {}
            return {name: list(one["names"]) for name, one in features.items() if one.get("_type") == "ClassLabel"}
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}

    def batches(self, columns: Sequence[str], start: int, stop: int | None, size: int = _ROWS) -> Iterator[Any]:
        """Rows start..stop-1 (to the end without `stop`), `size` at a time, with these columns and perhaps others."""
        for at, batch in self._parts(columns, start, size):
            last = batch.num_rows if stop is None else min(stop - at, batch.num_rows)
            for i in range(max(start - at, 0), last, size):
                yield batch.slice(i, min(size, last - i))
            if stop is not None and at + batch.num_rows >= stop:
                return

    def _parts(self, columns: Sequence[str], start: int, size: int = _ROWS) -> Iterator[tuple[int, Any]]:
        """Batches as the file has them, each with the number of its first row; some before `start` are left out."""
        at = 0
        if self._parquet is not None:
            for group in range(self._parquet.num_row_groups):
                rows = self._parquet.metadata.row_group(group).num_rows
                if at + rows > start:
                    first = at
                    for batch in self._parquet.iter_batches(size, row_groups=[group], columns=list(columns)):
                        yield first, batch
                        first += batch.num_rows
                at += rows
            return
        if self._reader is not None:
            batches = map(self._reader.get_batch, range(self._reader.num_record_batches))
        else:
            self._file.seek(0)
            batches = iter(self._arrow.ipc.open_stream(self._file))
        for batch in batches:
            yield at, batch
            at += batch.num_rows
