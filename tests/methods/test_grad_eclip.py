"""Grad-ECLIP against the authors' outputs, and against naive autograd through a whole tower."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

from clipfast.errors import InputError
from clipfast.methods.grad_eclip import GradEclip
from clipfast.models.openclip import image_tower, text_tower


@pytest.mark.parametrize("form", ["reverse", "features"])
@pytest.mark.parametrize(("spatial", "key"), [("projected", "grad_eclip"), ("none", "grad_eclip_no_lambda")])
@pytest.mark.parametrize("kind", ["square", "wide"])
def test_published_image_maps(goldens, official, kind, spatial, key, form):
    explained = GradEclip(heads="single", spatial=spatial).image(image_tower(official), goldens[f"{kind}.image"])
    text = goldens[f"{kind}.text"]
    torch.testing.assert_close(
        explained.maps(text, form=form)[0], goldens[f"{kind}.{key}"].flatten(1), rtol=0, atol=1e-9
    )
    torch.testing.assert_close((explained.z @ text.T)[0], goldens[f"{kind}.score"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("layers", [1, 3])
def test_published_text_maps(goldens, official, layers):
    ids = goldens["text.ids"]
    words = torch.zeros_like(ids, dtype=torch.bool)
    words[:, 1:6] = True
    method = GradEclip(heads="single", spatial="projected", layers=layers, lambda_over="all")
    explained = method.text(text_tower(official), ids, words)
    found = explained.maps(goldens["text.image_embedding"])[0, 0, 1:6]
    expected = goldens[f"text.n{layers}.map"]
    torch.testing.assert_close(
        (explained.z @ goldens["text.image_embedding"].T)[0, 0], goldens[f"text.n{layers}.score"], rtol=0, atol=1e-9
    )
    if layers == 1:
        # Every word counts against the score: theirs divides 0 by 0, ours is zero.
        assert expected.isnan().all() and (found == 0).all()
    else:
        torch.testing.assert_close(found / found.sum(), expected, rtol=0, atol=1e-9)


def naive_attention(
    block: nn.Module, x: Tensor, heads: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = F.linear(x, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
    split = [t.unflatten(-1, (heads, -1)) for t in (q, k, v)]
    logits = torch.einsum("bmhd,bnhd->bhmn", split[0], split[1]) / split[0].shape[-1] ** 0.5
    a = (logits if mask is None else logits + mask).softmax(-1)
    return q, k, v, torch.einsum("bhmn,bnhd->bmhd", a, split[2]).flatten(2)


def naive_cosine_weight(q: Tensor, k: Tensor) -> Tensor:
    cosine = F.cosine_similarity(q[:, None], k, dim=-1)
    low, high = cosine.min(1, keepdim=True).values, cosine.max(1, keepdim=True).values
    return (cosine - low) / (high - low)


def naive_combined_weight(q: Tensor, k: Tensor, queries: Tensor) -> Tensor:
    """The same of the mean of q's cosine with a key and the mean cosine of all `queries` with it, loop by loop."""
    cosine = torch.stack(
        [
            (
                F.cosine_similarity(q[0], key, dim=0)
                + torch.stack([F.cosine_similarity(j, key, dim=0) for j in queries[0]]).mean()
            )
            / 2
            for key in k[0]
        ]
    )
    return ((cosine - cosine.min()) / (cosine.max() - cosine.min()))[None]


def naive(blocks, h, finish, pooled, texts, layers, reduce, keep, mask=None, combined=False):
    """Autograd through every token, one prompt and one image at a time; nothing here is clipfast's."""
    total = []
    for b in range(h.shape[0]):
        for t in texts:
            x, sites = h[b : b + 1].detach(), []
            for i, block in enumerate(blocks):
                q, k, v, o = naive_attention(block, block.ln_1(x), block.attn.num_heads, mask)
                if i >= len(blocks) - layers:
                    o = o.detach().requires_grad_() if i == len(blocks) - layers else o
                    o.retain_grad()
                    sites.append((q, k, v, o))
                x = x + block.ls_1(block.attn.out_proj(o))
                x = x + block.ls_2(block.mlp(block.ln_2(x)))
            (F.normalize(finish(x[:, pooled[b]]), dim=-1) @ t).sum().backward()
            layer_maps = []
            for q, k, v, o in sites:
                own, keys = q[:, pooled[b]], k[:, keep(b)]
                weight = naive_combined_weight(own, keys, q[:, keep(b)]) if combined else naive_cosine_weight(own, keys)
                layer_maps.append(weight * (v[:, keep(b)] * o.grad[:, pooled[b] : pooled[b] + 1]).sum(-1))
            last = sites[-1][3].grad[0]
            assert last[torch.arange(len(last)) != pooled[b]].abs().max() == 0
            if reduce == "relu_then_sum":
                total.append(sum(m.relu() for m in layer_maps)[0])
            else:
                total.append(sum(layer_maps).relu()[0])
    return total


def naive_image(
    model: CLIP, x: Tensor, texts: Tensor, layers: int, reduce: str = "relu_then_sum", combined: bool = False
) -> Tensor:
    v = model.visual
    maps = naive(
        v.transformer.resblocks,
        v._embeds(x),
        lambda c: v.ln_post(c) @ v.proj,
        [0] * len(x),
        texts,
        layers,
        reduce,
        lambda b: slice(1, None),
        combined=combined,
    )
    return torch.stack(maps).unflatten(0, (len(x), len(texts))).detach()


@pytest.mark.parametrize("prompts", [1, 3, 40])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("reduce", ["relu_then_sum", "sum_then_relu"])
@pytest.mark.parametrize(
    "variant",
    [{}, {"image_size": (48, 80)}, {"ls_init_value": 0.5, "quick_gelu": True}],
    ids=["square", "rectangular", "layer-scale"],
)
def test_both_forms_equal_naive_autograd(build_clip, variant, reduce, layers, prompts):
    model = build_clip(**variant).double()
    size = variant.get("image_size", (64, 64))
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    texts = F.normalize(torch.randn(prompts, 24, dtype=torch.float64), dim=-1)
    expected = naive_image(model, x, texts, layers, reduce)
    explained = GradEclip(layers=layers, reduce=reduce).image(image_tower(model), x)
    for form in ("reverse", "features", "auto"):
        torch.testing.assert_close(explained.maps(texts, form=form), expected, rtol=0, atol=1e-10)
    values, weights = explained.prompt_free()
    products = weights[..., None, :] * (texts @ values.mT)
    later = products.relu() if products.ndim == 3 else products.relu().sum(1)
    torch.testing.assert_close(later, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_combined_weight_equals_its_definition(build_clip, layers):
    model = build_clip(image_size=(32, 48)).double()
    x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    texts = F.normalize(torch.randn(2, 24, dtype=torch.float64), dim=-1)
    explained = GradEclip(layers=layers, spatial="combined").image(image_tower(model), x)
    expected = naive_image(model, x, texts, layers, combined=True)
    for form in ("reverse", "features"):
        torch.testing.assert_close(explained.maps(texts, form=form), expected, rtol=0, atol=1e-10)


# The default is 8 of however many there are.
@pytest.mark.parametrize(("depth", "layers", "given"), [(3, 1, 1), (3, 2, 2), (3, 3, 3), (9, 8, None), (9, 9, 9)])
@pytest.mark.parametrize("combined", [False, True])
def test_text_side_equals_naive_autograd(build_clip, depth, layers, given, combined):
    model = build_clip(layers=depth).double()
    ids = torch.zeros(2, 20, dtype=torch.long)
    ids[0, :7] = torch.tensor([298, 5, 9, 33, 120, 77, 299])
    ids[1, :4] = torch.tensor([298, 250, 3, 299])
    pooled = [6, 3]
    images = F.normalize(torch.randn(3, 24, dtype=torch.float64), dim=-1)
    h = model.token_embedding(ids) + model.positional_embedding
    expected = naive(
        model.transformer.resblocks,
        h,
        lambda c: model.ln_final(c) @ model.text_projection,
        pooled,
        images,
        layers,
        "sum_then_relu",
        lambda b: slice(1, pooled[b]),
        model.attn_mask.double(),
        combined=combined,
    )
    words = (torch.arange(20) >= 1) & (torch.arange(20) < torch.tensor(pooled)[:, None])
    method = GradEclip(layers=given, spatial="combined" if combined else "raw")
    explained = method.text(text_tower(model), ids, words)
    for form in ("reverse", "features"):
        maps = explained.maps(images, form=form)
        for i, m in enumerate(expected):
            b = i // 3
            torch.testing.assert_close(maps[b, i % 3, 1 : pooled[b]], m.detach(), rtol=0, atol=1e-10)
            assert (maps[b, i % 3, pooled[b] :] == 0).all() and maps[b, i % 3, 0] == 0


def test_padding_moves_only_the_min_max_over_all_positions(build_clip):
    tower = text_tower(build_clip())
    short = torch.tensor([[298, 5, 9, 33, 299]])
    padded = F.pad(short, (0, 10))
    image = F.normalize(torch.randn(1, 24), dim=-1)

    def maps(ids, over):
        words = (ids > 0) & (ids < 298)
        return GradEclip(lambda_over=over, signed=True).text(tower, ids, words).maps(image)[0, 0, :5]

    torch.testing.assert_close(maps(short, "words"), maps(padded, "words"))
    assert (maps(short, "all") - maps(padded, "all")).abs().max() > 1e-6


def test_signed_maps_keep_what_relu_cuts(build_clip):
    tower, x = image_tower(build_clip()), torch.randn(2, 3, 64, 64)
    texts = F.normalize(torch.randn(5, 24), dim=-1)
    signed = GradEclip(signed=True).image(tower, x).maps(texts)
    assert (signed < 0).any()
    torch.testing.assert_close(GradEclip().image(tower, x).maps(texts), signed.relu())


def test_spatial_weights_differ_and_none_drops_them(build_clip):
    tower, x = image_tower(build_clip()), torch.randn(1, 3, 64, 64)
    texts = F.normalize(torch.randn(2, 24), dim=-1)
    raw, projected, none = (GradEclip(spatial=s).image(tower, x) for s in ("raw", "projected", "none"))
    assert (none.weights[0] == 1).all()
    assert (raw.weights[0] - projected.weights[0]).abs().max() > 1e-3
    torch.testing.assert_close(raw.maps(texts), raw.weights[0][:, None] * none.maps(texts))


def test_constant_keys_weigh_every_patch_alike(build_clip):
    model = build_clip()
    block = model.visual.transformer.resblocks[-1]
    with torch.no_grad():
        block.attn.in_proj_weight[32:64] = 0
    explained = GradEclip().image(image_tower(model), torch.randn(1, 3, 64, 64))
    assert (explained.weights[0] == 1).all()


@settings(max_examples=15, deadline=None)
@given(
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    batch=st.integers(1, 3),
    prompts=st.integers(1, 30),
    form=st.sampled_from(["reverse", "features"]),
    layers=st.integers(1, 3),
)
def test_batch_equals_loop_and_order_does_not_matter(build_clip_once, height, width, batch, prompts, form, layers):
    tower = image_tower(build_clip_once)
    torch.manual_seed(batch * 31 + prompts)
    x = torch.randn(batch, 3, 16 * height, 16 * width, dtype=torch.float64)
    texts = F.normalize(torch.randn(prompts, 24, dtype=torch.float64), dim=-1)
    method = GradEclip(layers=layers)
    together = method.image(tower, x).maps(texts, form=form)
    for b in range(batch):
        torch.testing.assert_close(method.image(tower, x[b : b + 1]).maps(texts, form=form)[0], together[b])
    order = torch.randperm(prompts)
    torch.testing.assert_close(method.image(tower, x).maps(texts[order], form=form), together[:, order])
    own = method.image(tower, x).maps(texts.expand(batch, -1, -1).clone(), form=form)
    torch.testing.assert_close(own, together)


@pytest.fixture(scope="module")
def build_clip_once() -> CLIP:
    torch.manual_seed(3)
    return (
        CLIP(
            embed_dim=24,
            vision_cfg=CLIPVisionCfg(image_size=32, patch_size=16, layers=3, width=32, head_width=8),
            text_cfg=CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=4, layers=2),
        )
        .double()
        .eval()
    )


@pytest.mark.parametrize("parameters", [{}, {"layers": 2}, {"spatial": "combined"}], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)])
def test_precision_of_the_trunk(build_clip, dtype, tolerance, parameters):
    model, method = build_clip(), GradEclip(**parameters)
    x = torch.randn(2, 3, 64, 64)
    texts = F.normalize(torch.randn(6, 24), dim=-1)
    exact = method.image(image_tower(build_clip().double()), x.double()).maps(texts.double())
    tower = image_tower(model, dtype)
    maps = method.image(tower, x).maps(texts)
    assert maps.dtype == torch.float32 and maps.isfinite().all()
    assert (maps - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"heads": "two"}, "heads='two' is not a choice"),
        ({"layers": 0}, "at least 1"),
        ({"reduce": "mean"}, "reduce='mean'"),
    ],
)
def test_bad_parameters(parameters, message):
    with pytest.raises(InputError, match=message):
        GradEclip(**parameters)


def test_more_layers_than_blocks(build_clip):
    with pytest.raises(InputError, match="this tower has 3 blocks"):
        GradEclip(layers=4).image(image_tower(build_clip()), torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("vision", "spatial"),
    [({}, "raw"), ({}, "combined"), ({"pool_type": "avg", "final_ln_after_pool": True}, "raw")],
)
def test_from_the_last_blocks_input(build_clip, vision, spatial):
    tower, x = image_tower(build_clip(**vision).double()), torch.randn(3, 3, 64, 64, dtype=torch.float64)
    texts = F.normalize(torch.randn(4, 24, dtype=torch.float64), dim=-1)
    method = GradEclip(spatial=spatial)
    h = tower.run(tower.embed(x), stop=tower.depth - 1)
    found, want = method.from_last_block(tower, h), method.image(tower, x)
    torch.testing.assert_close(found.z, want.z, rtol=0, atol=1e-14)
    torch.testing.assert_close(found.maps(texts), want.maps(texts), rtol=0, atol=1e-14)
    with pytest.raises(InputError, match="layers="):
        GradEclip(layers=2).from_last_block(tower, h)
