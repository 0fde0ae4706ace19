"""torchcam's metrics as released, on shared cases: the curves and their areas, average drop and increase.

Theirs take maps from an extractor and models from it; a stand-in hands over the maps here, and once one of their own
extractors does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchcam.methods import GradCAM
from torchcam.metrics import ClassificationMetric, DeletionInsertionMetric

from clipfast.metrics.perturbation import Classes, Confidence, CurvesCosine, CurvesRise, area, blur, cosine, curves

SOFTMAX = partial(torch.softmax, dim=-1)


class Linear(torch.nn.Module):
    """Images (B, 3, 12, 16) -> unit embeddings (B, 8)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = torch.nn.Linear(3 * 12 * 16, 8).double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.layer(x.flatten(1)), dim=-1)


class Called(torch.nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = [function]

    def forward(self, x: Tensor) -> Tensor:
        return self.function[0](x)


class Given:
    """What their metrics ask of an extractor, with maps that are already there."""

    def __init__(self, model: Callable[[Tensor], Tensor], maps: Tensor) -> None:
        self.model = Called(model)
        self.maps = maps

    def __call__(self, class_idx: Any = None, scores: Any = None, **_: Any) -> list[Tensor]:
        return [self.maps]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        return cams[0]

    @contextmanager
    def _hooks_off(self) -> Iterator[None]:
        yield


@pytest.fixture
def case() -> tuple[Linear, Tensor, Tensor, Tensor]:
    """A model, 3 images, maps from 0 to 1 of the images' size with ties, and 5 unit embeddings of classes."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(3, 3, 12, 16, dtype=torch.float64, generator=generator)
    maps = torch.randint(0, 12, (3, 12, 16), generator=generator).double() / 11
    texts = F.normalize(torch.randn(5, 8, dtype=torch.float64, generator=generator), dim=-1)
    return Linear(), images, maps, texts


def released(metric: Any, images: Tensor, maps: Tensor, **given: Any) -> dict[str, list[float]]:
    """Their summaries of one sample a time."""
    rows = []
    for i in range(len(images)):
        metric.reset()
        metric.cam_extractor.maps = maps[i : i + 1]
        metric.update(images[i : i + 1], **{k: v[i : i + 1] if isinstance(v, list) else v for k, v in given.items()})
        rows.append(metric.summary())
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize("steps", [4, 12])
@pytest.mark.parametrize("grid", [(12, 16), (3, 4)])
def test_deletion_and_insertion_of_probabilities(case: Any, steps: int, grid: tuple[int, int]) -> None:
    """RISE's curves where steps divide the pixels: deletion to zeros, insertion from the blurred image; ties too."""
    encode, images, maps, texts = case
    maps = maps[:, : grid[0], : grid[1]]
    classes = Classes(texts, 3.0, torch.tensor([4, 0, 2]))

    def probabilities(x: Tensor) -> Tensor:
        return 3.0 * encode(x) @ texts.T

    columns = CurvesRise(steps=steps).measure(encode, classes, images, maps[:, None])
    for mode, baseline in (("deletion", None), ("insertion", lambda x: blur(x))):
        metric = DeletionInsertionMetric(
            Given(probabilities, maps), SOFTMAX, steps=steps, baseline=baseline, batch_size=5
        )
        theirs = released(metric, images, maps, class_idx=[4, 0, 2])
        assert columns[mode].tolist() == pytest.approx(theirs[f"{mode}_auc"], abs=1e-6)


def test_deletion_and_insertion_of_cosines(case: Any) -> None:
    encode, images, maps, texts = case
    columns = CurvesCosine(steps=8).measure(encode, texts[:1], images, maps[:, None], batch=5)
    metric = DeletionInsertionMetric(Given(encode, maps), steps=8)
    theirs = released(metric, images, maps, targets=lambda z: z @ texts[0])
    assert columns["deletion"].tolist() == pytest.approx(theirs["deletion_auc"], abs=1e-6)
    assert columns["insertion"].tolist() == pytest.approx(theirs["insertion_auc"], abs=1e-6)


@pytest.mark.parametrize("steps", [5, 7, 50, 1000])
def test_steps_that_do_not_divide_the_pixels_are_theirs_when_their_fractions_are_given(case: Any, steps: int) -> None:
    """Theirs are ceil(n / steps) pixels and a shorter last one; ours are n / steps each, halves rounded up."""
    encode, images, maps, texts = case
    n = 12 * 16
    fractions = [*(i / n for i in range(0, n, -(-n // steps))), 1.0]
    plan: Any = {"deletion": (fractions, 0.0), "insertion": (fractions, 0.0)}
    found = curves(encode, cosine(texts[:1]), images, maps[:, None], plan, batch=64)
    metric = DeletionInsertionMetric(Given(encode, maps), steps=steps, batch_size=64)
    theirs = released(metric, images, maps, targets=lambda z: z @ texts[0])
    for mode in ("deletion", "insertion"):
        assert area(found[mode][:, 0], fractions).tolist() == pytest.approx(theirs[f"{mode}_auc"], abs=1e-6)


def test_curves_of_their_own_extractor_s_maps() -> None:
    """GradCAM of a small network, of the probability, which is what theirs then explain; in float32."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(6 * 3 * 4, 5),
    ).eval()
    images = torch.randn(2, 3, 12, 16)
    extractor = GradCAM(model, "0")
    try:
        metric = DeletionInsertionMetric(extractor, SOFTMAX, steps=6)
        metric.update(images, class_idx=[1, 3])
        maps = extractor.fuse_cams(extractor([1, 3], SOFTMAX(model(images))))
        theirs = metric.summary()
    finally:
        extractor.remove_hooks()

    def probability(z: Tensor, pair: Tensor) -> Tensor:
        return z.softmax(-1).gather(1, torch.tensor([1, 3])[pair, None])[:, 0]

    fractions = [i / 6 for i in range(7)]
    plan: Any = {"deletion": (fractions, 0.0), "insertion": (fractions, 0.0)}
    with torch.no_grad():
        found = curves(model, probability, images, maps[:, None], plan)
    for mode in ("deletion", "insertion"):
        assert float(area(found[mode], fractions).mean()) == pytest.approx(theirs[f"{mode}_auc"], abs=1e-6)


def own_texts(encode: Linear, images: Tensor, texts: Tensor) -> list[int]:
    """Of each image the text that it is most like."""
    return (encode(images) @ texts.T).argmax(-1).tolist()


def test_average_drop_and_increase(case: Any) -> None:
    """`confidence/gradcam++`, in percent here and as shares there, of maps from 0 to 1 at the image's size.

    Theirs add 1e-7 to the denominator. They do not scale the map after it has been resized, as ours do.
    """
    encode, images, maps, texts = case
    chosen = own_texts(encode, images, texts)
    columns = Confidence(drop="relative").measure(encode, texts[chosen][:, None], images, maps[:, None])
    metric = ClassificationMetric(Given(lambda x: encode(x) @ texts.T, maps))
    theirs = released(metric, images, maps, class_idx=chosen)
    assert (encode(images) @ texts.T).amax(-1).min() > 0.1
    assert (columns["drop"] / 100).tolist() == pytest.approx(theirs["avg_drop"], abs=1e-6)
    assert (columns["increase"] / 100).tolist() == theirs["conf_increase"]
    assert max(theirs["avg_drop"]) > 0


def test_average_drop_of_a_map_of_a_grid_once_both_are_scaled_after_resizing(case: Any) -> None:
    encode, images, maps, texts = case
    chosen = own_texts(encode, images, texts)
    small = maps[:, None, :3, :4]
    wide = F.interpolate(small, size=(12, 16), mode="bilinear")[:, 0]
    low, high = wide.flatten(1).aminmax(dim=1)
    scaled = (wide - low[:, None, None]) / (high - low)[:, None, None]
    columns = Confidence(drop="relative").measure(encode, texts[chosen][:, None], images, small)
    metric = ClassificationMetric(Given(lambda x: encode(x) @ texts.T, scaled))
    theirs = released(metric, images, scaled, class_idx=chosen)
    assert (columns["drop"] / 100).tolist() == pytest.approx(theirs["avg_drop"], abs=1e-6)


def test_scores_below_zero_have_no_relative_drop_here_and_a_negative_one_there(case: Any) -> None:
    encode, images, maps, texts = case
    chosen = (encode(images) @ texts.T).argmin(-1).tolist()
    columns = Confidence(drop="relative").measure(encode, texts[chosen][:, None], images, maps[:, None])
    assert (encode(images) @ texts.T).amin(-1).max() < 0
    assert columns["drop"].isnan().all()
    metric = ClassificationMetric(Given(lambda x: encode(x) @ texts.T, maps))
    theirs = released(metric, images, maps, class_idx=chosen)
    assert max(theirs["avg_drop"]) <= 0
    assert (columns["increase"] / 100).tolist() == theirs["conf_increase"]
