"""`clipfast eval`: which method to trust on a model and data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from clipfast.cli.console import note, print_json, print_paths, progress, shown, status, stdout
from clipfast.cli.group import INTERRUPTED
from clipfast.cli.options import Device, Json, ModelName, Out, Precision, Pretrained, Resize, check_device, warn_of_demo
from clipfast.errors import InputError, nearest

if TYPE_CHECKING:
    from clipfast.metrics.calibrate import Calibrator
    from clipfast.metrics.evaluate import Evaluator
    from clipfast.metrics.evaluation import Evaluation
    from clipfast.metrics.registry import Side

_PAGE, _SETTINGS = "report.html", "settings.json"


def evaluate(
    model: ModelName = "demo",
    data: Annotated[
        str, typer.Option("--data", "-d", help='"scenes:SEED", or "NAME:FOLDER" such as "imagenet:/data/imagenet".')
    ] = "scenes:1",
    methods: Annotated[
        str | None,
        typer.Option(help='Of `clipfast methods`, with commas; parameters behind colons, "mmel:beta=0.5"; or "all".'),
    ] = None,
    protocols: Annotated[
        str | None,
        typer.Option(
            help='With commas; parameters behind colons, "occlusion:fractions=0.1,0.2"; or "all" that fit.',
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Samples at most.")] = 50,
    out: Out = None,
    as_json: Json = False,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that draws at random.")] = 0,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            "--compare",
            metavar="JSON",
            help="Test differences instead: of the methods of one evaluation.json, or of two (name --compare twice).",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="With --compare: the method that others are compared with, by default the first."),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help="Search the method's parameters instead, mmel's or those of --grid."),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=V1,V2", help="With --calibrate: values to try of a parameter; repeat for more."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Part of the data set, such as val.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help='What is asked of an object, with {} for its name: "a photo of a {}."')
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Masked images that go through the model at once.")] = 32,
    pretrained: Pretrained = None,
    device: Device = None,
    precision: Precision = None,
    resize: Resize = None,
    more: Annotated[list[Path] | None, typer.Argument(metavar="[JSON]", hidden=True)] = None,
) -> None:
    """Measure methods: how faithful their maps are to the model, and how well they find what a text names.

    clipfast eval
    clipfast eval --methods grad_eclip,mmel,mga_clip --protocols pointing_game,deletion/rise --limit 200
    clipfast eval -m ViT-B-16:openai -d imagenet_s:/data/imagenet-s --limit 500 -o b16
    clipfast eval --methods all --protocols all
    clipfast eval --methods grad_eclip,mmel --protocols deletion/words,deletion/retrieval -d flickr30k:/data/flickr30k
    clipfast eval --calibrate mmel -m ViT-B-16:openai -d imagenet:/data/imagenet --limit 200
    clipfast eval --compare runs/eval/evaluation.json runs/eval-2/evaluation.json

    Writes evaluation.json, report.html and the rows behind them to runs/eval, runs/eval-2 and so on, or to --out. A
    run that was stopped goes on when the same command is given again.
    """
    if compare:
        _compare([*compare, *(more or [])], against, as_json)
        return
    if grid and calibrate is None:
        raise InputError("--grid goes with --calibrate METHOD.")
    if calibrate is not None and methods is not None:
        raise InputError("--calibrate names the method itself: leave --methods out.")
    if more:
        raise InputError(f"{more[0]} is not expected here: name data with --data, evaluations with --compare.")
    check_device(device)
    from clipfast.data.datasets import open_dataset
    from clipfast.models.load import load

    dataset = open_dataset(data, split=split, limit=limit)
    status(f"loading {model if pretrained is None else f'{model}:{pretrained}'} ...")
    loaded = load(model, pretrained, device=device)

    options: dict[str, Any] = {"seed": seed, "batch": batch, "precision": precision, "resize": resize, "prompt": prompt}
    if not data.startswith("scenes"):
        warn_of_demo(model)
    if calibrate is not None:
        _calibrate(loaded, dataset, calibrate, grid or [], protocols, out, as_json, options)
        return
    from clipfast.metrics.evaluate import Evaluator

    chosen = _chosen(methods, protocols, loaded.towers(options["precision"])[0], dataset.offers)
    # Once for what is asked, once more for where its rows are: the folder depends on what is asked.
    folder = _folder(out, "eval", Evaluator(loaded, dataset, *chosen, **options).fingerprint)
    evaluator = Evaluator(loaded, dataset, *chosen, out=folder, **options)
    found = _run(evaluator, folder)
    status("figures and examples ...")
    written = found.save(folder)
    from clipfast.metrics.page import write_page

    page = write_page(folder / _PAGE, found, evaluator.examples(found))
    for sentence in found.errors.values():
        note(f"left out: {sentence}")
    if as_json:
        document = {k: v for k, v in found.to_json().items() if k != "curves"}
        print_json({**document, "folder": str(folder), "report": str(page)})
        return
    _print(found)
    typer.echo(f"figures and rows are in {shown(written.parent)}/, one page with curves and examples:")
    print_paths(page)


def _run(evaluator: Evaluator, folder: Path) -> Evaluation:
    left = evaluator.left()
    if left < evaluator.whole:
        status(f"{evaluator.whole - left} of {evaluator.whole} are there already, in {shown(folder)}/")
    with _resumable(folder), progress("evaluating", left) as advance:
        return evaluator(advance)


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        note(f"interrupted; the rows so far are in {shown(folder)}/, and the same command goes on from there.")
        raise typer.Exit(INTERRUPTED) from None


def _calibrate(
    model: Any,
    dataset: Any,
    method: str,
    grid: list[str],
    protocol: str | None,
    out: Path | None,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    from clipfast.cli.calibrate import parse_grid, run_calibration
    from clipfast.metrics.calibrate import Calibrator
    from clipfast.metrics.registry import listed

    names = listed(protocol or "")
    if len(names) > 1:
        raise InputError(f"--calibrate follows one protocol, not {len(names)}: {', '.join(names)}.")

    def calibrator(folder: Path | None) -> Calibrator:
        return Calibrator(model, dataset, method, parse_grid(grid), *names, out=folder, **options)

    folder = _folder(out, "calibrate", calibrator(None).fingerprint)
    with _resumable(folder):
        run_calibration(calibrator(folder), folder, as_json)


def _chosen(
    methods: str | None, protocols: str | None, tower: Any, offers: frozenset[str]
) -> tuple[list[str] | None, list[str] | None]:
    """Names of methods and protocols; "all" of either is what fits the other, the model and the data."""
    from clipfast.methods import METHODS
    from clipfast.metrics.chosen import DEFAULT_METHODS, able, sides_of
    from clipfast.metrics.registry import build_protocol, entry_of, listed, offered, parse

    all_methods, all_protocols = ((given or "").strip() == "all" for given in (methods, protocols))
    named = None if methods is None or all_methods else listed(methods)
    some = METHODS if all_methods else [parse(name)[0] for name in named or DEFAULT_METHODS]
    sides = set().union(*(sides_of(METHODS[name], tower) for name in some if name in METHODS))
    by = offered(offers, sides) if all_protocols else None if protocols is None else listed(protocols)
    if all_methods:
        measured: list[Side] = ["image"] if by is None else [entry_of(build_protocol(name))[1].side for name in by]
        named = able(tower, measured)
    return named, by


def _folder(wanted: Path | None, kind: str, fingerprint: str) -> Path:
    """Where results go: the folder `wanted`, or the first of runs/KIND, runs/KIND-2 ... that is new or of this run.

    Raises InputError where `wanted` is a file.
    """
    from clipfast.view.files import write_file

    number, folder = 1, Path("runs", kind) if wanted is None else wanted.expanduser()
    if wanted is not None and folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: --out names the folder to write to.")
    first = folder
    while wanted is None and folder.exists() and _settings(folder) != fingerprint:
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    write_file(folder / _SETTINGS, json.dumps({"fingerprint": fingerprint}).encode())
    return folder


def _settings(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / _SETTINGS).read_text())["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _print(found: Evaluation) -> None:
    from clipfast.view.scoreboard import number

    console = stdout()
    for protocol, own in found.protocols.items():
        table = Table(box=None, pad_edge=False, header_style="dim", title_justify="left", title_style="bold")
        table.add_column(protocol, overflow="fold")
        for name, better in own.figures.items():
            table.add_column(f"{name} {'↑' if better == 'higher' else '↓'}", justify="right", no_wrap=True)
        compared = found.compared(protocol)
        for method in [name for name in found.methods if protocol in found.tables[name]]:
            cells = [Text(method)]
            for i, one in enumerate(found.figures(method, protocol)):
                style = "bold green" if method in found.best(protocol, i) else ""
                cells.append(Text.assemble((number(one.value), style), (f" ± {number(one.error)}", "dim")))
            if method not in compared:
                cells.append(Text(f"of {len(found.tables[method][protocol].keys):,} pairs", style="dim"))
            table.add_row(*cells)
        console.print(table)
        console.print()
    tables = [table for own in found.tables.values() for table in own.values()]
    pairs = max(len(table.keys) for table in tables)
    console.print(
        f"{pairs:,} pairs of image and text of {found.samples:,} images of {found.data}, {found.model}, seed "
        f"{found.seed}, {found.seconds:.0f} s; ± is the standard error, bold the best",
        style="dim",
        soft_wrap=True,
    )


def _compare(paths: list[Path], against: str | None, as_json: bool) -> None:
    """Print paired differences. Raises InputError for more than two evaluations, or ones that share no method."""
    if len(paths) > 2:
        raise InputError(f"--compare takes one evaluation or two, not {len(paths)}.")
    from clipfast.metrics.evaluation import Evaluation

    first, *rest = [Evaluation.load(path) for path in paths]
    if rest:
        second = rest[0]
        if against is not None:
            raise InputError("--against names a method of one evaluation: leave it out, or one of the two files.")
        pairs = [(name, name) for name in first.methods if name in second.methods]
        if not pairs and len(first.methods) == len(second.methods) == 1:
            pairs = [(next(iter(first.methods)), next(iter(second.methods)))]
        if not pairs:
            raise InputError(f"{paths[0]} and {paths[1]} have no method in common.")
    else:
        second, base = first, against or next(iter(first.methods))
        if base not in first.methods:
            raise InputError(f"{paths[0]} has no method {base!r}: {nearest(base, first.methods)}")
        pairs = [(name, base) for name in first.methods if name != base]
        if not pairs:
            raise InputError(f"{paths[0]} holds one method only: there is nothing to compare it with.")
    rows = [
        {"method": a, "other": b, "protocol": protocol, "figure": one.name, "better": better, **_values(one)}
        for a, b in pairs
        for protocol in first.tables[a]
        if protocol in second.tables[b]
        for one, better in zip(
            first.differences(a, second, b, protocol), first.protocols[protocol].figures.values(), strict=True
        )
    ]
    if not rows:
        raise InputError(f"{paths[0]} and {paths[1]} have no protocol in common.")
    if as_json:
        print_json({"files": [str(path) for path in paths], "differences": rows})
    else:
        _print_differences(rows, [shown(path) for path in paths])


def _values(one: Any) -> dict[str, Any]:
    numbers = {key: getattr(one, key) for key in ("value", "low", "high", "p")}
    return {**{k: v if v == v else None for k, v in numbers.items()}, "pairs": one.count}


def _print_differences(rows: list[dict[str, Any]], paths: list[str]) -> None:
    console = stdout()
    for pair in dict.fromkeys((row["method"], row["other"]) for row in rows):
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column(pair[0] if pair[0] == pair[1] else f"{pair[0]} less {pair[1]}")
        for name in ("difference", "95 % interval", "p"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            if (row["method"], row["other"]) == pair:
                table.add_row(*_difference(row))
        console.print(table)
        console.print()
    of = f"{paths[0]} less {paths[1]}; " if len(paths) == 2 else ""
    console.print(
        f"{of}paired bootstrap over images; bold where the interval leaves out 0: green better, red worse. Of so many "
        f"tests ({len(rows)}) some come out by chance.",
        style="dim",
        soft_wrap=True,
    )


def _difference(row: dict[str, Any]) -> tuple[Text, Text, str, str]:
    value, low, high, p = (row[key] for key in ("value", "low", "high", "p"))
    name = Text(f"{row['protocol']}  {row['figure']} {'↑' if row['better'] == 'higher' else '↓'}")
    if low is None or value is None:
        return name, Text("–"), "–", "–"
    style = ("bold green" if (value > 0) == (row["better"] == "higher") else "bold red") if low > 0 or high < 0 else ""
    return name, Text(f"{value:+.4f}", style=style), f"{low:+.4f} to {high:+.4f}", f"{p:.3f}"
