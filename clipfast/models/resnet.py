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

from clipfast.errors import InputError, nearest
from clipfast.models.openclip import read_logit_scale, read_weight, unsupported
from clipfast.models.tower import resize_positions, rows_at_once

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


@dataclass(frozen=True)
class AttentionPool:
    """One attention whose query is the mean of the features, over that mean and the features; (B, C, h, w) -> (B, E).

    positions (1 + gh gw, C): of the mean, and of the grid (gh, gw) the model was trained on.
    """

    heads: int
    positions: Tensor
    grid: tuple[int, int]
    q_weight: Tensor
    q_bias: Tensor
    k_weight: Tensor
    v_weight: Tensor
    v_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return self._attend(features)[-1]

    def linearize(self, features: Tensor) -> LinearPool:
        """The pool and the normalisation above it at one point of each image: features (B, C, h, w)."""
        t, a, e = self._attend(features)
        # Many rows of a derivative are worth keys and values of all tokens; their biases are not seen in it.
        k, v = (_split(F.linear(t, weight), self.heads) for weight in (self.k_weight, self.v_weight))
        norm = e.norm(dim=-1, keepdim=True)
        return LinearPool(self, a, k, v, e / norm, norm)

    def _attend(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean and the features (B, N, C) with their positions, attention to them (B, H, N), what comes out."""
        grid = (features.shape[2], features.shape[3])
        t = features.to(self.positions.dtype).flatten(2).mT
        t = torch.cat((t.mean(1, keepdim=True), t), dim=1) + resize_positions(self.positions, self.grid, grid)
        # There is one query, so its products with W_k and W_v cost a row a head where keys and values cost one a place:
        # q . W_k t = (W_k^T q) . t and sum a W_v t = W_v sum a t. The keys' bias adds the same to all of a softmax.
        q = F.linear(t[:, 0], self.q_weight, self.q_bias).unflatten(-1, (self.heads, -1))
        rows = torch.einsum("bhd,hdc->bhc", q * q.shape[-1] ** -0.5, self._by_head(self.k_weight))
        a = (rows @ t.mT).softmax(-1)
        o = torch.einsum("bhc,hdc->bhd", a @ t, self._by_head(self.v_weight)).flatten(1) + self.v_bias
        return t, a, F.linear(o, self.out_weight, self.out_bias)

    def _by_head(self, weight: Tensor) -> Tensor:
        return weight.unflatten(0, (self.heads, -1))


@dataclass(frozen=True)
class LinearPool:
    """The derivative of an attention pool and the normalisation above it; `z` (B, E) is their value."""

    pool: AttentionPool
    a: Tensor  # (B, H, N) attention to the tokens, their mean first
    k: Tensor  # (B, H, N, d)
    v: Tensor
    z: Tensor
    norm: Tensor  # (B, 1) length of the embedding before normalisation

    def mean_vjp(self, cotangents: Tensor) -> Tensor:
        """The mean over places of d(z . t)/dfeatures for cotangents t (B, P, E), or (P, E) for all images: (B, P, C).

        What reaches the features by their mean, the query's token, and what reaches them directly is together 1/n of
        the gradients of all N tokens, summed. In that sum the keys' part vanishes, as a softmax does not move with all
        its logits, and the values' part is W_v^T d(z . t)/do, as attention sums to one.
        """
        pool, a = self.pool, self.a[:, :, None]
        e = cotangents - (cotangents @ self.z[..., None]) * self.z[:, None]
        g = e / self.norm[:, None] @ pool.out_weight
        of_attention = a * (_split(g, pool.heads) @ self.v.mT)  # (B, H, P, N)
        of_logits = of_attention - a * of_attention.sum(-1, keepdim=True)
        of_query = (of_logits @ self.k).transpose(1, 2).flatten(2) * self.k.shape[-1] ** -0.5
        return (g @ pool.v_weight + of_query @ pool.q_weight) / (self.k.shape[2] - 1)


@dataclass(frozen=True)
class ResNetTower:
    """A ResNet CLIP's image side, what methods need of it.

    stem: the convolutions before the first stage. blocks: those of all stages, `stages` counting each one's. black: as
    an `ImageTower`'s. The trunk runs in its own dtype, the attention pool in float32, or float64 for a float64 model.

    A *layer* is a block's output, named by the block's number from the bottom (from the top where negative), or as the
    model's own modules are: "layer4.0", or "layer4" for a stage's last block.
    """

    stem: Sequence[Conv]
    blocks: Sequence[Bottleneck]
    stages: Sequence[int]
    pool: AttentionPool
    logit_scale: float
    black: tuple[float, float, float] | None = None

    kind: ClassVar[str] = "ResNet"
    # Pixels of one place of the last stage's grid.
    patch_size: ClassVar[tuple[int, int]] = (32, 32)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def width(self) -> int:
        """Channels of the last stage."""
        return self.pool.positions.shape[1]

    @property
    def embed_dim(self) -> int:
        return self.pool.out_weight.shape[0]

    @property
    def grid(self) -> tuple[int, int]:
        """The grid of the last stage that the model was trained on."""
        return self.pool.grid

    @property
    def dtype(self) -> torch.dtype:
        """The trunk's dtype."""
        return self.stem[0].weight.dtype

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of embeddings, scores and maps."""
        return self.pool.positions.dtype

    @property
    def device(self) -> torch.device:
        return self.pool.positions.device

    def rows_at_once(self, tokens: int, *, gradients: bool = False) -> int:
        """How many inputs of so many places one pass should take; fewer on a GPU where their activations are kept."""
        # A place is as large as four patches of 16 x 16 pixels.
        return rows_at_once(self.device, 4 * tokens, gradients)

    def grid_of(self, x: Tensor) -> tuple[int, int]:
        """The grid (h, w) of an input (B, 3, H, W): of the last stage's features."""
        return self.grid_at((x.shape[2], x.shape[3]))

    def grid_at(self, size: tuple[int, int], layer: int | str = -1) -> tuple[int, int]:
        """The grid (h, w) of a layer's features for inputs of `size` (H, W). Raises InputError for an unknown layer."""
        above = self.above(layer)
        finer = 1 << sum(above <= sum(self.stages[:i]) for i in range(1, len(self.stages)))
        return size[0] // 32 * finer, size[1] // 32 * finer

    def patch(self, x: Tensor) -> Tensor:
        """The linear part of the tower: none but the pixels that it sees, in the trunk's dtype, (B, 3, H', W').

        Those beyond the last whole 32 x 32 are not among them, as those beyond the last whole patch of a transformer.
        Raises InputError for an input smaller than that.
        """
        h, w = self.grid_of(x)
        if not h or not w:
            raise InputError(f"images of {x.shape[2]} x {x.shape[3]} pixels hold no patch: this model needs 32 x 32.")
        return x[..., : 32 * h, : 32 * w].to(self.dtype)

    def from_patch(self, t: Tensor) -> Tensor:
        """Unit embeddings (B, E) of what `patch` gives; differentiable where gradients are enabled."""
        return self.finish(self.features(t))

    def to_pixels(self, gradient: Tensor, size: tuple[int, int]) -> Tensor:
        """Gradients with respect to what `patch` gives as those of all pixels of `size` (H, W): (B, 3, H, W)."""
        return F.pad(gradient, (0, size[1] - gradient.shape[3], 0, size[0] - gradient.shape[2]))

    def features(self, x: Tensor, layer: int | str = -1) -> Tensor:
        """A layer's output (B, C, h, w), in the trunk's dtype, for normalised images (B, 3, H, W).

        Differentiable in x where gradients are enabled. Raises InputError as `patch` does, and for an unknown layer.
        """
        x = self.patch(x)
        for conv in self.stem:
            x = _relu(conv(x))
        x = _pool(x, 2)
        for block in self.blocks[: self.above(layer)]:
            x = block(x)
        return x

    def finish(self, features: Tensor, layer: int | str = -1) -> Tensor:
        """Unit embeddings (B, E) of a layer's output (B, C, h, w); differentiable where gradients are enabled."""
        for block in self.blocks[self.above(layer) :]:
            features = block(features.to(self.dtype))
        return F.normalize(self.pool(features), dim=-1)

    def encode(self, x: Tensor) -> Tensor:
        """Unit embeddings (B, E) of normalised images (B, 3, H, W)."""
        return self.finish(self.features(x))

    def above(self, layer: int | str) -> int:
        """The first block above a layer. Raises InputError for a layer that there is not."""
        stages = list(zip(_STAGES, self.stages, strict=True))
        names = [f"{stage}.{i}" for stage, blocks in stages for i in range(blocks)]
        name = {stage: f"{stage}.{blocks - 1}" for stage, blocks in stages}.get(str(layer), layer)
        if name in names:
            return names.index(str(name)) + 1
        if isinstance(layer, int) and -self.depth <= layer < self.depth:
            return layer % self.depth + 1
        raise InputError(
            f"layer={layer!r} is none of this ResNet's: give the number of one of its {self.depth} blocks, or a name; "
            f"{nearest(str(layer), [*_STAGES, *names])}"
        )


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
    return ResNetTower(
        stem=[_read_conv(v, conv, norm, "visual", trunk) for conv, norm in _CONVS],
        blocks=[
            _read_block(block, f"visual.{name}.{i}", trunk)
            for name, blocks in zip(_STAGES, stages, strict=True)
            for i, block in enumerate(blocks)
        ],
        stages=[len(blocks) for blocks in stages],
        pool=_read_pool(v.attnpool, torch.float64 if trunk == torch.float64 else torch.float32),
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


def _read_pool(pool: Any, dtype: torch.dtype) -> AttentionPool:
    for name in ("positional_embedding", "q_proj", "k_proj", "v_proj", "c_proj", "num_heads"):
        if not hasattr(pool, name):
            raise unsupported(f"visual.attnpool ({type(pool).__name__})", f"has no '{name}'")
    side = round((pool.positional_embedding.shape[0] - 1) ** 0.5)
    return AttentionPool(
        heads=pool.num_heads,
        positions=read_weight(pool.positional_embedding, dtype),
        grid=(side, side),
        q_weight=read_weight(pool.q_proj.weight, dtype),
        q_bias=read_weight(pool.q_proj.bias, dtype),
        k_weight=read_weight(pool.k_proj.weight, dtype),
        v_weight=read_weight(pool.v_proj.weight, dtype),
        v_bias=read_weight(pool.v_proj.bias, dtype),
        out_weight=read_weight(pool.c_proj.weight, dtype),
        out_bias=read_weight(pool.c_proj.bias, dtype),
    )


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _relu(x: Tensor) -> Tensor:
    return F.relu(x) if torch.is_grad_enabled() else x.relu_()


def _pool(x: Tensor, stride: int) -> Tensor:
    return x if stride == 1 else F.avg_pool2d(x, stride)
