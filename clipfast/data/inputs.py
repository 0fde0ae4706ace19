"""Images as users hand them over, turned one by one into a model's input."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from clipfast.data.geometry import Geometry, InputSpec, prepare
from clipfast.data.images import expand, read_image
from clipfast.errors import ImageError, InputError

# Pillow decodes and resizes outside the interpreter lock; this many images may be ready before they are asked for.
_THREADS, _AHEAD = 2, 8


@dataclass(frozen=True)
class Prepared:
    """One image as the model takes it: uint8 pixels (3, H, W) still to be normalised, or a normalised float tensor."""

    pixels: Tensor
    geometry: Geometry


def sources(images: Any) -> list[Any]:
    """A flat list of images out of whatever was passed: paths, folders, patterns, PIL images, arrays, tensors, batches.

    Raises InputError when there is none, or for something that is no image.
    """
    if isinstance(images, str | Path):
        # A file is kept as it is, so that a broken one is reported as such.
        return list(expand([images])) if Path(images).is_dir() or glob.has_magic(str(images)) else [Path(images)]
    if isinstance(images, Tensor | np.ndarray):
        if images.ndim == 4:
            return list(images)
        return [images]
    if isinstance(images, Image.Image | bytes):
        return [images]
    if not isinstance(images, Sequence) and not hasattr(images, "__iter__"):
        raise InputError(
            f"a {type(images).__name__} is no image: "
            "pass a path, a PIL image, a uint8 or normalised tensor, or several of them."
        )
    found = [source for image in images for source in sources(image)]
    if not found:
        raise InputError("there is no image to explain: pass at least one.")
    return found


def prepare_all(images: Sequence[Any], spec: InputSpec) -> Iterator[Prepared | ImageError]:
    """Each image prepared, in order, decoded ahead in threads; one that cannot be read gives its ImageError instead."""
    if all(isinstance(image, Tensor) for image in images):
        yield from (_attempt(image, spec) for image in images)
        return
    pending: list[Future[Prepared | ImageError]] = []
    rest = iter(images)
    with ThreadPoolExecutor(_THREADS) as pool:
        pending.extend(pool.submit(_attempt, image, spec) for image in islice(rest, _AHEAD))
        while pending:
            done = pending.pop(0)
            pending.extend(pool.submit(_attempt, image, spec) for image in islice(rest, 1))
            yield done.result()


def _attempt(image: Any, spec: InputSpec) -> Prepared | ImageError:
    try:
        return prepare_one(image, spec)
    except ImageError as error:
        return error


def prepare_one(image: Any, spec: InputSpec) -> Prepared:
    """One image prepared. Float tensors (3, H, W) count as normalised and are taken as they are.

    Raises ImageError: an unreadable image, a tensor of another shape or dtype, or one with NaN or infinite pixels.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise ImageError(
                f"an array of {image.dtype} {image.shape} is no image: "
                "pass uint8 (H, W, 3), or a normalised tensor (3, H, W)."
            )
        image = Image.fromarray(image)
    if not isinstance(image, Tensor):
        pixels, geometry = prepare(read_image(image), spec)
        return Prepared(pixels, geometry)
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ImageError(
            f"a tensor of shape {tuple(image.shape)} is no image: pass (3, H, W), or (B, 3, H, W) for a batch."
        )
    if str(image.dtype) == "torch.uint8":
        pixels, geometry = prepare(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()), spec)
        return Prepared(pixels, geometry)
    if not image.is_floating_point():
        raise ImageError(
            f"a tensor of {image.dtype} is no image: pass uint8 pixels, or floats normalised for the model."
        )
    height, width = image.shape[1:]
    (ph, pw) = spec.patch
    if height < ph or width < pw:
        raise ImageError(
            f"an image of {height} x {width} pixels holds no patch of {ph} x {pw}: make both sides larger."
        )
    # The sum shows every NaN and infinity and takes a fraction of the time; only where it overflows is each looked at.
    if not math.isfinite(float(image.sum())) and not bool(image.isfinite().all()):
        raise ImageError("the image tensor holds NaN or infinite pixels: normalise from finite ones.")
    covered = (height // ph * ph, width // pw * pw)
    return Prepared(
        image.detach(), Geometry(height, width, (0.0, 0.0, float(width), float(height)), (height, width), covered)
    )
