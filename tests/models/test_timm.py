"""Towers of timm's transformers as open_clip builds them: small, but with every part that the families have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from matrix import naive_grad_eclip, recorded, same, snapshot
from open_clip import timm_model
from timm.models import vision_transformer_hybrid
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from timm.models.vitamin import VitCfg
from torch import Tensor, nn

import clipfast
from clipfast.errors import ModelError
from clipfast.methods.grad_eclip import GradEclip
from clipfast.models.block import Pool
from clipfast.models.families import image_tower, text_tower
from clipfast.models.image import StemTower
from clipfast.models.layers import GELU, GELU_TANH

WIDTH, CLASSES = 48, ["a dog", "two black cats", "rain"]


def transformers() -> dict[str, str]:
    """open_clip's architectures by their timm trunks, one for each, where clipfast reads the trunk as a transformer."""
    found = {}
    for name in open_clip.list_models():
        trunk = open_clip.get_model_config(name)["vision_cfg"].get("timm_model_name", "")
        if trunk.startswith(("vit_", "eva", "vitamin")) and "relpos" not in trunk:
            found.setdefault(trunk, name)
    return found


# One architecture a family: what differs between them is below the blocks, in them, and in what is pooled.
FAMILIES = {
    "SigLIP": "ViT-B-16-SigLIP",
    "SigLIP 2": "ViT-SO400M-16-SigLIP2-256",
    "EVA01": "EVA01-g-14",
    "EVA02": "EVA02-B-16",
    "EVA02-E": "EVA02-E-14",
    "PE": "PE-Core-B-16",
    "PE bigG": "PE-Core-bigG-14-448",
    "MobileCLIP-B": "MobileCLIP-B",
    "MobileCLIP2-L": "MobileCLIP2-L-14",
    "ViTamin": "ViTamin-S",
    "ViTamin XL": "ViTamin-XL-256",
}
families = pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES)

Build = Callable[..., Any]


@pytest.fixture
def build(monkeypatch) -> Build:
    """A factory of an architecture's model, narrow and of two blocks; `trunk` changes what timm makes of it."""
    own, stem = timm.create_model, vision_transformer_hybrid.ConvStem

    def create(model: str, **kwargs: Any) -> nn.Module:
        patch = 14 if "patch14" in model else 32 if "patch32" in model else 16
        height, width = kwargs.pop("grid")
        narrow: dict[str, Any] = {"embed_dim": WIDTH, "num_heads": 4, "depth": 2}
        if model.startswith("vitamin"):
            narrow["embed_cfg"] = VitCfg(embed_dim=(8, 16, WIDTH), depths=(1, 1, 1), stem_width=8)
        if "pe_core" in model:
            narrow["attn_pool_num_heads"] = 4
        return own(model, **{"img_size": (patch * height, patch * width), **narrow, **kwargs})

    def build(name: str = "ViT-B-16-SigLIP", *, grid: tuple[int, int] = (4, 4), **trunk: Any) -> Any:
        config = open_clip.get_model_config(name)
        vision = config["vision_cfg"]
        kept = ("no_causal_mask", "proj_bias", "proj_type", "pool_type", "act_kwargs", "norm_kwargs")
        text = {key: config["text_cfg"][key] for key in kept if key in config["text_cfg"]}
        text |= {"width": 32, "heads": 4, "layers": 2, "vocab_size": 300, "context_length": 20}
        if text.get("proj_type") == "none":
            text["width"] = WIDTH
        torch.manual_seed(0)
        with monkeypatch.context() as patched:
            patched.setattr(timm_model.timm, "create_model", partial(create, grid=grid, **trunk))
            patched.setattr(vision_transformer_hybrid, "ConvStem", lambda **k: stem(**{**k, "channels": (8, 8, WIDTH)}))
            model = open_clip.CustomTextCLIP(WIDTH, vision, text, init_logit_bias=config.get("init_logit_bias"))
        model.visual.image_size = tuple(model.visual.trunk.patch_embed.img_size)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim < 2:
                    # Biases and norms start at zero and one, and scales near zero, where mistakes cannot show.
                    start = float(parameter.mean()) if float(parameter.abs().mean()) > 0.1 else 0.5
                    parameter.normal_(start, 0.2)
                elif float(parameter.std()) < 0.1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
            for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
                norm.running_mean.normal_(std=0.1)
                norm.running_var.uniform_(0.5, 1.5)
            model.logit_scale.fill_(2.5)
        return model.eval()

    return build


def picture(model: Any, batch: int = 2) -> Tensor:
    own = next(model.visual.parameters())
    return torch.randn(batch, 3, *model.visual.image_size, dtype=own.dtype)


def prompts(tower: Any) -> Tensor:
    return F.normalize(torch.randn(3, tower.embed_dim, dtype=tower.result_dtype), dim=-1)


@torch.no_grad()
def own_embeddings(model: Any, x: Tensor) -> Tensor:
    return model.encode_image(x, normalize=True)


@pytest.mark.parametrize("name", transformers().values())
def test_every_trunk_encodes_as_its_own_modules(build, name):
    model = build(name).double()
    x, ids = picture(model), torch.randint(1, 299, (3, 20))
    tower, text = image_tower(model), text_tower(model)
    with torch.no_grad():
        found = tower.encode(x)
        assert tower.grid_of(x) == (4, 4)
        torch.testing.assert_close(found, own_embeddings(model, x), rtol=0, atol=1e-12)
        torch.testing.assert_close(text.encode(ids), model.encode_text(ids, normalize=True), rtol=0, atol=1e-12)
        assert (found[0] - found[1]).norm() > 1e-3
    assert tower.logit_scale == pytest.approx(12.1825, abs=1e-3)


def test_what_is_read(build):
    towers = {family: image_tower(build(name)) for family, name in FAMILIES.items()}
    kinds: dict[str, Callable[[Any], bool]] = {
        "SigLIP, SigLIP 2, PE, PE bigG": lambda t: isinstance(t.blocks[-1], Pool),
        "ViTamin, ViTamin XL": lambda t: t.mean,
        "ViTamin, ViTamin XL, MobileCLIP-B": lambda t: isinstance(t, StemTower),
        "EVA02, PE, PE bigG": lambda t: t.blocks[0].rotary is not None,
        "SigLIP, SigLIP 2, PE bigG, ViTamin, ViTamin XL": lambda t: not t.prefix,
        "EVA01, EVA02-E, MobileCLIP2-L, PE bigG": lambda t: t.patch_size == (14, 14),
    }
    for expected, has in kinds.items():
        assert {family for family, tower in towers.items() if has(tower)} == set(expected.split(", "))

    def activations(family: str) -> list[str]:
        blocks = towers[family].blocks
        stages = [stage for block in blocks for stage in block.rest.stages[0].inner]
        return [stage.name for stage in stages if stage in (GELU, GELU_TANH)]

    assert activations("SigLIP") == ["gelu"] * 3 and activations("SigLIP 2") == ["gelu_tanh"] * 3


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "registers without positions": ("MobileCLIP2-L-14", {"reg_tokens": 3, "no_embed_class": True}),
    "registers with positions": ("MobileCLIP2-L-14", {"reg_tokens": 2}),
    "norms of heads": ("ViT-B-16-SigLIP", {"qk_norm": True}),
    "norms in attention and MLP": ("ViT-B-16-SigLIP", {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "LayerScale": ("MobileCLIP2-L-14", {"init_values": 0.3}),
    "no biases": ("MobileCLIP2-L-14", {"qkv_bias": False, "proj_bias": False}),
    "norms behind": ("MobileCLIP2-L-14", {"block_fn": ResPostBlock}),
    "class token, of which the mean takes none": ("ViTamin-S", {"class_token": True}),
    "norm before the mean": ("ViTamin-S", {"fc_norm": False}),
    "Eva's LayerScale": ("EVA01-g-14", {"init_values": 0.3}),
    "no biases in Eva": ("EVA02-B-16", {"qkv_bias": False}),
    "packed SwiGLU": ("EVA02-B-16", {"scale_mlp": False}),
    "GELU with a norm": ("EVA02-B-16", {"swiglu_mlp": False}),
    "Eva's norms of heads": ("EVA02-B-16", {"qk_norm": True}),
    "halves turned": ("EVA02-B-16", {"rope_rotate_half": True}),
    "rotary embeddings behind norms": ("EVA02-E-14", {"use_rot_pos_emb": True}),
    "rotary embeddings alone": ("PE-Core-B-16", {"use_abs_pos_emb": False}),
    "registers below a pool": ("PE-Core-B-16", {"num_reg_tokens": 2}),
    "a norm behind the pool": ("PE-Core-B-16", {"use_fc_norm": True}),
    "dropout in training": (
        "EVA02-B-16",
        {"drop_path_rate": 0.5, "patch_drop_rate": 0.5, "proj_drop_rate": 0.5, "drop_rate": 0.5},
    ),
}


@pytest.mark.parametrize(("name", "trunk"), VARIANTS.values(), ids=VARIANTS)
def test_parts_that_timm_may_put_in(build, name, trunk):
    model = build(name, **trunk).double()
    x = picture(model)
    expected = own_embeddings(model, x)
    with torch.no_grad():
        torch.testing.assert_close(image_tower(model.train()).encode(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_heads_of_open_clip(build, monkeypatch, head):
    own = open_clip.get_model_config("EVA02-B-16")
    own["vision_cfg"]["timm_proj"] = head
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: own)
    model = build().double()
    x = picture(model)
    with torch.no_grad():
        torch.testing.assert_close(image_tower(model).encode(x), own_embeddings(model, x), rtol=0, atol=1e-12)


@families
def test_inputs_of_other_sizes_are_resized_as_timm_does(build, name):
    model = build(name, grid=(4, 5))
    ph, pw = image_tower(model).patch_size
    wide = copy.deepcopy(model)
    wide.visual.trunk.set_input_size((3 * ph, 7 * pw))
    x = torch.randn(2, 3, 3 * ph, 7 * pw)
    tower = image_tower(model)
    assert tower.grid == (4, 5) and tower.grid_of(x) == (3, 7)
    with torch.no_grad():
        torch.testing.assert_close(tower.encode(x), own_embeddings(wide, x), rtol=0, atol=1e-5)
        # Pixels beyond the last whole patch are not seen.
        torch.testing.assert_close(tower.encode(F.pad(x, (0, 5, 0, 3), value=2.0)), tower.encode(x))


@pytest.mark.parametrize("name", ["MobileCLIP2-L-14", "EVA02-B-16", "PE-Core-B-16"])
def test_models_that_take_any_size(build, name):
    model = build(name, dynamic_img_size=True)
    tower = image_tower(model)
    x = torch.randn(2, 3, *(side * n for side, n in zip(tower.patch_size, (6, 3), strict=True)))
    with torch.no_grad():
        torch.testing.assert_close(tower.encode(x), own_embeddings(model, x), rtol=0, atol=1e-5)


@families
def test_grad_eclip_is_the_models_own_gradient(build, name):
    model = build(name, grid=(3, 4)).double()
    tower = image_tower(model)
    x, texts = picture(model), prompts(tower)
    expected = naive_grad_eclip(model, x, texts, tower.prefix, tower.mean)
    explained = GradEclip(signed=True).image(tower, x)
    for form in ("reverse", "features"):
        found = explained.maps(texts, form=form)
        assert (found - expected).abs().max() < 1e-10 * expected.abs().max(), form


@pytest.mark.parametrize("name", ["EVA01-g-14", "EVA02-B-16", "EVA02-E-14", "MobileCLIP2-L-14"])
@pytest.mark.parametrize("layers", [2, 3])
def test_grad_eclip_of_several_layers(build, name, layers):
    model = build(name, depth=3).double()
    tower = image_tower(model)
    x, texts = picture(model, 1), prompts(tower)
    with torch.enable_grad(), recorded() as seen:
        z = model.encode_image(x, normalize=True)
    expected = torch.zeros(len(texts), 16, dtype=torch.float64)
    for p, text in enumerate(texts):
        outputs = [out for _, _, _, out in seen[-layers:]]
        for (q, k, v, _), g in zip(
            seen[-layers:], torch.autograd.grad((z @ text).sum(), outputs, retain_graph=True), strict=True
        ):
            q, k, v, g = (t.detach().transpose(1, 2).flatten(2)[0] for t in (q, k, v, g))
            cosine = F.cosine_similarity(q[:1], k[1:], dim=-1)
            expected[p] += (cosine - cosine.min()) / (cosine.max() - cosine.min()) * (v[1:] @ g[0])
    for form in ("reverse", "features"):
        found = GradEclip(layers=layers, signed=True).image(tower, x).maps(texts, form=form)[0]
        assert (found - expected).abs().max() < 1e-10 * expected.abs().max(), form


METHODS: dict[str, dict[str, Any]] = {
    "grad_eclip": {"signed": True},
    "tclip": {},
    "mga_clip": {"part": "coarse", "steps": 2},
    "integrated_gradients": {"steps": 2},
    "saliency": {},
    "mask_clip": {},
    "attention": {},
}


@families
def test_methods_run_and_leave_the_model_as_it_was(build, tokenizer, name):
    module = build(name, grid=(3, 4))
    x = picture(module)
    with torch.no_grad():
        scores = own_embeddings(module, x) @ module.encode_text(tokenizer(CLASSES), normalize=True).T
    module.train()
    module.visual.trunk.blocks[0].register_forward_hook(lambda *_: pytest.fail("the user's module was called"))
    next(module.visual.parameters()).requires_grad_(False)
    before = snapshot(module)
    model = clipfast.load(module, tokenizer=tokenizer)
    for method, parameters in METHODS.items():
        if method == "attention" and model.towers()[0].mean:
            continue
        found = clipfast.explain(x, CLASSES, model=model, method=method, **parameters)
        places = x.shape[2:] if method in ("integrated_gradients", "saliency") else (3, 4)
        assert found.maps.shape == (2, 3, *places) and found.maps.isfinite().all(), method
        torch.testing.assert_close(found.scores, scores, rtol=0, atol=1e-5)
    assert same(before, snapshot(module))


@families
def test_half_precision(build, tokenizer, name):
    module = build(name)
    x = picture(module)
    expected = own_embeddings(module, x)
    model = clipfast.load(module, tokenizer=tokenizer)
    half = image_tower(copy.deepcopy(module).bfloat16())
    assert half.dtype == torch.bfloat16 and half.result_dtype == torch.float32
    with torch.no_grad():
        for tower in (half, model.towers("bfloat16")[0]):
            assert (tower.encode(x) - expected).norm() < 2e-2 * expected.norm()
    exact, found = (clipfast.explain(x, CLASSES, model=model, precision=p) for p in (None, "bfloat16"))
    assert found.maps.isfinite().all()
    torch.testing.assert_close(found.scores, exact.scores, rtol=0, atol=2e-2)


def test_weights_are_the_modules_own(build):
    model = build()
    tower, trunk = image_tower(model), model.visual.trunk
    shared = [
        (tower.patch_weight, trunk.patch_embed.proj.weight),
        (tower.positions, trunk.pos_embed),
        (tower.blocks[0].qkv.weight, trunk.blocks[0].attn.qkv.weight),
        (tower.blocks[2].kv.weight, trunk.attn_pool.kv.weight),
    ]
    assert all(a.data_ptr() == b.data_ptr() for a, b in shared)


@pytest.mark.parametrize(
    "name", ["ViT-B-16-SigLIP", "EVA01-g-14", "EVA02-B-16", "PE-Core-B-16", "MobileCLIP-B", "ViTamin-S"]
)
def test_gradients_reach_every_weight(build, name):
    module = build(name)
    model = clipfast.load(module)
    x, text = picture(module), F.normalize(torch.randn(WIDTH), dim=-1)
    (module.encode_image(x, normalize=True) @ text).sum().backward()
    expected = {n: p.grad.clone() for n, p in module.visual.named_parameters()}
    module.zero_grad(set_to_none=True)
    (model.trained_towers()[0].encode(x) @ text).sum().backward()
    for n, p in module.visual.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], rtol=1e-3, atol=1e-5, msg=n)


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP2", "MobileCLIP2-L-14", "EVA02-B-16"])
def test_words(build, tokenizer, name):
    module = build(name)
    model, x = clipfast.load(module, tokenizer=tokenizer), picture(module, 1)[0]
    words = clipfast.Explainer(model, "grad_eclip").words(x, "a red dog")
    assert words.words == ["a", "red", "dog"] and torch.as_tensor(words.values).isfinite().all()
    with torch.no_grad():
        score = own_embeddings(module, x[None]) @ module.encode_text(tokenizer("a red dog"), normalize=True).T
    assert words.score == pytest.approx(float(score), abs=1e-5)


def test_preprocessing_is_the_models_own(build):
    module = build("ViT-B-16-SigLIP", grid=(3, 5))
    assert clipfast.load(module).spec.size == (48, 80)
    open_clip.set_model_preprocess_cfg(
        module,
        {"size": (48, 80), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "squash"},
    )
    model = clipfast.load(module)
    assert model.spec.size == (48, 80) and model.spec.mean == (0.5,) * 3
    assert model.towers()[0].black == (-1.0,) * 3


VIT, POOLED, EVA, MEAN = "MobileCLIP2-L-14", "ViT-B-16-SigLIP", "EVA02-B-16", "ViTamin-S"
REFUSED: list[tuple[str, dict[str, Any] | tuple[str, Any], str]] = [
    (EVA, ("blocks.1.attn.gate", nn.Linear(48, 48)), r"blocks.1.attn.gate \(Linear\) is a part that"),
    (POOLED, ("blocks.0.adapter", nn.Linear(48, 48)), r"blocks.0.adapter \(Linear\) is a part"),
    (VIT, ("dist_token", nn.Parameter(torch.zeros(1, 1, 48))), r"trunk.dist_token \(Parameter\) is a part"),
    (VIT, {"block_fn": ParallelScalingBlock}, r"blocks.0.\w+ \(\w+\) is a part"),
    (POOLED, {"embed_norm_layer": "layernorm"}, r"patch_embed.norm \(LayerNorm\) is a part"),
    (POOLED, ("attn_pool.pos_embed", nn.Parameter(torch.ones(16, 48))), r"attn_pool.pos_embed \(Parameter\) is a part"),
    (EVA, {"rope_type": "mixed"}, r"trunk.rope.freqs \(Parameter\) is a part"),
    (EVA, {"rope_type": "dinov3"}, r"trunk.rope.\w+ \(Tensor\) is a part"),
    (EVA, ("rope.in_pixels", True), r"trunk.rope does not count its places"),
    (EVA, ("blocks.1.attn.rotate_half", True), r"trunk.rope pairs channels otherwise than the blocks"),
    ("PE-Core-B-16", {"qkv_fused": False, "num_kv_heads": 2}, r"blocks.0.attn has fewer keys and values than queries"),
    (EVA, ("blocks.0.attn.scale", 0.1), r"blocks.0.attn scales by 0.1"),
    (EVA, ("blocks.0.attn.q_norm", nn.LayerNorm(12)), r"blocks.0.attn norms its queries or its keys alone"),
    (EVA, ("blocks.0.norm1", nn.RMSNorm(48)), r"blocks.0.norm1 \(RMSNorm\) is not a LayerNorm"),
    ("EVA02-E-14", ("blocks.0.gamma_1", nn.Parameter(torch.ones(48))), r"scales in an order that is not known"),
    (POOLED, ("attn_pool.mlp.act", nn.Mish()), r"attn_pool.mlp activates with Mish"),
    (POOLED, ("attn_pool.pool", ""), r"attn_pool pools 1 latents by ''"),
    (POOLED, ("attn_pool.proj", nn.Identity()), r"attn_pool has no output projection"),
    (POOLED, {"class_token": True}, r"by 'map' without the class token"),
    (MEAN, {"class_token": True, "pool_include_prefix": True}, r"by 'avg' with the class token"),
    (MEAN, ("global_pool", "max"), r"visual.trunk pools its tokens by 'max'"),
    (EVA, {"dynamic_img_size": True, "dynamic_img_pad": True}, r"patch_embed pads images"),
    (EVA, ("patch_embed.proj", nn.Conv2d(3, 48, 16, 8)), r"patch_embed.proj cuts patches that overlap"),
    (EVA, ("pos_embed", nn.Parameter(torch.ones(1, 9, 48))), r"pos_embed has 9 places for a grid of 4 x 4"),
    (EVA, ("head", nn.Bilinear(2, 2, 2)), r"trunk.head \(Bilinear\) is neither a linear map nor an MLP"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_what_is_not_known_is_refused(build, name, change, message):
    if isinstance(change, dict):
        model = build(name, **change)
    else:
        model = build(name)
        owner, _, part = change[0].rpartition(".")
        setattr(model.visual.trunk.get_submodule(owner), part, change[1])
    with pytest.raises(ModelError, match=message):
        image_tower(model)


def test_other_trunks(build):
    with pytest.raises(ModelError, match=r"blocks.0.attn.rel_pos \(\w+\) is a part that clipfast does not know there"):
        image_tower(build("vit_relpos_medium_patch16_cls_224"))
    model = build()
    model.visual.adapter = nn.Linear(48, 48)
    with pytest.raises(ModelError, match=r"visual.adapter \(Linear\) is a part"):
        image_tower(model)
