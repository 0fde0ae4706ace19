"""Towers of stages give their own scores, from every way to them, and stay as they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import clipfast
from clipfast.errors import InputError, ModelError
from clipfast.finetune.encode import pixel_encoder
from clipfast.methods import METHODS
from clipfast.methods.paths import blurred
from clipfast.models.conv import ConvTower, conv_tower

KINDS = ["convnext", "fastvit", "fastvit5", "swin"]


def close(found: Tensor, expected: Tensor, error: float = 1e-5) -> None:
    assert (found - expected).norm() / expected.norm() < error


@torch.no_grad()
def own(module: nn.Module, x: Tensor) -> Tensor:
    return module.encode_image(x, normalize=True)


def blotches(batch: int, *size: int) -> Tensor:
    return F.interpolate(torch.randn(batch, 3, 5, 5), size=size or (64, 64), mode="bilinear")


@pytest.mark.parametrize(("kind", "proj"), [*((kind, "linear") for kind in KINDS), ("convnext", "mlp")])
def test_embeddings_equal_the_models_own(build_stages, kind, proj):
    model, x = build_stages(kind, proj=proj), blotches(3)
    tower = conv_tower(model)
    assert tower.averages and tower.embed_dim == 24 and tower.width == model.visual.trunk.num_features
    stride = 64 if kind == "fastvit5" else 32
    assert tower.patch_size == (stride, stride) and tower.grid == tower.grid_of(x) == (64 // stride, 64 // stride)
    with torch.no_grad():
        close(tower.encode(x), own(model, x))
        z = own(model, x)
        assert (z @ z.T - torch.eye(3)).abs().max() > 1e-3  # images are told apart
        model, x = model.double(), x.double()
        torch.testing.assert_close(conv_tower(model).encode(x), own(model, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_other_sizes_run_as_in_the_model(build_stages, kind):
    model = build_stages(kind).double()
    tower = conv_tower(model)
    x = blotches(2, 128, 192).double()
    (h, w) = tower.grid_of(x)
    assert (h, w) == (128 // tower.patch_size[0], 192 // tower.patch_size[1])
    with torch.no_grad():
        torch.testing.assert_close(tower.encode(x), own(model, x), rtol=0, atol=1e-12)
        # Pixels beyond the last whole place are not seen.
        torch.testing.assert_close(tower.encode(F.pad(x, (0, 31, 0, 17), value=3.0)), tower.encode(x))
        with pytest.raises(InputError, match="31 x 64 pixels hold no patch"):
            tower.encode(torch.randn(1, 3, 31, 64, dtype=torch.float64))


def test_trunks_of_windows_take_one_size(build_stages, tokenizer):
    model = clipfast.load(build_stages("swin"), tokenizer=tokenizer)
    with pytest.raises(
        InputError, match="images of 64 x 96 pixels do not fit: this SwinTransformer takes only 64 x 64"
    ):
        clipfast.explain(torch.randn(1, 3, 64, 96), ["a dog"], model=model, method="grad_cam")


LAYERS = [
    ("convnext", -1, "stages.3", (2, 2)),
    ("convnext", "stages.1", "stages.1", (8, 8)),
    ("convnext", 0, "stages.0", (16, 16)),
    ("fastvit", -1, "final_conv", (2, 2)),
    ("fastvit", "stages.3", "stages.3", (2, 2)),
    ("fastvit", -3, "stages.2", (4, 4)),
    ("fastvit5", "stages.4", "stages.4", (1, 1)),
    ("fastvit5", 2, "stages.2", (4, 4)),
    ("swin", -1, "norm", (2, 2)),
    ("swin", "layers.2", "layers.2", (4, 4)),
]


@pytest.mark.parametrize(("kind", "layer", "module", "grid"), LAYERS)
def test_layers_are_the_modules(build_stages, kind, layer, module, grid):
    model, x, seen = build_stages(kind).double(), blotches(2).double(), []
    tower, watched = conv_tower(model), copy.deepcopy(model)
    watched.visual.trunk.get_submodule(module).register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    expected = own(watched, x)
    made = seen[0].permute(0, 3, 1, 2) if kind == "swin" else seen[0]
    with torch.no_grad():
        features = tower.features(x, layer)
        torch.testing.assert_close(features, made, rtol=0, atol=1e-12)
        assert tower.grid_at((64, 64), layer) == grid == tuple(features.shape[2:])
        before = features.clone()
        torch.testing.assert_close(tower.from_features(features, layer), expected, rtol=0, atol=1e-12)
        assert torch.equal(features, before)


@pytest.mark.parametrize("layer", ["stage.3", "head", "stages.4", "stages", 4, -5, None, 1.5])
def test_layers_that_there_are_not(build_stages, layer):
    with pytest.raises(
        InputError, match=r"is none of this ConvNeXt's: give the number of one of its 4 layers, or a name; .*stages\."
    ):
        conv_tower(build_stages()).grid_at((64, 64), layer)


def naive_grad_cam(model: nn.Module, module: str, x: Tensor, texts: Tensor) -> Tensor:
    """One image and one prompt at a time, through the whole module: (B, P, h * w)."""
    visual, kept, maps = copy.deepcopy(model.visual), {}, []
    visual.trunk.get_submodule(module).register_forward_hook(lambda _, __, made: kept.update(made=made))
    for image in x:
        scores = F.normalize(visual(image[None]), dim=-1)[0] @ texts.T
        for score in scores:
            (gradient,) = torch.autograd.grad(score, kept["made"], retain_graph=True)
            places, channels = ((1, 2), 3) if model.visual.trunk.__class__.__name__.startswith("Swin") else ((2, 3), 1)
            weighted = gradient.mean(places, keepdim=True) * kept["made"]
            maps.append(weighted.sum(channels).relu().detach().flatten())
    return torch.stack(maps).unflatten(0, (len(x), len(texts)))


@pytest.mark.parametrize("prompts", [3, 26])
@pytest.mark.parametrize(("kind", "layer", "module"), [case[:3] for case in LAYERS])
def test_grad_cam_equals_its_formula(build_stages, kind, layer, module, prompts):
    model, x = build_stages(kind).double(), blotches(2, *((64, 64) if kind == "swin" else (64, 128))).double()
    texts = F.normalize(torch.randn(prompts, 24, dtype=torch.float64), dim=-1)
    expected = naive_grad_cam(model, module, x, texts)
    assert (expected > 0).any()
    found = METHODS["grad_cam"](layer=layer).image(conv_tower(model), x)
    if layer == -1:
        values, weights = found.prompt_free()
        product = (weights[..., None] * (values @ texts.T)).mT.relu()
        torch.testing.assert_close(product, expected, rtol=1e-9, atol=1e-13)
    for _ in range(2):
        torch.testing.assert_close(found.maps(texts), expected, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(found.z, own(model, x), rtol=0, atol=1e-12)
    pairs = torch.stack([texts[:2], texts[1:3]])
    for i, maps in enumerate(found.maps(pairs)):
        torch.testing.assert_close(maps, expected[i, i : i + 2], rtol=1e-9, atol=1e-13)


def test_heads_that_take_no_mean(build_stages):
    """Their gradient differs from place to place, so that it has to go all the way."""
    trunk = timm.create_model("test_convnext", num_classes=24, global_pool="max")
    model, x = build_stages(trunk).double(), blotches(2).double()
    texts = F.normalize(torch.randn(3, 24, dtype=torch.float64), dim=-1)
    tower = conv_tower(model)
    assert not tower.averages
    found = METHODS["grad_cam"]().image(tower, x).maps(texts)
    torch.testing.assert_close(found, naive_grad_cam(model, "stages.3", x, texts), rtol=1e-9, atol=1e-13)


def test_grad_cam_features(build_stages):
    module, x = build_stages().double(), blotches(3).double()
    texts = F.normalize(torch.randn(4, 24, dtype=torch.float64), dim=-1)
    explainer = clipfast.Explainer(clipfast.load(module), "grad_cam")
    torch.testing.assert_close(explainer.features(x).maps(texts).maps, explainer(x, texts).maps, rtol=0, atol=1e-12)


def test_pixel_gradients(build_stages):
    model, x = build_stages().double().requires_grad_(False), blotches(2).double()
    texts = F.normalize(torch.randn(3, 24, dtype=torch.float64), dim=-1)
    found = METHODS["saliency"]().image(conv_tower(model), F.pad(x, (0, 20, 0, 7))).maps(texts).unflatten(2, (71, 84))
    assert (found[..., 64:, :] == 0).all() and (found[..., 64:] == 0).all()
    for i, p in [(0, 0), (1, 2)]:
        pixels = x[i : i + 1].clone().requires_grad_()
        score = (model.encode_image(pixels, normalize=True) @ texts[p]).sum()
        expected = torch.autograd.grad(score, pixels)[0][0].abs().sum(0)
        torch.testing.assert_close(found[i, p, :64, :64], expected, rtol=1e-9, atol=1e-14)
    path = METHODS["integrated_gradients"](steps=32).image(conv_tower(model), x)
    gain = (path.z - own(model, blurred(x, 10 / 224 * 64))) @ texts.T
    torch.testing.assert_close(path.maps(texts).sum(-1), gain, rtol=0, atol=1e-2 * float(gain.abs().max()))


CHEAP: dict[str, dict[str, Any]] = {
    "integrated_gradients": {"steps": 3},
    "smooth_grad": {"samples": 3},
    "rise": {"masks": 9},
    "kernel_shap": {"samples": 20},
    "gscore_cam": {"top": 5},
    "group_cam": {"groups": 4},
}
ABLE = {"grad_cam", "saliency", "score_cam", "grad_cam++", "xgrad_cam", "layer_cam", *CHEAP}
IMAGE = [name for name, method in METHODS.items() if "image" in method.sides()]


@pytest.mark.parametrize("kind", KINDS)
def test_every_method(build_stages, tokenizer, kind):
    model = clipfast.load(build_stages(kind), tokenizer=tokenizer)
    x, texts = blotches(2, *((64, 64) if kind == "swin" else (64, 128))), ["a dog", "a red car"]
    for name in ABLE:
        out = clipfast.explain(x, texts, model=model, method=name, **CHEAP.get(name, {}))
        explainer = clipfast.Explainer(model, name, **CHEAP.get(name, {}))
        assert out.maps.shape == (2, 2, *explainer.grid_of(x.shape[2], x.shape[3])), name
        assert out.maps.isfinite().all() and out.maps.abs().max() > 0, name
    for name in set(IMAGE) - ABLE:
        with pytest.raises(InputError, match=rf"{name} cannot explain images with CLIP, whose image tower is a "):
            clipfast.explain(x, texts, model=model, method=name)


def test_the_default_method_says_what_can(build_stages, tokenizer):
    with pytest.raises(
        InputError,
        match="grad_eclip cannot explain images with CLIP, whose image tower is a ConvNeXt, without an attention that "
        "pools its places; these methods can: grad_cam, ",
    ):
        clipfast.explain(blotches(1), ["a dog"], model=clipfast.load(build_stages(), tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("method", "parameters", "said"),
    [
        ("grad_cam", {"heads": "single"}, "heads='single' of GradCam is for transformers: leave it out for a ConvNeXt"),
        ("integrated_gradients", {"at": -1}, "at=-1 is a transformer's block, and this is a ConvNeXt: leave it out"),
        ("integrated_gradients", {"at": "tokens"}, "linear in the pixels: those of a ConvNeXt are not"),
    ],
)
def test_parameters_for_transformers(build_stages, tokenizer, method, parameters, said):
    model = clipfast.load(build_stages(), tokenizer=tokenizer)
    with pytest.raises(InputError, match=said):
        clipfast.explain(blotches(1), ["a dog"], model=model, method=method, **parameters)


def test_words_are_explained_as_ever(build_stages, tokenizer):
    words = clipfast.Explainer(clipfast.load(build_stages(), tokenizer=tokenizer)).words(blotches(1)[0], "a red dog")
    assert words.words == ["a", "red", "dog"] and len(words.values) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(build_stages, kind, tokenizer):
    x, reference = blotches(3), build_stages(kind)
    with torch.no_grad():
        for dtype in (torch.float16, torch.bfloat16):
            half = copy.deepcopy(reference).to(dtype)
            # On a CPU it runs in float32: all that is lost is the rounding of the weights.
            tower = conv_tower(half)
            assert tower.dtype == tower.result_dtype == torch.float32
            close(tower.encode(x), own(copy.deepcopy(half).float(), x))
        asked = conv_tower(reference, torch.bfloat16)
        assert asked.dtype == torch.bfloat16 and asked.encode(x).dtype == asked.result_dtype == torch.float32
        expected = own(reference, x)
        theirs = (own(half, x.bfloat16()) - expected).norm() / expected.norm()
        close(asked.encode(x), expected, 1.5 * float(theirs))
    out = clipfast.explain(
        x, ["a dog"], model=clipfast.load(reference, tokenizer=tokenizer), method="grad_cam", precision="bfloat16"
    )
    assert out.maps.dtype == torch.float32 and out.maps.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_neither_called_nor_changed(build_stages, kind, tokenizer):
    module = build_stages(kind).train()
    module.visual.trunk.register_forward_hook(lambda *_: pytest.fail("the user's module was called"))
    next(module.visual.parameters()).requires_grad_(False)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    flags = [p.requires_grad for p in module.parameters()]
    model = clipfast.load(module, tokenizer=tokenizer)
    x = blotches(2)
    random = torch.get_rng_state()
    for method in ("grad_cam", "saliency"):
        clipfast.explain(x, ["a dog"], model=model, method=method)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert [p.requires_grad for p in module.parameters()] == flags
    assert all(p.grad is None for p in module.parameters()) and all(m.training for m in module.modules())


def test_a_tower_is_kept_until_weights_or_statistics_change(build_stages):
    module, x = build_stages("fastvit"), blotches(2)
    model = clipfast.load(module)
    tower = model.towers()[0]
    assert isinstance(tower, ConvTower) and model.towers()[0] is tower
    with torch.no_grad():
        before = tower.encode(x)
        next(module.visual.trunk.final_conv.parameters()).mul_(1.5)
        changed = model.towers()[0]
        between = changed.encode(x)
        close(between, own(module, x))
        assert changed is not tower and (between - before).abs().max() > 1e-3
        module.train().encode_image(x + 1)  # moves the running statistics, and no parameter
        moved = model.towers()[0]
        close(moved.encode(x), own(module.eval(), x))
        assert moved is not changed and (moved.encode(x) - between).abs().max() > 1e-3


def test_training(build_stages):
    """Gradients reach the weights, and those of an adversary only the pixels."""
    module, x = build_stages(), blotches(2)
    tower, _ = clipfast.load(module).trained_towers()
    (tower.encode(x) @ torch.ones(24)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.visual.parameters())
    module.zero_grad()
    flat = torch.zeros(3, 1, 1)
    encode = pixel_encoder(module.visual, flat, flat + 1, normalize=False)
    pixels = x.clone().requires_grad_()
    found = encode(pixels)
    torch.testing.assert_close(found, module.visual(x), rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(found.sum(), pixels)[0].abs().sum() > 0
    assert all(p.grad is None for p in module.parameters())


class Scaled(nn.Module):
    """A trunk with a step of its own between its stages and its head."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.stem, self.stages, self.head = trunk.stem, trunk.stages, trunk.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)) * 2)


def test_structures_that_do_not_fit(build_stages):
    model = build_stages()
    model.visual.trunk = Scaled(model.visual.trunk)
    with pytest.raises(
        ModelError, match=r"visual.trunk \(Scaled\) does more than to run its stem, its stages and its head one after"
    ):
        clipfast.load(model)
    model = build_stages()
    del model.visual.trunk.head
    with pytest.raises(ModelError, match=r"visual.trunk \(ConvNeXt\) has no stem, stages and head"):
        clipfast.load(model)
    model = build_stages()
    model.visual.head[-1] = nn.Linear(5, 24)
    with pytest.raises(ModelError, match=r"visual.trunk \(ConvNeXt\) fails on an image of its own size \(.*shapes"):
        clipfast.load(model)
    model = build_stages()
    model.visual.trunk.stages[3] = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Conv2d(24, 64, 1))
    with pytest.raises(ModelError, match=r"makes 3 x 3 places of 64 x 128 pixels"):
        clipfast.load(model)
    model = build_stages()
    prune.l1_unstructured(model.visual.trunk.stem[0], "weight", 2)
    with pytest.raises(ModelError, match=r"trunk.stem.0 \(Conv2d\) computes its weights in a hook of L1Unstructured"):
        clipfast.load(model)


def test_weights_that_are_broken_are_named(build_stages, tokenizer):
    model = build_stages()
    with torch.no_grad():
        model.visual.trunk.stages[1].blocks[0].conv_dw.weight[0] = torch.nan
    with pytest.raises(ModelError, match=r"hold NaN or infinite values, first in visual.trunk.stages.1"):
        clipfast.explain(blotches(1), ["a dog"], model=clipfast.load(model, tokenizer=tokenizer), method="grad_cam")
