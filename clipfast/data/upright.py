"""Samples as they are looked at: pictures upright, and what is marked in them turned with them.

Masks and boxes of COCO, ImageNet-S and CUB-200 are on the pixels as the file stores them, since neither their tools nor
the loaders that they were published with read EXIF. `read_image` does, so marks are turned as their picture is. A mask
that has the upright picture's size and not the stored one's was drawn on the upright picture, and so were its boxes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from clipfast.data.datasets.base import Box, Sample, Target
from clipfast.data.images import read_image

# By EXIF orientation, what makes stored pixels (H, W) upright.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda m: m[:, ::-1],
    3: lambda m: m[::-1, ::-1],
    4: lambda m: m[::-1],
    5: lambda m: m.T,
    6: lambda m: m[::-1].T,
    7: lambda m: m[::-1, ::-1].T,
    8: lambda m: m[:, ::-1].T,
}


def read_sample(sample: Sample) -> tuple[Image.Image, list[Target]]:
    """A sample's picture, upright and RGB, and its targets on the same pixels. Raises ImageError as `read_image`."""
    picture = read_image(sample.image)
    marked = any(target.mask is not None or target.boxes for target in sample.targets)
    orientation = _orientation(sample.image) if marked else 1
    if orientation not in _TURNS:
        return picture, sample.targets
    stored = picture.size[::-1] if orientation < 5 else picture.size
    return picture, [_turned(target, orientation, stored) for target in sample.targets]


def _orientation(source: Path | Image.Image) -> int:
    found = 1
    # As for `read_image`: a damaged EXIF block turns nothing.
    with contextlib.suppress(Exception):
        if isinstance(source, Image.Image):
            found = source.getexif().get(ExifTags.Base.Orientation, 1)
        else:
            with Image.open(source) as image:
                found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found


def _turned(target: Target, orientation: int, stored: tuple[int, int]) -> Target:
    """A target of a picture of `stored` (H, W) pixels in its file."""
    turn, mask = _TURNS[orientation], target.mask
    if mask is not None and mask.shape != stored and mask.shape == stored[::-1]:
        return target
    boxes = None if target.boxes is None else [_box(box, orientation, stored) for box in target.boxes]
    return replace(target, mask=None if mask is None else np.ascontiguousarray(turn(mask)), boxes=boxes)


def _box(box: Box, orientation: int, stored: tuple[int, int]) -> Box:
    left, top, right, bottom = box
    height, width = stored
    if orientation in (2, 3, 7, 8):
        left, right = width - right, width - left
    if orientation in (3, 4, 6, 7):
        top, bottom = height - bottom, height - top
    return (left, top, right, bottom) if orientation < 5 else (top, left, bottom, right)
