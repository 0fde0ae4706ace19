"""Grad-ECLIP and MGA-CLIP's coarse branch where the embedding is of the patches' mean, against autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import clipfast
from clipfast.errors import InputError
from clipfast.methods import METHODS
from clipfast.methods.attention import Attention
from clipfast.methods.grad_eclip import GradEclip
from clipfast.methods.mask_clip import MaskClip
from clipfast.methods.mga_clip import MgaClip
from clipfast.methods.quadrature import quadrature
from clipfast.methods.tclip import Tclip
from clipfast.models.openclip import image_tower

CLIPA = {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}


def units(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.fixture(params=[{}, {"ls_init_value": 0.7, "quick_gelu": True}, {"image_size": (48, 80)}], ids=str)
def model(request, build_clip):
    return build_clip(**CLIPA, **request.param).double()


def images(model, batch=2):
    return torch.randn(batch, 3, *model.visual.image_size, dtype=torch.float64)


def written_out(model, h):
    """The last block and what is above it on its input h (1, N, D), by its own modules: q, k, v, o, z."""
    visual = model.visual
    block = visual.transformer.resblocks[-1]
    q, k, v = F.linear(block.ln_1(h), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)

    def split(t):
        return t.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2)

    o = F.scaled_dot_product_attention(split(q), split(k), split(v)).transpose(1, 2).flatten(2)
    o = o.detach().requires_grad_()
    y = h + block.ls_1(block.attn.out_proj(o))
    y = y + block.ls_2(block.mlp(block.ln_2(y)))
    z = F.normalize(visual.ln_post(y[:, 1:].mean(1)) @ visual.proj, dim=-1)
    return q[0, 1:], k[0, 1:], v[0, 1:], o, z


def last_input(model, x):
    visual = model.visual
    with torch.no_grad():
        h = visual.ln_pre(visual._embeds(x))
        for block in visual.transformer.resblocks[:-1]:
            h = block(h)
    return h


def naive(model, x, text, spatial):
    """sum over patches j of lambda_ji (g_j . v_i), then ReLU, pair by pair."""
    q, k, v, o, z = written_out(model, last_input(model, x))
    (g,) = torch.autograd.grad(z[0] @ text, o)
    heat = torch.zeros(len(v), dtype=torch.float64)
    for j in range(len(v)):
        cosine = F.cosine_similarity(q[j], k, dim=-1)
        weight = (cosine - cosine.min()) / (cosine.max() - cosine.min())
        weight = weight if spatial == "raw" else torch.ones_like(cosine)
        heat += weight * (v @ g[0, 1 + j])
    return heat.relu().detach()


@pytest.mark.parametrize("spatial", ["raw", "none"])
@pytest.mark.parametrize("form", ["reverse", "features", "auto"])
def test_grad_eclip_is_the_sum_over_queries(model, spatial, form):
    x, texts = images(model), units(4, 24)
    explained = GradEclip(spatial=spatial).image(image_tower(model), x)
    with torch.no_grad():
        torch.testing.assert_close(explained.z, model.encode_image(x, normalize=True), rtol=0, atol=1e-12)
    maps = explained.maps(texts, form=form)
    assert (maps > 0).any()
    for b in range(2):
        for p in range(4):
            expected = naive(model, x[b : b + 1], texts[p], spatial)
            torch.testing.assert_close(maps[b, p], expected, rtol=0, atol=1e-11)


def test_signed_maps_and_texts_of_their_own(model):
    x, texts = images(model), units(2, 5, 24)
    tower = image_tower(model)
    signed, plain = (GradEclip(signed=s).image(tower, x) for s in (True, False))
    for form in ("reverse", "features"):
        found = signed.maps(texts, form=form)
        assert (found < 0).any()
        torch.testing.assert_close(found.relu(), plain.maps(texts, form=form))
        for b in range(2):
            torch.testing.assert_close(found[b], signed.maps(texts[b], form=form)[b])


@pytest.mark.parametrize("prompts", [1, 40])
def test_coarse_branch_adds_up_the_path(model, prompts):
    x, texts = images(model), units(prompts, 24)
    start = torch.full_like(x[:1], 0.2)
    method = MgaClip(part="coarse", steps=3, baseline=start[0])
    found = method.image(image_tower(model), x).maps(texts)
    nodes, weights = quadrature("gausslegendre", 3)
    for b in range(2):
        *_, v, _, _ = written_out(model, last_input(model, x[b : b + 1]))
        total = torch.zeros(v.shape[1], dtype=torch.float64)
        for node, weight in zip(nodes.double(), weights.double(), strict=True):
            *_, o, z = written_out(model, last_input(model, start + node * (x[b : b + 1] - start)))
            (g,) = torch.autograd.grad(z[0] @ texts[0], o)
            total += weight * g[0, 1:].sum(0)
        torch.testing.assert_close(found[b, 0], (v @ total).relu(), rtol=0, atol=1e-11)
    assert MgaClip(steps=2).image(image_tower(model), x).maps(texts).isfinite().all()


def test_states_are_the_final_projection_of_every_patch(model):
    x, visual = images(model), model.visual
    with torch.no_grad():
        h = visual.transformer(visual.ln_pre(visual._embeds(x)))[:, 1:]
        expected = visual.ln_post(h) @ visual.proj
    found = Tclip().image(image_tower(model), x)
    torch.testing.assert_close(found.patches.flatten(1, 2), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.z, model.encode_image(x, normalize=True).detach(), rtol=0, atol=1e-12)


def test_who_cannot(model):
    tower, x = image_tower(model), images(model, 1)
    assert MaskClip().image(tower, x).maps(units(2, 24)).isfinite().all()
    for method in (GradEclip(layers=2), GradEclip(heads="single"), GradEclip(spatial="combined")):
        with pytest.raises(InputError, match="pools the mean of its patches, which Grad-ECLIP explains with layers=1"):
            method.image(tower, x)
    with pytest.raises(InputError, match="compares keys with the class token's"):
        MaskClip(times_kk=True).image(tower, x)
    assert Attention.why_not(tower) == "pools the mean of its patches, without a query of its own"
    with pytest.raises(InputError, match="attention cannot explain images with CLIP, whose image tower pools the mean"):
        clipfast.explain(x, units(1, 24), model=model, method="attention")


def test_every_method_that_can_does(build_clip):
    module = build_clip(**CLIPA)
    model = clipfast.load(module)
    x, texts = torch.randn(1, 3, 64, 64), units(2, 24).float()
    cheap = {"rise": {"masks": 4}, "kernel_shap": {"samples": 20}, "m2ib": {"steps": 1, "samples": 1}, "tclip": {}}
    cheap |= {"integrated_gradients": {"steps": 2}, "smooth_grad": {"samples": 2}, "gscore_cam": {"top": 3}}
    cheap |= {"mga_clip": {"steps": 2}}
    ran = []
    for name, method in METHODS.items():
        if "image" not in method.sides() or method.why_not(model.towers()[0]) is not None or name == "clip_surgery":
            continue
        found = clipfast.explain(x, texts, model=model, method=name, **cheap.get(name, {}))
        assert found.maps.isfinite().all(), name
        ran.append(name)
    assert {"grad_eclip", "tclip", "mga_clip", "integrated_gradients", "gem", "legrad", "grad_cam", "rise"} <= set(ran)
