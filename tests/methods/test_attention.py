"""Attention and rollout against the authors' output, and against full matrices from the model's own modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clipfast.errors import InputError
from clipfast.methods import attention
from clipfast.methods.attention import Attention, Rollout
from clipfast.models.openclip import image_tower, text_tower

VARIANTS = pytest.mark.parametrize(
    "variant",
    [{}, {"image_size": (48, 80)}, {"ls_init_value": 0.5, "quick_gelu": True}],
    ids=["square", "rectangular", "layer-scale"],
)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def images(variant, batch=2):
    return torch.randn(batch, 3, *variant.get("image_size", (64, 64)), dtype=torch.float64)


def units(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("kind", ["square", "wide"])
def test_published_self_attention(goldens, official, kind):
    explained = Attention(heads="single").image(image_tower(official), goldens[f"{kind}.image"])
    found = explained.maps(goldens[f"{kind}.text"])[0]
    expected = goldens[f"{kind}.self_attn"].flatten()
    torch.testing.assert_close(found, expected.expand(3, -1), rtol=0, atol=1e-9)
    several = Attention().image(image_tower(official), goldens[f"{kind}.image"]).maps(goldens[f"{kind}.text"])[0]
    assert (several - expected).abs().max() > 1e-4


@VARIANTS
@pytest.mark.parametrize("layer", [0, 1, 2, -1, -3])
def test_attention_of_any_block(build_clip, written_out, variant, layer):
    model, x, texts = build_clip(**variant).double(), images(variant), units(4, 24)
    explained = Attention(layer=layer).image(image_tower(model), x)
    maps = explained.maps(texts)
    assert maps.shape[1] == 4
    for b in range(2):
        naive = written_out(model, x[b : b + 1])
        same(explained.z[b], naive.z[0])
        for p in range(4):
            same(maps[b, p], naive.a[layer][0, :, 0, 1:].mean(0))


@VARIANTS
@pytest.mark.parametrize("start", [0, 1, -1])
@pytest.mark.parametrize("piece", [attention.PIECE, 1])
def test_rollout_is_the_product_of_full_matrices(build_clip, written_out, monkeypatch, variant, start, piece):
    monkeypatch.setattr(attention, "PIECE", piece)
    model, x, texts = build_clip(**variant).double(), images(variant), units(3, 24)
    explained = Rollout(start_layer=start).image(image_tower(model), x)
    maps = explained.maps(texts.expand(2, -1, -1))
    for b in range(2):
        naive = written_out(model, x[b : b + 1])
        same(explained.z[b], naive.z[0])
        product = torch.eye(naive.a[0].shape[-1], dtype=torch.float64)
        for a in naive.a[start:]:
            step = a[0].mean(0) + torch.eye(len(product), dtype=torch.float64)
            product = step / step.sum(-1, keepdim=True) @ product
        for p in range(3):
            same(maps[b, p], product[0, 1:])


def test_rollout_of_the_last_block_is_half_its_attention(build_clip):
    tower, x, texts = image_tower(build_clip()), torch.randn(2, 3, 64, 64), F.normalize(torch.randn(2, 24), dim=-1)
    half = Rollout(start_layer=-1).image(tower, x).maps(texts)
    torch.testing.assert_close(half * 2, Attention().image(tower, x).maps(texts))


@pytest.mark.parametrize("method", [Attention(), Attention(layer=0), Rollout(), Rollout(start_layer=1)])
def test_text_side(build_clip, written_out, two_texts, method):
    model, (ids, words, pooled) = build_clip().double(), two_texts
    explained = method.text(text_tower(model), ids, words)
    maps = explained.maps(units(2, 24))
    assert maps.shape == (2, 2, 7)
    for b, eot in enumerate(pooled):
        naive = written_out(model, ids[b : b + 1])
        same(explained.z[b], naive.z[0])
        if isinstance(method, Attention):
            row = naive.a[method.layer][0].mean(0)[eot]
        else:
            product = torch.eye(20, dtype=torch.float64)
            for a in naive.a[method.start_layer :]:
                product = (a[0].mean(0) + torch.eye(20, dtype=torch.float64)) / 2 @ product
            row = product[eot]
        for found in maps[b]:
            same(found[1:eot], row[1:eot])
            assert found[0] == 0 and (found[eot:] == 0).all()


def test_blocks_that_are_not_there(build_clip):
    tower, x = image_tower(build_clip()), torch.randn(1, 3, 64, 64)
    for method in (Attention(layer=3), Attention(layer=-4), Rollout(start_layer="all")):
        with pytest.raises(InputError, match="is no block of this tower of 3"):
            method.image(tower, x)
    with pytest.raises(InputError, match="heads='two' is not a choice"):
        Attention(heads="two")
