"""What must hold of protocols whatever the map: extremes, monotone transforms, ties, what does not take part."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipfast.metrics.localisation import (
    EnergyPointingGame,
    Gini,
    MaskIou,
    PointingGame,
    PrecisionAt,
    SegmentationChefer,
)
from clipfast.metrics.perturbation import area, curves
from clipfast.metrics.road import Road

LIVELY = settings(max_examples=25, deadline=None)
SIDES = st.integers(2, 9)


@st.composite
def maps_and_masks(draw: st.DrawFn, ties: bool = False) -> tuple[Tensor, Tensor]:
    """One map (1, h, w) that is not constant, float64, and a mask with an object and something else."""
    height, width = draw(SIDES), draw(SIDES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    count = height * width
    if ties:
        heat = torch.randint(0, draw(st.integers(2, 4)), (count,), generator=generator).double()
        heat[0], heat[-1] = 0, 1
    else:
        heat = torch.randperm(count, generator=generator).double() / count - draw(st.sampled_from([0.0, 0.5]))
    size = draw(st.integers(1, count - 1))
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=generator)[:size]] = True
    return heat.view(1, height, width), mask.view(1, height, width)


def rising(maps: Tensor) -> list[Tensor]:
    """The maps after functions that keep every order and tie."""
    return [maps.exp(), (4 * maps).tanh(), 3 * maps + 7, maps.pow(3)]


@LIVELY
@given(maps_and_masks())
def test_the_mask_itself_is_the_best_map_and_its_negative_the_worst(case: tuple[Tensor, Tensor]) -> None:
    _, mask = case
    best, worst = mask.double(), -mask.double()
    assert PointingGame().measure(best, mask)["hit"] == 1
    assert EnergyPointingGame().measure(best, mask)["share"] == 1
    assert MaskIou().measure(best, mask)["IoU"] == 1
    assert PrecisionAt().measure(best, mask)["precision"] == 1
    assert PointingGame().measure(worst, mask)["hit"] == 0
    assert EnergyPointingGame(scale="minmax").measure(worst, mask)["share"] == 0
    assert MaskIou(thresholds=(0.5,)).measure(worst, mask)["IoU"] == 0
    assert PrecisionAt().measure(worst, mask)["precision"] == 0
    # On a square of the mask's own pixels nothing is interpolated.
    side = min(mask.shape[1:])
    square = mask[:, :side, :side]
    if square.any() and not square.all():
        protocol = SegmentationChefer(size=side)
        right = protocol.summary(protocol.measure(square.double(), square))
        wrong = protocol.summary(protocol.measure(-square.double(), square))
        assert right == {"pixel accuracy": 1, "mean IoU": 1, "AP": 1}
        assert wrong["pixel accuracy"] == 0 and wrong["mean IoU"] == 0


@LIVELY
@given(maps_and_masks(ties=True) | maps_and_masks())
def test_what_only_orders_pixels_ignores_rising_functions(case: tuple[Tensor, Tensor]) -> None:
    maps, mask = case
    for other in rising(maps):
        for tolerance in (0, 2):
            protocol = PointingGame(tolerance)
            assert torch.equal(protocol.measure(maps, mask)["hit"], protocol.measure(other, mask)["hit"])
    image = torch.linspace(-1, 1, maps[0].numel(), dtype=torch.float64).view(1, 1, *maps.shape[1:])
    wanted = along(image, maps)
    for other in rising(maps):
        assert all(torch.equal(a, b) for a, b in zip(wanted, along(image, other), strict=True))


def along(image: Tensor, maps: Tensor) -> list[Tensor]:
    """Deletion and insertion of the sum of squares."""
    plan = {"deletion": ([0, 0.3, 0.7, 1], 0.5), "insertion": ([0, 0.3, 0.7, 1], 0.5)}
    found = curves(lambda x: x.square().sum((1, 2, 3))[:, None], lambda z, pair: z[:, 0], image, maps[None], plan)  # type: ignore[arg-type]
    return list(found.values())


@LIVELY
@given(maps_and_masks(ties=True) | maps_and_masks(), st.floats(0.01, 100), st.floats(-5, 5))
def test_what_scales_maps_ignores_scale_and_offset(case: tuple[Tensor, Tensor], scale: float, offset: float) -> None:
    maps, mask = case
    other = scale * maps + offset
    for protocol in (EnergyPointingGame(scale="minmax"), PrecisionAt(threshold=0.37), MaskIou(thresholds=(0.37,))):
        for name, column in protocol.measure(maps, mask).items():
            torch.testing.assert_close(protocol.measure(other, mask)[name], column, rtol=0, atol=1e-9)
    for protocol in (EnergyPointingGame(), Gini()):
        before = protocol.measure(maps) if isinstance(protocol, Gini) else protocol.measure(maps, mask)
        after = protocol.measure(scale * maps) if isinstance(protocol, Gini) else protocol.measure(scale * maps, mask)
        for name, column in before.items():
            torch.testing.assert_close(after[name], column, rtol=0, atol=1e-9)


@LIVELY
@given(maps_and_masks(ties=True) | maps_and_masks())
def test_shares_lie_between_nothing_and_everything(case: tuple[Tensor, Tensor]) -> None:
    maps, mask = case
    for protocol in (PointingGame(), EnergyPointingGame(), MaskIou(), PrecisionAt(), SegmentationChefer(size=9)):
        figures = protocol.summary(protocol.measure(maps, mask))
        assert all(0 <= value <= 1 for value in figures.values())
    inside = EnergyPointingGame(scale="minmax").measure(maps, mask)["share"]
    outside = EnergyPointingGame(scale="minmax").measure(maps, ~mask)["share"]
    torch.testing.assert_close(inside + outside, torch.ones(1, dtype=torch.float64))


@LIVELY
@given(maps_and_masks(ties=True) | maps_and_masks(), st.data())
def test_ignored_pixels_take_no_part(case: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    """Whatever a map says there between its extremes, and pointing there, changes nothing."""
    maps, mask = case
    labels = mask.long()
    flat = maps.flatten()
    between = [i for i in range(len(flat)) if flat.min() < flat[i] < flat.max()]
    ignored = data.draw(st.lists(st.sampled_from(between), unique=True, max_size=4)) if between else []
    labels.flatten()[ignored] = -1
    other = maps.clone()
    other.flatten()[ignored] = (flat.min() + flat.max()) / 2
    for protocol in (PointingGame(), EnergyPointingGame(scale="minmax"), MaskIou(), PrecisionAt()):
        for name, column in protocol.measure(maps, labels).items():
            torch.testing.assert_close(protocol.measure(other, labels)[name], column, equal_nan=True)


@LIVELY
@given(st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_no_order_deletes_better_than_that_of_the_summands(side: int, seed: int) -> None:
    """The score is a sum over pixels: the map of the summands has the least deletion and the greatest insertion."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(1, 1, side, side, dtype=torch.float64, generator=generator)
    maps = torch.cat((image, torch.rand(1, 4, side, side, dtype=torch.float64, generator=generator), -image), dim=1)
    fractions = [i / 8 for i in range(9)]
    plan = {"deletion": (fractions, 0.0), "insertion": (fractions, 0.0)}
    found = curves(lambda x: x.sum((1, 2, 3))[:, None], lambda z, pair: z[:, 0], image, maps, plan)  # type: ignore[arg-type]
    deletion, insertion = (area(found[mode], fractions)[0] for mode in ("deletion", "insertion"))
    assert deletion.argmin() == 0 and deletion.max() <= deletion[-1] + 1e-9
    assert insertion.argmax() == 0 and insertion.min() >= insertion[-1] - 1e-9
    # What is gone and what is there add up to the image at every point.
    torch.testing.assert_close(found["deletion"] + found["insertion"], found["deletion"][..., :1].expand(1, 6, 9))


@LIVELY
@given(maps_and_masks(ties=True), st.floats(0.05, 0.95))
def test_of_equal_pixels_the_first_in_reading_order_go_first(case: tuple[Tensor, Tensor], fraction: float) -> None:
    maps, _ = case
    image = torch.ones(1, 1, *maps.shape[1:], dtype=torch.float64)
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x)
        return x.sum((1, 2, 3))[:, None]

    curves(look, lambda z, pair: z[:, 0], image, maps[None], {"deletion": ([fraction], 0.0)})
    values = maps.flatten().tolist()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    gone = sorted(order[: int(fraction * len(values) + 0.5)])
    assert (seen[0].flatten() == 0).nonzero().flatten().tolist() == gone


@LIVELY
@given(maps_and_masks(), st.sampled_from([10, 33.3, 50, 90]))
def test_road_of_the_negative_is_the_negative(case: tuple[Tensor, Tensor], percentile: float) -> None:
    """MoRF of a map without ties is LeRF of its negative."""
    maps, _ = case
    image = torch.rand(1, 2, *maps.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both = torch.stack((maps, -maps), dim=1)
    protocol = Road(percentiles=(percentile,))
    weights = torch.linspace(0, 1, maps[0].numel(), dtype=torch.float64)
    columns = protocol.measure(lambda x: x.flatten(2) @ weights, torch.ones(2, 2, dtype=torch.float64), image, both)
    assert columns["MoRF"].tolist() == pytest.approx(columns["LeRF"].flip(0).tolist(), abs=1e-12)
    assert float(columns["road"].sum()) == pytest.approx(0, abs=1e-12)


def test_one_pixel_of_all_can_be_the_object() -> None:
    mask = torch.zeros(1, 7, 9, dtype=torch.bool)
    mask[0, 6, 8] = True
    maps = torch.zeros(1, 7, 9)
    maps[0, 6, 8] = 1e-30
    assert PointingGame().measure(maps, mask)["hit"] == 1
    assert EnergyPointingGame().measure(maps, mask)["share"] == 1
    assert MaskIou().measure(maps, mask)["IoU"] == 1
    assert Gini().measure(maps)["gini"] == pytest.approx(1 - 1 / 63)
