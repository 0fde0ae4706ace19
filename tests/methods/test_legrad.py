"""LeGrad against naive autograd at the attention, and against torchcam on torchvision's ViT with the same weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchcam.methods import LeGrad as TorchcamLeGrad
from torchvision.models import VisionTransformer

from clipfast.errors import InputError
from clipfast.methods import attention, legrad
from clipfast.methods.legrad import LeGrad
from clipfast.models.openclip import image_tower


def units(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def one_map(model, naive, t, layers):
    total = 0
    for a, after in zip(naive.a[-layers:], naive.after[-layers:], strict=True):
        z = F.normalize(model.visual.ln_post(after.mean(1)) @ model.visual.proj, dim=-1)
        (gradient,) = torch.autograd.grad(z[0] @ t, a, retain_graph=True)
        total = total + gradient[0].clamp(min=0).mean((0, 1))[1:]
    return total


@pytest.mark.parametrize(
    "variant",
    [{}, {"image_size": (48, 80)}, {"ls_init_value": 0.5, "quick_gelu": True}],
    ids=["square", "rectangular", "layer-scale"],
)
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("prompts", [1, 5])
@pytest.mark.parametrize(("piece", "rows"), [(attention.PIECE, legrad.ROWS), (1, 1), (2000, 100)])
def test_naive_autograd(build_clip, written_out, monkeypatch, variant, layers, prompts, piece, rows):
    monkeypatch.setattr(attention, "PIECE", piece)
    monkeypatch.setattr(legrad, "ROWS", rows)
    model = build_clip(**variant).double()
    x = torch.randn(2, 3, *variant.get("image_size", (64, 64)), dtype=torch.float64)
    own = units(2, prompts, 24)
    explained = LeGrad(layers=layers).image(image_tower(model), x)
    maps, shared = explained.maps(own), explained.maps(own[0])
    for b in range(2):
        naive = written_out(model, x[b : b + 1])
        torch.testing.assert_close(explained.z[b], naive.z[0].detach(), rtol=0, atol=1e-10)
        for p in range(prompts):
            # Gradients at single probabilities are small: what counts is their relative error.
            expected = one_map(model, naive, own[b, p], layers)
            torch.testing.assert_close(maps[b, p], expected, rtol=1e-9, atol=1e-14)
            expected = one_map(model, naive, own[0, p], layers)
            torch.testing.assert_close(shared[b, p], expected, rtol=1e-9, atol=1e-14)


def torchvision_twin(model, texts, size):
    """torchvision's VisionTransformer, whose attention is nn.MultiheadAttention, with the model's weights.

    Its head is the cosine with the texts, so that torchcam's own score projection, heads(ln(mean of tokens)), is the
    score that LeGrad explains. It has no norm before its blocks: neither may the model.
    """
    visual = model.visual
    width, blocks = visual.conv1.out_channels, visual.transformer.resblocks
    twin = VisionTransformer(
        image_size=size,
        patch_size=16,
        num_layers=len(blocks),
        num_heads=blocks[0].attn.num_heads,
        hidden_dim=width,
        mlp_dim=4 * width,
        norm_layer=partial(nn.LayerNorm, eps=visual.ln_post.eps),
    ).double()
    own = visual.state_dict()
    weights = {
        "class_token": own["class_embedding"][None, None],
        "conv_proj.weight": own["conv1.weight"],
        "conv_proj.bias": torch.zeros(width),
        "encoder.pos_embedding": own["positional_embedding"][None],
        "encoder.ln.weight": own["ln_post.weight"],
        "encoder.ln.bias": own["ln_post.bias"],
    }
    for key, value in own.items():
        if key.startswith("transformer.resblocks."):
            _, _, i, part = key.split(".", 3)
            for theirs, ours in (("self_attention.", "attn."), ("mlp.0", "mlp.c_fc"), ("mlp.3", "mlp.c_proj")):
                part = part.replace(ours, theirs)
            weights[f"encoder.layers.encoder_layer_{i}.{part}"] = value
    twin.heads = nn.Identity()
    twin.load_state_dict(weights)

    class Cosine(nn.Module):
        def forward(self, pooled):
            return F.normalize(pooled @ visual.proj, dim=-1) @ texts.T

    twin.heads = Cosine()
    return twin.eval()


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_torchcam(build_clip, layers):
    """torchcam averages the layers' maps where the authors and we sum them; all else is the same."""
    model = build_clip(no_ln_pre=True).double()
    x, texts = torch.randn(2, 3, 64, 64, dtype=torch.float64), units(4, 24)
    explained = LeGrad(layers=layers).image(image_tower(model), x)
    maps = explained.maps(texts)
    twin = torchvision_twin(model, texts, 64)
    with TorchcamLeGrad(twin, list(twin.encoder.layers)[-layers:]) as cam:
        scores = twin(x)
        torch.testing.assert_close(scores.detach(), explained.z @ texts.T, rtol=0, atol=1e-10)
        for p in range(4):
            (theirs,) = cam(p, scores, normalized=False, retain_graph=True)
            torch.testing.assert_close(maps[:, p], theirs.flatten(1) * layers, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_small_gradients(build_clip, dtype):
    """Gradients at single probabilities of a large tower are below float16's smallest numbers; here short texts are."""
    x, texts = torch.randn(1, 3, 64, 64), F.normalize(torch.randn(3, 24), dim=-1)
    exact = LeGrad().image(image_tower(build_clip()), x).maps(texts)
    found = LeGrad().image(image_tower(build_clip(), dtype), x).maps(texts * 1e-6) * 1e6
    assert found.dtype == torch.float32
    assert (found - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize("layers", [0, 1.5, True])
def test_bad_parameters(layers):
    with pytest.raises(InputError, match="must be a whole number, at least 1"):
        LeGrad(layers=layers)


def test_more_layers_than_blocks(build_clip):
    with pytest.raises(InputError, match="this tower has 3 blocks"):
        LeGrad(layers=4).image(image_tower(build_clip()), torch.randn(1, 3, 64, 64))
