"""Grad-CAM against the authors' output of Grad-ECLIP, naive autograd, captum and pytorch-grad-cam."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import scale_cam_image
from torch import nn

from clipfast.errors import InputError
from clipfast.methods import grad_cam
from clipfast.methods.grad_cam import GradCam
from clipfast.models.openclip import image_tower, text_tower

VARIANTS = pytest.mark.parametrize(
    "variant",
    [{}, {"image_size": (48, 80)}, {"ls_init_value": 0.5, "quick_gelu": True}],
    ids=["square", "rectangular", "layer-scale"],
)


def units(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def one_map(naive, t, layer, counted, keep):
    """counted: the tokens of the mean; keep: those of the map."""
    h = naive.h[layer]
    (gradient,) = torch.autograd.grad(naive.z[0] @ t, h, retain_graph=True)
    return (h[0, keep] @ gradient[0, counted].mean(0)).relu().detach()


@pytest.mark.parametrize("kind", ["square", "wide"])
def test_published_maps(goldens, official, kind):
    explained = GradCam(heads="single").image(image_tower(official), goldens[f"{kind}.image"])
    text = goldens[f"{kind}.text"]
    found = explained.maps(text)[0]
    torch.testing.assert_close(found, goldens[f"{kind}.grad_cam"].flatten(1), rtol=0, atol=1e-9)
    torch.testing.assert_close((explained.z @ text.T)[0], goldens[f"{kind}.score"], rtol=0, atol=1e-9)


@VARIANTS
@pytest.mark.parametrize("mean_over", ["tokens", "patches"])
@pytest.mark.parametrize("layer", [-1, 2, 1, 0])
@pytest.mark.parametrize("heads", ["model", "single"])
@pytest.mark.parametrize("prompts", [1, 30])
def test_naive_autograd(build_clip, written_out, variant, layer, mean_over, heads, prompts):
    model = build_clip(**variant).double()
    x = torch.randn(2, 3, *variant.get("image_size", (64, 64)), dtype=torch.float64)
    own = units(2, prompts, 24)
    explained = GradCam(layer=layer, heads=heads, mean_over=mean_over).image(image_tower(model), x)
    maps, shared = explained.maps(own), explained.maps(own[0])
    assert maps.max() > 1e-4
    counted = slice(0 if mean_over == "tokens" else 1, None)
    for b in range(2):
        naive = written_out(model, x[b : b + 1], tuple(range(layer % 3, 3)) if heads == "single" else ())
        same(explained.z[b], naive.z[0].detach())
        for p in {0, prompts - 1}:
            same(maps[b, p], one_map(naive, own[b, p], layer, counted, slice(1, None)))
            same(shared[b, p], one_map(naive, own[0, p], layer, counted, slice(1, None)))


@pytest.mark.parametrize("mean_over", ["tokens", "patches"])
def test_norms_without_gain_and_bias(build_clip, written_out, mean_over):
    """Some models have no biases, and their norms nothing to learn."""
    model, x, t = build_clip().double(), torch.randn(1, 3, 64, 64, dtype=torch.float64), units(1, 24)
    block = model.visual.transformer.resblocks[-1]
    block.ln_1.weight = block.ln_1.bias = block.attn.in_proj_bias = None
    found = GradCam(mean_over=mean_over).image(image_tower(model), x).maps(t)[0, 0]
    counted = slice(0 if mean_over == "tokens" else 1, None)
    same(found, one_map(written_out(model, x), t[0], -1, counted, slice(1, None)))


def test_few_prompts_at_a_time(build_clip, monkeypatch):
    tower, x, texts = image_tower(build_clip().double()), torch.randn(2, 3, 64, 64, dtype=torch.float64), units(5, 24)
    whole = GradCam().image(tower, x).maps(texts)
    monkeypatch.setattr(grad_cam, "PIECE", 1)
    same(GradCam().image(tower, x).maps(texts), whole)


@pytest.mark.parametrize("mean_over", ["tokens", "patches"])
@pytest.mark.parametrize("layer", [-1, 1])
def test_features_give_the_maps_of_later_texts(build_clip, layer, mean_over):
    tower, x, texts = image_tower(build_clip().double()), torch.randn(2, 3, 64, 64, dtype=torch.float64), units(7, 24)
    explained = GradCam(layer=layer, mean_over=mean_over).image(tower, x)
    values, weights = explained.prompt_free()
    assert values.shape == (2, 16, 24)
    same((values @ texts.T).mT.relu() * weights[:, None], explained.maps(texts))


@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize("mean_over", ["tokens", "patches"])
def test_text_side(build_clip, written_out, two_texts, layer, mean_over):
    model, (ids, words, pooled), sides = build_clip().double(), two_texts, units(3, 24)
    # With their opposites, so that not all is below zero.
    sides = torch.cat((sides, -sides))
    explained = GradCam(layer=layer, mean_over=mean_over).text(text_tower(model), ids, words)
    maps = explained.maps(sides)
    assert maps.shape == (2, 6, 7) and (maps.amax((1, 2)) > 1e-4).all()
    for b, eot in enumerate(pooled):
        naive = written_out(model, ids[b : b + 1])
        same(explained.z[b], naive.z[0].detach())
        counted = slice(0, eot + 1) if mean_over == "tokens" else slice(1, eot)
        for p in range(6):
            same(maps[b, p, 1:eot], one_map(naive, sides[p], layer, counted, slice(1, eot)))
            assert maps[b, p, 0] == 0 and (maps[b, p, eot:] == 0).all()


class Cosines(nn.Module):
    def __init__(self, model, texts):
        super().__init__()
        self.model, self.texts = model, texts

    def forward(self, x):
        return F.normalize(self.model.encode_image(x), dim=-1) @ self.texts.T


class AsImage(nn.Module):
    """Captum weighs channels in the second dimension: shows a block's tokens with channels there, in passing."""

    def __init__(self, block, mean_over):
        super().__init__()
        self.block, self.mean_over, self.shown = block, mean_over, nn.Identity()

    def forward(self, h, **kwargs):
        h = self.block(h, **kwargs).mT
        if self.mean_over == "tokens":
            return self.shown(h).mT
        return torch.cat((h[..., :1], self.shown(h[..., 1:])), dim=-1).mT


@VARIANTS
@pytest.mark.parametrize("mean_over", ["tokens", "patches"])
@pytest.mark.parametrize("layer", [-1, 1])
def test_captum(build_clip, variant, layer, mean_over):
    model = build_clip(**variant).double()
    x = torch.randn(2, 3, *variant.get("image_size", (64, 64)), dtype=torch.float64)
    texts = units(3, 24)
    found = GradCam(layer=layer, mean_over=mean_over).image(image_tower(model), x).maps(texts)
    blocks = model.visual.transformer.resblocks
    blocks[layer % 3 - 1] = watched = AsImage(blocks[layer % 3 - 1], mean_over)
    cam = LayerGradCam(Cosines(model, texts), watched.shown)
    for p in range(3):
        theirs = cam.attribute(x, target=p, relu_attributions=True)[:, 0].detach()
        same(found[:, p], theirs[:, 1:] if mean_over == "tokens" else theirs)


@VARIANTS
@pytest.mark.parametrize("layer", [-1, 1])
def test_pytorch_grad_cam(build_clip, variant, layer):
    """As released: its maps come min-maxed and at the input's size, in float32. Its blocks' outputs are our inputs."""
    model = build_clip(**variant).double()
    size = variant.get("image_size", (64, 64))
    grid = tuple(s // 16 for s in size)
    x, texts = torch.randn(2, 3, *size, dtype=torch.float64), units(3, 24)
    found = GradCam(layer=layer, mean_over="patches").image(image_tower(model), x).maps(texts).unflatten(-1, grid)
    with GradCAM(
        Cosines(model, texts),
        [model.visual.transformer.resblocks[layer % 3 - 1]],
        reshape_transform=lambda t: t[:, 1:].transpose(1, 2).unflatten(2, grid),
    ) as cam:
        for p in range(3):
            theirs = cam(x, [lambda cosines, p=p: cosines[p]] * 2)
            ours = scale_cam_image(scale_cam_image(found[:, p].numpy(), size[::-1]))
            assert np.abs(ours - theirs).max() < 1e-5 and theirs.max() > 0.9


@pytest.mark.parametrize(
    ("parameters", "message"),
    [({"heads": "two"}, "heads='two' is not a choice"), ({"mean_over": "all"}, "mean_over='all' is not a choice")],
)
def test_bad_parameters(parameters, message):
    with pytest.raises(InputError, match=message):
        GradCam(**parameters)
