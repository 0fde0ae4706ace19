from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clipfast.metrics.chosen import DEFAULT_METHODS, DEFAULT_PROTOCOLS
from clipfast.metrics.evaluate import Evaluator
from clipfast.metrics.evaluation import Evaluation
from clipfast.metrics.registry import PROTOCOLS, build_protocol

FEW = ("-n", 4, "--methods", "grad_eclip,mask_clip", "--protocols", "pointing_game:tolerance=5,deletion/rise:steps=2")


def test_no_flag_is_needed(run: Any) -> None:
    result = run("eval", "-n", 2)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "runs/eval/report.html"
    document = json.loads(Path("runs/eval/evaluation.json").read_text())
    assert tuple(document["methods"]) == DEFAULT_METHODS
    assert tuple(document["protocols"]) == DEFAULT_PROTOCOLS
    assert document["samples"] == 2
    for name in (*DEFAULT_METHODS, *DEFAULT_PROTOCOLS):
        assert name in result.stdout
        assert name in Path("runs/eval/report.html").read_text()


def test_the_table_holds_figures_and_errors(run: Any) -> None:
    result = run("eval", *FEW)
    found = Evaluation.load("runs/eval")
    lines = result.stdout.splitlines()
    (one,) = found.figures("mask_clip", "pointing_game:tolerance=5")
    head = next(i for i, line in enumerate(lines) if line.startswith("pointing_game:tolerance=5"))
    assert lines[head].endswith("hit ↑")
    assert lines[head + 2].split() == ["mask_clip", f"{one.value:.3f}", "±", f"{one.error:.3f}"]
    assert any("deletion ↓" in line and "insertion ↑" in line for line in lines)
    assert "of 4 images of scenes:1, demo, seed 0" in lines[-3]


def test_json_is_all_there_is(run: Any) -> None:
    document = json.loads(run("eval", *FEW, "--json").stdout)
    found = Evaluation.load("runs/eval")
    for row in document["results"]:
        figures = {one.name: one for one in found.figures(row["method"], row["protocol"])}
        assert row["value"] == pytest.approx(figures[row["figure"]].value)
    assert len(document["results"]) == 2 * 3
    assert document["protocols"]["pointing_game:tolerance=5"]["parameters"] == {"tolerance": 5}
    assert document["versions"]["torch"]
    assert document["report"] == "runs/eval/report.html"


def test_the_same_command_goes_on_and_another_has_a_folder_of_its_own(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary = Evaluator._measured

    def interrupt(self: Evaluator, name: str, *rest: Any) -> Any:
        if name == "mask_clip":
            raise KeyboardInterrupt
        return ordinary(self, name, *rest)

    monkeypatch.setattr(Evaluator, "_measured", interrupt)
    stopped = run("eval", *FEW)
    assert stopped.exit_code == 130
    assert "the same command goes on" in stopped.stderr
    assert not Path("runs/eval/report.html").exists()
    counted: list[str] = []

    def count(self: Evaluator, name: str, *rest: Any) -> Any:
        counted.append(name)
        return ordinary(self, name, *rest)

    monkeypatch.setattr(Evaluator, "_measured", count)
    assert run("eval", *FEW).exit_code == 0
    assert counted == ["mask_clip"]
    run("eval", *FEW[:4], "--protocols", "gini")
    assert Path("runs/eval-2/report.html").is_file()
    run("eval", *FEW)
    assert not Path("runs/eval-3").exists()


def test_all_takes_what_fits(run: Any) -> None:
    result = run("eval", "-n", 1, "--methods", "grad_eclip", "--protocols", "all", "-o", "here")
    assert result.exit_code == 0
    wanted = {name for name, entry in PROTOCOLS.items() if entry.needs <= {"labels", "masks", "boxes", "captions"}}
    assert set(json.loads(Path("here/evaluation.json").read_text())["protocols"]) == wanted


def test_compare_two_files(run: Any) -> None:
    run("eval", *FEW, "-o", "a")
    run("eval", *FEW, "--resize", "squash", "-o", "b")
    result = run("eval", "--compare", "a/evaluation.json", "b/evaluation.json")
    assert result.exit_code == 0
    assert "grad_eclip" in result.stdout
    assert "a/evaluation.json less b/evaluation.json; paired bootstrap" in result.stdout
    twice = run("eval", "--compare", "a", "--compare", "b", "--json")
    rows = json.loads(twice.stdout)["differences"]
    expected = Evaluation.load("a").differences("grad_eclip", Evaluation.load("b"), "grad_eclip", rows[0]["protocol"])
    assert rows[0]["value"] == pytest.approx(expected[0].value)
    assert [row["method"] for row in rows] == ["grad_eclip"] * 3 + ["mask_clip"] * 3


def test_compare_methods_of_one_file(run: Any) -> None:
    run("eval", *FEW)
    rows = json.loads(run("eval", "--compare", "runs/eval", "--json").stdout)["differences"]
    assert {(row["method"], row["other"]) for row in rows} == {("mask_clip", "grad_eclip")}
    turned = json.loads(run("eval", "--compare", "runs/eval", "--against", "mask_clip", "--json").stdout)["differences"]
    assert [row["value"] for row in turned] == pytest.approx([-row["value"] for row in rows])


def test_compare_needs_the_same_samples(run: Any) -> None:
    run("eval", *FEW, "-o", "a")
    run("eval", *FEW, "-n", 3, "-o", "b")
    result = run("eval", "--compare", "a", "b")
    assert result.exit_code == 2
    assert "differences need the same samples" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "grad_eclp"], "did you mean 'grad_eclip'"),
        (["--methods", "grad_eclip:layer=2"], "did you mean 'layers'"),
        (["--protocols", "pointing"], "did you mean"),
        (["--data", "scene:1"], "did you mean 'scenes'"),
        (["--device", "abacus"], "there is no device"),
        (["--compare", "nothing.json"], "there is no such file"),
        (["--compare", "scene.png"], "is not what `clipfast eval` writes"),
        (["--out", "scene.png"], "is a file"),
        (["stray.json"], "--compare"),
    ],
)
def test_bad_input(run: Any, words: list[str], said: str) -> None:
    result = run("eval", *words)
    assert result.exit_code == 2
    assert said in result.stderr.splitlines()[-1]
    assert not Path("runs").exists()


def test_the_demo_model_on_other_data_is_warned_of(run: Any) -> None:
    folder = Path("tree/dog")
    folder.mkdir(parents=True)
    Path("scene.png").rename(folder / "one.png")
    result = run("eval", "--data", "folder:tree", "--methods", "grad_eclip", "-n", 1)
    assert result.exit_code == 0
    assert "the demo model only knows drawings" in result.stderr
    protocols = json.loads(Path("runs/eval/evaluation.json").read_text())["protocols"]
    assert list(protocols) == ["deletion+insertion/rise:steps=10", "confidence/m2ib"]
    assert build_protocol(next(iter(protocols))).parameters()["steps"] == 10
