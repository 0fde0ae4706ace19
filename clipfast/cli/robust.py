"""`clipfast robust`: zero-shot accuracy under attack."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Annotated, Any

import typer
from rich.table import Table

from clipfast.cli.console import note, print_json, print_paths, progress, status, stdout
from clipfast.cli.folders import staging
from clipfast.cli.options import Device, Json, ModelName, Out, Precision, Pretrained, check_device, warn_of_demo
from clipfast.errors import InputError

_FILE = "robust.json"


def robust(
    model: ModelName = "demo",
    data: Annotated[
        str, typer.Option("--data", "-d", help='"scenes:SEED", or "NAME:FOLDER" such as "imagenet:/data/imagenet".')
    ] = "scenes:1",
    count: Annotated[int, typer.Option("--limit", "-n", min=1, help="Pictures that are attacked at most.")] = 1000,
    radii: Annotated[
        str, typer.Option(help="How far a pixel may move, with commas, on the scale 0..1.")
    ] = "2/255,4/255",
    steps: Annotated[int, typer.Option(min=1, help="Iterations of each attack.")] = 100,
    targets: Annotated[
        int, typer.Option(min=0, help="Nearest wrong classes to attack towards; 0: by cross-entropy alone.")
    ] = 9,
    out: Out = None,
    as_json: Json = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the pictures that are drawn, and of random starts.")] = 0,
    split: Annotated[str | None, typer.Option(help="Part of the data set, such as val.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures that are attacked together.")] = 50,
    pretrained: Pretrained = None,
    device: Device = None,
    precision: Precision = None,
) -> None:
    """Measure zero-shot accuracy where every pixel may move a little for the worse (APGD; minutes to hours on a CPU).

    clipfast robust -n 20 --steps 20
    clipfast robust -m ViT-L-14:openai -d imagenet:/data/imagenet
    clipfast robust -m tuned.pt -d folder:/data/birds --radii 1/255,2/255,4/255

    Writes robust.json to runs/robust, runs/robust-2 and so on, or to --out.
    """
    check_device(device)
    from clipfast.data.datasets import open_dataset
    from clipfast.metrics.robust import RobustAccuracy
    from clipfast.metrics.zero_shot import default_templates
    from clipfast.models.load import load

    # Checked before the model is loaded; its templates are known only then.
    distances = _radii(radii)
    RobustAccuracy(distances)
    dataset = open_dataset(data, split=split)
    status(f"loading {model if pretrained is None else f'{model}:{pretrained}'} ...")
    loaded = load(model, pretrained, device=device)
    if not data.startswith("scenes"):
        warn_of_demo(model)
    protocol = RobustAccuracy(distances, steps, targets, count, batch, default_templates(loaded, dataset), seed)
    options: dict[str, Any] = {"precision": precision, "on_error": "skip"}
    with staging(out, "robust") as stage:
        with progress("attacks", min(count, len(dataset)) * protocol.runs) as advance:
            found = protocol.attack(loaded, dataset, progress=advance, **options)
        document = {
            "model": loaded.name,
            "data": dataset.name,
            "parameters": protocol.parameters(),
            "results": [
                {
                    "figure": one.name,
                    **{
                        key: value if math.isfinite(value := getattr(one, key)) else None
                        for key in ("value", "error", "low", "high")
                    },
                    "count": one.count,
                }
                for one in found.figures()
            ],
            "invalid": found.invalid,
            "seconds": found.seconds,
        }
        (stage.path / _FILE).write_text(json.dumps(document, allow_nan=False, indent=1), encoding="utf-8")
        folder = stage.publish()
    if found.invalid:
        note(f"{found.invalid} answers of the attacks were no pictures within the radius (NaN) and count for nothing.")
    if as_json:
        print_json({**document, "folder": str(folder)})
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("accuracy")
    for name in ("value", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found.figures():
        table.add_row(one.name, f"{one.value:.3f}", f"{one.low:.3f} to {one.high:.3f}")
    console = stdout()
    console.print(table)
    console.print(
        f"{len(found.columns['clean']):,} pictures of {dataset.name}, {loaded.name}, {steps} iterations, seed {seed}, "
        f"{found.seconds:.0f} s; robust accuracy is an upper bound",
        style="dim",
        soft_wrap=True,
    )
    print_paths(folder / _FILE)


def _radii(text: str) -> tuple[float, ...]:
    """Numbers or fractions with commas between them, each once, in their order. Raises InputError for anything else."""
    try:
        return tuple(sorted({float(Fraction(part.strip())) for part in text.split(",")}))
    except (ValueError, ZeroDivisionError):
        raise InputError(f"--radii {text!r} should read as 2/255,4/255 or 0.01 does.") from None
