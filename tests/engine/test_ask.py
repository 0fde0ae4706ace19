"""A run answers texts that it was never asked, as if it had been explained for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import clipfast
from clipfast import Explainer
from clipfast.cli import app
from clipfast.data.scenes import Scenes
from clipfast.engine.ask import Answer, _best, ask
from clipfast.engine.config import RunConfig
from clipfast.engine.stored import RowReader
from clipfast.engine.texts import Prompts
from clipfast.errors import InputError, ModelError, TextError
from clipfast.models.image import ImageTower
from clipfast.models.model import Model

ASKED = ["a red umbrella", "a banana", "a small dog on the left"]


@pytest.fixture(scope="module")
def model() -> Model:
    return clipfast.load("demo", device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for i, scene in enumerate(Scenes(21, size=96, seed=3)):
        Image.fromarray(scene.image).save(folder / f"{'more/' if i % 3 else ''}{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def make(model: Model, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def build(texts: Any = ("a dog", "a cat"), features: Any = "float32", **options: Any) -> Path:
        out = tmp_path_factory.mktemp("runs") / "maps"
        clipfast.run(str(photos), texts, out, model=model, features=features, shard_size=6, maps="float32", **options)
        return out

    return build


@pytest.fixture(scope="module")
def run(make: Callable[..., Path]) -> Path:
    return make()


@pytest.fixture(scope="module")
def fresh(model: Model, photos: Path) -> clipfast.Attribution:
    return Explainer(model)([str(path) for path in _files(photos)], ASKED)


def _files(photos: Path) -> list[Path]:
    return sorted(photos.rglob("*.png"), key=lambda path: path.relative_to(photos).as_posix())


def test_equals_a_fresh_explanation(run: Path, model: Model, photos: Path, fresh: clipfast.Attribution) -> None:
    keys = [path.relative_to(photos).as_posix() for path in _files(photos)]
    assert len(keys) == 21
    answers = ask(run, ASKED, k=6, model=model)
    for p, answer in enumerate(answers):
        order = sorted(range(len(keys)), key=lambda i: -float(fresh.scores[i, p]))[:6]
        assert answer.keys == [keys[i] for i in order]
        assert answer.texts == [ASKED[p]] and answer.searched == 21
        torch.testing.assert_close(answer.scores[:, 0], fresh.scores[order, p], rtol=0, atol=1e-6)
        expected = fresh.maps[order, p : p + 1]
        assert float((answer.maps - expected).norm() / expected.norm()) < 1e-6
        assert answer.geometries == [fresh.geometries[i] for i in order]
        assert answer.sources == [photos / key for key in answer.keys]


def test_neither_images_nor_the_image_tower(
    run: Path, model: Model, photos: Path, fresh: clipfast.Attribution, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "maps")
    config = json.loads((copy / "run.json").read_text())
    config["config"]["source"]["place"] = "/nowhere/at all"
    (copy / "run.json").write_text(json.dumps(config))
    # Markers name the configuration they are of.
    digest = RunConfig.from_json(config["config"]).digest
    for path in (copy / "shards").glob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "config": digest}))

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("the image tower ran")

    for name in ("run", "embed", "patch", "encode"):
        if hasattr(ImageTower, name):
            monkeypatch.setattr(ImageTower, name, refuse)
    answer = ask(copy, ASKED[0], k=3, model=model)
    assert answer.sources == [None] * 3
    # Heat alone, as large as the picture was.
    assert answer.picture(0).size == (96, 96)
    written = answer.save(tmp_path / "out")
    assert sum(path.suffix == ".png" for path in written) == 3
    assert Path(answer.keys[0]).name in answer.report(tmp_path / "page.html").read_text()


def test_the_best_of_all_shards(stored: Callable[..., Path], explained: Callable[..., Any]) -> None:
    # Features are a function of the key: the second shard repeats the first, score by score.
    keys = [f"{i}.jpg" for i in range(7)]
    shards = [[explained(keys[:4], features=(20, 8)), explained(keys[4:], features=(20, 8))]]
    shards.append([explained([f"{i}.jpg" for i in range(9)], features=(20, 8))])
    run = clipfast.open_run(stored(shards, ["a", "b", "c"], features="float32"))
    texts = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    embeddings = np.concatenate(list(run.embeddings()))
    assert embeddings.shape == (16, 8)
    np.testing.assert_array_equal(embeddings[:7], embeddings[7:14])
    counted: list[int] = []
    found = _best(run, texts, 6, counted.append)
    assert sum(counted) == 16
    for numbers, text in zip(found, texts, strict=True):
        assert numbers == sorted(range(16), key=lambda i: (-float((embeddings @ text)[i]), i))[:6]
    assert [len(numbers) for numbers in _best(run, texts, 100, counted.append)] == [16] * 5


def test_embeddings_need_no_model(run: Path, model: Model) -> None:
    embeddings = model.encode_texts(ASKED)
    given = ask(run, 3.5 * embeddings, k=4)
    for by_embedding, by_text in zip(given, ask(run, ASKED, k=4, model=model), strict=True):
        assert by_embedding.keys == by_text.keys and by_embedding.texts is None and by_embedding.error is None
        torch.testing.assert_close(by_embedding.maps, by_text.maps, rtol=1e-5, atol=1e-8)
    with pytest.raises(TextError, match=r"\(P, 128\)"):
        ask(run, torch.ones(2, 7))


def test_only_embeddings_are_read_of_those_that_lose(run: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = []
    whole = RowReader.group
    monkeypatch.setattr(RowReader, "group", lambda self, n: groups.append(self.path.parent.name) or whole(self, n))
    progress: list[int] = []
    ask(run, "a dog", k=1, model=model, check=False, progress=progress.append)
    assert groups.count("features") == 1
    assert sum(progress) == 21


@pytest.mark.parametrize(("codec", "most"), [("float32", 1e-6), ("float16", 2e-3), ("int8", 6e-2), ("rank:16", 1.0)])
def test_the_storage_error_is_that_of_the_maps(
    codec: str, most: float, make: Callable[..., Path], model: Model, photos: Path
) -> None:
    texts = ["a dog", "a cat", "a house"]
    folder = make(texts, features=codec)
    answers = ask(folder, texts, k=21, model=model)
    run = clipfast.open_run(folder)
    expected = []
    # Of 21 images 12 are checked: every second one and, by rounding down, some neighbours.
    for number in np.unique(np.linspace(0, 20, 12).astype(int)):
        for p, answer in enumerate(answers):
            computed = run[int(number)].maps[0, p]
            stored = answer.maps[answer.keys.index(run.rows(int(number)).keys[0]), 0]
            if computed.any():
                expected.append(float((stored - computed).norm() / computed.norm()))
    error = answers[0].error
    assert error is not None and error.codec == codec
    assert error.maps == len(expected) > 20
    assert error.median == pytest.approx(np.median(expected), rel=1e-3, abs=1e-8)
    assert error.largest == pytest.approx(max(expected), rel=1e-3, abs=1e-8)
    assert error.median < error.largest < most or codec == "float32"


def test_classes_and_captions_are_checked_by_their_own_embeddings(
    make: Callable[..., Path], model: Model, photos: Path
) -> None:
    classes = make(Prompts(("dog", "cat"), None, ("a photo of a {}.", "a drawing of a {}.")), features="float32")
    error = ask(classes, "a dog", k=1, model=model).error
    assert error is not None and error.largest < 1e-5
    for path in _files(photos):
        path.with_suffix(".txt").write_text("a dog on the left" if "1" in path.name else "a cat")
    captions = make(Prompts(column="caption"), features="float32")
    error = ask(captions, "a dog", k=1, model=model).error
    assert error is not None and error.largest < 1e-5


def test_grids_of_their_own(model: Model, tmp_path: Path) -> None:
    for i, (width, height) in enumerate([(96, 96), (160, 96), (96, 64)]):
        Image.fromarray(Scenes(3, size=160, seed=9)[i].image).resize((width, height)).save(tmp_path / f"{i}.png")
    clipfast.run(str(tmp_path), "a dog", tmp_path / "maps", model=model, features="float32", resize="keep")
    answer = ask(tmp_path / "maps", "a cat", model=model)
    assert isinstance(answer.maps, list)
    expected = Explainer(model, resize="keep")([str(tmp_path / key) for key in answer.keys], "a cat")
    for found, wanted in zip(answer.maps, expected.maps, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    assert answer.error is not None and answer.error.largest < 1e-2


def test_refusals(run: Path, model: Model, make: Callable[..., Path], tmp_path: Path, build_clip: Any) -> None:
    with pytest.raises(InputError, match=r"k=0 must be at least 1"):
        ask(run, "a dog", k=0)
    with pytest.raises(InputError, match="holds no run"):
        ask(tmp_path, "a dog")
    with pytest.raises(InputError, match="has other weights than the demo"):
        ask(run, "a dog", model=build_clip())
    with pytest.raises(TextError, match="unicorn"):
        ask(run, "a unicorn", model=model)
    with pytest.raises(InputError, match="kept no features"):
        ask(make(features=False), "a dog", model=model)
    with pytest.raises(ModelError, match="there is no model"):
        ask(run, "a dog", model="no such model")


def test_no_images_yet(stored: Callable[..., Path], explained: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="holds no images yet"):
        ask(stored([], ["a dog"], features="int8"), torch.ones(1, 8))
    # A shard without images among others is no obstacle.
    folder = stored([[explained(3, features=(20, 8))], []], ["a", "b", "c"], name="half", features="float32")
    (answer,) = ask(folder, torch.ones(1, 8), k=2)
    assert isinstance(answer, Answer) and answer.maps.shape == (2, 1, 4, 5)


def test_command(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["ask", str(run), *ASKED[:2], "-k", "3", "-o", "found", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [text["text"] for text in document["texts"]] == ASKED[:2]
    assert [len(text["images"]) for text in document["texts"]] == [3, 3]
    assert document["searched"] == 21 and document["storage_error"]["codec"] == "float32"
    for name in ("a-red-umbrella", "a-banana"):
        assert len(list(Path("found", name).glob("*.npz"))) == 3
        assert Path("found", name, "report.html").exists()
    plain = CliRunner().invoke(app, ["ask", str(run), ASKED[0], "-k", "2", "--no-check", "--images", str(tmp_path)])
    assert plain.exit_code == 0, plain.output
    assert "the best 2 of 21 images" in plain.stdout and "runs/ask/report.html" in plain.stdout
    assert "2 images were not found" in plain.stderr
    wrong = CliRunner().invoke(app, ["ask", str(run)])
    assert wrong.exit_code == 2 and "say what to look for" in wrong.stderr
