"""Tables whose rows hold encoded images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from clipfast.data.keys import numbered
from clipfast.data.places import joined, read_bytes, sentence, split
from clipfast.engine.base import Failure, Item, Shard
from clipfast.engine.listing import Listed, Wanted, shard_id, unique_keys
from clipfast.engine.lists import chosen_columns, row_key
from clipfast.engine.table import Table
from clipfast.errors import InputError

# Tables that are opened, and rows whose keys are read, at once.
_OPENED, _READ = 16, 4096


@dataclass(frozen=True)
class _Held:
    """A shard's rows of the table number `file`, to the end without `stop`, and what keeps them from being read.

    keys: joined; without any, rows are numbered.
    """

    file: int
    start: int = 0
    stop: int | None = None
    keys: str | None = None
    problem: str | None = None


class Tables(Listed):
    """Rows that hold encoded images: bytes, or as Hugging Face has them, bytes or else a path.

    root: what the tables' names are relative to. Keys are those of the key column, or table/row. A remote arrow stream
    is one shard: its rows cannot be counted without reading them.

    Raises InputError where no table can be read, or one of the columns is missing.
    """

    def __init__(self, kind: str, place: str, root: str, names: Sequence[str], wanted: Wanted):
        self._kind, self._place, self._root, self._names, self._wanted = kind, place, root, list(names), wanted
        self._stems = numbered(name.rpartition(".")[0] or name for name in self._names)

    def config(self) -> dict[str, Any]:
        return {"kind": self._kind, "place": self._place, **self._wanted.config()}

    def _cut(self) -> Iterator[Shard]:
        for number, held in enumerate(self._held()):
            part = shard_id(number, self._names[held.file], f"{held.start}-{held.stop}", held.keys or "")
            yield Shard(part, number, held, None if held.stop is None else held.stop - held.start)

    def _held(self) -> Iterator[_Held]:
        with ThreadPoolExecutor(_OPENED) as pool:
            found = list(pool.map(self._rows, self._names))
        if all(problem is not None and not rows for rows, problem in found):
            raise InputError(found[0][1] or "")
        keys = iter(unique_keys([key for rows, _ in found if isinstance(rows, list) for key in rows]))
        left = self._wanted.limit
        for file, (rows, problem) in enumerate(found):
            if rows is None:
                yield _Held(file)
                continue
            own = list(islice(keys, len(rows))) if isinstance(rows, list) else None
            count = rows if isinstance(rows, int) else len(rows)
            count = count if left is None else min(count, left)
            for start in range(0, count, self._wanted.shard_size):
                stop = min(start + self._wanted.shard_size, count)
                yield _Held(file, start, stop, None if own is None else "\0".join(own[start:stop]))
            left = None if left is None else left - count
            if left == 0:
                return
            if problem is not None:
                yield _Held(file, count, count, None, problem)

    def _rows(self, name: str) -> tuple[int | list[str] | None, str | None]:
        """How many rows of a table can be read, or their keys, None for all there are; and why others cannot."""
        called = joined(self._root, name)
        count, key = 0, None
        keys: list[str] = []
        problem = None
        try:
            with Table(called) as table:
                _, key, _ = chosen_columns(called, table.columns(), table.pictures(), self._wanted)
                if key is None and table.rows is not None:
                    return table.rows, None
                if key is None and table.remote_stream and self._wanted.limit is None:
                    return None, None
                for batch in table.batches([key] if key else [], 0, None, _READ):
                    count += batch.num_rows
                    for one in table.values(batch, key) if key else []:
                        missing = one is None or one == ""
                        keys.append(row_key(name, len(keys)) if missing else str(one).replace("\0", "\ufffd"))
        except InputError as error:
            problem = str(error)
        except Exception as error:
            # pyarrow and each of fsspec's file systems fail in ways of their own.
            used = f": the {count:,} rows before that are used" if count else ""
            problem = f"{called} cannot be read as a table: {sentence(error)}{used}."
        return (keys if key else count), problem

    def items(self, shard: Shard) -> Iterator[Item | Failure]:
        held: _Held = shard.holds
        name = self._names[held.file]
        if held.problem is not None:
            yield Failure(name, held.problem)
            return
        keys = iter(()) if held.keys is None else iter(held.keys.split("\0"))
        row, reason = held.start, f"{joined(self._root, name)} has fewer rows than when the run was planned."
        try:
            for item in self._read(name, held):
                key = next(keys, None) or f"{self._stems[held.file]}/{row:06d}"
                yield replace(item, key=key) if isinstance(item, Item) else Failure(key, f"{key} {item.reason}")
                row += 1
        except Exception as error:
            reason = f"{joined(self._root, name)} cannot be read as a table: {sentence(error)}."
            if held.stop is None:
                yield Failure(name, reason)
        for lost in range(row, held.stop or 0):
            yield Failure(next(keys, None) or f"{self._stems[held.file]}/{lost:06d}", reason)

    def _read(self, name: str, held: _Held) -> Iterator[Item | Failure]:
        called = joined(self._root, name)
        with Table(called) as table:
            image, _, columns = chosen_columns(called, table.columns(), table.pictures(), self._wanted)
            for batch in table.batches([image, *columns], held.start, held.stop):
                values = {column: table.values(batch, column) for column in columns}
                for i, picture in enumerate(table.values(batch, image)):
                    own = {column: cells[i] for column, cells in values.items()}
                    record = picture if isinstance(picture, dict) else {"bytes": picture}
                    data, path = record.get("bytes"), record.get("path")
                    if data:
                        yield Item("", partial(bytes, data), own)
                    elif path:
                        yield Item("", partial(read_bytes, split(called)[0], path), own)
                    else:
                        yield Failure("", "holds no image." if data is None else "is empty: 0 bytes.")
