"""ROAR on evidence that was planted: perfect maps, poor ones and none; masking, shares and files by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import clipfast
from clipfast.data.datasets import Dataset, Sample, Target
from clipfast.data.geometry import InputSpec, normalize
from clipfast.errors import InputError
from clipfast.metrics import roar as roars
from clipfast.metrics.base import figures
from clipfast.metrics.orders import AtRandom, ByMaps, Order
from clipfast.metrics.probe import Encoded, fit_held_out
from clipfast.metrics.roar import Roar
from clipfast.metrics.scratch import Training, predictions, train_resnet18
from clipfast.models.model import Model

COLOURS = [(230, 30, 30), (30, 220, 40), (40, 50, 235)]


class Planted(Dataset):
    """Grey noise of 32 x 32 pixels in which one quarter, of 16 x 16, has the colour of the class."""

    offers = frozenset({"labels"})

    def __init__(self, count: int, seed: int):
        self.name, self.classes = f"planted {seed}", ["red", "green", "blue"]
        self.count, self.seed = count, seed
        self.opened: list[int] = []

    def __len__(self) -> int:
        return self.count

    def quarter(self, index: int) -> tuple[int, int]:
        where = int(np.random.default_rng([self.seed, index]).integers(4))
        return 16 * (where // 2), 16 * (where % 2)

    def _sample(self, index: int) -> Sample:
        self.opened.append(index)
        pixels = np.random.default_rng([self.seed, index, 1]).integers(90, 170, (32, 32, 3), np.uint8)
        (top, left), label = self.quarter(index), index % 3
        pixels[top : top + 16, left : left + 16] = COLOURS[label]
        return Sample(str(index), Image.fromarray(pixels), [Target(self.classes[label], label)], [])


class Known(Order):
    """The planted quarter first, or half of it, or last."""

    def __init__(self, train: Planted, test: Planted, kind: str):
        self.data, self.name = {"train": train, "test": test}, kind

    def maps(self, x, labels, numbers, split) -> Tensor:
        maps = torch.zeros(len(numbers), 32, 32)
        for row, number in zip(maps, numbers, strict=True):
            top, left = self.data[split].quarter(number)
            row[top : top + 16, left : left + (8 if self.name == "half" else 16)] = -1 if self.name == "worst" else 1
        return maps


@pytest.fixture
def model(build_clip) -> Model:
    return clipfast.load(build_clip(image_size=32, layers=1), preprocess=InputSpec((32, 32), (16, 16)), device="cpu")


@pytest.fixture
def data() -> tuple[Planted, Planted]:
    return Planted(90, 0), Planted(45, 1)


def curve(columns: dict[str, Tensor], shares: tuple[float, ...]) -> list[float]:
    return [float(columns[f"accuracy {share:.3f}"].mean()) for share in (0.0, *shares)]


def test_perfect_maps_fall_fastest_and_worst_ones_never(model: Model) -> None:
    roar, data = Roar(shares=(0.13, 0.26, 0.6), seeds=(0,)), (Planted(60, 0), Planted(45, 1))
    orders = [*(Known(*data, kind) for kind in ("perfect", "half", "worst")), AtRandom()]
    found = {order.name: roar.measure(model, order, *data) for order in orders}
    areas = {name: float(columns["area"].mean()) for name, columns in found.items()}
    assert areas["perfect"] < min(areas["half"], areas["random"]) - 0.2
    assert max(areas["half"], areas["random"]) < areas["worst"] - 0.02
    # All of the colour is gone: what remains is the outline, the same for all classes.
    perfect = curve(found["perfect"], roar.shares)
    assert min(perfect[:2]) > 0.9 and max(perfect[2:]) < 0.5
    assert min(curve(found["worst"], roar.shares)) > 0.9


def test_one_share_by_hand(model: Model, data) -> None:
    train, test = data
    roar, order = Roar(shares=(0.2, 0.5), seeds=(4,)), AtRandom(seed=3)
    columns = roar.measure(model, order, train, test, shard=20)

    pixels = {split: [torch.from_numpy(np.array(one.image)) for one in part]
              for split, part in (("train", train), ("test", test))}  # fmt: skip
    colour = torch.stack(pixels["train"]).double().mean((0, 1, 2)) / 255
    tower, _ = model.towers()
    encoded = {}
    for split, part in pixels.items():
        z = []
        for number, picture in enumerate(part):
            heat = np.random.default_rng([3, split == "test", number]).random((32, 32), np.float32)
            gone = np.zeros(32 * 32, bool)
            gone[np.argsort(-heat.ravel(), kind="stable")[:512]] = True
            x = picture.double() / 255
            x[torch.from_numpy(gone.reshape(32, 32))] = colour
            mean, std = torch.tensor(model.spec.mean).double(), torch.tensor(model.spec.std).double()
            with torch.no_grad():
                z.append(tower.encode(((x - mean) / std).permute(2, 0, 1)[None].float())[0])
        labels = torch.arange(len(part)) % 3
        encoded[split] = Encoded(torch.stack(z), labels, torch.arange(len(part)), train.classes)
    hits = fit_held_out(encoded["train"], seed=4).hits(encoded["test"].z, encoded["test"].labels)
    assert torch.equal(columns["accuracy 0.500"], hits.double())
    assert 0.34 < float(hits.double().mean()) <= 1
    a, b, c = (columns[f"accuracy {share}"] for share in ("0.000", "0.200", "0.500"))
    assert torch.allclose(columns["area"], (0.2 * (a + b) / 2 + 0.3 * (b + c) / 2) / 0.5)
    assert roar.by_seed(columns) == pytest.approx([float(columns["area"].mean())])


def test_a_stopped_run_goes_on_and_repeats_itself(model: Model, data, tmp_path: Path, monkeypatch) -> None:
    roar = Roar(shares=(0.3,), seeds=(0, 1))
    plain = roar.measure(model, AtRandom(), *data, shard=40)
    calls = []

    def stop(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return fit_held_out(*arguments, **options)

    monkeypatch.setattr(roars, "fit_held_out", stop)
    with pytest.raises(KeyboardInterrupt):
        roar.measure(model, AtRandom(), *data, shard=40, folder=tmp_path)
    monkeypatch.undo()
    for one in data:
        one.opened.clear()
    said: list[str] = []
    again = roar.measure(model, AtRandom(), *data, shard=40, folder=tmp_path, progress=said.append)
    assert not data[0].opened and not data[1].opened
    assert len(said) == 1 and said[0].startswith("share 0.30, seed 1: accuracy")
    assert again.keys() == plain.keys() and all(torch.equal(again[name], plain[name]) for name in plain)
    # Untouched pictures serve every order; a further seed needs no picture.
    roar.measure(model, AtRandom(seed=1), *data, shard=40, folder=tmp_path)
    assert len(list(tmp_path.glob("whole-*"))) == 1 and len(list(tmp_path.glob("random-*"))) == 2
    more = Roar(shares=(0.3,), seeds=(0, 1, 2)).measure(model, AtRandom(), *data, shard=40, folder=tmp_path)
    assert torch.equal(more["hit 0.300 seed 1"], plain["hit 0.300 seed 1"])


def test_maps_of_a_method_for_each_pictures_own_class(model: Model, data) -> None:
    texts = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    order = ByMaps(model, "grad_eclip:spatial=projected", texts)
    x = normalize(
        torch.stack([torch.from_numpy(np.array(data[0][i].image)).permute(2, 0, 1) for i in range(4)]), model.spec
    )
    found = order.maps(x, [2, 0, 1, 2], [0, 1, 2, 3], "train")
    every = clipfast.Explainer(model, "grad_eclip", spatial="projected")(x, texts).maps
    assert torch.allclose(found, every[[0, 1, 2, 3], [2, 0, 1, 2]], atol=1e-7)
    assert order.settings()["parameters"]["spatial"] == "projected"
    assert order.settings() != ByMaps(model, "grad_eclip", texts).settings()
    with pytest.raises(InputError, match="3 classes, but there is a class 3"):
        order.maps(x, [3, 0, 0, 0], [0, 1, 2, 3], "train")
    columns = Roar(shares=(0.5,), seeds=(0,)).measure(model, order, *data)
    assert set(columns) == {"area", "accuracy 0.000", "accuracy 0.500", "hit 0.000 seed 0", "hit 0.500 seed 0"}
    names = [figure.name for figure in figures(Roar(shares=(0.5,)), columns, resamples=5)]
    assert names == ["area", "accuracy 0.000", "accuracy 0.500"]


def test_random_orders_are_each_pictures_own() -> None:
    x = torch.zeros(3, 3, 32, 48)
    order = AtRandom(seed=5)
    maps = order.maps(x, [0, 0, 0], [7, 8, 9], "train")
    assert maps.shape == (3, 32, 48)
    assert torch.equal(maps[1], order.maps(x[:1], [2], [8], "train")[0])
    assert not torch.equal(maps[1], order.maps(x[:1], [2], [8], "test")[0])
    assert not torch.equal(maps[0], maps[1])
    assert AtRandom(cells=(2, 3)).maps(x, [0] * 3, [0, 1, 2], "test").shape == (3, 2, 3)


def test_a_resnet_is_given_the_masked_pictures(model: Model, data, monkeypatch, tmp_path: Path) -> None:
    given = []

    def train(pixels, labels, classes, training, *, seed, device):
        given.append((pixels, labels, classes, training, seed))
        return None

    monkeypatch.setattr(roars, "train_resnet18", train)
    monkeypatch.setattr(roars, "predictions", lambda network, pixels, device: torch.zeros(len(pixels)).long())
    training = Training(epochs=2)
    roar = Roar(shares=(0.25, 0.5), seeds=(7,), classifier="resnet18", training=training)
    columns = roar.measure(model, Known(*data, "perfect"), *data, shard=40, folder=tmp_path)
    assert torch.equal(columns["hit 0.500 seed 7"], (torch.arange(45) % 3 == 0).double())
    pictures = torch.stack([torch.from_numpy(np.array(one.image)).permute(2, 0, 1) for one in data[0]])
    colour = pictures.double().mean((0, 2, 3))
    whole, quarter, half = (pixels for pixels, *_ in given)
    assert all(torch.equal(labels, torch.arange(90) % 3) and rest == [3, training, 7] for _, labels, *rest in given)
    assert whole.dtype == torch.uint8 and torch.equal(whole, pictures)
    for i, picture in enumerate(pictures):
        top, left = data[0].quarter(i)
        want = picture.clone()
        want[:, top : top + 16, left : left + 16] = colour.round().byte()[:, None, None]
        assert torch.equal(quarter[i], want)
    gone = (half == colour.round().byte()[:, None, None]).all(1)
    assert torch.equal(gone & (quarter == half).all(1), (quarter == colour.round().byte()[:, None, None]).all(1))
    assert (gone.sum((1, 2)) >= 512).all()


def test_a_resnet_learns_a_colour() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(90, 170, (48, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.arange(48) % 2
    pixels[labels == 1, 0] += 60
    network = train_resnet18(pixels[:24], labels[:24], 2, Training(epochs=7, batch=8, rate=0.02), seed=0)
    assert float((predictions(network, pixels[24:]) == labels[24:]).double().mean()) > 0.9


def test_resnets_repeat_themselves_and_leave_the_generator_alone() -> None:
    pixels = torch.randint(256, (9, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(9) % 2
    training = Training(epochs=1, batch=4)
    state = torch.random.get_rng_state()
    first, again, other = (train_resnet18(pixels, labels, 2, training, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    x = pixels.float()
    assert torch.allclose(
        first[0](pixels),
        (x - x.mean((0, 2, 3), keepdim=True)) / x.transpose(0, 1).flatten(1).std(1, correction=0)[:, None, None],
        atol=1e-4,
    )
    with torch.no_grad():
        assert torch.equal(first(pixels), again(pixels)) and not torch.equal(first(pixels), other(pixels))
    assert not first.training and predictions(first, pixels, batch=4).shape == (9,)


def test_what_cannot_be_asked(model: Model, data) -> None:
    for shares in ((), (0.0,), (0.5, 0.5), (0.5, 0.2), (1.2,), (float("nan"),)):
        with pytest.raises(InputError, match="shares"):
            Roar(shares=shares)
    for seeds in ((), (1, 1)):
        with pytest.raises(InputError, match="seeds"):
            Roar(seeds=seeds)
    with pytest.raises(InputError, match="did you mean 'resnet18'"):
        Roar(classifier="resnet50")
    other = Planted(4, 0)
    other.classes = ["red", "blue", "green"]
    with pytest.raises(InputError, match="same classes"):
        Roar().measure(model, AtRandom(), data[0], other)
    with pytest.raises(InputError, match="exactly one class"):
        Roar().measure(model, AtRandom(), Planted(0, 0), data[1])
    with pytest.raises(InputError, match="exactly one class"):
        Roar().measure(model, AtRandom(), data[0], Planted(0, 0))
