"""The image side of ResNet CLIPs: convolutions below an attention pool (Radford et al., ICML 2021, section 2.4).

As with the transformers, the user's modules are never called. In evaluation a batch norm is a fixed scale and shift, so
it becomes part of the convolution before it, in a copy of that convolution's weights; all else is shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.models.block import Pool
from clipfast.models.conv import layers_to
from clipfast.models.image import PixelTower, resize_positions
from clipfast.models.layers import Affine, Chain
from clipfast.models.openclip import read_grid, read_linear, read_logit_scale, read_weight, unsupported
from clipfast.models.tail import Tail
from clipfast.models.tower import rows_at_once

_CONVS = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
_STAGES = ("layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True)
class Conv:
    """A convolution with the batch norm behind it; padded so that at stride 1 the size stays."""

    weight: Tensor
    bias: Tensor
    stride: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, padding=self.weight.shape[-1] // 2)


@dataclass(frozen=True)
class Bottleneck:
    """relu(expand(pool(relu(spatial(relu(reduce x))))) + shortcut(pool(x))), pool averaging `stride` x `stride`."""

    reduce: Conv
    spatial: Conv
    expand: Conv
    shortcut: Conv | None
    stride: int

    def __call__(self, x: Tensor) -> Tensor:
        h = self.expand(_pool(_relu(self.spatial(_relu(self.reduce(x)))), self.stride))
        h += x if self.shortcut is None else self.shortcut(_pool(x, self.stride))
        return _relu(h)


@dataclass(frozen=True, kw_only=True)
class ResNetTower(PixelTower):
    """A ResNet CLIP's image side: its one block is the attention pool, its tokens the last stage's mean and places.

    stem: the convolutions before the first stage. bottlenecks: those of all stages, `stages` counting each one's.
    positions (1 + gh gw, C): of the mean, and of the grid. The trunk runs in its own dtype, the attention pool in
    float32, or float64 for a float64 model.

    A *layer* is a bottleneck's output, named by its number from the bottom (from the top where negative), or as the
    model's own modules are: "layer4.0", or "layer4" for a stage's last one.
    """

    stem: Sequence[Conv]
    bottlenecks: Sequence[Bottleneck]
    stages: Sequence[int]
    positions: Tensor

    kind: ClassVar[str] = "ResNet"

    @property
    def dtype(self) -> torch.dtype:
        """The trunk's dtype."""
        return self.stem[0].weight.dtype

    def rows_at_once(self, tokens: int, *, gradients: bool = False) -> int:
        """How many inputs of so many places one pass should take; fewer on a GPU where their activations are kept."""
        # A place is as large as four patches of 16 x 16 pixels.
        return rows_at_once(self.device, 4 * tokens, gradients)

    def grid_at(self, size: tuple[int, int], layer: int | str = -1) -> tuple[int, int]:
        """The grid (h, w) of a layer's features for inputs of `size` (H, W). Raises InputError for an unknown layer."""
        above = self.above(layer)
        finer = 1 << sum(above <= sum(self.stages[:i]) for i in range(1, len(self.stages)))
        return size[0] // 32 * finer, size[1] // 32 * finer

    def tokens(self, t: Tensor) -> Tensor:
        return self.pool_tokens(self.features(t))

    def pool_tokens(self, features: Tensor) -> Tensor:
        """The attention pool's tokens (B, 1 + h w, C), the mean first, of the last stage's features (B, C, h, w)."""
        grid = (features.shape[2], features.shape[3])
        t = features.to(self.positions.dtype).flatten(2).mT
        return torch.cat((t.mean(1, keepdim=True), t), dim=1) + resize_positions(self.positions, self.grid, grid)

    def features(self, x: Tensor, layer: int | str = -1) -> Tensor:
        """A layer's output (B, C, h, w), in the trunk's dtype, for normalised images (B, 3, H, W).

        Differentiable in x where gradients are enabled. Raises InputError as `patch` does, and for an unknown layer.
        """
        x = self.patch(x)
        for conv in self.stem:
            x = _relu(conv(x))
        x = _pool(x, 2)
        for block in self.bottlenecks[: self.above(layer)]:
            x = block(x)
        return x

    def from_features(self, features: Tensor, layer: int | str = -1) -> Tensor:
        """Unit embeddings (B, E) of a layer's output (B, C, h, w); differentiable where gradients are enabled."""
        for block in self.bottlenecks[self.above(layer) :]:
            features = block(features.to(self.dtype))
        t = self.pool_tokens(features)
        return self.finish(t, self.pooled(t))

    def above(self, layer: int | str) -> int:
        """How many blocks there are up to a layer. Raises InputError for a layer that there is not."""
        stages = list(zip(_STAGES, self.stages, strict=True))
        names = [f"{stage}.{i}" for stage, blocks in stages for i in range(blocks)]
        return layers_to(layer, self.kind, names, {stage: f"{stage}.{blocks - 1}" for stage, blocks in stages})


def resnet_tower(module: nn.Module, dtype: torch.dtype | None = None) -> ResNetTower:
    """The image side of an open_clip or OpenAI CLIP module whose `visual` is their ModifiedResNet.

    dtype: the trunk's; None keeps the weights', but half precision on a CPU, whose convolutions are slow in it, becomes
    float32. Raises ModelError naming the part that does not fit.
    """
    v: Any = getattr(module, "visual", None)
    where = f"visual ({type(v).__name__})"
    for name in (*(n for pair in _CONVS for n in pair), *_STAGES, "attnpool"):
        if getattr(v, name, None) is None:
            raise unsupported(where, f"has no '{name}'")
    own = v.conv1.weight.dtype
    trunk = dtype or (torch.float32 if own.itemsize < 4 and v.conv1.weight.device.type == "cpu" else own)
    stages = [list(getattr(v, name)) for name in _STAGES]
    wide = torch.float64 if trunk == torch.float64 else torch.float32
    pool = _read_pool(v.attnpool, wide)
    positions = read_weight(v.attnpool.positional_embedding, wide)
    return ResNetTower(
        blocks=(pool,),
        tail=Tail.above(pool),
        causal=False,
        grid=read_grid(v.attnpool, positions.shape[0] - 1, "visual.attnpool"),
        prefix=1,
        pixels=(32, 32),
        positions=positions,
        stem=[_read_conv(v, conv, norm, "visual", trunk) for conv, norm in _CONVS],
        bottlenecks=[
            _read_block(block, f"visual.{name}.{i}", trunk)
            for name, blocks in zip(_STAGES, stages, strict=True)
            for i, block in enumerate(blocks)
        ],
        stages=[len(blocks) for blocks in stages],
        logit_scale=read_logit_scale(module),
    )


def _read_block(block: Any, path: str, dtype: torch.dtype) -> Bottleneck:
    for name in ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"):
        if not hasattr(block, name):
            raise unsupported(f"{path} ({type(block).__name__})", f"has no '{name}'")
    for name in ("act1", "act2", "act3", "relu", "relu1", "relu2", "relu3"):
        if not isinstance(act := getattr(block, name, nn.ReLU()), nn.ReLU):
            raise unsupported(path, f"activates with {type(act).__name__}, not ReLU")
    reduce, spatial, expand = (_read_conv(block, conv, norm, path, dtype) for conv, norm in _CONVS)
    down = getattr(block, "downsample", None)
    return Bottleneck(
        reduce,
        spatial,
        expand,
        shortcut=None if down is None else _read_conv(down, "0", "1", f"{path}.downsample", dtype),
        stride=block.stride,
    )


def _read_conv(owner: Any, conv: str, norm: str, path: str, dtype: torch.dtype) -> Conv:
    c, n = getattr(owner, conv), getattr(owner, norm)
    if c.groups != 1 or tuple(c.padding) != tuple(k // 2 for k in c.kernel_size) or set(c.dilation) != {1}:
        raise unsupported(f"{path}.{conv}", "is grouped, dilated or padded otherwise than a ResNet's")
    if getattr(n, "running_var", None) is None:
        raise unsupported(f"{path}.{norm} ({type(n).__name__})", "is not a batch norm with running statistics")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = read_weight(n.weight, wide) * torch.rsqrt(read_weight(n.running_var, wide) + n.eps)
    shift = read_weight(n.bias, wide) - read_weight(n.running_mean, wide) * scale
    if c.bias is not None:
        shift = shift + read_weight(c.bias, wide) * scale
    kernel = (read_weight(c.weight, wide) * scale[:, None, None, None]).to(dtype)
    # Channels last: a tenth off an encode on a CPU, and places are rows of features when they become tokens.
    return Conv(kernel.contiguous(memory_format=torch.channels_last), shift.to(dtype), c.stride[0])


def _read_pool(pool: Any, dtype: torch.dtype) -> Pool:
    for name in ("positional_embedding", "q_proj", "k_proj", "v_proj", "c_proj", "num_heads"):
        if not hasattr(pool, name):
            raise unsupported(f"visual.attnpool ({type(pool).__name__})", f"has no '{name}'")
    k, v = read_linear(pool.k_proj, dtype), read_linear(pool.v_proj, dtype)
    assert k.bias is not None and v.bias is not None
    return Pool(
        heads=pool.num_heads,
        norm1=Chain(),
        query=read_linear(pool.q_proj, dtype),
        kv=Affine(torch.cat((k.weight, v.weight)), torch.cat((k.bias, v.bias))),
        branch=Chain((read_linear(pool.c_proj, dtype),)),
        rest=Chain(),
    )


def _relu(x: Tensor) -> Tensor:
    return F.relu(x) if torch.is_grad_enabled() else x.relu_()


def _pool(x: Tensor, stride: int) -> Tensor:
    return x if stride == 1 else F.avg_pool2d(x, stride)
