"""Boxes from maps: published outputs and literal cases, pycocotools, loops over thresholds, extremes and edges."""

from __future__ import annotations

import builtins
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco
from safetensors import safe_open
from torch import Tensor

from clipfast.data.scenes import Scenes
from clipfast.errors import InputError
from clipfast.metrics import BoxGScoreCam, MaxBoxAcc
from clipfast.metrics.base import figures
from clipfast.metrics.boxes import inclusive_iou

GOLDENS = Path(__file__).parents[1] / "goldens" / "metrics_published.safetensors"
ANY_BOX = [torch.tensor([[0, 0, 4, 4]])]


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    with safe_open(GOLDENS, "pt") as stored:
        return {key: stored.get_tensor(key) for key in stored.keys() if key.startswith("box.")}  # noqa: SIM118


def sides(columns: dict[str, Tensor]) -> list[list[float]]:
    return torch.stack([columns[side] for side in ("left", "top", "right", "bottom")], dim=1).tolist()


def smooth(n: int, seed: int = 0, size: int = 60) -> Tensor:
    heat = torch.randn(n, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(heat, size=(size, size), mode="bicubic")[:, 0]


def some_boxes(n: int, seed: int = 0, size: int = 60) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, size // 2, (n, 3, 2), generator=generator)
    extents = torch.randint(1, size // 2, (n, 3, 2), generator=generator)
    return [torch.cat((c, c + e), dim=1)[: 1 + i % 3] for i, (c, e) in enumerate(zip(corners, extents, strict=True))]


def rectangle(box: tuple[int, int, int, int], size: int = 24) -> Tensor:
    heat = torch.zeros(size, size)
    heat[box[1] : box[3], box[0] : box[2]] = 1
    return heat


def test_the_published_boxes(published) -> None:
    truth = published["box.gt_xyxy"]
    otsu = BoxGScoreCam().measure(published["box.maps"], truth)
    assert sides(otsu) == published["box.otsu_xyxy"].tolist()
    torch.testing.assert_close(otsu["IoU"].float(), published["box.iou"], rtol=0, atol=1e-6)
    assert otsu["BoxAcc"].tolist() == (published["box.iou"] >= 0.5).double().tolist()
    half = BoxGScoreCam(threshold=0.5).measure(published["box.maps"], truth)
    assert sides(half) == published["box.t05_xyxy"].tolist()
    assert sides(half) != sides(otsu)


def test_a_map_s_scale_does_not_move_its_box(published) -> None:
    maps, truth = published["box.maps"], published["box.gt_xyxy"]
    for factor in (2.0**-100, 2.0**60):
        assert sides(BoxGScoreCam().measure(maps * factor, truth)) == published["box.otsu_xyxy"].tolist()


def test_the_best_box_of_a_class_counts_and_the_pixels_are_those_of_the_picture() -> None:
    heat = rectangle((2, 3, 12, 18))[None]
    far, near = torch.tensor([20.0, 20.0, 23.0, 23.0]), torch.tensor([2.0, 3.0, 12.0, 18.0])
    columns = BoxGScoreCam().measure(heat, [torch.stack((far, near))])
    assert columns["BoxAcc"] == 1 and columns["IoU"] == pytest.approx(1, abs=1e-6)
    assert BoxGScoreCam().measure(heat, [far[None]])["BoxAcc"] == 0
    # A coarse map of a wide picture: the same as handing in the map on its pixels.
    coarse = smooth(3, size=7)
    wide = F.interpolate(coarse[:, None], size=(50, 90), mode="bilinear")[:, 0]
    boxes = some_boxes(3)
    small, large = BoxGScoreCam().measure(coarse, boxes, size=(50, 90)), BoxGScoreCam().measure(wide, boxes)
    assert all(torch.equal(small[name], large[name]) for name in small)


@pytest.mark.parametrize("protocol", [BoxGScoreCam(), MaxBoxAcc(), MaxBoxAcc(contours="all", size=None)])
def test_perfect_and_worst_boxes_have_the_extreme_figures(protocol) -> None:
    size = 224
    boxes = [(10, 20, 90, 120), (100, 3, 200, 220), (0, 0, 50, 30)]
    maps = torch.stack([rectangle(box, size) for box in boxes])
    best = protocol.summary(protocol.measure(maps, torch.tensor(boxes)))
    assert all(value == pytest.approx(1, abs=1e-6) for value in best.values())
    worst = protocol.summary(protocol.measure(maps, torch.tensor([[210, 221, 222, 223]] * 3)))
    assert set(worst.values()) == {0.0}
    (first, *_) = figures(protocol, protocol.measure(maps, torch.tensor(boxes)), resamples=10)
    assert (first.count, first.low) == (3, pytest.approx(1, abs=1e-6))


def test_boxes_of_masks_are_pycocotools_own() -> None:
    scenes = [scene for scene in Scenes(30, seed=3, objects=1, repeat=0, distractors=0) if scene.objects]
    compared = 0
    for scene in scenes:
        thing = scene.objects[0]
        if cv2.connectedComponents(thing.mask.astype(np.uint8))[0] != 2:
            continue
        x, y, w, h = coco.toBbox(coco.encode(np.asfortranarray(thing.mask.astype(np.uint8))))
        columns = BoxGScoreCam().measure(torch.from_numpy(thing.mask)[None], torch.tensor([thing.box]))
        assert sides(columns) == [[x, y, x + w, y + h]]
        assert columns["IoU"] == pytest.approx(1, abs=1e-6)
        compared += 1
    assert compared > 10


coordinate = st.integers(0, 15)
box = st.tuples(coordinate, coordinate, coordinate, coordinate).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


@settings(max_examples=100, deadline=None)
@given(a=box, b=box)
def test_overlap_counts_both_ends_as_pycocotools_does_for_their_pixels(a, b) -> None:
    pixels = [rectangle((x0, y0, x1 + 1, y1 + 1)).numpy().astype(np.uint8) for x0, y0, x1, y1 in (a, b)]
    one, other = (coco.encode(np.asfortranarray(p)) for p in pixels)
    expected = coco.iou([one], [other], [0])[0, 0]
    found = inclusive_iou(torch.tensor([a]), torch.tensor([b]), thin=1, eps=0)
    assert float(found) == pytest.approx(expected, abs=1e-12)
    # Where nothing has no width or height the two protocols' areas are one.
    overlap = (min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1]))
    without = inclusive_iou(torch.tensor([a]), torch.tensor([b]), thin=0, eps=1e-6)
    if min(*overlap, a[2] - a[0], a[3] - a[1], b[2] - b[0], b[3] - b[1]) > 0:
        assert float(without) == pytest.approx(expected, abs=1e-6)
    elif min(overlap) <= 0:
        assert float(without) == 0


def test_an_overlap_of_exactly_one_half_is_none() -> None:
    """By the 1e-6 of the published code: 10 x 10 of 20 x 10 pixels, ends counted."""
    heat = rectangle((0, 0, 9, 9))[None]
    assert BoxGScoreCam().measure(heat, torch.tensor([[0, 0, 19, 9]]))["BoxAcc"] == 0
    assert BoxGScoreCam().measure(heat, torch.tensor([[0, 0, 18, 9]]))["BoxAcc"] == 1
    inclusive = MaxBoxAcc(size=None)
    assert inclusive.summary(inclusive.measure(heat, torch.tensor([[0, 0, 19, 9]])))["MaxBoxAcc@0.5"] == 1


def test_one_pixel_and_constant_maps() -> None:
    point = torch.zeros(1, 9, 9)
    point[0, 4, 6] = 1
    assert sides(BoxGScoreCam().measure(point, torch.tensor([[6, 4, 7, 5]]))) == [[6, 4, 7, 5]]
    assert BoxGScoreCam().measure(point, torch.tensor([[6, 4, 7, 5]]))["BoxAcc"] == 1
    for value in (0.0, 0.3, -7.0):
        constant = torch.full((1, 3, 5), value)
        assert sides(BoxGScoreCam().measure(constant, ANY_BOX, size=(31, 17))) == [[0, 0, 1, 1]]
        assert MaxBoxAcc(steps=4).boxes(np.zeros((5, 5), np.uint8)) == [[(0, 0, 0, 0)]] * 4
        assert MaxBoxAcc().measure(constant, ANY_BOX, size=(224, 224))["IoU@0.0"] == pytest.approx(1 / 25)
    # A box without height has no area here, and one row of pixels there.
    line = torch.tensor([[3, 4, 8, 4]])
    assert BoxGScoreCam().measure(rectangle((3, 4, 8, 5))[None], line)["IoU"] == 0
    assert MaxBoxAcc(size=None).measure(rectangle((3, 4, 8, 5))[None], line)["IoU@0.0"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("heat", "boxes"),
    [
        (
            [[0, 0, 0, 0, 0], [0, 0.4, 0.4, 0.4, 0.6], [0, 0.4, 1.0, 0.8, 0.6], [0, 0.4, 0.4, 0.4, 0.6]],
            [(1, 1, 4, 3), (1, 1, 4, 3), (2, 1, 4, 3), (2, 2, 4, 3), (2, 2, 3, 3)],
        ),
        (np.zeros((3, 3)), [(0, 0, 0, 0)] * 5),
    ],
)
def test_literal_boxes_of_wsolevaluation_s_own_tests(heat, boxes) -> None:
    levels = (np.array(heat) * 255).astype(np.uint8)
    assert MaxBoxAcc(steps=5).boxes(levels) == [[box] for box in boxes]


@pytest.mark.parametrize("contours", ["largest", "all"])
@pytest.mark.parametrize("steps", [100, 1000])
def test_max_box_acc_against_one_threshold_after_another(contours, steps) -> None:
    maps, boxes = smooth(6), some_boxes(6)
    protocol = MaxBoxAcc(steps=steps, contours=contours, size=None)
    columns = protocol.measure(maps, boxes)
    assert len(columns) == steps
    expected = np.zeros((6, steps))
    for i, heat in enumerate(maps.numpy()):
        levels = ((heat - heat.min()) / (heat.max() - heat.min()) * 255).astype(np.uint8)
        for k, t in enumerate(np.arange(0, 1, 1 / steps)):
            marked = cv2.threshold(levels, int(t * np.max(levels)), 255, cv2.THRESH_BINARY)[1]
            outlines = list(cv2.findContours(marked, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0])
            outlines = [max(outlines, key=cv2.contourArea)] if contours == "largest" else outlines
            for x, y, w, h in map(cv2.boundingRect, outlines):
                x1, y1 = min(x + w, 59), min(y + h, 59)
                for a, b, c, d in boxes[i].tolist():
                    across, down = max(0, min(x1, c) - max(x, a) + 1), max(0, min(y1, d) - max(y, b) + 1)
                    union = (x1 - x + 1) * (y1 - y + 1) + (c - a + 1) * (d - b + 1) - across * down
                    expected[i, k] = max(expected[i, k], across * down / union)
    found = torch.stack(list(columns.values()), dim=1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)
    accuracies = [(expected >= d).mean(0).max() for d in (0.3, 0.5, 0.7)]
    summary = protocol.summary(columns)
    assert [summary[f"MaxBoxAcc@{d}"] for d in (0.3, 0.5, 0.7)] == pytest.approx(accuracies)
    assert summary["MaxBoxAcc"] == pytest.approx(np.mean(accuracies))
    assert 0 < summary["MaxBoxAcc"] < 1


def test_pictures_of_any_size_are_compared_on_one() -> None:
    """Coarse maps and boxes in a picture's pixels: both go to size x size, boxes by whole pixels as theirs do."""
    maps, boxes = smooth(3, size=7), some_boxes(3)
    square = F.interpolate(maps[:, None], size=(48, 48), mode="bilinear")[:, 0]
    moved = [
        torch.tensor(
            [[int(v * 48 / old) for v, old in zip(box, (70, 90, 70, 90), strict=True)] for box in own.tolist()]
        )
        for own in boxes
    ]
    found = MaxBoxAcc(size=48).measure(maps, boxes, size=(90, 70))
    expected = MaxBoxAcc(size=None).measure(square, moved)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # Left in the picture's pixels, the map goes there.
    wide = F.interpolate(maps[:, None], size=(90, 70), mode="bilinear")[:, 0]
    found = MaxBoxAcc(size=None).measure(maps, boxes, size=(90, 70))
    expected = MaxBoxAcc(size=None).measure(wide, boxes)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("protocol", [BoxGScoreCam(), MaxBoxAcc(steps=10)])
def test_maps_without_boxes_do_not_count_and_pairs_go_image_by_image(protocol) -> None:
    maps, boxes = smooth(6, size=16), some_boxes(6)
    boxes[2] = torch.zeros(0, 4)
    columns = protocol.measure(maps.view(2, 3, 16, 16), boxes)
    for name in set(columns) - {"left", "top", "right", "bottom"}:
        assert columns[name].isnan().tolist() == [False, False, True, False, False, False]
    kept = [0, 1, 3, 4, 5]
    alone = protocol.measure(maps[kept], [boxes[i] for i in kept])
    assert protocol.summary(columns) == pytest.approx(protocol.summary(alone))
    assert all(math.isnan(v) for v in protocol.summary(protocol.measure(maps[2:3], boxes[2:3])).values())
    none = protocol.measure(torch.zeros(0, 5, 5), [])
    assert none and all(len(column) == 0 for column in none.values())


@settings(max_examples=60, deadline=None)
@given(levels=arrays(np.uint8, (9, 8), elements=st.sampled_from([0, 1, 90, 128, 200, 255])))
def test_boxes_hold_something_that_is_marked(levels) -> None:
    heat = torch.from_numpy(levels)[None]
    (found,) = sides(BoxGScoreCam(threshold=0.5).measure(heat, ANY_BOX))
    left, top, right, bottom = map(int, found)
    assert 0 <= left < right <= 8 and 0 <= top < bottom <= 9
    spread = np.ptp(levels.astype(float)) or 1
    marked = np.rint((levels.astype(float) - levels.min()) / spread * 255) > 128
    if marked.any():
        inside = marked[top:bottom, left:right]
        # Every side touches what it bounds.
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
    for protocol in (BoxGScoreCam(), MaxBoxAcc(steps=20, size=None)):
        found = protocol.summary(protocol.measure(heat, ANY_BOX))
        assert all(0 <= value <= 1 for value in found.values())


@pytest.mark.parametrize("protocol", [BoxGScoreCam(), MaxBoxAcc(steps=10)])
def test_what_does_not_belong_together_is_refused(protocol) -> None:
    maps = torch.rand(2, 4, 4)
    with pytest.raises(InputError, match="2 maps and boxes for 1"):
        protocol.measure(maps, ANY_BOX)
    with pytest.raises(InputError, match=r"\(K, 4\)"):
        protocol.measure(maps, torch.zeros(2, 3))
    with pytest.raises(InputError, match="not before left and top"):
        protocol.measure(maps, torch.tensor([[3, 0, 2, 4], [0, 0, 2, 2]]))
    with pytest.raises(InputError, match="must be finite"):
        protocol.measure(maps, torch.full((2, 4), torch.nan))
    with pytest.raises(InputError, match="not finite"):
        protocol.measure(maps / 0, torch.zeros(2, 4))


@pytest.mark.parametrize("protocol", [BoxGScoreCam(), MaxBoxAcc(steps=10)])
def test_a_missing_opencv_is_said(protocol, monkeypatch) -> None:
    known = builtins.__import__

    def without(name, *arguments, **more):
        if name == "cv2":
            raise ModuleNotFoundError(name)
        return known(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'clipfast\[metrics\]'"):
        protocol.measure(torch.rand(1, 4, 4), ANY_BOX)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BoxGScoreCam(threshold=1.0), "None for Otsu's"),
        (lambda: BoxGScoreCam(iou=0), "iou must be"),
        (lambda: MaxBoxAcc(steps=0), "steps and size"),
        (lambda: MaxBoxAcc(size=0), "steps and size"),
        (lambda: MaxBoxAcc(contours="some"), "'largest' or 'all'"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(make, message) -> None:
    with pytest.raises(InputError, match=message):
        make()
