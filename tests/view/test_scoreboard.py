from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from clipfast.view.scoreboard import Board, Cell, Column, Lines, Shown, write_scoreboard

BOARD = Board(
    title="A <b>",
    note="note",
    facts={"Data": "x & y"},
    methods=["one", "two", "three"],
    columns=[Column("p", "hit", "higher", "p: none"), Column("q", "loss", "lower", "q: none")],
    cells={
        "one": {0: Cell(0.5, 0.01, 0.48, 0.52, 40, True), 1: Cell(0.25, 0.01, 0.2, 0.3, 40, True)},
        "two": {0: Cell(0.25, 0.01, 0.2, 0.3, 40, False), 1: Cell(math.nan, math.nan, math.nan, math.nan, 40, False)},
        "three": {0: Cell(0.125, 0.01, 0.1, 0.2, 7, False, apart=True)},
    },
    lines=[
        Lines("deletion", "lower", "axis", [0, 0.5, 1],
              {"one": ([1, 0.5, 0], [0.1, 0.1, 0]), "two": ([1, 1, 0], [0, 0, 0])})
    ],
    examples={"one": ([Shown("a <dog>", 0.75, Image.new("RGB", (20, 30), "red"), np.zeros((20, 20)), "heat")], [])},
    telling="hit of p",
    timings={"one": {"maps": "1 ms"}, "two": {"p": "2 ms"}},
    parameters={"protocol": [("p", "source", "k=1")]},
    versions={"clipfast": "1"},
    failures={"k": "k: <script>alert(1)</script>"},
)  # fmt: skip


@pytest.fixture
def page(tmp_path: Path) -> str:
    return write_scoreboard(tmp_path / "page.html", BOARD).read_text()


def test_it_needs_nothing_beside_it_and_runs_no_names(page: str, tmp_path: Path) -> None:
    assert "default-src 'none'" in page
    assert "<script>alert" not in page
    assert "A &lt;b&gt;" in page
    assert "x &amp; y" in page
    assert "a &lt;dog&gt;" in page
    assert "prefers-color-scheme: dark" in page
    assert write_scoreboard(tmp_path / "again.html", BOARD).read_text() == page


def test_cells(page: str) -> None:
    table = page.split("</table>")[0]
    rows = {part.split("</th>")[0]: part for part in table.split('<tr><th scope="row">')[1:]}
    assert '<b>0.500</b><small> ± 0.010</small><small class="interval">0.480 to 0.520</small>' in rows["one"]
    assert "--good:100%" in rows["one"]
    assert "--good:0%" in rows["two"], "three had other pairs"
    assert '<td class="none" data-value="">–</td>' in rows["two"]
    assert "of 7 pairs" in rows["three"]
    assert "of 40 pairs" not in rows["one"]


def test_curves_say_what_they_show_and_stay_in_their_frame(page: str) -> None:
    pieces = [part.split("</svg>")[0] for part in page.split("<svg ")[1:]]
    charts = [ElementTree.fromstring(f"<svg {piece}</svg>") for piece in pieces]
    assert [chart.get("aria-label") for chart in charts] == [
        "one: deletion, from 1.000 to 0.000",
        "two: deletion, from 1.000 to 0.000",
    ]
    assert all(chart.get("role") == "img" for chart in charts)
    width, height = (float(v) for v in charts[0].get("viewBox", "").split()[2:])
    for chart in charts:
        for path in chart.findall("path[@class='line']") + chart.findall("path[@class='band']"):
            points = path.get("d", "")[1:].rstrip("Z").split("L")
            for x, y in (map(float, point.split()) for point in points):
                assert 0 <= x <= width
                assert 0 <= y <= height


def test_empty_parts_are_left_out(tmp_path: Path) -> None:
    bare = replace(BOARD, lines=[], examples={}, failures={})
    page = write_scoreboard(tmp_path / "page.html", bare).read_text()
    assert 'id="figures"' in page
    assert not any(f'id="{name}"' in page for name in ("curves", "examples", "failures"))
