from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipfast.api import Explainer
from clipfast.bench.report import Report
from clipfast.cli.bench import _names, _numbers

FEW = ("bench", "--methods", "grad_eclip,mask_clip", "--batch", 2, "--prompts", "1,3", "--rounds", 3)
ALONE = (*FEW, "--no-peers")


@pytest.fixture(autouse=True)
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh process takes seconds to start; one test has it."""
    monkeypatch.setattr("clipfast.bench.measure.peaks", lambda *_: None)


def test_figures_agree_in_every_file(run: Any) -> None:
    result = run(*FEW)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-4:] == [f"runs/bench/bench.{kind}" for kind in ("json", "csv", "md", "png")]
    document = json.loads(Path("runs/bench/bench.json").read_text())
    rows = document["rows"]
    assert [(r["method"], r["prompts"]) for r in rows if r["by"] == "clipfast"] == [
        *(("grad_eclip", 1), ("grad_eclip", 3), ("mask_clip", 1), ("mask_clip", 3)),
    ]
    for row in rows:
        assert row["reason"] is None
        assert 0 < row["p50"] <= row["p95"] <= row["p99"] <= max(row["seconds"])
        assert row["ratio"] == pytest.approx(np.median(np.array(row["seconds"]) / np.array(row["encode"])))
        assert row["images_per_second"] == pytest.approx(2 / np.median(row["seconds"]))
        if row["by"] == "the model":
            assert (row["ratio"], len(row["seconds"]), row["prompts"]) == (1, 6, 0)
        else:
            assert row["error"] <= row["bound"]
            assert row["maps_per_second"] == pytest.approx(row["prompts"] * row["images_per_second"])
            assert len(row["seconds"]) == document["settings"]["rounds"] == 3
    assert document["machine"]["torch"] == torch.__version__
    assert any("autograd" in row["by"] for row in rows)

    with Path("runs/bench/bench.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["ratio"]) for line in lines] == [row["ratio"] for row in rows]
    assert [line["by"] for line in lines] == [row["by"] for row in rows]
    page = Path("runs/bench/bench.md").read_text()
    for row in rows:
        own = f"| {row['prompts']} | {row['ratio']:.2f} | " if row["prompts"] else f"|  | {row['ratio']:.2f} | "
        assert own in page
        assert f"{row['ratio']:.2f}" in result.stdout
    with Image.open("runs/bench/bench.png") as plot:
        assert plot.size[0] > 500
    assert json.loads(json.dumps(Report.load("runs/bench").to_json())) == document


def test_json_is_all_there_is(run: Any) -> None:
    document = json.loads(run(*ALONE, "--json", "-o", "here").stdout)
    assert document["folder"] == "here"
    assert {row["by"] for row in document["rows"]} == {"clipfast", "the model"}
    assert document["rows"] == json.loads(Path("here/bench.json").read_text())["rows"]


def test_wrong_maps_have_no_speed(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = Explainer.__call__

    def wrong(self: Explainer, images: Any, *args: Any, **kwargs: Any) -> Any:
        out = ordinary(self, images, *args, **kwargs)
        if self.method == "mask_clip" and images.dtype == torch.float32:
            out.maps = out.maps * 1.01
        return out

    monkeypatch.setattr(Explainer, "__call__", wrong)
    result = run(*ALONE)
    assert result.exit_code == 0
    assert "no speed of mask_clip by clipfast, 2 x 3, float32: its maps are wrong, 1.0e-02" in result.stderr
    assert not [line for line in result.stdout.splitlines() if line.startswith("mask_clip")]
    rows = json.loads(Path("runs/bench/bench.json").read_text())["rows"]
    for row in rows:
        hidden = row["method"] == "mask_clip"
        assert (row["p50"] is None) == (row["ratio"] is None) == (row["seconds"] == []) == hidden
        assert (row["reason"] is not None) == hidden
    page = Path("runs/bench/bench.md").read_text()
    assert "No speed of mask_clip for 3 prompts: its maps are wrong" in page
    assert "| mask_clip |" not in page
    assert "| grad_eclip |" in page


def test_a_backend_that_cannot_run_has_no_speed(run: Any) -> None:
    result = run("bench", "--methods", "grad_eclip", "--batch", 1, "--prompts", 1, "--rounds", 1, "--backend", "triton")
    assert result.exit_code == 0
    assert "cannot run as asked" in " ".join(result.stderr.split())
    (row,) = [r for r in json.loads(Path("runs/bench/bench.json").read_text())["rows"] if r["by"] == "clipfast"]
    assert row["seconds"] == []


def test_a_planted_regression_ends_in_exit_code_1(run: Any) -> None:
    run(*ALONE)
    document = json.loads(Path("runs/bench/bench.json").read_text())
    for row in document["rows"]:
        if row["by"] == "clipfast":
            # Even rounds, so that the machine's own noise is not what is tested here.
            row["seconds"] = [1.1 * e for e in row["encode"]]
    Path("before.json").write_text(json.dumps(document))
    for row in document["rows"]:
        if (row["method"], row["by"]) == ("mask_clip", "clipfast"):
            row["seconds"] = [2 * s for s in row["seconds"]]
    Path("after.json").write_text(json.dumps(document))

    assert run("bench", "--compare", "before.json", "before.json").exit_code == 0
    result = run("bench", "--compare", "before.json", "after.json")
    assert result.exit_code == 1
    assert "2 of 4 became slower" in result.stdout
    back = run("bench", "--compare", "after.json", "--compare", "before.json", "--json")
    assert back.exit_code == 0
    changes = json.loads(back.stdout)["changes"]
    assert [c["verdict"] for c in changes] == ["same", "same", "faster", "faster"]
    # A run beside an earlier one that took no time at all.
    for row in document["rows"]:
        if row["by"] == "clipfast":
            row["seconds"] = [0.001 * e for e in row["encode"]]
    Path("before.json").write_text(json.dumps(document))
    result = run(*ALONE, "--compare", "before.json", "--json", "-o", "new")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["folder"] == "new"
    assert {c["verdict"] for c in told["compared"]["changes"]} == {"slower"}


def test_memory_comes_from_a_fresh_process(weights: Path) -> None:
    from clipfast.bench.memory import peaks

    cases = [
        {"method": None, "batch": 1, "prompts": 1, "precision": None, "backend": "auto"},
        {"method": "grad_eclip", "batch": 1, "prompts": 50_000, "precision": None, "backend": "auto"},
    ]
    encode, many = peaks("demo", None, cases) or (0, 0)
    if encode:
        # 144 patches a map in float32.
        assert 50_000 * 144 * 4 <= many < encode + 2.5 * 50_000 * 144 * 4
    assert peaks("no such model", None, cases) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--batch", "0"), "whole numbers from 1 on"),
        (("--prompts", "1,x"), "whole numbers from 1 on"),
        (("--methods", "grad_eclips"), "grad_eclip"),
        (("--precision", "float31"), "float32"),
        (("--backend", "tritan"), "triton"),
        (("--compare", "missing.json"), "there is no such file"),
        (("--compare", "scene.png"), "is not what `clipfast bench` writes"),
        (("--compare", "a", "b", "c"), "one earlier run or two"),
        (("stray.json",), "name earlier runs with --compare"),
    ],
)
def test_bad_input_is_one_sentence(run: Any, words: tuple[str, ...], said: str) -> None:
    result = run("bench", *words)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert not Path("runs").exists()


def test_numbers_and_names() -> None:
    assert _numbers("--batch", "4, 1,4") == [4, 1]
    assert _names("--backend", "auto,torch,auto", ("auto", "torch")) == ["auto", "torch"]
