"""MGA-CLIP against its formulas: autograd through open_clip's own modules, a step, an image and a prompt at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import clipfast
from clipfast.errors import InputError
from clipfast.methods.grad_eclip import GradEclip
from clipfast.methods.mga_clip import MgaClip
from clipfast.methods.quadrature import quadrature
from clipfast.models import tower as towers
from clipfast.models.openclip import image_tower

VARIANTS = pytest.mark.parametrize(
    "variant",
    [{}, {"image_size": (48, 80)}, {"ls_init_value": 0.5, "quick_gelu": True}],
    ids=["square", "rectangular", "layer-scale"],
)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def minmax(x: Tensor) -> Tensor:
    """Zeros for a constant, as for a coarse map all of whose patches count against the text."""
    return torch.zeros_like(x) if x.max() == x.min() else (x - x.min()) / (x.max() - x.min())


def last_block(visual: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Any]:
    """q, k, v and attention output (N, D) of the last block for its input h (1, N, D), and what runs above that."""
    block = visual.transformer.resblocks[-1]
    q, k, v = F.linear(block.ln_1(h), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
    heads = [t.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2) for t in (q, k, v)]
    a = (heads[0] @ heads[1].mT / heads[0].shape[-1] ** 0.5).softmax(-1)
    o = (a @ heads[2]).transpose(1, 2).flatten(2)

    def above(o: Tensor) -> Tensor:
        x = h + block.ls_1(block.attn.out_proj(o))
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
        return F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)[0]

    return q[0], k[0], v[0], o, above


def naive(model: Any, x: Tensor, b: Tensor, text: Tensor, method: MgaClip) -> tuple[Tensor, Tensor]:
    """The coarse and the fine map (n,) of one image (3, H, W)."""
    visual = model.visual
    blocks = visual.transformer.resblocks
    first = 0 if method.path == "pixel" else method.path % len(blocks)

    def run(h: Tensor, start: int, stop: int) -> Tensor:
        for block in blocks[start:stop]:
            h = block(h)
        return h

    latent = [run(visual._embeds(image[None]), 0, first) for image in (b, x)]
    total = 0
    for a, w in zip(*quadrature(method.rule, method.steps), strict=True):
        if method.path == "pixel":
            h = visual._embeds((b + a * (x - b))[None])
        else:
            h = latent[0] + a * (latent[1] - latent[0])
        *_, o, above = last_block(visual, run(h, first, len(blocks) - 1))
        o = o.detach().requires_grad_()
        total = total + w * torch.autograd.grad(above(o) @ text, o)[0][0, 0]
    q, k, v, _, _ = last_block(visual, run(visual._embeds(x[None]), 0, len(blocks) - 1))
    n = len(v) - 1
    v, k, block = v[1:], k[1:], blocks[-1]
    coarse = torch.stack([(total @ v[i]).relu() for i in range(n)])
    e = visual.ln_post(block.ls_1(block.attn.out_proj(v))) @ visual.proj
    similar = F.cosine_similarity(e, text[None]).relu()
    w = total.abs() / total.abs().max()
    cosines = torch.stack([F.cosine_similarity(v[i] * w, v * w) for i in range(n)])
    weights = minmax(F.cosine_similarity(q[:1], k))
    fine = weights * ((cosines / method.tau).softmax(1) @ similar)
    return coarse.detach(), fine.detach()


@VARIANTS
@pytest.mark.parametrize("path", ["pixel", 0, 1, -1])
def test_both_branches_and_their_fusion_equal_the_formulas(build_clip, variant, path):
    model = build_clip(**variant).double()
    tower = image_tower(model)
    x = torch.randn(2, 3, *variant.get("image_size", (64, 64)), dtype=torch.float64)
    b, texts = torch.full((3, 1, 1), 0.4, dtype=torch.float64), unit(3, 24)
    method = MgaClip(steps=4, path=path, baseline=b, tau=0.3, eta=0.3)
    convex = MgaClip(steps=4, path=path, baseline=b, tau=0.3, eta=0.3, fusion="convex")
    coarse, fine = (branch(tower, x).maps(texts) for branch in (method.coarse, method.fine))
    own = method.image(tower, x).maps(texts[torch.tensor([[0, 1, 2], [2, 0, 1]])])
    fused, mixed = method.image(tower, x).maps(texts), convex.image(tower, x).maps(texts)
    for i in range(2):
        for p in range(3):
            c, f = naive(model, x[i], b.expand_as(x[i]), texts[p], method)
            torch.testing.assert_close(coarse[i, p], c, rtol=0, atol=1e-10)
            torch.testing.assert_close(fine[i, p], f, rtol=0, atol=1e-10)
            torch.testing.assert_close(fused[i, p], minmax(c) ** 0.3 * minmax(f) ** 0.7, rtol=0, atol=1e-5)
            torch.testing.assert_close(mixed[i, p], 0.3 * minmax(c) + 0.7 * minmax(f), rtol=0, atol=1e-9)
        torch.testing.assert_close(own[i], fused[i, [[0, 1, 2], [2, 0, 1]][i]], rtol=0, atol=1e-12)
    for part, expected in (("coarse", coarse), ("fine", fine)):
        alone = MgaClip(part=part, steps=4, path=path, baseline=b, tau=0.3).image(tower, x).maps(texts)
        torch.testing.assert_close(alone, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", ["pixel", -1])
def test_one_step_at_the_image_itself_is_grad_eclip_without_its_weight(build_clip, path):
    tower, x, texts = image_tower(build_clip().double()), torch.randn(2, 3, 64, 64, dtype=torch.float64), unit(3, 24)
    method = MgaClip(part="coarse", steps=1, rule="riemann_right", path=path)
    expected = GradEclip(spatial="none").image(tower, x).maps(texts)
    torch.testing.assert_close(method.image(tower, x).maps(texts), expected, rtol=0, atol=1e-14)


def test_many_prompts_take_the_prompt_free_form(build_clip, monkeypatch):
    tower, x, texts = image_tower(build_clip().double()), torch.randn(2, 3, 64, 64, dtype=torch.float64), unit(40, 24)
    explained = MgaClip(steps=5).coarse(tower, x)
    few = torch.cat([explained.maps(texts[i : i + 8]) for i in range(0, 40, 8)], dim=1)
    torch.testing.assert_close(explained.maps(texts), few, rtol=0, atol=1e-13)
    torch.testing.assert_close((explained.values @ explained.gradients(texts).mT).mT.relu(), few, rtol=0, atol=1e-13)
    values, weights = explained.prompt_free()
    assert values.shape == (2, 16, 24) and weights.shape == (2, 16)
    torch.testing.assert_close((values @ texts.T).mT.relu() * weights[:, None], few, rtol=0, atol=1e-13)
    monkeypatch.setattr(towers, "CPU_TOKENS", 17 * 2 * 2)
    torch.testing.assert_close(MgaClip(steps=5).coarse(tower, x).maps(texts), few, rtol=0, atol=1e-13)


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that was made within."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, made.numel() if isinstance(made, Tensor) else 0)
        return made


@pytest.mark.parametrize("part", ["fused", "fine"])
def test_many_prompts_take_no_more_memory_than_their_maps(build_clip, part):
    tower, x, texts = image_tower(build_clip().double()), torch.randn(2, 3, 64, 64, dtype=torch.float64), unit(300, 24)
    explained = MgaClip(part=part, steps=3).image(tower, x)
    few = torch.cat([explained.maps(texts[i : i + 7]) for i in range(0, 300, 7)], dim=1)
    with Largest() as largest:
        maps = explained.maps(texts)
    # As many of the gradients, which are as long as the tower is wide, would be twice that.
    assert largest.numbers <= max(maps.numel(), 3 * 2 * 17 * 4 * tower.width)
    torch.testing.assert_close(maps, few, rtol=0, atol=1e-12)


def test_coarse_features_give_the_maps_of_later_texts(build_clip):
    model = clipfast.load(build_clip())
    x, texts = torch.randn(3, 3, 64, 64), unit(4, 24).float()
    explainer = clipfast.Explainer(model, "mga_clip", part="coarse", steps=3)
    torch.testing.assert_close(explainer.features(x).maps(texts).maps, explainer(x, texts).maps, rtol=1e-4, atol=1e-7)
    with pytest.raises(InputError, match="no attribution features"):
        clipfast.Explainer(model, "mga_clip").features(x)


def test_a_constant_branch_counts_as_zero():
    coarse, fine = torch.zeros(1, 1, 4), torch.tensor([[[0.0, 1.0, 2.0, 4.0]]])
    assert (MgaClip().fuse(coarse, fine) == 0).all()
    torch.testing.assert_close(MgaClip(fusion="convex", eta=0.25).fuse(coarse, fine), 0.75 * fine / 4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)])
@pytest.mark.parametrize("part", ["coarse", "fine"])
def test_precision_of_the_trunk(build_clip, part, dtype, tolerance):
    x, texts = torch.randn(2, 3, 64, 64), unit(3, 24)
    method = MgaClip(part=part, steps=4)
    exact = method.image(image_tower(build_clip().double()), x.double()).maps(texts)
    maps = method.image(image_tower(build_clip(), dtype), x.to(dtype)).maps(texts.float())
    assert maps.dtype == torch.float32
    assert (maps - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"part": "both"}, "part='both' is not a choice"),
        ({"steps": 0}, "at least 1"),
        ({"path": "pixels"}, "path='pixels' must be 'pixel'"),
        ({"baseline": 0}, "baseline=0 must be"),
        ({"tau": 0}, "tau=0 must be a positive number"),
        ({"eta": 1.5}, "eta=1.5 is a share"),
        ({"fusion": "sum"}, "fusion='sum'"),
    ],
)
def test_bad_parameters(parameters, message):
    with pytest.raises(InputError, match=message):
        MgaClip(**parameters)


def test_a_block_that_is_not_there(build_clip):
    with pytest.raises(InputError, match="path=7 is no block of this tower of 3"):
        MgaClip(path=7).image(image_tower(build_clip()), torch.randn(1, 3, 64, 64))
