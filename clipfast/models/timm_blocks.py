"""timm's transformer blocks, attention pools and rotary embeddings, read from their parts' names.

What a module does with its parts is not in their names: a part that no known module has, or an order of parts that
none has, is refused and not guessed at. Dropout and stochastic depth do nothing in evaluation and are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from clipfast.models.block import Block, Pool, Rotary
from clipfast.models.layers import (
    GELU,
    GELU_TANH,
    QUICK_GELU,
    RELU,
    SILU,
    Activation,
    Affine,
    Chain,
    Gated,
    Norm,
    Residual,
    Scale,
    Stage,
)
from clipfast.models.openclip import read_linear, read_norm, read_optional, read_weight, unsupported

_ACTIVATIONS = {"GELU": GELU, "GELUTanh": GELU_TANH, "QuickGELU": QUICK_GELU, "SiLU": SILU, "ReLU": RELU}


def check_parts(owner: nn.Module, path: str, *known: str) -> None:
    """Raises ModelError for a submodule, parameter or buffer of `owner` itself that is not `known`.

    What passes on its input, or has no weights and is called a drop of something, may be there.
    """
    own = owner.named_parameters(recurse=False), owner.named_buffers(recurse=False)
    for name, part in chain(owner.named_children(), *own):
        drops = isinstance(part, nn.Module) and "drop" in name and next(part.parameters(), None) is None
        if name not in known and not drops and not isinstance(part, nn.Identity):
            raise unsupported(f"{path}.{name} ({type(part).__name__})", "is a part that clipfast does not know there")


def need_parts(owner: Any, path: str, *names: str) -> None:
    """Raises ModelError unless `owner` has all of these."""
    for name in names:
        if getattr(owner, name, None) is None:
            raise unsupported(f"{path} ({type(owner).__name__})", f"has no '{name}'")


def read_stages(norm: Any, path: str, dtype: torch.dtype | None) -> tuple[Norm, ...]:
    """A norm as stages of a chain: none for what is not there or is the identity."""
    return () if norm is None or isinstance(norm, nn.Identity) else (read_norm(norm, path, dtype),)


def read_block(block: Any, path: str, dtype: torch.dtype | None) -> Block:
    """A Block or EvaBlock, with its norms before attention and MLP, or a ResPostBlock or EvaBlockPostNorm, behind."""
    check_parts(block, path, "norm1", "attn", "ls1", "gamma_1", "norm2", "mlp", "ls2", "gamma_2")
    need_parts(block, path, "norm1", "attn", "norm2", "mlp")
    order = [name for name, _ in block.named_children()]
    behind = order.index("attn") < order.index("norm1")
    # The ones with norms behind have no LayerScale: two signs of one thing, which must agree.
    if behind == (hasattr(block, "ls1") or hasattr(block, "gamma_1")):
        raise unsupported(f"{path} ({type(block).__name__})", "has norms and scales in an order that is not known")
    norm1, norm2 = read_stages(block.norm1, f"{path}.norm1", dtype), read_stages(block.norm2, f"{path}.norm2", dtype)
    qkv, qk_norm, branch = _read_attention(block.attn, f"{path}.attn", dtype)
    mlp = read_mlp(block.mlp, f"{path}.mlp", dtype)
    if behind:
        norm1, branch = (), (*branch, *norm1)
        inner: tuple[Stage, ...] = (*mlp, *norm2)
    else:
        branch = (*branch, *_read_scale(block, 1, path, dtype))
        inner = (*norm2, *mlp, *_read_scale(block, 2, path, dtype))
    return Block(
        heads=block.attn.num_heads,
        norm1=norm1[0] if norm1 else Chain(),
        qkv=qkv,
        qk_norm=qk_norm,
        branch=Chain(branch),
        rest=Chain((Residual(Chain(inner)),)),
    )


def _read_attention(
    attn: Any, path: str, dtype: torch.dtype | None
) -> tuple[Affine, tuple[Norm, Norm] | None, tuple[Stage, ...]]:
    """An Attention, AttentionRope or EvaAttention: the map to queries, keys and values, norms of these, the branch."""
    parts = ("qkv", "q_proj", "k_proj", "v_proj", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm", "norm", "proj")
    check_parts(attn, path, *parts)
    need_parts(attn, path, "num_heads", "proj")
    if getattr(attn, "qkv", None) is not None:
        qkv = read_linear(attn.qkv, dtype)
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([read_weight(getattr(attn, f"{name}_bias"), qkv.weight.dtype) for name in "qkv"])
            qkv = replace(qkv, bias=bias)
    else:
        need_parts(attn, path, "q_proj", "k_proj", "v_proj")
        qkv = _beside([attn.q_proj, attn.k_proj, attn.v_proj], dtype)
    proj = read_linear(attn.proj, dtype)
    width = proj.weight.shape[1]
    if qkv.weight.shape[0] != 3 * width:
        raise unsupported(path, "has fewer keys and values than queries")
    scale = getattr(attn, "scale", None)
    if scale is not None and abs(scale**2 * width / attn.num_heads - 1) > 1e-6:
        raise unsupported(path, f"scales by {scale}, not by one over the root of a head's width")
    q, k = (read_stages(getattr(attn, f"{name}_norm", None), f"{path}.{name}_norm", dtype) for name in "qk")
    if len(q) != len(k):
        raise unsupported(path, "norms its queries or its keys alone")
    inner = read_stages(getattr(attn, "norm", None), f"{path}.norm", dtype)
    return qkv, (q[0], k[0]) if q else None, (*inner, proj)


def read_mlp(mlp: Any, path: str, dtype: torch.dtype | None) -> tuple[Stage, ...]:
    """An Mlp, GluMlp, SwiGLU, or ViTamin's GeGluMlp."""
    if hasattr(mlp, "fc1"):
        below, above = ["fc1"], "fc2"
    elif hasattr(mlp, "fc1_g"):
        below, above = ["fc1_g", "fc1_x"], "fc2"
    else:
        below, above = ["w0", "w1"], "w2"
    check_parts(mlp, path, *below, "act", "norm", above)
    need_parts(mlp, path, *below, "act", above)
    first, last = _beside([getattr(mlp, name) for name in below], dtype), read_linear(getattr(mlp, above), dtype)
    act = read_activation(mlp.act, path)
    gated = first.weight.shape[0] == 2 * last.weight.shape[1]
    middle = Gated(act, gate_last=getattr(mlp, "gate_last", False)) if gated else act
    norm = read_stages(getattr(mlp, "norm", None), f"{path}.norm", dtype)
    # GeGluMlp's norm is of its input, all others' of what was activated.
    return (*norm, first, middle, last) if above == "w2" else (first, middle, *norm, last)


def read_activation(act: nn.Module, path: str) -> Activation:
    name = type(act).__name__
    if isinstance(act, nn.GELU):
        return GELU_TANH if act.approximate == "tanh" else GELU
    if name not in _ACTIVATIONS:
        raise unsupported(path, f"activates with {name}, which is none of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def read_pool(pool: Any, path: str, dtype: torch.dtype | None, norm1: Chain) -> Pool:
    """An AttentionPoolLatent, of which the first latent is pooled; norm1: what every token goes through below it."""
    check_parts(pool, path, "latent", "q", "kv", "q_norm", "k_norm", "proj", "norm", "mlp")
    need_parts(pool, path, "latent", "kv", "proj", "num_heads")
    if getattr(pool, "pool", "token") != "token" and not (pool.pool == "avg" and pool.latent.shape[1] == 1):
        raise unsupported(path, f"pools {pool.latent.shape[1]} latents by '{pool.pool}'")
    if not hasattr(pool.proj, "weight"):
        raise unsupported(path, "has no output projection")
    kv = read_linear(pool.kv, dtype)
    query = read_weight(pool.latent[0, 0], kv.weight.dtype)
    if not isinstance(pool.q, nn.Identity):
        query = read_linear(pool.q, dtype)(query)
    for norm_q in read_stages(pool.q_norm, f"{path}.q_norm", dtype):
        query = norm_q(query.unflatten(-1, (pool.num_heads, -1))).flatten()
    key_norm = read_stages(pool.k_norm, f"{path}.k_norm", dtype)
    rest: tuple[Stage, ...] = ()
    if pool.mlp is not None:
        mlp = (*read_stages(pool.norm, f"{path}.norm", dtype), *read_mlp(pool.mlp, f"{path}.mlp", dtype))
        rest = (Residual(Chain(mlp)),)
    return Pool(
        heads=pool.num_heads,
        norm1=norm1,
        query=query,
        kv=kv,
        key_norm=key_norm[0] if key_norm else None,
        branch=Chain((read_linear(pool.proj, dtype),)),
        rest=Chain(rest),
    )


def read_rotary(
    trunk: Any, path: str, grid: tuple[int, int], prefix: int, like: Tensor
) -> Callable[[tuple[int, int]], Rotary]:
    """The rotary embeddings of an Eva's RotaryEmbeddingCat for any grid (h, w), behind `prefix` tokens.

    grid: the one that the trunk keeps a table for. like: a weight with the blocks' dtype and device.
    """
    rope, where = trunk.rope, f"{path}.rope"
    # Other kinds of rotary embeddings keep their frequencies under other names.
    check_parts(rope, where, "bands", "pos_embed")
    need_parts(rope, where, "dim", "temperature")
    if getattr(rope, "in_pixels", False) or getattr(rope, "grid_type", "index") != "index":
        raise unsupported(where, "does not count its places in patches")
    halves = {bool(getattr(owner, "rotate_half", False)) for owner in (rope, *(block.attn for block in trunk.blocks))}
    if len(halves) != 1:
        raise unsupported(where, "pairs channels otherwise than the blocks do")
    half = halves.pop()
    own = read_optional(getattr(rope, "pos_embed", None), like.dtype)

    def table(size: tuple[int, int]) -> Rotary:
        if own is not None and size == grid:
            sin, cos = own.chunk(2, dim=-1)
        else:
            angles = _angles(rope, size)
            angles = torch.cat((angles, angles), dim=-1) if half else angles.repeat_interleave(2, dim=-1)
            sin, cos = angles.sin().to(like), angles.cos().to(like)
        return Rotary(sin, cos, prefix, half)

    return table


def _angles(rope: Any, grid: tuple[int, int]) -> Tensor:
    """(h w, d / 2) of a grid, in float32 as timm makes them: half of the channels turn with each axis."""
    bands = rope.dim // 4
    frequencies = 1.0 / float(rope.temperature) ** (torch.arange(bands, dtype=torch.float32) / bands)
    places = [torch.arange(n, dtype=torch.float32) + getattr(rope, "grid_offset", 0.0) for n in grid]
    trained = getattr(rope, "ref_feat_shape", None)
    if trained is not None:
        # Another grid covers the same image: its places lie on the one that the frequencies were trained on.
        places = [t / n * m for t, n, m in zip(places, grid, trained, strict=True)]
    y, x = torch.meshgrid(*places, indexing="ij")
    axes = (x, y) if getattr(rope, "grid_indexing", "ij") == "xy" else (y, x)
    return torch.stack([axis[..., None] * frequencies for axis in axes], dim=-2).flatten(0, 1).flatten(1)


def _beside(linears: Sequence[Any], dtype: torch.dtype | None) -> Affine:
    """Linear maps of the same tokens as one, their outputs side by side: a copy, unless there is only one."""
    parts = [read_linear(linear, dtype) for linear in linears]
    if len(parts) == 1:
        return parts[0]
    weight = torch.cat([part.weight for part in parts])
    if all(part.bias is None for part in parts):
        return Affine(weight)
    return Affine(weight, torch.cat([weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in parts]))


def _read_scale(block: Any, number: int, path: str, dtype: torch.dtype | None) -> tuple[Scale, ...]:
    """LayerScale, a module of VisionTransformer's blocks and a parameter of Eva's."""
    scale = getattr(block, f"ls{number}", None)
    if scale is not None and not isinstance(scale, nn.Identity):
        check_parts(scale, f"{path}.ls{number}", "gamma")
    gamma = read_optional(getattr(block, f"gamma_{number}", getattr(scale, "gamma", None)), dtype)
    return () if gamma is None else (Scale(gamma),)
