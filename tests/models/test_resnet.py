"""ResNet CLIPs give their own scores, from every way to them, and stay as they are."""

from __future__ import annotations

import copy
import json
import warnings

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.factory import _MODEL_CONFIGS
from torch import nn

import clipfast
from clipfast.errors import ImageError, InputError, ModelError
from clipfast.models.load import known_models
from clipfast.models.resnet import ResNetTower, resnet_tower


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small architecture that open_clip knows by name; its twin has other blocks in the third stage."""
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 2, 1], "width": 8, "patch_size": None},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
    }
    monkeypatch.setitem(_MODEL_CONFIGS, "RN-clipfast-test", config)
    (tmp_path / "RN-clipfast-test.json").write_text(json.dumps(config))
    twin = {**config, "vision_cfg": {**config["vision_cfg"], "layers": [1, 1, 3, 1]}}
    monkeypatch.setitem(_MODEL_CONFIGS, "RN-clipfast-twin", twin)
    torch.manual_seed(0)
    return open_clip.create_model("RN-clipfast-test").eval()


def close(found: torch.Tensor, expected: torch.Tensor, error: float = 1e-5) -> None:
    assert (found - expected).norm() / expected.norm() < error


@torch.no_grad()
def own(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module.encode_image(x, normalize=True)


@pytest.mark.parametrize(
    "variant",
    [{}, {"layers": (1, 1, 1, 1)}, {"layers": (2, 1, 3, 1), "width": 32, "image_size": 64}, {"image_size": 224}],
    ids=["small", "one-block-stages", "wider", "large"],
)
def test_embeddings_equal_the_models_own(build_resnet, variant):
    model = build_resnet(**variant)
    x = torch.randn(2, 3, *[variant.get("image_size", 96)] * 2)
    with torch.no_grad():
        close(resnet_tower(model).encode(x), own(model, x))
        model, x = model.double(), x.double()
        torch.testing.assert_close(resnet_tower(model).encode(x), own(model, x), rtol=0, atol=1e-12)


def test_another_grid_resizes_the_positions(build_resnet):
    model = build_resnet().double()
    pool = copy.deepcopy(model.visual.attnpool)
    spatial = pool.positional_embedding[1:].T.unflatten(1, (3, 3))[None]
    resized = F.interpolate(spatial, size=(2, 5), mode="bicubic", align_corners=False)[0].flatten(1).T
    pool.positional_embedding = nn.Parameter(torch.cat((pool.positional_embedding[:1], resized)))
    wide = copy.deepcopy(model)
    wide.visual.attnpool = pool
    x = torch.randn(2, 3, 64, 160, dtype=torch.float64)
    tower = resnet_tower(model)
    with torch.no_grad():
        assert tower.grid_of(x) == (2, 5)
        torch.testing.assert_close(tower.encode(x), own(wide, x), rtol=0, atol=1e-12)
        torch.testing.assert_close(tower.encode(F.pad(x, (0, 31, 0, 17), value=3.0)), tower.encode(x))
        with pytest.raises(InputError, match="31 x 64 pixels hold no patch"):
            tower.encode(torch.randn(1, 3, 31, 64, dtype=torch.float64))


@pytest.mark.parametrize(
    ("layer", "module", "grid"),
    [
        (-1, "layer4.1", (3, 3)),
        ("layer4", "layer4.1", (3, 3)),
        ("layer4.0", "layer4.0", (3, 3)),
        (-3, "layer3.0", (6, 6)),
        ("layer2", "layer2.1", (12, 12)),
        (0, "layer1.0", (24, 24)),
    ],
)
def test_layers_are_the_modules(build_resnet, layer, module, grid):
    model = build_resnet().double()
    x, seen = torch.randn(2, 3, 96, 96, dtype=torch.float64), []
    tower, watched = resnet_tower(model), copy.deepcopy(model)
    watched.visual.get_submodule(module).register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    expected = own(watched, x)
    with torch.no_grad():
        features = tower.features(x, layer)
        torch.testing.assert_close(features, seen[0], rtol=0, atol=1e-10)
        assert tower.grid_at((96, 96), layer) == grid == tuple(features.shape[2:])
        before = features.clone()
        torch.testing.assert_close(tower.from_features(features, layer), expected, rtol=0, atol=1e-12)
        assert torch.equal(features, before)


@pytest.mark.parametrize("layer", ["layer5", "layer4.2", "layer", 6, -7, None, 1.5])
def test_layers_that_there_are_not(build_resnet, layer):
    with pytest.raises(
        InputError, match=r"is none of this ResNet's: give the number of one of its 6 layers, or a name"
    ):
        resnet_tower(build_resnet()).grid_at((96, 96), layer)


def test_half_precision(build_resnet):
    x = F.interpolate(torch.randn(4, 3, 5, 5), size=96, mode="bilinear")
    with torch.no_grad():
        for dtype in (torch.float16, torch.bfloat16):
            half = build_resnet().to(dtype)
            # On a CPU it runs in float32: all that is lost is the rounding of the weights.
            tower = resnet_tower(half)
            assert tower.dtype == tower.result_dtype == torch.float32
            close(tower.encode(x), own(copy.deepcopy(half).float(), x))
        mixed = build_resnet()
        open_clip.model.convert_weights_to_lp(mixed, torch.float16)
        close(resnet_tower(mixed).encode(x), own(copy.deepcopy(mixed).float(), x))
        model = build_resnet()
        asked, expected = resnet_tower(model, torch.bfloat16), own(model, x)
        assert asked.dtype == torch.bfloat16 and asked.encode(x).dtype == asked.result_dtype == torch.float32
        theirs = (own(half, x.bfloat16()) - expected).norm() / expected.norm()
        close(asked.encode(x), expected, 1.5 * theirs)


def test_half_precision_through_the_engine(build_resnet, tokenizer):
    reference = clipfast.load(build_resnet(), tokenizer=tokenizer)
    half = clipfast.load(build_resnet().half(), tokenizer=tokenizer)
    x = torch.randn(2, 3, 96, 96)
    scores = [clipfast.explain(x, ["a dog", "a boat"], model=m, method="layer_cam").scores for m in (reference, half)]
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-2)


def test_the_model_is_neither_called_nor_changed(build_resnet, tokenizer):
    module = build_resnet().train()
    module.visual.layer4.register_forward_hook(lambda *_: pytest.fail("the user's module was called"))
    module.visual.layer1[0].conv1.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    flags = [p.requires_grad for p in module.parameters()]
    model = clipfast.load(module, tokenizer=tokenizer)
    clipfast.explain(torch.randn(2, 3, 96, 96), ["a dog"], model=model, method="layer_cam")
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert [p.requires_grad for p in module.parameters()] == flags
    assert all(p.grad is None for p in module.parameters()) and all(m.training for m in module.modules())


def test_a_tower_is_kept_until_weights_or_statistics_change(build_resnet):
    module = build_resnet()
    model = clipfast.load(module)
    tower, x = model.towers()[0], torch.randn(2, 3, 96, 96)
    assert isinstance(tower, ResNetTower) and model.towers()[0] is tower
    with torch.no_grad():
        module.visual.layer3[0].conv2.weight.mul_(1.5)
        changed = model.towers()[0]
        close(changed.encode(x), own(module, x))
        assert (changed.encode(x) - tower.encode(x)).abs().max() > 1e-3
        module.train().encode_image(x)  # moves the running statistics, and no parameter
        moved = model.towers()[0]
        close(moved.encode(x), own(module.eval(), x))
        assert (moved.encode(x) - changed.encode(x)).abs().max() > 1e-3


def test_structures_that_do_not_fit(build_resnet):
    model = build_resnet()
    model.visual.layer2[1].bn3 = nn.GroupNorm(2, 128)
    with pytest.raises(ModelError, match=r"visual.layer2.1.bn3 \(GroupNorm\) is not a batch norm"):
        resnet_tower(model)
    model = build_resnet()
    model.visual.layer1[0].conv2 = nn.Conv2d(16, 16, 3, padding=2, dilation=2, bias=False)
    with pytest.raises(ModelError, match=r"visual.layer1.0.conv2 is grouped, dilated or padded"):
        resnet_tower(model)
    model = build_resnet()
    model.visual.layer3[0].act2 = nn.GELU()
    with pytest.raises(ModelError, match=r"visual.layer3.0 activates with GELU, not ReLU"):
        resnet_tower(model)
    model = build_resnet()
    del model.visual.attnpool.q_proj
    with pytest.raises(ModelError, match=r"visual.attnpool \(AttentionPool2d\) has no 'q_proj'; clipfast reads"):
        resnet_tower(model)
    model = build_resnet()
    del model.visual.layer3
    with pytest.raises(ModelError, match=r"visual \(ModifiedResNet\) has no 'layer3'"):
        clipfast.load(model)


def same_scores(model: clipfast.Model, module: nn.Module) -> None:
    x, texts = torch.randn(2, 3, 64, 64), ["a dog", "two black cats"]
    with torch.no_grad():
        expected = own(module, x) @ module.encode_text(model.tokenizer(texts), normalize=True).T
    found = clipfast.explain(x, texts, model=model, method="layer_cam")
    torch.testing.assert_close(found.scores, expected, rtol=0, atol=1e-6)
    assert found.maps.shape == (2, 2, 2, 2)


def test_names_paths_and_modules(small, tmp_path):
    torch.save(small.state_dict(), tmp_path / "weights.pt")
    same_scores(clipfast.load(tmp_path / "weights.pt"), small)
    same_scores(clipfast.load("RN-clipfast-test", pretrained=tmp_path / "weights.pt"), small)
    same_scores(clipfast.load(small), small)
    assert "RN-clipfast-test:random: 5 x 256, patch 32, input 64 x 64" in repr(clipfast.load("RN-clipfast-test:random"))


def test_openai_archive(small, tmp_path):
    """OpenAI publishes TorchScript archives in half precision; open_clip's own loader rebuilds the module."""
    quick = open_clip.CLIP(**{**open_clip.get_model_config("RN-clipfast-test"), "quick_gelu": True}).eval()
    open_clip.model.convert_weights_to_lp(quick)
    quick.float()
    mask = quick.attn_mask
    del quick.attn_mask
    quick.attn_mask = mask
    ids = torch.zeros(1, 77, dtype=torch.long)
    ids[0, 1] = 49407
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(quick, (torch.randn(1, 3, 64, 64), ids), check_trace=False)
    traced.save(str(tmp_path / "openai.pt"))
    same_scores(clipfast.load(tmp_path / "openai.pt"), quick)


def test_known_resnets():
    known = known_models()
    assert {"RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"} <= set(known)
    assert "openai" in known["RN101"] and "yfcc15m" in known["RN50"]


def test_methods_that_need_blocks_say_so(build_resnet, tokenizer):
    model = clipfast.load(build_resnet(), tokenizer=tokenizer)
    with pytest.raises(
        InputError,
        match=r"gem cannot explain images with CLIP, whose image tower is a ResNet, whose places do not attend to each "
        r"other; these methods can: grad_eclip, .*_cam",
    ):
        clipfast.explain(torch.randn(1, 3, 96, 96), ["a dog"], model=model, method="gem")


def test_words_are_explained_as_ever(build_resnet, tokenizer):
    model = clipfast.load(build_resnet(), tokenizer=tokenizer)
    x = torch.randn(3, 96, 96)
    words = clipfast.Explainer(model, "grad_eclip").words(x, "a red dog")
    assert words.words == ["a", "red", "dog"] and len(words.values) == 3
    score = clipfast.explain(x, ["a red dog"], model=model, method="layer_cam").scores
    assert words.score == pytest.approx(float(score), abs=1e-6)


def test_images_too_small_are_skipped_or_named(build_resnet, tokenizer):
    model = clipfast.load(build_resnet(), tokenizer=tokenizer)
    images = [torch.randn(3, 96, 96), torch.randn(3, 20, 96)]
    with pytest.raises(ImageError, match="20 x 96 pixels holds no patch of 32 x 32"):
        clipfast.explain(images, ["a dog"], model=model, method="layer_cam")
    found = clipfast.explain(images, ["a dog"], model=model, method="layer_cam", on_error="skip")
    assert list(found.errors) == [1]
