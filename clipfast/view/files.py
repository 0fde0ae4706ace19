"""Writing files that are either whole or not there."""

from __future__ import annotations

import io
import os
import secrets
from pathlib import Path

from PIL import Image


def write_file(path: str | Path, data: bytes, *, durable: bool = False) -> Path:
    """Write a file under a temporary name beside it, then rename it into place; missing folders are made.

    durable: the disk has it, not only the system's memory, so that it outlasts a power cut.

    Raises OSError as the file system does; nothing is left behind then, and an older file stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.part")
    try:
        part.write_bytes(data)
        if durable:
            sync(part)
        part.replace(path)
        if durable:
            sync(path.parent)
    finally:
        part.unlink(missing_ok=True)
    return path


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or the names in a folder. Raises OSError where it cannot."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


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
