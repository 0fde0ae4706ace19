"""The functions of Grad-ECLIP's scripts against what the authors' own returned, and against the library's method."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import clipfast
from clipfast.compat import grad_eclip as authors
from clipfast.errors import InputError, ModelError


@pytest.fixture
def used(official):
    authors.use(official)
    yield official
    authors._using.clear()


def loop(goldens: dict[str, Tensor], kind: str) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    """What their scripts do with one image and some texts."""
    outputs, v_final, last_input, v, q_out, k_out, attn, att_output, map_size = authors.clip_encode_dense(
        goldens[f"{kind}.image"]
    )
    texts = goldens[f"{kind}.text"].T
    scores = (F.normalize(outputs[:, 0], dim=-1) @ texts)[0]
    maps = [authors.grad_eclip(c, q_out, k_out, v, att_output, map_size) for c in scores]
    plain = [authors.grad_eclip(c, q_out, k_out, v, att_output, map_size, withksim=False) for c in scores]
    cams = [authors.grad_cam(c, last_input, map_size) for c in scores]
    return maps, plain, cams, authors.mask_clip(texts, v_final, k_out, map_size), attn[0, 0, 1:].reshape(map_size)


@pytest.mark.parametrize("kind", ["square", "wide"])
def test_published_outputs(goldens, used, kind):
    maps, plain, cams, masked, attention = loop(goldens, kind)
    for found, key in ((maps, "grad_eclip"), (plain, "grad_eclip_no_lambda"), (cams, "grad_cam")):
        torch.testing.assert_close(torch.stack(found), goldens[f"{kind}.{key}"], rtol=0, atol=1e-9)
    torch.testing.assert_close(masked, goldens[f"{kind}.mask_clip_times_kk"], rtol=0, atol=1e-9)
    torch.testing.assert_close(attention.detach(), goldens[f"{kind}.self_attn"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("layers", [1, 3])
def test_published_text_outputs(goldens, used, layers):
    embedding, (q_outs, k_outs, vs), attns, outputs = authors.clip_encode_text_dense(goldens["text.ids"], layers)
    c = (F.normalize(embedding, dim=-1) @ goldens["text.image_embedding"].T)[0, 0]
    torch.testing.assert_close(c.detach(), goldens[f"text.n{layers}.score"].reshape(()), rtol=0, atol=1e-9)
    found = authors.grad_eclip_text(c, q_outs, k_outs, vs, outputs, 6)
    torch.testing.assert_close(found, goldens[f"text.n{layers}.map"], rtol=0, atol=1e-9, equal_nan=True)
    assert len(attns) == layers
    assert torch.allclose(attns[0].sum(-1), torch.ones(1, 20, dtype=torch.float64))


def test_a_long_loop_over_prompts_takes_the_jacobian_and_gives_the_same(goldens, used):
    outputs, _, _, v, q_out, k_out, _, att_output, size = authors.clip_encode_dense(goldens["square.image"])
    texts = F.normalize(torch.randn(48, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=0)
    scores = (F.normalize(outputs[:, 0], dim=-1) @ texts)[0]
    found = torch.stack([authors.grad_eclip(c, q_out, k_out, v, att_output, size) for c in scores])
    explainer = clipfast.Explainer(used, heads="single", spatial="projected")
    expected = explainer(goldens["square.image"], texts.T).maps[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [[0], [0, 3], [5], list(range(17))])
def test_gradients_at_any_tokens_are_those_of_automatic_differentiation(goldens, used, tokens):
    torch.manual_seed(0)
    outputs, _, last_input, _, _, _, _, att_output, _ = authors.clip_encode_dense(goldens["square.image"])
    weight = torch.randn(len(tokens), outputs.shape[-1], dtype=torch.float64)
    got = torch.autograd.grad((outputs[0, tokens] * weight).sum(), (att_output, last_input))
    block, visual = used.visual.transformer.resblocks[-1], used.visual
    x = last_input.detach().requires_grad_()
    q, k, v = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
    o, _ = authors.attention_layer(q, k, v)
    y = x + block.attn.out_proj(o)
    out = visual.ln_post(y + block.mlp(block.ln_2(y))).transpose(0, 1) @ visual.proj
    torch.testing.assert_close(out, outputs, rtol=0, atol=1e-12)
    expected = torch.autograd.grad((out[0, tokens] * weight).sum(), (o, x))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def test_the_model_collects_nothing(goldens, used):
    before = copy.deepcopy(used.state_dict())
    used.requires_grad_(True)
    loop(goldens, "square")
    assert all(parameter.grad is None for parameter in used.parameters())
    assert all(torch.equal(value, before[name]) for name, value in used.state_dict().items())


def test_attention_with_several_heads_is_torchs():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 7, 2, 12, dtype=torch.float64)
    mask = torch.full((7, 7), -torch.inf, dtype=torch.float64).triu(1)
    o, weights = authors.attention_layer(q, k, v, 3, mask)
    split = [t.unflatten(-1, (3, 4)).permute(1, 2, 0, 3) for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*split, attn_mask=mask).permute(2, 0, 1, 3).flatten(2)
    torch.testing.assert_close(o, expected)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 7, dtype=torch.float64))
    assert weights[:, 0, 1:].abs().max() == 0


def test_pictures_keep_their_size_but_for_the_last_patch():
    assert authors.imgprocess_keepsize(Image.new("RGB", (100, 50))).shape == (3, 48, 96)
    assert authors.imgprocess_keepsize(Image.new("RGB", (100, 50)), (14, 14), 2).shape == (3, 98, 196)
    with pytest.raises(InputError, match="half a patch"):
        authors.imgprocess_keepsize(Image.new("RGB", (100, 5)))


def test_without_a_model_there_is_nothing_to_encode():
    authors._using.clear()
    with pytest.raises(ModelError, match="use"):
        authors.clip_encode_dense(torch.zeros(1, 3, 32, 32))
