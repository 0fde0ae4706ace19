"""Exported files hold the run's maps, under names that stay inside the folder."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco
from typer.testing import CliRunner

from clipfast.cli import app
from clipfast.data.geometry import Geometry
from clipfast.engine.base import Explained
from clipfast.engine.export import KINDS, Export, safe_name
from clipfast.engine.reader import Run, open_run
from clipfast.engine.sources import open_source
from clipfast.errors import InputError
from clipfast.view import overlay

Make = Callable[..., Explained]
Store = Callable[..., Path]
TEXTS = ["a dog", "a cat!", "a red/car"]
SLUGS = ["a-dog", "a-cat", "a-red-car"]
KEYS = ["cats/1.jpg", "cats/1.png", "../../etc/passwd", "b.v2.jpg"]


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _unit(run: Run, number: int) -> np.ndarray:
    """Maps (P, height, width) in 0..1, on the image's own pixels, in float64."""
    found = run[number]
    maps = found.maps[0].double()  # type: ignore[union-attr]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    unit = torch.where(high > low, (maps - low) / (high - low).clamp(min=1e-30), 0.0)
    geometry = found.geometries[0]
    assert geometry is not None
    return geometry.to_image(unit).numpy()


@pytest.fixture
def run(stored: Store, explained: Make) -> Run:
    batch = explained(KEYS[:3])
    batch.maps[1, 2] = 0.25
    return open_run(stored([[batch], [explained(KEYS[3:])]], TEXTS))


def test_heat_on_the_images_pixels(run: Run, tmp_path: Path) -> None:
    assert Export(run, tmp_path / "out", ["png"])() == {"png": 12}
    names = ["cats/1", "cats/1~2", "_/_/etc/passwd", "b.v2"]
    assert _files(tmp_path / "out/png") == sorted(f"{name}--{slug}.png" for name in names for slug in SLUGS)
    for number, name in enumerate(names):
        for heat, slug in zip(_unit(run, number), SLUGS, strict=True):
            picture = Image.open(tmp_path / f"out/png/{name}--{slug}.png")
            assert picture.mode == "L"
            assert np.abs(np.asarray(picture).astype(int) - np.rint(heat * 255)).max() <= 1
    assert not np.asarray(Image.open(tmp_path / "out/png/cats/1~2--a-red-car.png")).any(), "no heat in a constant map"


def test_arrays_as_segmentation_reads_them(run: Run, tmp_path: Path) -> None:
    assert Export(run, tmp_path, ["npy"])() == {"npy": 4}
    for number, name in enumerate(["cats/1", "cats/1~2"]):
        found: dict[str, np.ndarray] = np.load(tmp_path / f"npy/{name}.npy", allow_pickle=True).item()
        assert found["keys"].tolist() == [0, 1, 2]
        assert found["cam"].dtype == found["high_res"].dtype == np.float16 and found["cam"].shape == (3, 4, 5)
        np.testing.assert_allclose(found["high_res"], _unit(run, number), atol=6e-4)
        assert found["cam"][0].max() == 1 and found["cam"].min() == 0


def test_labels_are_the_strongest_prompt_of_each_pixel(run: Run, tmp_path: Path) -> None:
    Export(run, tmp_path, ["labels"], threshold=0.3)()
    for number, name in enumerate(["cats/1", "cats/1~2", "_/_/etc/passwd", "b.v2"]):
        found = np.asarray(Image.open(tmp_path / f"labels/{name}.png"))
        assert found.dtype == np.uint8
        heat = _unit(run, number)
        decided = (np.diff(np.sort(heat, 0)[-2:], axis=0)[0] > 1e-5) | (heat.max(0) < 0.29)
        clear = decided & (np.abs(heat - 0.3) > 1e-5).all(0)
        expected = np.where(heat.max(0) >= 0.3, heat.argmax(0) + 1, 0)
        assert clear.mean() > 0.9 and (found == expected)[clear].all()


def test_more_than_255_labels_take_two_channels(stored: Store, explained: Make, tmp_path: Path) -> None:
    batch = explained(["a"], 2)
    batch.prompts[:] = [[299, 3]]
    run = open_run(stored([[batch]], [f"class {i}" for i in range(300)]))
    Export(run, tmp_path, ["labels"], threshold=0.2)()
    found = np.asarray(Image.open(tmp_path / "labels/a.png")).astype(int)
    labels = found[..., 0] + 256 * found[..., 1]
    assert set(np.unique(labels)) == {0, 4, 300} and not found[..., 2].any()
    heat = _unit(run, 0)
    assert labels[np.unravel_index(heat[0].argmax(), heat[0].shape)] == 300


def test_masks_as_coco_keeps_them(run: Run, tmp_path: Path) -> None:
    assert Export(run, tmp_path, ["rle"], threshold=0.5)() == {"rle": 2}
    assert _files(tmp_path / "rle") == ["000000-abc.json", "000001-abc.json"]
    data = json.loads((tmp_path / "rle/000000-abc.json").read_text())
    assert [(image["id"], image["file_name"]) for image in data["images"]] == [(i + 1, KEYS[i]) for i in range(3)]
    assert data["categories"] == [{"id": i + 1, "name": text} for i, text in enumerate(TEXTS)]
    assert [(one["image_id"], one["category_id"]) for one in data["annotations"]] == [
        (i, c) for i in (1, 2, 3) for c in (1, 2, 3)
    ]
    assert [one["id"] for one in data["annotations"]] == list(range(1, 10))
    for one in data["annotations"]:
        number, prompt = one["image_id"] - 1, one["category_id"] - 1
        heat = _unit(run, number)[prompt]
        found = coco.decode(one["segmentation"]).astype(bool)
        image = data["images"][number]
        assert found.shape == (image["height"], image["width"]) == heat.shape
        clear = np.abs(heat - 0.5) > 1e-5
        assert (found == (heat >= 0.5))[clear].all()
        assert one["area"] == found.sum() and one["iscrowd"] == 0
        rows, columns = found.any(1).nonzero()[0], found.any(0).nonzero()[0]
        if len(rows):
            x, y, w, h = one["bbox"]
            assert (x, y, x + w, y + h) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert one["score"] == pytest.approx(float(run[number].scores[0, prompt]))
    assert data["annotations"][5]["area"] == 0, "a constant map has no mask"


def test_tars_to_go_with_the_images_own(run: Run, tmp_path: Path) -> None:
    assert Export(run, tmp_path / "a", ["webdataset"])() == {"webdataset": 2}
    Export(run, tmp_path / "b", ["webdataset"])()
    for name in ("000000-abc.tar", "000001-abc.tar"):
        assert (tmp_path / "a/webdataset" / name).read_bytes() == (tmp_path / "b/webdataset" / name).read_bytes()
    with tarfile.open(tmp_path / "a/webdataset/000000-abc.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        assert {member.mtime for member in tar} == {0}
    names = ["cats/1", "cats/1~2", "_/_/etc/passwd"]
    assert list(members) == [f"{name}.{ending}" for name in names for ending in ("npy", "json")]
    for number, name in enumerate(names):
        maps, about = np.load(io.BytesIO(members[f"{name}.npy"])), json.loads(members[f"{name}.json"])
        known = run[number]
        assert (about["key"], about["prompts"]) == (KEYS[number], TEXTS)
        assert about["scores"] == known.scores[0].tolist()
        assert known.geometries[0] is not None
        assert tuple(about["box"]) == known.geometries[0].box
        assert maps.dtype == np.float16 and maps.shape == (3, 4, 5)
        np.testing.assert_allclose(maps.astype(np.float32) * about["scale"], known.maps[0], atol=about["scale"] * 3e-4)
    with tarfile.open(tmp_path / "a/webdataset/000001-abc.tar") as tar:
        assert tar.getnames() == ["b_v2.npy", "b_v2.json"], "a sample's name ends at its first dot"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four pictures in folders, each of another size."""
    for i, name in enumerate(["x/1.jpg", "x/2.png", "y/1.png", "z.png"]):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (30 + i, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.fixture
def seen(photos: Path, stored: Store, explained: Make) -> Run:
    """A run over the pictures, whose rows are not in the order of the source, without maps of y/1.png."""
    source = open_source(photos, shard_size=3)
    batches = [explained(["x/2.png", "x/1.jpg"]), explained(["z.png"])]
    for batch, sides in zip(batches, ([31, 30], [33]), strict=True):
        batch.geometries = [Geometry(h, 40, (0.0, 0.0, 40.0, float(h)), (64, 80), (64, 80)) for h in sides]
    return open_run(stored([batches[:1], batches[1:]], TEXTS, source=source.config()))


def test_overlays_find_their_pictures(seen: Run, photos: Path, tmp_path: Path) -> None:
    export = Export(seen, tmp_path / "out", ["overlay"])
    assert export() == {"overlay": 9} and export.errors == []
    for number, name in enumerate(["x/2", "x/1", "z"]):
        picture = Image.open(next(photos.glob(f"{name}.*"))).convert("RGB")
        heat, palette = seen[number].drawable(0, [1])
        expected = np.asarray(overlay(picture, heat[0], colormap=palette))
        found = np.asarray(Image.open(tmp_path / f"out/overlay/{name}--a-cat.png"))
        np.testing.assert_array_equal(found, expected)


def test_pictures_that_moved_or_went(seen: Run, photos: Path, tmp_path: Path) -> None:
    moved = photos.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"overlays need the images: there is no .*photos.*name with --images"):
        Export(seen, tmp_path / "out", ["overlay"])
    (moved / "x/1.jpg").write_bytes(b"no picture")
    (moved / "x/2.png").unlink()
    export = Export(seen, tmp_path / "out", ["overlay", "png"], images=moved)
    assert export() == {"overlay": 3, "png": 9}
    assert [failure.key for failure in export.errors] == ["x/2.png", "x/1.jpg"]
    assert "no longer where" in export.errors[0].reason and "x/1.jpg" in export.errors[1].reason


def test_a_source_that_says_no_place(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name them with --images"):
        Export(run, tmp_path, ["overlay"])


def test_what_is_there_is_left_alone(run: Run, tmp_path: Path) -> None:
    tmp_path = tmp_path / "out"
    every = [kind for kind in KINDS if kind != "overlay"]
    first = Export(run, tmp_path, every)()
    assert first == {"png": 12, "npy": 4, "labels": 4, "rle": 2, "webdataset": 2}
    before = {name: (tmp_path / name).read_bytes() for name in _files(tmp_path)}
    assert sum(Export(run, tmp_path, every)().values()) == 0
    (tmp_path / "png/cats/1--a-dog.png").unlink()
    (tmp_path / "labels/b.v2.png").write_bytes(b"mine")
    assert Export(run, tmp_path, every)() == {**dict.fromkeys(every, 0), "png": 1}
    assert (tmp_path / "labels/b.v2.png").read_bytes() == b"mine"
    assert Export(run, tmp_path, every, overwrite=True)() == first
    assert {name: (tmp_path / name).read_bytes() for name in _files(tmp_path)} == before


def test_a_limit_names_the_part(run: Run, tmp_path: Path) -> None:
    done: list[int] = []
    assert Export(run, tmp_path / "out", ["npy", "webdataset"])(2, done.append) == {"npy": 2, "webdataset": 1}
    assert sum(done) == 2
    assert _files(tmp_path / "out") == ["npy/cats/1.npy", "npy/cats/1~2.npy", "webdataset/000000-abc-first-2.tar"]
    assert Export(run, tmp_path / "out", ["npy"])(99) == {"npy": 2}


def test_a_full_disk_leaves_no_half_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(OSError, match="No space"):
        Export(run, tmp_path / "out", ["webdataset"])()
    assert _files(tmp_path / "out") == []


def test_maps_that_are_not_finite_are_nothing(stored: Store, explained: Make, tmp_path: Path) -> None:
    batch = explained(["a"], 2)
    batch.maps[0, 0] = np.nan
    run = open_run(stored([[batch]], ["x", "y"]))
    Export(run, tmp_path, ["png", "npy", "labels", "rle", "webdataset"])()
    assert not np.asarray(Image.open(tmp_path / "png/a--x.png")).any()
    assert set(np.unique(np.asarray(Image.open(tmp_path / "labels/a.png")))) == {0, 2}


def test_what_cannot_be_asked(run: Run, stored: Store, explained: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'labels'"):
        Export(run, tmp_path, ["lables"])
    with pytest.raises(InputError, match="nothing to export"):
        Export(run, tmp_path, [])
    with pytest.raises(InputError, match="threshold"):
        Export(run, tmp_path, ["rle"], threshold=1.5)
    own = explained(["a"], 1)
    own.texts = [["its own"]]
    with pytest.raises(InputError, match="texts that all images share"):
        Export(open_run(stored([[own]], [], name="own")), tmp_path, ["labels"])
    Export(open_run(tmp_path / "own"), tmp_path / "out", ["rle"])()
    assert json.loads((tmp_path / "out/rle/000000-abc.json").read_text())["categories"] == [
        {"id": 1, "name": "its own"}
    ]


@given(st.text(max_size=300))
def test_names_stay_inside(key: str) -> None:
    name = safe_name(key)
    parts = name.split("/")
    assert all(part and part[0] != "." and len(part.encode()) <= 100 for part in parts)
    assert not set(name) & set('\\:*?"<>|\0\n ')


def test_long_names_and_prompts_fit_a_file_system(stored: Store, explained: Make, tmp_path: Path) -> None:
    keys = ["犬" * 60 + "/" + "猫" * 200 + f"{i}.jpg" for i in range(2)]
    run = open_run(stored([[explained(keys, 2)]], ["赤い車" * 40, "赤い車" * 41]))
    assert Export(run, tmp_path / "out", [kind for kind in KINDS if kind != "overlay"])()["png"] == 4
    assert len(_files(tmp_path / "out/png")) == 4 and len(_files(tmp_path / "out/npy")) == 2


def command(*words: Any) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words], prog_name="clipfast")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_the_command(seen: Run, tmp_path: Path) -> None:
    out = tmp_path / "files"
    found = command("export", seen.folder, "--png", "--overlay", "-n", 1, "-o", out)
    assert found.exit_code == 0, found.stderr
    assert "1 images; new files: 3 png, 3 overlay" in found.stdout
    assert str(out / "png") in found.stdout
    data = json.loads(command("export", seen.folder, "--png", "--rle", "-o", out, "--json").stdout)
    assert data["images"] == 3 and data["files"] == {"png": 6, "rle": 2} and data["errors"] == []
    wrong = command("export", seen.folder, "-o", out)
    assert wrong.exit_code == 2 and "say what to export: --png, --overlay" in wrong.stderr
    nothing = command("export", tmp_path / "none", "--png", "-o", out)
    assert nothing.exit_code == 2 and "holds no run" in nothing.stderr
