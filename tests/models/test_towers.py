"""Towers give the model's own scores, and refuse what they do not know."""

from __future__ import annotations

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clipfast.errors import InputError, ModelError
from clipfast.models.layers import GELU, GELU_TANH, QUICK_GELU
from clipfast.models.openclip import image_tower, text_tower
from clipfast.models.text import TextTower

VARIANTS = {
    "square": {},
    "rectangular": {"image_size": (48, 80)},
    "patch-8": {"patch_size": 8},
    "not-a-multiple": {"image_size": 60, "patch_size": 16},
    "quick-gelu": {"quick_gelu": True},
    "gelu-tanh": {"act_kwargs": {"approximate": "tanh"}},
    "layer-scale": {"ls_init_value": 0.3},
    "no-ln-pre": {"no_ln_pre": True},
    "norm-after-pool": {"final_ln_after_pool": True},
    "eos-pool": {"text": {"pool_type": "eos", "eos_id": 299}},
    "last-pool": {"text": {"pool_type": "last"}},
    "projection-with-bias": {"text": {"proj_bias": True}},
}


@pytest.fixture
def ids() -> torch.Tensor:
    ids = torch.zeros(3, 20, dtype=torch.long)
    for row, length in zip(ids, (3, 9, 20), strict=True):
        row[:length] = torch.cat((torch.tensor([298]), torch.randint(1, 298, (length - 2,)), torch.tensor([299])))
    return ids


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_embeddings_equal_the_models_own(build_clip, ids, variant):
    if not set(variant.get("text", {})) <= set(open_clip.CLIPTextCfg.__dataclass_fields__):
        pytest.skip("this release of open_clip has no such text tower")
    model = build_clip(**variant)
    size = model.visual.image_size
    x = torch.randn(3, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(
            image_tower(model).encode(x), model.encode_image(x, normalize=True), rtol=0, atol=1e-6
        )
        torch.testing.assert_close(
            text_tower(model).encode(ids), model.encode_text(ids, normalize=True), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu"])
def test_open_clip_architectures(name):
    config = open_clip.get_model_config(name)
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 2
    model = open_clip.CLIP(**config).eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(
            image_tower(model).encode(x), model.encode_image(x, normalize=True), rtol=0, atol=1e-6
        )


def test_custom_text_module(ids):
    model = open_clip.CustomTextCLIP(
        24,
        {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 8, "layers": 2},
        {"width": 32, "heads": 2, "layers": 2, "vocab_size": 300, "context_length": 20, "no_causal_mask": True},
    ).eval()
    tower = text_tower(model)
    assert isinstance(tower, TextTower) and not tower.causal
    with torch.no_grad():
        torch.testing.assert_close(tower.encode(ids), model.encode_text(ids, normalize=True), rtol=0, atol=1e-6)


def test_positions_follow_the_grid(build_clip):
    tower = image_tower(build_clip())
    wide = tower.positions_for((4, 7))
    assert wide.shape == (1 + 28, 32)
    assert tower.positions_for((4, 4)) is tower.positions
    with torch.no_grad():
        assert tower.encode(torch.randn(1, 3, 64, 112)).shape == (1, 24)
    with pytest.raises(InputError, match="8 x 64 pixels hold no patch"):
        tower.encode(torch.randn(1, 3, 8, 64))


def test_half_precision_models_as_they_are(build_clip):
    reference = image_tower(build_clip())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = reference.encode(x)
        for dtype in (torch.float16, torch.bfloat16):
            tower = image_tower(build_clip().to(dtype))
            assert tower.dtype == dtype and tower.tail.dtype == torch.float32
            assert (tower.encode(x) - expected).norm() / expected.norm() < 2e-2
            mixed = build_clip()
            open_clip.model.convert_weights_to_lp(mixed, dtype)
            assert (image_tower(mixed).encode(x) - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize("act", [GELU, GELU_TANH, QUICK_GELU], ids=lambda a: a.name)
def test_activation_derivatives(act):
    u = torch.linspace(-8, 8, 401, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(act.value(u).sum(), u)
    torch.testing.assert_close(act.derivative(u.detach()), slope)
    torch.testing.assert_close(act.value_(u.detach().clone()), act.value(u.detach()))


def test_tail_derivative_is_the_tails(build_clip):
    tail = image_tower(build_clip(ls_init_value=0.4).double()).tail
    residual, o = torch.randn(2, 32, dtype=torch.float64), torch.randn(2, 32, dtype=torch.float64)
    linear = tail.linearize(residual, o)
    torch.testing.assert_close(linear.z, tail(residual, o))
    eye = torch.eye(32, dtype=torch.float64).expand(2, -1, -1)
    for b in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda t, b=b: tail(residual[b], t), o[b])
        torch.testing.assert_close(linear.jvp(eye)[b].T, jacobian)
        torch.testing.assert_close(linear.vjp(torch.eye(24, dtype=torch.float64))[b], jacobian)


def test_structures_that_do_not_fit(build_clip):
    with pytest.raises(ModelError, match="has no image tower called 'visual'; clipfast reads open_clip's"):
        image_tower(nn.Linear(2, 2))
    resnet = open_clip.CLIP(
        24, {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}, {"width": 32, "heads": 2, "layers": 1}
    )
    with pytest.raises(ModelError, match=r"visual \(ModifiedResNet\) has no"):
        image_tower(resnet)
    extra = build_clip(qk_norm=True, block_type="custom")
    with pytest.raises(ModelError, match=r"visual.transformer.resblocks.0.attn.ln_q is an extra norm"):
        image_tower(extra)
    model = build_clip()
    model.visual.transformer.resblocks[1].mlp.gelu = nn.SiLU()
    with pytest.raises(ModelError, match=r"resblocks.1.mlp activates with SiLU"):
        image_tower(model)
    model = build_clip()
    model.attn_mask = torch.zeros(20, 20)
    with pytest.raises(ModelError, match="is not a causal mask"):
        text_tower(model)


def test_padding_of_other_texts_does_not_matter(build_clip, ids):
    tower = text_tower(build_clip())
    with torch.no_grad():
        together = tower.encode(ids)
        alone = torch.cat([tower.encode(row[None]) for row in ids])
    torch.testing.assert_close(together, alone)
    assert F.cosine_similarity(together[0], together[1], dim=0) < 0.999
