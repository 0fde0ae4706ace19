"""What a comparison of two checkpoints found: figures before and after, what lies between the two, JSON and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from clipfast.metrics.base import Difference, Figure, Protocol
from clipfast.metrics.page import spelled
from clipfast.versions import versions
from clipfast.view.diff_page import Card, Histogram, Page, Row, Tile, write_diff_page
from clipfast.view.files import write_file

FILE, PAGE = "diff.json", "diff.html"


@dataclass(frozen=True)
class Values(Protocol):
    """One value a row, whose mean is the figure. better: "higher", "lower", or "" where neither is."""

    figure: str
    better: str = ""

    name: ClassVar[str] = "values"
    source: ClassVar[str] = "the models' own"

    @property
    def figures(self) -> Mapping[str, str]:  # type: ignore[override]
        return {self.figure: self.better}

    def parameters(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Change:
    """One figure of a protocol, before and after, and by how much the second is above the first.

    difference: by paired bootstrap; None where the two have no rows in common (neurons of different towers).
    """

    protocol: str
    before: Figure
    after: Figure
    difference: Difference | None


@dataclass
class Comparison:
    """Two checkpoints on the same pictures and texts.

    before, after: their names. data, samples, pairs: what they were asked for, in the words of `prompt`; templates: of
    classes. method: with its parameters. protocols: by label, all that measured something. changes: of each checkpoint.
    between: figures of the two together, by what is compared. counts: of rows that changed sides. histograms, cards:
    as the page shows them. notes: what was not measured, and why. errors: by key, pictures that could not be read.
    seconds: all of it.
    """

    before: str
    after: str
    data: str
    samples: int
    pairs: int
    seed: int
    prompt: str
    templates: Any
    method: str
    parameters: Mapping[str, Any]
    protocols: dict[str, Protocol] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    between: dict[str, Figure] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    histograms: list[Histogram] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def change(self, protocol: str, figure: str) -> Change:
        """The change of a protocol's figure. Raises KeyError for one that was not measured."""
        for one in self.changes:
            if (one.protocol, one.before.name) == (protocol, figure):
                return one
        raise KeyError((protocol, figure))

    def to_json(self) -> dict[str, Any]:
        """All but pictures: settings, figures with intervals, histograms, what is shown, versions."""
        names = ("before", "after", "data", "samples", "pairs", "seed", "prompt", "templates", "method", "parameters")
        return {
            **{name: getattr(self, name) for name in names},
            "made": datetime.now().isoformat(timespec="seconds"),
            "seconds": self.seconds,
            "versions": versions(),
            "protocols": {
                name: {"source": one.source, "parameters": one.parameters()} for name, one in self.protocols.items()
            },
            "changes": [_change(one) for one in self.changes],
            "between": {name: _figure(one) for name, one in self.between.items()},
            "counts": self.counts,
            "histograms": [
                {"title": h.title, "edges": list(h.edges), "before": h.before, "after": h.after}
                for h in self.histograms
            ],
            "shown": [
                {
                    "picture": card.title,
                    "group": card.group,
                    "text": pair.text,
                    "before": pair.scores[0],
                    "after": pair.scores[1],
                    "SSIM": pair.ssim,
                }
                for card in self.cards
                for pair in card.pairs
            ],
            "notes": self.notes,
            "errors": self.errors,
        }

    def save(self, folder: str | Path) -> list[Path]:
        """Write diff.json and diff.html, each whole or not at all, and return their paths."""
        text = json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False, indent=1)
        return [write_file(Path(folder) / FILE, text.encode()), self.report(Path(folder) / PAGE)]

    def report(self, path: str | Path) -> Path:
        """Write one self-contained HTML page, and return its path."""
        facts = {
            "Before": self.before,
            "After": self.after,
            "Data": self.data,
            "Pictures": f"{self.samples:,}",
            "Pairs of picture and text": f"{self.pairs:,}",
            "Asked for": self.prompt.replace("{}", "NAME"),
            "Method": self.method,
            "Seed": str(self.seed),
            "Made": datetime.now().strftime("%Y-%m-%d %H:%M"),
        }
        page = Page(
            title="Before and after",
            note=f"The same pictures and texts through {self.before} and {self.after}.",
            facts=facts,
            rows=self.rows(),
            tiles=[
                *(Tile(name, f.value, f.low, f.high, f"mean of {f.count:,}") for name, f in self.between.items()),
                *(Tile(name, count) for name, count in self.counts.items()),
            ],
            histograms=self.histograms,
            cards=self.cards,
            parameters=[(name, own.source, spelled(own.parameters())) for name, own in self.protocols.items()],
            versions=versions(),
            failures=[*self.notes, *self.errors.values()],
        )
        return write_diff_page(path, page)

    def rows(self) -> list[Row]:
        """The changes as tables show them."""
        return [self._row(one) for one in self.changes]

    def _row(self, one: Change) -> Row:
        by, gain = self.protocols[one.protocol], one.difference
        return Row(
            one.protocol,
            one.before.name,
            one.before.better,
            f"{spelled(by.parameters())}; {by.source}",
            (one.before.value, one.before.error),
            (one.after.value, one.after.error),
            one.before.count,
            *((gain.value, gain.low, gain.high, gain.p) if gain is not None else ()),
        )


def _change(one: Change) -> dict[str, Any]:
    gain = one.difference
    return {
        "protocol": one.protocol,
        "figure": one.before.name,
        "better": one.before.better or None,
        "before": _figure(one.before),
        "after": _figure(one.after),
        "difference": None
        if gain is None
        else {key: _finite(getattr(gain, key)) for key in ("value", "low", "high", "p")},
    }


def _figure(one: Figure) -> dict[str, Any]:
    return {**{key: _finite(getattr(one, key)) for key in ("value", "error", "low", "high")}, "count": one.count}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
