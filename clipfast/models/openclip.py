"""Reads towers out of open_clip's and OpenAI's own VisionTransformer and text transformer.

Parameters are found by their names, never by the class of the module that holds them: open_clip changes its attention
class between releases, the names stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from clipfast.errors import ModelError
from clipfast.models.block import Block, Pool
from clipfast.models.image import PatchTower
from clipfast.models.layers import GELU, GELU_TANH, QUICK_GELU, Activation, Affine, Chain, Norm, Residual, Scale, Stage
from clipfast.models.tail import Tail
from clipfast.models.text import Embedding, TextTower

SUPPORTED = (
    "clipfast reads open_clip's VisionTransformer (OpenAI, OpenCLIP, MetaCLIP, DFN, CLIPA, CoCa), its ModifiedResNet, "
    "timm's VisionTransformer and Eva (SigLIP, EVA, PE, ViTamin, MobileCLIP-B), transformers' CLIP and SigLIP models "
    "(MetaCLIP 2, AltCLIP, Chinese CLIP, SigLIP 2), and texts that pool one token or the mean of all"
)


_trained: ContextVar[bool] = ContextVar("_trained", default=False)


@contextmanager
def trained_weights() -> Iterator[None]:
    """Towers read inside hold the module's parameters themselves, so that gradients reach them."""
    token = _trained.set(True)
    try:
        yield
    finally:
        _trained.reset(token)


def unsupported(path: str, why: str) -> ModelError:
    return ModelError(f"{path} {why}; {SUPPORTED}.")


def image_tower(module: nn.Module, dtype: torch.dtype | None = None) -> PatchTower:
    """The image side of an open_clip or OpenAI CLIP module whose `visual` is their VisionTransformer.

    dtype: the trunk's; None keeps the weights as they are. Tensors are shared with the module unless a cast is needed.
    Raises ModelError naming the part that does not fit.
    """
    v: Any = getattr(module, "visual", None)
    if v is None:
        raise unsupported(type(module).__name__, "has no image tower called 'visual'")
    where = f"visual ({type(v).__name__})"
    for name in ("conv1", "class_embedding", "positional_embedding", "ln_post", "transformer"):
        if getattr(v, name, None) is None:
            raise unsupported(where, f"has no '{name}'")
    if getattr(v, "proj", None) is None:
        raise unsupported(where, "has no projection 'proj' into the joint space")
    blocks: list[Any] = list(read_blocks(v.transformer, "visual.transformer", dtype))
    trunk = blocks[0].dtype
    patch = v.conv1
    if tuple(patch.stride) != tuple(patch.kernel_size) or any(patch.padding):
        raise unsupported("visual.conv1", "cuts patches that overlap or are padded")
    first = read_weight(v.class_embedding, trunk).reshape(-1, v.class_embedding.shape[-1])
    positions = read_weight(v.positional_embedding, trunk)
    proj = Affine(read_weight(v.proj.T))
    head: list[Stage] = [read_norm(v.ln_post, "visual.ln_post"), proj]
    mean = False
    if getattr(v, "attn_pool", None) is not None:
        if getattr(v, "attn_pool_contrastive", None) is not None or getattr(v, "pool_type", "tok") != "tok":
            raise unsupported(where, "pools with two attentions, or the mean of several queries")
        blocks.append(_read_pool(v.attn_pool, "visual.attn_pool", dtype))
    else:
        pool = getattr(v, "pool_type", "tok")
        if pool not in ("tok", "avg"):
            raise unsupported(where, f"pools by '{pool}'")
        mean = pool == "avg"
        if mean and not getattr(v, "final_ln_after_pool", False):
            # The norm acts on every token before their mean: it belongs to the last block.
            norm = read_norm(v.ln_post, "visual.ln_post", dtype)
            blocks[-1] = replace(blocks[-1], rest=blocks[-1].rest + Chain((norm,)))
            head = [proj]
    return PatchTower(
        blocks=blocks,
        tail=Tail.above(blocks[-1], *head),
        causal=False,
        logit_scale=read_logit_scale(module),
        grid=read_grid(v, positions.shape[0] - first.shape[0]),
        prefix=first.shape[0],
        mean=mean,
        patch_weight=read_weight(patch.weight, trunk),
        patch_bias=read_optional(patch.bias, trunk),
        first=first,
        positions=positions,
        norm_pre=Chain() if isinstance(v.ln_pre, nn.Identity) else read_norm(v.ln_pre, "visual.ln_pre", dtype),
    )


def _read_pool(pool: Any, path: str, dtype: torch.dtype | None) -> Pool:
    """CoCa's attention pool, of which the first query is the image's."""
    for name in ("query", "attn", "ln_q", "ln_k"):
        if not hasattr(pool, name):
            raise unsupported(f"{path} ({type(pool).__name__})", f"has no '{name}'")
    attn = pool.attn
    width = pool.query.shape[-1]
    if getattr(attn, "in_proj_weight", None) is not None:
        q, k, v = read_weight(attn.in_proj_weight, dtype).split(width)
    else:
        q, k, v = (read_weight(getattr(attn, f"{name}_proj_weight"), dtype) for name in "qkv")
    bias = read_optional(attn.in_proj_bias, dtype)
    latent = read_norm(pool.ln_q, f"{path}.ln_q", dtype)(read_weight(pool.query[0], dtype))
    return Pool(
        heads=attn.num_heads,
        norm1=read_norm(pool.ln_k, f"{path}.ln_k", dtype),
        query=Affine(q, None if bias is None else bias[:width])(latent),
        kv=Affine(torch.cat((k, v)), None if bias is None else bias[width:]),
        branch=Chain((read_linear(attn.out_proj, dtype),)),
        rest=Chain(),
    )


def text_tower(module: nn.Module, dtype: torch.dtype | None = None) -> TextTower:
    """The text side, like `image_tower`."""
    # Newer open_clip models keep the text side in a module of its own, the classic ones spread it over the model.
    t: Any = getattr(module, "text", None) or module
    where = "text" if t is not module else type(module).__name__
    for name in ("token_embedding", "positional_embedding", "ln_final", "transformer"):
        if getattr(t, name, None) is None:
            raise unsupported(where, f"has no '{name}' for its text side")
    # CoCa's class token is pooled whatever the pool type says, and sees no padding.
    appended = getattr(t, "cls_emb", None)
    pool: Any = "last" if appended is not None else getattr(t, "text_pool_type", getattr(t, "pool_type", "argmax"))
    if pool not in ("argmax", "eos", "first", "last"):
        raise unsupported(where, f"pools its text by '{pool}'")
    mask = getattr(t, "attn_mask", None)
    if mask is None and t is module:
        # OpenAI's own package keeps the mask in each block.
        first: Any = next(iter(getattr(t.transformer, "resblocks", [])), None)
        mask = getattr(first, "attn_mask", None)
    if mask is not None:
        length = mask.shape[-1]
        if not torch.equal(mask.float().cpu(), torch.full((length, length), -torch.inf).triu_(1)):
            raise unsupported(f"{where}.attn_mask", "is not a causal mask")
    blocks = read_blocks(t.transformer, "transformer", dtype)
    projection = getattr(t, "text_projection", None)
    head: list[Stage] = []
    if isinstance(projection, nn.Linear):
        head = [read_linear(projection)]
    elif projection is not None:
        head = [Affine(read_weight(projection.T))]
    return TextTower(
        blocks=blocks,
        tail=Tail.above(blocks[-1], read_norm(t.ln_final, f"{where}.ln_final"), *head),
        causal=mask is not None,
        logit_scale=read_logit_scale(module),
        embedding=Embedding(read_weight(t.token_embedding.weight), read_weight(t.positional_embedding)),
        context_length=t.positional_embedding.shape[0] - (appended is not None),
        pool=pool,
        eot_id=getattr(t, "text_eos_id", getattr(t, "eos_id", -1)),
        padding=t.pad_id if appended is not None or getattr(t, "use_pad_mask", False) else None,
        appended=read_optional(appended, None),
        shifted=appended is not None and not t.correct_cls_mask,
    )


def read_blocks(transformer: nn.Module, path: str, dtype: torch.dtype | None) -> tuple[Block, ...]:
    modules: Any = getattr(transformer, "resblocks", None)
    if not modules:
        raise unsupported(path, "has no blocks called 'resblocks'")
    return tuple(read_block(block, f"{path}.resblocks.{i}", dtype) for i, block in enumerate(modules))


def read_block(block: Any, path: str, dtype: torch.dtype | None) -> Block:
    for name in ("ln_1", "attn", "ln_2", "mlp"):
        if not hasattr(block, name):
            raise unsupported(f"{path} ({type(block).__name__})", f"has no '{name}'")
    attn, mlp = block.attn, block.mlp
    if getattr(attn, "in_proj_weight", None) is None or not hasattr(attn, "out_proj"):
        raise unsupported(f"{path}.attn ({type(attn).__name__})", "has no 'in_proj_weight' and 'out_proj'")
    for owner, prefix, names in (
        (attn, f"{path}.attn", ("ln_q", "ln_k", "ln_inner", "head_scale", "logit_scale", "bias_k")),
        (block, path, ("ln_attn", "ln_1_kv")),
        (mlp, f"{path}.mlp", ("ln",)),
    ):
        for name in names:
            extra = getattr(owner, name, None)
            if extra is not None and not isinstance(extra, nn.Identity):
                raise unsupported(f"{prefix}.{name}", "is an extra norm or scale inside the block")
    if not hasattr(mlp, "c_fc") or not hasattr(mlp, "c_proj"):
        raise unsupported(f"{path}.mlp ({type(mlp).__name__})", "has no 'c_fc' and 'c_proj'")

    mlp_stages = (read_linear(mlp.c_fc, dtype), read_activation(mlp, path), read_linear(mlp.c_proj, dtype))
    norm2 = read_norm(block.ln_2, f"{path}.ln_2", dtype)
    return Block(
        heads=attn.num_heads,
        norm1=read_norm(block.ln_1, f"{path}.ln_1", dtype),
        qkv=Affine(read_weight(attn.in_proj_weight, dtype), read_optional(attn.in_proj_bias, dtype)),
        branch=Chain((read_linear(attn.out_proj, dtype), *_layer_scale(block, "ls_1", path, dtype))),
        rest=Chain((Residual(Chain((norm2, *mlp_stages, *_layer_scale(block, "ls_2", path, dtype)))),)),
    )


def read_norm(norm: Any, path: str, dtype: torch.dtype | None = None) -> Norm:
    if not isinstance(norm, nn.LayerNorm):
        raise unsupported(f"{path} ({type(norm).__name__})", "is not a LayerNorm")
    return Norm(read_optional(norm.weight, dtype), read_optional(norm.bias, dtype), norm.eps)


def read_logit_scale(module: Any) -> float:
    """What the model multiplies cosines by; 1 where it says nothing."""
    scale = getattr(module, "logit_scale", None)
    return 1.0 if scale is None else float(scale.detach().exp())


def read_weight(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A parameter outside of autograd, but in `trained_weights`; shared with the module unless a cast is needed."""
    if _trained.get():
        return t.to(dtype or t.dtype)
    t = t.detach().to(dtype or t.dtype)
    # A model that was built under inference_mode: autograd, which several layers need, may not save its tensors.
    return t.clone() if t.is_inference() else t


def read_optional(t: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return None if t is None else read_weight(t, dtype)


def read_linear(linear: Any, dtype: torch.dtype | None = None) -> Affine:
    """An nn.Linear, or what else has its `weight` (out, in) and `bias`."""
    return Affine(read_weight(linear.weight, dtype), read_optional(linear.bias, dtype))


def _layer_scale(block: Any, name: str, path: str, dtype: torch.dtype | None) -> tuple[Scale, ...]:
    scale = getattr(block, name, None)
    if scale is None or isinstance(scale, nn.Identity):
        return ()
    gamma = getattr(scale, "gamma", None)
    if not isinstance(gamma, Tensor):
        raise unsupported(f"{path}.{name} ({type(scale).__name__})", "is not a LayerScale with 'gamma'")
    return (Scale(read_weight(gamma, dtype)),)


def read_activation(mlp: Any, path: str) -> Activation:
    found = getattr(mlp, "gelu", None) or getattr(mlp, "act", None)
    if isinstance(found, nn.GELU):
        return GELU_TANH if found.approximate == "tanh" else GELU
    if type(found).__name__ == "QuickGELU":
        return QUICK_GELU
    raise unsupported(f"{path}.mlp", f"activates with {type(found).__name__}, not GELU or QuickGELU")


def read_grid(owner: Any, patches: int, path: str = "visual") -> tuple[int, int]:
    """The grid that a module's `patches` positions lie on: its own `grid_size`, or a square."""
    grid = getattr(owner, "grid_size", None)
    if grid is not None and len(tuple(grid)) == 2 and grid[0] * grid[1] == patches:
        return int(grid[0]), int(grid[1])
    side = math.isqrt(patches)
    if side * side != patches:
        raise unsupported(f"{path}.positional_embedding", f"has {patches} patches that form no known grid")
    return side, side
