"""Render the pictograms of clipfast.data.scenes into one packaged atlas.

    python scripts/make_pictograms.py NotoColorEmoji.ttf

Writes clipfast/data/pictograms.webp (a lossless RGBA grid) and clipfast/data/pictograms.json (names in the grid's
order). Only needed to change the set: the atlas is in the repository and no font is needed to render scenes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL = 80
COLUMNS = 8
BITMAP_SIZE = 109  # the one size at which the font holds bitmaps

PICTOGRAMS = {
    "dog": "🐶", "cat": "🐱", "mouse": "🐭", "rabbit": "🐰", "fox": "🦊", "bear": "🐻", "panda": "🐼", "lion": "🦁",
    "tiger": "🐯", "cow": "🐮", "pig": "🐷", "frog": "🐸", "monkey": "🐵", "penguin": "🐧", "owl": "🦉", "horse": "🐴",
    "bee": "🐝", "butterfly": "🦋", "snail": "🐌", "turtle": "🐢", "fish": "🐠", "octopus": "🐙", "crab": "🦀",
    "whale": "🐳", "elephant": "🐘", "apple": "🍎", "banana": "🍌", "lemon": "🍋", "strawberry": "🍓", "grapes": "🍇",
    "watermelon": "🍉", "carrot": "🥕", "corn": "🌽", "mushroom": "🍄", "bread": "🍞", "cheese": "🧀", "pizza": "🍕",
    "hamburger": "🍔", "cake": "🎂", "donut": "🍩", "car": "🚗", "bus": "🚌", "train": "🚂", "airplane": "✈",
    "rocket": "🚀", "boat": "⛵", "tree": "🌳", "cactus": "🌵", "sunflower": "🌻", "house": "🏠", "clock": "⏰",
    "book": "📕", "umbrella": "☂", "guitar": "🎸", "drum": "🥁", "football": "⚽", "balloon": "🎈", "shirt": "👕",
    "camera": "📷", "star": "⭐", "heart": "❤", "moon": "🌙", "sun": "🌞", "gift": "🎁",
}  # fmt: skip


def draw(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """One pictogram, cropped to its ink, centred in a CELL x CELL transparent square."""
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((10, 10), character, font=font, embedded_color=True)
    ink = canvas.crop(canvas.getbbox())
    scale = CELL / max(ink.size)
    # Premultiplied resampling, so that transparent black does not darken the edges.
    small = ink.convert("RGBa").resize([max(1, round(side * scale)) for side in ink.size], Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL))
    small = small.convert("RGBA")
    cell.paste(small, ((CELL - small.width) // 2, (CELL - small.height) // 2))
    return cell


def main() -> None:
    font = ImageFont.truetype(sys.argv[1], BITMAP_SIZE)
    rows = -(-len(PICTOGRAMS) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for i, character in enumerate(PICTOGRAMS.values()):
        atlas.paste(draw(font, character), (i % COLUMNS * CELL, i // COLUMNS * CELL))
    folder = Path(__file__).parents[1] / "clipfast" / "data"
    atlas.save(folder / "pictograms.webp", lossless=True, quality=100, method=6)
    (folder / "pictograms.json").write_text(
        json.dumps({"cell": CELL, "columns": COLUMNS, "names": list(PICTOGRAMS)}, indent=1) + "\n"
    )
    print(folder / "pictograms.webp")


if __name__ == "__main__":
    main()
