"""Gradients of ResNet CLIPs in their pixels, against automatic differentiation and captum on the module itself."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients as CaptumIntegratedGradients
from torch import Tensor

import clipfast
from clipfast.errors import InputError
from clipfast.methods.integrated_gradients import IntegratedGradients
from clipfast.methods.saliency import Saliency, SmoothGrad
from clipfast.models.resnet import resnet_tower


@pytest.fixture
def model(build_resnet):
    return build_resnet().double().requires_grad_(False)


@pytest.fixture
def x() -> Tensor:
    return F.interpolate(torch.randn(2, 3, 5, 5, dtype=torch.float64), size=(96, 96), mode="bilinear")


@pytest.fixture
def texts() -> Tensor:
    return F.normalize(torch.randn(3, 24, dtype=torch.float64), dim=-1)


def naive_saliency(model, x: Tensor, texts: Tensor) -> Tensor:
    maps = []
    for image in x:
        for text in texts:
            pixels = image.clone()[None].requires_grad_()
            score = model.encode_image(pixels, normalize=True)[0] @ text
            maps.append(torch.autograd.grad(score, pixels)[0].abs().sum(1).flatten())
    return torch.stack(maps).unflatten(0, (len(x), len(texts)))


def test_saliency(model, x, texts):
    found = Saliency().image(resnet_tower(model), x)
    for _ in range(2):
        torch.testing.assert_close(found.maps(texts), naive_saliency(model, x, texts), rtol=1e-9, atol=1e-14)
    assert not x.requires_grad


def test_smooth_grad(model, x, texts):
    generator = torch.Generator().manual_seed(5)
    spread = 0.2 * (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))
    copies = [x + spread * torch.randn(3, 96, 96, generator=generator).double() for _ in range(4)]
    expected = sum(naive_saliency(model, noisy, texts) for noisy in copies) / 4
    found = SmoothGrad(samples=4, sigma=0.2, seed=5).image(resnet_tower(model), x).maps(texts)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


def test_integrated_gradients(model, x, texts):
    found = IntegratedGradients(steps=7, baseline=torch.full((3, 1, 1), 0.3)).image(resnet_tower(model), x)
    maps, start = found.maps(texts), torch.full_like(x, 0.3)
    for p, text in enumerate(texts):
        captum = CaptumIntegratedGradients(lambda image, t=text: model.encode_image(image, normalize=True) @ t)
        expected, delta = captum.attribute(x, start, n_steps=7, method="gausslegendre", return_convergence_delta=True)
        # captum's table of nodes is good to six digits or so.
        torch.testing.assert_close(maps[:, p], expected.sum(1).flatten(1), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(found.extras()["delta"][:, p], delta, rtol=1e-5, atol=1e-7)
    with pytest.raises(InputError, match="at='tokens' needs patches linear in the pixels: those of a ResNet are not"):
        IntegratedGradients(at="tokens").image(resnet_tower(model), x)


@pytest.mark.parametrize("method", ["saliency", "integrated_gradients"])
def test_pixels_beyond_the_last_place_get_nothing(model, x, texts, method):
    images, parameters = F.pad(x, (0, 20, 0, 7), value=1.0), {"steps": 3} if method != "saliency" else {}
    out = clipfast.explain(images, texts, model=clipfast.load(copy.deepcopy(model)), method=method, **parameters)
    assert out.maps.shape == (2, 3, 103, 116)
    assert (out.maps[..., 96:, :] == 0).all() and (out.maps[..., 96:] == 0).all()
    assert out.maps[..., :96, :96].abs().amax((2, 3)).min() > 0
