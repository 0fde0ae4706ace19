"""The image side of transformers' models is the models' own, and its gradients are those of their modules."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import clipfast
from clipfast.errors import ModelError, TextError
from clipfast.methods.grad_eclip import GradEclip
from clipfast.models import hf_load
from clipfast.models.block import Pool
from clipfast.models.hf import image_tower
from clipfast.models.load import load
from clipfast.models.model import Model

transformers = pytest.importorskip("transformers")

PATCH, GRID = 8, 4
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": PATCH * GRID,
    "patch_size": PATCH,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 20,
    "bos_token_id": 298,
    "eos_token_id": 299,
    "pad_token_id": 1,
}
KINDS = ("CLIP", "MetaClip2", "AltCLIP", "ChineseCLIP", "CLIPSeg", "Siglip", "Siglip2")


def build(kind: str, *, text: dict[str, Any] | None = None, **vision: Any) -> Any:
    """A model of transformers, none of whose weights is zero or one as they start."""
    torch.manual_seed(0)
    own = {**VISION, **vision}
    if kind == "Siglip2":
        own["num_patches"] = GRID * GRID
    text = {**TEXT, **(text or {})}
    if kind.startswith("Siglip"):
        # These have one width for both sides, and no projection.
        text["projection_size"] = own["hidden_size"]
    config = getattr(transformers, f"{kind}Config")(vision_config=own, text_config=text)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = torch.randn_like(parameter) * 0.2
            parameter.copy_(spread + parameter.mean() if parameter.ndim == 1 else spread)
        model.logit_scale.fill_(1.5)
    return model


def own_embeddings(model: Any, x: Tensor) -> Tensor:
    """The model's own unit embeddings of images (B, 3, H, W) of any size."""
    if type(model).__name__ == "Siglip2Model":
        # As its image processor lays patches out, without padding.
        cells = x.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH)).permute(0, 2, 4, 3, 5, 1)
        shapes = torch.tensor([cells.shape[1:3]] * len(x))
        patches = cells.flatten(3).flatten(1, 2)
        found = model.get_image_features(
            pixel_values=patches, pixel_attention_mask=torch.ones(patches.shape[:2]), spatial_shapes=shapes
        )
    else:
        found = model.get_image_features(pixel_values=x, interpolate_pos_encoding=x.shape[2:] != (32, 32))
    # An output object since transformers 5, a tensor before.
    return F.normalize(found if isinstance(found, Tensor) else found.pooler_output, dim=-1)


class OpenPool(nn.Module):
    """torch's MultiheadAttention written out, so that its parts can be looked at."""

    def __init__(self, own: nn.MultiheadAttention):
        super().__init__()
        self.own, self.out_proj = own, own.out_proj

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, None]:
        width, heads = query.shape[-1], self.own.num_heads
        weights = zip(self.own.in_proj_weight.split(width), self.own.in_proj_bias.split(width), strict=True)
        self.q, self.k, self.v = (F.linear(t, *w) for t, w in zip((query, key, value), weights, strict=True))
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (self.q, self.k, self.v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), None


def naive_grad_eclip(model: Any, x: Tensor, texts: Tensor) -> Tensor:
    """H (B, P, n) by automatic differentiation through a copy of the model, with hooks at its last attention."""
    model = copy.deepcopy(model)
    seen: dict[str, Tensor] = {}
    vision = model.vision_model
    if hasattr(vision, "head"):
        attention: Any = OpenPool(vision.head.attention)
        vision.head.attention = attention
        prefix = 0
    else:
        attention = vision.encoder.layers[-1].self_attn
        prefix = 1
        for name in ("q", "k", "v"):
            projection = getattr(attention, f"{name}_proj")
            projection.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o))
    attention.out_proj.register_forward_pre_hook(lambda m, args: seen.__setitem__("o", args[0]))
    maps = []
    for image in x:
        z = own_embeddings(model, image[None])[0]
        if isinstance(attention, OpenPool):
            seen |= {"q": attention.q, "k": attention.k, "v": attention.v}
        q, k, v = (seen[name][0].detach() for name in "qkv")
        k, v = k[prefix:], v[prefix:]
        cosine = F.cosine_similarity(q[:1], k)
        weight = (cosine - cosine.min()) / (cosine.max() - cosine.min())
        rows = []
        for text in texts:
            (g,) = torch.autograd.grad(z @ text, seen["o"], retain_graph=True)
            rows.append((weight * (v @ g[0, 0])).relu())
        maps.append(torch.stack(rows))
    return torch.stack(maps)


def in_float32(model: Any) -> bool:
    """Whether the model's own code computes something in float32 whatever its dtype: NaFlex's positions on a CPU, and
    softmax where transformers 4 knows no fused attention for it."""
    return type(model).__name__ == "Siglip2Model" or model.config._attn_implementation == "eager"


def unit(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_the_models_own(kind):
    model = build(kind)
    for size in ((32, 32), (24, 56), (40, 16)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = own_embeddings(model, x)
            torch.testing.assert_close(image_tower(model).encode(x), expected, rtol=0, atol=1e-5)
            assert (expected[0] - expected[1]).norm() > 0.01
    with torch.no_grad():
        model, x = model.double(), x.double()
        close = 1e-6 if in_float32(model) else 1e-10
        torch.testing.assert_close(image_tower(model).encode(x), own_embeddings(model, x), rtol=0, atol=close)


@pytest.mark.parametrize("kind", ["CLIP", "ChineseCLIP", "Siglip", "Siglip2"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_grad_eclip_is_automatic_differentiation(kind, size):
    model = build(kind).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    texts = unit(3, own_embeddings(model, x).shape[1], dtype=torch.float64)
    expected = naive_grad_eclip(model, x, texts)
    assert (expected > 0).float().mean() > 0.1
    explained = GradEclip().image(image_tower(model), x)
    close = 1e-5 if in_float32(model) else 1e-6
    for form in ("reverse", "features"):
        found = explained.maps(texts, form=form)
        assert (found - expected).abs().max() < close * expected.abs().max()


@pytest.mark.parametrize("kind", ["CLIP", "Siglip", "Siglip2"])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("grad_eclip", {}),
        ("tclip", {}),
        ("mga_clip", {"part": "coarse", "steps": 2}),
        ("integrated_gradients", {"steps": 2}),
        ("saliency", {}),
        ("mask_clip", {}),
        ("attention", {}),
    ],
)
def test_methods(kind, method, parameters):
    model = build(kind)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    flags = [(m.training, len(m._forward_hooks), len(m.__dict__)) for m in model.modules()]
    wants = [p.requires_grad for p in model.parameters()]
    x = torch.randn(2, 3, 24, 40)
    explainer = clipfast.Explainer(Model(model), method, **parameters)
    out = explainer(x, unit(2, own_embeddings(model, x).shape[1]))
    grid = (24, 40) if method in ("integrated_gradients", "saliency") else (3, 5)
    assert out.maps.shape == (2, 2, *grid) and out.maps.isfinite().all() and (out.maps != 0).any()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert flags == [(m.training, len(m._forward_hooks), len(m.__dict__)) for m in model.modules()]
    assert wants == [p.requires_grad for p in model.parameters()] and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["CLIP", "Siglip", "Siglip2"])
def test_half_precision(kind):
    model = build(kind)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = own_embeddings(model, x)
        by_precision = Model(model).towers("bfloat16")[0]
        in_half = image_tower(build(kind).bfloat16())
        for tower in (by_precision, in_half):
            assert tower.dtype == torch.bfloat16 and tower.tail.dtype == torch.float32
            assert (tower.encode(x) - expected).norm() < 2e-2 * expected.norm()


def test_what_is_shared_and_what_is_trained():
    module = build("CLIP")
    tower = image_tower(module)
    layer = module.vision_model.encoder.layers[0]
    assert tower.blocks[0].out.weight.data_ptr() == layer.self_attn.out_proj.weight.data_ptr()
    assert tower.patch_weight.data_ptr() == module.vision_model.embeddings.patch_embedding.weight.data_ptr()
    trained, _ = Model(module).trained_towers()
    trained.encode(torch.randn(1, 3, 32, 32))[0, 0].backward()
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        assert getattr(layer.self_attn, name).weight.grad.abs().max() > 0


def test_changed_weights_are_seen():
    model = Model(build("Siglip"))
    x = torch.randn(1, 3, 32, 32)
    before = model.towers()[0].encode(x)
    with torch.no_grad():
        model.module.vision_model.encoder.layers[0].self_attn.q_proj.weight.mul_(2)
        after = model.towers()[0].encode(x)
        torch.testing.assert_close(after, own_embeddings(model.module, x), rtol=0, atol=1e-5)
    assert (after - before).norm() > 1e-4


def test_the_attention_implementation_does_not_matter():
    model = build("CLIP")
    x = torch.randn(1, 3, 32, 32)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(image_tower(model).encode(x), own_embeddings(model, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "gelu_new", "quick_gelu", "relu", "silu"])
def test_activations(act):
    model = build("Siglip", hidden_act=act)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(image_tower(model).encode(x), own_embeddings(model, x), rtol=0, atol=1e-5)


def test_structures_that_do_not_fit():
    with pytest.raises(ModelError, match=r"vision_model \(XCLIPVision\w+\) has a part 'pre_layernorm'"):
        image_tower(build_plain("XCLIP"))
    model = build("CLIP", hidden_act="mish")
    with pytest.raises(ModelError, match=r"layers.0.mlp.activation_fn is Mish"):
        image_tower(model)
    model = build("CLIP")
    projection = model.vision_model.encoder.layers[1].self_attn.q_proj
    projection.adapter = nn.Linear(32, 32)
    with pytest.raises(ModelError, match=r"layers.1.self_attn.q_proj \(Linear\) has a part 'adapter' that is not"):
        image_tower(model)
    model = build("CLIP")
    del model.visual_projection
    with pytest.raises(ModelError, match="has no 'visual_projection'"):
        image_tower(model)
    with pytest.raises(ModelError, match="is no model that clipfast knows"):
        clipfast.load(transformers.BertModel(transformers.BertConfig(**TEXT)))


def build_plain(kind: str) -> Any:
    config = getattr(transformers, f"{kind}Config")(vision_config=VISION, text_config=TEXT)
    return getattr(transformers, f"{kind}Model")(config).eval()


def clip_tokenizer() -> Any:
    """A fast tokenizer of a few words, framed as CLIP's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "[UNK]", "a", "dog", "cat", "red", "photo", "of"]
    vocabulary = {word: i + (i == 0) for i, word in enumerate(words)} | {"<s>": 298, "</s>": 299}
    vocabulary["[UNK]"] = 8
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 298), ("</s>", 299)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def clip_images() -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def own_scores(model: Any, tokenizer: Any, images: Any, image: Image.Image, texts: list[str]) -> Tensor:
    words = tokenizer(texts, padding="max_length", truncation=True, max_length=20, return_tensors="pt")
    words.pop("token_type_ids", None)
    with torch.no_grad():
        pixels = images(image, return_tensors="pt")["pixel_values"]
        found = model(pixel_values=pixels, **words)
    return found.image_embeds @ found.text_embeds.T


def test_from_a_folder_and_a_module(tmp_path, monkeypatch):
    module, tokenizer, images = build("CLIP"), clip_tokenizer(), clip_images()
    for part in (module, tokenizer, images):
        part.save_pretrained(tmp_path / "org" / "name")
    image = Image.effect_noise((50, 40), 90).convert("RGB")
    texts = ["a photo of a red dog", "a cat"]
    expected = own_scores(module, tokenizer, images, image, texts)
    monkeypatch.chdir(tmp_path)
    # A repository of the hub without open_clip's configuration; transformers itself reads it from this folder.
    monkeypatch.setattr(hf_load, "on_hub", lambda repository, file: False)
    processor = transformers.CLIPProcessor(image_processor=images, tokenizer=tokenizer)
    for model in (
        load(tmp_path / "org" / "name", device="cpu"),
        load("hf:org/name", device="cpu"),
        load(module, tokenizer=tokenizer, preprocess=images),
        load(module, tokenizer=processor),
    ):
        assert model.spec.size == (32, 32) and model.spec.centre == "floor"
        out = clipfast.explain(image, texts, model=model)
        # torchvision's and PIL's resampling differ by levels of the pixels.
        torch.testing.assert_close(out.scores, expected, rtol=0, atol=2e-3)
        words = clipfast.Explainer(model).words(image, "a red dog")
        assert words.words == ["a", "red", "dog"] and words.values.isfinite().all()
    assert load(tmp_path / "org" / "name", device="cpu").module.dtype == torch.float32


@pytest.mark.parametrize("size", [(50, 70), (40, 17)])
def test_images_of_any_shape_as_naflex_pads_them(size):
    """The model's own embedding of padded patches is that of an input without padding."""
    module = build("Siglip2")
    images = transformers.Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=16)
    image = Image.effect_noise(size, 90).convert("RGB")
    inputs = images(image, return_tensors="pt")
    with torch.no_grad():
        found = module.get_image_features(**{name: inputs[name] for name in inputs})
    expected = F.normalize(found if isinstance(found, Tensor) else found.pooler_output, dim=-1)
    model = load(module, preprocess=images)
    out = clipfast.explain(image, torch.eye(expected.shape[1]), model=model)
    rows, columns = inputs["spatial_shapes"][0].tolist()
    assert out.maps.shape[2:] == (rows, columns) and rows * columns < 16
    # torchvision's and PIL's resampling differ by levels of the pixels.
    assert (out.scores - expected).norm() < 1e-2


def test_a_folder_without_tokenizer_or_processor(tmp_path):
    build("CLIP").save_pretrained(tmp_path / "clip")
    assert load(tmp_path / "clip", device="cpu").tokenizer is None
    build("Siglip").save_pretrained(tmp_path / "siglip")
    model = load(tmp_path / "siglip", device="cpu")
    assert model.spec.mean == (0.5, 0.5, 0.5) and model.spec.resize == "squash" and model.spec.size == (32, 32)
    assert Model(build("Siglip2")).spec.max_patches == 16 and Model(build("CLIP")).spec.resize == "crop"
    with pytest.raises(TextError, match="loaded without a tokenizer"):
        model.encode_texts(["a dog"])
    assert clipfast.explain(torch.randn(1, 3, 32, 32), unit(2, 32), model=model).maps.shape == (1, 2, 4, 4)


def test_folders_that_are_no_models(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=r"holds neither open_clip's open_clip_config.json nor"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ModelError, match="cannot be loaded: ") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "own.Model"}, "model_type": "own"}')
    (tmp_path / "own.py").write_text("raise SystemExit('code of a repository was run')")
    with pytest.raises(ModelError, match="cannot be loaded: "):
        load(tmp_path)
    build("CLIP").save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded: "):
        load(tmp_path / "clip")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match="is a model of transformers: pip install transformers"):
        load(tmp_path)


def test_what_a_repository_holds(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(repository: str, file: str) -> str:
        if file != "config.json":
            raise LocalEntryNotFoundError(f"{file} is not there")
        return file

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert hf_load.on_hub("org/name", "config.json") and not hf_load.on_hub("org/name", "open_clip_config.json")

    def missing(source: str, **_: Any) -> None:
        raise OSError(f"there is no {source}")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", missing)
    with pytest.raises(ModelError, match="org/name cannot be loaded: there is no org/name"):
        load("hf:org/name")


def test_pools_and_class_tokens_are_told_apart():
    assert isinstance(image_tower(build("Siglip")).blocks[-1], Pool) and image_tower(build("Siglip")).prefix == 0
    assert image_tower(build("CLIP")).has_class_token and image_tower(build("CLIP")).depth == 2
    with pytest.raises(ModelError, match="has neither a 'head' that pools nor a 'class_embedding'"):
        image_tower(build("Siglip", vision_use_head=False))
