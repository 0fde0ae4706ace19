"""A benchmark in one picture: every path's time in encodes."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from clipfast.bench.report import MODEL, OURS

if TYPE_CHECKING:
    from clipfast.bench.report import Report

_MARKS = "os^DvP*X"


def draw(report: Report) -> bytes:
    """The bytes of a PNG: a panel a batch, precision and backend; points are medians, lines reach from the lowest to
    the highest round."""
    tables = [(title, [row for row in rows if row.timed and row.by != MODEL]) for title, rows in report.tables()]
    tables = [(title, rows) for title, rows in tables if rows] or [("nothing was timed", [])]
    prompts = sorted({row.prompts for _, rows in tables for row in rows})
    names = list(dict.fromkeys((r.by, r.method) for _, rows in tables for r in rows))
    height = 1.2 + 0.32 * max(len(names), 3)
    figure = Figure(figsize=(9, height * len(tables)), layout="constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False)[:, 0]
    for panel, (title, rows) in zip(panels, tables, strict=True):
        shown = list(dict.fromkeys((r.by, r.method) for r in rows))
        for number, count in enumerate(prompts):
            own = [row for row in rows if row.prompts == count]
            if not own:
                continue
            found = [row.figures() for row in own]
            x = [float(f["ratio"] or 0) for f in found]
            reach = [
                [a - float(f["ratio_low"] or 0) for a, f in zip(x, found, strict=True)],
                [float(f["ratio_high"] or 0) - a for a, f in zip(x, found, strict=True)],
            ]
            y = [shown.index((row.by, row.method)) + 0.12 * (number - (len(prompts) - 1) / 2) for row in own]
            label = f"{count:,} prompt{'s' if count > 1 else ''}"
            mark = _MARKS[number % len(_MARKS)]
            panel.errorbar(x, y, xerr=reach, fmt=mark, markersize=5, elinewidth=1, alpha=0.9, label=label)
        panel.axvline(1, color="0.6", linewidth=1, zorder=0)
        panel.set_xscale("log")
        panel.set_yticks(range(len(shown)), [method if by == OURS else by for by, method in shown])
        panel.invert_yaxis()
        panel.set_title(title, loc="left", fontsize=10)
        panel.grid(axis="x", which="both", color="0.92")
        panel.set_axisbelow(True)
        if rows:
            panel.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    panels[-1].set_xlabel(f"time, in encodes of the same images ({report.model}; {report.where()})", fontsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return stream.getvalue()
