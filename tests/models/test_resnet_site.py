"""A ResNet CLIP's attention pool is a site like any other: Grad-ECLIP and its kin, against autograd at that pool."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clipfast
from clipfast.errors import InputError
from clipfast.methods.attention import Attention
from clipfast.methods.grad_eclip import GradEclip
from clipfast.methods.mask_clip import MaskClip
from clipfast.methods.mga_clip import MgaClip
from clipfast.methods.tclip import Tclip
from clipfast.models.resnet import resnet_tower


@dataclass
class WrittenOut:
    """The pool for one image: q (D,), k and v (N, D), its attention a (H, N), output o (D,), embedding z (E,)."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    o: Tensor
    z: Tensor

    def gradient(self, text: Tensor) -> Tensor:
        return torch.autograd.grad(self.z @ text, self.o, retain_graph=True)[0]

    def places(self, values: Tensor) -> Tensor:
        """Min-max of the cosines of the query with the places' keys, times some values of theirs (n,)."""
        cosine = F.cosine_similarity(self.q[None], self.k[1:], dim=-1)
        return (cosine - cosine.min()) / (cosine.max() - cosine.min()) * values


def write_out(model: nn.Module, image: Tensor) -> WrittenOut:
    """The attention pool on the module's own parameters and the module's own last features."""
    visual, seen = copy.deepcopy(model.visual), []
    pool: Any = visual.attnpool
    pool.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    own = F.normalize(visual(image[None])[0], dim=-1)
    places = seen[0][0].flatten(1).T
    tokens = torch.cat((places.mean(0, keepdim=True), places)) + pool.positional_embedding
    q, k, v = (project(tokens) for project in (pool.q_proj, pool.k_proj, pool.v_proj))
    heads = [t.unflatten(-1, (pool.num_heads, -1)).transpose(0, 1) for t in (q[:1], k, v)]
    a = (heads[0] @ heads[1].mT / heads[0].shape[-1] ** 0.5).softmax(-1)
    o = (a @ heads[2])[:, 0].flatten()
    z = F.normalize(pool.c_proj(o), dim=-1)
    torch.testing.assert_close(z, own, rtol=0, atol=1e-12)
    return WrittenOut(q[0], k, v, a[:, 0], o, z)


@pytest.fixture
def model(build_resnet) -> nn.Module:
    return build_resnet().double()


@pytest.fixture
def x() -> Tensor:
    return F.interpolate(torch.randn(3, 3, 5, 5, dtype=torch.float64), size=(96, 96), mode="bilinear")


@pytest.fixture
def texts() -> Tensor:
    return F.normalize(torch.randn(30, 24, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("form", ["reverse", "features", "auto"])
@pytest.mark.parametrize("prompts", [1, 30])
def test_grad_eclip_equals_its_formula(model, x, texts, form, prompts):
    texts, expected = texts[:prompts], []
    for image in x:
        pool = write_out(model, image)
        expected.append(torch.stack([pool.places(pool.v[1:] @ pool.gradient(text)) for text in texts]).detach())
    expected = torch.stack(expected)
    assert (expected > 0).any() and (expected < 0).any()
    for signed in (True, False):
        explained = GradEclip(signed=signed).image(resnet_tower(model), x)
        found = explained.maps(texts, form=form)
        torch.testing.assert_close(found, expected if signed else expected.relu(), rtol=1e-9, atol=1e-13)
    values, weights = explained.prompt_free()
    product = (weights[..., None] * (values @ texts.T)).mT
    torch.testing.assert_close(product, expected, rtol=1e-9, atol=1e-13)


def test_no_weight_of_places_but_the_gradients(model, x, texts):
    pool = write_out(model, x[0])
    expected = torch.stack([pool.v[1:] @ pool.gradient(text) for text in texts]).relu().detach()
    found = GradEclip(spatial="none").image(resnet_tower(model), x[:1]).maps(texts)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    projected = GradEclip(spatial="projected").image(resnet_tower(model), x[:1]).maps(texts)[0]
    c_proj = model.visual.attnpool.c_proj
    pool.q, pool.k = c_proj(pool.q), c_proj(pool.k)
    weight = pool.places(torch.ones(len(pool.k) - 1, dtype=torch.float64))
    torch.testing.assert_close(projected, (weight * expected).detach(), rtol=1e-9, atol=1e-13)


def test_single_head(model, x, texts):
    """As the authors' code does for transformers: the pool runs as one head."""
    single = copy.deepcopy(model)
    single.visual.attnpool.num_heads = 1
    expected = GradEclip().image(resnet_tower(single), x)
    found = GradEclip(heads="single").image(resnet_tower(model), x)
    torch.testing.assert_close(found.z, expected.z, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.maps(texts), expected.maps(texts), rtol=1e-9, atol=1e-13)


def test_attention(model, x, texts):
    found = Attention().image(resnet_tower(model), x).maps(texts[:2])
    for image, maps in zip(x, found, strict=True):
        a = write_out(model, image).a.mean(0)[1:].detach()
        torch.testing.assert_close(maps, a.expand(2, -1), rtol=1e-9, atol=1e-13)


def test_values_as_embeddings(model, x, texts):
    """MaskCLIP's patches and TCLIP's: each place as if the pool attended to it alone."""
    tower, expected = resnet_tower(model), []
    for image in x:
        pool = write_out(model, image)
        expected.append(texts @ F.normalize(model.visual.attnpool.c_proj(pool.v[1:]), dim=-1).T)
    expected = torch.stack(expected).detach()
    for method in (MaskClip(), Tclip(threshold="none")):
        explained = method.image(tower, x)
        torch.testing.assert_close(explained.maps(texts), expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(explained.z, tower.encode(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "method",
    [Tclip(), Tclip(views=9), MgaClip(part="coarse", steps=2), MaskClip(), Attention(), GradEclip()],
    ids=lambda method: type(method).__name__,
)
def test_other_grids(model, texts, method):
    x = F.interpolate(torch.randn(2, 3, 5, 5, dtype=torch.float64), size=(64, 160), mode="bilinear")
    tower = resnet_tower(model)
    explained = method.image(tower, x)
    maps = explained.maps(texts[:3])
    height, width = method.grid(tower, (64, 160))
    assert maps.shape == (2, 3, height * width) and maps.isfinite().all() and maps.abs().max() > 0
    torch.testing.assert_close(explained.z, tower.encode(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(method.image(tower, x[1:]).maps(texts[:3])[0], maps[1], rtol=1e-8, atol=1e-10)


def test_coarse_maps_settle_with_the_steps(model, x, texts):
    found, finer, finest = (
        MgaClip(part="coarse", steps=steps).image(resnet_tower(model), x[:1]).maps(texts[:2]) for steps in (2, 16, 32)
    )
    assert (finer - finest).norm() < 0.5 * (found - finest).norm()


@pytest.mark.parametrize("precision", [None, "bfloat16"])
@pytest.mark.parametrize("method", ["grad_eclip", "tclip", "mga_clip", "mask_clip", "attention"])
def test_through_the_engine(build_resnet, tokenizer, method, precision):
    model = clipfast.load(build_resnet(), tokenizer=tokenizer)
    x, texts = torch.randn(2, 3, 96, 96), ["a dog", "two boats"]
    parameters = {"part": "coarse", "steps": 2} if method == "mga_clip" else {}
    out = clipfast.explain(x, texts, model=model, method=method, precision=precision, **parameters)
    assert out.maps.shape == (2, 2, 3, 3) and out.maps.dtype == torch.float32 and out.maps.isfinite().all()


def test_float32(model, x, texts):
    exact = GradEclip().image(resnet_tower(model), x).maps(texts)
    found = GradEclip().image(resnet_tower(copy.deepcopy(model).float()), x.float()).maps(texts.float())
    assert (found - exact).norm() / exact.norm() < 1e-5


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"layers": 2}, "layers=2 was asked for, but this tower has 1 block"),
        ({"spatial": "combined"}, "spatial='combined' needs the places' own queries, which an attention pool has not"),
    ],
)
def test_what_an_attention_pool_has_not(model, x, parameters, said):
    with pytest.raises(InputError, match=said):
        GradEclip(**parameters).image(resnet_tower(model), x)
