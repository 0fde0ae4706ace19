"""Every way to a model: names, tags, checkpoints of each kind, modules, and what goes wrong."""

from __future__ import annotations

import json
import warnings

import open_clip
import pytest
import torch
from open_clip.factory import _MODEL_CONFIGS
from safetensors.torch import save_file
from torch import nn

import clipfast
from clipfast.data.spec import spec_of
from clipfast.errors import InputError, ModelError, TextError
from clipfast.models.load import known_models


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small architecture that open_clip knows by name, as its own configuration files make one."""
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
    }
    monkeypatch.setitem(_MODEL_CONFIGS, "ViT-clipfast-test", config)
    path = tmp_path / "ViT-clipfast-test.json"
    path.write_text(json.dumps(config))
    torch.manual_seed(0)
    return open_clip.create_model("ViT-clipfast-test").eval()


def same_scores(model: clipfast.Model, module: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    texts = ["a dog", "two black cats"]
    with torch.no_grad():
        expected = module.encode_image(x, normalize=True) @ module.encode_text(model.tokenizer(texts), normalize=True).T
    torch.testing.assert_close(clipfast.explain(x, texts, model=model).scores, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["pt", "training", "safetensors"])
def test_checkpoints(small, tmp_path, kind):
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    weights = small.state_dict()
    if kind == "safetensors":
        save_file({k: v.contiguous() for k, v in weights.items()}, path)
    elif kind == "training":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in weights.items()}}, path)
    else:
        torch.save(weights, path)
    same_scores(clipfast.load(path), small)
    same_scores(clipfast.load("ViT-clipfast-test", pretrained=path), small)
    same_scores(clipfast.load(f"ViT-clipfast-test:{path}"), small)


def test_openai_archive(small, tmp_path):
    """OpenAI publishes TorchScript archives with QuickGELU; open_clip's own loader rebuilds the module."""
    quick = open_clip.CLIP(**{**open_clip.get_model_config("ViT-clipfast-test"), "quick_gelu": True}).eval()
    open_clip.model.convert_weights_to_lp(quick)
    quick.float()  # the published weights are half-precision numbers, and the loader rounds to them
    ids = torch.zeros(1, 77, dtype=torch.long)
    ids[0, 1] = 49407
    # In the published archives the mask is a constant of the program, not a weight.
    mask = quick.attn_mask
    del quick.attn_mask
    quick.attn_mask = mask
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(quick, (torch.randn(1, 3, 32, 32), ids), check_trace=False)
    path = tmp_path / "openai.pt"
    traced.save(str(path))
    same_scores(clipfast.load(path), quick)


def test_same_shapes_are_not_guessed(small, tmp_path, monkeypatch):
    twin = {**open_clip.get_model_config("ViT-clipfast-test"), "quick_gelu": True}
    monkeypatch.setitem(_MODEL_CONFIGS, "ViT-clipfast-twin", twin)
    torch.save(small.state_dict(), tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"fits ViT-clipfast-test and ViT-clipfast-twin, .* say which"):
        clipfast.load(tmp_path / "w.pt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK\x03\x04 cut short"])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_broken_checkpoints(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"{name} cannot be loaded: ") as caught:
        clipfast.load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_checkpoint_of_something_else(tmp_path):
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="not told by its weights' shapes: name its architecture"):
        clipfast.load(tmp_path / "w.pt")
    torch.save([1, 2], tmp_path / "l.pt")
    with pytest.raises(ModelError, match="cannot be loaded"):
        clipfast.load(tmp_path / "l.pt")


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-61", None, "did you mean .*'ViT-B-16'"),
        ("dmeo", None, "did you mean 'demo'"),
        ("ViT-B-16", None, "needs weights: name them as ViT-B-16:openai"),
        ("ViT-B-16", "opanai", "no weights or file 'opanai': did you mean 'openai'"),
        ("missing.pt", None, "no checkpoint missing.pt"),
    ],
)
def test_names_and_tags_that_do_not_exist(name, pretrained, message):
    with pytest.raises(ModelError, match=message):
        clipfast.load(name, pretrained)


def test_known_models():
    known = known_models()
    assert "openai" in known["ViT-B-16"] and "openai" in known["RN50x4"] and "webli" in known["ViT-B-16-SigLIP"]
    assert clipfast.load("ViT-B-32:random").spec.size == (224, 224)


def test_a_module_you_have(build_clip, tokenizer):
    module = build_clip()
    model = clipfast.load(module, tokenizer=tokenizer)
    assert model.module is module and clipfast.load(model) is model
    assert clipfast.explain(torch.randn(1, 3, 64, 64), "a dog", model=model).maps.shape == (1, 1, 4, 4)
    bare = clipfast.load(module)
    with pytest.raises(TextError, match="loaded without a tokenizer"):
        clipfast.explain(torch.randn(1, 3, 64, 64), "a dog", model=bare)
    assert clipfast.explain(torch.randn(1, 3, 64, 64), torch.randn(2, 24), model=bare).maps.shape == (1, 2, 4, 4)


def test_module_with_its_preprocessing(small):
    preprocess = open_clip.image_transform(32, is_train=False, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    model = clipfast.load(small, preprocess=preprocess)
    assert model.spec.mean == pytest.approx((0.1, 0.2, 0.3)) and model.spec.size == (32, 32)
    with pytest.raises(InputError, match="cannot be read"):
        clipfast.load(small, preprocess=lambda image: image)


PREPROCESSINGS = {
    "openai": {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)},
    "siglip": {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "squash"},
    "clipa": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bilinear"},
}


@pytest.fixture
def tagged(small, tmp_path, monkeypatch):
    """Gives the small architecture published weights, each tag with a preprocessing of its own; returns their file."""
    weights = tmp_path / "published.pt"
    torch.save(small.state_dict(), weights)
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: str(weights))

    def publish(*tags: str):
        cards = {tag: {"url": "", **PREPROCESSINGS[tag.split("_")[0]]} for tag in tags}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-clipfast-test", cards)
        return weights

    return publish


@pytest.mark.parametrize("tag", PREPROCESSINGS)
def test_a_tag_brings_its_own_preprocessing(tagged, tag):
    tagged(*PREPROCESSINGS)
    _, _, transform = open_clip.create_model_and_transforms("ViT-clipfast-test", pretrained=tag)
    spec = clipfast.load(f"ViT-clipfast-test:{tag}").spec
    assert spec == spec_of(transform, 16)
    assert spec.mean == PREPROCESSINGS[tag]["mean"] and spec.std == PREPROCESSINGS[tag]["std"]
    assert (spec.resize, spec.interpolation == "bilinear") == ("squash" if tag == "siglip" else "crop", tag == "clipa")


def test_weights_in_a_file_get_the_preprocessing_that_all_tags_share(tagged):
    weights = tagged("siglip_one", "siglip_two")
    assert (
        clipfast.load("ViT-clipfast-test", pretrained=weights).spec
        == clipfast.load("ViT-clipfast-test:siglip_two").spec
    )
    assert clipfast.load(weights).spec.resize == clipfast.load("ViT-clipfast-test:random").spec.resize == "squash"
    tagged("openai", "siglip")
    spec = clipfast.load("ViT-clipfast-test", pretrained=weights).spec
    assert spec.resize == "crop" and spec.mean == PREPROCESSINGS["openai"]["mean"]
    tagged()
    assert clipfast.load(weights).spec == spec


def test_long_texts_say_what_was_lost(small):
    model = clipfast.load(small)
    text = " ".join(["dog"] * 75 + ["zebra", "cake"])
    with pytest.warns(UserWarning, match="cut to the 75 that .* takes; lost: 'zebra cake'"):
        model.tokenize([text])


def test_unknown_precision(small):
    with pytest.raises(InputError, match="did you mean 'bfloat16'"):
        clipfast.load(small).towers("bfloat15")
