"""Region classification against brute force, pixel by pixel and box by box."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clipfast
from clipfast.data import prepare
from clipfast.data.datasets import Dataset, Sample, Target, open_dataset
from clipfast.data.geometry import InputSpec, normalize
from clipfast.errors import ImageError, InputError
from clipfast.methods import MaskClip
from clipfast.methods.grad_eclip import GradEclip
from clipfast.metrics import regions
from clipfast.metrics.base import figures
from clipfast.metrics.regions import Regions, coverage, region_scores
from clipfast.models.model import Model
from clipfast.ops.minmax import minmax


class Listed(Dataset):
    """Samples that the test makes up."""

    def __init__(self, samples: list[Sample | ImageError], classes: list[str] | None, offers=("boxes", "labels")):
        self.samples, self.classes, self.name = samples, classes, "listed"
        self.offers = frozenset(offers)

    def __len__(self) -> int:
        return len(self.samples)

    def _sample(self, index: int) -> Sample:
        found = self.samples[index]
        if isinstance(found, ImageError):
            raise found
        return found


@pytest.fixture(scope="module")
def demo() -> Model:
    return clipfast.load("demo", device="cpu")


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("resize", ["crop", "squash", "longest", "keep"])
@pytest.mark.parametrize("size", [(80, 60), (61, 97), (48, 48)])
def test_coverage_is_the_area_in_each_patch(size, resize) -> None:
    spec = InputSpec(size=(50, 50), patch=(8, 8), resize=resize)
    _, geometry = prepare(Image.new("RGB", size), spec)
    h, w = geometry.covered[0] // 8, geometry.covered[1] // 8
    boxes = torch.tensor([[0, 0, *size], [10.5, 3.25, 31, 40], [size[0] - 1.5, size[1] - 2, *size], [20, 20, 20, 30]])
    found = coverage(boxes, geometry, (h, w))
    # The share of 32 x 32 points in each patch that lie in the box, on the picture.
    steps = (torch.arange(32, dtype=torch.float64) + 0.5) / 32 * 8
    y = (torch.arange(h)[:, None] * 8 + steps).flatten()
    x = (torch.arange(w)[:, None] * 8 + steps).flatten()
    points = geometry.from_input(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1))
    for box, share in zip(boxes.double(), found, strict=True):
        inside = ((points >= box[:2]) & (points < box[2:])).all(-1).double()
        expected = inside.view(h, 32, w, 32).mean((1, 3))
        assert float((share - expected).abs().max()) < 2 * 2 / 32
    assert found.shape == (4, h, w) and float(found[3].sum()) == 0


def test_scores_are_cosines_of_weighted_means(monkeypatch) -> None:
    patches, classes = unit(6, 5), unit(4, 5, seed=1)
    shares = torch.tensor([[1, 0.5, 0, 0, 0.25, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1.0]], dtype=torch.float64)
    marks = torch.rand(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    marks[2] = 0
    plain = region_scores(patches, shares, classes)
    # One class at a time.
    monkeypatch.setattr(regions, "_POOLED", 1)
    guided = region_scores(patches, shares, classes, marks)
    for k in range(3):
        for c in range(4):
            if k == 1:
                assert plain[k, c].isnan() and guided[k, c].isnan()
                continue
            mean = sum(shares[k, i] * patches[i] for i in range(6))
            assert float(plain[k, c]) == pytest.approx(float(F.cosine_similarity(mean, classes[c], dim=0)), abs=1e-12)
            own = sum(shares[k, i] * marks[c, i] * patches[i] for i in range(6))
            expected = -1.0 if c == 2 else float(F.cosine_similarity(own, classes[c], dim=0))
            assert float(guided[k, c]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("pooling", ["mean", "grad_eclip"])
def test_columns_are_those_of_a_loop_over_boxes(demo, pooling) -> None:
    dataset = open_dataset("scenes:4:20")
    columns = Regions("bare", pooling).measure(demo, dataset)
    tower, _ = demo.towers()
    classes = demo.encode_texts(dataset.classes)
    row = 0
    for number, sample in enumerate(dataset):
        pixels, _ = prepare(sample.image, demo.spec)
        x = normalize(pixels[None], demo.spec)
        patches = MaskClip().image(tower, x).values[0].unflatten(0, (12, 12))
        maps = minmax(GradEclip().image(tower, x).maps(classes), constant=0.0)[0].unflatten(1, (12, 12))
        for target in sample.targets:
            for left, top, right, bottom in target.boxes:
                # Scenes are the model's own size, so their pixels are its input's.
                inside = np.zeros((96, 96))
                inside[int(top) : int(bottom), int(left) : int(right)] = 1
                share = torch.from_numpy(inside.reshape(12, 8, 12, 8).mean((1, 3))).float()
                weights = share.expand(64, 12, 12) * (maps if pooling == "grad_eclip" else 1)
                pooled = F.normalize(torch.einsum("chw,hwe->ce", weights, patches), dim=-1)
                scores = (pooled * classes).sum(-1)
                scores[weights.sum((1, 2)) == 0] = -1
                order = scores.argsort(descending=True, stable=True)
                expected = (
                    float(order[0] == target.label),
                    float(target.label in order[:5]),
                    float(order[0]),
                    target.label,
                    number,
                )
                assert tuple(float(columns[name][row]) for name in regions._COLUMNS) == expected
                row += 1
    assert row == len(columns["label"]) > 30
    summary = Regions("bare", pooling).summary(columns)
    by_class = {int(label): columns["top-1"][columns["label"] == label].mean() for label in columns["label"].unique()}
    assert summary["mAcc"] == pytest.approx(float(torch.stack(list(by_class.values())).mean()))
    assert 1 / 64 < summary["top-1"] < summary["top-5"]


def test_the_demo_model_knows_what_boxes_hold(demo) -> None:
    protocol, dataset = Regions("bare"), open_dataset("scenes:9:60")
    columns = protocol.measure(demo, dataset)
    found = {one.name: one for one in figures(protocol, columns, groups=columns["sample"].long(), resamples=50)}
    # Chance is 1 / 64.
    assert found["mAcc"].value > 0.25 and found["mAcc"].low > 0.15
    assert found["mAcc"].count == len(columns["label"])


def test_boxes_that_are_cropped_away_do_not_count(demo) -> None:
    wide = Image.new("RGB", (300, 96), "white")
    wide.paste(open_dataset("scenes:1:1")[0].image, (102, 0))
    boxes = [(102.0, 0.0, 198.0, 96.0), (0.0, 0.0, 90.0, 96.0)]
    dataset = Listed([Sample("a", wide, [Target("dog", 0, None, boxes), Target("no label", None, None, boxes)], [])],
                     ["dog", "cat"])  # fmt: skip
    columns = Regions("bare").measure(demo, dataset)
    assert columns["top-1"].isnan().tolist() == [False, True] == columns["prediction"].isnan().tolist()
    assert columns["label"].tolist() == [0, 0]
    assert Regions("bare").summary(columns)["mAcc"] in (0.0, 1.0)


def test_samples_without_boxes_or_pictures(demo) -> None:
    picture = Image.new("RGB", (96, 96))
    full = Sample("b", picture, [Target("cat", 1, None, [(0.0, 0.0, 96.0, 96.0)])], [])
    bare = Sample("a", picture, [Target("dog", 0)], [])
    damaged = ImageError("damaged", "c")
    found = Regions("bare").measure(demo, Listed([bare, damaged, full], ["dog", "cat"]), on_error="skip")
    assert found["sample"].tolist() == [2] and found["label"].tolist() == [1]
    with pytest.raises(ImageError, match="damaged"):
        Regions("bare").measure(demo, Listed([bare, damaged], ["dog", "cat"]))
    with pytest.raises(InputError, match="no box to classify"):
        Regions("bare").measure(demo, Listed([bare], ["dog", "cat"]))
    with pytest.raises(InputError, match="no boxes of classes"):
        Regions("bare").measure(demo, Listed([full], None))
    with pytest.raises(InputError, match="no boxes of classes"):
        Regions("bare").measure(demo, Listed([full], ["dog", "cat"], offers=("masks",)))


def test_bad_parameters_and_towers_are_refused(demo, monkeypatch) -> None:
    with pytest.raises(InputError, match="pooling"):
        Regions(pooling="max")
    with pytest.raises(InputError, match="template"):
        Regions(templates="phto")
    monkeypatch.setattr(MaskClip, "why_not", classmethod(lambda cls, tower: "is a sieve"))
    with pytest.raises(InputError, match="demo is a model whose image tower is a sieve"):
        Regions("bare").measure(demo, open_dataset("scenes:1:1"))
