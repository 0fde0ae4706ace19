"""pytorch-grad-cam's classes under clipfast's roof: the library's maps, and what it cannot do."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_grad_cam as theirs
import torch
from torch import Tensor

import clipfast
from clipfast.compat import grad_cam as ours
from clipfast.compat.accelerate import accelerate
from clipfast.compat.score import Score
from clipfast.errors import InputError, ModelError

pytestmark = pytest.mark.filterwarnings("ignore")
GRID = (4, 4)


@pytest.fixture
def score(build_clip) -> Score:
    return Score(build_clip(), torch.randn(3, 24, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def reshape(t: Tensor) -> Tensor:
    return t[:, 1:].transpose(1, 2).unflatten(2, GRID)


def layers(score: Score) -> list:
    return [score.module.visual.transformer.resblocks[-1].ln_1]


TARGETS = [lambda row: row[0], lambda row: row[2] - row[1], lambda row: row[1]]


@pytest.mark.parametrize("name", [n for n in ours.__all__ if n != "GradECLIP"])
@pytest.mark.parametrize("targets", [TARGETS, None])
def test_maps_are_the_librarys(score, x, name, targets):
    expected, found = (
        getattr(module, name)(score, layers(score), reshape_transform=reshape)(x, targets) for module in (theirs, ours)
    )
    assert found.dtype == np.float32
    assert found.shape == (3, 64, 64)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_smoothing_and_the_context_manager(score, x):
    with theirs.GradCAM(score, layers(score), reshape_transform=reshape) as cam:
        expected = cam(x, TARGETS, aug_smooth=True, eigen_smooth=True)
    with ours.GradCAM(score, layers(score), reshape_transform=reshape) as cam:
        found = cam(x, TARGETS, aug_smooth=True, eigen_smooth=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert not layers(score)[0]._forward_hooks


def test_too_few_targets_are_an_error(score, x):
    for cam in (ours.GradCAM(score, layers(score), reshape_transform=reshape), ours.GradECLIP(score)):
        with pytest.raises(InputError, match="1 targets came for 3 images"):
            cam(x, TARGETS[:1])


def test_frozen_and_in_bfloat16(score, x):
    expected = ours.GradCAM(score, layers(score), reshape_transform=reshape)(x, TARGETS)
    score.module.requires_grad_(False)
    frozen = ours.GradCAM(score, layers(score), reshape_transform=reshape)(x, TARGETS)
    np.testing.assert_allclose(frozen, expected, rtol=0, atol=1e-6)
    half = Score(score.module.bfloat16(), score.texts)
    cam = ours.GradCAM(half, layers(half), reshape_transform=reshape)
    found = cam(x.bfloat16(), TARGETS)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.9
    assert ours.GradECLIP(half)(x, None).shape == (3, 64, 64)


def test_grad_eclip_is_the_methods(score, x):
    found = ours.GradECLIP(score)(x, [lambda row: row[1]] * 3)
    raw = clipfast.Explainer(score.model)(x, score.texts[1:2]).maps[:, 0]
    unit = (raw - raw.amin((1, 2), keepdim=True)) / (raw.amax((1, 2), keepdim=True) - raw.amin((1, 2), keepdim=True))
    large = torch.nn.functional.interpolate(unit[:, None], size=(64, 64), mode="bilinear")[:, 0]
    large = (large - large.amin((1, 2), keepdim=True)) / (
        large.amax((1, 2), keepdim=True) - large.amin((1, 2), keepdim=True)
    )
    np.testing.assert_allclose(found, large, rtol=0, atol=1e-2)
    assert found.min() == 0
    assert found.dtype == np.float32


def test_grad_eclip_of_any_function_of_the_scores(score, x):
    cam = ours.GradECLIP(score, signed=True)
    explainer = clipfast.Explainer(score.model, signed=True)
    # A difference of two scores has the difference of their maps.
    found = cam(x, [lambda row: row[0] - row[2]] * 3)
    maps = explainer(x, score.texts).maps
    expected = (maps[:, 0] - maps[:, 2]).clamp(min=0)
    peaks = expected.flatten(1).argmax(1)
    assert cam.outputs.shape == (3, 3)
    for heat, peak in zip(found, peaks.tolist(), strict=True):
        row, column = divmod(peak, 4)
        assert heat[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16].max() > 0.99


def test_road_is_the_librarys(score, x):
    from pytorch_grad_cam.metrics.road import ROADCombined

    cams = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(2)).numpy()
    score.eval()
    torch.manual_seed(0)
    expected = ROADCombined(percentiles=[30, 70])(x, cams, TARGETS, score)
    torch.manual_seed(0)
    with accelerate("pytorch_grad_cam", model=score.model) as (replay,):
        found = ROADCombined(percentiles=[30, 70])(x, cams, TARGETS, score)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    # The check's image, the three images once, and three times four changed ones.
    assert replay.encoded == 1 + 3 + 12


def test_grad_eclip_wants_a_score(build_clip):
    with pytest.raises(ModelError, match="Score"):
        ours.GradECLIP(build_clip())
