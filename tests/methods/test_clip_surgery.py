"""CLIP Surgery against its published form: tensors of (tokens, prompts, channels), one image at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor

from clipfast.errors import InputError
from clipfast.methods.clip_surgery import ClipSurgery
from clipfast.models.openclip import image_tower


def surgery_features(model: CLIP, x: Tensor, layers: int) -> Tensor:
    """Unit embeddings of all tokens of one image (1, 3, H, W): the class token's from the model's path, (1, N, E)."""
    visual, kept = model.visual, []
    blocks = list(visual.transformer.resblocks)
    hooks = [block.register_forward_hook(lambda module, args, out: kept.append((args[0], out))) for block in blocks]
    model.encode_image(x)
    for hook in hooks:
        hook.remove()
    path = kept[-layers][0]
    for block, (h, _) in list(zip(blocks, kept, strict=True))[-layers:]:
        attn = block.attn
        v = F.linear(block.ln_1(h), attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)[2]
        v = v.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        a = (v @ v.mT * v.shape[-1] ** -0.5).softmax(-1)
        path = path + block.ls_1(attn.out_proj((a @ v).transpose(1, 2).flatten(2)))
    path = torch.cat((kept[-1][1][:, :1], path[:, 1:]), dim=1)
    return F.normalize(visual.ln_post(path) @ visual.proj, dim=-1).detach()


def feature_surgery(features: Tensor, texts: Tensor) -> Tensor:
    """(P, n): every product of a token's and a prompt's channel on its own, less its mean over prompts."""
    weight = (2 * features[0, :1] @ texts.T).softmax(-1)
    weight = weight / weight.mean(-1, keepdim=True)
    products = features[0, :, None] * texts[None] * weight[..., None]  # (N, P, E)
    return (products - products.mean(1, keepdim=True)).sum(-1)[1:].T


@pytest.mark.parametrize("prompts", [2, 7])
@pytest.mark.parametrize(
    ("variant", "layers"),
    [({}, None), ({"image_size": (48, 80), "layers": 8}, None), ({"ls_init_value": 0.5, "quick_gelu": True}, 1)],
    ids=["square", "rectangular", "layer-scale"],
)
def test_maps_equal_the_formula(build_clip, variant, layers, prompts):
    model = build_clip(**variant).double()
    x = torch.randn(2, 3, *variant.get("image_size", (64, 64)), dtype=torch.float64)
    texts = F.normalize(torch.randn(2, prompts, 24, dtype=torch.float64), dim=-1)
    explained = ClipSurgery(layers=layers).image(image_tower(model), x)
    used = layers or min(6, variant.get("layers", 3))
    expected = torch.stack(
        [feature_surgery(surgery_features(model, i[None], used), t) for i, t in zip(x, texts, strict=True)]
    )
    torch.testing.assert_close(explained.maps(texts), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(explained.maps(texts[1])[1], expected[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(explained.z, F.normalize(model.encode_image(x), dim=-1), rtol=0, atol=1e-12)


def test_one_prompt_is_compared_with_the_empty_text(build_clip):
    model = build_clip().double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    texts = F.normalize(torch.randn(2, 1, 24, dtype=torch.float64), dim=-1)
    empty = F.normalize(torch.randn(1, 24, dtype=torch.float64), dim=-1)
    method = ClipSurgery()
    explained = method.image(image_tower(model), x)
    found = explained.maps(texts, companions=empty)
    for b in range(2):
        features = surgery_features(model, x[b : b + 1], 3)[0, 1:]
        torch.testing.assert_close(found[b, 0], features @ (texts[b, 0] - empty[0]), rtol=0, atol=1e-10)
    torch.testing.assert_close(explained.maps(texts[1], companions=empty)[1], found[1])
    assert method.companions(1) == ("",) and method.companions(2) == ()
    with pytest.raises(InputError, match="give several, or the empty text's embedding"):
        explained.maps(texts)


def test_what_prompts_share_is_taken_out(build_clip):
    """Prompts that say the same leave nothing, and a prompt's map depends on what it is asked with."""
    tower, x = image_tower(build_clip().double()), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    texts = F.normalize(torch.randn(3, 24, dtype=torch.float64), dim=-1)
    explained = ClipSurgery().image(tower, x)
    assert explained.maps(texts[[0, 0]]).abs().max() < 1e-15
    assert (explained.maps(texts[:2])[:, 0] - explained.maps(texts)[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_precision_of_the_trunk(build_clip, dtype, tolerance):
    x, texts = torch.randn(2, 3, 64, 64), F.normalize(torch.randn(6, 24), dim=-1)
    exact = ClipSurgery().image(image_tower(build_clip().double()), x.double()).maps(texts.double())
    found = ClipSurgery().image(image_tower(build_clip(), dtype), x).maps(texts)
    assert found.dtype == torch.float32
    assert (found - exact).norm() / exact.norm() < tolerance


def test_layers_that_are_not_there(build_clip):
    with pytest.raises(InputError, match="layers=0 of ClipSurgery"):
        ClipSurgery(layers=0)
    with pytest.raises(InputError, match="this tower has 3 blocks"):
        ClipSurgery(layers=4).image(image_tower(build_clip()), torch.randn(1, 3, 64, 64))
