"""Quantus' metrics as released, on shared cases; where they measure something else, what the difference is.

What holds for all of theirs: maps are divided by the greatest absolute value of the whole batch, which leaves orders
and shares as they are; sorting is not stable, so that of equal values any goes first, and here the first in reading
order; the curves leave out the clean image; models are fed float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.metrics.infidelity import Completeness, Infidelity
from clipfast.metrics.localisation import EnergyPointingGame, Gini, PointingGame, PrecisionAt
from clipfast.metrics.perturbation import Classes, CurvesRise, curves
from clipfast.metrics.road import impute
from clipfast.metrics.sanity import spearman
from clipfast.metrics.stability import ssim

quantus: Any = pytest.importorskip("quantus")

SIDE, PATCH = 12, 3


class Linear(torch.nn.Module):
    """Images (B, C, 12, 12) -> logits (B, 5)."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(channels * SIDE * SIDE, 5).requires_grad_(False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


def distinct(count: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Maps whose values all differ, of both signs."""
    generator = torch.Generator().manual_seed(seed)
    size = int(np.prod(shape))
    maps = torch.stack([torch.randperm(size, generator=generator) for _ in range(count)]).float()
    return maps.view(count, *shape) / size - 0.4


def shared_case() -> tuple[Linear, Tensor, Tensor, list[int]]:
    images = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return Linear(), images, distinct(4, (SIDE, SIDE)), [0, 4, 2, 1]


def called(metric: Any, model: Any, images: Tensor | None, maps: Tensor, **given: Any) -> np.ndarray:
    x = torch.zeros(len(maps), 1, *maps.shape[1:]) if images is None else images
    found = metric(
        model=model,
        x_batch=x.numpy(),
        a_batch=maps[:, None].numpy().copy(),
        channel_first=True,
        **({"y_batch": np.zeros(len(maps), int)} | given),
    )
    return np.asarray(found, dtype=np.float64)


def quiet(kind: Any, **parameters: Any) -> Any:
    return kind(disable_warnings=True, display_progressbar=False, **parameters)


@pytest.mark.parametrize("steps", [6, 12])
def test_pixel_flipping_is_deletion_without_its_first_point(steps: int) -> None:
    """Theirs count channel values, three a pixel here; their area lacks the clean image and the division by steps."""
    model, images, maps, labels = shared_case()
    metric = quiet(quantus.PixelFlipping, features_in_step=3 * SIDE * SIDE // steps, abs=False, perturb_baseline=0.0)
    theirs = called(metric, model, images, maps, y_batch=np.array(labels), softmax=True)

    class_weights = torch.eye(5)
    columns = CurvesRise(steps=steps).measure(
        model, Classes(class_weights, 1.0, torch.tensor(labels)), images, maps[:, None], batch=5
    )
    ours = torch.stack([columns[f"deletion {i / steps:.3f}"] for i in range(1, steps + 1)], dim=1)
    assert theirs.shape == (4, steps)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    clean = columns["deletion 0.000"].numpy()
    areas = (theirs.sum(1) - theirs[:, -1] / 2 + clean / 2) / steps
    np.testing.assert_allclose(columns["deletion"], areas, rtol=0, atol=1e-6)


def by_patch(maps: Tensor) -> tuple[Tensor, list[float]]:
    """Each pixel's map as the sum of its patch, and the share of pixels after each patch."""
    sums = F.avg_pool2d(maps[:, None], PATCH) * PATCH**2
    count = (SIDE // PATCH) ** 2
    return F.interpolate(sums, scale_factor=PATCH, mode="nearest"), [i / count for i in range(count + 1)]


@pytest.mark.parametrize("order", ["morf", "lerf"])
def test_region_perturbation_is_deletion_patch_by_patch(order: str) -> None:
    """What it gives is the score lost since the clean image. "lerf" is the deletion of the map's negative."""
    model, images, maps, labels = shared_case()
    metric = quiet(
        quantus.RegionPerturbation, patch_size=PATCH, order=order, regions_evaluation=16, perturb_baseline=0.0
    )
    theirs = called(metric, model, images, maps, y_batch=np.array(labels), softmax=False)
    heat, fractions = by_patch(maps if order == "morf" else -maps)
    ours = logits(model, images, heat, labels, fractions)
    np.testing.assert_allclose(ours[:, :1] - ours[:, 1:], theirs, rtol=0, atol=1e-6)


def test_selectivity_is_deletion_patch_by_patch() -> None:
    model, images, maps, labels = shared_case()
    metric = quiet(quantus.Selectivity, patch_size=PATCH, perturb_baseline=0.0)
    theirs = called(metric, model, images, maps, y_batch=np.array(labels), softmax=False)
    heat, fractions = by_patch(maps)
    np.testing.assert_allclose(logits(model, images, heat, labels, fractions)[:, 1:], theirs, rtol=0, atol=1e-6)


def logits(model: Linear, images: Tensor, heat: Tensor, labels: list[int], fractions: list[float]) -> Tensor:
    """Each image's logit of its label along deletion to zeros: (B, points)."""
    target = torch.tensor(labels)
    found = curves(
        model,
        lambda z, pair: z.gather(1, target[pair, None])[:, 0],
        images,
        heat,
        {"deletion": (fractions, 0.0)},
        batch=7,
    )
    return found["deletion"][:, 0]


def test_infidelity_of_one_perturbation_that_removes_everything() -> None:
    """Otherwise they differ: theirs remove patch after patch without restoring them, and multiply maps by pixels."""
    model, images, maps, labels = shared_case()
    maps = maps / 100
    metric = quiet(quantus.Infidelity, perturb_patch_sizes=[SIDE], n_perturb_samples=1, perturb_baseline=0.0)
    theirs = called(metric, model, images, maps, y_batch=np.array(labels), softmax=False)

    protocol = Infidelity(cells=1, samples=1, share=0.999, normalize=False)
    assert all(bool((one == 1).all()) for one in protocol.perturbations(4, (SIDE, SIDE)))
    for i, label in enumerate(labels):
        shares = (maps[i] * images[i]).sum(0)
        ours = protocol.measure(model, torch.eye(5)[label][None], images[i : i + 1], shares[None, None], first=i)[
            "infidelity"
        ]
        assert float(ours[0]) == pytest.approx(theirs[i], rel=1e-5, abs=1e-6)


def test_completeness_is_an_error_here_and_whether_it_is_zero_there() -> None:
    class Sum(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).sum(1, keepdim=True)

    images = torch.randint(-8, 8, (2, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(3)).float()
    maps = images[:, 0].clone()
    maps[1, 0, 0] += 1
    metric = quiet(quantus.Completeness, normalise=False, perturb_baseline=0.0)
    theirs = called(metric, Sum().eval(), images, maps, softmax=False)
    ours = Completeness().measure(Sum(), torch.ones(1, 1), images, maps[:, None])["error"]
    assert theirs.tolist() == [1, 0] and ours.tolist() == [0, 1]


def masks(*boxes: tuple[int, int, int, int]) -> Tensor:
    found = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.bool)
    for mask, (top, bottom, left, right) in zip(found, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return found


BOXES = ((0, 6, 0, 12), (3, 9, 2, 8), (0, 12, 6, 12), (5, 12, 5, 12))


def on_masks(metric: Any, maps: Tensor, chosen: Tensor) -> np.ndarray:
    return called(metric, None, None, maps, s_batch=chosen[:, None].numpy())


def test_pointing_game() -> None:
    for seed in range(5):
        maps, chosen = distinct(4, (SIDE, SIDE), seed), masks(*BOXES)
        theirs = on_masks(quiet(quantus.PointingGame), maps, chosen)
        assert PointingGame().measure(maps, chosen)["hit"].tolist() == theirs.tolist()


def test_pointing_game_s_ties_constant_maps_and_empty_masks() -> None:
    """There any of the highest pixels may hit, and so a constant map always does; an empty mask is a hit (NaN made
    bool). Here the first of the highest points, a constant map nowhere, and an empty mask does not count."""
    maps, chosen = torch.zeros(3, SIDE, SIDE), masks((6, 12, 0, 12), (6, 12, 0, 12), (0, 0, 0, 0))
    maps[0, 2, 2] = maps[0, 8, 8] = 1
    maps[1] = 1
    maps[2, 3, 3] = 1
    assert on_masks(quiet(quantus.PointingGame), maps, chosen).tolist() == [1, 1, 1]
    hit = PointingGame().measure(maps, chosen)["hit"]
    assert hit[:2].tolist() == [0, 0] and hit[2].isnan()


def test_energy_is_relevance_mass_accuracy_of_positive_maps() -> None:
    maps, chosen = distinct(4, (SIDE, SIDE)), masks(*BOXES)
    share = EnergyPointingGame().measure(maps.abs(), chosen)["share"]
    np.testing.assert_allclose(
        share, on_masks(quiet(quantus.RelevanceMassAccuracy, abs=True), maps, chosen), rtol=0, atol=1e-6
    )
    # The same, with 1e-9 in the denominator.
    np.testing.assert_allclose(
        share, on_masks(quiet(quantus.AttributionLocalisation, abs=True), maps, chosen), rtol=0, atol=1e-6
    )
    positive = on_masks(quiet(quantus.AttributionLocalisation, abs=False, positive_attributions=True), maps, chosen)
    np.testing.assert_allclose(EnergyPointingGame().measure(maps, chosen)["share"], positive, rtol=0, atol=1e-6)


def test_energy_of_signed_maps_differs_from_relevance_mass_accuracy() -> None:
    """Without abs, theirs let negative values cancel positive ones, and the share may leave [0, 1]."""
    maps, chosen = torch.full((1, SIDE, SIDE), -1.0), masks((0, 6, 0, 12))
    maps[0, :6] = 3
    assert on_masks(quiet(quantus.RelevanceMassAccuracy), maps, chosen).tolist() == [1.5]
    assert EnergyPointingGame().measure(maps, chosen)["share"].tolist() == [1.0]


@pytest.mark.parametrize("k", [1, 20, 100])
def test_top_k_intersection_is_precision_above_the_k_th_value(k: int) -> None:
    maps, chosen = distinct(4, (SIDE, SIDE)), masks(*BOXES)
    theirs = on_masks(quiet(quantus.TopKIntersection, k=k), maps, chosen)
    np.testing.assert_allclose(precision_of_top(maps, chosen, [k] * 4), theirs, rtol=0, atol=1e-6)


def test_relevance_rank_accuracy_is_precision_of_as_many_pixels_as_the_mask_has() -> None:
    maps, chosen = distinct(4, (SIDE, SIDE)), masks(*BOXES)
    theirs = on_masks(quiet(quantus.RelevanceRankAccuracy), maps, chosen)
    sizes = chosen.flatten(1).sum(1).tolist()
    np.testing.assert_allclose(precision_of_top(maps, chosen, sizes), theirs, rtol=0, atol=1e-6)


def precision_of_top(maps: Tensor, chosen: Tensor, counts: list[int]) -> list[float]:
    """`precision@threshold` between the k-th and the next value of each map from 0 to 1."""
    found = []
    for heat, mask, k in zip(maps, chosen, counts, strict=True):
        unit = (heat - heat.min()) / (heat.max() - heat.min())
        kth, after = unit.flatten().sort(descending=True).values[k - 1 : k + 1].tolist()
        protocol = PrecisionAt(threshold=(kth + after) / 2)
        found.append(float(protocol.measure(heat[None], mask[None])["precision"][0]))
    return found


def test_gini_is_sparseness() -> None:
    """Theirs add 1e-7 to every value, after division by the batch's greatest."""
    maps = distinct(4, (SIDE, SIDE))
    theirs = called(quiet(quantus.Sparseness), None, None, maps)
    np.testing.assert_allclose(Gini().measure(maps)["gini"], theirs, rtol=0, atol=1e-6)


def test_gini_of_equal_values_is_zero_in_both() -> None:
    """Theirs refuse a batch of nothing else, and are nearly zero for zeros beside another map."""
    maps = torch.stack((torch.full((SIDE, SIDE), 0.5), torch.zeros(SIDE, SIDE), distinct(1, (SIDE, SIDE))[0]))
    theirs = called(quiet(quantus.Sparseness), None, None, maps)
    ours = Gini().measure(maps)["gini"]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert ours[:2].tolist() == pytest.approx([0, 0], abs=1e-12)


def test_rank_correlation_of_their_randomisation_test() -> None:
    """With and without ties. Of a constant map theirs are NaN; ours are defined."""
    generator = torch.Generator().manual_seed(7)
    a = torch.randint(0, 9, (5, 40), generator=generator).double()
    b = torch.rand(5, 40, dtype=torch.float64, generator=generator)
    theirs = [
        float(quantus.similarity_func.correlation_spearman(x, y)) for x, y in zip(a.numpy(), b.numpy(), strict=True)
    ]
    np.testing.assert_allclose(spearman(a, b), theirs, rtol=0, atol=1e-6)


def test_structural_similarity_of_their_randomisation_test() -> None:
    """Theirs call scikit-image's with uniform windows of 7 and the two maps' common range. The part that is the same:
    scikit-image's with the Gaussian window of the paper and the range of 1, which is what ours is."""
    from skimage.metrics import structural_similarity

    generator = torch.Generator().manual_seed(8)
    a = torch.rand(3, 24, 30, dtype=torch.float64, generator=generator)
    b = (a + 0.2 * torch.rand(3, 24, 30, dtype=torch.float64, generator=generator)).clamp(0, 1)
    for x in (a, b):
        x[:, 0, 0], x[:, 0, 1] = 0, 1
    ours = ssim(a, b)
    for x, y, one in zip(a.numpy(), b.numpy(), ours.tolist(), strict=True):
        uniform = structural_similarity(x, y, data_range=1.0)
        assert quantus.similarity_func.ssim(x, y) == pytest.approx(uniform, abs=1e-6)
        # Its filter reflects at the border; the mean is over whole windows of 11, as ours.
        _, values = structural_similarity(
            x, y, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
        )
        assert one == pytest.approx(float(values[5:-5, 5:-5].mean()), abs=1e-6)
        assert abs(one - uniform) > 1e-4


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_road_s_imputation(share: float) -> None:
    image = torch.randn(3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    gone = distinct(1, (SIDE, SIDE))[0] > 0.6 - share
    theirs = quantus.perturb_func.noisy_linear_imputation(image.numpy(), np.flatnonzero(gone.numpy()), noise=0.0)
    np.testing.assert_allclose(impute(image, gone), theirs, rtol=0, atol=1e-6)
