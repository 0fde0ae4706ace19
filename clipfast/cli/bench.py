"""`clipfast bench`: what explaining costs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from clipfast.cli.console import note, print_json, print_paths, progress, shown, status, stdout
from clipfast.cli.options import Device, Json, ModelName, Out, Pretrained, check_device
from clipfast.errors import InputError, nearest

if TYPE_CHECKING:
    from clipfast.bench.compare import Change
    from clipfast.bench.report import Report

_PRECISIONS = ("weights", "float32", "bfloat16", "auto")
_REGRESSED = 1


def bench(
    model: ModelName = "demo",
    methods: Annotated[
        str | None,
        typer.Option(help='Of `clipfast methods`, with commas; parameters behind colons, "rise:masks=500"; or "all".'),
    ] = None,
    batch: Annotated[str | None, typer.Option(help="Numbers of images, with commas; 1,4 unless said.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Numbers of prompts, with commas; 1,10,100 unless said.")] = None,
    precision: Annotated[
        str, typer.Option(help='"float32", "bfloat16", "auto", with commas; "weights" as they are.')
    ] = "weights",
    backend: Annotated[str, typer.Option(help='"auto", "torch", "triton", "native", with commas.')] = "auto",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Of each group that takes turns; by default 5 to 50, in a second or so.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick/--full", help="A minute with the demo model, or every method, more of everything.")
    ] = True,
    peers: Annotated[bool, typer.Option(help="Time installed libraries, too, for 10 prompts at most.")] = True,
    out: Out = None,
    as_json: Json = False,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            "--compare",
            metavar="JSON",
            help="Tell what became slower than in this bench.json; name --compare twice for two of them and no run.",
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="With --compare: the slowing down that is let pass beyond the noise.")
    ] = 0.05,
    pretrained: Pretrained = None,
    device: Device = None,
    more: Annotated[list[Path] | None, typer.Argument(metavar="[JSON]", hidden=True)] = None,
) -> None:
    """Measure what explaining costs here: latency, throughput, memory and energy, in encodes of the same images.

    clipfast bench
    clipfast bench -m ViT-B-16:random --methods grad_eclip,grad_cam --batch 4 --prompts 1,100
    clipfast bench --precision float32,bfloat16 --backend auto,torch
    clipfast bench --compare runs/bench/bench.json
    clipfast bench --compare before/bench.json after/bench.json

    Maps are compared with float64 first, and nothing is timed whose maps are wrong. Writes bench.json, .csv, .md and
    .png to runs/bench, runs/bench-2 and so on, or to --out. With --compare, what became slower ends in exit code 1.
    """
    given = [*(compare or []), *(more or [])]
    if more and not compare:
        raise InputError(f"{more[0]} is not expected here: name earlier runs with --compare.")
    if len(given) > 2:
        raise InputError(f"--compare takes one earlier run or two runs, not {len(given)}.")
    batches, counts = _numbers("--batch", batch), _numbers("--prompts", prompts)
    precisions = [None if one == "weights" else one for one in _names("--precision", precision, _PRECISIONS)]
    check_device(device)
    from clipfast.bench.report import Report
    from clipfast.ops.dispatch import NAMES

    backends = _names("--backend", backend, NAMES)
    earlier = [Report.load(path) for path in given]
    if len(earlier) == 2:
        _compared(earlier[0], earlier[1], [shown(path) for path in given], tolerance, as_json, {})
        return
    from clipfast.bench import cases
    from clipfast.bench.measure import Plan, measure
    from clipfast.cli.folders import staging
    from clipfast.models.load import load

    with staging(out, "bench") as stage:
        status(f"loading {model if pretrained is None else f'{model}:{pretrained}'} ...")
        loaded = load(model, pretrained, device=device)
        plan = Plan(
            methods=cases.chosen(methods, loaded.towers()[0], full=not quick),
            batches=batches or (cases.QUICK_BATCHES if quick else cases.FULL_BATCHES),
            prompts=counts or (cases.QUICK_PROMPTS if quick else cases.FULL_PROMPTS),
            precisions=precisions,  # type: ignore[arg-type]
            backends=backends,
            rounds=rounds,
            budget=1.0 if quick else 5.0,
            peers=peers,
            source=(model, pretrained),
        )
        with progress("timing", len(plan.groups())) as advance:
            found = measure(loaded, plan, advance)
        found.save(stage.path)
        folder = stage.publish()
    for row in found.rows:
        if row.reason is not None:
            note(f"no speed of {row.method} by {row.by}, {row.batch} x {row.prompts}, {row.precision}: {row.reason}.")
    document = {**found.to_json(), "folder": str(folder)}
    if not as_json:
        _print(found)
    if earlier:
        names = [shown(given[0]), shown(folder)]
        _compared(earlier[0], found, names, tolerance, as_json, document, lambda: _print_paths(folder, as_json))
        return
    if as_json:
        print_json(document)
    _print_paths(folder, as_json)


def _print_paths(folder: Path, as_json: bool) -> None:
    if not as_json:
        print_paths(*(folder / f"bench.{suffix}" for suffix in ("json", "csv", "md", "png")))


def _numbers(option: str, given: str | None) -> list[int]:
    """Whole numbers from 1 on, with commas between them, each once. Raises InputError for anything else."""
    if given is None:
        return []
    parts = [part.strip() for part in given.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"{option} {given!r} should be whole numbers from 1 on with commas, for example 1,4.")
    return list(dict.fromkeys(int(part) for part in parts))


def _names(option: str, given: str, known: tuple[str, ...]) -> list[str]:
    found = list(dict.fromkeys(part.strip() for part in given.split(",") if part.strip()))
    for name in found:
        if name not in known:
            raise InputError(f"{option} {name!r} is unknown: {nearest(name, known)}")
    if not found:
        raise InputError(f"{option} is empty: give one of {', '.join(known)}.")
    return found


def _print(report: Report) -> None:
    from clipfast.bench.report import HEADINGS, cells_of

    console = stdout()
    for title, rows in report.tables():
        cells = [cells_of(row) for row in rows if row.timed]
        if not cells:
            continue
        # The files have every column; a terminal has room for those that say something else here.
        room = [i for i, name in enumerate(HEADINGS) if name not in ("images/s", "error")]
        kept = [i for i in room if i < 2 or any(row[i] for row in cells)]
        console.print(Text(title, style="bold"))
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
        for i in kept:
            table.add_column(HEADINGS[i], justify="left" if i == 0 else "right", no_wrap=i > 0, overflow="fold")
        for row in cells:
            table.add_row(*(Text(row[i], style="bold" if i == 2 else "") for i in kept))
        console.print(table)
        console.print()
    console.print(
        f"{report.model} on {report.where()}, {report.seconds:.0f} s. × encode: the time in bare encodes of the same "
        "images, in turns; peak: of the multiplications a second of a matrix product; all that is timed agrees with "
        "the definition in float64",
        style="dim",
        soft_wrap=True,
    )


def _compared(
    old: Report,
    new: Report,
    names: list[str],
    tolerance: float,
    as_json: bool,
    document: dict[str, Any],
    last: Any = lambda: None,
) -> None:
    """Tell what changed, and leave with exit code 1 where something became slower or wrong."""
    import dataclasses

    from clipfast.bench.compare import compare

    changes = compare(old, new, tolerance)
    if as_json:
        told = {"files": names, "changes": [dataclasses.asdict(change) for change in changes]}
        print_json({**document, "compared": told} if document else told)
    else:
        _print_changes(changes, names)
        threads = [report.machine.get("threads") for report in (old, new)]
        if threads[0] != threads[1]:
            note(f"the runs used {threads[0]} and {threads[1]} threads, which changes ratios, too.")
        last()
    if any(change.regressed for change in changes):
        raise typer.Exit(_REGRESSED)


def _print_changes(changes: list[Change], names: list[str]) -> None:
    console = stdout()
    styles = {"slower": "bold red", "wrong": "bold red", "faster": "bold green", "same": ""}
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for heading in ("images", "prompts", "before", "after", "factor", "99 % interval", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for c in changes:
        name = c.method + "".join(f", {one}" for one in (c.precision, c.backend) if one not in ("float32", "auto"))
        after = ["–"] * 3 if c.factor is None else [f"{c.after:.2f}", f"{c.factor:.2f}", f"{c.low:.2f} to {c.high:.2f}"]
        cells = [f"{c.batch}", f"{c.prompts:,}", f"{c.before:.2f}", *after]
        table.add_row(name, *cells, Text(c.verdict, style=styles[c.verdict]))
    console.print(table)
    slower = sum(change.regressed for change in changes)
    console.print(
        f"\n{names[1]} against {names[0]}, in encodes: {slower} of {len(changes)} became slower or wrong",
        style="dim",
        soft_wrap=True,
    )
