"""The papers' tables: page and data say the same, and every command runs, on small trees with small models."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from clipfast.metrics.base import figures
from clipfast.metrics.evaluation import Evaluation
from clipfast.metrics.registry import PROTOCOLS, build_protocol, entry_of
from clipfast.models.model import Model

ROOT = Path(__file__).parents[2]


def module(path: Path) -> ModuleType:
    """A script, or the tests of another folder, as a module."""
    spec = importlib.util.spec_from_file_location(f"papers_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


make_papers = module(ROOT / "scripts" / "make_papers.py")
TABLES = make_papers.tables()
WITH_COMMANDS = sorted(name for name, table in TABLES.items() if table["command"])

# Methods that take hundreds of passes, in fewer.
FEWER = {
    "rise": "rise:masks=12",
    "rise:masks=8000": "rise:masks=12",
    "kernel_shap": "kernel_shap:samples=12",
    "m2ib": "m2ib:steps=2:samples=2",
    "tclip:views=25": "tclip:views=9",
    "gscore_cam": "gscore_cam:top=4",
    "group_cam": "group_cam:groups=4",
}


def test_the_page_is_written_from_the_data() -> None:
    assert make_papers.PAGE.read_text() == make_papers.page(TABLES)


@pytest.mark.parametrize("name", sorted(TABLES))
def test_tables_are_whole(name: str) -> None:
    table = TABLES[name]
    assert set(table) == {"title", "paper", "source", "columns", "rows", "command", "differs"}
    assert table["paper"] in make_papers.PAPERS and table["source"] and table["differs"]
    for row in table["rows"]:
        assert len(row["published"]) == len(row["measured"]) == len(table["columns"])
        assert all(isinstance(one, int | float) for one in row["published"])
        assert row["method"] in (ROOT / "docs" / "papers.md").read_text()
    for column in table["columns"]:
        assert column["better"] in ("higher", "lower")
        if "protocol" in column:
            assert table["command"]
            known = PROTOCOLS[column["protocol"]].kind.figures
            assert known.get(column["figure"], column["better"]) == column["better"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, build_clip: Any, build_resnet: Any, tokenizer: Any) -> list[str]:
    """Small models in place of those that commands name; the names asked for."""
    asked: list[str] = []

    def load(name: str, pretrained: Any = None, **_: Any) -> Model:
        asked.append(name)
        built = build_resnet(width=8, image_size=64) if name.startswith("RN") else build_clip(patch_size=32)
        return Model(built, tokenizer, None, name)

    monkeypatch.setattr("clipfast.models.load.load", load)
    # Intervals are not what is tested here.
    monkeypatch.setitem(figures.__kwdefaults__, "resamples", 4)
    # 80 texts for each of ImageNet's 1,000 classes would take longer than all else.
    monkeypatch.setattr(sys.modules["clipfast.metrics.evaluate"], "default_templates", lambda *_: "bare")
    return asked


@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_commands_measure_what_the_table_has(name: str, run: Any, small: list[str], here: Path) -> None:
    table = TABLES[name]
    program, command, *words = shlex.split(table["command"])
    assert (program, command) == ("clipfast", "eval")
    given = dict(zip(words[::2], words[1::2], strict=True))
    methods = given["--methods"].split(",")
    assert {row["clipfast"] for row in table["rows"]} - {None} == set(methods)

    kind, _, path = given["-d"].partition(":")
    assert path.startswith("/data/")
    module(ROOT / "tests" / "data" / "test_datasets.py").MAKE[kind](here / "tree")
    given |= {"-d": f"{kind}:{here / 'tree'}", "--methods": ",".join(FEWER.get(one, one) for one in methods)}
    result = run("eval", *(word for pair in given.items() for word in pair))
    assert result.exit_code == 0, result.stderr
    assert small == [given["-m"]]

    found = Evaluation.load(here / given["-o"])
    back = {short: long for long, short in FEWER.items() if long in methods}
    for label in list(found.tables):
        found.tables[back.get(label, label)] = found.tables[label]
    asked = {entry_of(build_protocol(one))[0] for one in given["--protocols"].split(",")}
    assert asked == {column["protocol"] for column in table["columns"] if "protocol" in column}
    for row in make_papers.measured(table, found)["rows"]:
        if row["clipfast"] is not None:
            for column, one in zip(table["columns"], row["measured"], strict=True):
                assert isinstance(one, float) == ("protocol" in column)


def test_measured_figures_stand_beside_the_published_ones(run: Any, here: Path) -> None:
    run("eval", "-n", 3, "--methods", "grad_eclip", "--protocols", "pointing_game,gini", "-o", "some")
    found = Evaluation.load("some")
    table = {
        "title": "A table",
        "paper": "MMEL",
        "source": "Somewhere",
        "columns": [
            {"name": "hit", "better": "higher", "protocol": "pointing_game", "figure": "hit", "scale": 100},
            {"name": "gini", "better": "higher", "protocol": "gini", "figure": "gini", "scale": 1},
            {"name": "else", "better": "lower"},
        ],
        "rows": [
            {"method": "Ours", "clipfast": "grad_eclip", "published": [51.5, 0.25, 1], "measured": [None] * 3},
            {"method": "Other", "clipfast": None, "published": [1.0, 0.5, 2], "measured": [None] * 3},
        ],
        "command": "clipfast eval -n 3 --methods grad_eclip",
        "differs": "All.",
    }
    assert "| Ours | `grad_eclip` | 51.5 |  | 0.25 |  | 1 |" in make_papers.section(table)
    filled = make_papers.measured(json.loads(json.dumps(table)), found)
    (hit,), (gini,) = found.figures("grad_eclip", "pointing_game"), found.figures("grad_eclip", "gini")
    assert filled["rows"][0]["measured"] == [round(100 * hit.value, 6), round(gini.value, 6), None]
    assert filled["rows"][1]["measured"] == [None] * 3
    shown = f"| Ours | `grad_eclip` | 51.5 | {100 * hit.value:.1f} | 0.25 | {gini.value:.2f} | 1 |"
    assert shown in make_papers.section(filled)


def test_the_script_fills_a_table_and_writes_the_page(
    run: Any, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = here / "papers"
    folder.mkdir()
    table = TABLES["imagenet_s_clip"]
    (folder / "one.json").write_text(json.dumps(table))
    monkeypatch.setattr(make_papers, "FOLDER", folder)
    monkeypatch.setattr(make_papers, "PAGE", here / "papers.md")
    run("eval", "-n", 2, "--methods", "grad_eclip", "--protocols", "pointing_game", "-o", "some")
    monkeypatch.setattr(sys, "argv", ["make_papers.py", "one", "some"])
    make_papers.main()
    rows = json.loads((folder / "one.json").read_text())["rows"]
    hit = Evaluation.load("some").figures("grad_eclip", "pointing_game")[0].value
    assert [row["measured"][0] for row in rows] == [None, None, round(100 * hit, 6)]
    assert (here / "papers.md").read_text() == make_papers.page(make_papers.tables())
    assert capsys.readouterr().out.strip() == str(here / "papers.md")
