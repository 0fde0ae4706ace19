from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import clipfast

QUICK = ("--batch", 4, "--workers", 1)


def test_scenes_train_without_a_flag_and_boxes_are_classified(run: Any) -> None:
    words = ("finetune", "grounded", "scenes:3:8", *QUICK, "--epochs", 1, "--lr", 1e-3, "--regions", "scenes:4:3")
    result = run(*words)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["regions", "of", "scenes:4", "mAcc", "↑", "top-1", "↑", "top-5", "↑"]
    assert [line.split()[0] for line in lines[1:3]] == ["before", "after"]
    assert all(cell.endswith("%") for line in lines[1:3] for cell in line.split()[1:])
    assert lines[4].startswith("2 steps, 8 images")
    assert lines[5:] == ["runs/grounded/log.jsonl", "runs/grounded/model"]
    config = json.loads(Path("runs/grounded/config.json").read_text())["objective"]
    assert (config["name"], config["phrases"], config["weight"]) == ("grounded", "scenes", 1.0)
    before, after = clipfast.load("demo"), clipfast.load("runs/grounded/model")
    assert not before.module.text_projection.equal(after.module.text_projection)
    again = json.loads(run(*words, "--json").stdout)
    assert again["complete"] and again["phrases"] > 4
    assert again["regions"].keys() == {"data", "templates", "before", "after"}
    assert again["regions"]["templates"] == "bare"
    assert again["regions"]["after"].keys() == {"mAcc", "top-1", "top-5"}


def test_captions_and_phrases_of_a_table(run: Any, here: Path) -> None:
    (here / "rows.csv").write_text(
        'path,title,nouns\nscene.png,a dog and a cat,"[""dog"", ""cat""]"\nscene.png,a red car,\nscene.png,a zebra,\n'
    )
    words = ("finetune", "grounded", "rows.csv", "--caption", "title", "--phrases", "column:nouns", "--freeze-text")
    result = run(*words, "--batch", 3, "--steps", 2, "--weight", 0.5, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    # The demo model knows no zebra.
    assert (found["images"], found["failed"], found["phrases"]) == (4, 2, 4)
    before, after = clipfast.load("demo"), clipfast.load("runs/grounded/model")
    assert before.module.text_projection.equal(after.module.text_projection)
    assert not before.module.visual.proj.equal(after.module.visual.proj)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("photos", "--phrases", "texblob"), "no way to phrases"),
        (("photos", "--regions", "coco"), "coco needs the folder"),
        (("photos",), "pip install 'clipfast[finetune]'"),
        (("scenes:3:8", "--caption", "title"), "scenes have no column 'title'"),
        (("scenes:3:8", "--compile"), "leave out --compile and --parallel"),
        (("scenes:3:8", "--parallel", "fsdp"), "leave out --compile and --parallel"),
        ((), "name a source of images"),
    ],
)
def test_mistakes_come_before_the_training(run: Any, words: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textblob.en", None)
    result = run("finetune", "grounded", *words)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert not Path("runs").exists()
