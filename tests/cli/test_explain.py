from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import clipfast
from clipfast.errors import TextError
from clipfast.results import Attribution


def written() -> set[str]:
    return {str(path) for path in Path().rglob("*") if path.is_file()} - {"scene.png"}


def test_common_case_needs_no_option_but_a_text(run: Any) -> None:
    result = run("explain", "scene.png", "-t", "a dog", "-t", "a red car")
    assert result.exit_code == 0
    assert written() == {
        "runs/explain/report.html",
        "runs/explain/scene.npz",
        "runs/explain/scene--a-dog.png",
        "runs/explain/scene--a-red-car.png",
    }
    assert result.stdout.splitlines()[-1] == "runs/explain/report.html"
    page = Path("runs/explain/report.html").read_text()
    assert "a red car" in page
    assert '"words":[{"word":"a"' in page
    expected = clipfast.explain("scene.png", ["a dog", "a red car"])
    with np.load("runs/explain/scene.npz") as stored:
        np.testing.assert_allclose(stored["maps"], expected.maps[0].numpy())
    for text, score in zip(["a dog", "a red car"], expected.scores[0].tolist(), strict=True):
        assert any(text in line and f"{score:.3f}" in line for line in result.stdout.splitlines())


def test_runs_are_numbered_and_a_named_folder_keeps_what_is_in_it(run: Any) -> None:
    for expected in ("runs/explain", "runs/explain-2", "runs/explain-3"):
        assert run("explain", "scene.png", "-t", "a dog").stdout.splitlines()[-1] == f"{expected}/report.html"
    Path("mine").mkdir()
    Path("mine/kept.txt").write_text("kept")
    Path("mine/report.html").write_text("old")
    assert run("explain", "scene.png", "-t", "a dog", "-o", "mine").exit_code == 0
    assert sorted(p.name for p in Path("mine").iterdir()) == [
        "kept.txt",
        "report.html",
        "scene--a-dog.png",
        "scene.npz",
    ]
    assert Path("mine/report.html").read_text() != "old"
    assert (
        run("explain", "scene.png", "-t", "a dog", "-o", "new/deep").stdout.splitlines()[-1] == "new/deep/report.html"
    )


def test_json_is_all_of_stdout(run: Any) -> None:
    result = run("explain", "scene.png", "-t", "a dog", "-t", "a car", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert found["model"] == "demo"
    assert [prompt["text"] for prompt in found["images"][0]["prompts"]] == ["a dog", "a car"]
    assert [text["text"] for text in found["images"][0]["words"]] == ["a dog", "a car"]
    assert found["files"][-1] == found["report"]
    assert all(Path(file).is_file() for file in found["files"])
    assert set(found["files"]) == written()


def test_other_images_are_explained_when_some_cannot_be_read(run: Any) -> None:
    Path("broken.png").write_bytes(Path("scene.png").read_bytes()[:200])
    Image.open("scene.png").save("last.png")
    result = run("explain", "scene.png", "broken.png", "nope.png", "last.png", "-t", "a dog", "--json")
    assert result.exit_code == 2
    images = json.loads(result.stdout)["images"]
    assert ["error" in image for image in images] == [False, True, True, False]
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert [line.split()[1] for line in errors] == ["broken.png", "nope.png"]
    page = Path("runs/explain/report.html").read_text()
    assert "2 images were not explained" in page
    assert {"runs/explain/scene.npz", "runs/explain/last.npz"} < written()


def test_nothing_is_left_when_no_image_can_be_read(run: Any) -> None:
    Path("empty.png").touch()
    result = run("explain", "empty.png", "-t", "a dog")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "error: empty.png is empty" in result.stderr
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "ViT-B-61:openai"], "did you mean 'ViT-B-16'"),
        (["-m", "ViT-B-16:opnai"], "did you mean 'openai'?"),
        (["-m", "ViT-B-16"], "needs weights"),
        (["-m", "missing.pt"], "there is no checkpoint missing.pt"),
        (["--method", "grad_eclp"], "did you mean 'grad_eclip'"),
        (["--set", "layrs=2"], "did you mean 'layers'?"),
        (["--set", "layers"], "should read NAME=VALUE"),
        (["--set", "signed=maybe"], "true or false"),
        (["--set", "spatial=far"], "'raw', 'projected', 'none'"),
        (["--set", "layers=9"], "this tower has 4 blocks"),
        (["--resize", "crp"], "crop, squash"),
        (["--precision", "float31"], "did you mean 'float32'"),
        (["--device", "gpu"], "there is no device 'gpu'"),
        (["--device", "mps:9"], "mps"),
        (["--out", "scene.png"], "scene.png is a file"),
        (["--out", "scene.png/deep"], "scene.png"),
        (["--texts", "missing.txt"], "there is no such file"),
        (["--texts", "."], "is a folder"),
        (["--texts", "scene.png"], "is not UTF-8"),
        (["--top", "0"], "greater than or equal to 1"),
        (["--metod", "rise"], "--method"),
        (["-t", " "], "is empty"),
        (["-t", "a zebra"], "'zebra'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(run: Any, words: list[str], said: str) -> None:
    result = run("explain", "scene.png", "-t", "a dog", *words)
    assert result.exit_code == 2
    assert result.stdout == ""
    (error,) = [line for line in result.stderr.splitlines() if not line.startswith("note:")]
    assert error.startswith("error:")
    assert said in error
    assert written() == set()
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["scene.png"], "clipfast explain scene.png -t 'a dog'"),
        (["scene.png", "a red car"], "clipfast explain scene.png -t 'a red car'"),
        ([], "clipfast explain photo.jpg -t 'a dog'"),
        (["-t", "a car"], "clipfast explain photo.jpg -t 'a car'"),
        (["none/*.jpg", "-t", "a car"], "no image found under 'none/*.jpg'"),
    ],
)
def test_missing_words_are_answered_with_the_command_as_it_should_be(run: Any, words: list[str], said: str) -> None:
    result = run("explain", *words)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_folders_and_patterns_name_images(run: Any) -> None:
    Path("many").mkdir()
    for name in ("b.png", "a.png"):
        Image.open("scene.png").save(f"many/{name}")
    for named in ("many", "many/*.png"):
        found = json.loads(run("explain", named, "-t", "a dog", "--json").stdout)
        assert [image["image"] for image in found["images"]] == ["a.png", "b.png"]


def test_texts_from_a_file_and_from_stdin(run: Any) -> None:
    Path("texts.txt").write_text("\ufeffa cat\n\n  a dog  \n", encoding="utf-8")
    found = json.loads(run("explain", "scene.png", "-t", "a car", "--texts", "texts.txt", "--json").stdout)
    assert [prompt["text"] for prompt in found["images"][0]["prompts"]] == ["a car", "a cat", "a dog"]
    found = json.loads(run("explain", "scene.png", "--texts", "-", "--json", stdin="a cat\na bus\n").stdout)
    assert [prompt["text"] for prompt in found["images"][0]["prompts"]] == ["a cat", "a bus"]
    blank = run("explain", "scene.png", "--texts", "-", stdin="\n")
    assert blank.exit_code == 2
    assert "holds no text" in blank.stderr


def test_pictures_of_the_best_texts_and_maps_of_all(run: Any) -> None:
    texts = ["a dog", "a cat", "a bus", "a car", "a tree"]
    result = run("explain", "scene.png", *(word for text in texts for word in ("-t", text)), "--top", 2, "--json")
    prompts = json.loads(result.stdout)["images"][0]["prompts"]
    best = sorted(prompts, key=lambda prompt: -prompt["score"])[:2]
    drawn = {path.name for path in Path("runs/explain").glob("*.png")}
    assert drawn == {f"scene--{prompt['text'].replace(' ', '-')}.png" for prompt in best}
    with np.load("runs/explain/scene.npz") as stored:
        assert stored["maps"].shape == (5, 12, 12)


def test_words_are_signed_and_can_be_left_out(run: Any) -> None:
    def values(*more: str) -> list[float]:
        (image,) = json.loads(run("explain", "scene.png", "-t", "a dog and a red car", "--json", *more).stdout)[
            "images"
        ]
        return [value for text in image.get("words", []) for _, value in text["words"]]

    assert len(values()) == 6
    assert min(values()) < 0
    assert min(values("--set", "signed=false")) == 0
    assert values("--no-words") == []


def test_words_that_cannot_be_explained_cost_no_map(run: Any) -> None:
    # The demo's image tower has four blocks, its text tower three.
    result = run("explain", "scene.png", "-t", "a dog", "--set", "layers=4")
    assert result.exit_code == 0
    assert "note: the words are not explained: layers=4" in result.stderr
    assert "runs/explain/scene.npz" in written()
    assert run("explain", "scene.png", "-t", "a dog", "--set", "layers=4", "--words").exit_code == 2


def strips(page: str) -> list[list[str]]:
    shown = json.loads(Path(page).read_text().split('id="data">')[1].split("</script>")[0])
    return [[word["text"] for word in p["strip"] or []] for item in shown["items"] for p in item["prompts"]]


def test_sentences_are_strips_where_the_method_maps_words(run: Any) -> None:
    result = run("explain", "scene.png", "-t", "a dog", "-t", "a red car", "--method", "tclip", "--json")
    assert result.exit_code == 0
    assert strips("runs/explain/report.html") == [["a", "dog"], ["a", "red", "car"]]
    assert "runs/explain/scene--a-red-car--words.png" in written()
    (image,) = json.loads(result.stdout)["images"]
    assert [each["text"] for each in image["word_maps"]] == ["a dog", "a red car"]
    assert "words" not in image
    for words, expected in ((["--no-words"], [[]]), (["--words"], [["a", "dog"]])):
        report = run("explain", "scene.png", "-t", "a dog", "--method", "tclip", *words).stdout.splitlines()[-1]
        assert strips(report) == expected


def test_words_that_cannot_be_told_apart_cost_no_map(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise TextError("words cannot be told apart")

    monkeypatch.setattr(clipfast.Model, "words", refuse)
    result = run("explain", "scene.png", "-t", "a dog", "--method", "tclip")
    assert result.exit_code == 0
    assert "note: the words are not mapped: words cannot be told apart" in result.stderr
    assert run("explain", "scene.png", "-t", "a dog", "--method", "tclip", "--words").exit_code == 2


def test_words_are_left_out_where_the_method_has_none(run: Any) -> None:
    result = run("explain", "scene.png", "-t", "a dog", "--method", "gem")
    assert result.exit_code == 0
    assert "words" not in result.stdout
    refused = run("explain", "scene.png", "-t", "a dog", "--method", "gem", "--words")
    assert refused.exit_code == 2
    assert "gem does not explain texts" in refused.stderr


def test_extras_have_columns(run: Any) -> None:
    result = run("explain", "scene.png", "-t", "a dog", "--method", "integrated_gradients", "--set", "steps=2")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].split() == ["image", "text", "score", "delta"]


def test_a_text_too_long_is_noted_once(run: Any) -> None:
    result = run("explain", "scene.png", "-t", "a dog and " * 12)
    assert result.exit_code == 0
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: a text of 36 tokens was cut")]
    assert len(notes) == 1


@pytest.mark.parametrize("where", [(clipfast.Explainer, "__call__"), (Attribution, "save"), (Attribution, "report")])
def test_interrupting_leaves_nothing(run: Any, monkeypatch: pytest.MonkeyPatch, where: tuple[type, str]) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*where, interrupt)
    result = run("explain", "scene.png", "-t", "a dog")
    assert result.exit_code == 130
    assert written() == set()
    assert not Path("runs").exists()


def test_full_memory_is_said_in_one_sentence(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(clipfast.Explainer, "__call__", exhaust)
    result = run("explain", "scene.png", "-t", "a dog")
    assert result.exit_code == 2
    assert "error: the memory is full" in result.stderr
