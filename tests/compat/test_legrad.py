"""The LeGrad package's wrapper against its formula, written out on the model's own modules."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipfast.compat.legrad import LePreprocess, LeWrapper
from clipfast.errors import InputError, ModelError


def naive(model, x: Tensor, texts: Tensor, depth: int) -> Tensor:
    """One image, one prompt after the other; each block's map is enlarged before they are added: (1, P, H, W)."""
    visual = model.visual
    found = []
    for text in texts:
        h, total = visual._embeds(x), 0
        for i, block in enumerate(visual.transformer.resblocks):
            heads = block.attn.num_heads
            q, k, v = (
                t.unflatten(-1, (heads, -1)).transpose(1, 2)
                for t in F.linear(block.ln_1(h), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
            )
            a = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
            h = h + block.attn.out_proj((a @ v).transpose(1, 2).flatten(2))
            h = h + block.mlp(block.ln_2(h))
            if i >= depth:
                score = F.normalize(visual.ln_post(h.mean(1)) @ visual.proj, dim=-1) @ text
                gradient = torch.autograd.grad(score.sum(), a, retain_graph=True)[0].clamp(min=0)
                own = gradient.mean((1, 2))[:, 1:].unflatten(1, (x.shape[2] // 16, x.shape[3] // 16))
                total = total + F.interpolate(own[:, None], scale_factor=16, mode="bilinear")
        found.append((total - total.min()) / (total.max() - total.min()))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(("layer_index", "depth"), [(-2, 2), (1, 1)])
def test_maps_are_the_packages(official, layer_index, depth):
    torch.manual_seed(0)
    x, texts = torch.randn(3, 3, 64, 64, dtype=torch.float64), torch.randn(4, 48, dtype=torch.float64)
    found = LeWrapper(official, layer_index).compute_legrad(text_embedding=texts, image=x)
    expected = torch.cat([naive(official, one[None], texts, depth) for one in x])
    assert found.shape == (3, 4, 64, 64)
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-9)


def test_everything_else_is_the_models_own_and_stays_so(official):
    before = {name: value.clone() for name, value in official.state_dict().items()}
    forward = official.visual.forward
    wrapper = LeWrapper(official)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(wrapper.encode_image(x), official.encode_image(x))
    assert wrapper.visual is official.visual
    wrapper.compute_legrad(torch.randn(2, 48, dtype=torch.float64), x)
    assert official.visual.forward == forward
    assert all(torch.equal(value, before[name]) for name, value in official.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in official.parameters())
    with pytest.raises(AttributeError):
        wrapper.nothing_of_this_name  # noqa: B018


def test_what_cannot_be_asked(official, build_resnet):
    with pytest.raises(InputError, match="layer_index=7"):
        LeWrapper(official, 7)
    with pytest.raises(ModelError, match="ResNet"):
        LeWrapper(build_resnet())
    with pytest.raises(InputError, match="pass image="):
        LeWrapper(official).compute_legrad(torch.randn(1, 48, dtype=torch.float64))


def test_preprocessing_squashes_to_the_size_given():
    _, preprocess = open_clip.create_model_and_transforms("RN50", pretrained=None)[::2]
    ours = LePreprocess(copy.deepcopy(preprocess), 448)
    found = ours(Image.new("RGB", (300, 200), (255, 0, 0)))
    assert found.shape == (3, 448, 448)
    mean, std = preprocess.transforms[-1].mean, preprocess.transforms[-1].std
    assert found[0].mean().item() == pytest.approx((1 - mean[0]) / std[0], abs=1e-5)
