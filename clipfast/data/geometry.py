"""From an image's pixels to a model's input and back.

Pixel coordinates are continuous: pixel i covers [i, i + 1) and its centre is i + 0.5, on every grid, so that a map goes
back to the original image exactly where its patches came from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipfast.data.images import read_image
from clipfast.errors import InputError

_RESAMPLING = {r.name.lower(): r for r in Image.Resampling}
_RESIZE = ("crop", "squash", "longest", "keep")
_OPEN_CLIP_RESIZE = {"shortest": "crop", "squash": "squash", "longest": "longest"}
_OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
_OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
# Above this, "resize, then crop" resamples only the part that the crop keeps: a 1 x 10,000 image would otherwise grow
# to half a billion pixels of which the model sees 50,000.
_MAX_RESIZED_PIXELS = 64_000_000
_CHUNK_ELEMENTS = 1 << 24


def _pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    sides = (value, value) if isinstance(value, int) else tuple(value)
    if len(sides) == 1:
        sides = sides * 2
    if len(sides) != 2 or any(int(s) != s or s < 1 for s in sides):
        raise InputError(f"{name} must be one or two positive whole numbers (height, width), not {value!r}.")
    return int(sides[0]), int(sides[1])


def _triple(value: float | Sequence[float], name: str) -> tuple[float, float, float]:
    values = (value,) if isinstance(value, (int, float)) else tuple(value)
    if len(values) == 1:
        values = values * 3
    if len(values) != 3 or not all(math.isfinite(v) for v in values):
        raise InputError(f"{name} must be three finite numbers (red, green, blue), not {value!r}.")
    return float(values[0]), float(values[1]), float(values[2])


@dataclass(frozen=True)
class InputSpec:
    """What a model wants to see: the size of its input and how an image becomes it.

    size: (H, W) of the input in pixels; with resize="keep" only the default for tensors, images keep their own aspect.
    patch: (ph, pw), pixels of one patch.
    mean, std: of red, green and blue on the 0..1 scale.
    interpolation: a name of PIL's `Image.Resampling` in lower case.
    resize: "crop" (the shortest edge to the input's, then the centre), "squash" (both sides, aspect lost),
        "longest" (the longest edge to the input's, then padded with `fill`) or
        "keep" (native aspect, each side rounded to whole patches, at least one; scaled down to `max_side` if given).
    fill: colour of the padding, 0..255.

    Raises InputError for a value that cannot be used.
    """

    size: tuple[int, int]
    patch: tuple[int, int]
    mean: tuple[float, float, float] = _OPENAI_MEAN
    std: tuple[float, float, float] = _OPENAI_STD
    interpolation: str = "bicubic"
    resize: str = "crop"
    fill: int = 0
    max_side: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _pair(self.size, "size"))
        object.__setattr__(self, "patch", _pair(self.patch, "patch"))
        object.__setattr__(self, "mean", _triple(self.mean, "mean"))
        object.__setattr__(self, "std", _triple(self.std, "std"))
        if min(self.std) <= 0:
            raise InputError(f"std must be positive, not {self.std}.")
        if self.interpolation not in _RESAMPLING:
            raise InputError(f"interpolation must be one of {', '.join(_RESAMPLING)}, not {self.interpolation!r}.")
        if self.resize not in _RESIZE:
            raise InputError(f"resize must be one of {', '.join(_RESIZE)}, not {self.resize!r}.")
        if not (isinstance(self.fill, int) and 0 <= self.fill <= 255):
            raise InputError(f"fill must be a whole number from 0 to 255, not {self.fill!r}.")
        if any(s < p for s, p in zip(self.size, self.patch, strict=True)):
            raise InputError(
                f"an input of {self.size} holds no patch of {self.patch}: size must be at least the patch."
            )
        if self.max_side is not None and self.max_side < max(self.patch):
            raise InputError(f"max_side must be at least one patch ({max(self.patch)} pixels), not {self.max_side}.")

    @property
    def black(self) -> tuple[float, float, float]:
        """A black pixel's red, green and blue in the model's input."""
        red, green, blue = (-mean / std for mean, std in zip(self.mean, self.std, strict=True))
        return red, green, blue

    @classmethod
    def from_open_clip(cls, cfg: Mapping[str, Any], patch: int | Sequence[int]) -> InputSpec:
        """From open_clip's `model.visual.preprocess_cfg` and the tower's patch size; absent keys mean its defaults.

        Raises InputError for a mode other than RGB or a resize mode that open_clip does not have.
        """
        if cfg.get("mode", "RGB") != "RGB":
            raise InputError(f"the model wants {cfg['mode']!r} images, only 'RGB' is supported.")
        mode = cfg.get("resize_mode") or "shortest"
        if mode not in _OPEN_CLIP_RESIZE:
            raise InputError(f"resize_mode must be one of {', '.join(_OPEN_CLIP_RESIZE)}, not {mode!r}.")
        size = _pair(cfg.get("size", 224), "size")
        interpolation = cfg.get("interpolation") or "bicubic"
        # open_clip reads "random" (a training augmentation) as bicubic, and its crop to a rectangle is always bicubic.
        if interpolation == "random" or (mode == "shortest" and size[0] != size[1]):
            interpolation = "bicubic"
        return cls(
            size=size,
            patch=_pair(patch, "patch"),
            mean=_triple(cfg.get("mean") or _OPENAI_MEAN, "mean"),
            std=_triple(cfg.get("std") or _OPENAI_STD, "std"),
            interpolation=interpolation,
            resize=_OPEN_CLIP_RESIZE[mode],
            fill=cfg.get("fill_color") or 0,
        )


@dataclass(frozen=True)
class Geometry:
    """Where a model's input lies on the original image.

    height, width: the original image in pixels, after its EXIF rotation.
    box: (left, top, right, bottom) in original pixels: what the whole input shows. It reaches beyond the image where
        preprocessing padded, and stays inside it where preprocessing cropped.
    input: (H, W) of the input in pixels.
    covered: (H', W') pixels of the input, from its top left, that whole patches cover; less than `input` where the
        input is no multiple of the patch (a 384-pixel input of 14-pixel patches shows the model 378).
    """

    height: int
    width: int
    box: tuple[float, float, float, float]
    input: tuple[int, int]
    covered: tuple[int, int]

    def to_image(self, maps: Tensor, outside: float = 0.0) -> Tensor:
        """Maps on the original image's pixels: (..., h, w) -> (..., height, width), bilinear between patch centres.

        Equals `F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)` where the input shows the
        whole image. Maps of the input's own size are taken as pixel maps, all others as patch maps. Float64 stays
        float64, all else becomes float32. Pixels that the model did not see get `outside`.

        Raises InputError for maps without two spatial dimensions or without elements in them.
        """
        if maps.ndim < 2 or 0 in maps.shape[-2:]:
            raise InputError(f"maps must be (..., h, w) with h and w at least 1, not {tuple(maps.shape)}.")
        maps = maps.to(torch.float64 if maps.dtype == torch.float64 else torch.float32)
        lead, (h, w) = maps.shape[:-2], maps.shape[-2:]
        left, top, right, bottom = self._shown((h, w))
        rows, y0, y1, fy = _lerp(self.height, top, bottom, h, maps)
        cols, x0, x1, fx = _lerp(self.width, left, right, w, maps)

        flat = maps.reshape(-1, h, w)
        out = maps.new_full((flat.shape[0], self.height, self.width), outside)
        step = max(1, _CHUNK_ELEMENTS // (self.height * self.width))
        for i in range(0, flat.shape[0], step):
            part = flat[i : i + step]
            tall = part[:, y0].lerp_(part[:, y1], fy[:, None])
            out[i : i + step, rows, cols] = tall[:, :, x0].lerp_(tall[:, :, x1], fx)
        return out.reshape(*lead, self.height, self.width)

    def resized(self, height: int, width: int) -> Geometry:
        """The same for a copy of the image of another size, such as a thumbnail: its maps cost only its own pixels."""
        sy, sx = height / self.height, width / self.width
        left, top, right, bottom = self.box
        return replace(self, height=height, width=width, box=(left * sx, top * sy, right * sx, bottom * sy))

    def to_input(self, points: Tensor) -> Tensor:
        """Points (..., 2) as (x, y) in original pixels -> (x, y) in the input's pixels; unseen ones fall outside."""
        origin, scale = self._affine(points)
        return (points - origin) / scale

    def from_input(self, points: Tensor) -> Tensor:
        """Points (..., 2) as (x, y) in the input's pixels -> (x, y) in original pixels; the inverse of `to_input`."""
        origin, scale = self._affine(points)
        return points * scale + origin

    def _affine(self, points: Tensor) -> tuple[Tensor, Tensor]:
        left, top, right, bottom = self.box
        scale = ((right - left) / self.input[1], (bottom - top) / self.input[0])
        return points.new_tensor((left, top)), points.new_tensor(scale)

    def _shown(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        if size == self.input:
            return self.box
        left, top, right, bottom = self.box
        right = left + (right - left) * self.covered[1] / self.input[1]
        bottom = top + (bottom - top) * self.covered[0] / self.input[0]
        return left, top, right, bottom


def _lerp(pixels: int, low: float, high: float, cells: int, like: Tensor) -> tuple[slice, Tensor, Tensor, Tensor]:
    """Along one axis: which pixels have their centre in [low, high), and the two cells and the weight for each."""
    first = min(max(math.ceil(low - 0.5), 0), pixels)
    last = min(max(math.ceil(high - 0.5), 0), pixels)
    if first >= last:  # a box thinner than a pixel may hold no centre: it shows the pixel that it lies in
        first = min(max(math.floor((low + high) / 2), 0), pixels - 1)
        last = first + 1
    centres = torch.arange(first, last, dtype=torch.float64) + 0.5
    at = ((centres - low) / (high - low) * cells - 0.5).clamp(0, cells - 1)
    lower = at.floor().long()
    upper = (lower + 1).clamp(max=cells - 1)
    weight = (at - lower).to(like.device, like.dtype)
    return slice(first, last), lower.to(like.device), upper.to(like.device), weight


def prepare(image: Image.Image, spec: InputSpec) -> tuple[Tensor, Geometry]:
    """One image as the model's input: uint8 (3, H, W) and the geometry to bring its maps back.

    The pixels are those of the model's own (open_clip's) evaluation transform. Images that are not RGB, or carry an
    EXIF rotation, go through `read_image` first.

    Raises ImageError for an image that cannot be read.
    """
    image = read_image(image)
    width, height = image.size
    resized, (top, left), geometry = place(height, width, spec)
    target, box = geometry.input, geometry.box

    resampling = _RESAMPLING[spec.interpolation]
    if crops_first(resized, spec):
        inside = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], width), min(box[3], height))
        image = image.resize((target[1], target[0]), resampling, box=inside)
    else:
        if resized != (height, width):
            image = image.resize((resized[1], resized[0]), resampling)
        if resized != target:
            canvas = Image.new("RGB", (target[1], target[0]), (spec.fill,) * 3)
            canvas.paste(image, (-left, -top))
            image = canvas

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), geometry


def place(height: int, width: int, spec: InputSpec) -> tuple[tuple[int, int], tuple[int, int], Geometry]:
    """How an image of this size becomes the input: its (height, width) after resizing, the (top, left) of the input
    there, negative where it is padded, and the geometry."""
    resized, target = _sizes(height, width, spec)
    top, left = (_centre(r, t) for r, t in zip(resized, target, strict=True))
    sy, sx = height / resized[0], width / resized[1]
    box = (left * sx, top * sy, (left + target[1]) * sx, (top + target[0]) * sy)
    covered = tuple(t // p * p for t, p in zip(target, spec.patch, strict=True))
    return resized, (top, left), Geometry(height, width, box, target, (covered[0], covered[1]))


def crops_first(resized: tuple[int, int], spec: InputSpec) -> bool:
    """Whether only the part that the crop keeps is resampled, as the whole would be too large."""
    return spec.resize == "crop" and resized[0] * resized[1] > _MAX_RESIZED_PIXELS


def _sizes(height: int, width: int, spec: InputSpec) -> tuple[tuple[int, int], tuple[int, int]]:
    """((height, width) after resizing, (height, width) of the input)."""
    target = spec.size
    if spec.resize == "squash":
        return target, target
    if spec.resize == "keep":
        scale = 1.0 if spec.max_side is None else min(1.0, spec.max_side / max(height, width))
        most = [math.inf if spec.max_side is None else spec.max_side // p for p in spec.patch]
        grid = [min(max(round(s * scale / p), 1), m) for s, p, m in zip((height, width), spec.patch, most, strict=True)]
        target = (int(grid[0]) * spec.patch[0], int(grid[1]) * spec.patch[1])
        return target, target
    if spec.resize == "crop" and target[0] == target[1]:
        # torchvision's Resize cuts the longer side's fraction off; the two cases below round it.
        short, long = sorted((height, width))
        edge = int(target[0] * long / short)
        return ((target[0], edge) if height <= width else (edge, target[1])), target
    ratios = (height / target[0], width / target[1])
    ratio = min(ratios) if spec.resize == "crop" else max(ratios)
    return (max(round(height / ratio), 1), max(round(width / ratio), 1)), target


def _centre(have: int, want: int) -> int:
    """Where a centred window of `want` pixels begins on `have` pixels as torchvision has it, negative where padded."""
    return round((have - want) / 2) if have >= want else -((want - have) // 2)


def normalize(
    pixels: Tensor, spec: InputSpec, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """uint8 (B, 3, H, W) -> the model's input (B, 3, H, W) on `device` (default: where the pixels are).

    Computed in float32 as torchvision's ToTensor and Normalize do, then cast, so that every dtype sees the same pixels.

    Raises InputError for anything but uint8 (B, 3, H, W).
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise InputError(f"pixels must be uint8 (B, 3, H, W), not {pixels.dtype} {tuple(pixels.shape)}.")
    pixels = pixels.to(device or pixels.device).to(torch.float32)
    mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (spec.mean, spec.std))
    return pixels.div_(255).sub_(mean).div_(std).to(dtype)


_READ_NOTHING = ("ToTensor", "MaybeToTensor", "MaybeConvertMode", "ToImage", "PILToTensor", "RGB", "ToDtype")


def spec_of(preprocess: object, patch: int | Sequence[int]) -> InputSpec:
    """Read an InputSpec from a torchvision `Compose`: open_clip's and OpenAI's own, and others made of the same parts.

    patch: the tower's patch size in pixels.

    Raises InputError, naming the transform, for anything whose effect on the geometry is not known.
    """
    steps = getattr(preprocess, "transforms", None)
    if not isinstance(steps, Iterable):
        raise _unread(preprocess, "is no torchvision Compose")
    found: dict[str, Any] = {}
    for step in steps:
        name = _name(step)
        if name in _READ_NOTHING or "convert" in name.lower():
            continue
        kind = "CenterCrop" if name == "CenterCropOrPad" else name
        if kind not in ("Resize", "ResizeKeepRatio", "ResizeMaxSize", "CenterCrop", "Normalize"):
            raise _unread(step, "is not known")
        slot = "Resize" if kind.startswith("Resize") else kind
        if slot in found or ("Normalize" in found) or (slot == "Resize" and "CenterCrop" in found):
            raise _unread(step, "comes where Resize, CenterCrop, Normalize is the order that can be read")
        found[slot] = step
    for slot in ("Resize", "Normalize"):
        if slot not in found:
            raise _unread(preprocess, f"has no {slot}")
    size, resize, fill = _read_resize(found["Resize"], found.get("CenterCrop"))
    interpolation = getattr(found["Resize"], "interpolation", "bicubic")
    return InputSpec(
        size=size,
        patch=_pair(patch, "patch"),
        mean=_triple(np.atleast_1d(found["Normalize"].mean).tolist(), "mean"),
        std=_triple(np.atleast_1d(found["Normalize"].std).tolist(), "std"),
        interpolation=str(getattr(interpolation, "value", interpolation)),
        resize=resize,
        fill=fill,
    )


def _read_resize(step: Any, crop: Any) -> tuple[tuple[int, int], str, int]:
    """(size, resize mode, fill) of a resizing transform and the crop after it."""
    name = _name(step)
    if name == "ResizeMaxSize":
        return _pair(step.max_size, "max_size"), "longest", int(step.fill)
    window = None if crop is None else _pair(crop.size, "size")
    if name == "ResizeKeepRatio":
        size = _pair(step.size, "size")
        if window != size or step.longest not in (0.0, 1.0) or step.random_scale_prob or step.random_aspect_prob:
            raise _unread(step, "is not followed by a crop to the same size, or is random")
        if step.longest == 1.0:
            if _name(crop) != "CenterCropOrPad":
                raise _unread(crop, "after ResizeKeepRatio(longest=1) is no CenterCropOrPad")
            return size, "longest", int(crop.fill)
        if size[0] == size[1]:
            raise _unread(step, "to a square rounds other than Resize does")
        return size, "crop", 0
    if getattr(step, "max_size", None) is not None:
        raise _unread(step, "has a max_size")
    if not isinstance(step.size, int) and len(step.size) == 2:
        size = _pair(step.size, "size")
        if window not in (None, size):
            raise _unread(crop, f"cuts {window} out of {size}")
        return size, "squash", 0
    size = _pair(step.size, "size")
    if window != size:
        raise _unread(step, f"to a shortest edge of {size[0]} is not followed by a CenterCrop of that size")
    return size, "crop", 0


def _name(step: object) -> str:
    return str(getattr(step, "__name__", type(step).__name__))


def _unread(step: object, why: str) -> InputError:
    return InputError(
        f"the preprocessing cannot be read: {_name(step)} {why}; pass normalised tensors instead, or an InputSpec."
    )
