"""Image sides without an attention that pools: timm's ConvNeXt, FastViT (MobileCLIP) and others made of stages.

All that their methods need is what comes out for pixels, and the feature maps between stages. So the stages run as they
are, in a copy of the trunk's structure that shares its weights (`frozen`); how they follow each other is read from
their names, and checked once against what the trunk itself computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.errors import InputError, nearest
from clipfast.models.frozen import frozen
from clipfast.models.image import patch_grid
from clipfast.models.openclip import read_logit_scale, unsupported
from clipfast.models.tower import rows_at_once

_STEM, _STAGES, _ABOVE = ("stem", "patch_embed"), ("stages", "layers"), ("final_conv", "norm_pre", "norm")
# Small, of whole places at any stride up to 64, and told apart in height and width.
_PROBE = (64, 128)


@dataclass(frozen=True, kw_only=True)
class ConvTower:
    """An image side of stages, above which a head takes the mean of the last one's places, or pools them otherwise.

    kind: the trunk's class. grid (gh, gw): of the last layer's places on images of the size that the model was trained
    on. pixels (ph, pw): what one of them covers. size (H, W): the only one that the trunk takes, or None.
    layers: names and modules above the stem, from the bottom: stages, and what lies between the last and the head.
    finer: how many of a layer's places, along each side, lie on one of the last. head: the last layer's output in
    float32, or float64 for a float64 model -> embeddings, not normalised. averages: whether it sees of the places only
    their mean. channels_last: whether the modules keep channels in the last dimension. black: as for other towers.

    A *layer* is named as the model's own module ("stages.2"), or by its number, from the top where negative.
    """

    kind: str
    grid: tuple[int, int]
    pixels: tuple[int, int]
    size: tuple[int, int] | None
    stem: nn.Module
    layers: Sequence[tuple[str, nn.Module]]
    finer: Sequence[int]
    head: nn.Module
    averages: bool
    channels_last: bool
    embed_dim: int
    width: int
    dtype: torch.dtype
    device: torch.device
    logit_scale: float
    black: tuple[float, float, float] | None = None

    linear: ClassVar[bool] = False

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.pixels

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of embeddings, scores and maps."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def rows_at_once(self, tokens: int, *, gradients: bool = False) -> int:
        """How many inputs of so many places one pass should take; fewer on a GPU where their activations are kept."""
        # By what they cover: as many as patches of 16 x 16 pixels.
        return rows_at_once(self.device, max(1, tokens * self.pixels[0] * self.pixels[1] // 256), gradients)

    def grid_of(self, x: Tensor) -> tuple[int, int]:
        """Grid (h, w) of the last layer for images (B, 3, H, W). Raises InputError where the trunk cannot take them."""
        height, width = x.shape[-2:]
        if self.size is not None and self.size != (height, width):
            raise InputError(
                f"images of {height} x {width} pixels do not fit: this {self.kind} takes only {self.size[0]} x "
                f"{self.size[1]}."
            )
        return patch_grid(x, self.pixels)

    def grid_at(self, size: tuple[int, int], layer: int | str = -1) -> tuple[int, int]:
        """The grid (h, w) of a layer's features for inputs of `size` (H, W). Raises InputError for an unknown layer."""
        finer = self.finer[self.above(layer) - 1]
        return size[0] // self.pixels[0] * finer, size[1] // self.pixels[1] * finer

    def fitted(self, grid: tuple[int, int]) -> ConvTower:
        return self

    def patch(self, x: Tensor) -> Tensor:
        """The pixels that the tower sees, in the trunk's dtype: those beyond the last whole place are not among them.

        Raises InputError as `grid_of` does.
        """
        (h, w), (ph, pw) = self.grid_of(x), self.pixels
        return x[..., : h * ph, : w * pw].to(self.dtype)

    def to_pixels(self, gradient: Tensor, size: tuple[int, int]) -> Tensor:
        """Gradients with respect to what `patch` gives as those of all pixels of `size` (H, W): (B, 3, H, W)."""
        return F.pad(gradient, (0, size[1] - gradient.shape[3], 0, size[0] - gradient.shape[2]))

    def tokens(self, t: Tensor) -> Tensor:
        """The last layer's places (B, n, C) of what `patch` gives."""
        return self._run(t, self.depth).flatten(2).mT

    def from_patch(self, t: Tensor) -> Tensor:
        """Unit embeddings (B, E) of what `patch` gives; differentiable where gradients are enabled."""
        return self.from_features(self._run(t, self.depth))

    def encode(self, x: Tensor) -> Tensor:
        """Unit embeddings (B, E) of normalised images (B, 3, H, W)."""
        return self.from_patch(self.patch(x))

    def features(self, x: Tensor, layer: int | str = -1) -> Tensor:
        """A layer's output (B, C, h, w), in the trunk's dtype, for normalised images (B, 3, H, W).

        Differentiable in x where gradients are enabled. Raises InputError as `patch` does, and for an unknown layer.
        """
        return self._run(self.patch(x), self.above(layer))

    def from_features(self, features: Tensor, layer: int | str = -1) -> Tensor:
        """Unit embeddings (B, E) of a layer's output (B, C, h, w); differentiable where gradients are enabled.

        Where the head `averages`, of the last layer a single place with the mean of all serves as well.
        """
        return F.normalize(self.unnormalized(features, layer), dim=-1)

    def unnormalized(self, features: Tensor, layer: int | str = -1) -> Tensor:
        """What `from_features` gives, before its length is made one."""
        h = features.permute(0, 2, 3, 1) if self.channels_last else features
        for _, module in self.layers[self.above(layer) :]:
            h = module(h.to(self.dtype))
        found: Tensor = self.head(h.to(self.result_dtype))
        return found

    def above(self, layer: int | str) -> int:
        """How many layers there are up to `layer`. Raises InputError where there is none such."""
        return layers_to(layer, self.kind, [name for name, _ in self.layers])

    def block_index(self, index: int | str, name: str) -> int:
        """Raises InputError: there are no blocks."""
        raise InputError(f"{name}={index!r} is a transformer's block, and this is a {self.kind}: leave it out.")

    def _run(self, t: Tensor, layers: int) -> Tensor:
        h = self.stem(t)
        for _, module in self.layers[:layers]:
            h = module(h)
        return h.permute(0, 3, 1, 2) if self.channels_last else h


def layers_to(layer: int | str, kind: str, names: Sequence[str], others: Mapping[str, str] | None = None) -> int:
    """How many layers of a tower, `names` from the bottom, there are up to one: a name, or a number as in a list.

    others: further names, and which of `names` they mean. Raises InputError for a layer that there is not.
    """
    others = others or {}
    name = others.get(str(layer), layer)
    if name in names:
        return names.index(str(name)) + 1
    if isinstance(layer, int) and -len(names) <= layer < len(names):
        return layer % len(names) + 1
    raise InputError(
        f"layer={layer!r} is none of this {kind}'s: give the number of one of its {len(names)} layers, or a name; "
        f"{nearest(str(layer), [*others, *names])}"
    )


@torch.no_grad()
def conv_tower(module: nn.Module, dtype: torch.dtype | None = None) -> ConvTower:
    """The image side of an open_clip module whose `visual` has a timm `trunk` of stages.

    dtype: the trunk's; None keeps the weights', but half precision on a CPU, whose convolutions are slow in it, becomes
    float32. Raises ModelError naming the part that does not fit.
    """
    visual: Any = getattr(module, "visual", None)
    trunk: Any = getattr(visual, "trunk", None)
    where = f"visual.trunk ({type(trunk).__name__})"
    stem = next((name for name in _STEM if hasattr(trunk, name)), None)
    stages = next((name for name in _STAGES if hasattr(trunk, name)), None)
    if stem is None or stages is None or not hasattr(trunk, "head"):
        raise unsupported(where, "has no stem, stages and head")
    weight = next(getattr(trunk, stem).parameters())
    slow = weight.dtype.itemsize < 4 and weight.device.type == "cpu"
    dtype = dtype or (torch.float32 if slow else weight.dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    whole: Any = frozen(visual, dtype)
    run = whole.trunk
    layers = [(f"{stages}.{name}", stage) for name, stage in getattr(run, stages).named_children()]
    layers += [(name, getattr(run, name)) for name in _ABOVE if getattr(run, name, None) is not None]
    layers = [(name, layer) for name, layer in layers if not isinstance(layer, nn.Identity)]
    head = nn.Sequential(frozen(trunk.head, wide), frozen(visual.head, wide))
    channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
    across = slice(1, 3) if channels_last else slice(2, 4)

    trained = (int(visual.image_size[0]), int(visual.image_size[1]))
    chain = [getattr(run, stem), *(layer for _, layer in layers), run.head, whole.head]
    x, outputs = _first_taken(whole, chain, [_noise(size, weight.device, dtype) for size in (_PROBE, trained)], where)
    if any(out.ndim != 4 for out in outputs[:-2]):
        raise unsupported(where, "has stages that do not give feature maps")
    grids = [tuple(out.shape[across]) for out in outputs[1:-2]]
    last, seen = grids[-1], (x.shape[2], x.shape[3])
    if any(side % places for side, places in zip((*seen, *grids[0]), (*last, *last), strict=True)):
        raise unsupported(where, f"makes {last[0]} x {last[1]} places of {seen[0]} x {seen[1]} pixels")
    pixels = (seen[0] // last[0], seen[1] // last[1])
    h = outputs[-3].to(wide)
    z = head(h)
    return ConvTower(
        kind=type(trunk).__name__,
        grid=(trained[0] // pixels[0], trained[1] // pixels[1]),
        pixels=pixels,
        size=None if seen == _PROBE else seen,
        stem=getattr(run, stem),
        layers=layers,
        finer=[grid[0] // last[0] for grid in grids],
        head=head,
        averages=_close(head(h.mean((1, 2) if channels_last else (2, 3), keepdim=True)), z, 1e-4),
        channels_last=channels_last,
        embed_dim=z.shape[-1],
        width=h.shape[-1] if channels_last else h.shape[1],
        dtype=dtype,
        device=weight.device,
        logit_scale=read_logit_scale(module),
    )


def _first_taken(
    whole: nn.Module, chain: Sequence[nn.Module], images: Sequence[Tensor], where: str
) -> tuple[Tensor, list[Tensor]]:
    """The first of several images that an image side takes, and what `_outputs` gives for it."""
    reason: Exception | None = None
    for x in images:
        try:
            return x, _outputs(whole, chain, x, where)
        except (AssertionError, RuntimeError, ValueError) as error:
            # Trunks of windows take one size of input only.
            reason = error
    raise unsupported(where, f"fails on an image of its own size ({reason})")


def _outputs(whole: nn.Module, chain: Sequence[nn.Module], x: Tensor, where: str) -> list[Tensor]:
    """What each module of a chain gives for an image x.

    Raises ModelError where `whole` is not just one after the other: where anything but the very tensor that comes out
    of one goes into the next.
    """
    ran: list[tuple[nn.Module, Any, Any, Any]] = []
    handles = [part.register_forward_hook(lambda *call: ran.append(call), with_kwargs=True) for part in chain]
    try:
        own = whole(x)
    finally:
        for handle in handles:
            handle.remove()
    inputs = [x, *(output for *_, output in ran)]
    plain = all(
        len(args) == 1 and args[0] is h and not more for (_, args, more, _), h in zip(ran, inputs, strict=False)
    )
    if not plain or [part for part, *_ in ran] != list(chain) or inputs[-1] is not own:
        raise unsupported(where, "does more than to run its stem, its stages and its head one after the other")
    return inputs[1:]


def _noise(size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """One image, always the same."""
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _close(found: Tensor, expected: Tensor, error: float) -> bool:
    return bool((found - expected).norm() <= error * expected.norm())
