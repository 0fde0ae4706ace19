"""ROAR of the demo model on scenes of one object: what a linear probe still learns from what maps leave over.

    python scripts/make_roar.py              some twenty minutes on a core; stopped, it goes on where it was
    python scripts/make_roar.py --limit 500  all of it on fewer scenes, to see that it works

Features and hits are kept in runs/roar; figures, table and curves go to docs/scoreboard.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from clipfast.data.datasets.rendered import RenderedScenes
from clipfast.metrics.base import compare, figures
from clipfast.metrics.orders import AtRandom, ByMaps, Order, Split
from clipfast.metrics.roar import Roar
from clipfast.models.load import load
from clipfast.versions import versions
from clipfast.view.files import write_file

METHODS = ("grad_eclip", "mask_clip", "tclip", "grad_cam")
BASELINES = ("random", "random patches")
TRAIN, TEST = 1500, 600


class TrueMasks(Order):
    """The object's own pixels first, then the background's, each in random order: a map that knows where it is."""

    name = "true masks"

    def __init__(self, train: RenderedScenes, test: RenderedScenes):
        self.data = {"train": train, "test": test}
        self.at_random = AtRandom()

    def maps(self, x: Tensor, labels: Sequence[int], numbers: Sequence[int], split: Split) -> Tensor:
        masks = [self.data[split][number].targets[0].mask for number in numbers]
        return torch.from_numpy(np.stack(masks)).float() + self.at_random.maps(x, labels, numbers, split)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=TRAIN, help="scenes to train on at most")
    parser.add_argument("--rows", type=Path, default=Path("runs/roar"), help="folder of features and hits")
    parser.add_argument("--out", type=Path, default=Path("docs/scoreboard"), help="folder of figures and curves")
    given = parser.parse_args()

    model = load("demo", device="cpu")
    tower, _ = model.towers()
    # Seeds that the demo model was not trained on, as the scoreboard's are.
    train, test = RenderedScenes(2, given.limit, objects=1), RenderedScenes(3, min(TEST, given.limit), objects=1)
    roar = Roar()
    orders: list[Order] = [ByMaps(model, name, train.classes) for name in METHODS]
    orders += [TrueMasks(train, test), AtRandom(), AtRandom(cells=tower.grid)]
    columns = {}
    for order in orders:
        print(order.name, flush=True)
        columns[order.name] = roar.measure(
            model, order, train, test, folder=given.rows, progress=lambda done: print(f"  {done}", flush=True)
        )
    found = {
        "protocol": {"name": roar.name, "source": roar.source, **asdict(roar)},
        "model": model.name,
        "data": {"train": [train.name, len(train)], "test": [test.name, len(test)]},
        "classes": train.classes,
        "versions": versions(),
        "orders": {
            name: {
                "figures": [asdict(figure) for figure in figures(roar, own)],
                "area by seed": roar.by_seed(own),
                "differences": {
                    base: [asdict(one) for one in compare(roar, own, columns[base])]
                    for base in BASELINES
                    if base != name
                },
            }
            for name, own in columns.items()
        },
    }
    write_file(given.out / "roar.json", json.dumps(found, indent=1).encode())
    write_file(given.out / "roar.png", curves(roar, found["orders"]))
    print(write_file(given.out / "roar.md", table(roar, found).encode()))


def table(roar: Roar, found: dict[str, Any]) -> str:
    """The figures as a page: one row an order, the area first, with its interval."""
    heads = ["", "area", *(f"{share:g}" for share in (0, *roar.shares))]
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    for name, own in sorted(found["orders"].items(), key=lambda item: item[1]["figures"][0]["value"]):
        area, *points = own["figures"]
        cells = [f"{name}", f"{area['value']:.3f} ({area['low']:.3f} to {area['high']:.3f})"]
        lines.append(" | ".join([*cells, *(f"{point['value']:.3f}" for point in points)]))
    (_, trained), (_, tested) = found["data"]["train"], found["data"]["test"]
    rows = chr(10).join(f"| {line} |" for line in lines)
    return f"""# ROAR of the demo model

Accuracy of a linear probe on the frozen tower, trained anew on scenes of one object from which the pixels that each
map ranks first are gone: {trained:,} scenes to train on, {tested:,} to test on, {len(found["classes"])} classes, means
of {len(roar.seeds)} seeds. Lower is better; the area is the mean over shares, with a 95 % interval over test scenes.
`make roar` makes this page; `roar.json` has every interval, and paired differences from the random orders.

"true masks" takes the object's own pixels first, then the background's. Most methods cut their maps off at zero, and
pixels of equal value go in reading order: where a map is above zero for a tenth of the pixels, the curve's left end is
the method's, and the rest says whether it had missed parts of the object.

{rows}

![Accuracy over the share of pixels that is gone](roar.png)
"""


def curves(roar: Roar, orders: dict[str, Any]) -> bytes:
    """The accuracies over the share that is gone, as a PNG."""
    figure = Figure(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    shares = [0.0, *roar.shares]
    for name, own in orders.items():
        points = own["figures"][1:]
        (line,) = axes.plot(
            shares, [p["value"] for p in points], "--" if name.startswith("random") else "-", label=name
        )
        axes.fill_between(
            shares, [p["low"] for p in points], [p["high"] for p in points], color=line.get_color(), alpha=0.12, lw=0
        )
    axes.set(xlabel="share of pixels that is gone", ylabel="accuracy after retraining", ylim=(0, 1), xlim=(0, 0.9))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


if __name__ == "__main__":
    main()
