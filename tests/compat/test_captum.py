"""captum's classes under clipfast's roof: captum's numbers, on CLIP and on anything else."""

from __future__ import annotations

import captum.attr as theirs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clipfast
from clipfast.compat import captum as ours
from clipfast.compat.score import Score
from clipfast.errors import InputError, TextError

# Releases before 0.9 do not carry the models of captum's own tests.
_models = pytest.importorskip("captum.testing.helpers.basic_models")
BasicModel_ConvNet_One_Conv, BasicModel_MultiLayer = _models.BasicModel_ConvNet_One_Conv, _models.BasicModel_MultiLayer

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}") for text in ("Input Tensor 0 did", "Setting forward", "You are")
]


@pytest.fixture
def score(build_clip) -> Score:
    texts = torch.randn(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Score(build_clip().double(), texts)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def cells() -> Tensor:
    return torch.arange(16).reshape(1, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)


CASES = {
    "IntegratedGradients": {"n_steps": 6, "return_convergence_delta": True},
    "Saliency": {"abs": False},
    "InputXGradient": {},
    "GradientShap": {"baselines": torch.zeros(2, 3, 64, 64, dtype=torch.float64), "n_samples": 3},
    "FeatureAblation": {"feature_mask": cells(), "perturbations_per_eval": 4},
    "Occlusion": {"sliding_window_shapes": (3, 32, 32), "strides": (3, 32, 32), "baselines": 0.5},
    "KernelShap": {"feature_mask": cells(), "n_samples": 5},
    "LayerIntegratedGradients": {"n_steps": 6},
    "LayerGradCam": {},
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_captums(score, x, name):
    layer = [score.module.visual.transformer.resblocks[-1].ln_1] if name.startswith("Layer") else []
    found = []
    for module in (theirs, ours):
        torch.manual_seed(0)
        np.random.seed(0)
        found.append(getattr(module, name)(score, *layer).attribute(x, target=2, **CASES[name]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    assert isinstance(getattr(ours, name)(score, *layer), getattr(theirs, name))
    assert "forward" not in vars(score.module.visual)


def test_the_stand_in_is_what_runs(score, x):
    method = ours.LayerIntegratedGradients(score, score.module.visual.transformer.resblocks[-1].ln_1)
    method.attribute(x, target=0, n_steps=10, internal_batch_size=2)
    # The check's one image, the images, and the baseline's.
    assert method._replay.encoded == 1 + len(x) + 1


def test_a_clipfast_model_is_a_forward_function_too(score, x):
    found = ours.Saliency(clipfast.load(score.module)).attribute(x, target=5)
    expected = theirs.Saliency(score.module.encode_image).attribute(x, target=5)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("outer", [theirs.NoiseTunnel])
def test_noise_tunnels_run_them_on_the_stand_in(score, x, outer):
    inner = ours.IntegratedGradients(score)
    torch.manual_seed(0)
    found = outer(inner).attribute(x, nt_samples=2, target=1, n_steps=3)
    torch.manual_seed(0)
    expected = outer(theirs.IntegratedGradients(score)).attribute(x, nt_samples=2, target=1, n_steps=3)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    assert inner._replay.rows == 1 + 2 * 2 * 3


def test_the_slot_for_gradients(score, x):
    method = theirs.Saliency(score)
    expected = method.attribute(x, target=1)
    method.gradient_func = ours.fast_gradient_func(score.model)
    torch.testing.assert_close(method.attribute(x, target=1), expected, rtol=1e-9, atol=1e-14)


def test_score_is_clips_own(score, x):
    z = F.normalize(score.module.encode_image(x), dim=-1)
    torch.testing.assert_close(score(x), z @ score.texts.T)
    scaled = Score(score.module, score.texts, scale=None)
    torch.testing.assert_close(scaled(x), score.module.logit_scale.exp() * z @ score.texts.T)
    assert "texts" not in score.state_dict()
    with pytest.raises(TextError, match="shape"):
        Score(score.module, torch.randn(2, 5))


def test_strings_are_encoded():
    demo = clipfast.load("demo")
    score = Score(demo, ["a dog", "a red car"])
    torch.testing.assert_close(score.texts, demo.encode_texts(["a dog", "a red car"]))


class ModelIg(nn.Module):
    def forward(self, v: Tensor) -> Tensor:
        return F.relu(F.relu(v[:, 0] - 1) - F.relu(v[:, 1]))


def test_literal_numbers_of_captums_own_tests():
    v = torch.tensor([[3.0, 1.0]])
    found, delta = ours.IntegratedGradients(ModelIg()).attribute(v, n_steps=500, return_convergence_delta=True)
    torch.testing.assert_close(found, torch.tensor([[1.5, -0.5]]), rtol=0, atol=0.05)
    assert delta.abs().max() < 0.07
    conv, image = BasicModel_ConvNet_One_Conv(), torch.arange(16.0).view(1, 1, 4, 4)
    torch.testing.assert_close(
        ours.LayerGradCam(conv, conv.conv1).attribute(image, target=0),
        torch.tensor([[[[11.25, 13.5], [20.25, 22.5]]]]),
        rtol=0,
        atol=0.01,
    )
    net, inputs = BasicModel_MultiLayer(), torch.tensor([[20.0, 50.0, 30.0]])
    for at_once in (1, 2, 3):
        ablated = ours.FeatureAblation(net).attribute(inputs, target=0, perturbations_per_eval=at_once)
        torch.testing.assert_close(ablated, torch.tensor([[80.0, 200.0, 120.0]]))
    occluded = ours.Occlusion(net).attribute(inputs, sliding_window_shapes=(2,), baselines=10, target=0)
    torch.testing.assert_close(occluded, torch.tensor([[200.0, 220.0, 240.0]]))
    torch.manual_seed(1234)
    shap = ours.KernelShap(net).attribute(inputs, target=0, n_samples=500)
    torch.testing.assert_close(shap, torch.tensor([[76.66666, 196.66666, 116.66666]]), rtol=0, atol=0.5)


def test_a_module_with_two_clips_is_not_guessed(build_clip):
    with pytest.raises(InputError, match="holds 2 CLIPs"):
        ours.Saliency(nn.ModuleList([build_clip(), build_clip()]))
