"""Tar files of samples, as webdataset and img2dataset write them: files of one name are one sample."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from clipfast.errors import InputError

PICTURES = ("jpg", "jpeg", "png", "webp", "jfif", "gif", "bmp", "tif", "tiff", "ppm", "avif", "jp2")
"""The endings of a sample's picture, the preferred first."""


_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")


class TarError(InputError):
    """A tar file that ends, or is damaged, before its last member is over; what came before is good."""


def members(stream: BinaryIO, *, ended: bool = False) -> Iterator[tarfile.TarInfo]:
    """The regular files of an uncompressed tar in order; only headers are read, and nothing is unpacked.

    ended: insist on the zeros that end an archive, which not all programs write: without them it may have been cut
    between two members.

    Raises TarError where the archive is cut or damaged, with the byte, after what lies whole before it.
    """
    size = stream.seek(0, 2)
    stream.seek(0)
    at = 0
    if stream.read(8).startswith(_COMPRESSED):
        raise TarError("it is compressed")
    stream.seek(0)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            while (member := archive.next()) is not None:
                # It would keep every member.
                archive.members.clear()  # type: ignore[attr-defined]
                at = member.offset
                # A sparse file's size says nothing about what the archive holds of it.
                if member.isfile() and not member.issparse():
                    if member.offset_data + member.size > size:
                        raise TarError(f"it is cut: byte {size:,} is the last, within {member.name!r}")
                    yield member
            at = archive.offset
            # tarfile takes a damaged header for the end of the archive; two blocks of zeros are, or the file's own end.
            stream.seek(at)
            block = stream.read(tarfile.BLOCKSIZE)
            if block.strip(b"\0") or 0 < len(block) < tarfile.BLOCKSIZE:
                raise TarError(f"it is cut or damaged at byte {at:,} of {size:,}")
            if ended and not block:
                raise TarError(f"it is cut: byte {size:,} is the last, and there are no zeros that end an archive")
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, TarError):
            raise
        raise TarError(f"it cannot be read from byte {at:,} on ({error})") from error


def sample_name(name: str) -> tuple[str, str]:
    """What a file's sample is called, nothing for a hidden file, and its ending: all from the first dot on.

    >>> sample_name("./birds/0001.seg.PNG")
    ('birds/0001', 'seg.png')
    """
    folder, _, file = name.removeprefix("./").rpartition("/")
    stem, _, ending = file.partition(".")
    return (f"{folder}/{stem}" if folder and stem else stem), ending.lower()


def captions(held: dict[str, bytes]) -> list[str]:
    """The captions among a sample's files, by ending: .txt, or "caption" in .json, which may be a list.

    Raises ValueError or AttributeError for a .json that is damaged.
    """
    if "txt" in held:
        return [held["txt"].decode("utf-8", errors="replace").strip()]
    if "json" not in held:
        return []
    caption = json.loads(held["json"]).get("caption")
    if caption is None:
        return []
    return [str(one).strip() for one in (caption if isinstance(caption, list) else [caption])]
