"""`clipfast explain`: heat maps of images for texts."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from clipfast.cli.console import error, note, print_json, print_paths, progress, shown, status, stdout
from clipfast.cli.folders import Staging, staging
from clipfast.cli.group import BAD_INPUT
from clipfast.cli.options import (
    Device,
    Json,
    MethodName,
    ModelName,
    Out,
    Precision,
    Pretrained,
    Resize,
    Set,
    Texts,
    build_explainer,
    build_for_words,
    warn_of_demo,
)
from clipfast.errors import ClipfastError, InputError, TextError

if TYPE_CHECKING:
    from clipfast.api import Explainer
    from clipfast.results import Attribution

# Word maps take a pass of the text tower for each image and text: beyond this many they would take the longest.
_WORD_MAPS = 64
_ROWS = 40
_LARGE_PAGE = 4000


def explain(
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGE", help="Image files, folders, or patterns such as 'a/*.jpg'."),
    ] = None,
    texts: Texts = None,
    texts_file: Annotated[
        Path | None, typer.Option("--texts", metavar="FILE", help="A file with one text a line; - reads stdin.")
    ] = None,
    out: Out = None,
    top: Annotated[int, typer.Option(min=1, help="Draw each image's best-scoring texts, at most this many.")] = 24,
    words: Annotated[
        bool | None,
        typer.Option("--words/--no-words", help="Explain the texts' words too; by default if they are few."),
    ] = None,
    as_json: Json = False,
    model: ModelName = "demo",
    pretrained: Pretrained = None,
    device: Device = None,
    precision: Precision = None,
    resize: Resize = None,
    method: MethodName = "grad_eclip",
    parameters: Set = None,
) -> None:
    """Draw heat maps: which patches of an image make it match a text.

    clipfast explain scene.png -t "a dog" -t "a red car"
    clipfast explain photos/ -t "a bird" -m ViT-B-16:openai
    clipfast explain 'photos/**/*.jpg' --texts labels.txt -o birds
    clipfast explain cat.jpg -t "a cat" --set layers=2 --set spatial=projected
    clipfast explain scene.png -t "a dog on the left" --method tclip

    A method that maps single words (tclip) shows each text as a strip of maps, one a word.
    Writes raw maps (.npz), overlays (.png) and report.html to runs/explain, runs/explain-2 and so on, or to --out.
    """
    prompts = _prompts(images, texts, texts_file)
    from clipfast.data.images import expand

    found = expand(images or [])
    with staging(out, "explain") as stage:
        explainer = build_explainer(model, pretrained, device, precision, resize, method, parameters)
        warn_of_demo(model)
        result = _explain(explainer, found, prompts, words)
        if len(result.errors) == len(found):
            _print_failures(result)
            raise typer.Exit(BAD_INPUT)
        _explain_words(explainer, result, prompts, words, parameters)
        folder, files = _write(stage, result, top)
    report = folder / "report.html"
    if as_json:
        print_json(_document(result, folder, files))
    else:
        _print_scores(result, top)
    _print_failures(result)
    if not as_json:
        typer.echo(f"{len(files) - 1} overlays and raw maps in {shown(folder)}/, one page with everything:")
        print_paths(report)
    if result.errors:
        raise typer.Exit(BAD_INPUT)


def _prompts(images: Sequence[str] | None, texts: Sequence[str] | None, file: Path | None) -> list[str]:
    """The texts of -t and --texts. Raises InputError, with the command as it should be, where there are none."""
    found = list(texts or [])
    if file is not None:
        from clipfast.engine.texts import read_texts

        found += read_texts(file)
    if found:
        if not images:
            given = " ".join(f"-t {shlex.quote(text)}" for text in found[:2])
            raise InputError(
                f"name at least one image, for example: clipfast explain photo.jpg {given} "
                "(no picture at hand? `clipfast demo` draws some)."
            )
        return found
    # Words after the images are most likely texts that lack their -t.
    stray = [word for word in images or [] if not Path(word).exists() and not Path(word).suffix and "/" not in word]
    rest = [word for word in images or [] if word not in stray] or ["photo.jpg"]
    example = " ".join(shlex.quote(word) for word in rest[:3])
    wanted = " ".join(f"-t {shlex.quote(word)}" for word in (stray or ["a dog"])[:3])
    raise TextError(f"say what to look for with at least one -t, for example: clipfast explain {example} {wanted}")


def _explain(explainer: Explainer, images: list[Path], prompts: list[str], wanted: bool | None) -> Attribution:
    """The maps, and in the same pass those of the texts' words where the method has them."""
    from clipfast.methods import METHODS

    few = len(images) * len(prompts) <= _WORD_MAPS
    words = METHODS[explainer.method].maps_words and (few if wanted is None else wanted)
    with progress("explaining", len(images)) as advance:
        try:
            return explainer(images, prompts, words=words, on_error="skip", progress=advance)
        except TextError as failure:
            if wanted or not words:
                raise
            unread = failure
        result = explainer(images, prompts, on_error="skip", progress=advance)
    note(f"the words are not mapped: {unread}")
    return result


def _explain_words(
    explainer: Explainer,
    result: Attribution,
    prompts: list[str],
    wanted: bool | None,
    parameters: list[str] | None,
) -> None:
    """Add what each text's words do for its score, where the method explains texts; strips of word maps serve, too."""
    from clipfast.methods import METHODS

    good = [i for i in range(len(result)) if i not in result.errors]
    has_side = "text" in METHODS[result.method].sides()
    if wanted is False or (not has_side and (wanted is None or result.word_maps)):
        return
    if wanted is None and len(good) * len(prompts) > _WORD_MAPS:
        return
    try:
        explainer = build_for_words(explainer, parameters)
        with progress("words", len(good)) as advance:
            for i in good:
                result.words[i] = explainer.words(result.sources[i], prompts)
                advance(1)
    except ClipfastError as failure:
        if wanted:
            raise
        # Not asked for: what keeps them from being made must not cost the heat maps.
        result.words.clear()
        note(f"the words are not explained: {failure}")


def _write(stage: Staging, result: Attribution, top: int) -> tuple[Path, list[Path]]:
    """Write everything, move it into place, and return (the folder, the files in it, report last)."""
    status("writing maps, overlays and the report ...")
    files = result.save(stage.path, top=top)
    shown_maps = (len(result) - len(result.errors)) * min(top, result.scores.shape[1])
    if shown_maps > _LARGE_PAGE:
        note(f"the report holds {shown_maps:,} maps and may open slowly: --top makes it smaller.")
    files.append(result.report(stage.path / "report.html", top=top))
    names = [file.name for file in files]
    folder = stage.publish()
    return folder, [folder / name for name in names]


def _document(result: Attribution, folder: Path, files: list[Path]) -> dict[str, Any]:
    return {
        "model": result.model,
        "method": result.method,
        "seconds": round(result.seconds, 4),
        "images": result.to_json(),
        "folder": str(folder),
        "files": [str(file) for file in files],
        "report": str(files[-1]),
    }


def _print_scores(result: Attribution, top: int) -> None:
    from clipfast.view.words import legend, terminal

    found = [words for of_image in result.words.values() for words in of_image]
    signed = any(words.signed for words in found)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("image")
    table.add_column("text")
    for name in ("score", *result.extras):
        table.add_column(name, justify="right")
    rows = 0
    for i in range(len(result)):
        if i in result.errors:
            continue
        prompts, coloured = (
            result.prompts(i),
            {w.text: terminal(w.pairs(), signed=signed) for w in result.words.get(i, [])},
        )
        for n, p in enumerate(result.best(i, top)):
            rows += 1
            if rows <= _ROWS:
                title = Text(result.title(i) if n == 0 else "")
                extras = [f"{values[i, p]:.2g}" for values in result.extras.values()]
                text = coloured.get(prompts[p], Text(prompts[p]))
                table.add_row(title, text, f"{result.scores[i, p]:.3f}", *extras)
    console = stdout()
    console.print(table)
    total = result.scores[0].numel() * (len(result) - len(result.errors))
    if total > min(rows, _ROWS):
        console.print(f"... and {total - min(rows, _ROWS):,} more", style="dim")
    maps = f"{total:,} map{'s' if total > 1 else ''} by {result.method} with {result.model} in {result.seconds:.2f} s"
    console.print(maps + (f"; words: {legend(signed)}" if result.words else ""), style="dim", soft_wrap=True)


def _print_failures(result: Attribution) -> None:
    for failure in result.errors.values():
        error(str(failure))
