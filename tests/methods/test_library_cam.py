"""CAMs of convolutional CLIPs against pytorch-grad-cam as released, hooked to open_clip's and timm's own modules."""

from __future__ import annotations

import copy
import sys
from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clipfast
from clipfast.errors import InputError
from clipfast.methods import METHODS
from clipfast.models.conv import conv_tower
from clipfast.models.resnet import resnet_tower

NAMES = {"grad_cam": "GradCAM", "grad_cam++": "GradCAMPlusPlus", "xgrad_cam": "XGradCAM", "layer_cam": "LayerCAM"}
LAYERS = {-1: "layer4.1", "layer4.0": "layer4.0", "layer3": "layer3.0"}


class Unit(nn.Module):
    """What the library explains: the unit embeddings of a copy of the model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.visual = copy.deepcopy(model.visual)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.visual(x), dim=-1)


def released(name: str, model: nn.Module, layer: str, x: Tensor, texts: Tensor) -> Tensor:
    """ReLU of the raw maps (B, P, h, w), taken where the library would go on to resize and min-max them."""

    class Raw(getattr(pytorch_grad_cam, name)):
        def get_cam_image(self, *args: Any, **kwargs: Any) -> Any:
            self.raw = super().get_cam_image(*args, **kwargs)
            return self.raw

    unit, maps = Unit(model), []
    for text in texts:
        with Raw(unit, [unit.visual.get_submodule(layer)]) as cam:
            cam(x, targets=[lambda z, text=text: z @ text] * len(x))
        maps.append(torch.from_numpy(np.maximum(cam.raw, 0)))
    return torch.stack(maps, dim=1)


def blotches(batch: int) -> Tensor:
    """Images: pixel noise would look alike everywhere after so much pooling."""
    return F.interpolate(torch.randn(batch, 3, 5, 5, dtype=torch.float64), size=(96, 96), mode="bilinear")


@pytest.fixture
def texts() -> Tensor:
    return F.normalize(torch.randn(4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), dim=-1)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", NAMES)
def test_raw_maps_are_the_librarys(name, layer, build_resnet, texts):
    model = build_resnet().double()
    x = blotches(3)
    expected = released(NAMES[name], model, LAYERS[layer], x, texts)
    method, tower = METHODS[name](layer=layer), resnet_tower(model)
    explained = method.image(tower, x)
    assert method.grid(tower, (96, 96)) == expected.shape[2:]
    for _ in range(2):
        torch.testing.assert_close(explained.maps(texts), expected.flatten(2), rtol=1e-9, atol=1e-14)
    own = torch.stack([texts[:2], texts[1:3], texts[2:]])
    for i, maps in enumerate(explained.maps(own)):
        torch.testing.assert_close(maps, expected[i, i : i + 2].flatten(1), rtol=1e-9, atol=1e-14)
    assert ((expected.amax((2, 3)) - expected.amin((2, 3))) > 0.1 * expected.amax((2, 3))).any()


@pytest.mark.parametrize(("layer", "module"), [(-1, "trunk.stages.3"), ("stages.2", "trunk.stages.2")])
@pytest.mark.parametrize("name", NAMES)
def test_raw_maps_of_a_convnext_are_the_librarys(name, layer, module, build_stages, texts):
    model, x = build_stages().double(), blotches(2)
    expected = released(NAMES[name], model, module, x, texts)
    method, tower = METHODS[name](layer=layer), conv_tower(model)
    assert method.grid(tower, (96, 96)) == expected.shape[2:] and (expected > 0).any()
    torch.testing.assert_close(method.image(tower, x).maps(texts), expected.flatten(2), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_images_and_prompts_in_one_call(name, build_resnet, tokenizer):
    model = build_resnet()
    x, texts = blotches(5), ["a dog", "two boats", "a red car"]
    double = copy.deepcopy(model).double()
    embeddings = double.encode_text(tokenizer(texts), normalize=True).detach()
    expected = released(NAMES[name], double, "layer4.1", x, embeddings)
    out = clipfast.explain(x, texts, model=clipfast.load(model, tokenizer=tokenizer), method=name)
    assert out.maps.shape == (5, 3, 3, 3) and out.maps.dtype == torch.float32
    assert (out.maps - expected).norm() / expected.norm() < 1e-5
    torch.testing.assert_close(out.scores.double(), Unit(double)(x).detach() @ embeddings.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prompts", [1, 26])
@pytest.mark.parametrize("layer", LAYERS)
def test_grad_cam_equals_its_formula(layer, prompts, build_resnet):
    """One image and one prompt at a time, by automatic differentiation through the whole module."""
    model = build_resnet().double()
    x, kept = blotches(2), {}
    texts = F.normalize(torch.randn(prompts, 24, dtype=torch.float64), dim=-1)
    found = METHODS["grad_cam"](layer=layer).image(resnet_tower(model), x)
    unit = Unit(model)
    unit.visual.get_submodule(LAYERS[layer]).register_forward_hook(lambda _, __, made: kept.update(made=made))
    for i, maps in enumerate(found.maps(texts)):
        for text, m in zip(texts, maps, strict=True):
            score = (unit(x[i : i + 1]) @ text).sum()
            (gradient,) = torch.autograd.grad(score, kept["made"])
            expected = (gradient.mean((2, 3), keepdim=True) * kept["made"]).sum(1).relu()
            torch.testing.assert_close(m, expected.detach().flatten(), rtol=0, atol=1e-12)
            torch.testing.assert_close((found.z @ text)[i], score.detach())


def test_grad_cam_features_of_a_resnet(build_resnet, texts):
    module = build_resnet().double()
    explainer = clipfast.Explainer(clipfast.load(module), "grad_cam")
    x = blotches(3)
    torch.testing.assert_close(explainer.features(x).maps(texts).maps, explainer(x, texts).maps, rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="heads='single' of GradCam is for transformers"):
        clipfast.explain(x, texts, model=module, method="grad_cam", heads="single")


def test_without_the_library(build_resnet, texts, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(InputError, match=r"need the pytorch-grad-cam library: pip install 'clipfast\[cam\]'"):
        METHODS["xgrad_cam"]().image(resnet_tower(build_resnet()), torch.randn(1, 3, 96, 96))
