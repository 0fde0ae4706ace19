from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import clipfast


def test_a_page_with_every_scene_is_listed_last(run: Any) -> None:
    result = run("demo", "--scenes", 3)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "clipfast-demo/report.html"
    names = sorted(path.name for path in Path("clipfast-demo").iterdir())
    assert names == ["report.html", "scene-1.png", "scene-2.png", "scene-3-with-a-word.png", "sheet.png"]
    page = Path("clipfast-demo/report.html").read_text()
    assert all(f'"title":"{name[:-4]}"' in page for name in names[1:4])
    assert "proves nothing about photographs" in page


def test_the_command_it_proposes_works(run: Any) -> None:
    (proposal,) = [line for line in run("demo", "--scenes", 1).stdout.splitlines() if line.startswith("try: ")]
    words = proposal.removeprefix("try: clipfast ").split('"')
    assert run(*words[0].split(), words[1]).exit_code == 0


def test_a_seed_draws_the_same_again(run: Any) -> None:
    def demo(seed: int, folder: str) -> Any:
        found = json.loads(run("demo", "--seed", seed, "--scenes", 2, "-o", folder, "--json").stdout)
        return [scene["prompts"] for scene in found["scenes"]], Path(folder, "sheet.png").read_bytes()

    first, second, other = demo(1, "a"), demo(1, "b"), demo(2, "c")
    assert first == second
    assert first[0] != other[0]


def test_every_thing_is_a_text_and_so_are_the_written_word_and_the_caption(run: Any) -> None:
    found = json.loads(run("demo", "--scenes", 6, "--json").stdout)["scenes"]
    assert all(
        list(scene["peaks_on"]) == [p["text"] for p in scene["prompts"]][: len(scene["peaks_on"])] for scene in found
    )
    assert {len(scene["peaks_on"]) for scene in found} == {1, 2, 3}
    assert any(prompt["text"].startswith("the word ") for prompt in found[-1]["prompts"])


def test_bad_input(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("demo", "--scenes", 0).exit_code == 2
    assert "is a file" in run("demo", "-o", "scene.png").stderr
    monkeypatch.setattr("clipfast.models.demo.WEIGHTS", Path("missing.safetensors"))
    result = run("demo")
    assert result.exit_code == 2
    assert "weights are missing" in result.stderr
    assert not Path("clipfast-demo").exists()


def test_interrupting_leaves_nothing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(clipfast.Explainer, "words", interrupt)
    assert run("demo").exit_code == 130
    assert [path.name for path in Path().iterdir()] == ["scene.png"]
