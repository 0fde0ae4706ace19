"""One HTML file that shows an evaluation: figures with intervals, curves, examples, timings, and every parameter."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from clipfast.view.files import encode_image, write_file
from clipfast.view.overlay import Heat, overlay
from clipfast.view.report import _template, _text

_THUMB, _NOTHING = 168, "–"
_WIDE, _HIGH, _LEFT, _BELOW, _PAD = 216, 128, 30, 18, 6


@dataclass(frozen=True)
class Column:
    """A figure of a protocol: its name, whether more or less is better, and the protocol in one line."""

    protocol: str
    name: str
    better: str
    about: str


@dataclass(frozen=True)
class Cell:
    """A method's figure with its standard error and interval, over so many pairs.

    apart: whether those are other pairs than the column's other methods had, so that it is compared with none.
    """

    value: float
    error: float
    low: float
    high: float
    count: int
    best: bool
    apart: bool = False


@dataclass(frozen=True)
class Lines:
    """A curve of every method over shares 0..1 of the pixels: means, and half the widths of their bands."""

    title: str
    better: str
    axis: str
    at: Sequence[float]
    methods: Mapping[str, tuple[Sequence[float], Sequence[float]]]


@dataclass(frozen=True)
class Shown:
    """An example: heat (H, W) in 0..1 over the picture, what was asked, the figure's value, and the object's mask."""

    text: str
    value: float
    picture: Image.Image
    heat: Heat
    palette: str
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Board:
    """All that the page shows.

    facts: what was measured, by name. cells: by method and then column number. examples: by method the best and the
    worst; telling: the figure that says which. timings: by method, text by column. parameters: of protocols and
    methods, (name, source, parameters in one line).
    """

    title: str
    note: str
    facts: Mapping[str, str]
    methods: Sequence[str]
    columns: Sequence[Column]
    cells: Mapping[str, Mapping[int, Cell]]
    lines: Sequence[Lines]
    examples: Mapping[str, tuple[Sequence[Shown], Sequence[Shown]]]
    telling: str
    timings: Mapping[str, Mapping[str, str]]
    parameters: Mapping[str, Sequence[tuple[str, str, str]]]
    versions: Mapping[str, str]
    failures: Mapping[str, str]


def write_scoreboard(path: str | Path, board: Board) -> Path:
    """Write the page, whole or not at all, and return its path; the same board writes the same bytes."""
    facts = "".join(f"<div><dt>{_safe(k)}</dt><dd>{_safe(v)}</dd></div>" for k, v in board.facts.items())
    sections = [
        _section("figures", "Figures", _figures(board)),
        _section("curves", "Curves", "".join(_panels(lines) for lines in board.lines)),
        _section("examples", "Best and worst", _examples(board)),
        _section("times", "Times", _times(board)),
        _section("parameters", "Protocols, methods and their parameters", _parameters(board)),
        _section("failures", "Not read", "".join(f"<p>{_safe(why)}</p>" for why in board.failures.values())),
    ]
    page = _template("scoreboard.html").substitute(
        title=_safe(board.title),
        note=_safe(board.note),
        facts=facts,
        sections="".join(sections),
        versions=_safe(" · ".join(f"{k} {v}" for k, v in board.versions.items())),
        style=_text("report.css") + _text("scoreboard.css"),
        script=_text("scoreboard.js"),
    )
    return write_file(path, page.encode())


def number(value: float) -> str:
    """A figure as tables show it: three digits behind the point, or so many as say as much.

    >>> number(0.12345), number(47.82), number(float("nan"))
    ('0.123', '47.8', '–')
    """
    if not math.isfinite(value):
        return _NOTHING
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _section(name: str, title: str, body: str) -> str:
    if not body:
        return ""
    heading = f'<h2 id="{name}-title">{title}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">{heading}{body}</section>'


def _figures(board: Board) -> str:
    spans: list[tuple[str, int, str]] = []
    for column in board.columns:
        if spans and spans[-1][0] == column.protocol:
            spans[-1] = (column.protocol, spans[-1][1] + 1, column.about)
        else:
            spans.append((column.protocol, 1, column.about))
    top = "".join(
        f'<th scope="colgroup" colspan="{count}" class="protocol" title="{_safe(about)}">{_safe(name)}</th>'
        for name, count, about in spans
    )
    heads = "".join(
        f'<th scope="col" aria-sort="none"><button type="button" title="{column.better} is better">'
        f'{_safe(column.name)} <span aria-hidden="true">{"↑" if column.better == "higher" else "↓"}</span>'
        f'<span class="hidden">, {column.better} is better</span></button></th>'
        for column in board.columns
    )
    goodness = [_goodness(board, i) for i in range(len(board.columns))]
    rows = []
    for method in board.methods:
        own = board.cells.get(method, {})
        cells = [_cell(own.get(i), goodness[i].get(method)) for i in range(len(board.columns))]
        rows.append(f'<tr><th scope="row">{_safe(method)}</th>{"".join(cells)}</tr>')
    return (
        '<p class="note">Value ± standard error, and below it the 95 % interval; images are what is drawn again, with '
        "all of their prompts. Bold is the best of a column, which need not be significantly better than the next; a "
        "figure of other pairs than the rest of its column had, with their number below it, is compared with none. "
        "A click on a column sorts by it.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-labelledby="figures-title"><table class="figures">'
        f'<thead><tr><th rowspan="2" scope="col">method</th>{top}</tr><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _goodness(board: Board, column: int) -> dict[str, float]:
    """How near to the best of a column each method is: 0 the worst, 1 the best."""
    sign = 1 if board.columns[column].better == "higher" else -1
    cells = {m: board.cells[m][column] for m in board.methods if column in board.cells.get(m, {})}
    found = {m: sign * c.value for m, c in cells.items() if math.isfinite(c.value) and not c.apart}
    low, high = min(found.values(), default=0), max(found.values(), default=0)
    return {m: (v - low) / (high - low) if high > low else 0.0 for m, v in found.items()}


def _cell(cell: Cell | None, good: float | None) -> str:
    if cell is None or not math.isfinite(cell.value):
        return f'<td class="none" data-value="">{_NOTHING}</td>'
    tag = "b" if cell.best else "span"
    good = round(100 * (good or 0))
    other = f'<small class="interval">of {cell.count:,} pairs</small>' if cell.apart else ""
    return (
        f'<td data-value="{cell.value:.9g}" style="--good:{good}%" title="{cell.count:,} pairs">'
        f"<{tag}>{number(cell.value)}</{tag}><small> ± {number(cell.error)}</small>"
        f'<small class="interval">{number(cell.low)} to {number(cell.high)}</small>{other}</td>'
    )


def _panels(lines: Lines) -> str:
    """A small chart for each method: its curve and band over the curves of all others."""
    values = [
        v for mean, band in lines.methods.values() for m, b in zip(mean, band, strict=True) for v in (m - b, m + b)
    ]
    low, high = min([0.0, *values]), max([*values, 1e-9])
    step = 10 ** math.floor(math.log10(high - low))
    ticks = [t for t in (0.0, _round_down(high, step)) if low <= t <= high]

    def x(at: float) -> float:
        return round(_LEFT + at * (_WIDE - _LEFT - _PAD), 1)

    def y(value: float) -> float:
        return round(_PAD + (high - value) / (high - low) * (_HIGH - _PAD - _BELOW), 1)

    def path(values: Sequence[float]) -> str:
        return "M" + "L".join(f"{x(a)} {y(v)}" for a, v in zip(lines.at, values, strict=True))

    others = {name: path(mean) for name, (mean, _) in lines.methods.items()}
    grid = "".join(
        f'<path class="axis" d="M{_LEFT} {y(t)}H{_WIDE - _PAD}"/>'
        f'<text x="{_LEFT - 4}" y="{y(t) + 3.5}" class="y">{t:g}</text>'
        for t in ticks
    )
    grid += f'<text x="{_LEFT}" y="{_HIGH - 4}">0</text><text x="{_WIDE - _PAD}" y="{_HIGH - 4}" class="y">100 %</text>'
    panels = []
    for name, (mean, band) in lines.methods.items():
        upper = [(x(a), y(m + b)) for a, m, b in zip(lines.at, mean, band, strict=True)]
        lower = [(x(a), y(m - b)) for a, m, b in zip(lines.at, mean, band, strict=True)]
        area = "M" + "L".join(f"{a} {b}" for a, b in [*upper, *lower[::-1]]) + "Z"
        said = f"{name}: {lines.title}, from {number(mean[0])} to {number(mean[-1])}"
        behind = f'<path class="others" d="{"".join(p for n, p in others.items() if n != name)}"/>'
        panels.append(
            f'<figure class="panel"><svg viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="{_safe(said)}">'
            f"{grid}{behind}"
            f'<path class="band" d="{area}"/><path class="line" d="{others[name]}"/></svg>'
            f"<figcaption>{_safe(name)}</figcaption></figure>"
        )
    return (
        f'<h3>{_safe(lines.title)}</h3><p class="note">{_safe(lines.axis)}; {lines.better} is better. '
        f'Mean and 95 % band of each method, all others grey.</p><div class="panels">{"".join(panels)}</div>'
    )


def _round_down(value: float, step: float) -> float:
    return round(math.floor(value / step) * step, 9)


def _examples(board: Board) -> str:
    if not board.examples:
        return ""
    rows = []
    for method, (best, worst) in board.examples.items():
        groups = "".join(
            f'<div class="group"><h4>{kind}</h4>{"".join(_figure(method, one) for one in some)}</div>'
            for kind, some in (("best", best), ("worst", worst))
            if some
        )
        rows.append(f'<div class="method"><h3>{_safe(method)}</h3><div class="groups">{groups}</div></div>')
    return f'<p class="note">By {_safe(board.telling)}; the outline is the object.</p>{"".join(rows)}'


def _figure(method: str, one: Shown) -> str:
    heat = overlay(one.picture, one.heat, colormap=one.palette)
    if one.mask is not None:
        heat = _outlined(heat, one.mask)
    heat.thumbnail((_THUMB, _THUMB), Image.Resampling.LANCZOS)
    data = base64.b64encode(encode_image(heat, "JPEG", quality=84, optimize=True)).decode("ascii")
    said = f"{method} for {one.text}: {number(one.value)}"
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" width="{heat.width}" height="{heat.height}" '
        f'alt="{_safe(said)}" loading="lazy"><figcaption>{_safe(one.text)}'
        f"<span>{number(one.value)}</span></figcaption></figure>"
    )


def _outlined(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """The picture, enlarged if it is small, with a white line around the mask."""
    scale = max(1, 2 * _THUMB // max(picture.size))
    size = (picture.width * scale, picture.height * scale)
    pixels = np.array(picture.resize(size, Image.Resampling.BICUBIC))
    inside = np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    core = inside.copy()
    for shift in range(1, 1 + max(2, max(size) // 160)):
        for axis in (0, 1):
            core &= np.roll(inside, shift, axis) & np.roll(inside, -shift, axis)
    pixels[inside & ~core] = 255
    return Image.fromarray(pixels)


def _times(board: Board) -> str:
    names = list(dict.fromkeys(name for own in board.timings.values() for name in own))
    if not names:
        return ""
    head = "".join(f'<th scope="col">{_safe(name)}</th>' for name in names)
    rows = "".join(
        f'<tr><th scope="row">{_safe(method)}</th>'
        + "".join(f"<td>{_safe(own.get(name, _NOTHING))}</td>" for name in names)
        + "</tr>"
        for method, own in board.timings.items()
    )
    return (
        '<p class="note">Maps: time for one image with all of its prompts. Protocols: time for one pair of image and '
        "prompt; beside is the share of it that was not the model's, where the protocol runs it on changed images.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-labelledby="times-title"><table class="plain">'
        f'<thead><tr><th scope="col">method</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _parameters(board: Board) -> str:
    blocks = []
    for title, rows in board.parameters.items():
        body = "".join(
            f'<tr><th scope="row">{_safe(name)}</th><td>{_safe(parameters)}</td><td>{_safe(source)}</td></tr>'
            for name, source, parameters in rows
        )
        blocks.append(
            f'<div class="scroll"><table class="plain text"><thead><tr><th scope="col">{_safe(title)}</th>'
            f'<th scope="col">parameters</th><th scope="col">source</th></tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )
    return "".join(blocks)


def _safe(text: str) -> str:
    return html.escape(text)
