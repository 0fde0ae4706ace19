"""From an image's pixels to a model's input and back.

Pixel coordinates are continuous: pixel i covers [i, i + 1) and its centre is i + 0.5, on every grid, so that a map goes
back to the original image exactly where its patches came from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipfast.data.images import read_image
from clipfast.data.spec import RESAMPLING, InputSpec
from clipfast.errors import InputError

__all__ = ["Geometry", "InputSpec", "crops_first", "normalize", "place", "prepare"]

# Above this, "resize, then crop" resamples only the part that the crop keeps: a 1 x 10,000 image would otherwise grow
# to half a billion pixels of which the model sees 50,000.
_MAX_RESIZED_PIXELS = 64_000_000
_CHUNK_ELEMENTS = 1 << 24
_MAX_SCALE, _SCALE_PRECISION = 100.0, 1e-5


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

    resampling = RESAMPLING[spec.interpolation]
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
    top, left = (_centre(r, t, spec.centre) for r, t in zip(resized, target, strict=True))
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
    if spec.max_patches is not None:
        target = _within_budget(height, width, spec.patch, spec.max_patches)
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


def _within_budget(height: int, width: int, patch: tuple[int, int], most: int) -> tuple[int, int]:
    """(height, width) in whole patches, each side rounded up, at the largest scale at which they are at most `most`.

    The scale is bisected between the bounds and to the precision of SigLIP 2's processor, which decide at its steps.
    """

    def sides(scale: float) -> tuple[int, int]:
        rows, columns = (max(math.ceil(s * scale / p), 1) for s, p in zip((height, width), patch, strict=True))
        return rows * patch[0], columns * patch[1]

    low, high = _SCALE_PRECISION / 10, _MAX_SCALE
    while high - low >= _SCALE_PRECISION:
        middle = (low + high) / 2
        tall, wide = sides(middle)
        if (tall // patch[0]) * (wide // patch[1]) <= most:
            low = middle
        else:
            high = middle
    return sides(low)


def _centre(have: int, want: int, rounding: str) -> int:
    """Where a centred window of `want` pixels begins on `have` pixels, negative where padded, as torchvision pads."""
    if have < want:
        return -((want - have) // 2)
    return (have - want) // 2 if rounding == "floor" else round((have - want) / 2)


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
