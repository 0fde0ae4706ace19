"""Write docs/methods-cost.md from the claims in benchmarks/results/methods/: python benchmarks/methods_page.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from claims import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "methods-cost.md"

ABOUT = """# What each method costs

`make bench` measures these figures and writes this page (`benchmarks/bench_*.py`; raw figures in
`benchmarks/results/methods/`). A figure is a ratio: the time of a call over that of the table's first row, both in the
same round of one interleaved run (A B A B); the median over the rounds, lowest and highest in brackets. Before anything
is timed, its numbers are compared with those of what it is timed against, or with the definition in float64.

What [Grad-ECLIP itself costs](benchmarks.md) has a page of its own.
"""


def main() -> None:
    folders = (RESULTS, RESULTS.parent / "finetune")
    claims = [json.loads(path.read_text()) for folder in folders for path in sorted(folder.glob("*.json"))]
    PAGE.write_text("\n".join([ABOUT, targets(claims), *(table(claim) for claim in claims), *machines(claims), ""]))
    print(PAGE)


def targets(claims: list[dict[str, Any]]) -> str:
    """What was to be reached, in one table."""
    lines = ["## The targets", "", "| | measured | at most | in units of |", "|---|--:|--:|---|"]
    for claim in claims:
        rows = [(row, claim["unit"]) for row in claim["rows"] if row["at_most"] is not None]
        rows += [(row, "each other") for row in claim.get("against", [])]
        lines += [
            f"| {claim['title']}: {row['subject']} | **{row['ratio']:.2f}** | {row['at_most']:g} | {unit} |"
            for row, unit in rows
        ]
    return "\n".join([*lines, ""])


def table(claim: dict[str, Any]) -> str:
    lines = [
        f"## {claim['title']}",
        "",
        f"One unit is {claim['unit']}; {claim['rounds']} rounds.",
        "",
        "| | time / unit | at most | relative error |",
        "|---|--:|--:|--:|",
    ]
    for row in claim["rows"]:
        figure = f"**{row['ratio']:.2f}** ({row['low']:.2f}-{row['high']:.2f})"
        limit = "" if row["at_most"] is None else f"{row['at_most']:g}"
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        lines.append(f"| {row['subject']} | {figure} | {limit} | {error} |")
    return "\n".join([*lines, "", *([claim["notes"], ""] if claim["notes"] else [])])


def machines(claims: list[dict[str, Any]]) -> list[str]:
    said = sorted({tuple(str(c["machine"][k]) for k in ("cpu", "cores", "threads", "torch")) for c in claims})
    lines = ["## Where", ""]
    lines += [f"- {cpu}, {cores} cores, {threads} thread(s), torch {version}" for cpu, cores, threads, version in said]
    return [
        *lines,
        "",
        "Other work shared the machine, which the brackets show and which interleaving takes out of the medians.",
    ]


if __name__ == "__main__":
    main()
