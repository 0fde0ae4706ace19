from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clipfast.cli.calibrate import parse_grid
from clipfast.cli.eval import _chosen
from clipfast.metrics.chosen import DEFAULT_METHODS, DEFAULT_PROTOCOLS
from clipfast.metrics.evaluate import Evaluator
from clipfast.metrics.evaluation import Evaluation
from clipfast.metrics.registry import PROTOCOLS, build_protocol
from clipfast.models.load import load

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

    def interrupt(self: Evaluator, job: Any, *rest: Any) -> Any:
        if job[0] == "mask_clip":
            raise KeyboardInterrupt
        return ordinary(self, job, *rest)

    monkeypatch.setattr(Evaluator, "_measured", interrupt)
    stopped = run("eval", *FEW)
    assert stopped.exit_code == 130
    assert "the same command goes on" in stopped.stderr
    assert not Path("runs/eval/report.html").exists()
    counted: list[str] = []

    def count(self: Evaluator, job: Any, *rest: Any) -> Any:
        counted.append(job[0])
        return ordinary(self, job, *rest)

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


def test_all_is_what_fits_each_other() -> None:
    tower, offers = load("demo").towers()[0], frozenset({"labels", "masks", "boxes", "captions"})
    methods, protocols = _chosen("all", "confidence/words,deletion/words", tower, offers)
    assert methods is not None
    assert "leave_one_out" in methods
    assert "mask_clip" not in methods
    assert protocols == ["confidence/words", "deletion/words"]
    methods, protocols = _chosen("mask_clip,tclip", "all", tower, offers)
    assert protocols == [name for name, entry in PROTOCOLS.items() if entry.side == "image"]
    methods, protocols = _chosen("all", "all", tower, offers - {"captions"})
    assert methods is not None
    assert "leave_one_out" not in methods
    assert "grad_cam++" not in methods
    assert _chosen(None, None, tower, offers) == (None, None)


def test_values_of_several_numbers(run: Any) -> None:
    result = run("eval", "-n", 1, "--methods", "mask_clip", "--protocols", "occlusion:fractions=0.1,.2,gini")
    assert result.exit_code == 0
    protocols = json.loads(Path("runs/eval/evaluation.json").read_text())["protocols"]
    assert list(protocols) == ["occlusion:fractions=0.1,0.2", "gini"]


CALIBRATE = ("eval", "-n", 4, "--calibrate", "mmel", "--grid", "alpha=0,4", "--protocols", "energy_pointing_game")


def test_calibrating_says_what_it_costs_and_what_it_gains(run: Any) -> None:
    result = run(*CALIBRATE)
    assert result.exit_code == 0
    assert "3 settings of mmel on 2 images to choose by" in result.stderr
    assert "10 still to be explained and measured, about" in result.stderr
    document = json.loads(Path("runs/calibrate/calibration.json").read_text())
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["alpha", "share", "↑"]
    assert {line.split()[0] for line in lines[1:4]} == {"0", "4", "default"}
    shares = [float(line.split()[1]) for line in lines[1:4]]
    assert shares == sorted(shares, reverse=True)
    assert lines[-1] == "runs/calibrate/calibration.json"
    if document["best"] == "mmel":
        assert "keep it" in result.stdout
    else:
        assert f"clipfast explain {document['flags']}" in lines
    again = run(*CALIBRATE, "--json")
    assert "to choose by" not in again.stderr, "nothing was left to do"
    assert json.loads(again.stdout)["reported"] == document["reported"]
    run(*CALIBRATE[:-2], "--protocols", "gini")
    assert Path("runs/calibrate-2/calibration.json").is_file()


def test_an_interrupted_calibration_goes_on(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = Evaluator._measured

    def interrupt(self: Evaluator, job: Any, *rest: Any) -> Any:
        if self.out is not None and job[0] == "mmel:alpha=4":
            raise KeyboardInterrupt
        return ordinary(self, job, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "_measured", interrupt)
        stopped = run(*CALIBRATE)
    assert stopped.exit_code == 130
    assert "the same command goes on" in stopped.stderr
    assert "6 still to be explained" in run(*CALIBRATE).stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--grid", "alpha=1"], "--grid goes with --calibrate"),
        (["--calibrate", "mmel", "--methods", "rise"], "leave --methods out"),
        (["--calibrate", "mmel", "--grid", "alpha"], "should read NAME=VALUE,VALUE"),
        (["--calibrate", "mmel", "--grid", "alpha=1,,2"], "should read NAME=VALUE,VALUE"),
        (["--calibrate", "mmel", "--grid", "alpha=1", "--grid", "alpha=2"], "names 'alpha' twice"),
        (["--calibrate", "mmel", "--protocols", "gini,rise"], "follows one protocol"),
        (["--calibrate", "rise"], "there is no grid for rise"),
        (["--methods", "mask_clip", "--protocols", "deletion/words"], "mask_clip does not explain texts"),
    ],
)
def test_bad_input_of_calibrating_and_of_words(run: Any, words: list[str], said: str) -> None:
    result = run("eval", "-n", 4, *words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not Path("runs").exists()


def test_a_grid() -> None:
    assert parse_grid(["alpha=0, 1,2.5", "mode=paper", "theta=1,0/-1/2"]) == {
        "alpha": [0, 1, 2.5],
        "mode": ["paper"],
        "theta": [1, (0, -1, 2)],
    }
    assert parse_grid([]) is None
