"""Encoded images as a model's input, fast: for whole data sets, where decoding is what a GPU waits for.

JPEG is decoded and resized by torchvision and torch outside the interpreter's lock, all in 8 bits; everything else, and
whatever they cannot read, by Pillow. On photographs 0.5 % of the values differ from Pillow's, by one level (some by two
where a side is scaled up). Pixels are moved by NumPy: for that torch would start threads of its own, in each thread.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipfast.data.geometry import InputSpec, crops_first, place, prepare
from clipfast.data.images import orientation, read_image
from clipfast.data.inputs import Prepared

_RESIZERS = ("bicubic", "bilinear")
_START_OF_FRAME = (0xC0, 0xC1, 0xC2)
_MARKERS_ALONE = (0x01, *range(0xD0, 0xDA))


def decode(data: bytes, spec: InputSpec, *, exact: bool = False, name: str = "the image in memory") -> Prepared:
    """One encoded image prepared: uint8 (3, H, W), and the geometry of `prepare`.

    exact: every value as the model's own preprocessing has it, at its price. name: what errors call the image.

    Raises ImageError as `read_image` does.
    """
    picture = None if exact or spec.interpolation not in _RESIZERS else _jpeg(data)
    prepared = None if picture is None else _resized(picture, spec)
    return prepared or Prepared(*prepare(read_image(data, name=name), spec))


def _jpeg(data: bytes) -> Tensor | None:
    """An upright uint8 (1, 3, H, W), its channels last in memory; None for what Pillow should read, or refuse."""
    frame, decoder = _frame(data), _decoder()
    if frame is None or decoder is None:
        return None
    height, width, tagged = frame
    # Pillow decides about decompression bombs, and in what words.
    if Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS:
        return None
    try:
        picture = decoder(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except RuntimeError:
        return None
    if picture.shape != (3, height, width):
        return None
    return _turned(picture, _orientation(data) if tagged else 1)[None]


def _turned(picture: Tensor, orientation: int) -> Tensor:
    """uint8 (3, height, width) of an EXIF orientation, upright; its channels stay last in memory."""
    if not 2 <= orientation <= 8:
        return picture
    rows = picture.permute(1, 2, 0).numpy()
    if orientation >= 5:
        rows = rows.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        rows = rows[::-1]
    if orientation in (2, 3, 6, 7):
        rows = rows[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(rows)).permute(2, 0, 1)


def _frame(data: bytes) -> tuple[int, int, bool] | None:
    """(height, width, whether it may be rotated) of a grey or three-channel 8-bit JPEG; None for anything else.

    Read without Pillow: its header parser holds the interpreter's lock for a tenth of the time that decoding takes.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    at, tagged = 2, False
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker in _MARKERS_ALONE or marker == 0:
            return None
        if marker in _START_OF_FRAME:
            height, width = int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
            readable = data[at + 4] == 8 and data[at + 9] in (1, 3) and height > 0 and width > 0
            return (height, width, tagged) if readable else None
        tagged = tagged or marker == 0xE1
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None


def _orientation(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "MPO")) as image:
            return orientation(image)
    except Exception:
        return 1


@lru_cache(maxsize=1)
def _decoder() -> Callable[[Tensor], Tensor] | None:
    """Encoded bytes -> uint8 (3, H, W), or None where this torchvision was built without."""
    try:
        import torchvision.io

        rgb = torchvision.io.ImageReadMode.RGB.value
        # The function around it announces its retirement with a warning a process; without the op Pillow takes over.
        op = torch.ops.image.decode_jpeg
    except (ImportError, AttributeError, RuntimeError):
        return None
    return lambda data: op(data, rgb, False)


def _resized(picture: Tensor, spec: InputSpec) -> Prepared | None:
    """uint8 (1, 3, height, width) as the input; None where only the part that is kept should be resampled."""
    height, width = picture.shape[-2:]
    resized, (top, left), geometry = place(height, width, spec)
    if crops_first(resized, spec):
        return None
    passes = [resized] if resized != (height, width) else []
    # torch scales along the rows first, always; Pillow (13) so, where it saves it more, along the columns. Values are
    # rounded in between, and a fifth of them would be another level.
    if height - resized[0] > max(0, 2 * (width - resized[1])):
        passes.insert(0, (resized[0], width))
    for size in passes:
        picture = F.interpolate(picture, size, mode=spec.interpolation, antialias=True)
    seen = picture[0, :, max(top, 0) :, max(left, 0) :][:, : geometry.input[0], : geometry.input[1]]
    shown = seen.numpy()
    if shown.shape[1:] == geometry.input:
        return Prepared(torch.from_numpy(np.ascontiguousarray(shown)), geometry)
    pixels = np.full((3, *geometry.input), spec.fill, dtype=np.uint8)
    down, across = max(-top, 0), max(-left, 0)
    pixels[:, down : down + shown.shape[1], across : across + shown.shape[2]] = shown
    return Prepared(torch.from_numpy(pixels), geometry)
