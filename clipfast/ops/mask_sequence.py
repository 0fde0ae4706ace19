"""The masked images of a deletion or insertion curve, written straight into a batch for the model.

    masked[b, p, s] = fill[b]    where rank[b, p] < count[s], else images[b]      (deletion)
    masked[b, p, s] = images[b]  where rank[b, p] < count[s], else fill[b]        (insertion)

rank[b, p] numbers the pixels of image b from the most important for prompt p (0) to the least (H * W - 1), and
count[s] is floor(fractions[s] * H * W + 1/2): the fraction of the pixels, halves rounded up. Petsiuk et al., RISE,
BMVC 2018.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clipfast import native
from clipfast.errors import InputError, nearest
from clipfast.ops.dispatch import Backend, Op, registered


@dataclass(frozen=True)
class Noise:
    """Uniform random colours, one of 256 levels for each pixel and channel, the same on every backend and machine.

    The colour depends on `seed` (0 <= seed < 2^64), the image's number, the channel and the pixel alone. `first` is
    the number of the first image of the call: whoever passes a data set in batches counts on, and the batch size
    changes nothing.
    """

    seed: int
    first: int = 0

    def image(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """The noise as uint8 images of this shape (B, C, H, W)."""
        b, c, h, w = shape
        numbers = torch.arange(self.first, self.first + b, device=device)[:, None] & 0xFFFFFFFF  # (B, 1)
        # The constant is there because zero would stay zero.
        key = _mix(numbers.new_tensor(self.seed & 0xFFFFFFFF) ^ 0x9E3779B9)
        key = _mix(_mix(_mix(key ^ (self.seed >> 32)) ^ numbers) ^ torch.arange(c, device=device))[
            ..., None
        ]  # (B, C, 1)
        pixels = torch.arange(h * w, device=device)
        return (_mix((key + _mix(key ^ pixels)) & 0xFFFFFFFF) >> 24).to(torch.uint8).view(b, c, h, w)


@dataclass(frozen=True)
class Inputs:
    """What every backend gets: checked, narrowed to the images that the window touches, orders turned into ranks."""

    images: Tensor  # (B, C, H, W) uint8 or floating
    ranks: Tensor  # (B, P, H, W) int32 or int64
    fill: Tensor | Noise  # (B, C, H, W), uint8 or floating, broadcast where constant
    counts: Tensor  # (S,) int32
    mean: Tensor  # (C,) in `precision(out)`, as is std
    std: Tensor
    deletion: bool
    start: int  # of the items numbered (b * P + p) * S + s
    stop: int
    out: Tensor  # (stop - start, C, H, W)


def define(x: Inputs) -> Tensor:
    """The op in plain PyTorch: what it means, and what runs where nothing faster can."""
    prompts, steps = x.ranks.shape[1], len(x.counts)
    fill = x.fill.image(x.images.shape, x.images.device) if isinstance(x.fill, Noise) else x.fill
    for pair in range(x.start // steps, -(-x.stop // steps)):
        b, p = divmod(pair, prompts)
        first, last = max(x.start, pair * steps), min(x.stop, (pair + 1) * steps)
        counts = x.counts[first - pair * steps : last - pair * steps, None, None]  # (s, 1, 1)
        before = x.ranks[b, p] < counts  # (s, H, W)
        image, hidden = normalise(x.images[b], x), normalise(fill[b], x)  # (C, H, W)
        shown, rest = (hidden, image) if x.deletion else (image, hidden)
        torch.where(before[:, None], shown, rest, out=x.out[first - x.start : last - x.start])
    return x.out


def normalise(images: Tensor, x: Inputs) -> Tensor:
    """Images (..., C, H, W) as the model sees them, in the dtype of `x.out`: less the mean, over the deviation."""
    values = images.to(precision(x.out))
    # Divided by a tensor: on a GPU, PyTorch multiplies by the reciprocal of a number, which differs in the last bit.
    if images.dtype == torch.uint8:
        values = values / values.new_tensor(255)
    return ((values - x.mean[:, None, None]) / x.std[:, None, None]).to(x.out.dtype)


def precision(out: Tensor) -> torch.dtype:
    """What is computed in for this result: float64 for float64, else float32."""
    return torch.promote_types(out.dtype, torch.float32)


class Torch(Backend[Inputs]):
    name = "torch"

    def run(self, inputs: Inputs) -> Tensor:
        return define(inputs)


PIXELS = frozenset({torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64})


class Native(Backend[Inputs]):
    """csrc/cpu/mask_sequence.cpp."""

    name = "native"
    devices = frozenset({"cpu"})
    dtypes: ClassVar = {
        "images": PIXELS,
        "fill": PIXELS,
        "ranks": frozenset({torch.int32, torch.int64}),
        "out": PIXELS - {torch.uint8},
    }
    module = "_native"

    def missing(self) -> list[str]:
        reason = native.problem(self.module)
        return [] if reason is None else [reason]

    def version(self) -> str:
        return str(native.module(self.module).build)

    def why_not(self, inputs: Inputs) -> list[str]:
        reasons = super().why_not(inputs)
        if not inputs.out.is_contiguous():
            reasons.append("out is not contiguous")
        return reasons

    def run(self, inputs: Inputs) -> Tensor:
        self.call(native.module(self.module), inputs, lane=torch.get_num_threads())
        return inputs.out

    def call(self, module: ModuleType, x: Inputs, lane: int) -> None:
        noise = x.fill if isinstance(x.fill, Noise) else Noise(0)
        fill = x.images if isinstance(x.fill, Noise) else x.fill
        _, channels, height, width = x.images.shape
        module.mask_sequence(
            images=x.images.data_ptr(),
            image_type=_name(x.images),
            image_strides=x.images.stride(),
            fill=0 if isinstance(x.fill, Noise) else fill.data_ptr(),
            fill_type=_name(fill),
            fill_strides=fill.stride(),
            noise_seed=noise.seed,
            noise_first=noise.first,
            ranks=x.ranks.data_ptr(),
            wide_ranks=x.ranks.dtype == torch.int64,
            rank_strides=x.ranks.stride(),
            counts=x.counts.data_ptr(),
            mean=x.mean.data_ptr(),
            std=x.std.data_ptr(),
            deletion=x.deletion,
            prompts=x.ranks.shape[1],
            steps=len(x.counts),
            channels=channels,
            height=height,
            width=width,
            start=x.start,
            stop=x.stop,
            out=x.out.data_ptr(),
            out_type=_name(x.out),
            lane=lane,
        )


class NativeCuda(Native):
    """csrc/cuda/mask_sequence.cu."""

    devices = frozenset({"cuda"})
    capability = (8, 0)
    module = "_native_cuda"

    def run(self, inputs: Inputs) -> Tensor:
        with torch.cuda.device(inputs.images.device):
            stream = torch.cuda.current_stream().cuda_stream
            self.call(native.module(self.module), inputs, lane=stream)
        return inputs.out


_op = Op("mask_sequence", Native(), NativeCuda(), Torch())


@registered(lambda *arguments: None, mutates=["out"])
def _mask_sequence(
    images: Tensor,
    ranks: Tensor,
    fill: Tensor | None,
    seed: int,
    first: int,
    counts: Tensor,
    mean: Tensor,
    std: Tensor,
    deletion: bool,
    start: int,
    stop: int,
    out: Tensor,
) -> None:
    """Inputs, one by one: no fill is noise, whose seed counts modulo 2^64, since operators take signed numbers."""
    filled = Noise(seed % 2**64, first) if fill is None else fill
    _op(Inputs(images, ranks, filled, counts, mean, std, deletion, start, stop, out))


def mask_sequence(
    images: Tensor,
    order: Tensor,
    fractions: Tensor | Sequence[float],
    mode: Literal["deletion", "insertion"] = "deletion",
    fill: float | Sequence[float] | Tensor | Noise | Literal["mean"] = 0.0,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    window: tuple[int, int] | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The images of a deletion or insertion curve, (B * P * S, C, H, W), prompts within images and steps within
    prompts.

    images      (B, C, H, W), any strides: uint8, which is divided by 255, or floating, which is taken as it is.
    order       which pixels go first, in one of three forms: an importance map (B, P, H, W), floating, from which the
                highest go first and ties go by index; ranks (B, P, H, W), integers, 0 for the pixel that goes first;
                or pixel indices (B, P, H * W), integers, in the order they go. Equal ranks are allowed, and go
                together.
    fractions   (S,) in [0, 1]: the share of the pixels that has gone at each step; f stands for floor(f H W + 1/2)
                pixels.
    mode        "deletion": what has gone shows the fill. "insertion": what has gone shows the image, all else the fill.
    fill        a number, a colour (C,), a colour for each image (B, C), an image for each (B, C, H, W, or
                broadcastable to it), "mean" for each image's own mean colour, or `Noise(seed)`. It is in the units of
                the images after the division by 255 (black is 0.0, white 1.0), uint8 tensors again being divided by
                255, and it is normalised like the images.
    mean, std   (C,): what is subtracted and divided by; left out, for images that are normalised already.
    window      (start, stop): only these of the B * P * S images. A map is ranked anew in every call: whoever asks
                window by window ranks it once, with `rank_map`.
    out         where to write, (stop - start, C, H, W); dtype: of the result, else that of `out`, of floating images,
                or float32.

    No gradient flows through it. Raises InputError, one sentence, when an argument does not fit.
    """
    images, order = images.detach(), order.detach()
    if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise InputError(f"images must be (B, C, H, W), uint8 or floating, not {_kind(images)}.")
    batch, channels, height, width = images.shape
    if images.numel() == 0 and batch:
        raise InputError(f"images of shape {tuple(images.shape)} have no pixels.")
    if height * width >= 2**31:
        raise InputError(f"images of shape {tuple(images.shape)} are too large: 2^31 pixels or more.")
    if mode not in ("deletion", "insertion"):
        raise InputError(f"mode {mode!r} is unknown; {nearest(str(mode), ('deletion', 'insertion'))}")
    is_map = order.ndim == 4 and order.shape[2:] == images.shape[2:]
    is_indices = order.ndim == 3 and order.shape[2] == height * width and not order.is_floating_point()
    integral = order.dtype in (torch.int32, torch.int64)
    if order.shape[:1] != images.shape[:1] or not (is_map or is_indices) or not (integral or order.is_floating_point()):
        raise InputError(
            f"order must be a map or ranks ({batch}, P, {height}, {width}) or int32 or int64 pixel indices "
            f"({batch}, P, {height * width}), not {_kind(order)}."
        )
    if order.device != images.device:
        raise InputError(f"order is on {order.device} and images are on {images.device}; they must be on one device.")

    counts = _counts(fractions, height * width)
    start, stop = _window(window, batch * order.shape[1] * len(counts))
    out = _out(out, dtype, images, (stop - start, channels, height, width))
    if start == stop:
        return out

    per_image = order.shape[1] * len(counts)
    touched = slice(start // per_image, -(-stop // per_image))
    passed = touched.start
    filled = _fill(fill, images, precision(out))
    noise = filled if isinstance(filled, Noise) else Noise(0)
    order = order[touched]
    if order.is_floating_point():
        ranks = rank_map(order)
    else:
        ranks = order if is_map else _inverse(order).view(-1, order.shape[1], height, width)
    _mask_sequence(
        images[touched],
        ranks,
        None if isinstance(filled, Noise) else filled[touched],
        noise.seed if noise.seed < 2**63 else noise.seed - 2**64,
        noise.first + passed,
        torch.tensor(counts, dtype=torch.int32, device=images.device),
        _per_channel("mean", mean, 0.0, out),
        _per_channel("std", std, 1.0, out),
        mode == "deletion",
        start - passed * per_image,
        stop - passed * per_image,
        out,
    )
    return out


def rank_map(maps: Tensor) -> Tensor:
    """The rank of each pixel in its map: maps (..., H, W) -> int32 (..., H, W), 0 for the highest, ties by index.

    Raises InputError when a map holds NaN, which has no rank.

    >>> rank_map(torch.tensor([[0.1, 0.4], [0.4, 0.2]]))
    tensor([[3, 0],
            [1, 2]], dtype=torch.int32)
    """
    if maps.isnan().any():
        raise InputError("the map holds NaN, so its pixels have no order.")
    order = maps.flatten(-2).argsort(dim=-1, descending=True, stable=True)
    return _scatter_ranks(order, torch.empty_like(order, dtype=torch.int32)).view(maps.shape)


def _inverse(order: Tensor) -> Tensor:
    size = order.shape[-1]
    if order.numel() and (order.min() < 0 or order.max() >= size):
        raise InputError(f"order holds pixel indices outside 0 .. {size - 1}.")
    ranks = _scatter_ranks(order.long(), torch.full_like(order, -1, dtype=torch.int32))
    if (ranks < 0).any():
        raise InputError("order must hold every pixel index once, and some are missing.")
    return ranks


def _scatter_ranks(order: Tensor, ranks: Tensor) -> Tensor:
    numbers = torch.arange(order.shape[-1], dtype=torch.int32, device=order.device)
    return ranks.scatter_(-1, order, numbers.expand_as(order))


def _counts(fractions: Tensor | Sequence[float], pixels: int) -> list[int]:
    values = torch.as_tensor(fractions, dtype=torch.float64, device="cpu")
    # Written so that NaN fails it.
    if values.ndim != 1 or not len(values) or not ((values >= 0) & (values <= 1)).all():
        raise InputError("fractions must be one or more numbers between 0 and 1, in one dimension.")
    counts: list[int] = (values * pixels + 0.5).floor().long().tolist()
    return counts


def _window(window: tuple[int, int] | None, total: int) -> tuple[int, int]:
    start, stop = window or (0, total)
    if not 0 <= start <= stop <= total:
        raise InputError(f"window ({start}, {stop}) must lie within 0 .. {total}, the number of masked images.")
    return start, stop


def _out(out: Tensor | None, dtype: torch.dtype | None, images: Tensor, shape: tuple[int, ...]) -> Tensor:
    if out is None:
        dtype = dtype or (images.dtype if images.is_floating_point() else torch.float32)
        if not dtype.is_floating_point:
            raise InputError(f"dtype {dtype} is not floating, and models take floating images.")
        return torch.empty(shape, dtype=dtype, device=images.device)
    if tuple(out.shape) != shape or out.dtype != (dtype or out.dtype) or not out.is_floating_point():
        raise InputError(f"out must be {shape}, {dtype or 'floating'}, not {_kind(out)}.")
    if out.device != images.device:
        raise InputError(f"out is on {out.device} and images are on {images.device}; they must be on one device.")
    return out.detach()


def _fill(
    fill: float | Sequence[float] | Tensor | Noise | str, images: Tensor, precision: torch.dtype
) -> Tensor | Noise:
    if isinstance(fill, Noise):
        if not 0 <= fill.seed < 2**64:
            raise InputError(f"the noise's seed {fill.seed} must be at least 0 and below 2^64.")
        return fill
    if isinstance(fill, str):
        if fill != "mean":
            raise InputError(f"fill {fill!r} is unknown; the only fill with a name is 'mean'.")
        scale = 255 if images.dtype == torch.uint8 else 1
        return (images.to(precision).mean((-2, -1), keepdim=True) / scale).expand_as(images)
    colour = fill.detach() if isinstance(fill, Tensor) else torch.tensor(fill, dtype=precision, device=images.device)
    if colour.dtype != torch.uint8 and not colour.is_floating_point():
        raise InputError(f"fill must be uint8 or floating, not {_kind(colour)}.")
    if colour.device != images.device:
        raise InputError(f"fill is on {colour.device} and images are on {images.device}; they must be on one device.")
    shaped = colour[..., None, None] if colour.ndim in (1, 2) else colour
    try:
        shaped = shaped.expand_as(images)
    except RuntimeError:
        raise InputError(
            f"fill must be a number, a colour ({images.shape[1]},) or ({images.shape[0]}, {images.shape[1]}), "
            f"or images {tuple(images.shape)}, not {_kind(colour)}."
        ) from None
    is_colour = colour.ndim < 3 and colour.is_floating_point()
    if is_colour and images.dtype == torch.uint8 and not ((colour >= 0) & (colour <= 1)).all():
        raise InputError("a colour that fills uint8 images must lie between 0 (black) and 1 (white).")
    return shaped


def _per_channel(name: str, values: Sequence[float] | None, default: float, out: Tensor) -> Tensor:
    channels = out.shape[1]
    numbers = [default] * channels if values is None else [float(v) for v in values]
    if len(numbers) != channels or not all(map(math.isfinite, numbers)) or (name == "std" and 0.0 in numbers):
        raise InputError(f"{name} must be {channels} finite numbers{', none of them zero' if name == 'std' else ''}.")
    return torch.tensor(numbers, dtype=precision(out), device=out.device)


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's finaliser of 32-bit numbers held in int64."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {_name(tensor)}"
