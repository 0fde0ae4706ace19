"""Robust accuracy against what is known of linear classifiers, and against attacks that lie, fail or meet NaN."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import clipfast
from clipfast.data.datasets import Dataset, Sample, Target, open_dataset
from clipfast.data.datasets.rendered import RenderedScenes
from clipfast.errors import ImageError, InputError, ModelError
from clipfast.metrics.base import compare
from clipfast.metrics.robust import Classifier, RobustAccuracy, _attacks
from clipfast.metrics.zero_shot import class_embeddings
from clipfast.models.model import Model

FEW = RobustAccuracy(radii=(1 / 255, 8 / 255), steps=3, targets=2, count=6, batch=4, templates="bare")


class Linear(nn.Module):
    """Logits that are linear in the pixels of pictures 4 x 4."""

    def __init__(self, classes: int = 5, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, 48, generator=generator), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.weight)


class Few(Dataset):
    """Squares of even colours, one class each; the picture of number `broken` cannot be read."""

    offers = frozenset({"labels"})
    name = "few"

    def __init__(self, classes: int, count: int, broken: int | None = None):
        self.classes = ["dog", "cat", "car", "tree", "sun"][:classes]
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def _sample(self, index: int) -> Sample:
        if index == self.broken:
            raise ImageError(f"{index} is damaged.", str(index))
        label = index % len(self.classes)
        picture = Image.new("RGB", (96, 96), (40 * label, 11 * index % 256, 200 - 30 * label))
        return Sample(str(index), picture, [Target(self.classes[label], label)], [])


@pytest.fixture(scope="module")
def demo() -> Model:
    return clipfast.load("demo", device="cpu")


def attacked(protocol: RobustAccuracy, module: nn.Module, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], int]:
    with torch.no_grad():
        return protocol._attack(_attacks(), module, x, y)


def test_the_classifier_is_the_models_own(build_clip, tokenizer) -> None:
    module = build_clip()
    model = clipfast.load(module, tokenizer=tokenizer, device="cpu")
    classes = class_embeddings(model, ["one", "two", "three", "four"], "bare")
    x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.spec.mean, model.spec.std))
    want = module.logit_scale.exp() * F.normalize(module.encode_image((x - mean) / std), dim=-1) @ classes.T
    found = Classifier(model, classes)(x)
    assert torch.allclose(found, want, atol=1e-4, rtol=1e-5)
    (slope,) = torch.autograd.grad(found[:, 1].sum(), x)
    (wanted,) = torch.autograd.grad(want[:, 1].sum(), x)
    assert float((slope - wanted).norm() / wanted.norm()) < 1e-4
    assert all(parameter.grad is None for parameter in module.parameters())


def margins(module: Linear, x: Tensor, y: Tensor) -> Tensor:
    """How far pixels must move to change the class: k overtakes y within r if (w_y - w_k) x < r |w_y - w_k|_1.

    Where no pixel gets as far as black or white.
    """
    gap = module.weight[y][:, None] - module.weight
    reach = (gap * x.flatten(1)[:, None]).sum(-1) / gap.abs().sum(-1)
    return reach.masked_fill(torch.arange(len(module.weight)) == y[:, None], torch.inf).amin(1)


def test_a_linear_classifier_is_as_robust_as_its_margins() -> None:
    module = Linear()
    x = 0.5 + 0.1 * torch.randn(60, 3, 4, 4, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)
    y = module(x).argmax(1)
    reach = margins(module, x, y)
    radii = tuple(float(reach.quantile(q)) for q in (0.2, 0.5, 0.8))
    found, invalid = attacked(RobustAccuracy(radii=radii, steps=40), module, x, y)
    assert invalid == 0 and bool(found["clean"].all())
    for radius, column in zip(radii, list(found.values())[1:], strict=True):
        sure = (reach / radius - 1).abs() > 0.02
        assert torch.equal(column.bool()[sure], (reach > radius)[sure])
        assert 0.1 < float(column.mean()) < 0.9


def test_what_is_wrong_already_is_not_attacked_and_stays_wrong() -> None:
    module = Linear()
    x = torch.rand(12, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    right = module(x).argmax(1)
    y = torch.where(torch.arange(12) % 3 == 0, (right + 1) % 5, right)
    found, _ = attacked(RobustAccuracy(radii=(0.0, 1e-4, 1.0), steps=4), module, x, y)
    assert torch.equal(found["clean"].bool(), torch.arange(12) % 3 != 0)
    assert torch.equal(found["robust 0/255"], found["clean"])
    assert torch.equal(found["robust 0.0255/255"], found["clean"])
    assert not found["robust 255/255"].any()


def test_the_targeted_attack_finds_what_the_other_misses() -> None:
    # Some rivals are strong and far, others weak and near: cross-entropy climbs towards the strong ones.
    module = Linear(classes=6, seed=25)
    with torch.no_grad():
        module.weight[3:] *= 0.1
    x = 0.5 + 0.1 * torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(25))
    y = module(x).argmax(1)
    reach = margins(module, x, y)
    radius = 1.03 * float(reach.quantile(0.4))
    alone, both = (
        list(attacked(RobustAccuracy(radii=(radius,), steps=20, targets=targets), module, x, y)[0].values())[1]
        for targets in (0, 5)
    )
    assert torch.equal(both.bool(), reach > radius)
    assert bool((both <= alone).all()) and float(both.sum()) < float(alone.sum())


@pytest.mark.parametrize("lie", [lambda x: x + 0.5, lambda x: x * torch.nan, lambda x: x - 0.02 - 2e-6, lambda x: -x])
def test_answers_outside_the_radius_break_nothing(lie: Callable[[Tensor], Tensor]) -> None:
    class Liar:
        def __init__(self, model: nn.Module, **parameters: object):
            pass

        def __call__(self, x: Tensor, y: Tensor) -> Tensor:
            return lie(x)

    module = Linear()
    x = 0.5 + 0.01 * torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    y = module(x).argmax(1)
    with torch.no_grad():
        found, invalid = RobustAccuracy(radii=(0.02,))._attack((Liar, Liar), module, x, y)
    assert bool(found["robust 5.1/255"].all()) and invalid == 8


def test_nan_of_one_picture_is_its_own() -> None:
    class Poisoned(Linear):
        def forward(self, x: Tensor) -> Tensor:
            dark = x.mean((1, 2, 3), keepdim=True) < 0.2
            return super().forward(torch.where(dark, torch.nan, 1.0) * x)

    module, plain = Poisoned(), Linear()
    x = 0.3 + 0.7 * torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    y = plain(x).argmax(1)
    x[2] = 0.1
    protocol = RobustAccuracy(radii=(0.01, 0.05), steps=10)
    found, _ = attacked(protocol, module, x, y)
    assert found["clean"].tolist() == [1, 1, 0, 1, 1, 1]
    assert float(found["robust 2.55/255"][2]) == 0
    others = torch.arange(6) != 2
    want, _ = attacked(protocol, plain, x[others], y[others])
    for name, column in want.items():
        assert torch.equal(found[name][others], column)


def test_on_the_demo_model(demo: Model) -> None:
    data, state = RenderedScenes(1, 30), torch.get_rng_state()
    before = {name: t.clone() for name, t in demo.module.state_dict().items()}
    seen: list[int] = []
    found = FEW.attack(demo, data, progress=seen.append)
    numbers, clean, near, far = found.columns.values()
    # Two batches, two radii, two attacks at each.
    assert len(seen) == 8 and sum(seen) == 6 * FEW.runs == 36
    assert len(numbers) == 6 and found.seconds > 0 and found.invalid == 0
    assert len(set(numbers.tolist())) == 6
    assert all(len(data[int(n)].targets) == 1 for n in numbers)
    assert bool((near <= clean).all()) and bool((far <= near).all())
    assert float(far.sum()) < float(clean.sum()), "an attack that breaks nothing would pass all of the above"
    assert [one.name for one in found.figures()] == ["clean", "robust 1/255", "robust 8/255"]
    assert found.figures()[0].count == 6
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in demo.module.state_dict().items())
    assert not demo.module.training
    again = FEW.measure(demo, data)
    assert all(torch.equal(again[name], column) for name, column in found.columns.items())
    assert all(one.value == 0 for one in compare(FEW, again, found.columns))


def test_clean_accuracy_is_that_of_zero_shot(demo: Model) -> None:
    from clipfast.metrics.zero_shot import ZeroShot

    data = RenderedScenes(2, 40)
    found = RobustAccuracy(radii=(0.0,), steps=1, targets=0, templates="bare").measure(demo, data)
    want = ZeroShot("bare").measure(demo, data)["top-1"]
    assert torch.equal(found["clean"], want[found["number"].long()])
    assert len(found["clean"]) == sum(len(sample.targets) == 1 for sample in data)


def test_pictures_that_cannot_be_read(demo: Model) -> None:
    protocol = RobustAccuracy(radii=(0.0,), steps=1, targets=0, templates="bare")
    assert sorted(protocol.measure(demo, Few(5, 4, broken=2), on_error="skip")["number"].tolist()) == [0, 1, 3]
    with pytest.raises(ImageError, match="2 is damaged"):
        protocol.measure(demo, Few(5, 4, broken=2))


def test_few_classes(demo: Model) -> None:
    with pytest.raises(InputError, match="compares 4 classes, and few has 2: give targets=0"):
        FEW.measure(demo, Few(2, 4))
    protocol = RobustAccuracy(radii=(4 / 255,), steps=2, targets=0, templates="bare")
    assert len(protocol.measure(demo, Few(2, 4))["clean"]) == 4
    # Three wrong classes, though nine are asked for.
    assert len(RobustAccuracy(radii=(1 / 255,), steps=1, templates="bare").measure(demo, Few(4, 2))["clean"]) == 2


def test_what_cannot_be_attacked(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Few(5, 2)
    data.classes = None
    with pytest.raises(InputError, match="few has no classes"):
        FEW.measure(demo, data)
    with pytest.raises(InputError, match="no picture of exactly one class"):
        FEW.measure(demo, RenderedScenes(1, 3, objects=2))
    module = deepcopy(demo.module)
    with torch.no_grad():
        module.visual.proj.fill_(torch.nan)
    broken = Model(module, demo.tokenizer, name="broken")
    with pytest.raises(ModelError, match="no logit of"):
        FEW.measure(broken, Few(5, 2))
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(InputError, match=r"pip install 'clipfast\[robust\]'"):
        FEW.measure(demo, open_dataset("scenes:1:2"))


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"radii": ()}, "radii must be"),
        ({"radii": (0.1, 0.1)}, "radii must be"),
        ({"radii": (0.2, 0.1)}, "smaller ones first"),
        ({"radii": (2.0,)}, "in 0..1"),
        ({"steps": 0}, "at least 1"),
        ({"targets": -1}, "at least 0"),
        ({"templates": "nothing"}, "no templates 'nothing'"),
    ],
)
def test_parameters(parameters: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        RobustAccuracy(**parameters)  # type: ignore[arg-type]
