"""Reads image towers out of open_clip's TimmModel whose trunk is a transformer: timm's VisionTransformer and Eva.

These are SigLIP, SigLIP 2, EVA, Perception Encoder, ViTamin and the larger MobileCLIPs. They differ in what lies below
the blocks, inside of them, and in what makes an embedding of the last one's output:

    patches or convolutions -> [class token] + positions -> norm_pre -> blocks -> norm
        -> class token | mean of the patches | attention pool -> fc_norm -> head -> visual.head
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from clipfast.models.block import AttentionBlock
from clipfast.models.frozen import frozen
from clipfast.models.image import PatchTower, Resize, StemTower, resize_positions
from clipfast.models.layers import Chain, Stage
from clipfast.models.openclip import read_linear, read_logit_scale, read_optional, read_weight, unsupported
from clipfast.models.tail import Tail
from clipfast.models.timm_blocks import (
    check_parts,
    need_parts,
    read_block,
    read_mlp,
    read_pool,
    read_rotary,
    read_stages,
)

_TRUNK = "visual.trunk"
_RESIZE: Resize = "bicubic_antialias"


def image_tower(module: nn.Module, dtype: torch.dtype | None = None) -> PatchTower | StemTower:
    """The image side of a module whose `visual` is open_clip's TimmModel with a transformer in it.

    dtype: the trunk's; None keeps the weights as they are. Tensors are shared with the module unless a cast is needed,
    or several maps of the same tokens become one. Raises ModelError naming the part that does not fit.
    """
    visual: Any = module.visual
    trunk: Any = visual.trunk
    check_parts(visual, "visual", "trunk", "head")
    below = ("patch_embed", "cls_token", "reg_token", "pos_embed", "rope", "norm_pre")
    check_parts(trunk, _TRUNK, *below, "blocks", "norm", "attn_pool", "fc_norm", "head")
    embed = trunk.patch_embed
    need_parts(embed, f"{_TRUNK}.patch_embed", "proj", "grid_size")
    if getattr(embed, "dynamic_img_pad", False):
        raise unsupported(f"{_TRUNK}.patch_embed", "pads images to whole patches")
    layers = [read_block(block, f"{_TRUNK}.blocks.{i}", dtype) for i, block in enumerate(trunk.blocks)]
    like = layers[0].out.weight
    grid = (int(embed.grid_size[0]), int(embed.grid_size[1]))
    first, positions = _read_tokens(trunk, grid, like.dtype)
    prefix = 0 if first is None else len(first)
    rotary = None
    if getattr(trunk, "rope", None) is not None:
        rotary = read_rotary(trunk, _TRUNK, grid, prefix, like)
        layers = [replace(layer, rotary=rotary(grid)) for layer in layers]

    norm = read_stages(getattr(trunk, "norm", None), f"{_TRUNK}.norm", dtype)
    head = _read_head(visual)
    pool = _pooled(trunk, prefix)
    blocks: list[AttentionBlock] = [*layers]
    if pool == "map":
        blocks.append(read_pool(trunk.attn_pool, f"{_TRUNK}.attn_pool", dtype, Chain(norm)))
    elif pool == "avg":
        # The norm acts on every token before their mean: it belongs to the last block.
        blocks[-1] = replace(blocks[-1], rest=blocks[-1].rest + Chain(norm))
    else:
        head = (*read_stages(getattr(trunk, "norm", None), f"{_TRUNK}.norm", None), *head)
    common: dict[str, Any] = {
        "blocks": blocks,
        "tail": Tail.above(blocks[-1], *head),
        "causal": False,
        "logit_scale": read_logit_scale(module),
        "grid": grid,
        "prefix": prefix,
        "mean": pool == "avg",
    }
    norm_pre = Chain(read_stages(getattr(trunk, "norm_pre", None), f"{_TRUNK}.norm_pre", dtype))
    if hasattr(embed, "backbone"):
        if rotary is not None:
            raise unsupported(f"{_TRUNK}.rope", "turns the places of convolutions")
        stem = _Stem(*_read_convolutions(embed, dtype), first, positions, grid, norm_pre)
        (rh, rw), (ph, pw) = embed.feature_ratio, embed.patch_size
        return StemTower(**common, pixels=(int(rh * ph), int(rw * pw)), stem=stem)
    check_parts(embed, f"{_TRUNK}.patch_embed", "proj")
    patch = embed.proj
    if tuple(patch.stride) != tuple(patch.kernel_size) or any(patch.padding):
        raise unsupported(f"{_TRUNK}.patch_embed.proj", "cuts patches that overlap or are padded")
    return PatchTower(
        **common,
        patch_weight=read_weight(patch.weight, like.dtype),
        patch_bias=read_optional(patch.bias, like.dtype),
        first=first,
        positions=positions,
        norm_pre=norm_pre,
        resize=_RESIZE,
        rotary=rotary,
    )


def _pooled(trunk: Any, prefix: int) -> str:
    """What makes an embedding of the tokens: "map" (attention pool), "avg" or "token"."""
    pool: str = "map" if getattr(trunk, "attn_pool", None) is not None else trunk.global_pool
    if pool not in ("map", "avg", "token") or (pool == "token" and getattr(trunk, "cls_token", None) is None):
        raise unsupported(_TRUNK, f"pools its tokens by '{pool}'")
    # VisionTransformer says whether its pools take the class token; Eva's attention pool does, its mean does not.
    with_prefix = getattr(trunk, "pool_include_prefix", pool == "map")
    if prefix and (pool, with_prefix) in (("map", False), ("avg", True)):
        raise unsupported(
            _TRUNK, f"pools its tokens by '{pool}' {'with' if with_prefix else 'without'} the class token"
        )
    return pool


def _read_head(visual: Any) -> tuple[Stage, ...]:
    """fc_norm and head of the trunk, and what open_clip puts above them, in the model's own dtype."""
    trunk = visual.trunk
    stages: list[Stage] = list(read_stages(getattr(trunk, "fc_norm", None), f"{_TRUNK}.fc_norm", None))
    above = [(f"visual.head.{name}", part) for name, part in visual.head.named_children()]
    for path, part in [(f"{_TRUNK}.head", trunk.head), *above]:
        if isinstance(part, nn.Linear):
            stages.append(read_linear(part))
        elif hasattr(part, "fc1"):
            stages += read_mlp(part, path, None)
        elif not isinstance(part, nn.Identity | nn.Dropout):
            raise unsupported(f"{path} ({type(part).__name__})", "is neither a linear map nor an MLP")
    return tuple(stages)


def _read_tokens(trunk: Any, grid: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Class and register tokens (K, D), and the positions (K + gh gw, D), zero for tokens that have none."""
    found = [getattr(trunk, name, None) for name in ("cls_token", "reg_token")]
    tokens = [read_weight(t[0], dtype) for t in found if t is not None]
    first = torch.cat(tokens) if tokens else None
    if getattr(trunk, "pos_embed", None) is None:
        return first, None
    positions = read_weight(trunk.pos_embed[0], dtype)
    if getattr(trunk, "no_embed_class", False) and first is not None:
        positions = torch.cat((torch.zeros_like(first), positions))
    if len(positions) != grid[0] * grid[1] + (0 if first is None else len(first)):
        raise unsupported(f"{_TRUNK}.pos_embed", f"has {len(positions)} places for a grid of {grid[0]} x {grid[1]}")
    return first, positions


def _read_convolutions(embed: Any, dtype: torch.dtype | None) -> tuple[nn.Module, nn.Module]:
    """A HybridEmbed's convolutions, and what projects their features."""
    path = f"{_TRUNK}.patch_embed"
    check_parts(embed, path, "backbone", "proj")
    need_parts(embed, path, "feature_ratio", "patch_size")
    return frozen(embed.backbone, dtype), frozen(embed.proj, dtype)


@dataclass(frozen=True)
class _Stem:
    """Convolutions, class tokens, positions and the norm before the blocks: (B, 3, H, W) -> (B, N, D)."""

    backbone: Callable[[Tensor], Any]
    proj: Callable[[Tensor], Tensor]
    first: Tensor | None
    positions: Tensor | None
    grid: tuple[int, int]
    norm_pre: Chain

    def __call__(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        # Some return the features of all their stages.
        features = self.proj(features if isinstance(features, Tensor) else features[-1])
        t = features.flatten(2).mT
        if self.first is not None:
            t = torch.cat((self.first.expand(len(t), -1, -1), t), dim=1)
        if self.positions is not None:
            t = t + resize_positions(self.positions, self.grid, (features.shape[2], features.shape[3]), _RESIZE)
        return self.norm_pre(t)
