"""MMEL against naive loops over open_clip's own modules, in both modes and on both sides."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.errors import InputError
from clipfast.methods.grad_eclip import GradEclip
from clipfast.methods.mmel import Mmel
from clipfast.models.openclip import image_tower, text_tower
from clipfast.ops.minmax import minmax

SCALES = (1.0, 0.75, 0.5)


def naive_pass(blocks, h: Tensor, mask: Tensor | None) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """One sequence h (N, D) through all blocks with gradients at attention outputs: (output, (q, k, v, o) a layer)."""
    layers = []
    for block in blocks:
        q, k, v = F.linear(block.ln_1(h), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
        heads = block.attn.num_heads
        split = [t.unflatten(-1, (heads, -1)) for t in (q, k, v)]
        logits = torch.einsum("mhd,nhd->hmn", split[0], split[1]) / split[0].shape[-1] ** 0.5
        a = (logits if mask is None else logits + mask).softmax(-1)
        o = torch.einsum("hmn,nhd->mhd", a, split[2]).flatten(1)
        o = o.requires_grad_() if not o.requires_grad else o
        layers.append((q, k, v, o))
        h = h + block.ls_1(block.attn.out_proj(o))
        h = h + block.ls_2(block.mlp(block.ln_2(h)))
    return h, layers


def naive_base(layers, score: Tensor, pooled: int, places: list[int], explained: int) -> Tensor:
    """Grad-ECLIP with the combined weight, before ReLU, summed over the last `explained` layers: (n,)."""
    total = torch.zeros(len(places), dtype=torch.float64)
    for q, k, v, o in layers[-explained:]:
        g = torch.autograd.grad(score, o, retain_graph=True)[0][pooled]
        weight = torch.stack(
            [
                (
                    F.cosine_similarity(q[pooled], k[i], dim=0)
                    + sum(F.cosine_similarity(q[j], k[i], dim=0) for j in places) / len(places)
                )
                / 2
                for i in places
            ]
        )
        total += (weight - weight.min()) / (weight.max() - weight.min()) * (v[places] @ g)
    return total.detach()


def average_pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    """x (h, w, D) to (*size, D): each cell the mean of what it covers, cells at a border in both."""
    rows = []
    for i in range(size[0]):
        top, bottom = math.floor(i * x.shape[0] / size[0]), math.ceil((i + 1) * x.shape[0] / size[0])
        row = []
        for j in range(size[1]):
            left, right = math.floor(j * x.shape[1] / size[1]), math.ceil((j + 1) * x.shape[1] / size[1])
            row.append(x[top:bottom, left:right].mean((0, 1)))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    """x (h, w) read at the centres of a grid of `size`, clamped at the borders."""

    def around(i: int, length: int, to: int) -> tuple[int, int, float]:
        at = max(0.0, (i + 0.5) * length / to - 0.5)
        return int(at), min(int(at) + 1, length - 1), at - int(at)

    out = torch.empty(size, dtype=x.dtype)
    for i in range(size[0]):
        top, bottom, y = around(i, x.shape[0], size[0])
        for j in range(size[1]):
            left, right, z = around(j, x.shape[1], size[1])
            out[i, j] = (1 - y) * ((1 - z) * x[top, left] + z * x[top, right]) + y * (
                (1 - z) * x[bottom, left] + z * x[bottom, right]
            )
    return out


def naive_pooled(queries: list[Tensor], grid: tuple[int, int], theta: list[float], temperature: float) -> Tensor:
    """The standardised sum of levels (n,) from each layer's queries (n, D)."""
    weights = [math.log(1 + math.exp(t)) for t in theta]
    total = torch.zeros(grid, dtype=torch.float64)
    for scale in SCALES:
        size = max(1, round(grid[0] * scale)), max(1, round(grid[1] * scale))
        for q, weight in zip(queries, weights, strict=True):
            x = average_pool(q.unflatten(0, grid), size).flatten(0, 1)
            cosine = torch.stack([F.cosine_similarity(row[None], x, dim=-1) for row in x])
            importance = (cosine / temperature).softmax(dim=1).mean(dim=0).unflatten(0, size)
            total += bilinear(importance, grid) * weight / sum(weights)
    total = total.flatten()
    deviation = (total - total.mean()).square().mean().sqrt()
    # Two places pay each other the same attention: nothing but rounding deviates.
    return torch.zeros_like(total) if deviation <= 1e-6 * total.mean() else (total - total.mean()) / deviation


def paper_similarities(queries: Tensor, seed: int) -> list[Tensor]:
    """A (n, n) of one layer's queries (n, D), at each scale."""
    width = queries.shape[1]
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width), nn.LayerNorm(width))
    network.double()
    found = []
    for scale in SCALES:
        f = F.normalize(network(scale * queries), dim=-1)
        found.append((f @ f.T / width**0.5).detach())
    return found


def naive_paper(queries: list[Tensor], theta: list[float], seed: int) -> Tensor:
    weights = [math.log(1 + math.exp(t)) for t in theta]
    return sum(
        weight * a.mean(1) for q, weight in zip(queries, weights, strict=True) for a in paper_similarities(q, seed)
    )


def image_parts(model, x: Tensor):
    """What the naive versions need of each image: (input of block 0, finish, pooled, places, grid, mask)."""
    v = model.visual
    grid = x.shape[2] // v.patch_size[0], x.shape[3] // v.patch_size[1]
    places = list(range(1, 1 + grid[0] * grid[1]))
    for h in v._embeds(x).detach():
        yield v.transformer.resblocks, h, lambda c: v.ln_post(c) @ v.proj, 0, places, grid, None


IDS = torch.zeros(3, 20, dtype=torch.long)
IDS[0, :9] = torch.tensor([298, 5, 9, 33, 120, 77, 14, 91, 299])
IDS[1, :4] = torch.tensor([298, 250, 3, 299])
IDS[2, :3] = torch.tensor([298, 41, 299])
# Of the first text a position in the middle belongs to no word.
PLACES = [[1, 2, 3, 5, 6, 7], [1, 2], [1]]
WORDS = torch.stack([torch.isin(torch.arange(20), torch.tensor(p)) for p in PLACES])


def text_parts(model):
    pooled = IDS.argmax(-1).tolist()
    h = (model.token_embedding(IDS) + model.positional_embedding).detach()
    for row, at, places in zip(h, pooled, PLACES, strict=True):
        yield (
            model.transformer.resblocks,
            row,
            lambda c: model.ln_final(c) @ model.text_projection,
            at,
            places,
            (1, len(places)),
            model.attn_mask.double(),
        )


def naive(parts, texts: Tensor, explained: int, method: Mmel) -> list[list[Tensor]]:
    """maps[b][p] (places,) of each input and each text."""
    found = []
    for blocks, h, finish, pooled, places, grid, mask in parts:
        out, layers = naive_pass(blocks, h, mask)
        queries = [q[places].detach() for q, *_ in layers]
        theta = [method.theta] * len(blocks) if isinstance(method.theta, float) else method.theta
        if method.mode == "pooled":
            level = naive_pooled(queries, grid, theta, method.temperature)
        else:
            level = naive_paper(queries, theta, method.seed)
        factor = method.beta + method.alpha * torch.sigmoid(level)
        z = F.normalize(finish(out[pooled]), dim=-1)
        maps = []
        for t in texts:
            base = naive_base(layers, z @ t, pooled, places, explained)
            maps.append((base if method.signed else base.relu()) * factor)
        found.append(maps)
    return found


SETTINGS = {
    "default": {},
    "paper": {"mode": "paper", "seed": 3},
    "all": {"alpha": 0.7, "beta": 0.3, "temperature": 0.4, "theta": [-1.0, 0.5, 2.0], "signed": True},
    "paper-all": {"mode": "paper", "alpha": 3.0, "beta": 0.5, "theta": [0.1, 2.0, -3.0]},
}


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(
    "variant",
    [{}, {"image_size": (48, 80), "quick_gelu": True, "ls_init_value": 0.5}, {"image_size": (16, 48)}],
    ids=["square", "rectangular", "one-row"],
)
def test_image_maps_equal_the_naive_definition(build_clip, variant, settings):
    model = build_clip(**variant).double()
    size = variant.get("image_size", (64, 64))
    x, texts, method = torch.randn(2, 3, *size, dtype=torch.float64), unit(3, 24), Mmel(**settings)
    expected = torch.stack([torch.stack(maps) for maps in naive(image_parts(model, x), texts, 1, method)])
    tower = image_tower(model)
    explained = method.image(tower, x)
    torch.testing.assert_close(explained.maps(texts), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(explained.maps(texts[:1]), expected[:, :1], rtol=0, atol=1e-10)
    own = torch.stack([texts[[2, 0]], texts[[1, 1]]])
    swapped = torch.stack([expected[0, [2, 0]], expected[1, [1, 1]]])
    torch.testing.assert_close(explained.maps(own), swapped, rtol=0, atol=1e-10)
    values, weights = explained.prompt_free()
    products = weights[:, None] * (texts @ values.mT)
    torch.testing.assert_close(products if method.signed else products.relu(), expected, rtol=0, atol=1e-10)
    assert method.has_features


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_text_maps_equal_the_naive_definition(build_clip, settings):
    model, images, method = build_clip().double(), unit(2, 24), Mmel(**settings)
    # One word alone has no min-max to speak of: its weight is one.
    expected = naive(list(text_parts(model))[:2], images, 3, method)
    maps = method.text(text_tower(model), IDS, WORDS).maps(images)
    for b, found in enumerate(expected):
        for p, m in enumerate(found):
            torch.testing.assert_close(maps[b, p, PLACES[b]], m, rtol=0, atol=1e-10)
    assert maps.isfinite().all() and (maps.abs().sum(1)[2] > 0).sum() <= 1
    assert (maps.movedim(1, -1)[~WORDS[:, : maps.shape[-1]]] == 0).all()


def test_one_word_is_raised_by_half_of_alpha(build_clip):
    tower, images = text_tower(build_clip().double()), unit(1, 24)
    base = GradEclip(spatial="combined", signed=True).text(tower, IDS[2:], WORDS[2:]).maps(images)
    found = Mmel(alpha=3.0, beta=0.5, signed=True).text(tower, IDS[2:], WORDS[2:]).maps(images)
    torch.testing.assert_close(found, 2.0 * base, rtol=1e-12, atol=0)
    assert base.abs().sum() > 0


@pytest.mark.parametrize("mode", ["pooled", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_of_zero_is_the_base_to_the_last_bit(build_clip, mode, dtype):
    model = build_clip().to(dtype)
    x, texts = torch.randn(2, 3, 64, 64, dtype=dtype), unit(5, 24).to(dtype)
    towers = image_tower(model), text_tower(model)
    for of in (lambda m: m.image(towers[0], x), lambda m: m.text(towers[1], IDS, WORDS)):
        ours, base = of(Mmel(mode=mode, alpha=0.0)), of(GradEclip(spatial="combined"))
        for form in ("reverse", "features"):
            assert torch.equal(ours.maps(texts, form=form), base.maps(texts, form=form))
        for a, b in zip(ours.prompt_free(), base.prompt_free(), strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(of(Mmel(mode=mode)).maps(texts), base.maps(texts))


def test_the_paper_mode_sees_one_scale_three_times(build_clip):
    """Why there is `mode="pooled"`: T, untrained, gives all three scales one map, and the factor is nearly constant."""
    model = build_clip().double()
    x, texts = torch.randn(2, 3, 64, 64, dtype=torch.float64), unit(4, 24)
    for blocks, h, _, _, places, _, mask in image_parts(model, x):
        for q, *_ in naive_pass(blocks, h, mask)[1]:
            similarities = torch.stack([a.flatten() for a in paper_similarities(q[places].detach(), 0)])
            assert torch.corrcoef(similarities).min() > 0.9
    tower = image_tower(model)
    base = minmax(GradEclip(spatial="combined").image(tower, x).maps(texts), constant=0.0)
    change = {
        mode: float((minmax(Mmel(mode=mode).image(tower, x).maps(texts), constant=0.0) - base).norm() / base.norm())
        for mode in ("paper", "pooled")
    }
    assert change["paper"] < 0.02 < change["pooled"]


def test_contrast_is_a_power_of_the_min_maxed_map(build_clip):
    model = build_clip().double()
    tower, x, texts = image_tower(model), torch.randn(2, 3, 64, 64, dtype=torch.float64), unit(3, 24)
    plain = Mmel().image(tower, x).maps(texts)
    low, high = plain.amin(-1, keepdim=True), plain.amax(-1, keepdim=True)
    method = Mmel(contrast=1.7)
    torch.testing.assert_close(method.image(tower, x).maps(texts), ((plain - low) / (high - low)) ** 1.7)
    assert not method.has_features
    words = Mmel(contrast=0.5, signed=True).text(text_tower(model), IDS, WORDS).maps(texts)
    plain = Mmel(signed=True).text(text_tower(model), IDS, WORDS).maps(texts)
    for b, places in enumerate(PLACES[:2]):
        inside = plain[b][:, places]
        low, high = inside.amin(-1, keepdim=True), inside.amax(-1, keepdim=True)
        torch.testing.assert_close(words[b][:, places], ((inside - low) / (high - low)) ** 0.5)
    # One word is a constant, and no other place has a value.
    assert (words[2] == 0).all() and (words.movedim(1, -1)[~WORDS[:, : words.shape[-1]]] == 0).all()


def test_half_precision_trunks(build_clip):
    x, texts = torch.randn(2, 3, 64, 64), unit(3, 24).float()
    exact = Mmel().image(image_tower(build_clip().double()), x.double()).maps(texts.double())
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)):
        maps = Mmel().image(image_tower(build_clip(), dtype), x).maps(texts)
        assert maps.dtype == torch.float32
        assert (maps - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"mode": "papers"}, "mode='papers' is not a choice"),
        ({"alpha": -1}, "alpha=-1 .* at least 0"),
        ({"alpha": float("inf")}, "alpha=inf .* at least 0"),
        ({"temperature": 0}, "temperature=0 of Mmel must be above 0"),
        ({"contrast": 0.0}, "contrast=0.0 of Mmel must be above 0"),
        ({"theta": "high"}, "theta='high' of Mmel must be a number"),
        ({"theta": None}, "theta=None of Mmel must be a number"),
    ],
)
def test_bad_parameters(parameters, message):
    with pytest.raises(InputError, match=message):
        Mmel(**parameters)


def test_theta_must_fit_the_tower(build_clip):
    with pytest.raises(InputError, match="theta has 2 numbers, but this tower has 3 layers"):
        Mmel(theta=(1.0, 2.0)).image(image_tower(build_clip()), torch.randn(1, 3, 64, 64))
