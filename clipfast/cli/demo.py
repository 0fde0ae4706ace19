"""`clipfast demo`: scenes drawn from a seed, explained by the demo model, on one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from clipfast.cli.console import print_json, print_paths, shown, status, stdout
from clipfast.cli.folders import staging
from clipfast.cli.options import Json, build_for_words

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from clipfast.data.scenes import Scene
    from clipfast.results import Attribution, Words

_SIDE, _ENLARGED = 96, 4
_FOLDER = Path("clipfast-demo")
_NOTE = (
    "Scenes drawn from a seed and explained by the small CLIP that comes with clipfast. It only knows drawings of 64 "
    "everyday things: this page shows how explanations look, and proves nothing about photographs."
)


@dataclass
class Explained:
    """A scene as the page shows it: texts, their maps (P, H, W) in 0..1 on the picture, scores, and word maps.

    hits: for each thing that is drawn, whether the map of its name peaks on it.
    """

    title: str
    picture: Image.Image
    texts: list[str]
    heat: Tensor
    scores: list[float]
    words: list[Words]
    hits: dict[str, bool]


def demo(
    seed: Annotated[int, typer.Option(min=0, help="Other seeds draw other scenes.")] = 0,
    scenes: Annotated[int, typer.Option(min=1, max=200, help="How many to draw.")] = 6,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to; made if missing.")] = _FOLDER,
    as_json: Json = False,
) -> None:
    """Draw a few scenes, explain what is in them, and write a page of heat maps to look at.

    clipfast demo
    clipfast demo --seed 7 --scenes 20 -o more

    Works offline, in seconds, on any machine.
    """
    with staging(out, out.name) as stage:
        from clipfast.api import Explainer
        from clipfast.view import ReportItem, grid, save_image, write_report

        status("drawing and explaining ...")
        drawn = draw(seed, scenes)
        explainer = Explainer("demo")
        on_words = build_for_words(explainer)
        texts = [_texts(scene) for scene in drawn]
        every = list(dict.fromkeys(text for some in texts for text in some))
        pictures = [enlarge(scene) for scene in drawn]
        # All scenes for all texts: that costs no more than each for its own, and shows what the engine is for.
        result = explainer(pictures, every)
        found = [
            _explained(i, scene, pictures[i], wanted, result, on_words.words(pictures[i], wanted))
            for i, (scene, wanted) in enumerate(zip(drawn, texts, strict=True))
        ]
        for each in found:
            save_image(each.picture, stage.path / f"{each.title}.png")
        sheet = grid(
            [each.picture for each in found],
            [each.heat for each in found],
            [each.texts for each in found],
            scores=[each.scores for each in found],
            titles=[each.title for each in found],
        )
        save_image(sheet, stage.path / "sheet.png")
        items = [
            ReportItem(e.title, e.picture, e.texts, e.heat, e.scores, {w.text: w.pairs() for w in e.words})
            for e in found
        ]
        write_report(
            stage.path / "report.html",
            items,
            method=result.method,
            model=result.model,
            seconds=result.seconds,
            title="clipfast demo",
            note=_NOTE,
        )
        folder = stage.publish()
    if as_json:
        print_json(_document(found, result, folder))
        return
    _print(found)
    hits = [hit for each in found for hit in each.hits.values()]
    maps = f"{result.scores.numel()} maps in {result.seconds:.2f} s"
    stdout().print(
        f"{maps}; {sum(hits)} of {len(hits)} peak on the thing they name; words: green for the score, red against it",
        style="dim",
        soft_wrap=True,
    )
    first = shown(folder / f"{found[0].title}.png")
    stdout().print(f'try: clipfast explain {first} -t "{found[0].texts[0]}"', style="dim", soft_wrap=True)
    typer.echo(f"the scenes and a sheet of their maps are in {shown(folder)}/, one page with everything:")
    print_paths(folder / "report.html")


def draw(seed: int, count: int) -> list[Scene]:
    """Scenes of one, two and three things in turn; the last has one thing and the name of another written on it."""
    from clipfast.data.scenes import Scenes

    plain = [Scenes(count, seed, _SIDE, objects)[i] for i, objects in zip(range(count - 1), _cycle(), strict=False)]
    written = Scenes(count, seed, _SIDE, 1, word=True)
    return [*plain, written[count - 1]]


def enlarge(scene: Scene) -> Image.Image:
    """The scene's picture, larger for the eye; preprocessing brings it back to what was drawn."""
    from PIL import Image

    picture = Image.fromarray(scene.image)
    return picture.resize((picture.width * _ENLARGED, picture.height * _ENLARGED), Image.Resampling.BICUBIC)


def _cycle() -> Any:
    from itertools import cycle

    return cycle((2, 3, 1))


def _texts(scene: Scene) -> list[str]:
    """Each thing by its name, the word that is written, and the caption."""
    texts = [*scene.names, *([] if scene.word is None else [f"the word {scene.word}"]), scene.caption]
    return list(dict.fromkeys(texts))


def _explained(
    index: int, scene: Scene, picture: Image.Image, texts: list[str], result: Attribution, words: list[Words]
) -> Explained:
    assert result.texts is not None
    rows = [result.texts.index(text) for text in texts]
    heat = result.resize(index, normalize=True)[rows]
    title = f"scene-{index + 1}" + ("" if scene.word is None else "-with-a-word")
    hits = {name: _peaks_on(heat[texts.index(name)], scene.mask(name)) for name in scene.names}
    return Explained(title, picture, texts, heat, result.scores[index, rows].tolist(), words, hits)


def _peaks_on(heat: Tensor, mask: np.ndarray) -> bool:
    row, column = divmod(int(heat.argmax()), heat.shape[1])
    return bool(mask[row * mask.shape[0] // heat.shape[0], column * mask.shape[1] // heat.shape[1]])


def _print(found: list[Explained]) -> None:
    from clipfast.view.words import terminal

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("scene", no_wrap=True)
    table.add_column("text")
    table.add_column("score", justify="right")
    for each in found:
        for n, (words, score) in enumerate(zip(each.words, each.scores, strict=True)):
            table.add_row(Text(each.title if n == 0 else ""), terminal(words.pairs()), f"{score:.3f}")
    stdout().print(table)


def _document(found: list[Explained], result: Attribution, folder: Path) -> dict[str, Any]:
    return {
        "model": result.model,
        "method": result.method,
        "seconds": round(result.seconds, 4),
        "scenes": [
            {
                "image": str(folder / f"{each.title}.png"),
                "prompts": [
                    {"text": words.text, "score": score, "words": words.pairs()}
                    for words, score in zip(each.words, each.scores, strict=True)
                ],
                "peaks_on": each.hits,
            }
            for each in found
        ],
        "folder": str(folder),
        "report": str(folder / "report.html"),
    }
