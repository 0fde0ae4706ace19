"""Pointing, energy, segmentation and sparsity: published outputs, libraries, loops over pixels, extremes and edges."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco
from safetensors import safe_open
from sklearn.metrics import average_precision_score
from torch import Tensor

from clipfast import Explainer
from clipfast.data.scenes import Scenes
from clipfast.errors import InputError
from clipfast.metrics import EnergyPointingGame, Gini, MaskIou, PointingGame, PrecisionAt, SegmentationChefer
from clipfast.metrics.base import figures
from clipfast.metrics.localisation import average_precision

GOLDENS = Path(__file__).parents[1] / "goldens" / "metrics_published.safetensors"
ON_MASKS = [PointingGame(), EnergyPointingGame(), SegmentationChefer(size=12), MaskIou(), PrecisionAt()]
by_name = pytest.mark.parametrize("protocol", ON_MASKS, ids=lambda protocol: protocol.name)


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    with safe_open(GOLDENS, "pt") as stored:
        return {key: stored.get_tensor(key) for key in stored.keys() if key.startswith("seg.")}  # noqa: SIM118


def some_maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some_labels(*shape: int, seed: int = 1, low: int = -1) -> Tensor:
    return torch.randint(low, 2, shape, generator=torch.Generator().manual_seed(seed))


def upsampled(heat: Tensor, size: tuple[int, int]) -> np.ndarray:
    return F.interpolate(heat[None, None], size=size, mode="bilinear", align_corners=False)[0, 0].numpy()


def test_the_published_segmentation(published) -> None:
    protocol = SegmentationChefer()
    columns = protocol.measure(published["seg.maps"], published["seg.labels"])
    background, foreground = published["seg.iou_background_foreground"].tolist()
    found = protocol.summary(columns)
    assert found["pixel accuracy"] == pytest.approx(float(published["seg.pixel_accuracy"]), abs=1e-6)
    assert found["mean IoU"] == pytest.approx((background + foreground) / 2, abs=1e-6)
    for name, expected in (("background", background), ("object", foreground)):
        share = float(columns[f"intersection {name}"].sum() / columns[f"union {name}"].sum())
        assert share == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(columns["AP"].float(), published["seg.ap_per_image"], rtol=0, atol=1e-6)
    # What is ignored matters: the same labels with background in its place give other figures.
    other = protocol.summary(protocol.measure(published["seg.maps"], published["seg.labels"].clamp(min=0)))
    assert all(abs(other[name] - found[name]) > 1e-4 for name in found)


def test_segmentation_against_loops_with_ties_and_ignored_pixels() -> None:
    maps, labels = some_maps(5, 4, 6).mul(2).round(), some_labels(5, 40, 30)
    protocol = SegmentationChefer(size=20)
    columns = protocol.measure(maps, labels)
    right = pixels = 0
    inter, union = np.zeros(2), np.zeros(2)
    for i in range(5):
        r = upsampled(maps[i], (20, 20))
        r = (r - r.min()) / (r.max() - r.min())
        truth = np.asarray(Image.fromarray(labels[i].int().numpy()).resize((20, 20), Image.Resampling.NEAREST))
        answer, counted = (r > r.mean()).astype(int), truth >= 0
        right, pixels = right + (answer == truth)[counted].sum(), pixels + counted.sum()
        for c in (0, 1):
            inter[c] += ((answer == c) & (truth == c))[counted].sum()
            union[c] += ((answer == c) | (truth == c))[counted].sum()
        target = np.concatenate(((truth == 0)[counted], (truth == 1)[counted]))
        scores = np.concatenate(((1 - r)[counted], r[counted]))
        assert float(columns["AP"][i]) == pytest.approx(average_precision_score(target, scores), abs=1e-12)
    found = protocol.summary(columns)
    assert found["pixel accuracy"] == pytest.approx(right / pixels, abs=1e-12)
    assert found["mean IoU"] == pytest.approx((inter / union).mean(), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    scores=arrays(np.float64, st.shared(st.integers(2, 60), key="m"), elements=st.sampled_from([0, 0.1, 0.5, 2, -1.5])),
    positive=arrays(np.bool_, st.shared(st.integers(2, 60), key="m")),
)
def test_average_precision_is_scikit_learn_s_with_any_ties(scores, positive) -> None:
    found = average_precision(torch.from_numpy(scores), torch.from_numpy(positive))
    if positive.any():
        assert found == pytest.approx(average_precision_score(positive, scores), abs=1e-12)
    else:
        assert math.isnan(found)


def test_pointing_and_energy_against_loops() -> None:
    maps, labels = some_maps(8, 3, 5), some_labels(8, 31, 22).bool() & (some_maps(8, 31, 22, seed=4) > 1)
    hits = {t: PointingGame(tolerance=t).measure(maps, labels)["hit"] for t in (0, 1, 2, 5)}
    share = EnergyPointingGame().measure(maps, labels)["share"]
    for i in range(8):
        heat, mask = upsampled(maps[i], (31, 22)), labels[i].numpy()
        y, x = np.unravel_index(heat.argmax(), heat.shape)
        rows, cols = np.nonzero(mask)
        away = np.hypot(rows - y, cols - x).min()
        assert hits[0][i] == mask[y, x]
        for t in (1, 2, 5):
            assert hits[t][i] == (away < t)
        mass = heat.clip(min=0)
        assert float(share[i]) == pytest.approx(mass[mask].sum() / mass.sum(), abs=1e-12)
    assert 0 < hits[2].mean() < 1 and hits[5].sum() > hits[0].sum()


def test_a_tolerance_is_nearer_than_and_one_pixel_objects_count() -> None:
    heat, mask = torch.zeros(1, 40, 40), torch.zeros(1, 40, 40, dtype=torch.bool)
    heat[0, 5, 5], mask[0, 5, 20] = 1, True
    hit = [float(PointingGame(tolerance=t).measure(heat, mask)["hit"]) for t in (0, 14, 15, 15.5)]
    assert hit == [0, 0, 0, 1]
    heat[0, 5, 20] = 2
    assert PointingGame().measure(heat, mask)["hit"] == 1
    assert EnergyPointingGame().measure(heat, mask)["share"] == pytest.approx(2 / 3)
    assert MaskIou().measure(heat, mask)["IoU"] == 1


def test_the_first_of_equally_high_pixels_points_and_ignored_ones_do_not() -> None:
    heat = torch.tensor([[[0.0, 3.0, 3.0], [3.0, 5.0, 0.0]]])
    first, later = torch.tensor([[[0, 1, 0], [0, -1, 0]]]), torch.tensor([[[0, 0, 1], [1, -1, 0]]])
    assert PointingGame().measure(heat, first)["hit"] == 1
    assert PointingGame().measure(heat, later)["hit"] == 0
    # Energy: the ignored 5 is no mass.
    assert EnergyPointingGame().measure(heat, later)["share"] == pytest.approx(6 / 9)


def test_an_offset_is_mass_unless_min_maxed() -> None:
    maps, masks = some_maps(4, 7, 7).abs(), some_labels(4, 7, 7, low=0)
    plain = EnergyPointingGame()
    scaled = EnergyPointingGame(scale="minmax")
    assert not torch.allclose(plain.measure(maps, masks)["share"], plain.measure(maps + 10, masks)["share"], atol=1e-3)
    torch.testing.assert_close(scaled.measure(maps, masks)["share"], scaled.measure(maps * 3 + 10, masks)["share"])
    # Values below zero are no mass.
    signed = torch.tensor([[[2.0, -5.0], [1.0, 1.0]]])
    assert plain.measure(signed, torch.tensor([[[1, 1], [0, 0]]]))["share"] == 0.5


def test_overlap_and_precision_against_pycocotools() -> None:
    maps, masks = some_maps(6, 5, 5), some_maps(6, 33, 47, seed=7) > 0.4
    thresholds = (0.6, 0.0, 0.25, 0.9)
    protocol = MaskIou(thresholds)
    columns = protocol.measure(maps, masks)
    assert protocol.thresholds == (0.0, 0.25, 0.6, 0.9)
    ious = np.zeros((6, 4))
    for i in range(6):
        r = upsampled(maps[i], (33, 47))
        r = (r - r.min()) / (r.max() - r.min())
        truth = coco.encode(np.asfortranarray(masks[i].numpy().astype(np.uint8)))
        for k, t in enumerate(protocol.thresholds):
            answer = coco.encode(np.asfortranarray((r > t).astype(np.uint8)))
            ious[i, k] = coco.iou([answer], [truth], [0])[0, 0]
            assert float(columns[f"IoU@{t}"][i]) == pytest.approx(ious[i, k], abs=1e-12)
            precision = float(PrecisionAt(t).measure(maps[i][None], masks[i][None])["precision"])
            both = coco.merge([answer, truth], intersect=True)
            assert precision == pytest.approx(float(coco.area(both) / coco.area(answer)), abs=1e-12)
    found = protocol.summary(columns)
    assert found["IoU"] == pytest.approx(ious.max(1).mean(), abs=1e-12)
    assert found["IoU, one threshold"] == pytest.approx(ious.mean(0).max(), abs=1e-12)


def test_ignored_pixels_take_no_part_in_overlap() -> None:
    heat = torch.tensor([[[1.0, 0.9, 0.8, 0.0]]])
    labels = torch.tensor([[[1, 0, -1, 1]]])
    assert MaskIou((0.5,)).measure(heat, labels)["IoU"] == pytest.approx(1 / 3)
    assert PrecisionAt(0.5).measure(heat, labels)["precision"] == 0.5


@by_name
def test_perfect_and_worst_maps_have_the_extreme_figures(protocol) -> None:
    masks = some_maps(6, 12, 12, seed=3) > 0.3
    best = protocol.summary(protocol.measure(masks, masks))
    assert all(value == pytest.approx(1, abs=1e-12) for value in best.values()), best
    worst = protocol.summary(protocol.measure(~masks, masks))
    # Half of the scores that AP ranks are of classes which are there, and no order of two tied groups is worse.
    least = {"AP": 0.5}
    assert worst == pytest.approx({name: least.get(name, 0) for name in worst}, abs=1e-12)


def test_average_precision_falls_to_its_least() -> None:
    """All positives behind all negatives, without ties: 1/n sum k / (n + k), which is 1 - ln 2 for many pixels."""
    order = torch.arange(144.0).view(1, 12, 12)
    masks = order < 72
    columns = SegmentationChefer(size=12).measure(order / 143 + (order >= 72), masks)
    assert float(columns["AP"]) == pytest.approx(1 - math.log(2), abs=5e-3)


@by_name
@pytest.mark.parametrize("value", [0.0, 0.3, -2.0])
def test_a_constant_map_says_nothing(protocol, value) -> None:
    # 0.3 is not exact in floating point, and bilinear weights are not either.
    masks = some_maps(3, 12, 10, seed=3) > 0.3
    found = protocol.summary(protocol.measure(torch.full((3, 5, 7), value), masks))
    if protocol.name == "segmentation/chefer":
        resized = torch.stack([nearest(m, 12) for m in masks])
        share = float((~resized).double().mean())
        assert found == pytest.approx({"pixel accuracy": share, "mean IoU": share / 2, "AP": 0.5})
    elif protocol.name == "energy_pointing_game" and value > 0:
        assert found["share"] == pytest.approx(float(masks.double().mean()))
    else:
        assert set(found.values()) == {0.0}


def nearest(mask: Tensor, size: int) -> Tensor:
    picture = Image.fromarray(mask.numpy().astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(picture)).bool()


@by_name
def test_masks_without_object_do_not_count(protocol) -> None:
    maps, labels = some_maps(4, 12, 12), some_labels(4, 12, 12)
    labels[1] = labels[1].clamp(max=0)
    labels[3] = -1
    columns = protocol.measure(maps, labels)
    chefer = protocol.name == "segmentation/chefer"
    for column in columns.values():
        assert column.isnan().tolist() == [False, not chefer, False, True]
        assert column.dtype == torch.float64
    kept = [0, 1, 2] if chefer else [0, 2]
    alone = protocol.summary(protocol.measure(maps[kept], labels[kept]))
    assert protocol.summary(columns) == pytest.approx(alone)
    (first, *_) = figures(protocol, columns, resamples=20)
    assert first.count == 4 and first.low <= first.value <= first.high
    none = protocol.summary(protocol.measure(maps[3:], labels[3:]))
    assert all(math.isnan(value) for value in none.values())


def test_a_class_that_no_sample_has_or_finds_is_left_out() -> None:
    protocol = SegmentationChefer(size=4)
    nothing = protocol.measure(torch.zeros(2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long))
    assert protocol.summary(nothing)["mean IoU"] == 1


@by_name
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int64])
def test_pairs_count_image_by_image_in_any_numbers(protocol, dtype, monkeypatch) -> None:
    maps, masks = some_maps(2, 3, 5, 4), some_labels(2, 3, 9, 11, low=0)
    whole = protocol.measure(maps, masks.bool())
    monkeypatch.setattr("clipfast.metrics.localisation._CHUNK_PIXELS", 300)
    small = protocol.measure(maps.flatten(0, 1), masks.to(dtype))
    for name, column in whole.items():
        assert column.shape == (6,)
        torch.testing.assert_close(small[name], column, rtol=0, atol=1e-12)
    for b in range(2):
        for p in range(3):
            one = protocol.measure(maps[b, p][None], masks[b, p][None])
            assert all(float(one[name]) == pytest.approx(float(whole[name][3 * b + p])) for name in whole)


@by_name
def test_half_precision_maps_are_measured_in_single(protocol) -> None:
    maps, masks = some_maps(3, 6, 6).bfloat16(), some_labels(3, 12, 12, low=0)
    low, high = protocol.measure(maps, masks), protocol.measure(maps.float(), masks)
    assert all(torch.equal(low[name], high[name]) for name in low)


@by_name
@settings(max_examples=25, deadline=None)
@given(
    heat=arrays(np.float32, (2, 3, 4), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    labels=arrays(np.int64, (2, 5, 6), elements=st.integers(-1, 1)),
)
def test_figures_are_shares_whatever_the_input(protocol, heat, labels) -> None:
    columns = protocol.measure(torch.from_numpy(heat), torch.from_numpy(labels))
    for value in protocol.summary(columns).values():
        assert math.isnan(value) or 0 <= value <= 1 + 1e-6


@by_name
@pytest.mark.parametrize("factor", [2.0**-90, 2.0**90])
def test_the_scale_of_a_map_means_nothing(protocol, factor) -> None:
    maps, labels = some_maps(4, 5, 6).float(), some_labels(4, 9, 8)
    as_is, scaled = protocol.measure(maps, labels), protocol.measure(maps * factor, labels)
    assert all(torch.equal(as_is[name], scaled[name]) for name in as_is)


@by_name
def test_what_does_not_belong_together_is_refused(protocol) -> None:
    with pytest.raises(InputError, match="3 maps and 2 masks"):
        protocol.measure(torch.rand(3, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="bool or whole numbers"):
        protocol.measure(torch.rand(3, 4, 4), torch.rand(3, 4, 4))
    with pytest.raises(InputError, match=r"\(N, h, w\) or \(B, P, h, w\)"):
        protocol.measure(torch.rand(4, 4), torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="not finite"):
        protocol.measure(torch.full((1, 4, 4), torch.nan), torch.ones(1, 4, 4, dtype=torch.bool))


@by_name
def test_no_samples_give_no_values(protocol) -> None:
    columns = protocol.measure(torch.zeros(0, 4, 4), torch.zeros(0, 8, 8, dtype=torch.bool))
    assert columns and all(len(column) == 0 for column in columns.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PointingGame(tolerance=-1), "tolerance"),
        (lambda: EnergyPointingGame(scale="squared"), "'positive' or 'minmax'"),
        (lambda: SegmentationChefer(size=0), "size"),
        (lambda: MaskIou(()), "thresholds"),
        (lambda: MaskIou((0.5, 1.0)), "thresholds"),
        (lambda: PrecisionAt(1.0), "threshold"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(make, message) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_gini_against_its_formula_and_its_extremes() -> None:
    maps = some_maps(2, 3, 5, 7)
    found = Gini().measure(maps)["gini"]
    for i, heat in enumerate(maps.flatten(0, 1)):
        c = np.sort(np.abs(heat.numpy().ravel()))
        formula = 1 - 2 * sum(c[k - 1] / c.sum() * (35 - k + 0.5) / 35 for k in range(1, 36))
        # Twice the area between the Lorenz curve and the diagonal, which is how the index was first meant.
        lorenz = np.trapezoid(np.concatenate(([0], c.cumsum() / c.sum())), dx=1 / 35)
        assert float(found[i]) == pytest.approx(formula, abs=1e-12)
        assert float(found[i]) == pytest.approx(1 - 2 * lorenz, abs=1e-12)
    single = torch.zeros(1, 4, 5)
    assert Gini().measure(single)["gini"] == 0
    assert Gini().measure(single + 0.3)["gini"] == pytest.approx(0, abs=1e-12)
    single[0, 2, 2] = -3
    assert Gini().measure(single)["gini"] == pytest.approx(1 - 1 / 20)


def test_explanations_of_scenes_point_at_what_they_name() -> None:
    """Maps on the pictures' own pixels against exact masks: Grad-ECLIP of the demo model beats maps of noise."""
    scenes = list(Scenes(24, seed=9, objects=2, repeat=0))
    maps, masks = [], []
    for scene in scenes:
        attribution = Explainer("demo")(Image.fromarray(scene.image), [f"a {name}" for name in scene.names])
        maps.append(attribution.resize(0))
        masks.append(torch.stack([torch.from_numpy(scene.mask(name)) for name in scene.names]))
    heat, truth = torch.cat(maps), torch.cat(masks)
    noise = torch.rand(len(heat), 7, 7, generator=torch.Generator().manual_seed(0))
    for protocol in (PointingGame(), EnergyPointingGame(), SegmentationChefer(), MaskIou(), PrecisionAt()):
        ours, theirs = (protocol.summary(protocol.measure(m, truth)) for m in (heat, noise))
        for name in protocol.figures:
            assert ours[name] > theirs[name], (protocol.name, name, ours, theirs)
