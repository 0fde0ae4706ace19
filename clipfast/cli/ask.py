"""`clipfast ask`: new texts for a run that kept its features."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from clipfast.cli.console import note, print_json, print_paths, progress, shown, status, stdout
from clipfast.cli.folders import staging
from clipfast.cli.options import Device, Json, Out, check_device
from clipfast.errors import TextError

if TYPE_CHECKING:
    from clipfast.engine.ask import Answer

_ROWS = 10


def ask(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that kept its features.")],
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="What to look for.")] = None,
    texts_file: Annotated[
        Path | None, typer.Option("--texts", metavar="FILE", help="A file with one text a line; - reads stdin.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Images a text.")] = 20,
    out: Out = None,
    as_json: Json = False,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the images lie now, if not where the run found them.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Measure what keeping the features as they are kept costs.")
    ] = True,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The run's model, where its name in run.json does not load it."),
    ] = None,
    device: Device = None,
) -> None:
    """Find the images of a run that fit a text best, and where they show it.

    clipfast run photos/ -t "a dog" --features -o maps
    clipfast ask maps "a red umbrella"
    clipfast ask maps "a red umbrella" "a blue car" -k 50 -o found

    No image is read but to be drawn, and the image tower does not run.
    Writes raw maps (.npz), overlays (.png) and report.html to runs/ask, runs/ask-2 and so on, or to --out.
    """
    check_device(device)
    wanted = list(texts or [])
    if texts_file is not None:
        from clipfast.engine.texts import read_texts

        wanted += read_texts(texts_file)
    if not wanted:
        raise TextError(f'say what to look for, for example: clipfast ask {shlex.quote(str(run))} "a red umbrella"')
    with staging(out, "ask") as stage:
        answers = _answers(run, wanted, k, model, device, images, check)
        status("writing maps, overlays and the report ...")
        # One folder a text: each has its own images.
        names = [""] if len(answers) == 1 else _folders(wanted)
        for name, answer in zip(names, answers, strict=True):
            answer.save(stage.path / name)
            answer.report(stage.path / name / "report.html")
        folder = stage.publish()
    reports = [folder / name / "report.html" for name in names]
    if as_json:
        print_json(_document(run, answers, folder, reports))
        return
    _print(answers)
    typer.echo(f"raw maps and overlays in {shown(folder)}/, {'a page for each text' if reports[1:] else 'one page'}:")
    print_paths(*reports)


def _answers(
    run: Path, texts: list[str], k: int, model: str | None, device: str | None, images: Path | None, check: bool
) -> list[Answer]:
    from clipfast.engine.ask import ask
    from clipfast.engine.reader import open_run

    opened = open_run(run)
    with progress("comparing", len(opened)) as advance:
        return ask(opened, texts, k, model=model, device=device, images=images, check=check, progress=advance)


def _folders(texts: list[str]) -> list[str]:
    from clipfast.data.keys import numbered
    from clipfast.metrics.rows import slug

    return numbered(map(slug, texts), str.lower)


def _document(run: Path, answers: list[Answer], folder: Path, reports: list[Path]) -> dict[str, Any]:
    first = answers[0]
    error = first.error
    return {
        "run": str(run),
        "model": first.model,
        "method": first.method,
        "searched": first.searched,
        "seconds": round(max(answer.seconds for answer in answers), 4),
        "storage_error": None
        if error is None
        else {"codec": error.codec, "median": error.median, "largest": error.largest, "maps": error.maps},
        "texts": [
            {
                "text": answer.prompts(0)[0],
                "images": [
                    {
                        "key": key,
                        "file": None if source is None else str(source),
                        "score": record["prompts"][0]["score"],
                        "peak": record["prompts"][0]["peak"],
                    }
                    for key, source, record in zip(answer.keys, answer.sources, answer.to_json(), strict=True)
                ],
                "report": str(report),
            }
            for answer, report in zip(answers, reports, strict=True)
        ],
        "folder": str(folder),
    }


def _print(answers: list[Answer]) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("text", "image"):
        table.add_column(name, overflow="fold")
    table.add_column("score", justify="right")
    for answer in answers:
        for i, (key, score) in enumerate(zip(answer.keys[:_ROWS], answer.scores[:, 0].tolist(), strict=False)):
            table.add_row(Text("" if i else answer.prompts(0)[0]), Text(key), f"{score:.3f}")
    console = stdout()
    console.print(table)
    first, found = answers[0], max(len(answer) for answer in answers)
    console.print(
        f"the best {found} of {first.searched:,} images by {first.method} with {first.model} in {first.seconds:.2f} s",
        style="dim",
        soft_wrap=True,
    )
    if first.error is not None:
        error = first.error
        console.print(
            f"kept as {error.codec}, maps differ from computed ones by {error.median:.2%} (relative L2, median of "
            f"{error.maps} that the run has; at most {error.largest:.2%})",
            style="dim",
            soft_wrap=True,
        )
    missing = sum(source is None for answer in answers for source in answer.sources)
    if missing:
        note(f"{missing} images were not found and are drawn as heat alone: --images names the folder they lie in.")
