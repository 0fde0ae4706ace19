"""GEM against its published algorithm: attention by attention, one image at a time, on the model's own modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor

from clipfast.errors import InputError
from clipfast.methods.gem import Gem
from clipfast.models.openclip import image_tower


def naive(model: CLIP, x: Tensor, t: Tensor, layers: int, refinements: int, tau: float | None) -> Tensor:
    """One image (1, 3, H, W) and one text: (n,)."""
    visual, kept = model.visual, []
    blocks = list(visual.transformer.resblocks)
    hooks = [block.register_forward_pre_hook(lambda module, args: kept.append(args[0])) for block in blocks]
    model.encode_image(x)
    for hook in hooks:
        hook.remove()
    path = kept[-layers]
    for block, h in list(zip(blocks, kept, strict=True))[-layers:]:
        attn, normed = block.attn, block.ln_1(h)
        width = normed.shape[-1] // attn.num_heads
        sharpness = float(normed.detach().norm(dim=-1).mean()) / width**0.5 if tau is None else tau
        q, k, v = F.linear(normed, attn.in_proj_weight, attn.in_proj_bias)[0].chunk(3, dim=-1)
        heads = []
        for head in range(attn.num_heads):
            own = slice(head * width, (head + 1) * width)
            outputs = []
            for tokens in (q[:, own], k[:, own], v[:, own]):
                for _ in range(refinements):
                    tokens = F.normalize(tokens, dim=-1)
                    tokens = (sharpness * tokens @ tokens.T).softmax(-1) @ tokens
                tokens = F.normalize(tokens, dim=-1)
                outputs.append((sharpness * tokens @ tokens.T).softmax(-1) @ v[:, own])
            heads.append(sum(outputs) / 3)
        path = path + block.ls_1(attn.out_proj(torch.cat(heads, dim=-1)))
    return F.cosine_similarity((visual.ln_post(path) @ visual.proj)[0, 1:], t[None], dim=-1).detach()


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [
        ({}, {}),
        ({"image_size": (48, 80), "layers": 8}, {}),
        ({"ls_init_value": 0.5, "quick_gelu": True}, {"layers": 1, "refinements": 0}),
        ({}, {"layers": 2, "refinements": 2, "tau": 5.0}),
    ],
    ids=["square", "rectangular", "layer-scale", "parameters"],
)
def test_maps_equal_the_formula(build_clip, variant, parameters):
    model = build_clip(**variant).double()
    x = torch.randn(2, 3, *variant.get("image_size", (64, 64)), dtype=torch.float64)
    # Unequal gains: normed tokens differ in length, and so do the images' temperatures.
    with torch.no_grad():
        model.visual.transformer.resblocks[-1].ln_1.weight.mul_(torch.linspace(0.2, 4, 32))
    texts = F.normalize(torch.randn(2, 3, 24, dtype=torch.float64), dim=-1)
    method = Gem(**parameters)
    explained = method.image(image_tower(model), x)
    layers = method.layers or min(6, variant.get("layers", 3))
    expected = torch.stack(
        [
            torch.stack([naive(model, image[None], t, layers, method.refinements, method.tau) for t in own])
            for image, own in zip(x, texts, strict=True)
        ]
    )
    torch.testing.assert_close(explained.maps(texts), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(explained.maps(texts[0, :1])[0], expected[0, :1], rtol=0, atol=1e-10)
    torch.testing.assert_close(explained.z, F.normalize(model.encode_image(x), dim=-1), rtol=0, atol=1e-12)
    values, weights = explained.prompt_free()
    torch.testing.assert_close(weights[:, None] * (texts @ values.mT), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)])
def test_precision_of_the_trunk(build_clip, dtype, tolerance):
    x, texts = torch.randn(2, 3, 64, 64), F.normalize(torch.randn(6, 24), dim=-1)
    exact = Gem().image(image_tower(build_clip().double()), x.double()).maps(texts.double())
    found = Gem().image(image_tower(build_clip(), dtype), x).maps(texts)
    assert found.dtype == torch.float32
    assert (found - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize("parameters", [{"layers": 0}, {"refinements": -1}, {"tau": "paper"}])
def test_bad_parameters(parameters):
    with pytest.raises(InputError, match=rf"{next(iter(parameters))}=.* of Gem"):
        Gem(**parameters)
