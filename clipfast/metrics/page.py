"""An evaluation as a page, with the examples that an `Evaluator` explained for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from clipfast.methods import METHODS
from clipfast.metrics.evaluate import Example
from clipfast.metrics.evaluation import Evaluation
from clipfast.metrics.registry import entry_of
from clipfast.versions import versions
from clipfast.view.scoreboard import Board, Cell, Column, Lines, Shown, write_scoreboard

_NOTE = (
    "Methods by named protocols, whose parameters are at the end of the page: figures of other protocols, or of the "
    "same ones with other parameters, do not compare with these."
)
_DEMO = (
    " The demo model only knows drawings of 64 everyday things; what holds for it and its scenes need not hold for "
    "photographs."
)


def write_page(
    path: str | Path,
    found: Evaluation,
    examples: Mapping[str, tuple[Sequence[Example], Sequence[Example]]] | None = None,
    *,
    title: str | None = None,
) -> Path:
    """Write one self-contained HTML page with everything that an evaluation found, and return its path.

    Raises OSError as the file system does.
    """
    telling = found.telling()
    columns = [(protocol, i) for protocol, own in found.protocols.items() for i in range(len(own.figures))]
    board = Board(
        title=title or f"Explanations of {found.model} on {found.data}",
        note=_NOTE + (_DEMO if found.model == "demo" else ""),
        facts=_facts(found),
        methods=list(found.methods),
        columns=[_column(found, protocol, i) for protocol, i in columns],
        cells={name: _cells(found, name, columns) for name in found.methods},
        lines=[lines for protocol in found.protocols for lines in _lines(found, protocol)],
        examples={
            name: ([_shown(one) for one in best], [_shown(one) for one in worst])
            for name, (best, worst) in (examples or {}).items()
        },
        telling=f"{telling[1]} of {telling[0]} ({telling[2]} is better)" if telling else "",
        timings={name: _timings(found, name) for name in found.methods},
        parameters={
            "protocol": [
                (name, protocol.source, spelled(protocol.parameters())) for name, protocol in found.protocols.items()
            ],
            "method": [
                (name, METHODS[own["method"]].info.source, spelled(own["parameters"]))
                for name, own in found.methods.items()
            ],
        },
        versions=versions("opencv-python-headless"),
        failures=found.errors,
    )
    return write_scoreboard(path, board)


def spelled(parameters: Mapping[str, Any]) -> str:
    """Parameters in one line."""
    return ", ".join(f"{name}={_short(value)}" for name, value in parameters.items()) or "none"


def _short(value: Any) -> str:
    if isinstance(value, tuple | list) and len(value) > 6:
        return f"{value[0]:g}, {value[1]:g}, ... {value[-1]:g}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _facts(found: Evaluation) -> dict[str, str]:
    counts = sorted({table.samples for own in found.tables.values() for table in own.values()})
    pairs = sorted({len(table.keys) for own in found.tables.values() for table in own.values()})
    return {
        "Model": found.model,
        "Data": found.data,
        "Images": " and ".join(f"{count:,}" for count in counts),
        "Pairs of image and text": " and ".join(f"{count:,}" for count in pairs),
        "Asked for": found.prompt.replace("{}", "NAME"),
        "Class templates": found.templates if isinstance(found.templates, str) else f"{len(found.templates)} given",
        "Seed": str(found.seed),
        "Made": datetime.now().strftime("%Y-%m-%d %H:%M"),
    }


def _column(found: Evaluation, protocol: str, number: int) -> Column:
    own = found.protocols[protocol]
    name, better = list(own.figures.items())[number]
    return Column(protocol, name, better, f"{entry_of(own)[0]}: {spelled(own.parameters())}; {own.source}")


def _cells(found: Evaluation, method: str, columns: Sequence[tuple[str, int]]) -> dict[int, Cell]:
    cells = {}
    for place, (protocol, number) in enumerate(columns):
        if protocol in found.tables[method]:
            one = found.figures(method, protocol)[number]
            best = method in found.best(protocol, number)
            apart = method not in found.compared(protocol)
            cells[place] = Cell(one.value, one.error, one.low, one.high, one.count, best, apart)
    return cells


def _lines(found: Evaluation, protocol: str) -> list[Lines]:
    curves = {name: found.curves(name, protocol) for name in found.methods if protocol in found.tables[name]}
    names = list(dict.fromkeys(name for own in curves.values() for name in own))
    charts = []
    for name in names:
        own = {method: some[name] for method, some in curves.items() if name in some and some[name].at}
        better = found.protocols[protocol].figures.get(name, "higher")
        if own:
            charts.append(
                Lines(
                    f"{name}, {protocol}",
                    better,
                    "The score against the share of the way",
                    next(iter(own.values())).at,
                    {method: (curve.mean, curve.band) for method, curve in own.items()},
                )
            )
    return charts


def _shown(one: Example) -> Shown:
    mask = None if one.mask is None else one.mask.numpy()
    return Shown(one.text, one.value, one.picture, one.heat, one.palette, mask)


def _timings(found: Evaluation, method: str) -> dict[str, str]:
    times = {"maps": _duration(found.explain[method])}
    for protocol, table in found.tables[method].items():
        each, seconds = table.seconds.total / max(len(table.keys), 1), table.seconds
        beside = f", {1 - seconds.forwards / seconds.total:.0%} beside" if seconds.forwards else ""
        times[protocol] = _duration(each) + beside
    return times


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
