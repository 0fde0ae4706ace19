from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from clipfast.data.scenes import names, render
from clipfast.metrics import comparison, diff
from clipfast.metrics.robust import RobustAccuracy

FEW = ("-n", 3, "--protocols", "gini")


@pytest.fixture
def tuned(weights: Path, here: Path) -> str:
    """A checkpoint of the demo model whose every weight moved a little."""
    state = {name: t + 0.02 * torch.randn(t.shape) for name, t in load_file(weights).items()}
    with safe_open(weights, "pt") as stored:
        save_file(state, "tuned.safetensors", stored.metadata())
    return "demo:tuned.safetensors"


def test_two_names_are_enough(run: Any, tuned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The protocols by default are measured elsewhere; here it is seen that they are what is measured.
    asked: list[Any] = []
    ordinary = diff.Differ.__init__

    def spied(self: Any, *models: Any, **options: Any) -> None:
        asked.append(options)
        ordinary(self, *models, **{**options, "protocols": ["gini"], "limit": 2})

    monkeypatch.setattr(diff.Differ, "__init__", spied)
    result = run("diff", "demo", tuned)
    assert result.exit_code == 0, result.stderr
    assert asked[0]["protocols"] is None and asked[0]["limit"] == 50 and asked[0]["robust"] is None
    assert result.stdout.splitlines()[-1] == "runs/diff/diff.html"
    document = json.loads(Path("runs/diff/diff.json").read_text())
    assert (document["before"], document["after"], document["data"]) == ("demo", tuned, "scenes:1")
    assert "drift of pictures, cosine" in document["between"] and document["samples"] == 2


def test_the_table_and_the_page_hold_the_same(run: Any, tuned: str) -> None:
    result = run("diff", "demo", tuned, *FEW, "--concepts", "classes", "--show", 2)
    assert result.exit_code == 0
    document = json.loads(Path("runs/diff/diff.json").read_text())
    page = Path("runs/diff/diff.html").read_text()
    for row in document["changes"]:
        assert row["protocol"] in result.stdout and row["figure"] in result.stdout
        assert f"{row['before']['value']:.3f}" in result.stdout and f"{row['before']['value']:.3f}" in page
    for name, one in document["between"].items():
        assert f"{name}: {one['value']:.3f}" in result.stdout
    assert "neurons with another concept, of 768: " in result.stdout
    assert len({one["picture"] for one in document["shown"]}) == 2
    assert document["protocols"]["dissection/clip"]["parameters"]["top"] == 1
    # Another run has a folder of its own.
    assert run("diff", "demo", tuned, *FEW).stdout.splitlines()[-1] == "runs/diff-2/diff.html"


def test_json_is_all_there_is(run: Any, tuned: str) -> None:
    document = json.loads(run("diff", tuned, tuned, *FEW, "--json", "-o", "here").stdout)
    assert document["before"] != document["after"]
    assert all(one["difference"]["value"] == 0 for one in document["changes"])
    assert document["folder"] == "here" and document["report"] == "here/diff.html"
    assert sorted(path.name for path in Path("here").iterdir()) == ["diff.html", "diff.json"]


def test_images_and_texts(run: Any, tuned: str) -> None:
    Path("photos").mkdir()
    for i in (1, 2):
        Image.fromarray(render(i).image).save(f"photos/{i}.png")
    # As a shell gives a pattern: files behind the option.
    result = run(
        "diff", "demo", tuned, "--protocols", "gini", "--images", "photos/1.png", "photos/2.png", "-t", "a dog"
    )
    assert result.exit_code == 0 and "only knows drawings" in result.stderr
    document = json.loads(Path("runs/diff/diff.json").read_text())
    assert document["data"] == "2 pictures" and document["pairs"] == 2
    assert [one["picture"] for one in document["shown"]] == ["1", "2"]
    both = run("diff", "demo", tuned, *FEW, "--images", "photos", "-t", "a dog", "-d", "scenes:4")
    document = json.loads(Path("runs/diff-2/diff.json").read_text())
    assert both.exit_code == 0 and document["data"] == "scenes:4"
    assert [one["picture"] for one in document["shown"]] == ["1", "2"]


def test_class_folders_concepts_and_attacks(run: Any, tuned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff, "RobustAccuracy", partial(RobustAccuracy, steps=2))
    for label, name in enumerate(names()[:4]):
        Path("data", name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(render(10 * label + i).image).save(f"data/{name}/{i}.png")
    Path("data", names()[0], "torn.png").write_bytes(b"torn")
    Path("words.txt").write_text("dog\nred\nleft\n")
    result = run("diff", "demo", tuned, "-d", "folder:data", "--protocols", "gini", "--concepts", "words.txt",
                 "--robust", 1, "-n", 20)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    document = json.loads(Path("runs/diff/diff.json").read_text())
    assert document["samples"] == 9 and len(document["errors"]) == 1 and "torn.png" in result.stderr
    figures = {(one["protocol"], one["figure"]): one for one in document["changes"]}
    assert figures["robust_accuracy", "robust 4/255"]["before"]["count"] == 1
    assert figures["class_entropy", "entropy"]["before"]["count"] == 8
    assert document["protocols"]["robust_accuracy"]["parameters"]["count"] == 1


def test_nothing_is_left_of_what_was_stopped(run: Any, tuned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(comparison, "write_diff_page", interrupt)
        stopped = run("diff", "demo", tuned, *FEW)
    assert stopped.exit_code == 130
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["demo"], "Missing argument"),
        (["demo", "demmo"], "there is no model or file 'demmo'"),
        (["demo", "no.safetensors"], "there is no checkpoint"),
        (["demo", "demo", "-t", "a dog"], "-t goes with --images"),
        (["demo", "demo", "--images", "scene.png"], "at least one -t"),
        (["demo", "demo", "scene.png"], "at least one -t"),
        (["demo", "demo", "--images", "nowhere/*.png", "-t", "a dog"], "no image found"),
        (["demo", "demo", "--images", "scene.png", "-t", "a zeppelin"], "zeppelin"),
        (["demo", "demo", "-d", "scenes"], "scenes:SEED"),
        (["demo", "demo", "--method", "grad_eclp"], "did you mean"),
        (["demo", "demo", "--protocols", "ginny"], "did you mean"),
        (["demo", "demo", "--concepts", "none.txt"], "none.txt"),
        (["demo", "demo", "--images", "scene.png", "-t", "a dog", "--concepts", "classes"], "needs a data set"),
        (["demo", "demo", "--images", "scene.png", "-t", "a dog", "--robust", "2"], "no classes to choose from"),
        (["demo", "demo", "--device", "gpu"], "there is no device"),
    ],
)
def test_bad_input(run: Any, words: list[str], said: str) -> None:
    result = run("diff", *words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not Path("runs").exists()
