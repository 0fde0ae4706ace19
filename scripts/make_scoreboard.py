"""The scoreboard: every method by every protocol, with the demo model on rendered scenes.

    python scripts/make_scoreboard.py              hours; stopped, it goes on where it was
    python scripts/make_scoreboard.py --limit 4    all of it on four scenes, to see that it works
    python scripts/make_scoreboard.py --so-far     nothing is measured, page and tables show what has been

Where an object is, is asked of 2,000 scenes; what runs the model for every pixel that goes, words, what is absent or
pasted, and methods that take hundreds of passes, of the first 200 of them; what explains again and again, of the first
50. Rows are kept in runs/scoreboard, which `clipfast eval --compare` reads; page and figures go to docs/scoreboard.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from clipfast.cli.console import progress
from clipfast.data.datasets import open_dataset
from clipfast.methods import METHODS
from clipfast.metrics.evaluate import Evaluator
from clipfast.metrics.evaluation import Evaluation, merged
from clipfast.metrics.page import write_page
from clipfast.metrics.registry import PROTOCOLS
from clipfast.models.load import load
from clipfast.models.model import Model
from clipfast.view.files import write_file

SCENES = "scenes:1:2000"
# Methods that run the model on hundreds of masked images for one explanation.
SLOW = ("score_cam", "gscore_cam", "group_cam", "rise", "kernel_shap")
ROAD, NOISE, CASCADE = "road", "stability/ssim", "sanity/cascade"
# Methods whose maps are shares of the score, which alone can add up to it.
SHARES = ("integrated_gradients",)
STEPS = {"deletion+insertion/rise": "deletion+insertion/rise:steps=28"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="scenes at most, of every part")
    parser.add_argument("--so-far", action="store_true", help="show what is there, method by method")
    parser.add_argument("--rows", type=Path, default=Path("runs/scoreboard"), help="folder of the rows")
    parser.add_argument("--out", type=Path, default=Path("docs/scoreboard"), help="folder of page and figures")
    given = parser.parse_args()

    model = load("demo")
    tower, _ = model.towers()
    methods = [name for name, m in METHODS.items() if "image" in m.sides() and m.why_not(tower) is None]
    fast = [name for name in methods if name not in SLOW]
    readers = [name for name, m in METHODS.items() if "text" in m.sides()]
    once = [name for name, entry in PROTOCOLS.items() if entry.side == "image" and not entry.again]
    still = [name for name in once if not PROTOCOLS[name].runs_model]
    perturbed = [STEPS.get(n, n) for n in once if PROTOCOLS[n].runs_model and n not in ("completeness", ROAD)]
    words = [name for name, entry in PROTOCOLS.items() if entry.side == "text" and not entry.again]
    twice = [name for name, entry in PROTOCOLS.items() if entry.again and "labels" in entry.needs]
    parts = [
        ("localisation", 2000, fast, still),
        ("localisation, slow methods", 200, [name for name in methods if name in SLOW], still),
        ("faithfulness", 200, methods, perturbed),
        ("imputation", 200, methods, [ROAD]),
        ("completeness", 200, [name for name in SHARES if name in methods], ["completeness"]),
        ("absent and pasted", 200, fast, twice),
        ("words", 200, readers, words),
        ("noise", 50, [name for name in methods if name != "rise"], [NOISE]),
        ("cascade", 50, fast, [CASCADE]),
        ("cascade of words", 50, [name for name in readers if name not in SLOW], ["sanity/cascade/words"]),
    ]
    found = []
    for title, count, some, protocols in parts:
        count = min(count, given.limit or count)
        if given.so_far:
            found += so_far(model, given.rows, count, some, protocols)
            continue
        dataset = open_dataset(SCENES, limit=count)
        evaluator = Evaluator(model, dataset, some, protocols, out=given.rows)
        left = evaluator.left()
        print(f"{title}: {len(some)} methods, {len(protocols)} protocols, {count:,} scenes; {left:,} left", flush=True)
        with progress(title, left) as advance:
            found.append(evaluator(advance))
    whole = merged(found)
    print("figures and examples ...", flush=True)
    whole.save(given.rows)
    dataset = open_dataset(SCENES, limit=min(2000, given.limit or 2000))
    examples = Evaluator(model, dataset, methods, ["energy_pointing_game"], out=given.rows).examples(whole)
    data = {name: value for name, value in whole.to_json().items() if name != "tables"}
    write_file(given.out / "scoreboard.json", json.dumps(data, ensure_ascii=False, indent=1).encode())
    write_file(given.out / "tables.md", tables(whole).encode())
    print(write_page(given.out / "index.html", whole, examples, title="Scoreboard: the demo model on rendered scenes"))


def so_far(model: Model, rows: Path, count: int, methods: list[str], protocols: list[str]) -> list[Evaluation]:
    """Each method on those of the first `count` scenes that most methods have rows of, or on as many as it has."""

    def upto(limit: int, method: str) -> Evaluator:
        return Evaluator(model, open_dataset(SCENES, limit=limit), [method], protocols, out=rows)

    def available(method: str) -> int:
        limit = count
        while limit and (left := upto(limit, method).left()):
            # Files hold 50 scenes; a part of 50 may have been measured on 25.
            limit = max(limit - left, 0) // 50 * 50 or (25 if limit > 25 else 0)
        return limit

    there = {method: found for method in methods if (found := available(method))}
    most = Counter(there.values()).most_common(1)[0][0] if there else 0
    return [upto(min(found, most), method)() for method, found in there.items()]


def tables(whole: Evaluation) -> str:
    """All figures as Markdown, a table for each protocol: the best value bold among methods that the same pairs had."""
    lines = [
        "# The scoreboard's figures",
        "",
        "Means with their bootstrap standard errors. `make scoreboard` writes this.",
        "",
    ]
    for protocol, by in whole.protocols.items():
        own = [name for name in whole.methods if protocol in whole.tables[name]]
        measured = [name for name in own if whole.tables[name][protocol].keys]
        if not measured:
            continue
        figures = {name: whole.figures(name, protocol) for name in measured}
        shown = figures[measured[0]]
        lines += [f"## {protocol}", "", f"{by.source}.", ""]
        arrows = {"higher": "↑", "lower": "↓"}
        lines += ["| | pairs | " + " | ".join(f"{one.name} {arrows.get(one.better, '')}" for one in shown) + " |"]
        lines += ["|---|--:|" + "--:|" * len(shown)]
        for name in measured:
            cells = []
            for number, one in enumerate(figures[name]):
                text = f"{one.value:.3f} ± {one.error:.3f}"
                cells.append(f"**{text}**" if name in whole.best(protocol, number) else text)
            lines.append(f"| {name} | {len(whole.tables[name][protocol].keys):,} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
