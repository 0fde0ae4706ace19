"""`clipfast diff`: what a fine-tuning changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from clipfast.cli.console import note, print_json, print_paths, progress, shown, status, stdout
from clipfast.cli.folders import staging
from clipfast.cli.options import Device, Json, Out, Precision, Resize, Texts, check_device, warn_of_demo
from clipfast.errors import InputError

if TYPE_CHECKING:
    from clipfast.metrics.comparison import Comparison

_DATA, _CLASSES = "scenes:1", "classes"
# Characters of the column of figures and protocols; longer names are folded where the terminal is narrow.
_FIGURES = 20


def diff(
    before: Annotated[
        str, typer.Argument(metavar="BEFORE", help='"ViT-B-16:openai", "demo", "hf:org/name" or a checkpoint\'s path.')
    ],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="The same of what it became.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[IMAGE]", hidden=True)] = None,
    images: Annotated[
        list[str] | None,
        typer.Option("--images", "-i", metavar="IMAGE", help="Files, folders or patterns to look at, for the texts."),
    ] = None,
    texts: Texts = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help='What to measure on: "scenes:SEED", or "NAME:FOLDER" such as "folder:/data/birds"; by default the '
            f'images, or "{_DATA}".',
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Samples at most.")] = 50,
    method: Annotated[
        str | None,
        typer.Option(help='One of `clipfast methods`, parameters behind colons: "mmel:beta=0.5".'),
    ] = None,
    protocols: Annotated[
        str | None, typer.Option(help="Of maps, with commas, as for `clipfast eval`; by default a few that fit.")
    ] = None,
    concepts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help=f'Words to describe neurons by, one a line; "{_CLASSES}" for those of the data.'
        ),
    ] = None,
    robust: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Attack N of the pictures, too (slow on a CPU).")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Fit a linear probe to either tower, too (needs pictures of every class).")
    ] = False,
    show: Annotated[int, typer.Option(min=0, help="Pictures on the page.")] = 12,
    out: Out = None,
    as_json: Json = False,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that draws at random.")] = 0,
    split: Annotated[str | None, typer.Option(help="Part of the data set, such as val.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help='What is asked of an object, with {} for its name: "a photo of a {}."')
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Masked images that go through the model at once.")] = 32,
    device: Device = None,
    precision: Precision = None,
    resize: Resize = None,
) -> None:
    """Compare two checkpoints on the same pictures: maps side by side, and what their differences come to.

    clipfast diff demo runs/aft/model
    clipfast diff ViT-B-16:openai runs/aft/model -d imagenet_s:/data/imagenet-s --limit 200
    clipfast diff ViT-B-16:openai tuned.pt --images photos/ -t "a dog" -t "a cat"
    clipfast diff before.pt after.pt -d folder:/data/birds --robust 50 --concepts words.txt

    Writes diff.json and diff.html to runs/diff, runs/diff-2 and so on, or to --out.
    """
    looked = [*(images or []), *(more or [])]
    if texts and not looked:
        raise InputError("-t goes with --images; a data set's pictures are asked for what is in them.")
    if looked and not texts:
        raise InputError('say what to look for in the images with at least one -t, such as -t "a dog".')
    check_device(device)
    from clipfast.data.datasets import open_dataset
    from clipfast.data.images import expand
    from clipfast.models.load import load

    found_images = expand(looked) if looked else None
    data = _DATA if data is None and not looked else data
    dataset = None if data is None else open_dataset(data, split=split, limit=limit)
    words = _concepts(concepts, dataset)
    status(f"loading {before} and {after} ...")
    one, other = (load(name, device=device) for name in (before, after))
    if found_images or not str(data).startswith("scenes"):
        for name in {before, after}:
            warn_of_demo(name)
    from clipfast.metrics.diff import Differ
    from clipfast.metrics.registry import listed

    options: dict[str, Any] = {"seed": seed, "batch": batch, "precision": precision, "resize": resize, "prompt": prompt}
    with staging(out, "diff") as stage:
        differ = Differ(
            one,
            other,
            dataset,
            images=found_images,
            texts=texts or [],
            method=method,
            protocols=None if protocols is None else listed(protocols),
            limit=limit,
            concepts=words,
            robust=robust,
            probe=probe,
            show=show,
            names=(before, after) if before != after else None,
            **options,
        )
        found = differ(progress)
        written = [path.name for path in found.save(stage.path)]
        folder = stage.publish()
    for sentence in (*found.notes, *found.errors.values()):
        note(sentence)
    if as_json:
        print_json({**found.to_json(), "folder": str(folder), "report": str(folder / written[-1])})
        return
    _print(found)
    typer.echo(f"figures are in {shown(folder / written[0])}, one page with maps and histograms:")
    print_paths(folder / written[-1])


def _concepts(given: str | None, dataset: Any) -> Sequence[str]:
    """Words of a file, or the data set's classes. Raises InputError where there are none."""
    if given is None:
        return []
    if given == _CLASSES:
        if dataset is None or dataset.classes is None:
            raise InputError(f"--concepts {_CLASSES} needs a data set with classes: name one with --data, or a file.")
        return list(dataset.classes)
    from clipfast.engine.texts import read_texts

    return read_texts(Path(given))


def _print(found: Comparison) -> None:
    from clipfast.view.diff_page import probability, signed
    from clipfast.view.scoreboard import number

    console = stdout()
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(overflow="fold", min_width=_FIGURES)
    for name in ("before", "after", "difference", "95 % interval", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    last = ""
    for row in found.rows():
        if row.protocol != last:
            table.add_row(Text(row.protocol, style="bold"))
            last = row.protocol
        name = f"  {row.name}" + {"higher": " ↑", "lower": " ↓"}.get(row.better, "")
        cells = [name, number(row.before[0]), number(row.after[0])]
        if row.difference is None or row.low is None or row.high is None or row.p is None:
            table.add_row(*cells, "–", "–", "–")
            continue
        style = {"better": "bold green", "worse": "bold red", "changed": "bold"}.get(row.verdict, "")
        interval = f"{signed(row.low)} to {signed(row.high)}"
        table.add_row(*cells, Text(signed(row.difference), style=style), interval, probability(row.p))
    console.print(table)
    console.print()
    for name, one in found.between.items():
        console.print(
            Text.assemble(
                f"{name}: ", (number(one.value), "bold"), (f"  {number(one.low)} to {number(one.high)}", "dim")
            )
        )
    for name, count in found.counts.items():
        console.print(Text.assemble(f"{name}: ", (f"{count:,}", "bold")))
    console.print(
        f"\n{found.pairs:,} pairs of {found.samples:,} pictures of {found.data}, {found.method}, seed {found.seed}, "
        f"{found.seconds:.0f} s; paired bootstrap over pictures; bold where the interval leaves out 0",
        style="dim",
        soft_wrap=True,
    )
