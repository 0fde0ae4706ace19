"""Reads the image side of transformers' CLIP and SigLIP models, and of those built like them: MetaCLIP 2, AltCLIP,
Chinese CLIP, CLIPSeg, SigLIP 2 (NaFlex too, as batches of one size need none of its padding).

Parameters are found by their names, which transformers kept from 4 to 5 while it moved the modules that hold them.
Queries, keys and values have three matrices there: they are put one below the other in a copy, a quarter of a trunk.
All else is shared with the module. Which attention implementation the model is set to does not matter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clipfast.data.spec import InputSpec
from clipfast.models.block import Block, Pool
from clipfast.models.image import PatchTower
from clipfast.models.layers import (
    GELU,
    GELU_TANH,
    QUICK_GELU,
    RELU,
    SILU,
    TANH,
    Activation,
    Affine,
    Chain,
    Residual,
    Stage,
)
from clipfast.models.openclip import (
    read_grid,
    read_linear,
    read_logit_scale,
    read_norm,
    read_optional,
    read_weight,
    unsupported,
)
from clipfast.models.tail import Tail

_ACTIVATIONS = {
    "GELU": GELU,
    "GELUActivation": GELU,
    "GELUTanh": GELU_TANH,
    "PytorchGELUTanh": GELU_TANH,
    "NewGELUActivation": GELU_TANH,
    "QuickGELUActivation": QUICK_GELU,
    "ReLU": RELU,
    "SiLU": SILU,
    "SiLUActivation": SILU,
    "Tanh": TANH,
}
# What computes nothing in evaluation.
_IDLE = (nn.Dropout, nn.Identity)


def image_tower(module: nn.Module, dtype: torch.dtype | None = None) -> PatchTower:
    """The image side of a model whose `vision_model` is built like transformers' CLIP's or SigLIP's.

    dtype: the trunk's; None keeps the weights as they are. Raises ModelError naming the part that does not fit.
    """
    v, where = inner(module, "vision_model")
    head: Any = getattr(v, "head", None)
    parts(v, where, "embeddings", "encoder", "post_layernorm", optional=("pre_layrnorm", "head"))
    e: Any = v.embeddings
    parts(e, f"{where}.embeddings", "patch_embedding", "position_embedding", optional=("class_embedding",))
    if head is None and getattr(e, "class_embedding", None) is None:
        raise unsupported(where, "has neither a 'head' that pools nor a 'class_embedding'")
    blocks: list[Any] = read_layers(v.encoder, f"{where}.encoder", dtype)
    trunk = blocks[0].dtype
    first = None if head is not None else read_weight(e.class_embedding, trunk).reshape(1, -1)
    prefix = 0 if first is None else 1
    positions = read_weight(e.position_embedding.weight, trunk)
    top: list[Stage] = []
    if head is not None:
        blocks.append(_read_pool(v, where, dtype))
    else:
        projection = getattr(module, "visual_projection", None)
        if projection is None:
            raise unsupported(type(module).__name__, "has no 'visual_projection' into the joint space")
        top = [read_norm(v.post_layernorm, f"{where}.post_layernorm"), linear(projection, "visual_projection")]
    pre = getattr(v, "pre_layrnorm", None)
    # Only NaFlex embeds patches by a linear map; its positions are resized as in SigLIP 2's own code.
    naflex = e.patch_embedding.weight.ndim == 2
    return PatchTower(
        blocks=blocks,
        tail=Tail.above(blocks[-1], *top),
        causal=False,
        logit_scale=read_logit_scale(module),
        grid=read_grid(e, positions.shape[0] - prefix, f"{where}.embeddings"),
        prefix=prefix,
        patch_weight=_read_patches(e.patch_embedding, f"{where}.embeddings.patch_embedding", trunk),
        patch_bias=read_optional(e.patch_embedding.bias, trunk),
        first=first,
        positions=positions,
        norm_pre=Chain() if pre is None else read_norm(pre, f"{where}.pre_layrnorm", dtype),
        resize="bilinear_antialias" if naflex else "bicubic",
    )


def family_spec(tower: PatchTower) -> InputSpec:
    """The preprocessing of CLIP's, of SigLIP's or of NaFlex models, where none came with the model."""
    (ph, pw), (gh, gw) = tower.patch_size, tower.grid
    size = (gh * ph, gw * pw)
    if tower.prefix:
        return InputSpec(size, tower.patch_size, centre="floor")
    half = (0.5, 0.5, 0.5)
    if tower.resize == "bicubic":
        return InputSpec(size, tower.patch_size, half, half, resize="squash")
    return InputSpec(size, tower.patch_size, half, half, "bilinear", resize="keep", max_patches=gh * gw)


def _read_patches(patches: Any, path: str, dtype: torch.dtype) -> Tensor:
    weight = read_weight(patches.weight, dtype)
    if weight.ndim == 2:
        # NaFlex's processor lays a patch out as (rows, columns, colours).
        side = round((weight.shape[1] / 3) ** 0.5)
        if side * side * 3 != weight.shape[1]:
            raise unsupported(path, f"takes {weight.shape[1]} numbers, which are no square patch of three colours")
        return weight.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)
    plain = patches.padding == "valid" or not any(patches.padding)
    if tuple(patches.stride) != tuple(patches.kernel_size) or not plain:
        raise unsupported(path, "cuts patches that overlap or are padded")
    return weight


def _read_pool(v: Any, where: str, dtype: torch.dtype | None) -> Pool:
    """SigLIP's attention pool: a learned probe attends to all normed patches, and an MLP follows it."""
    head, path = v.head, f"{where}.head"
    parts(head, path, "probe", "attention", "layernorm", "mlp")
    attn = head.attention
    if getattr(attn, "in_proj_weight", None) is None or getattr(attn, "bias_k", None) is not None:
        raise unsupported(f"{path}.attention ({type(attn).__name__})", "has no single 'in_proj_weight'")
    width = head.probe.shape[-1]
    qkv = Affine(read_weight(attn.in_proj_weight, dtype), read_optional(attn.in_proj_bias, dtype))
    norm = read_norm(head.layernorm, f"{path}.layernorm", dtype)
    return Pool(
        heads=attn.num_heads,
        norm1=read_norm(v.post_layernorm, f"{where}.post_layernorm", dtype),
        query=qkv.part(slice(None, width))(read_weight(head.probe, qkv.weight.dtype).flatten()),
        kv=qkv.part(slice(width, None)),
        branch=Chain((linear(attn.out_proj, f"{path}.attention.out_proj", dtype),)),
        rest=Chain((Residual(Chain((norm, *read_mlp(head.mlp, f"{path}.mlp", dtype)))),)),
    )


def read_layers(encoder: Any, path: str, dtype: torch.dtype | None) -> list[Block]:
    """The blocks of an `encoder` as transformers' CLIP has it: norms before attention and MLP."""
    if not len(layers := getattr(encoder, "layers", ())):
        raise unsupported(path, "has no blocks called 'layers'")
    parts(encoder, path, "layers")
    return [_read_layer(layer, f"{path}.layers.{i}", dtype) for i, layer in enumerate(layers)]


def _read_layer(layer: Any, path: str, dtype: torch.dtype | None) -> Block:
    parts(layer, path, "layer_norm1", "self_attn", "layer_norm2", "mlp")
    norm2 = read_norm(layer.layer_norm2, f"{path}.layer_norm2", dtype)
    mlp = read_mlp(layer.mlp, f"{path}.mlp", dtype)
    return Block(
        norm1=read_norm(layer.layer_norm1, f"{path}.layer_norm1", dtype),
        rest=Chain((Residual(Chain((norm2, *mlp))),)),
        **read_attention(layer.self_attn, f"{path}.self_attn", dtype),
    )


def read_attention(
    attn: Any,
    path: str,
    dtype: torch.dtype | None,
    names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj"),
    heads: str = "num_heads",
) -> dict[str, Any]:
    """A block's `heads`, `qkv`, `branch` and `scale` out of an attention module with four maps of these names."""
    parts(attn, path, *names)
    q, k, v, out = (linear(getattr(attn, name), f"{path}.{name}", dtype) for name in names)
    count: int = getattr(attn, heads)
    scale = getattr(attn, "scaling", getattr(attn, "scale", None))
    usual = (q.weight.shape[0] // count) ** -0.5
    return {
        "heads": count,
        "qkv": below(q, k, v),
        "branch": Chain((out,)),
        "scale": None if scale is None or abs(scale - usual) < 1e-6 * usual else float(scale),
    }


def read_mlp(mlp: Any, path: str, dtype: torch.dtype | None) -> tuple[Stage, ...]:
    """transformers' CLIP's MLP: fc1, the activation, fc2."""
    parts(mlp, path, "fc1", "fc2", optional=("activation_fn",))
    act = read_act(mlp.activation_fn, f"{path}.activation_fn")
    return linear(mlp.fc1, f"{path}.fc1", dtype), act, linear(mlp.fc2, f"{path}.fc2", dtype)


def read_act(found: Any, path: str) -> Activation:
    name = type(found).__name__
    if name not in _ACTIVATIONS or getattr(found, "approximate", "none") not in ("none", "tanh"):
        raise unsupported(path, f"is {name}, not one of {', '.join(dict.fromkeys(_ACTIVATIONS))}")
    return GELU_TANH if getattr(found, "approximate", "none") == "tanh" else _ACTIVATIONS[name]


def below(*maps: Affine) -> Affine:
    """Maps of the same tokens as one, their weights copied one below the other; a bias that is not there is zero."""
    weight = torch.cat([each.weight for each in maps])
    if all(each.bias is None for each in maps):
        return Affine(weight)
    biases = [each.weight.new_zeros(len(each.weight)) if each.bias is None else each.bias for each in maps]
    return Affine(weight, torch.cat(biases))


def linear(owner: Any, path: str, dtype: torch.dtype | None = None) -> Affine:
    """A linear map that is no more than that: adapters around it or quantised weights would be left out."""
    weight = getattr(owner, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
        raise unsupported(f"{path} ({type(owner).__name__})", "has no 'weight' of floating-point numbers (out, in)")
    parts(owner, path, "weight", optional=("bias", "parametrizations"))
    return read_linear(owner, dtype)


def inner(module: nn.Module, name: str) -> tuple[Any, str]:
    """The module called `name`, or what it wraps under the same name, and its path."""
    found: Any = getattr(module, name, None)
    if found is None:
        raise unsupported(type(module).__name__, f"has no '{name}'")
    wrapped = getattr(found, name, None)
    return (found, name) if wrapped is None else (wrapped, f"{name}.{name}")


def parts(owner: Any, path: str, *names: str, optional: tuple[str, ...] = ()) -> None:
    """Raises ModelError unless a module has these parts, and besides optional ones and dropout no others that compute:
    what is not known could change the numbers."""
    where = f"{path} ({type(owner).__name__})"
    for name in names:
        if getattr(owner, name, None) is None:
            raise unsupported(where, f"has no '{name}'")
    held = [name for name, part in owner.named_children() if not isinstance(part, _IDLE)]
    held += [name for name, _ in owner.named_parameters(recurse=False)]
    for name in held:
        if name not in names and name not in optional:
            raise unsupported(where, f"has a part '{name}' that is not known")
