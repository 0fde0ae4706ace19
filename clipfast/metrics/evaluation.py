"""What an evaluation found: rows by method and protocol, their figures, differences, curves, JSON and a page.

An evaluation is kept as `evaluation.json`, with all figures, beside the folder `rows` of the pairs themselves, from
which `Evaluation.load` brings it back and which paired comparisons need.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipfast.errors import InputError
from clipfast.metrics.base import Columns, Difference, Figure, Protocol, compare, figures
from clipfast.metrics.registry import build_protocol, entry_of
from clipfast.metrics.rows import Seconds, Shard
from clipfast.versions import versions
from clipfast.view.files import write_file

FILE = "evaluation.json"
# Columns of a curve's points end in their place: the share of pixels, or the number of the step.
_POINT = re.compile(r"(.+) (\d\.\d{3}|\d{3})")


@dataclass
class Table:
    """The rows of one method and protocol: pairs of a sample and a target.

    keys and numbers of the samples, texts and scores of the pairs, columns of the protocol, (N,) each. seconds: what
    measuring took, without the maps. folder, mark, samples: where the rows are kept.
    """

    keys: list[str]
    numbers: list[int]
    texts: list[str]
    scores: list[float]
    columns: Columns
    seconds: Seconds
    folder: str
    mark: str
    samples: int

    @classmethod
    def of(cls, shards: Sequence[Shard], protocol: str, folder: str, mark: str, samples: int) -> Table:
        """The rows of all shards that hold this protocol."""
        own = [one for one in shards if protocol in one.columns]
        names = own[0].columns[protocol] if own else {}
        seconds = Seconds()
        for one in own:
            seconds.add(one.measure[protocol].forwards, one.measure[protocol].total)
        return cls(
            [key for one in own for key in one.keys],
            [number for one in own for number in one.numbers],
            [text for one in own for text in one.texts],
            [score for one in own for score in one.scores],
            {name: torch.cat([one.columns[protocol][name] for one in own]) for name in names},
            seconds,
            folder,
            mark,
            samples,
        )

    def shared(self, other: Table) -> Table:
        """The rows of pairs that another table has, too; the table itself where these are all."""
        theirs = set(zip(other.numbers, other.keys, other.texts, strict=True))
        rows = [i for i, one in enumerate(zip(self.numbers, self.keys, self.texts, strict=True)) if one in theirs]
        if len(rows) == len(self.keys):
            return self
        return replace(
            self,
            keys=[self.keys[i] for i in rows],
            numbers=[self.numbers[i] for i in rows],
            texts=[self.texts[i] for i in rows],
            scores=[self.scores[i] for i in rows],
            columns={name: column[rows] for name, column in self.columns.items()},
        )

    @property
    def groups(self) -> Tensor:
        """Which rows are of one sample, as `base.figures` takes it."""
        return torch.tensor(self.numbers)


@dataclass(frozen=True)
class Curve:
    """A curve's mean over all pairs and the half width of its 95 % band, at shares of the pixels or numbered steps."""

    at: list[float]
    mean: list[float]
    band: list[float]


@dataclass
class Evaluation:
    """Methods x protocols on one data set.

    samples: of the data set; tables may hold fewer, where a run was made of several. methods: by label, the name and
    all parameters. protocols: by label. tables: by method and protocol, where the one measures what the other explains.
    explain: seconds for a sample's maps by method, or for its captions' words where those alone are measured. errors:
    by key, why samples could not be read. seconds: of this run, without what was there before. out: the folder of the
    rows, if they are kept.
    """

    model: str
    data: str
    samples: int
    seed: int
    prompt: str
    templates: Any
    methods: dict[str, dict[str, Any]]
    protocols: dict[str, Protocol]
    tables: dict[str, dict[str, Table]]
    explain: dict[str, float]
    errors: dict[str, str]
    seconds: float
    out: Path | None = None
    _figures: dict[tuple[str, str], list[Figure]] = field(default_factory=dict, repr=False)
    _compared: dict[str, list[str]] = field(default_factory=dict, repr=False)

    def figures(self, method: str, protocol: str) -> list[Figure]:
        """The protocol's figures of a method; the samples are what is drawn again, with all of their prompts."""
        found = self._figures.get((method, protocol))
        if found is None:
            table, by = self.tables[method][protocol], self.protocols[protocol]
            found = figures(by, needed(by, table.columns), groups=table.groups, seed=self.seed)
            self._figures[method, protocol] = found
        return found

    def compared(self, protocol: str) -> list[str]:
        """The methods that a protocol measured on the very same pairs: as many as there are, and then the most pairs.

        Figures of other pairs do not compare with theirs: a method may only have had the easier images.
        """
        found = self._compared.get(protocol)
        if found is None:
            alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
            for name in self.methods:
                if (table := self.tables.get(name, {}).get(protocol)) is not None:
                    alike.setdefault((tuple(table.keys), tuple(table.texts)), []).append(name)
            found = max(alike.items(), key=lambda one: (len(one[1]), len(one[0][0])), default=((), []))[1]
            self._compared[protocol] = found
        return found

    def best(self, protocol: str, number: int) -> set[str]:
        """Of the methods `compared`, those whose figure of this number is the best; none where all have the same."""
        found = {name: self.figures(name, protocol)[number] for name in self.compared(protocol)}
        values = {name: f.value if f.better == "higher" else -f.value for name, f in found.items()}
        known = {value for value in values.values() if not math.isnan(value)}
        return {name for name, value in values.items() if value == max(known)} if len(known) > 1 else set()

    def differences(self, method: str, other: Evaluation, other_method: str, protocol: str) -> list[Difference]:
        """How far a method's figures are above those of another's, by paired bootstrap on the same pairs.

        Of one evaluation, the pairs that both measured. Raises InputError where two evaluations did not measure the
        same pairs, or two methods of one none in common.
        """
        a, b = self.tables[method][protocol], other.tables[other_method][protocol]
        if other is self:
            a, b = a.shared(b), b.shared(a)
            if not a.keys:
                raise InputError(f"{method} and {other_method} were measured by {protocol} on no pair in common.")
        if (a.keys, a.texts) != (b.keys, b.texts):
            raise InputError(
                f"differences need the same samples: {method} was measured by {protocol} on {len(a.keys)} pairs of "
                f"{self.data} and {other_method} on {len(b.keys)} of {other.data}; the pairs or their texts differ."
            )
        by = self.protocols[protocol]
        return compare(by, needed(by, a.columns), needed(by, b.columns), groups=a.groups, seed=self.seed)

    def curves(self, method: str, protocol: str) -> dict[str, Curve]:
        """The curves of a method by name, such as "deletion"; none of a protocol without curves."""
        table = self.tables[method][protocol]
        points: dict[str, dict[float, Tensor]] = {}
        for name, column in table.columns.items():
            if (found := _POINT.fullmatch(name)) and found[1] in table.columns:
                points.setdefault(found[1], {})[float(found[2])] = column
        return {name: _curve(own, table.groups) for name, own in points.items() if len(own) > 1}

    def telling(self) -> tuple[str, str, str] | None:
        """The protocol of maps, column and direction that choose examples: the first that has more than two values."""
        maps = [name for name, protocol in self.protocols.items() if entry_of(protocol)[1].side == "image"]
        order = sorted(maps, key=lambda name: not name.startswith("energy_pointing_game"))
        shown = [own for own in self.tables.values() if any(protocol in own for protocol in maps)]
        for protocol in order:
            tables = [own[protocol] for own in shown if protocol in own]
            for name, better in self.protocols[protocol].figures.items():
                columns = [table.columns[name] for table in tables if name in table.columns]
                values = torch.cat(columns) if len(columns) == len(shown) else torch.zeros(0)
                if len(values[values.isfinite()].unique()) > 2:
                    return protocol, name, better
        return None

    def to_json(self) -> dict[str, Any]:
        """All but the rows: settings, figures with errors and intervals, curves, timings, versions."""
        about = {
            name: getattr(self, name)
            for name in ("model", "data", "samples", "seed", "prompt", "templates", "errors", "seconds")
        }
        results, curves, rows = [], [], []
        for method, own in self.tables.items():
            for protocol, table in own.items():
                for number, one in enumerate(self.figures(method, protocol)):
                    results.append(
                        {
                            "method": method,
                            "protocol": protocol,
                            "figure": one.name,
                            **{key: _finite(getattr(one, key)) for key in ("value", "error", "low", "high")},
                            "pairs": one.count,
                            "better": one.better,
                            "best": method in self.best(protocol, number),
                            "compared": method in self.compared(protocol),
                        }
                    )
                for name, curve in self.curves(method, protocol).items():
                    values = {key: [_finite(v) for v in getattr(curve, key)] for key in ("at", "mean", "band")}
                    curves.append({"method": method, "protocol": protocol, "curve": name, **values})
                rows.append(
                    {
                        "method": method,
                        "protocol": protocol,
                        "folder": table.folder,
                        "mark": table.mark,
                        "samples": table.samples,
                        "seconds": {"forwards": table.seconds.forwards, "total": table.seconds.total},
                    }
                )
        return {
            **about,
            "made": datetime.now().isoformat(timespec="seconds"),
            "versions": versions("opencv-python-headless"),
            "methods": self.methods,
            "protocols": {
                name: {
                    "name": entry_of(protocol)[0],
                    "source": protocol.source,
                    "parameters": protocol.parameters(),
                    "figures": dict(protocol.figures),
                }
                for name, protocol in self.protocols.items()
            },
            "results": results,
            "curves": curves,
            "explain": self.explain,
            "tables": rows,
        }

    def save(self, folder: str | Path) -> Path:
        """Write evaluation.json, whole or not at all, and return its path; the rows stay where they are."""
        text = json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False, indent=1)
        return write_file(Path(folder) / FILE, text.encode())

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """An evaluation from its evaluation.json, or the folder that holds it, with its rows.

        Raises InputError for a file that is none, and rows that are not beside it.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            protocols = {name: _rebuilt(own) for name, own in about["protocols"].items()}
            listed = about["tables"]
        except FileNotFoundError:
            raise InputError(f"{path}: there is no such file; `clipfast eval` writes one.") from None
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not what `clipfast eval` writes: {error}") from error
        read: dict[str, list[Shard]] = {}
        tables: dict[str, dict[str, Table]] = {}
        for one in listed:
            method, protocol, folder, samples = (one[key] for key in ("method", "protocol", "folder", "samples"))
            if folder not in read:
                read[folder] = [Shard.read(file) for file in sorted((path.parent / folder).glob("*.parquet"))]
            shards = [s.upto(samples) for s in read[folder] if s.start < samples]
            marked = sorted((s for s in shards if s.marks.get(protocol) == one["mark"]), key=lambda s: s.stop)
            # Of files that begin alike, the longest.
            longest = {s.start: s for s in marked}
            kept = [longest[start] for start in sorted(longest)]
            if sum(s.stop - s.start for s in kept) < samples:
                raise InputError(
                    f"{path.parent / folder} lacks rows of {protocol} for some of {samples} samples: "
                    "the folder `rows` belongs beside evaluation.json, as `clipfast eval` wrote it."
                )
            tables.setdefault(method, {})[protocol] = Table.of(kept, protocol, folder, one["mark"], samples)
        names = ("model", "data", "samples", "seed", "prompt", "templates", "methods", "explain", "errors", "seconds")
        return cls(**{name: about[name] for name in names}, protocols=protocols, tables=tables, out=path.parent)


def merged(parts: Sequence[Evaluation]) -> Evaluation:
    """Several evaluations of one model, data set and seed as one; of a table that several have, the first one's.

    Raises InputError where they are of different models or data.
    """
    first = parts[0]
    whole = Evaluation(
        **{name: getattr(first, name) for name in ("model", "data", "seed", "prompt", "templates", "out")},
        samples=max(part.samples for part in parts),
        methods={},
        protocols={},
        tables={},
        explain={},
        errors={},
        seconds=sum(part.seconds for part in parts),
    )
    for part in parts:
        if (part.model, part.data, part.seed, part.prompt) != (first.model, first.data, first.seed, first.prompt):
            raise InputError(f"evaluations of {part.model} on {part.data} and {first.model} on {first.data} are two.")
        whole.protocols |= {name: own for name, own in part.protocols.items() if name not in whole.protocols}
        whole.methods |= {name: own for name, own in part.methods.items() if name not in whole.methods}
        whole.explain |= {name: own for name, own in part.explain.items() if name not in whole.explain}
        whole.errors |= part.errors
        for method, tables in part.tables.items():
            whole.tables[method] = tables | whole.tables.get(method, {})
    return whole


def needed(protocol: Protocol, columns: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The columns that a summary reads: resampling the points of curves, too, would take most of the time."""
    if type(protocol).summary is Protocol.summary:
        return {name: columns[name] for name in protocol.figures}
    return columns


def _curve(points: Mapping[float, Tensor], groups: Tensor) -> Curve:
    at = sorted(points)
    values = torch.stack([points[one] for one in at])
    counted = values.isfinite().all(0)
    values, which = values[:, counted], groups.unique(return_inverse=True)[1][counted]
    if not len(which):
        return Curve([], [], [])
    mean = values.mean(1, keepdim=True)
    # Prompts of one sample are not independent: their deviations are summed before they are squared.
    sums = values.new_zeros(len(at), int(which.max()) + 1).index_add_(1, which, values - mean)
    band = 1.96 * sums.square().sum(1).sqrt() / values.shape[1]
    # Steps that carry numbers are equal parts of the whole.
    whole = at[-1] if at[-1] > 1 else 1.0
    return Curve([one / whole for one in at], mean[:, 0].tolist(), band.tolist())


def _rebuilt(own: Mapping[str, Any]) -> Protocol:
    parameters = {k: tuple(v) if isinstance(v, list) else v for k, v in own["parameters"].items()}
    fixed = entry_of(build_protocol(own["name"]))[1].preset
    return build_protocol(own["name"], **{k: v for k, v in parameters.items() if k not in fixed})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
