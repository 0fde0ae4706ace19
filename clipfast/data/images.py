"""Finding and decoding images: whatever is on the disk becomes an upright RGB picture or one clear sentence."""

from __future__ import annotations

import contextlib
import difflib
import glob
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from clipfast.errors import ImageError, InputError

# Only raster formats that Pillow decodes itself: its EPS reader, for one, starts another program on the file's content.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000", "TGA", "QOI")
SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".ico", ".avif", ".jp2", ".j2k", ".tga", ".qoi"),
}
# What brings an image of an EXIF orientation upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_IMPOSTORS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the image: fetch the content with `git lfs pull`"),
    (b"%PDF", "is a PDF: export its pages as PNG or JPEG"),
    (b"%!PS", "is PostScript: export it as PNG or JPEG"),
    (b"<", "is a web page or an SVG, not an image of pixels: save the picture itself as PNG or JPEG"),
)


def expand(patterns: Sequence[str | Path]) -> list[Path]:
    """The image files that files, folders and glob patterns name, in the order given, each once.

    A folder gives the images directly in it and a pattern the images that match (`**` descends), both sorted by name,
    recognised by suffix and without hidden files. A plain name is kept whatever its suffix, and even if no such file
    exists, so that `read_image` reports it and the others are still read.

    Raises InputError for a folder or a pattern without images, naming it, and for no pattern at all.
    """
    if isinstance(patterns, (str, Path)):
        patterns = [patterns]
    if not patterns:
        raise InputError("no image was named: give files, folders or patterns such as photos/*.jpg.")
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = sorted(p for p in path.iterdir() if is_image(p) and p.is_file())
        elif path.exists() or not glob.has_magic(str(path)):
            matches = [path]
        else:
            matches = sorted(p for p in map(Path, glob.iglob(str(path), recursive=True)) if is_image(p) and p.is_file())
        if not matches:
            raise InputError(
                f"no image found under '{pattern}': images are recognised by suffix (.jpg, .png, .webp, .tif, ...),"
                " name a file directly to read it whatever it is called."
            )
        found.update(dict.fromkeys(matches))
    return list(found)


def is_image(path: str | Path) -> bool:
    """Whether a path is called as a picture is, by its suffix, and not hidden."""
    # A million names are asked about: as a Path each would take ten times as long.
    name = path.name if isinstance(path, Path) else path.rpartition("/")[2]
    stem, dot, suffix = name.rpartition(".")
    return bool(stem) and stem[0] != "." and dot + suffix.lower() in SUFFIXES


def read_image(source: str | Path | bytes | Image.Image, *, name: str = "the image in memory") -> Image.Image:
    """An upright RGB image from a file, the bytes of one, or a PIL image (unchanged; itself if it is one already).

    name: what errors call an image that comes as bytes.

    EXIF orientation is applied, transparency is composited on white, an animation gives its first frame (a PIL image
    its current one). 16-bit grey is scaled to 8 bits. Floats are taken as 0..1 or 0..255 where they lie within, wider
    ranges (and integers beyond 16 bits) are stretched from their minimum to their maximum.

    Raises ImageError, naming the source, for anything that cannot be read as an image.
    """
    if isinstance(source, Image.Image):
        return _decoded(source, str(getattr(source, "filename", "") or "the image"))
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), name)
    if not isinstance(source, (str, Path)):
        raise ImageError(f"an image must be a path, bytes or a PIL image, not {type(source).__name__}.")
    name = str(source)
    with _open(name) as stream:
        return _read(stream, name)


def _open(name: str) -> BinaryIO:
    if name.startswith(("http://", "https://", "s3://", "gs://")):
        raise ImageError(f"{name} is a web address: download it and name the file.", name)
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            raise ImageError(f"{name} is a folder: name an image in it.", name)
        if path.exists() and not path.is_file():
            raise ImageError(f"{name} is not a regular file: a device or a pipe cannot be read as an image.", name)
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError(f"{name} does not exist{_near(path)}", name) from None
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name} cannot be opened: {getattr(error, 'strerror', None) or error}.", name) from error


def _read(stream: BinaryIO, name: str) -> Image.Image:
    start = stream.read(64)
    if not start:
        raise ImageError(f"{name} is empty: 0 bytes.", name)
    stream.seek(0)
    try:
        with Image.open(stream, formats=_FORMATS) as image:
            return _decoded(image, name)
    except ImageError:
        raise
    except UnidentifiedImageError:
        text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
        why = next((why for magic, why in _IMPOSTORS if text.startswith(magic)), None)
        raise ImageError(
            f"{name} {why or 'is not an image in a known format, or its header is damaged'}.", name
        ) from None
    except Exception as error:
        raise _failed(name, error) from error


def _near(path: Path) -> str:
    """The end of the sentence about a missing file: the names beside it that are most like it."""
    try:
        names = {n.lower(): n for n in os.listdir(path.parent)}
    except OSError:
        return f", nor does the folder '{path.parent}'."
    close = difflib.get_close_matches(path.name.lower(), names, n=3, cutoff=0.6)
    return f": did you mean {' or '.join(repr(names[n]) for n in close)}?" if close else "."


def _decoded(image: Image.Image, name: str) -> Image.Image:
    if min(image.size) < 1:
        raise ImageError(f"{name} has no pixels: {image.width} x {image.height}.", name)
    # Decoders meet damaged files with whatever exception they happen to run into, so all of them mean the same here.
    try:
        image.load()
        return _rgb(_upright(image), name)
    except ImageError:
        raise
    except Exception as error:
        raise _failed(name, error) from error


def _failed(name: str, error: Exception) -> ImageError:
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        limit = f" of {Image.MAX_IMAGE_PIXELS:,} pixels" if Image.MAX_IMAGE_PIXELS else ""
        return ImageError(f"{name} is too large to decode safely (Pillow's limit{limit}): scale it down.", name)
    if isinstance(error, MemoryError):
        return ImageError(f"{name} does not fit into memory: scale it down.", name)
    if "truncated" in str(error).lower() or isinstance(error, EOFError):
        return ImageError(f"{name} is truncated: the file ends before the picture does.", name)
    detail = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return ImageError(f"{name} cannot be decoded: {detail}.", name)


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(orientation(image))
    if turn is None:
        return image
    image = image.transpose(turn)
    # Whoever reads it next would turn it once more.
    for key in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
        image.info.pop(key, None)
    return image


def orientation(image: Image.Image) -> int:
    """The EXIF (or XMP) orientation of an opened image, 1 to 8; 1 where there is none or it cannot be read."""
    # A damaged EXIF block says nothing about the pixels, which are fine.
    with contextlib.suppress(Exception):
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image).astype(np.float64) / 65535)
    if image.mode in ("I", "F"):
        return _grey(_unit(np.asarray(image).astype(np.float64), image.mode, name))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _unit(values: np.ndarray, mode: str, name: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ImageError(f"{name} has pixels that are not finite: replace NaN and infinity.", name)
    low, high = values.min(), values.max()
    for top in (65535,) if mode == "I" else (1, 255):
        if low >= 0 and high <= top:
            return values / top
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")
