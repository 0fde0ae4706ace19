from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import clipfast
from clipfast.cli import training
from clipfast.finetune.log import Follow

QUICK = ("--batch", 2, "--pgd-steps", 1, "--log-every", 1, "--workers", 1)


def test_aft_from_no_flag_to_a_model_that_explains(run: Any) -> None:
    result = run("finetune", "aft", "scenes:3:4", *QUICK, "--epochs", 1, "--lr", 1e-3)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("2 steps, 4 images; 2 steps in ")
    assert lines[1:] == ["runs/aft/log.jsonl", "runs/aft/model"]
    log = [json.loads(line) for line in Path("runs/aft/log.jsonl").read_text().splitlines()]
    assert [one["step"] for one in log] == [1, 2]
    assert log[0]["clean_cosine"] == pytest.approx(1)
    assert {"loss", "adversarial_cosine", "lr", "images_per_second", "seconds_left", "failed"} <= log[1].keys()
    explained = run("explain", "scene.png", "-t", "a dog", "-m", "runs/aft/model")
    assert explained.exit_code == 0
    before, after = clipfast.load("demo"), clipfast.load("runs/aft/model")
    assert not before.module.visual.proj.equal(after.module.visual.proj)
    again = run("finetune", "aft", "scenes:3:4", *QUICK, "--epochs", 1, "--lr", 1e-3)
    assert again.stdout.splitlines()[0] == "2 steps, 4 images; complete already"
    other = run("finetune", "aft", "scenes:3:4", *QUICK, "--epochs", 1)
    assert other.exit_code == 2
    assert "settings.lr was 0.001 and is 1e-05 now" in other.stderr


def test_flags_reach_the_adversary_in_255ths(run: Any) -> None:
    words = ("--recipe", "released", "--eps", 2, "--sigma", 0.5, "--penalty", "elastic_net", "--steps", 1)
    assert run("finetune", "aft", "scenes:3:4", *QUICK, *words, "-o", "a").exit_code == 0
    config = json.loads(Path("a/config.json").read_text())
    assert (
        config["objective"]["adversary"] | {"eps": 2 / 255, "sigma": 0.5 / 255, "recipe": "released"}
        == config["objective"]["adversary"]
    )
    assert config["objective"]["adversary"]["momentum"] == 0.9
    assert config["objective"]["normalize"] is True
    assert config["settings"]["betas"] == [0.9, 0.999]
    document = json.loads(run("finetune", "fare", "scenes:3:4", *QUICK, "--steps", 1, "--eps", 3, "--json").stdout)
    assert document["complete"] and document["images"] == 2
    assert (document["folder"], document["model"]) == ("runs/fare", "runs/fare/model")
    config = json.loads(Path("runs/fare/config.json").read_text())
    assert config["objective"]["adversary"]["eps"] == 3 / 255
    assert config["objective"]["normalize"] is False


def test_images_that_cannot_be_read_are_counted(run: Any, here: Path) -> None:
    (here / "photos").mkdir()
    for i in range(3):
        (here / "photos" / f"{i}.png").write_bytes((here / "scene.png").read_bytes())
    (here / "photos" / "2.png").write_bytes(b"broken")
    result = run("finetune", "fare", "photos", "--batch", 3, "--pgd-steps", 1, "--epochs", 2)
    assert result.exit_code == 0
    assert "2 images could not be read" in result.stderr
    assert len(Path("runs/fare/errors.jsonl").read_text().splitlines()) == 2


def test_a_run_that_is_stopped_says_how_to_go_on(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopping(Follow):
        def step(self, record: Mapping[str, Any]) -> None:
            if record["step"] == 1:
                os.kill(os.getpid(), signal.SIGINT)

    words = ("finetune", "fare", "scenes:3:8", *QUICK, "--epochs", 1)
    with monkeypatch.context() as patched:
        patched.setattr(training, "_follow", lambda stack, out: Stopping())
        stopped = run(*words)
    assert stopped.exit_code == 130
    assert "stopped after step 2 of 4; the same command goes on from there" in stopped.stderr
    again = run(*words)
    assert again.exit_code == 0
    assert "2 of 4 steps are done already, in runs/fare/" in again.stderr
    assert again.stdout.startswith("4 steps, 8 images; 2 steps in")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "name a source of images, for example: clipfast finetune aft photos/"),
        (("nowhere",), "there is no "),
        (("scenes:1", "--recipe", "new"), "there is no recipe 'new'"),
        (("scenes:1", "--penalty", "lasso"), "lasso"),
        (("scenes:1", "--eps", "-1"), "eps="),
        (("scenes:1", "--captions", "label"), "scenes have no column 'label'"),
        (("scenes:1", "--lr", "0"), "lr=0.0 must be above 0"),
        (("scenes:1", "--parallel", "mpi"), "there is no parallelism 'mpi'"),
    ],
)
def test_bad_words_end_in_one_sentence(run: Any, words: tuple[str, ...], sentence: str) -> None:
    result = run("finetune", "aft", *words)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not result.stdout
    assert not Path("runs/aft/state.pt").exists()
