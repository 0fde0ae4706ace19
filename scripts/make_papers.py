"""Write docs/papers.md from the papers' tables in docs/papers/*.json: python scripts/make_papers.py

python scripts/make_papers.py imagenet_curves runs/papers/imagenet-curves    first puts what a run measured into a table

A table holds a paper's figures as published, where they were found, the command that measures the same with clipfast,
and what is known to differ.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipfast.metrics.evaluation import Evaluation

DOCS = Path(__file__).parent.parent / "docs"
FOLDER, PAGE = DOCS / "papers", DOCS / "papers.md"
PAPERS = ("Grad-ECLIP", "MMEL", "TCLIP", "NIB", "AFT", "FARE")

ABOUT = """# The papers' tables

Figures as published, beside what clipfast measures on the same data by the nearest protocol, and the command for it. A
column called clipfast is empty where nobody has run the command yet: neither the data nor the weights were at hand when
this page was written. The tests run every command, on small trees of the data's shape and with small models.

Equal figures are not to be expected. Papers leave out steps, thresholds and the number of pictures, and on ImageNet-S
the same method has an AP of 0.57 in one and of 0.77 in another; what is known to differ stands below each table.
Compare methods within a column, not columns with one another.

Of MGA-CLIP no figures are public. Those of M2IB, CLIP Surgery, gScoreCAM and Chefer's method are given as later papers
print them.

`scripts/make_papers.py` writes this page from `docs/papers/`; `python scripts/make_papers.py TABLE RUN` first puts into
a table what a run measured.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", nargs="?", help="whose clipfast columns are to be filled in")
    parser.add_argument("run", nargs="?", type=Path, help="the folder that its command wrote")
    arguments = parser.parse_args()
    if arguments.table is not None:
        if arguments.run is None:
            parser.error("a table needs the folder of a run.")
        from clipfast.metrics.evaluation import Evaluation

        path = FOLDER / f"{arguments.table}.json"
        filled = measured(json.loads(path.read_text()), Evaluation.load(arguments.run))
        path.write_text(json.dumps(filled, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(tables()))
    print(PAGE)


def tables() -> dict[str, dict[str, Any]]:
    """Every table by its file's name, in the papers' order."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
    return dict(sorted(found.items(), key=lambda one: PAPERS.index(one[1]["paper"])))


def measured(table: dict[str, Any], found: Evaluation) -> dict[str, Any]:
    """The table with an evaluation's figures in place of what was measured before; rows of other methods stay."""
    rows = []
    for row in table["rows"]:
        values = list(row["measured"])
        for i, column in enumerate(table["columns"]):
            own = found.tables.get(row["clipfast"], {})
            for name in own:
                if name.split(":")[0] == column.get("protocol"):
                    values[i] = round(column["scale"] * value(found, row["clipfast"], name, column["figure"]), 6)
        rows.append({**row, "measured": values})
    return {**table, "rows": rows}


def value(found: Evaluation, method: str, protocol: str, figure: str) -> float:
    """One of the protocol's figures, or the mean of one of its columns."""
    for one in found.figures(method, protocol):
        if one.name == figure:
            return one.value
    return float(found.tables[method][protocol].columns[figure].nanmean())


def page(found: dict[str, dict[str, Any]]) -> str:
    parts = [ABOUT]
    for paper in dict.fromkeys(table["paper"] for table in found.values()):
        parts.append(f"## {paper}\n")
        parts += [section(table) for table in found.values() if table["paper"] == paper]
    return "\n".join(parts)


def section(table: dict[str, Any]) -> str:
    """A table with its source, its command and what differs."""
    same = [i for i, column in enumerate(table["columns"]) if "protocol" in column]
    heads, marks = ["method", "in clipfast"], ["---", "---"]
    for i, column in enumerate(table["columns"]):
        heads += [f"{column['name']} {'↑' if column['better'] == 'higher' else '↓'}"] + ["clipfast"] * (i in same)
        marks += ["--:"] * (1 + (i in same))
    lines = [f"### {table['title']}", "", table["source"] + ".", ""]
    lines += [line(heads), line(marks)]
    for row in table["rows"]:
        cells = [row["method"], f"`{row['clipfast']}`" if row["clipfast"] else ""]
        for i, (published, own) in enumerate(zip(row["published"], row["measured"], strict=True)):
            cells += [number(published, table, i)] + [number(own, table, i)] * (i in same)
        lines.append(line(cells))
    lines.append("")
    if table["command"]:
        lines += ["```bash", *wrapped(table["command"]), "```", ""]
    return "\n".join([*lines, table["differs"], ""])


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def number(value: float | None, table: dict[str, Any], column: int) -> str:
    """A figure with as many places as those of its column have at most."""
    if value is None:
        return ""
    places = max(len(str(row["published"][column]).partition(".")[2]) for row in table["rows"])
    return f"{value:.{places}f}"


def wrapped(command: str) -> list[str]:
    """A command, one option a line."""
    first, *options = command.replace(" --", "\n--").split("\n")
    lines = [first, *(f"    {option}" for option in options)]
    return [f"{one} \\" for one in lines[:-1]] + lines[-1:]


if __name__ == "__main__":
    main()
