"""One HTML file that shows what was explained: no server, no network, nothing beside it."""

from __future__ import annotations

import base64
import html
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from clipfast.errors import InputError
from clipfast.view import words as colours
from clipfast.view.files import encode_image, write_file
from clipfast.view.overlay import Heat, checked, palette

# Maps come from a few dozen patches a side: stored no wider than this and interpolated by the page, they lose nothing.
_MAP_SIDE = 112
_IMAGE_SIDE = 1024
# Maps of single words are first seen as small pictures, and there are many.
_WORD_SIDE = 64
_NOTE = "Bright patches raise the similarity of image and prompt. Each map is scaled to its own brightest patch."
_SIGNED_NOTE = (
    "Green patches raise the similarity of image and prompt, purple ones lower it. "
    "Each map is scaled to its own strongest patch."
)


@dataclass(frozen=True)
class Strip:
    """One sentence as maps of its words.

    words: W words, in reading order. heat: (W, H, W') in 0..1, one map a word, on one scale. scores: W numbers.
    palette: as of a `ReportItem`.
    """

    words: Sequence[str]
    heat: Heat
    scores: Sequence[float]
    palette: str = "heat"


@dataclass(frozen=True)
class ReportItem:
    """One explained image of a report.

    title: its caption, for instance the file name.
    image: the picture.
    prompts: P texts.
    heat: (P, H, W) in 0..1, of any resolution: each map is stretched over the whole picture.
    scores: P numbers, the cosine similarities.
    words: for some of the prompts, (word, value) in reading order; signed_words: whether a value says which way.
    strips: for some of the prompts, maps of their words.
    extras: what else the method says, by name, P numbers each.
    palette: "heat", or "signed" for maps whose 0.5 is nothing.
    """

    title: str
    image: Image.Image
    prompts: Sequence[str]
    heat: Heat
    scores: Sequence[float]
    words: Mapping[str, Sequence[tuple[str, float]]] | None = None
    signed_words: bool = True
    strips: Mapping[str, Strip] | None = None
    extras: Mapping[str, Sequence[float]] | None = None
    palette: str = "heat"


def write_report(
    path: str | Path,
    items: Sequence[ReportItem],
    *,
    method: str,
    model: str,
    seconds: float,
    failures: Mapping[str, str] | None = None,
    title: str = "Heat maps",
    note: str | None = None,
    created: datetime | None = None,
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Write the report, whole or not at all, and return its path.

    method, model: their names, shown in the header with the number of images and maps and the time.
    seconds: how long explaining took.
    failures: name and one sentence for each image that could not be explained.
    note: a sentence under the heading, by default how to read the maps.
    created: shown in the header, by default now; with it and `versions` given, the same input writes the same bytes.
    versions: names and versions in the footer, by default of clipfast, torch and Python.

    Raises InputError for maps, scores or words that are not finite or do not fit the prompts; OSError as the file
    system does.
    """
    data = {
        "palettes": {name: _base64(palette(name).tobytes()) for name in ("heat", "jet", "signed")},
        "colours": {"for": colours.FOR, "against": colours.AGAINST, "counts": colours.COUNTS},
        "legends": {"signed": colours.legend(True), "plain": colours.legend(False)},
        "items": [_item(item) for item in items],
    }
    if note is None:
        note = _SIGNED_NOTE if any(item.palette == "signed" for item in items) else _NOTE
    maps = sum(len(item.prompts) for item in items)
    facts = {
        "Method": method,
        "Model": model,
        "Images": f"{len(items):,}",
        "Maps": f"{maps:,}",
        "Time": _duration(seconds),
        "Made": (created or datetime.now()).strftime("%Y-%m-%d %H:%M"),
    }
    page = _template("report.html").substitute(
        title=html.escape(title),
        note=f'<p class="note">{html.escape(note)}</p>' if note else "",
        facts="".join(f"<div><dt>{k}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items()),
        failures=_failures(failures or {}),
        versions=html.escape(" · ".join(f"{k} {v}" for k, v in (versions or _versions()).items())),
        style=_text("report.css"),
        script=_text("report.js"),
        data=_inert(data),
    )
    return write_file(path, page.encode())


def _item(item: ReportItem) -> dict[str, Any]:
    heat = checked(item.heat)
    count = len(item.prompts)
    if heat.ndim != 3 or len(heat) != count or len(item.scores) != count:
        raise InputError(
            f"{item.title}: {count} prompts need heat of shape ({count}, H, W) and {count} scores,"
            f" not {heat.shape} and {len(item.scores)}."
        )
    if not all(math.isfinite(s) for s in item.scores):
        raise InputError(f"{item.title}: a score is not finite.")
    words, strips = item.words or {}, item.strips or {}
    extras = item.extras or {}
    if any(len(values) != count for values in extras.values()):
        raise InputError(f"{item.title}: {', '.join(extras)} need {count} numbers each, one for each prompt.")
    return {
        "title": item.title,
        "image": "data:image/jpeg;base64," + _base64(_jpeg(item.image)),
        "width": item.image.width,
        "height": item.image.height,
        "signedWords": item.signed_words,
        "prompts": [
            {
                "text": prompt,
                "score": round(float(score), 6),
                "map": _png(heat[p]),
                "palette": item.palette,
                "words": _words(words[prompt]) if prompt in words else None,
                "strip": _strip(item.title, strips[prompt]) if prompt in strips else None,
                "extras": {name: f"{float(values[p]):.3g}" for name, values in extras.items()},
            }
            for p, (prompt, score) in enumerate(zip(item.prompts, item.scores, strict=True))
        ],
    }


def _strip(title: str, strip: Strip) -> list[dict[str, Any]]:
    heat = checked(strip.heat)
    if heat.ndim != 3 or not len(heat) == len(strip.words) == len(strip.scores):
        raise InputError(f"{title}: {len(strip.words)} words need as many maps and scores, not {heat.shape}.")
    return [
        {
            "text": word,
            "score": round(float(score), 6),
            "map": _png(values, _WORD_SIDE),
            "palette": strip.palette,
        }
        for word, score, values in zip(strip.words, strip.scores, heat, strict=True)
    ]


def _words(pairs: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    strengths = colours.strengths([value for _, value in pairs])
    return [
        {"word": word, "value": float(value), "strength": round(strength, 4)}
        for (word, value), strength in zip(pairs, strengths, strict=True)
    ]


def _jpeg(image: Image.Image) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE), Image.Resampling.LANCZOS)
    return encode_image(small, "JPEG", quality=86, optimize=True)


def _png(values: np.ndarray, side: int = _MAP_SIDE) -> str:
    height, width = values.shape
    scale = min(1.0, side / max(height, width))
    small = Image.fromarray(values)
    if scale < 1:
        size = (max(round(width * scale), 1), max(round(height * scale), 1))
        small = small.resize(size, Image.Resampling.BILINEAR)
    grey = np.rint(np.asarray(small) * 255).clip(0, 255).astype(np.uint8)
    return "data:image/png;base64," + _base64(encode_image(Image.fromarray(grey), "PNG", optimize=True))


def _failures(failures: Mapping[str, str]) -> str:
    if not failures:
        return ""
    sentences = [why if name in why else f"{name}: {why}" for name, why in failures.items()]
    rows = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    noun = "image was" if len(failures) == 1 else "images were"
    return f'<section class="failures"><h2>{len(failures)} {noun} not explained</h2><ul>{rows}</ul></section>'


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds // 60:,.0f} min {seconds % 60:.0f} s"


def _versions() -> dict[str, str]:
    found = {}
    for name in ("clipfast", "torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "Python": platform.python_version()}


def _inert(data: object) -> str:
    """JSON that no text in it can end or turn into markup."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


@cache
def _text(name: str) -> str:
    return resources.files("clipfast.view").joinpath(name).read_text(encoding="utf-8")


def _template(name: str) -> Template:
    return Template(_text(name))
