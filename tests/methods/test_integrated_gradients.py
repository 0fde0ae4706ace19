"""Integrated gradients against captum, and against autograd on the model, a step, an image and a prompt at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients as CaptumIntegratedGradients
from captum.attr import LayerIntegratedGradients
from torch import Tensor

import clipfast
from clipfast.data.scenes import Scenes
from clipfast.errors import InputError
from clipfast.methods import integrated_gradients, paths
from clipfast.methods.integrated_gradients import IntegratedGradients
from clipfast.methods.quadrature import RULES, quadrature
from clipfast.models import tower as towers
from clipfast.models.openclip import image_tower, text_tower

VARIANTS = pytest.mark.parametrize(
    "variant",
    [{}, {"image_size": (48, 80)}, {"ls_init_value": 0.5, "quick_gelu": True}],
    ids=["square", "rectangular", "layer-scale"],
)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def score(model, text):
    return lambda x: F.normalize(model.encode_image(x), dim=-1) @ text


def naive(f, x: Tensor, b: Tensor, rule: str, steps: int) -> Tensor:
    """The attribution (3, H, W) of one image (3, H, W) from one baseline, a step at a time."""
    total = torch.zeros_like(x)
    for a, w in zip(*quadrature(rule, steps), strict=True):
        point = (b + a * (x - b)).requires_grad_()
        total += w * torch.autograd.grad(f(point[None])[0], point)[0]
    return total * (x - b)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert (found - expected).norm() <= tolerance * expected.norm()


@VARIANTS
@pytest.mark.parametrize("own", [False, True])
def test_pixels_equal_naive_autograd(build_clip, variant, own):
    model = build_clip(**variant).double()
    x = torch.randn(2, 3, *variant.get("image_size", (64, 64)), dtype=torch.float64)
    b = torch.randn(3, 1, 1, dtype=torch.float64)
    texts = unit(2, 3, 24) if own else unit(3, 24)
    method = IntegratedGradients(steps=5, baseline=b)
    explained = method.image(image_tower(model), x)
    maps, delta = explained.maps(texts), explained.extras()["delta"]
    assert method.grid(image_tower(model), x.shape[2:]) == x.shape[2:]
    for i in range(2):
        for p in range(3):
            f = score(model, texts[i, p] if own else texts[p])
            expected = naive(f, x[i], b.expand_as(x[i]), "gausslegendre", 5)
            close(maps[i, p], expected.sum(0).flatten())
            gain = f(x[i : i + 1]) - f(b.expand_as(x[i])[None])
            torch.testing.assert_close(delta[i, p], (expected.sum() - gain)[0].detach(), rtol=0, atol=1e-12)
    assert delta.abs().min() > 1e-9


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_equals_captums_integrated_gradients(build_clip, rule):
    model = build_clip(image_size=(48, 80)).double()
    x, text = torch.randn(2, 3, 48, 80, dtype=torch.float64), unit(1, 24)
    f = score(model, text[0])
    expected, delta = CaptumIntegratedGradients(f).attribute(
        x, n_steps=6, method=rule, internal_batch_size=4, return_convergence_delta=True
    )
    explained = IntegratedGradients(steps=6, rule=rule, baseline="mean").image(image_tower(model), x)
    # captum rounds its weights to float32.
    close(explained.maps(text)[:, 0], expected.sum(1).flatten(1).detach(), 1e-6)
    torch.testing.assert_close(explained.extras()["delta"][:, 0], delta.detach(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rule", ["gausslegendre", "riemann_trapezoid"])
@pytest.mark.parametrize("at", ["tokens", 0, 1, -1])
@VARIANTS
def test_layers_equal_captums_layer_integrated_gradients(build_clip, variant, at, rule):
    model = build_clip(**variant).double()
    x = torch.randn(2, 3, *variant.get("image_size", (64, 64)), dtype=torch.float64)
    b, text = torch.full((1, 3, 1, 1), 0.3, dtype=torch.float64), unit(1, 24)
    layer = model.visual.conv1 if at == "tokens" else model.visual.transformer.resblocks[at]
    expected, delta = LayerIntegratedGradients(score(model, text[0]), layer).attribute(
        x,
        b.expand_as(x),
        n_steps=4,
        method=rule,
        attribute_to_layer_input=at != "tokens",
        return_convergence_delta=True,
    )
    expected = expected.sum(1).flatten(1) if at == "tokens" else expected[:, 1:].sum(-1)
    explained = IntegratedGradients(steps=4, rule=rule, at=at, baseline=b[0]).image(image_tower(model), x)
    close(explained.maps(text)[:, 0], expected.detach(), 1e-6)
    torch.testing.assert_close(explained.extras()["delta"][:, 0], delta.detach(), rtol=1e-4, atol=1e-7)


def test_float32_equals_captum(build_clip):
    model = build_clip()
    x, text = torch.randn(1, 3, 64, 64), unit(1, 24).float()
    expected = CaptumIntegratedGradients(score(model, text[0])).attribute(x, n_steps=8).sum(1).flatten(1).detach()
    ours = IntegratedGradients(steps=8, baseline="mean").image(image_tower(model), x)
    close(ours.maps(text)[:, 0], expected, 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-2)])
def test_half_precision_trunks(build_clip, dtype, tolerance):
    x, texts = torch.randn(2, 3, 64, 64), unit(3, 24)
    for at in ("pixels", -1):
        method = IntegratedGradients(steps=8, at=at)
        exact = method.image(image_tower(build_clip().double()), x.double()).maps(texts)
        maps = method.image(image_tower(build_clip(), dtype), x.to(dtype)).maps(texts.float())
        assert maps.dtype == torch.float32
        close(maps.double(), exact, tolerance)


def test_the_map_in_pixels_adds_up_to_that_in_tokens(build_clip):
    tower, x, texts = image_tower(build_clip().double()), torch.randn(2, 3, 64, 64, dtype=torch.float64), unit(3, 24)
    pixels = IntegratedGradients(steps=4).image(tower, x).maps(texts).unflatten(2, (4, 16, 4, 16))
    tokens = IntegratedGradients(steps=4, at="tokens").image(tower, x).maps(texts)
    close(pixels.sum((3, 5)).flatten(2), tokens)


def test_pixels_that_no_patch_covers_get_zero(build_clip):
    model = build_clip(image_size=(64, 48)).double()
    x, text = torch.randn(1, 3, 70, 50, dtype=torch.float64), unit(1, 24)
    m = (
        IntegratedGradients(steps=3, baseline="mean")
        .image(image_tower(model), x)
        .maps(text)[0, 0]
        .unflatten(0, (70, 50))
    )
    close(m.flatten(), naive(score(model, text[0]), x[0], torch.zeros_like(x[0]), "gausslegendre", 3).sum(0).flatten())
    assert (m[64:] == 0).all() and (m[:, 48:] == 0).all()


def test_many_prompts_and_small_passes_change_nothing(build_clip, monkeypatch):
    tower, x, texts = image_tower(build_clip().double()), torch.randn(2, 3, 64, 64, dtype=torch.float64), unit(5, 24)
    whole = IntegratedGradients(steps=7).image(tower, x)
    maps, delta = whole.maps(texts), whole.extras()["delta"]
    monkeypatch.setattr(integrated_gradients, "_PROMPTS", 2)
    monkeypatch.setattr(towers, "CPU_TOKENS", 17 * 2 * 3)
    parts = IntegratedGradients(steps=7).image(tower, x)
    torch.testing.assert_close(parts.maps(texts), maps, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(parts.extras()["delta"], delta, rtol=0, atol=1e-14)


def test_black_is_the_models_own(build_clip, tokenizer):
    model = build_clip()
    model.visual.preprocess_cfg = {"mean": (0.2, 0.4, 0.5), "std": (0.5, 0.2, 0.1)}
    x, texts = torch.randn(1, 3, 64, 64), unit(1, 24).float()
    black = torch.tensor((-0.4, -2.0, -5.0))[:, None, None]
    ours = clipfast.explain(x, texts, model=clipfast.load(model), method="integrated_gradients", baseline="black")
    same = IntegratedGradients(baseline=black).image(image_tower(model), x)
    torch.testing.assert_close(ours.maps.flatten(2), same.maps(texts))
    with pytest.raises(InputError, match="without its preprocessing"):
        IntegratedGradients(baseline="black").image(image_tower(model), x)


def test_blur_is_a_gaussian_with_repeated_edges(build_clip):
    x, texts = torch.randn(2, 3, 32, 48, dtype=torch.float64), unit(2, 24)
    sigma = 32 * 10 / 224
    weights = {d: torch.exp(torch.tensor(-(d**2) / (2 * sigma**2), dtype=torch.float64)) for d in range(-5, 6)}
    rows = sum(w * x[:, :, (torch.arange(32) + d).clamp(0, 31)] for d, w in weights.items()) / sum(weights.values())
    b = sum(w * rows[..., (torch.arange(48) + d).clamp(0, 47)] for d, w in weights.items()) / sum(weights.values())
    torch.testing.assert_close(paths.blurred(x, sigma), b, rtol=0, atol=1e-12)
    tower = image_tower(build_clip(image_size=(32, 48)).double())
    maps = IntegratedGradients(steps=3, baseline="blur").image(tower, x).maps(texts)
    for i in range(2):
        alone = IntegratedGradients(steps=3, baseline=b[i]).image(tower, x[i : i + 1]).maps(texts)
        torch.testing.assert_close(maps[i], alone[0], rtol=0, atol=1e-12)


def text_score(model, h: Tensor, pooled: int, image: Tensor, start: int = 0) -> Tensor:
    for block in model.transformer.resblocks[start:]:
        h = block(h, attn_mask=model.attn_mask)
    return F.normalize(model.ln_final(h)[:, pooled] @ model.text_projection, dim=-1) @ image


@pytest.mark.parametrize("at", ["pixels", 1, -1])
def test_words_equal_naive_autograd(build_clip, at):
    model = build_clip().double()
    model.attn_mask = model.attn_mask.double()
    ids = torch.zeros(2, 20, dtype=torch.long)
    ids[0, :7] = torch.tensor([298, 5, 9, 33, 120, 77, 299])
    ids[1, :4] = torch.tensor([298, 250, 3, 299])
    words = torch.zeros_like(ids)
    words[0, 1:6] = torch.tensor([1, 2, 2, 3, 4])
    words[1, 1:3] = torch.tensor([1, 2])
    images = unit(3, 24)
    explained = IntegratedGradients(steps=5, at=at).text(text_tower(model), ids, words)
    maps, delta = explained.maps(images), explained.extras()["delta"]
    first = 0 if at == "pixels" else at % 3
    for i, pooled in enumerate((6, 3)):
        embedded = model.token_embedding(ids[i : i + 1]).detach()
        embedded = torch.stack((embedded, embedded.masked_fill(words[i : i + 1, :, None] > 0, 0)))[:, 0]
        h = (embedded + model.positional_embedding).detach()
        for block in model.transformer.resblocks[:first]:
            h = block(h, attn_mask=model.attn_mask).detach()
        x, b = h[:1], h[1:]
        for p, image in enumerate(images):
            total = torch.zeros_like(x)
            for a, w in zip(*quadrature("gausslegendre", 5), strict=True):
                point = (b + a * (x - b)).requires_grad_()
                total += w * torch.autograd.grad(text_score(model, point, pooled, image, first)[0], point)[0]
            expected = ((x - b) * total).sum(-1)[0, :7]
            gain = (text_score(model, x, pooled, image, first) - text_score(model, b, pooled, image, first))[0]
            inside = words[i, :7] > 0
            close(maps[i, p][inside], expected[inside])
            assert (maps[i, p][~inside] == 0).all()
            torch.testing.assert_close(delta[i, p], (expected.sum() - gain).detach(), rtol=0, atol=1e-12)
            if at == "pixels":
                torch.testing.assert_close(maps[i, p].sum() - delta[i, p], gain.detach(), rtol=0, atol=1e-12)


def test_completeness_on_the_demo_model():
    model = clipfast.load("demo")
    scenes = Scenes(2, seed=5)
    images, texts = [scene.image for scene in scenes], [scene.caption for scene in scenes]
    for at in ("pixels", -1):
        found = clipfast.explain(images, texts, model=model, method="integrated_gradients", steps=32, at=at)
        assert found.extras["delta"].shape == (2, 2)
        assert found.extras["delta"].abs().max() < 1e-3
    # From a uniform image the score of these scenes jumps somewhere on the path, which no few nodes can follow.
    found = clipfast.explain(
        images[:1], texts[:1], model=model, method="integrated_gradients", steps=32, baseline="mean"
    )
    assert found.extras["delta"].abs().max() > 1e-2
    words = clipfast.Explainer(model, "integrated_gradients", steps=256).words(images[0], texts[0])
    assert abs(words.extras["delta"]) < 1e-3


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"rule": "simpson"}, "there is no rule 'simpson'"),
        ({"baseline": "white"}, "must be 'mean', 'black', 'blur'"),
        ({"at": "pixel"}, "must be 'pixels', 'tokens'"),
        ({"at": True}, "must be 'pixels', 'tokens'"),
    ],
)
def test_bad_parameters(parameters, message):
    with pytest.raises(InputError, match=message):
        IntegratedGradients(**parameters)


def test_what_does_not_fit_the_model(build_clip):
    tower, x = image_tower(build_clip()), torch.randn(1, 3, 64, 64)
    with pytest.raises(InputError, match="at=3 is no block of this tower of 3"):
        IntegratedGradients(at=3).image(tower, x)
    with pytest.raises(InputError, match=r"must broadcast to the images' \(3, 64, 64\)"):
        IntegratedGradients(baseline=torch.zeros(3, 32, 32)).image(tower, x)
