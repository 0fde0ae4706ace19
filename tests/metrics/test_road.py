"""ROAD: imputation and scores against pytorch-grad-cam's as released, dense systems, and edge cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_grad_cam.metrics.road import NoisyLinearImputer, ROADCombined
from pytorch_grad_cam.metrics.road import ROADLeastRelevantFirstAverage as TheirLeRF
from pytorch_grad_cam.metrics.road import ROADMostRelevantFirstAverage as TheirMoRF
from torch import Tensor

from clipfast.errors import InputError
from clipfast.metrics.perturbation import Clock
from clipfast.metrics.road import Road, impute

# The released code hands tensors to NumPy's functions.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")


def dense(image: Tensor, gone: Tensor) -> Tensor:
    """The definition pixel by pixel, as one dense system."""
    height, width = gone.shape
    where = {(int(y), int(x)): i for i, (y, x) in enumerate(gone.nonzero())}
    a, b = np.zeros((len(where), len(where))), np.zeros((len(where), len(image)))
    for (y, x), i in where.items():
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                near = (y + down, x + right)
                if (down, right) == (0, 0) or not (0 <= near[0] < height and 0 <= near[1] < width):
                    continue
                weight = 1 / 12 if down and right else 1 / 6
                a[i, i] += weight
                if near in where:
                    a[i, where[near]] -= weight
                else:
                    b[i] += weight * image[:, near[0], near[1]].numpy()
    filled = image.clone()
    for (y, x), value in zip(where, np.linalg.solve(a, b), strict=True):
        filled[:, y, x] = torch.from_numpy(value)
    return filled


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(2, 11), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_imputation_solves_the_system(height: int, width: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, height, width, dtype=torch.float64, generator=generator)
    gone = torch.rand(height, width, generator=generator) < share
    gone.flatten()[int(torch.randint(height * width, (), generator=generator))] = False
    filled = impute(image, gone)
    torch.testing.assert_close(filled, dense(image, gone), rtol=0, atol=1e-11)
    assert torch.equal(filled[:, ~gone], image[:, ~gone])
    # A mean of what is there can be neither above nor below all of it.
    assert (filled.flatten(1).amax(1) <= image[:, ~gone].amax(1) + 1e-12).all()


@pytest.mark.parametrize("size", [(32, 32), (17, 40)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_imputation_is_the_released_one(size: tuple[int, int], share: float) -> None:
    torch.manual_seed(0)
    image = torch.randn(3, *size)
    scattered, blobs = torch.rand(size), F.interpolate(torch.rand(1, 1, 4, 4), size, mode="bilinear")[0, 0]
    for heat in (scattered, blobs):
        gone = heat >= heat.quantile(1 - share)
        theirs = NoisyLinearImputer(noise=0)(image, (~gone).float())
        torch.testing.assert_close(impute(image, gone), theirs, rtol=0, atol=1e-6)


class Similarity(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3 * 20 * 24, 8).requires_grad_(False)
        self.texts = F.normalize(torch.randn(2, 8), dim=-1)

    def encode(self, x: Tensor) -> Tensor:
        return F.normalize(self.layer(x.flatten(1)), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x) @ self.texts.T


def shared_case() -> tuple[Similarity, Tensor, Tensor]:
    """A model, images, and maps whose values all differ, after 1 - map in float32 as well."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 20, 24, generator=generator)
    maps = torch.stack([torch.randperm(480, generator=generator) for _ in range(6)]).view(3, 2, 20, 24) / 512
    return Similarity(), images, maps


def theirs(metric: Any, model: Similarity, images: Tensor, maps: Tensor) -> Tensor:
    """Their scores, one prompt a call, as (B * P,)."""
    found = [
        metric(images, maps[:, p].numpy(), [lambda row, p=p: row[p]] * len(images), model) for p in range(maps.shape[1])
    ]
    return torch.from_numpy(np.stack(found, axis=1)).flatten().double()


def test_scores_without_noise_are_the_released_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, maps = shared_case()
    monkeypatch.setattr(NoisyLinearImputer.__init__, "__defaults__", (0.0, NoisyLinearImputer.__init__.__defaults__[1]))
    columns = Road(noise=0).measure(model.encode, model.texts, images, maps, batch=7)
    percentiles = [10, 20, 30, 40, 50, 60, 70, 80, 90]
    for figure, metric in (
        ("road", ROADCombined()),
        ("MoRF", TheirMoRF(percentiles)),
        ("LeRF", TheirLeRF(percentiles)),
    ):
        torch.testing.assert_close(columns[figure], theirs(metric, model, images, maps), rtol=0, atol=1e-6)


def test_scores_with_the_same_noise_are_the_released_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs draw for the removed pixels alone and anew each time; ours are put in their place."""
    model, images, maps = shared_case()
    protocol = Road(percentiles=(30, 80), noise=0.01, seed=4)
    columns = protocol.measure(model.encode, model.texts, images, maps)
    now: dict[str, Tensor] = {}
    solve = NoisyLinearImputer.__call__

    def seen(self: NoisyLinearImputer, image: Tensor, mask: Tensor) -> Tensor:
        number = next(i for i, other in enumerate(images) if torch.equal(other, image))
        now["noise"] = protocol.pattern(tuple(image.shape), number).float()[:, mask == 0]
        return solve(self, image, mask)

    monkeypatch.setattr(NoisyLinearImputer, "__call__", seen)
    monkeypatch.setattr(torch, "randn_like", lambda like: now["noise"])
    torch.testing.assert_close(columns["road"], theirs(ROADCombined([30, 80]), model, images, maps), rtol=0, atol=1e-6)


def test_one_percentile_by_hand() -> None:
    model, images, maps = shared_case()
    columns = Road(percentiles=(25,), noise=0).measure(model.encode, model.texts, images, maps)
    for pair in range(6):
        image, heat = images[pair // 2], maps[pair // 2, pair % 2]
        left = 120  # ceil(0.25 * 479)
        for order, descending in (("MoRF", True), ("LeRF", False)):
            gone = torch.zeros(480, dtype=torch.bool)
            gone[heat.flatten().argsort(descending=descending)[: 480 - left]] = True
            change = model(impute(image, gone.view(20, 24))[None]) - model(image[None])
            assert float(columns[f"{order} 25"][pair]) == pytest.approx(float(change[0, pair % 2]), abs=1e-6)
    torch.testing.assert_close(columns["road"], (columns["LeRF 25"] - columns["MoRF 25"]) / 2)


def test_batches_numbers_and_the_forwards() -> None:
    model, images, maps = shared_case()
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += len(x)
        return model.encode(x)

    protocol, clock = Road(percentiles=(50, 90)), Clock()
    whole = protocol.measure(counted, model.texts, images, maps, clock=clock)
    assert calls == 3 + 3 * 2 * 4
    assert 0 < clock.forwards < clock.total
    parts = [
        protocol.measure(model.encode, model.texts, images[i : i + 1], maps[i : i + 1], first=i, batch=3)
        for i in range(3)
    ]
    for name, column in whole.items():
        torch.testing.assert_close(column, torch.cat([part[name] for part in parts]), rtol=0, atol=1e-6)


def test_a_constant_map_removes_a_share_and_not_everything() -> None:
    """Released code removes all pixels of a constant map, and solves a singular system."""
    protocol = Road()
    ranks = torch.arange(100).view(10, 10)
    for q in protocol.percentiles:
        assert int((~protocol.gone(ranks, "MoRF", q)).sum()) == int((~protocol.gone(ranks, "LeRF", q)).sum())
    model, images, _ = shared_case()
    columns = protocol.measure(model.encode, model.texts, images, torch.zeros(3, 2, 5, 6))
    assert all(column.isfinite().all() for column in columns.values())


def test_maps_of_a_grid_are_bilinear() -> None:
    model, images, _ = shared_case()
    maps = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    wide = F.interpolate(maps, (20, 24), mode="bilinear")
    a, b = (Road((40,)).measure(model.encode, model.texts, images, m)["road"] for m in (maps, wide))
    assert torch.equal(a, b)


def test_the_map_that_knows_best_wins() -> None:
    """The score is the mean of a bright spot: a map of the spot is better than none, and its negative is the worst."""
    image = torch.zeros(1, 1, 24, 24)
    image[..., 8:14, 9:15] = 1
    spot, even = image, torch.rand(1, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    maps = torch.cat((spot, even, -spot), dim=1)
    columns = Road(noise=0).measure(lambda x: x[:, :, 8:14, 9:15].mean((2, 3)), torch.ones(3, 1), image, maps)
    best, some, worst = columns["road"].tolist()
    assert best > some > worst
    assert best == pytest.approx(-worst, abs=0.05)


@pytest.mark.parametrize(
    "parameters", [{"percentiles": ()}, {"percentiles": (0,)}, {"percentiles": (100,)}, {"noise": -1}]
)
def test_bad_parameters(parameters: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Road(**parameters)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="none is"):
        impute(torch.zeros(3, 4, 4), torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="bool"):
        impute(torch.zeros(3, 4, 4), torch.ones(4, 5, dtype=torch.bool))
    model, images, maps = shared_case()
    with pytest.raises(InputError, match="must be"):
        Road().measure(model.encode, model.texts, images, maps[:2])
    with pytest.raises(InputError, match="NaN"):
        Road().measure(model.encode, model.texts, images, torch.full_like(maps, torch.nan))
