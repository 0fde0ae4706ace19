"""What a benchmark found: one row a path, with every time behind its figures, as JSON, CSV, Markdown and a plot."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipfast.errors import InputError
from clipfast.view.files import write_file

FILE = "bench.json"
_FORMAT = 1
OURS, MODEL = "clipfast", "the model"

FIGURES = (
    *("rounds", "p50", "p95", "p99", "ratio", "ratio_low", "ratio_high", "images_per_second", "maps_per_second"),
    "share_of_peak",
)


@dataclass(frozen=True)
class Row:
    """One path, and its times if its maps were right.

    by: "clipfast", a peer with its version, or "the model" for the bare encode. precision: the trunk's dtype. error:
    relative L2 of the maps to the float64 definition, at most `bound`. reason: why there is no speed. seconds, encode
    and product: times of the path, of the bare encode of the same images and of the roofline's product of matrices in
    the same rounds. multiplications, product_multiplications: in one of them. memory: bytes that a call adds at its
    peak. joules: energy of one call.
    """

    method: str
    by: str
    batch: int
    prompts: int
    precision: str
    backend: str
    error: float | None = None
    bound: float | None = None
    reason: str | None = None
    seconds: tuple[float, ...] = ()
    encode: tuple[float, ...] = ()
    product: tuple[float, ...] = ()
    multiplications: int | None = None
    product_multiplications: int | None = None
    memory: int | None = None
    joules: float | None = None

    @property
    def key(self) -> tuple[str, str, int, int, str, str]:
        return self.method, self.by, self.batch, self.prompts, self.precision, self.backend

    @property
    def name(self) -> str:
        """What tables call it: the method, or the peer without its version."""
        if self.by in (OURS, MODEL):
            return self.method
        return " ".join(word for word in self.by.split() if not word[0].isdigit())

    @property
    def timed(self) -> bool:
        return self.reason is None and bool(self.seconds)

    @property
    def ratios(self) -> tuple[float, ...]:
        """The path's time over the encode's, round by round."""
        return tuple(a / b for a, b in zip(self.seconds, self.encode, strict=True))

    def figures(self) -> dict[str, float | int | None]:
        """FIGURES by name, None for those that there are not: seconds, ratios to the encode, rates, and the share of
        the multiplications a second that the matrix product does."""
        if not self.timed:
            return dict.fromkeys(FIGURES)
        p50, p95, p99 = (float(q) for q in np.quantile(self.seconds, (0.5, 0.95, 0.99)))
        share = None
        if self.multiplications is not None and self.product_multiplications and self.product:
            work = self.multiplications / self.product_multiplications
            share = work * statistics.median(b / a for a, b in zip(self.seconds, self.product, strict=True))
        return {
            "rounds": len(self.seconds),
            "p50": p50,
            "p95": p95,
            "p99": p99,
            "ratio": statistics.median(self.ratios),
            "ratio_low": min(self.ratios),
            "ratio_high": max(self.ratios),
            "images_per_second": self.batch / p50,
            "maps_per_second": self.batch * self.prompts / p50 if self.by != MODEL else None,
            "share_of_peak": share,
        }

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), **self.figures()}


@dataclass(frozen=True)
class Report:
    """All rows of one run, and what they depend on."""

    model: str
    device: str
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        about = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "rows"}
        return {"format": _FORMAT, **about, "rows": [row.to_json() for row in self.rows]}

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """A report from its bench.json, or the folder that holds it. Raises InputError for a file that is none."""
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        names = [f.name for f in dataclasses.fields(Row)]
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            rows = []
            for one in about["rows"]:
                values: dict[str, Any] = {}
                for name in names:
                    values[name] = tuple(one[name]) if isinstance(one[name], list) else one[name]
                rows.append(Row(**values))
            own = [f.name for f in dataclasses.fields(cls) if f.name != "rows"]
            return cls(**{name: about[name] for name in own}, rows=tuple(rows))
        except FileNotFoundError:
            raise InputError(f"{path}: there is no such file; `clipfast bench` writes one.") from None
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not what `clipfast bench` writes: {error}.") from error

    def save(self, folder: Path) -> None:
        """Write bench.json, bench.csv, bench.md and bench.png, each whole or not at all."""
        text = json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False, indent=1)
        write_file(folder / FILE, text.encode())
        write_file(folder / "bench.csv", self.csv().encode())
        write_file(folder / "bench.md", self.markdown().encode())
        from clipfast.bench.plot import draw

        write_file(folder / "bench.png", draw(self))

    def csv(self) -> str:
        """One line a row, without the single times."""
        stream = io.StringIO()
        lists = ("seconds", "encode", "product")
        names = [f.name for f in dataclasses.fields(Row) if f.name not in lists]
        writer = csv.DictWriter(stream, [*names, *FIGURES], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.to_json() for row in self.rows)
        return stream.getvalue()

    def markdown(self) -> str:
        """The tables, with what they were measured on."""
        lines = [f"# What explaining {self.model} costs", "", f"{self.where()}.", ""]
        for title, rows in self.tables():
            cells = [cells_of(row) for row in rows if row.timed]
            lines += [f"## {title}", "", f"| {' | '.join(HEADINGS)} |", f"|---|---|{'--:|' * (len(HEADINGS) - 2)}"]
            lines += [f"| {' | '.join(cell)} |" for cell in cells]
            lines += [f"\nNo speed of {name}: {row.reason}." for row in rows if (name := named(row)) and not row.timed]
            lines.append("")
        return "\n".join([*lines, "", NOTES, ""])

    def where(self) -> str:
        """The machine in a line."""
        m = self.machine
        processor = m["gpu"] if self.device.startswith("cuda") else f"{m['cpu']}, {m['cores']} cores"
        return f"{processor}, {m['threads']} thread{'s' if m['threads'] > 1 else ''}, torch {m['torch']}"

    def tables(self) -> list[tuple[str, list[Row]]]:
        """Rows by batch, precision and backend, each with a title."""
        found: dict[tuple[int, str, str], list[Row]] = {}
        for row in self.rows:
            if row.by != MODEL:
                found.setdefault((row.batch, row.precision, row.backend), []).append(row)
        for (batch, precision, _), rows in found.items():
            rows[:0] = [r for r in self.rows if r.by == MODEL and (r.batch, r.precision) == (batch, precision)]
        return [
            (f"{batch} image{'s' if batch > 1 else ''}, {precision}{'' if by == 'auto' else f', backend {by}'}", rows)
            for (batch, precision, by), rows in found.items()
        ]


HEADINGS = ("", "prompts", "× encode", "p50 ms", "p95 ms", "p99 ms", "images/s", "maps/s", "peak", "MB", "J", "error")
NOTES = (
    "× encode: time over that of the model's bare encode of the same images, in turns, median of the rounds. peak: the "
    "share of the multiplications a second of a matrix product, measured in the same rounds. MB: what a call adds at "
    "its peak. error: relative L2 to the definition in float64."
)


def named(row: Row) -> str:
    """What a table calls a row."""
    prompts = "" if row.by == MODEL else f" for {row.prompts:,} prompt{'s' if row.prompts > 1 else ''}"
    return f"{row.name}{prompts}"


def cells_of(row: Row) -> list[str]:
    """A timed row's cells under HEADINGS."""
    f = row.figures()

    def told(value: float | None, digits: int = 3) -> str:
        return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.{digits}g}"

    return [
        row.name,
        "" if row.by == MODEL else f"{row.prompts:,}",
        f"{f['ratio']:.2f}",
        *(told(float(f[q] or 0) * 1000) for q in ("p50", "p95", "p99")),
        told(f["images_per_second"]),
        told(f["maps_per_second"]),
        "" if f["share_of_peak"] is None else f"{f['share_of_peak']:.0%}",
        "" if row.memory is None else f"{row.memory / 1e6:.1f}",
        told(row.joules),
        "" if row.error is None else f"{row.error:.0e}",
    ]


def merged_encodes(rows: Sequence[Row]) -> list[Row]:
    """The rows with those of one encode, timed beside several methods, as one with all of its times."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        before = found.get(row.key)
        if before is not None and row.by == MODEL:
            both = {name: getattr(before, name) + getattr(row, name) for name in ("seconds", "encode", "product")}
            row = dataclasses.replace(before, **both)
        found[row.key] = row
    return list(found.values())
