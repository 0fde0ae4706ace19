"""What every model must show: built from its configuration with few blocks and random weights, against its own modules.

Nothing here knows how a family is built. What the model's attention really sees is recorded while it runs, and naive
automatic differentiation through the model gives the maps to agree with.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clipfast
from clipfast.errors import InputError, ModelError
from clipfast.methods import METHODS
from clipfast.methods.grad_eclip import GradEclip
from clipfast.methods.integrated_gradients import IntegratedGradients
from clipfast.methods.mga_clip import MgaClip
from clipfast.methods.tclip import Tclip
from clipfast.models.block import Pool
from clipfast.models.image import ImageTower
from clipfast.models.model import Model

BLOCKS, VOCABULARY, PROMPTS = 2, 600, 3
# Of embeddings in float32 and bfloat16, and of maps in float64 over their largest value.
CLOSE, CLOSE_IN_HALF, CLOSE_MAPS = 1e-5, 2e-2, 1e-6


def configuration(name: str) -> dict[str, Any]:
    """open_clip's own, of few blocks and words. Its text tower is plain where it would come from a hub."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    vision, text = config["vision_cfg"], config["text_cfg"]
    if isinstance(vision.get("layers"), list):
        vision["layers"] = [1, 1, 1, 1]
    elif "layers" in vision:
        vision["layers"] = BLOCKS
    if "hf_model_name" in text:
        width = text.get("width", 512)
        config["text_cfg"] = text = {"context_length": 32, "width": width, "heads": 8, "output_tokens": False}
        config["custom_text"] = True
        if "multimodal_cfg" in config:
            text |= {"embed_cls": True, "output_tokens": True}
    text |= {"layers": BLOCKS, "vocab_size": VOCABULARY}
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"layers": 1, "vocab_size": VOCABULARY}
    if "eos_id" in text:
        text["eos_id"] = VOCABULARY - 1
    return config


@contextmanager
def few_blocks() -> Iterator[None]:
    """timm makes trunks of few blocks, whatever their names say."""
    from open_clip import timm_model

    own = timm_model.timm.create_model

    @functools.wraps(own)
    def create(name: str, **kwargs: Any) -> nn.Module:
        for shallow in ({"depth": BLOCKS}, {"depths": (1, 1, 1, 1)}, {"layers": (1,) * 5}, {"layers": (1,) * 4}, {}):
            try:
                return own(name, **shallow, **kwargs)
            except (TypeError, AssertionError, IndexError, RuntimeError):
                continue
        raise RuntimeError(f"timm does not build {name}")

    timm_model.timm.create_model = create
    try:
        yield
    finally:
        timm_model.timm.create_model = own


def build(name: str) -> nn.Module:
    """The model, every weight of it random: none that is zero or one at the start hides a part from the checks."""
    config = configuration(name)
    custom = config.pop("custom_text", False)
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    if "hf_model_name" in open_clip.get_model_config(name)["text_cfg"] and kind is open_clip.CLIP:
        kind = open_clip.CustomTextCLIP
    config = {key: value for key, value in config.items() if key not in ("init_logit_scale",)}
    torch.manual_seed(0)
    with few_blocks():
        model = kind(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or float(parameter.abs().max()) < 1e-3:
                parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim < 2 else 0.02))
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
        model.logit_scale.fill_(2.5)
    return model


@contextmanager
def recorded() -> Iterator[list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """(q, k, v, output), (B, H, N, d) each, of every attention that runs inside; outputs can be differentiated at."""
    own, found = F.scaled_dot_product_attention, []

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = own(q, k, v, *args, **kwargs)
        if not out.requires_grad:
            out.requires_grad_()
        found.append((q, k, v, out))
        return out

    F.scaled_dot_product_attention = attention
    try:
        yield found
    finally:
        F.scaled_dot_product_attention = own


def naive_grad_eclip(module: Any, x: Tensor, texts: Tensor, prefix: int, mean: bool) -> Tensor:
    """H (B, P, n) before ReLU at the last attention, by automatic differentiation through the model itself."""
    maps = []
    for image in x:
        with torch.enable_grad(), recorded() as seen:
            z = module.encode_image(image[None], normalize=True)
        q, k, v, out = seen[-1]
        q, k, v = (t.detach().transpose(1, 2).flatten(2)[0] for t in (q, k, v))
        k, v = k[prefix:], v[prefix:]
        rows = []
        for text in texts:
            (g,) = torch.autograd.grad((z @ text).sum(), out, retain_graph=True)
            g = g.transpose(1, 2).flatten(2)[0]
            heat = torch.zeros_like(v[:, 0])
            for j in range(prefix, len(q)) if mean else (0,):
                cosine = F.cosine_similarity(q[j], k, dim=-1)
                heat += (cosine - cosine.min()) / (cosine.max() - cosine.min()) * (v @ g[j])
            rows.append(heat)
        maps.append(torch.stack(rows))
    return torch.stack(maps).detach()


def snapshot(module: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: t.clone() for name, t in module.state_dict().items()},
        "flags": [(name, m.training, list(m._forward_hooks), len(m.__dict__)) for name, m in module.named_modules()],
        "gradients": [(name, p.requires_grad, p.grad is None) for name, p in module.named_parameters()],
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    state = all(torch.equal(t, after["state"][name]) for name, t in before["state"].items())
    return state and before["flags"] == after["flags"] and before["gradients"] == after["gradients"]


def ids_of(module: Any) -> Tensor:
    text = getattr(module, "text", None) or module
    context = min(text.context_length, 64)
    ids = torch.randint(2, VOCABULARY - 2, (3, text.context_length), generator=torch.Generator().manual_seed(1))
    ids[:, context - 4] = VOCABULARY - 1
    ids[0, 5], ids[0, 6:] = VOCABULARY - 1, 0
    return ids


def site_of(tower: Any) -> str:
    if not isinstance(tower, ImageTower):
        return "none"
    return (
        "mean of patches" if tower.mean else "attention pool" if isinstance(tower.blocks[-1], Pool) else "class token"
    )


def check(name: str) -> dict[str, Any]:
    """Builds and checks a model: what it is, and how far it is from its own modules.

    Raises AssertionError where clipfast is wrong. A model that clipfast refuses has its sentence as "refused".
    """
    module: Any = build(name)
    before = snapshot(module)
    record: dict[str, Any] = {"name": name, "images": type(getattr(module.visual, "trunk", module.visual)).__name__}
    try:
        model = Model(module, name=name)
    except ModelError as error:
        return {**record, "refused": str(error)}
    tower, text = model.towers()
    size = model.spec.size
    torch.manual_seed(2)
    x, texts = torch.randn(2, 3, *size), F.normalize(torch.randn(PROMPTS, tower.embed_dim), dim=-1)
    ids = ids_of(module)
    with torch.no_grad():
        own, found = module.encode_image(x, normalize=True), tower.encode(x)
        own_text, found_text = module.encode_text(ids, normalize=True), text.encode(ids)
    record |= {
        "kind": tower.kind,
        "site": site_of(tower),
        "texts": type(getattr(module, "text", module)).__name__,
        "image_error": far(found, own),
        "text_error": far(found_text, own_text),
        "methods": [n for n, m in METHODS.items() if "image" in m.sides() and m.why_not(tower) is None],
    }
    assert record["image_error"] < CLOSE and record["text_error"] < CLOSE, record
    with torch.no_grad():
        half = model.towers("bfloat16")[0].encode(x)
    record["bfloat16_error"] = far(half, own)
    assert record["bfloat16_error"] < CLOSE_IN_HALF, record
    assert same(before, snapshot(module)), "the model is not as it was"
    if GradEclip.why_not(tower) is None:
        exact = Model(module.double(), name=name)
        try:
            record |= _attributions(module, exact.towers()[0], x[:1].double(), texts.double())
        except InputError as error:
            # The one refusal that only the input tells: of a tower whose norm comes before the mean of its patches.
            if "final norm comes behind the mean" not in str(error):
                raise
            record["methods"] = [n for n in record["methods"] if n not in ("grad_eclip", "mga_clip")]
    else:
        assert "grad_cam" in record["methods"], record
        out = clipfast.explain(x, texts, model=model, method="grad_cam")
        assert out.maps.isfinite().all() and (out.maps > 0).any()
        with pytest.raises(InputError, match=r"these methods can: .*grad_cam"):
            clipfast.explain(x, texts, model=model)
    return record


def _attributions(module: Any, tower: Any, x: Tensor, texts: Tensor) -> dict[str, Any]:
    explained = GradEclip(signed=True).image(tower, x)
    expected = naive_grad_eclip(module, x, texts, tower.prefix, tower.mean)
    assert (expected != 0).any(), "a check of zeros"
    scale = expected.abs().max()
    found = {form: explained.maps(texts, form=form) for form in ("reverse", "features")}
    errors = {form: float((maps - expected).abs().max() / scale) for form, maps in found.items()}
    assert max(errors.values()) < CLOSE_MAPS, errors
    for method in (Tclip(), MgaClip(part="coarse", steps=2), IntegratedGradients(steps=2)):
        maps = method.image(tower, x).maps(texts)
        assert maps.shape[:2] == expected.shape[:2] and maps.isfinite().all(), method
    return {f"grad_eclip_{form}_error": error for form, error in errors.items()}


def far(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())
