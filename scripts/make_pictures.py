"""Draw the README's pictures with the demo model: python scripts/make_pictures.py [folder]."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import clipfast
from clipfast.data.scenes import render
from clipfast.view import grid, save_image
from clipfast.view.words import AGAINST, FOR, strengths

# Seeds of scenes that no training saw (it counts from 2**50), and what is asked about each.
PROMPTS = {
    15: ["tree", "pink car", "balloon", "a tree and a balloon"],
    26: ["lion", "blue apple", "corn", "a lion and a corn"],
    6: ["monkey", "elephant", "mushroom", "a monkey and a mushroom"],
}
SENTENCES = {
    15: "a tree next to a boat",
    26: "a photo of a lion and a pizza",
    6: "an elephant next to a small boat",
    33: "a red car and a dog",
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {seed: picture(seed) for seed in {**PROMPTS, **SENTENCES}}

    every = list(dict.fromkeys(prompt for prompts in PROMPTS.values() for prompt in prompts))
    out = clipfast.explain([pictures[seed] for seed in PROMPTS], every)
    asked = [[every.index(prompt) for prompt in prompts] for prompts in PROMPTS.values()]
    sheet = grid(
        [pictures[seed] for seed in PROMPTS],
        [out.resize(i, normalize=True)[columns] for i, columns in enumerate(asked)],
        list(PROMPTS.values()),
        scores=[out.scores[i, columns].tolist() for i, columns in enumerate(asked)],
        cell=220,
    )
    save_image(sheet, folder / "scenes.png")

    signed = clipfast.Explainer("demo", signed=True)
    rows = [(pictures[seed], signed.words(pictures[seed], text)) for seed, text in SENTENCES.items()]
    save_image(strip(rows), folder / "words.png")


def picture(seed: int, side: int = 96, enlarged: int = 5) -> Image.Image:
    """A scene, larger for the eye; preprocessing brings it back to what was drawn."""
    drawn = Image.fromarray(render(seed, size=side, objects=3).image)
    return drawn.resize((side * enlarged, side * enlarged), Image.Resampling.BICUBIC)


def strip(rows: list[tuple[Image.Image, clipfast.Words]], cell: int = 130, gap: int = 14) -> Image.Image:
    """Each picture with its sentence beside it, every word on the colour of what it does for the score."""
    font, small = ImageFont.load_default(26), ImageFont.load_default(18)
    sheet = Image.new("RGB", (930, gap + len(rows) * (cell + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (scene, words) in enumerate(rows):
        top = gap + row * (cell + gap)
        sheet.paste(scene.resize((cell, cell), Image.Resampling.LANCZOS), (gap, top))
        x, middle = float(cell + 3 * gap), top + cell // 2
        for word, strength in zip(words.words, strengths(words.values.tolist()), strict=True):
            width = draw.textlength(word, font=font)
            paper = [round(255 + (c - 255) * abs(strength) * 0.8) for c in (FOR if strength > 0 else AGAINST)]
            draw.rounded_rectangle((x - 8, middle - 24, x + width + 8, middle + 24), 8, fill=(*paper,))
            draw.text((x, middle), word, font=font, fill=(24, 24, 27), anchor="lm")
            x += width + 26
        draw.text((x, middle), f"score {words.score:.2f}", font=small, fill=(113, 113, 122), anchor="lm")
    return sheet


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images"))
