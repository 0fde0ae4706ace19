from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import clipfast
from clipfast.data.scenes import Scenes

TEXTS = ("-t", "a dog", "-t", "a bus")


@pytest.fixture(autouse=True)
def photos(here: Path) -> Path:
    """Six scenes with their captions beside them."""
    folder = here / "photos"
    folder.mkdir()
    for i, scene in enumerate(Scenes(6, seed=2)):
        Image.fromarray(scene.image).save(folder / f"{i}.jpg", quality=92)
        (folder / f"{i}.txt").write_text(scene.caption)
    return folder


def test_no_flag_but_the_texts_is_needed(run: Any) -> None:
    result = run("run", "photos", *TEXTS)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].startswith("12 maps of 6 images, ")
    assert result.stdout.splitlines()[-1] == "maps"
    found = clipfast.open_run("maps")
    assert list(found.keys()) == [f"{i}.jpg" for i in range(6)]
    assert found.prompts == ["a dog", "a bus"]
    again = run("run", "photos", *TEXTS)
    assert again.exit_code == 0
    assert "1 of 1 shards are there already, in maps/" in again.stderr


def test_json_is_all_there_is(run: Any) -> None:
    document = json.loads(run("run", "photos", *TEXTS, "--json", "--shard-size", 4).stdout)
    assert document.pop("folder") == "maps"
    assert document == json.loads(Path("maps/summary.json").read_text())
    assert (document["images"], document["maps"], document["shards"]) == (6, 12, 2)


def test_each_image_may_have_texts_of_its_own(run: Any) -> None:
    assert run("run", "photos", "--texts", "caption", "-o", "own").exit_code == 0
    found = clipfast.open_run("own")
    assert [found.texts(found.rows(i)) for i in range(6)] == [[Path(f"photos/{i}.txt").read_text()] for i in range(6)]


def test_classes_and_the_best_of_them(run: Any) -> None:
    Path("names.txt").write_text("dog\nbus\ntree\n")
    assert run("run", "photos", "--texts", "classes:names.txt", "--top", 2).exit_code == 0
    found = clipfast.open_run("maps")
    for i in range(6):
        rows = found.rows(i)
        assert len(rows.prompts) == 2 and rows.scores[0] >= rows.scores[1]


def test_options_reach_the_run(run: Any) -> None:
    result = run(
        "run", "photos/[0-2].jpg", *TEXTS, "--features", "--feature-codec", "int8", "--maps", "uint8", "--exact-pil",
        "--method", "grad_eclip", "--set", "layers=2", "--resize", "squash", "-n", 2, "--batch", 1, "--workers", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    config = json.loads(Path("maps/run.json").read_text())["config"]
    expected = {"features": "int8", "maps": "uint8", "exact": True, "method": "grad_eclip", "resize": "squash"}
    assert config | expected == config
    assert config["parameters"]["layers"] == 2
    assert len(clipfast.open_run("maps")) == 2


def test_a_dry_run_says_what_there_is_to_do(run: Any) -> None:
    result = run("run", "photos", *TEXTS, "--dry-run", "--shard-size", 4)
    assert result.exit_code == 0
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert rows["images"].startswith("6, about ")
    assert rows["shards"].strip() == "2"
    assert rows["sample"].startswith("6 images, ")
    assert not Path("maps").exists()
    assert json.loads(run("run", "photos", *TEXTS, "--dry-run", "--json").stdout)["images"] == 6


def test_another_configuration_is_refused(run: Any) -> None:
    run("run", "photos", *TEXTS)
    result = run("run", "photos", "-t", "a cat")
    assert result.exit_code == 2
    assert 'prompts.texts was ["a dog", "a bus"] and is ["a cat"] now' in result.stderr
    assert run("run", "photos", "-t", "a cat", "--overwrite").exit_code == 0
    assert clipfast.open_run("maps").prompts == ["a cat"]


def test_parts(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("run", "photos", *TEXTS, "--shard-size", 2)
    assert "1 of 3 shards are done; the others are other parts'" in run(*options, "--shard", "0/3").stdout
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    result = run(*options)
    assert "part 1 of 3, counted from 0, as RANK and WORLD_SIZE say" in result.stderr
    assert "2 of 3 shards are done" in result.stdout
    assert "2 of 3" not in run(*options, "--shard", "2/3").stdout
    assert len(clipfast.open_run("maps")) == 6


def test_failures_are_named_and_counted(run: Any) -> None:
    Path("photos/3.jpg").write_bytes(b"")
    result = run("run", "photos", *TEXTS)
    assert result.exit_code == 0
    assert "1 failed: the image is empty" in result.stderr
    assert "1 image has no map; errors.jsonl says why" in result.stdout
    for i in range(6):
        Path(f"photos/{i}.jpg").write_bytes(b"")
    result = run("run", "photos", *TEXTS, "-o", "none")
    assert result.exit_code == 2
    assert "none of the 6 images could be explained" in result.stderr


def test_too_many_failures_leave_with_one(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipfast.engine.totals.CHECKED_FROM", 2)
    Path("photos/0.jpg").write_bytes(b"")
    result = run("run", "photos", *TEXTS, "--shard-size", 2, "--max-error-rate", 0.2)
    assert result.exit_code == 1
    assert "1 of 2 images failed, more than --max-error-rate 0.2 allows" in result.stderr


def test_ctrl_c_says_how_to_go_on(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipfast.engine.run.Totals.check", lambda self, most: os.kill(os.getpid(), signal.SIGINT))
    result = run("run", "photos", *TEXTS, "--shard-size", 2)
    assert result.exit_code == 130
    assert "the same command goes on from there" in result.stderr
    assert "nothing was written" not in result.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "name a source of images"),
        (("photos",), "no text"),
        (("nowhere", *TEXTS), "there is no"),
        (("photos", *TEXTS, "--shard", "4/4"), "i from 0 to n - 1"),
        (("photos", *TEXTS, "--engine", "rai"), "did you mean 'ray'"),
        (("photos", *TEXTS, "--address", "auto"), "--address is for --engine ray"),
        (("photos", *TEXTS, "--maps", "float61"), "did you mean 'float16'"),
        (("photos", *TEXTS, "--set", "steps=2"), "steps"),
    ],
)
def test_mistakes_are_one_sentence(run: Any, words: tuple[str, ...], sentence: str) -> None:
    result = run("run", *words)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stderr.count("error:") == 1
    assert not Path("maps").exists()
