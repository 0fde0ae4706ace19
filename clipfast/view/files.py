"""Writing files that are either whole or not there."""

from __future__ import annotations

import io
import secrets
from pathlib import Path

from PIL import Image


def write_file(path: str | Path, data: bytes) -> Path:
    """Write a file under a temporary name beside it, then rename it into place; missing folders are made.

    Raises OSError as the file system does; nothing is left behind then, and an older file stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def encode_image(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The bytes of an image file of that kind (a Pillow format name, with its options)."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def save_image(image: Image.Image, path: str | Path) -> Path:
    """Write an image, PNG unless the suffix says JPEG or WebP, whole or not at all."""
    suffix = Path(path).suffix.lower()
    kinds = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
    return write_file(path, encode_image(image, kinds.get(suffix, "PNG")))
