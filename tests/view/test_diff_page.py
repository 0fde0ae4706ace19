from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from clipfast.view.diff_page import Card, Histogram, Page, Pair, Row, Tile, write_diff_page

PAGE = Page(
    title="A <b>",
    note="x & y",
    facts={"Before": "one<", "After": "two"},
    rows=[
        Row("p", "hit", "higher", "p: k=1", (0.5, 0.01), (0.75, 0.02), 40, 0.25, 0.1, 0.4, 0.0004),
        Row("p", "loss", "lower", "p: k=1", (0.5, 0.01), (0.75, 0.02), 40, 0.25, 0.1, 0.4, 0.0004),
        Row("q", "cosine", "", "q", (0.5, 0.01), (0.25, 0.02), 40, -0.25, -0.3, -0.2, 0.02),
        Row("q", "same", "higher", "q", (0.5, 0.01), (0.5, 0.01), 40, 0.0, -0.1, 0.1, 1.0),
        Row("r", "apart", "higher", "r", (0.5, 0.01), (0.4, 0.01), 7),
    ],
    tiles=[Tile("drift", 0.875, 0.8, 0.9, "mean of 40"), Tile("pictures that became right", 1234)],
    histograms=[
        Histogram.of("both", "about", torch.tensor([0.0, 0.5, 1.0, math.nan]), torch.tensor([0.0, 0.1])),
        Histogram.of("alone", "about", torch.ones(3)),
    ],
    cards=[
        Card(
            "changed most",
            "a <picture>",
            Image.new("RGB", (120, 80), (128, 128, 128)),
            [Pair("a <dog>", torch.zeros(80, 120), torch.eye(120)[:80], "heat", (0.1, 0.2), 0.5)],
            0.9375,
        )
    ],
    parameters=[("p", "source", "k=1")],
    versions={"clipfast": "1"},
    failures=["<script>alert(1)</script>"],
)


@pytest.fixture
def page(tmp_path: Path) -> str:
    return write_diff_page(tmp_path / "diff.html", PAGE).read_text()


def test_it_needs_nothing_beside_it_and_runs_no_names(page: str, tmp_path: Path) -> None:
    assert "default-src 'none'" in page
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    for text in ("A &lt;b&gt;", "x &amp; y", "one&lt;", "a &lt;dog&gt;", "a &lt;picture&gt;"):
        assert text in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert write_diff_page(tmp_path / "again.html", PAGE).read_text() == page


def test_a_difference_is_good_or_bad_by_its_figure(page: str) -> None:
    assert [row.verdict for row in PAGE.rows] == ["better", "worse", "changed", "", ""]
    rows = page.split("<tbody>")[1].split("</tbody>")[0].split("<tr>")[1:]
    assert '<td class="better">+0.250<small>better</small></td><td>+0.100 to +0.400</td><td>&lt; 0.001</td>' in rows[0]
    assert '<td class="worse">' in rows[1] and "lower is better" in rows[1]
    # A protocol is named once.
    assert '<th scope="row" title="p: k=1">p</th>' in rows[0] and '<th scope="row" title="p: k=1"></th>' in rows[1]
    assert '<td class="changed">−0.250<small>changed</small></td>' in rows[2] and "is better" not in rows[2]
    assert '<td class="">0</td>' in rows[3]
    assert rows[4].count("<td>–</td>") == 3 and "<td>7</td>" in rows[4]


def test_tiles_have_intervals_or_are_counts(page: str) -> None:
    assert "<b>0.875</b><span>drift</span><small>0.800 to 0.900, mean of 40</small>" in page
    assert "<b>1,234</b><span>pictures that became right</span></div>" in page


def test_histograms() -> None:
    both, alone = PAGE.histograms
    assert sum(both.after) == 3 and both.before is not None and sum(both.before) == 2
    assert (both.edges[0], both.edges[-1]) == (0, 1) and len(both.edges) == 25
    assert both.mean == 0.5 and both.mean_before == pytest.approx(0.05)
    assert both.after[0] == both.after[12] == both.after[-1] == 1
    assert both.before[0] == 1 and both.before[2] == 1
    # Equal values lie in the middle.
    assert sum(alone.after[11:13]) == 3 and alone.before is None
    assert alone.edges[0] < 1 < alone.edges[-1]
    empty = Histogram.of("none", "", torch.full((2,), math.nan))
    assert sum(empty.after) == 0 and math.isnan(empty.mean)


def test_charts_say_what_they_show_and_stay_in_their_frame(page: str, tmp_path: Path) -> None:
    pieces = [part.split("</svg>")[0] for part in page.split("<svg ")[1:]]
    charts = [ElementTree.fromstring(f"<svg {piece}</svg>") for piece in pieces]
    assert [chart.get("aria-label") for chart in charts] == [
        "both: mean 0.050 before, 0.500 after",
        "alone: mean 1.000",
    ]
    for chart in charts:
        width, height = (float(v) for v in chart.get("viewBox", "").split()[2:])
        outlines = [path for path in chart.findall("path") if path.get("class") != "axis"]
        for path in outlines:
            points = [point.split() for point in path.get("d", "")[1:].rstrip("Z").split("L")]
            assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in points)
    assert [[path.get("class") for path in chart.findall("path")] for chart in charts] == [
        ["axis", "before", "after"],
        ["axis", "alone"],
    ]
    bare = replace(PAGE, histograms=[Histogram.of("none", "", torch.full((2,), math.nan))])
    assert "nan" not in write_diff_page(tmp_path / "bare.html", bare).read_text().split("<svg")[1].split("</svg>")[0]


def drawn_of(folder: Path, pair: Pair) -> dict[str, np.ndarray]:
    """The pictures of a page that shows one pair, by their captions."""
    page = write_diff_page(folder / "p.html", replace(PAGE, cards=[replace(PAGE.cards[0], pairs=[pair])])).read_text()
    found = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)" alt="[^"]*: (\w+)"', page)
    return {name: np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int) for data, name in found}


def test_maps_are_drawn_and_what_moved(tmp_path: Path) -> None:
    left, right = torch.zeros(80, 120), torch.zeros(80, 120)
    left[:, :40], right[:, 80:] = 1, 1
    for palette, scale, blank in (("heat", 1.0, 0.0), ("signed", 0.5, 0.5)):
        drawn = drawn_of(tmp_path, Pair("t", scale * left + blank, scale * right + blank, palette, (0, 0), 0))
        assert list(drawn) == ["picture", "before", "after", "moved"]
        plain = drawn["picture"]
        for name, at in (("before", 20), ("after", 100), ("moved", 20), ("moved", 100)):
            assert np.abs(drawn[name][40, at] - plain[40, at]).max() > 40, (palette, name, at)
        for name, at in (("before", 100), ("after", 20), ("moved", 60)):
            assert np.abs(drawn[name][40, at] - plain[40, at]).max() < 12, (palette, name, at)
        # Green where it gained, purple where it lost.
        gained, lost = drawn["moved"][40, 100], drawn["moved"][40, 20]
        assert gained[1] > gained[0] and gained[1] > gained[2] and lost[1] < lost[0] and lost[1] < lost[2]
    drawn = drawn_of(tmp_path, Pair("t", left, left, "heat", (0, 0), 1))
    assert np.abs(drawn["moved"] - drawn["picture"]).max() < 8


def test_empty_parts_are_left_out(tmp_path: Path) -> None:
    bare = replace(PAGE, rows=[], tiles=[], histograms=[], cards=[], parameters=[], failures=[])
    page = write_diff_page(tmp_path / "page.html", bare).read_text()
    assert "<section" not in page and "A &lt;b&gt;" in page
