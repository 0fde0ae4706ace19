"""Draw the README's pictures with the demo model: python scripts/make_pictures.py [folder]."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import clipfast
from clipfast.data.scenes import Scene, render
from clipfast.view import grid, save_image
from clipfast.view.words import AGAINST, FOR, strengths

SIDE, ENLARGED = 96, 5
# Seeds of scenes that no training saw (it counts from 2**50), chosen for having several distinct things in view.
SEEDS = (11, 23, 42)
SENTENCES = 4


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    explainer = clipfast.Explainer("demo")
    drawn = [render(seed, size=SIDE, objects=3) for seed in SEEDS]
    pictures = [enlarge(scene) for scene in drawn]
    prompts = [[*scene.names[:3], " and ".join(f"a {name}" for name in scene.names[:2])] for scene in drawn]
    every = list(dict.fromkeys(prompt for row in prompts for prompt in row))
    out = explainer(pictures, every)
    heat = [out.resize(i, normalize=True)[[every.index(p) for p in row]] for i, row in enumerate(prompts)]
    scores = [[float(out.scores[i, every.index(p)]) for p in row] for i, row in enumerate(prompts)]
    save_image(grid(pictures, heat, prompts, scores=scores, cell=220), folder / "scenes.png")

    signed = clipfast.Explainer("demo", signed=True)
    scenes = [render(seed, size=SIDE, objects=2) for seed in range(100, 100 + SENTENCES)]
    rows = []
    for scene in scenes:
        picture = enlarge(scene)
        # Half of each sentence is true: the words of the other half should count against the score.
        absent = next(name for name in drawn[0].names if name not in scene.names)
        text = f"a photo of a {scene.names[0]} and a {absent}"
        rows.append((picture, signed.words(picture, text)))
    save_image(strip(rows), folder / "words.png")


def enlarge(scene: Scene) -> Image.Image:
    picture = Image.fromarray(scene.image)
    return picture.resize((picture.width * ENLARGED, picture.height * ENLARGED), Image.Resampling.BICUBIC)


def strip(rows: list[tuple[Image.Image, clipfast.Words]], cell: int = 150) -> Image.Image:
    """Each picture with its sentence beside it, every word on the colour of what it does for the score."""
    font = ImageFont.load_default(26)
    gap = 14
    sheet = Image.new("RGB", (1100, gap + len(rows) * (cell + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (picture, words) in enumerate(rows):
        top = gap + row * (cell + gap)
        sheet.paste(picture.resize((cell, cell), Image.Resampling.LANCZOS), (gap, top))
        x, middle = cell + 3 * gap, top + cell // 2
        for word, strength in zip(words.words, strengths(words.values.tolist()), strict=True):
            width = draw.textlength(word, font=font)
            colour = FOR if strength > 0 else AGAINST
            paper = tuple(round(255 + (c - 255) * abs(strength) * 0.8) for c in colour)
            draw.rounded_rectangle((x - 8, middle - 24, x + width + 8, middle + 24), 8, fill=paper)
            draw.text((x, middle), word, font=font, fill=(24, 24, 27), anchor="lm")
            x += width + 28
        draw.text(
            (x, middle), f"score {words.score:.2f}", font=ImageFont.load_default(18), fill=(113, 113, 122), anchor="lm"
        )
    return sheet


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images"))
