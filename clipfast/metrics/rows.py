"""Rows of an evaluation on the disk: one parquet file for each method and some dozens of samples.

    out/rows/METHOD-FINGERPRINT/000050.parquet            the pairs of samples 50 to 99
    out/rows/METHOD-FINGERPRINT/000050-000060.parquet     those of samples 50 to 59, which a limit of 60 has left

A file appears whole or not at all, so an evaluation that was killed loses no more than the file it was about to write.
The fingerprint stands for everything that the maps depend on; each protocol's own is in the file, so that a further
protocol adds columns, and a changed one replaces its own.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipfast.data.arrow import pyarrow
from clipfast.errors import InputError
from clipfast.metrics.base import Columns
from clipfast.view.files import write_file

_ABOUT = b"clipfast"


@dataclass
class Seconds:
    """What something took: inside the model's forwards, and in all."""

    forwards: float = 0.0
    total: float = 0.0

    def add(self, forwards: float, total: float) -> None:
        self.forwards += forwards
        self.total += total


@dataclass
class Shard:
    """The rows of one method on samples start..stop-1.

    For each pair of a sample and a target: keys, numbers (of the sample in the data set), texts, scores. columns: of
    each protocol, by its label; marks: its fingerprint. first, last: keys of the samples at the ends. explain, measure:
    seconds for the maps, and for each protocol. errors: by key, why a sample could not be read.
    """

    start: int
    stop: int
    keys: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    columns: dict[str, Columns] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    explain: Seconds = field(default_factory=Seconds)
    measure: dict[str, Seconds] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def enter(self, number: int, key: str, texts: Sequence[str], scores: Sequence[float]) -> None:
        """Add the rows of one sample."""
        self.keys += [key] * len(texts)
        self.numbers += [number] * len(texts)
        self.texts += texts
        self.scores += scores

    def upto(self, stop: int) -> Shard:
        """The same, without the rows of samples from `stop` on."""
        if stop >= self.stop:
            return self
        rows = [i for i, number in enumerate(self.numbers) if number < stop]
        return replace(
            self,
            stop=stop,
            keys=[self.keys[i] for i in rows],
            numbers=[self.numbers[i] for i in rows],
            texts=[self.texts[i] for i in rows],
            scores=[self.scores[i] for i in rows],
            columns={
                label: {name: column[rows] for name, column in own.items()} for label, own in self.columns.items()
            },
        )

    def write(self, path: Path) -> None:
        """Write the parquet file, whole or not at all. Raises InputError where pyarrow is missing."""
        arrow, parquet = pyarrow()
        about = {name: getattr(self, name) for name in ("start", "stop", "marks", "errors")} | {
            "explain": asdict(self.explain),
            "measure": {label: asdict(s) for label, s in self.measure.items()},
        }
        data: dict[str, Any] = {
            "sample": self.keys, "number": self.numbers, "text": self.texts, "score": self.scores
        }  # fmt: skip
        for label, columns in self.columns.items():
            data |= {f"{label} | {name}": column.numpy() for name, column in columns.items()}
        table = arrow.table(data).replace_schema_metadata({_ABOUT: json.dumps(about).encode()})
        stream = io.BytesIO()
        parquet.write_table(table, stream, compression="zstd")
        write_file(path, stream.getvalue())

    @classmethod
    def read(cls, path: Path) -> Shard:
        """A shard from its file. Raises InputError for a file that `write` did not write."""
        arrow, parquet = pyarrow()
        try:
            table = parquet.read_table(path)
            about = json.loads(table.schema.metadata[_ABOUT])
        except (OSError, KeyError, TypeError, ValueError, arrow.ArrowException) as error:
            raise InputError(f"{path} does not hold rows of an evaluation: {error}") from error
        columns: dict[str, Columns] = {}
        for name in table.column_names[4:]:
            label, _, column = name.partition(" | ")
            columns.setdefault(label, {})[column] = _tensor(table[name])
        keys, numbers, texts, scores = (table[name].to_pylist() for name in ("sample", "number", "text", "score"))
        return cls(
            start=about["start"],
            stop=about["stop"],
            keys=keys,
            numbers=numbers,
            texts=texts,
            scores=scores,
            columns=columns,
            marks=about["marks"],
            explain=Seconds(**about["explain"]),
            measure={label: Seconds(**seconds) for label, seconds in about["measure"].items()},
            errors=about["errors"],
        )


def rows_path(folder: Path, start: int, stop: int, size: int) -> Path:
    """Where the rows of samples start..stop-1 are kept, where files are of `size` samples.

    Fewer have a file of their own: a run with a small limit, asked for a further protocol, must not replace the rows of
    a larger one.
    """
    return folder / (f"{start:06d}.parquet" if stop - start == size else f"{start:06d}-{stop:06d}.parquet")


def rows_paths(folder: Path, start: int) -> list[Path]:
    """All files whose rows begin with sample `start`, that of the most samples first."""
    return [path for path in (folder / f"{start:06d}.parquet",) if path.exists()] + sorted(
        folder.glob(f"{start:06d}-*.parquet"), reverse=True
    )


def fingerprint(**settings: Any) -> str:
    """Eight hexadecimal digits that differ where the settings do."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]


def slug(text: str) -> str:
    """A text as the beginning of a file's name."""
    return re.sub(r"[^\w.+=-]+", "-", text).strip("-.")[:60] or "unnamed"


def _tensor(column: Any) -> Tensor:
    return torch.from_numpy(column.to_numpy().copy())
