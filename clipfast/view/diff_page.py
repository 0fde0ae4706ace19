"""One HTML file that shows two checkpoints beside each other: figures, histograms, and maps on the same pictures."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clipfast.view.files import encode_image, write_file
from clipfast.view.overlay import overlay
from clipfast.view.report import _template, _text
from clipfast.view.scoreboard import _safe, _section, number

_SIDE, _BINS = 208, 24
_WIDE, _HIGH, _LEFT, _BELOW, _PAD = 320, 150, 8, 18, 8
_MAPS = (
    "Each map goes from its own least to its own greatest value, before and after alike, because raw values of two "
    "models have no common unit; where either of the two has negative values, 0 is colourless in both. Moved is the "
    "difference of the two as drawn: green where the map gained, purple where it lost, colourless where it stayed."
)


@dataclass(frozen=True)
class Row:
    """A figure before and after: values with standard errors, their paired difference with its interval.

    better: "higher", "lower", or "" where neither is. difference, low, high, p: None where nothing is paired.
    """

    protocol: str
    name: str
    better: str
    about: str
    before: tuple[float, float]
    after: tuple[float, float]
    count: int
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def verdict(self) -> str:
        """ "better" or "worse" where the interval leaves out 0 and one of them is known; "changed"; else ""."""
        if self.low is None or self.high is None or not (self.low > 0 or self.high < 0):
            return ""
        if not self.better:
            return "changed"
        return "better" if (self.low > 0) == (self.better == "higher") else "worse"


@dataclass(frozen=True)
class Histogram:
    """How values lie between edges (n + 1): counts (n,) before and after, or of one thing alone; means beside them."""

    title: str
    about: str
    edges: Sequence[float]
    after: Sequence[int]
    mean: float
    before: Sequence[int] | None = None
    mean_before: float | None = None

    @classmethod
    def of(cls, title: str, about: str, after: Tensor, before: Tensor | None = None, bins: int = _BINS) -> Histogram:
        """Of values (N,) each; those that are not finite are left out. Both share their edges.

        Values that all lie together get the middle of a range of 1e-6.
        """
        parts = [v[v.isfinite()].double() for v in (after, before) if v is not None]
        whole = torch.cat(parts)
        low, high = (float(whole.min()), float(whole.max())) if len(whole) else (0.0, 1.0)
        if high - low < 1e-6:
            low, high = (low + high) / 2 - 5e-7, (low + high) / 2 + 5e-7
        edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
        counts = [torch.histogram(v, edges).hist.long().tolist() for v in parts]
        means = [float(v.mean()) if len(v) else math.nan for v in parts]
        both = before is not None
        return cls(title, about, edges.tolist(), counts[0], means[0],
                   counts[1] if both else None, means[1] if both else None)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A text's maps on a picture: before and after (H, W) in 0..1, of the palette "heat", or "signed" (0.5 is nothing).

    scores: the cosines before and after. ssim: of the two maps.
    """

    text: str
    before: Tensor
    after: Tensor
    palette: str
    scores: tuple[float, float]
    ssim: float


@dataclass(frozen=True)
class Card:
    """A picture with the maps of its texts; group: why it is shown. drift: the cosine of its two embeddings."""

    group: str
    title: str
    picture: Image.Image
    pairs: Sequence[Pair]
    drift: float | None = None


@dataclass(frozen=True)
class Tile:
    """A figure of the two together with its interval, or a plain count."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    about: str = ""


@dataclass(frozen=True)
class Page:
    """All that the page shows.

    facts: what was compared, by name. rows: figures of each checkpoint; tiles: of the two together. parameters: of
    protocols, (name, source, parameters in one line). failures: sentences.
    """

    title: str
    note: str
    facts: Mapping[str, str]
    rows: Sequence[Row]
    tiles: Sequence[Tile]
    histograms: Sequence[Histogram]
    cards: Sequence[Card]
    parameters: Sequence[tuple[str, str, str]]
    versions: Mapping[str, str]
    failures: Sequence[str]


def write_diff_page(path: str | Path, page: Page) -> Path:
    """Write the page, whole or not at all, and return its path; the same page writes the same bytes."""
    sections = [
        _section("figures", "Figures", _rows(page.rows)),
        _section("between", "Between the two", _tiles(page.tiles)),
        _section("histograms", "How the values lie", _histograms(page.histograms)),
        _section("maps", "Maps side by side", _cards(page.cards)),
        _section("parameters", "Protocols and their parameters", _parameters(page.parameters)),
        _section("failures", "Left out", "".join(f"<p>{_safe(why)}</p>" for why in page.failures)),
    ]
    written = _template("scoreboard.html").substitute(
        title=_safe(page.title),
        note=_safe(page.note),
        facts="".join(f"<div><dt>{_safe(k)}</dt><dd>{_safe(v)}</dd></div>" for k, v in page.facts.items()),
        sections="".join(sections),
        versions=_safe(" · ".join(f"{k} {v}" for k, v in page.versions.items())),
        style=_text("report.css") + _text("scoreboard.css") + _text("diff_page.css"),
        script="",
    )
    return write_file(path, written.encode())


def _rows(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    body, last = [], None
    for row in rows:
        arrow = {"higher": "↑", "lower": "↓"}.get(row.better, "")
        said = f'<span class="hidden">, {row.better} is better</span>' if row.better else ""
        protocol = "" if row.protocol == last else _safe(row.protocol)
        last = row.protocol
        paired = "<td>–</td><td>–</td><td>–</td>"
        if row.difference is not None and row.low is not None and row.high is not None and row.p is not None:
            paired = (
                f'<td class="{row.verdict}">{signed(row.difference)}'
                + (f"<small>{row.verdict}</small>" if row.verdict else "")
                + f"</td><td>{signed(row.low)} to {signed(row.high)}</td><td>{_safe(probability(row.p))}</td>"
            )
        values = "".join(f"<td>{number(v)}<small> ± {number(e)}</small></td>" for v, e in (row.before, row.after))
        body.append(
            f'<tr><th scope="row" title="{_safe(row.about)}">{protocol}</th>'
            f'<td class="name">{_safe(row.name)} <span aria-hidden="true">{arrow}</span>{said}</td>'
            f"{values}{paired}<td>{row.count:,}</td></tr>"
        )
    heads = ("protocol", "figure", "before", "after", "difference", "95 % interval", "p", "rows")
    return (
        '<p class="note">Value ± standard error. Differences are after less before, on the same rows; their intervals '
        "and p are of a paired bootstrap over images. Coloured where the interval leaves out 0; of many figures some "
        "do by chance.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-labelledby="figures-title"><table class="changes"><thead>'
        f"<tr>{''.join(f'<th scope=col>{head}</th>' for head in heads)}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _tiles(found: Sequence[Tile]) -> str:
    drawn = []
    for one in found:
        value, interval = f"{one.value:,}" if isinstance(one.value, int) else number(one.value), ""
        if one.low is not None and one.high is not None:
            interval = f"<small>{number(one.low)} to {number(one.high)}, {_safe(one.about)}</small>"
        drawn.append(f'<div class="tile"><b>{value}</b><span>{_safe(one.name)}</span>{interval}</div>')
    return f'<div class="tiles-row">{"".join(drawn)}</div>' if drawn else ""


def _histograms(found: Sequence[Histogram]) -> str:
    return f'<div class="panels wide">{"".join(map(_histogram, found))}</div>' if found else ""


def _histogram(one: Histogram) -> str:
    counts = [one.after] if one.before is None else [one.before, one.after]
    # Shares, so that sets of different numbers of rows can be compared.
    shares = [[c / max(sum(row), 1) for c in row] for row in counts]
    top = max((s for row in shares for s in row), default=0.0) or 1.0
    step = (_WIDE - 2 * _LEFT) / len(one.after)

    def y(share: float) -> float:
        return round(_PAD + (1 - share / top) * (_HIGH - _PAD - _BELOW), 1)

    def outline(row: Sequence[float]) -> str:
        points = [f"{_LEFT + i * step:.1f} {y(s)}L{_LEFT + (i + 1) * step:.1f} {y(s)}" for i, s in enumerate(row)]
        return f"M{_LEFT} {y(0)}L{'L'.join(points)}L{_WIDE - _LEFT} {y(0)}Z"

    kinds = ["alone"] if one.before is None else ["before", "after"]
    drawn = "".join(f'<path class="{kind}" d="{outline(row)}"/>' for kind, row in zip(kinds, shares, strict=True))
    ends = (
        f'<text x="{_LEFT}" y="{_HIGH - 4}">{one.edges[0]:.4g}</text>'
        f'<text x="{_WIDE - _LEFT}" y="{_HIGH - 4}" class="y">{one.edges[-1]:.4g}</text>'
    )
    means = f"mean {number(one.mean)}"
    if one.mean_before is not None:
        means = f"mean {number(one.mean_before)} before, {number(one.mean)} after"
    legend = "" if one.before is None else '<span class="key before">before</span><span class="key after">after</span>'
    return (
        f'<figure class="panel"><svg viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="{_safe(one.title)}: {means}">'
        f'<path class="axis" d="M{_LEFT} {y(0)}H{_WIDE - _LEFT}"/>{drawn}{ends}</svg>'
        f"<figcaption>{_safe(one.title)}{legend}<small>{means}. {_safe(one.about)}</small></figcaption></figure>"
    )


def _cards(cards: Sequence[Card]) -> str:
    if not cards:
        return ""
    found = [f'<p class="note">{_MAPS}</p>']
    for group, own in groupby(cards, key=lambda card: card.group):
        heading = f"<h3>{_safe(group)}</h3>" if group else ""
        found.append(f'{heading}<div class="cards">{"".join(map(_card, own))}</div>')
    return "".join(found)


def _card(card: Card) -> str:
    drift = "" if card.drift is None else f"<span>embeddings: cosine {number(card.drift)}</span>"
    pairs = "".join(_pair(card.picture, one) for one in card.pairs)
    head = f"<h4>{_safe(card.title)}{drift}</h4>"
    return f'<article class="side-by-side">{head}<div class="pairs">{pairs}</div></article>'


def _pair(picture: Image.Image, one: Pair) -> str:
    moved = 0.5 + (one.after - one.before).double() * (1 if one.palette == "signed" else 0.5)
    drawn = [
        ("picture", picture),
        ("before", overlay(picture, one.before, colormap=one.palette)),
        ("after", overlay(picture, one.after, colormap=one.palette)),
        ("moved", overlay(picture, moved.clamp(0, 1), colormap="signed")),
    ]
    before, after = one.scores
    figures = "".join(
        f'<figure><img src="{_jpeg(image)}" alt="{_safe(one.text)}: {name}" loading="lazy">'
        f"<figcaption>{name}</figcaption></figure>"
        for name, image in drawn
    )
    return (
        f'<div class="pair"><p><b>{_safe(one.text)}</b> similarity {number(before)} → {number(after)}, '
        f"SSIM of the maps {number(one.ssim)}</p>{figures}</div>"
    )


def _jpeg(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    data = encode_image(small, "JPEG", quality=84, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")


def _parameters(rows: Sequence[tuple[str, str, str]]) -> str:
    if not rows:
        return ""
    body = "".join(
        f'<tr><th scope="row">{_safe(name)}</th><td>{_safe(parameters)}</td><td>{_safe(source)}</td></tr>'
        for name, source, parameters in rows
    )
    return (
        '<div class="scroll"><table class="plain text"><thead><tr><th scope="col">protocol</th>'
        f'<th scope="col">parameters</th><th scope="col">source</th></tr></thead><tbody>{body}</tbody></table></div>'
    )


def signed(value: float) -> str:
    """A difference as tables show it.

    >>> signed(0.01234), signed(-1.0), signed(-0.0001), signed(0.0), signed(float("nan"))
    ('+0.012', '−1.000', '0.000', '0', '–')
    """
    if not math.isfinite(value):
        return "–"
    shown = number(abs(value))
    sign = ("+" if value > 0 else "−") if float(shown) else ""
    return "0" if value == 0 else sign + shown


def probability(p: float) -> str:
    """A p-value as tables show it.

    >>> probability(0.2345), probability(0.0004), probability(float("nan"))
    ('0.234', '< 0.001', '–')
    """
    if not math.isfinite(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
