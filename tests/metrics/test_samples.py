"""Passes over a data set: what is read, in which batches, and what happens to what cannot be read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import clipfast
from clipfast.data import prepare
from clipfast.data.datasets import Dataset, Sample, Target
from clipfast.data.datasets.rendered import RenderedScenes
from clipfast.data.geometry import InputSpec, normalize
from clipfast.errors import ImageError, InputError
from clipfast.metrics import samples as reading
from clipfast.metrics.samples import Pictures, batches, only_label
from clipfast.models.model import Model


class Grey(Dataset):
    """Pictures of one grey each, the sample's number; some broken, some of another shape."""

    name, classes, offers = "grey", None, frozenset()

    def __init__(self, count: int, broken: tuple[int, ...] = (), wide: tuple[int, ...] = ()):
        self.count, self.broken, self.wide = count, broken, wide

    def __len__(self) -> int:
        return self.count

    def _sample(self, index: int) -> Sample:
        if index in self.broken:
            raise ImageError(f"sample {index} is torn")
        return Sample(str(index), Image.new("RGB", (96 if index in self.wide else 64, 64), (index,) * 3), [], [])


@pytest.fixture
def model(build_clip) -> Model:
    return clipfast.load(build_clip(), preprocess=InputSpec((64, 64), (16, 16), resize="keep"), device="cpu")


def test_every_sample_once_in_order_in_batches_of_one_shape(model: Model, monkeypatch) -> None:
    monkeypatch.setattr(reading, "_SAMPLES", 7)
    monkeypatch.setattr("clipfast.models.tower.CPU_TOKENS", 4 * 16)
    done: list[int] = []
    found = list(batches(model, Grey(20, wide=(9, 10)), progress=done.append))
    assert [one.numbers for one in found] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15, 16, 17, 18], [19]
    ]  # fmt: skip
    assert sum(done) == 20
    for one in found:
        assert one.pixels.dtype == torch.uint8 and one.pixels[:, 0, 0, 0].tolist() == one.numbers
        assert [sample.key for sample in one.samples] == [str(number) for number in one.numbers]
        assert all(g.input == tuple(one.pixels.shape[2:]) for g in one.geometries)
    assert torch.equal(found[3].inputs(model), normalize(found[3].pixels, model.spec))
    assert [n for one in batches(model, Grey(20), numbers=range(5, 12)) for n in one.numbers] == list(range(5, 12))
    assert not list(batches(model, Grey(0)))


def test_what_cannot_be_read_is_skipped_or_raised(model: Model) -> None:
    done: list[int] = []
    found = batches(model, Grey(6, broken=(0, 3)), on_error="skip", progress=done.append)
    assert [n for one in found for n in one.numbers] == [1, 2, 4, 5] and sum(done) == 6
    with pytest.raises(ImageError, match="sample 3 is torn"):
        list(batches(model, Grey(6, broken=(3,))))
    with pytest.raises(InputError, match="on_error"):
        list(batches(model, Grey(6), on_error="ignore"))


def test_the_class_of_a_sample_that_has_exactly_one() -> None:
    def of(*labels: int | None) -> int | None:
        return only_label(Sample("0", Image.new("RGB", (8, 8)), [Target("thing", label) for label in labels], []))

    assert [of(3), of(3, 3), of(None, 4), of(), of(None), of(0, 1), of(0)] == [3, 3, 4, None, None, None, 0]


def test_pictures_of_a_folder(model: Model, tmp_path) -> None:
    for i in range(3):
        Image.new("RGB", (64, 64), (i,) * 3).save(tmp_path / f"{i}.png")
    assert [n for one in batches(model, Pictures(tmp_path)) for n in one.pixels[:, 0, 0, 0].tolist()] == [0, 1, 2]
    pictures = Pictures([np.full((64, 64, 3), 9, np.uint8), tmp_path / "1.png"])
    assert [n for one in batches(model, pictures) for n in one.pixels[:, 0, 0, 0].tolist()] == [9, 1]
    assert len({sample.key for sample in pictures}) == 2


def test_scenes_of_one_object() -> None:
    scenes = RenderedScenes(4, 12, objects=1)
    assert all(only_label(one) == scenes.classes.index(one.targets[0].text) for one in scenes)
    assert scenes.name != RenderedScenes(4, 12).name == "scenes:4"
    assert any(len(one.targets) > 1 for one in RenderedScenes(4, 12))
    assert prepare(scenes[0].image, clipfast.load("demo", device="cpu").spec)[0].shape == (3, 96, 96)
