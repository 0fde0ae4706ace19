"""MaskCLIP against Grad-ECLIP's released version of it, and against the model's own modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor

from clipfast.errors import InputError
from clipfast.methods.mask_clip import MaskClip
from clipfast.models.openclip import image_tower


@pytest.mark.parametrize("kind", ["square", "wide"])
def test_published_maps_times_the_keys_cosine(goldens, official, kind):
    explained = MaskClip(times_kk=True).image(image_tower(official), goldens[f"{kind}.image"])
    found = explained.maps(goldens[f"{kind}.text"])[0]
    torch.testing.assert_close(found, goldens[f"{kind}.mask_clip_times_kk"].flatten(1), rtol=0, atol=1e-9)


def naive(model: CLIP, x: Tensor, t: Tensor, residual: bool, times_kk: bool) -> Tensor:
    """One image (1, 3, H, W) and one text: (n,)."""
    kept = {}
    visual = model.visual
    block = visual.transformer.resblocks[-1]
    hook = block.register_forward_pre_hook(lambda module, args: kept.update(h=args[0]))
    model.encode_image(x)
    hook.remove()
    h = kept["h"]
    _, k, v = F.linear(block.ln_1(h), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
    y = block.ls_1(block.attn.out_proj(v))
    if residual:
        y = h + y
        y = y + block.ls_2(block.mlp(block.ln_2(y)))
    found = F.cosine_similarity((visual.ln_post(y) @ visual.proj)[0, 1:], t[None], dim=-1)
    if times_kk:
        k = block.attn.out_proj(k)[0]
        found = found * F.cosine_similarity(k[:1], k[1:], dim=-1)
    return found.detach()


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("times_kk", [True, False])
@pytest.mark.parametrize(
    "variant",
    [{}, {"image_size": (48, 80)}, {"ls_init_value": 0.5, "quick_gelu": True}],
    ids=["square", "rectangular", "layer-scale"],
)
def test_maps_equal_the_formula(build_clip, variant, times_kk, residual):
    model = build_clip(**variant).double()
    x = torch.randn(2, 3, *variant.get("image_size", (64, 64)), dtype=torch.float64)
    texts = F.normalize(torch.randn(2, 3, 24, dtype=torch.float64), dim=-1)
    explained = MaskClip(residual=residual, times_kk=times_kk).image(image_tower(model), x)
    expected = torch.stack(
        [
            torch.stack([naive(model, image[None], t, residual, times_kk) for t in own])
            for image, own in zip(x, texts, strict=True)
        ]
    )
    torch.testing.assert_close(explained.maps(texts), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(explained.maps(texts[0, :1])[0], expected[0, :1], rtol=0, atol=1e-10)
    torch.testing.assert_close(explained.z, F.normalize(model.encode_image(x), dim=-1), rtol=0, atol=1e-12)
    values, weights = explained.prompt_free()
    torch.testing.assert_close(weights[:, None] * (texts @ values.mT), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_precision_of_the_trunk(build_clip, dtype, tolerance):
    x, texts = torch.randn(2, 3, 64, 64), F.normalize(torch.randn(6, 24), dim=-1)
    exact = MaskClip().image(image_tower(build_clip().double()), x.double()).maps(texts.double())
    found = MaskClip().image(image_tower(build_clip(), dtype), x).maps(texts)
    assert found.dtype == torch.float32
    assert (found - exact).norm() / exact.norm() < tolerance


def test_bad_parameters():
    with pytest.raises(InputError, match="residual='mlp' is not a choice of MaskClip"):
        MaskClip(residual="mlp")
