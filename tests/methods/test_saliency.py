"""Saliency and SmoothGrad against captum, and against autograd on the model, an image and a prompt at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from captum.attr import Saliency as CaptumSaliency
from torch import Tensor

from clipfast.errors import InputError
from clipfast.methods.saliency import Saliency, SmoothGrad
from clipfast.models import tower as towers
from clipfast.models.openclip import image_tower, text_tower

VARIANTS = pytest.mark.parametrize(
    "variant",
    [{}, {"image_size": (48, 80)}, {"ls_init_value": 0.5, "quick_gelu": True}],
    ids=["square", "rectangular", "layer-scale"],
)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def naive(model, x: Tensor, text: Tensor) -> Tensor:
    """The map (H * W) of one image (3, H, W)."""
    x = x.clone().requires_grad_()
    (F.normalize(model.encode_image(x[None]), dim=-1) @ text).sum().backward()
    return x.grad.abs().sum(0).flatten()


def same(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


@VARIANTS
def test_saliency_equals_naive_autograd_and_captum(build_clip, variant):
    model = build_clip(**variant).double()
    x, texts = torch.randn(2, 3, *variant.get("image_size", (64, 64)), dtype=torch.float64), unit(3, 24)
    tower = image_tower(model)
    explained = Saliency().image(tower, x)
    maps = explained.maps(texts)
    assert Saliency().grid(tower, (64, 80)) == (64, 80)
    own = explained.maps(texts[torch.tensor([[0, 1, 2], [2, 0, 1]])])
    for i in range(2):
        for p in range(3):
            same(maps[i, p], naive(model, x[i], texts[p]))
        same(own[i], maps[i, [[0, 1, 2], [2, 0, 1]][i]])
    captum = CaptumSaliency(lambda x: F.normalize(model.encode_image(x), dim=-1) @ texts[1])
    same(maps[:, 1], captum.attribute(x.clone().requires_grad_()).sum(1).flatten(1).detach())


def test_saliency_of_words_equals_naive_autograd(build_clip):
    model = build_clip().double()
    ids = torch.zeros(2, 20, dtype=torch.long)
    ids[0, :7] = torch.tensor([298, 5, 9, 33, 120, 77, 299])
    ids[1, :4] = torch.tensor([298, 250, 3, 299])
    words = torch.zeros_like(ids)
    words[0, 1:6] = torch.tensor([1, 2, 2, 3, 4])
    words[1, 1:3] = torch.tensor([1, 2])
    images = unit(3, 24)
    maps = Saliency().text(text_tower(model), ids, words).maps(images)
    for i, pooled in enumerate((6, 3)):
        for p in range(3):
            embedded = model.token_embedding(ids[i : i + 1]).detach().requires_grad_()
            h = embedded + model.positional_embedding
            for block in model.transformer.resblocks:
                h = block(h, attn_mask=model.attn_mask.double())
            (F.normalize(model.ln_final(h)[:, pooled] @ model.text_projection, dim=-1) @ images[p]).sum().backward()
            same(maps[i, p], embedded.grad.abs().sum(-1)[0, :7] * (words[i, :7] > 0))


@VARIANTS
def test_smooth_grad_is_the_mean_over_noisy_copies(build_clip, variant):
    model = build_clip(**variant).double()
    x, texts = torch.randn(2, 3, *variant.get("image_size", (64, 64)), dtype=torch.float64), unit(2, 24)
    x[1] *= 3
    maps = SmoothGrad(samples=3, sigma=0.2, seed=11).image(image_tower(model), x).maps(texts)
    generator = torch.Generator().manual_seed(11)
    noise = [torch.randn(x.shape[1:], generator=generator).double() for _ in range(3)]
    for i in range(2):
        copies = [x[i] + 0.2 * (x[i].max() - x[i].min()) * e for e in noise]
        for p in range(2):
            same(maps[i, p], torch.stack([naive(model, c, texts[p]) for c in copies]).mean(0))


def test_smooth_grad_depends_on_the_seed_alone(build_clip, monkeypatch):
    tower, x, texts = image_tower(build_clip().double()), torch.randn(3, 3, 64, 64, dtype=torch.float64), unit(2, 24)
    method = SmoothGrad(samples=7)
    whole = method.image(tower, x).maps(texts)
    same(method.image(tower, x[[2, 0]]).maps(texts), whole[[2, 0]])
    monkeypatch.setattr(towers, "CPU_TOKENS", 17)
    same(method.image(tower, x).maps(texts), whole)
    assert (SmoothGrad(samples=7, seed=1).image(tower, x).maps(texts) - whole).norm() > 0.01 * whole.norm()


def test_no_noise_is_saliency(build_clip):
    tower, x, texts = image_tower(build_clip().double()), torch.randn(2, 3, 64, 64, dtype=torch.float64), unit(2, 24)
    same(SmoothGrad(samples=2, sigma=0).image(tower, x).maps(texts), Saliency().image(tower, x).maps(texts))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)])
def test_precision_of_the_trunk(build_clip, dtype, tolerance):
    x, texts = torch.randn(2, 3, 64, 64), unit(3, 24)
    for method in (Saliency(), SmoothGrad(samples=3)):
        exact = method.image(image_tower(build_clip().double()), x.double()).maps(texts)
        maps = method.image(image_tower(build_clip(), dtype), x.to(dtype)).maps(texts.float())
        assert maps.dtype == torch.float32
        assert (maps - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"samples": 0}, "samples=0 of SmoothGrad must be a whole number, at least 1"),
        ({"sigma": -0.1}, "sigma=-0.1"),
        ({"seed": 0.5}, "seed=0.5"),
    ],
)
def test_bad_parameters(parameters, message):
    with pytest.raises(InputError, match=message):
        SmoothGrad(**parameters)
