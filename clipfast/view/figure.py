"""Contact sheets, pictures down and prompts across; and a sentence as a strip of maps, one a word."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from clipfast.errors import InputError
from clipfast.view.overlay import Heat, checked, overlay

_PAPER, _INK, _FAINT = (255, 255, 255), (24, 24, 27), (113, 113, 122)


def grid(
    images: Sequence[Image.Image],
    heat: Sequence[Heat],
    prompts: Sequence[str] | Sequence[Sequence[str]],
    *,
    scores: Sequence[Sequence[float]] | None = None,
    titles: Sequence[str] | None = None,
    cell: int = 240,
    alpha: float | None = None,
    colormap: str = "heat",
) -> Image.Image:
    """One sheet with a row for each image: the picture, then its heat map for each prompt.

    images: B pictures, scaled into cells of `cell` pixels, never cropped.
    heat: B arrays (P, H, W) in 0..1, of any resolution.
    prompts: P texts above the columns, or B lists of texts above each row's own cells (rows may differ in length).
    scores: B lists of P numbers, written after the prompts; with them every row has its own captions.
    titles: B captions of the pictures.
    alpha, colormap: as for `overlay`.

    Raises InputError where these do not belong together, or as `overlay` does.
    """
    if not images:
        raise InputError("a sheet needs at least one image.")
    shared = all(isinstance(p, str) for p in prompts)
    rows = [[str(p) for p in prompts]] * len(images) if shared else [list(row) for row in prompts]
    columns = [checked(h) for h in heat]
    given: dict[str, Sequence[object] | None] = {"heat": heat, "prompts": rows, "scores": scores, "titles": titles}
    for name, values in given.items():
        if values is not None and len(values) != len(images):
            raise InputError(f"{name} has {len(values)} entries for {len(images)} images.")
    for row, maps in zip(rows, columns, strict=True):
        if maps.ndim != 3 or len(maps) != len(row):
            raise InputError(f"heat of shape {maps.shape} does not hold one map for each of {len(row)} prompts.")

    captions = [_captions(i, row, scores, titles) for i, row in enumerate(rows)]
    captioned = [i == 0 or not shared or scores is not None or titles is not None for i in range(len(images))]
    font = _font(max(cell // 15, 9))
    line = round(font.size * 1.3)
    gap = max(cell // 24, 4)
    lines = [
        max(len(_wrap(c, font, cell)) for c in row) if on else 0 for row, on in zip(captions, captioned, strict=True)
    ]
    fitted = [_fit(image, cell) for image in images]
    heights = [image.height + n * line + (gap // 2 if n else 0) for image, n in zip(fitted, lines, strict=True)]
    width = gap + (cell + gap) * max(len(row) for row in captions)
    sheet = Image.new("RGB", (width, gap + sum(h + gap for h in heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)

    top = gap
    for image, maps, row, n, height in zip(fitted, columns, captions, lines, heights, strict=True):
        pictures = [image, *(overlay(image, m, alpha, colormap) for m in maps)]
        for column, (picture, caption) in enumerate(zip(pictures, row, strict=True)):
            left = gap + column * (cell + gap)
            for i, text in enumerate(_wrap(caption, font, cell) if n else []):
                draw.text((left, top + i * line), text, fill=_INK if column else _FAINT, font=font)
            sheet.paste(picture, (left + (cell - picture.width) // 2, top + height - picture.height))
        top += height + gap
    return sheet


def strip(
    image: Image.Image,
    heat: Heat,
    words: Sequence[str],
    *,
    scores: Sequence[float] | None = None,
    title: str | None = None,
    cell: int = 150,
    columns: int = 8,
    alpha: float | None = None,
    colormap: str = "heat",
) -> Image.Image:
    """One sentence as a strip: the picture, and then its heat map for each word, the word beneath.

    heat: (W, H, W') in 0..1, of any resolution, one map a word; one scale for all lets a reader compare them.
    scores: W numbers, written small beneath the words.
    title: a line above, such as the sentence.
    cell: pixels of a picture's longer side. columns: cells in a row before the strip goes on in the next.
    alpha, colormap: as for `overlay`.

    Raises InputError where these do not belong together, or as `overlay` does.
    """
    maps = checked(heat)
    if maps.ndim != 3 or len(maps) != len(words) or (scores is not None and len(scores) != len(words)):
        raise InputError(
            f"a strip needs heat of shape ({len(words)}, H, W), and as many scores if any, for {len(words)} words; "
            f"not {maps.shape}{'' if scores is None else f' and {len(scores)}'}."
        )
    fitted = _fit(image, cell)
    pictures = [fitted, *(overlay(fitted, m, alpha, colormap) for m in maps)]
    numbers = None if scores is None else ["", *(f"{score:.2f}" for score in scores)]
    return side_by_side(pictures, ["", *words], numbers=numbers, title=title, columns=columns)


def side_by_side(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    numbers: Sequence[str] | None = None,
    title: str | None = None,
    columns: int = 8,
) -> Image.Image:
    """Pictures of one size in a row, each with its caption beneath it, and a number, if any, small beneath that.

    title, columns: as for `strip`.

    Raises InputError where these do not belong together.
    """
    if (
        not pictures
        or len({p.size for p in pictures}) > 1
        or {len(captions), len(numbers or captions)} != {len(pictures)}
    ):
        raise InputError(
            f"a row needs pictures of one size, a caption for each, and as many numbers if any, not {len(pictures)} "
            f"pictures, {len(captions)} captions{'' if numbers is None else f' and {len(numbers)} numbers'}."
        )
    width, height = pictures[0].size
    longer = max(width, height)
    font, small = _font(max(longer // 10, 9)), _font(max(longer // 14, 8))
    gap, line = max(longer // 14, 4), round(font.size * 1.5)
    across = min(len(pictures), max(columns, 1))
    high = height + line + (0 if numbers is None else round(small.size * 1.5)) + gap
    head = 0 if title is None else round(font.size * 1.9)
    sheet = Image.new("RGB", (gap + across * (width + gap), gap + head + -(-len(pictures) // across) * high), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if title is not None:
        draw.text((gap, gap), _cut(title, font, sheet.width - 2 * gap), fill=_INK, font=font)
    # Drawn larger and shrunk, for smooth corners.
    corners = Image.new("L", (4 * width, 4 * height), 0)
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, corners.width - 1, corners.height - 1), 2 * gap, fill=255)
    corners = corners.resize((width, height), Image.Resampling.BOX)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = gap + i % across * (width + gap), gap + head + i // across * high
        sheet.paste(picture, (left, top), corners)
        middle, base = left + width // 2, top + height + line // 4
        draw.text((middle, base), _cut(caption, font, width), fill=_INK, font=font, anchor="ma")
        if numbers is not None:
            draw.text((middle, base + line), numbers[i], fill=_FAINT, font=small, anchor="ma")
    return sheet


def _captions(
    i: int, row: list[str], scores: Sequence[Sequence[float]] | None, titles: Sequence[str] | None
) -> list[str]:
    if scores is None:
        numbered = row
    elif len(scores[i]) != len(row):
        raise InputError(f"scores of image {i} has {len(scores[i])} entries for {len(row)} prompts.")
    else:
        numbered = [f"{text}  {score:.2f}" for text, score in zip(row, scores[i], strict=True)]
    return ["" if titles is None else titles[i], *numbered]


def _fit(image: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    # matplotlib ships DejaVu Sans, so that a sheet looks the same on every machine.
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int = 2) -> list[str]:
    """The text in at most `most` lines no wider than `width`, what does not fit cut off with an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], " ".join(lines[most - 1 :])]
    return [_cut(line, font, width) for line in lines]


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    text = text[:width]  # no glyph that is drawn is narrower than a pixel
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
