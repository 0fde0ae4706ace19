"""Chefer's GAME against the recursion over full matrices and autograd on the model's own modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clipfast.errors import InputError
from clipfast.methods import attention, chefer
from clipfast.methods.chefer import Chefer
from clipfast.models.openclip import image_tower, text_tower

VARIANTS = pytest.mark.parametrize(
    "variant",
    [{}, {"image_size": (48, 80)}, {"ls_init_value": 0.5, "quick_gelu": True}],
    ids=["square", "rectangular", "layer-scale"],
)


def units(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def relevance(naive, t, start, scale=1.0):
    """R (N, N) of one image or text and one prompt."""
    r = torch.eye(naive.a[0].shape[-1], dtype=torch.float64)
    attentions = naive.a[start:]
    gradients = torch.autograd.grad(scale * (naive.z[0] @ t), attentions, retain_graph=True)
    for a, gradient in zip(attentions, gradients, strict=True):
        r = r + (gradient * a)[0].clamp(min=0).mean(0) @ r
    return r


@VARIANTS
@pytest.mark.parametrize("prompts", [1, 5])
@pytest.mark.parametrize("start", [-1, 2, 1, 0])
def test_the_recursion_over_full_matrices(build_clip, written_out, variant, start, prompts):
    model = build_clip(**variant).double()
    x = torch.randn(2, 3, *variant.get("image_size", (64, 64)), dtype=torch.float64)
    own = units(2, prompts, 24)
    explained = Chefer(start_layer=start).image(image_tower(model), x)
    maps, shared = explained.maps(own), explained.maps(own[0])
    assert maps.abs().amax(-1).min() > 1e-5
    for b in range(2):
        naive = written_out(model, x[b : b + 1])
        torch.testing.assert_close(explained.z[b], naive.z[0].detach(), rtol=0, atol=1e-10)
        for p in range(prompts):
            expected = relevance(naive, own[b, p], start)[0, 1:].detach()
            torch.testing.assert_close(maps[b, p], expected, rtol=0, atol=1e-10)
            expected = relevance(naive, own[0, p], start)[0, 1:].detach()
            torch.testing.assert_close(shared[b, p], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("start", [-1, 0])
def test_the_logit_is_the_score_that_the_authors_explain(build_clip, written_out, start):
    model, x, texts = build_clip().double(), torch.randn(1, 3, 64, 64, dtype=torch.float64), units(2, 24)
    maps = Chefer(start_layer=start, score="logit").image(image_tower(model), x).maps(texts)[0]
    naive = written_out(model, x)
    scale = float(model.logit_scale.detach().exp())
    assert scale > 5
    for found, t in zip(maps, texts, strict=True):
        expected = relevance(naive, t, start, scale)[0, 1:].detach()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    cosine = Chefer(start_layer=start).image(image_tower(model), x).maps(texts)[0]
    if start == -1:
        torch.testing.assert_close(maps, cosine * scale)
    else:
        assert (maps / maps.norm() - cosine / cosine.norm()).norm() > 1e-3


@pytest.mark.parametrize("start", [-1, 0])
def test_a_few_heads_or_prompts_at_a_time(build_clip, monkeypatch, start):
    tower, x = image_tower(build_clip().double()), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    texts = units(5, 24)
    whole = Chefer(start_layer=start).image(tower, x).maps(texts)
    for module in (attention, chefer):
        monkeypatch.setattr(module, "PIECE", 1)
    torch.testing.assert_close(Chefer(start_layer=start).image(tower, x).maps(texts), whole)


@pytest.mark.parametrize("start", [-1, 1, 0])
def test_text_side(build_clip, written_out, two_texts, start):
    model, (ids, words, pooled), sides = build_clip().double(), two_texts, units(3, 24)
    explained = Chefer(start_layer=start).text(text_tower(model), ids, words)
    maps = explained.maps(sides)
    assert maps.shape == (2, 3, 7)
    for b, eot in enumerate(pooled):
        naive = written_out(model, ids[b : b + 1])
        torch.testing.assert_close(explained.z[b], naive.z[0].detach(), rtol=0, atol=1e-10)
        for p in range(3):
            expected = relevance(naive, sides[p], start)[eot].detach()
            torch.testing.assert_close(maps[b, p, 1:eot], expected[1:eot], rtol=0, atol=1e-10)
            assert maps[b, p, 0] == 0 and (maps[b, p, eot:] == 0).all()


def test_bad_parameters(build_clip):
    with pytest.raises(InputError, match="score='loss' is not a choice"):
        Chefer(score="loss")
    with pytest.raises(InputError, match="start_layer=7 is no block of this tower of 3"):
        Chefer(start_layer=7).image(image_tower(build_clip()), torch.randn(1, 3, 64, 64))
