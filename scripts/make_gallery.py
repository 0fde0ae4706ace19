"""Draw the gallery: one scene, every method, with the demo model: python scripts/make_gallery.py [folder of docs].

Writes gallery.md and its pictures. Every method runs as it comes, with its default parameters.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from make_pictures import picture
from PIL import Image, ImageDraw, ImageFont

import clipfast
from clipfast.methods import METHODS
from clipfast.methods.base import Method
from clipfast.view import save_image
from clipfast.view.overlay import overlay
from clipfast.view.words import AGAINST, FOR, strengths

SCENE, PROMPTS, SENTENCE = 26, ["lion", "corn"], "a photo of a lion and a pizza"
CELL, GAP, ACROSS = 132, 8, 4
INK, FAINT = (24, 24, 27), (113, 113, 122)


def main(docs: Path) -> None:
    model, scene = clipfast.load("demo"), picture(SCENE)
    drawn: dict[str, list[Image.Image]] = {}
    words: dict[str, clipfast.Words] = {}
    for name, method in METHODS.items():
        started = time.perf_counter()
        if "image" in method.sides() and method.why_not(model.towers()[0]) is None:
            out = clipfast.explain(scene, PROMPTS, model=model, method=name)
            drawn[name] = [
                overlay(scene, heat[0], colormap=palette) for heat, palette in (out.drawable(0, [p]) for p in range(2))
            ]
        if "text" in method.sides():
            signed = {"signed": True} if "signed" in method.parameters() else {}
            words[name] = clipfast.Explainer(model, name, **signed).words(scene, SENTENCE)
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
    save_image(sheet(scene, drawn), docs / "images" / "gallery.png")
    save_image(strips(words), docs / "images" / "gallery-words.png")
    (docs / "gallery.md").write_text(page())


def sheet(scene: Image.Image, drawn: dict[str, list[Image.Image]]) -> Image.Image:
    """The scene, and then for every method the maps of all prompts side by side under its name."""
    title, small = ImageFont.load_default(16), ImageFont.load_default(12)
    wide = len(PROMPTS) * (CELL + 2)
    high = CELL + 40
    down = -(-(len(drawn) + 1) // ACROSS)
    out = Image.new("RGB", (GAP + ACROSS * (wide + 2 * GAP), GAP + down * (high + GAP)), "white")
    draw = ImageDraw.Draw(out)
    cells = [("the scene", [scene], [""])]
    cells += [(name, found, PROMPTS) for name, found in drawn.items()]
    for i, (name, pictures, prompts) in enumerate(cells):
        left, top = GAP + i % ACROSS * (wide + 2 * GAP), GAP + i // ACROSS * (high + GAP)
        draw.text((left, top), name, fill=INK, font=title)
        for p, (shown, prompt) in enumerate(zip(pictures, prompts, strict=True)):
            x = left + p * (CELL + 2)
            draw.text((x, top + 21), prompt, fill=FAINT, font=small)
            out.paste(shown.resize((CELL, CELL), Image.Resampling.LANCZOS), (x, top + 38))
    return out


def strips(words: dict[str, clipfast.Words]) -> Image.Image:
    """One sentence a line, each word on the colour of what a method says it does for the score."""
    font = ImageFont.load_default(19)
    line = 40
    out = Image.new("RGB", (860, GAP + line * len(words)), "white")
    draw = ImageDraw.Draw(out)
    for row, (name, found) in enumerate(words.items()):
        middle, x = GAP + row * line + line // 2, 230.0
        draw.text((GAP, middle), name, fill=INK, font=font, anchor="lm")
        for word, strength in zip(found.words, strengths(found.values.tolist()), strict=True):
            width = draw.textlength(word, font=font)
            paper = [round(255 + (c - 255) * abs(strength) * 0.8) for c in (FOR if strength > 0 else AGAINST)]
            draw.rounded_rectangle((x - 6, middle - 16, x + width + 6, middle + 16), 6, fill=(*paper,))
            draw.text((x, middle), word, fill=INK, font=font, anchor="lm")
            x += width + 20
    return out


def page() -> str:
    lines = [
        "# Every method, one scene",
        "",
        "`python scripts/make_gallery.py` draws this page with the demo model. Every method runs as it comes; a map",
        "from nothing to much is dark to bright, a map with both signs green (for the score) and purple (against it).",
        "A picture of one scene ranks nothing: before liking a method for its looks, see what each costs",
        "([methods-cost.md](methods-cost.md)) and how the demo model was trained ([demo-model.md](demo-model.md)).",
        "",
        f"![Maps of {' and '.join(PROMPTS)} by every method](images/gallery.png)",
        "",
        f'The words of *"{SENTENCE}"* for the same scene, green for the score and red against it:',
        "",
        "![The words of a sentence by every method with a text side](images/gallery-words.png)",
        "",
        "## What they are",
        "",
        "P is the number of prompts; passes are of the whole tower, an image. `clipfast methods NAME` says more,",
        "parameters included.",
        "",
        "| method | from | explains | forwards | backwards | agrees with |",
        "|---|---|---|--:|--:|---|",
    ]
    lines += [row(name, method) for name, method in METHODS.items()]
    open_points = [f"- **{name}**: {m.info.our_reading}" for name, m in METHODS.items() if m.info.our_reading]
    lines += ["", "## Our reading", "", "What the papers leave open, and what is done here:", "", *open_points, ""]
    return "\n".join(lines)


def row(name: str, method: type[Method]) -> str:
    info = method.info
    shared = ", any P" if info.prompt_free else ""
    sides = " and ".join(f"{side}s" for side in method.sides())
    return f"| `{name}` | {info.source} | {sides} | {info.forwards}{shared} | {info.backwards} | {info.agrees} |"


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
