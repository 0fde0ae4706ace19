"""Files wherever they are: on a disk, or behind an address that fsspec opens (s3://, gs://, https://, memory://)."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

from clipfast.errors import ImageError, InputError

# No picture is as large; reading one would only fill the memory.
MAX_BYTES = 2**30
_URL = re.compile(r"(\w[\w.+-]+::)*[A-Za-z][\w.+-]+://")
_HIDDEN = re.compile(r"(^|/)\.")
_SPAN = re.compile(r"(\d+)\.\.(\d+)")


class MissingError(ImageError):
    """A file that is not there."""


def is_url(name: str) -> bool:
    """Whether a name is an address, and not that of a local file (file:// is made one by `absolute`)."""
    return _URL.match(name) is not None


def absolute(name: str) -> str:
    """A local name from the root of the file system on, links kept; an address as it is."""
    if name.startswith("file://"):
        name = unquote(name.removeprefix("file://"))
    if is_url(name):
        return name if name.endswith("://") else name.rstrip("/")
    return os.path.abspath(os.path.expanduser(name))


def joined(root: str, name: str) -> str:
    """A name below a root, for people to read; absolute ones stand for themselves."""
    if not root or is_url(name) or name.startswith("/"):
        return absolute(name)
    return f"{root.rstrip('/')}/{name}"


def split(place: str) -> tuple[str, str]:
    """The folder that something is in, and its name there.

    >>> split("memory://a.jpg"), split("/b/c.jpg")
    (('memory://', 'a.jpg'), ('/b', 'c.jpg'))
    """
    root, slash, name = place.rpartition("/")
    return (f"{root}/" if root.endswith(":/") else root or slash), name


def common(places: Sequence[str]) -> str:
    """The folder that files have in common, "" where there is none.

    >>> common(["s3://a/b/1.jpg", "s3://a/c/1.jpg"]), common(["/x/1.jpg", "/y/1.jpg"])
    ('s3://a', '/')
    """
    parts = []
    for level in zip(*(place.split("/")[:-1] for place in places), strict=False):
        if len(set(level)) > 1:
            break
        parts.append(level[0])
    root = "/".join(parts)
    return f"{root}/" if parts == [""] or root.endswith(":/") else root


def read_bytes(root: str, name: str) -> bytes:
    """A whole file, its name relative to a folder `root` (or absolute, or an address).

    Raises ImageError, one sentence with the name, for what is missing, empty, no file, too large or cannot be read.
    """
    called = joined(root, name)
    try:
        if is_url(called):
            # Below a root as its file system writes it: a chained address has its path in the middle.
            system, path = _system(called) if is_url(name) else _system(root)
            data = system.cat_file(path if is_url(name) else f"{path.rstrip('/')}/{name}")
        else:
            with open(called, "rb", buffering=0, opener=_open_at_once) as stream:
                about = os.fstat(stream.fileno())
                if not stat.S_ISREG(about.st_mode):
                    raise ImageError(f"{called} is not a regular file: a device or a pipe cannot be read.", called)
                if about.st_size > MAX_BYTES:
                    raise ImageError(f"{called} has {about.st_size:,} bytes: no picture is as large.", called)
                data = stream.readall()
    except (FileNotFoundError, NotADirectoryError):
        raise MissingError(f"{called} does not exist.", called) from None
    except IsADirectoryError:
        raise ImageError(f"{called} is a folder.", called) from None
    except InputError:
        raise
    except Exception as error:
        # Each of fsspec's file systems fails in a way of its own.
        raise ImageError(f"{called} cannot be read: {sentence(error)}.", called) from error
    if not data:
        raise ImageError(f"{called} is empty: 0 bytes.", called)
    return cast(bytes, data)


def open_binary(name: str) -> BinaryIO:
    """A file that can be sought in, for reading. Raises OSError, or what fsspec's file system raises."""
    if not is_url(name):
        return open(name, "rb", opener=_open_at_once)
    system, path = _system(name)
    return cast(BinaryIO, system.open(path, "rb"))


def reach(name: str) -> None:
    """Raises InputError for an address whose kind fsspec does not know, or lacks a package for."""
    _system(name)


def exists(name: str) -> bool:
    """Whether there is such a file or folder. Raises InputError for an address that cannot be asked."""
    return _asked(name, "exists") if is_url(name) else os.path.exists(name)


def is_folder(name: str) -> bool:
    """Whether there is such a folder. Raises InputError for an address that cannot be asked."""
    return _asked(name, "isdir") if is_url(name) else os.path.isdir(name)


def walk(root: str, wanted: Callable[[str], bool]) -> list[str]:
    """The files below a folder that are `wanted` by their last name, relative to it, sorted by code point.

    Hidden files and folders are left out; links are followed, but not round in circles. A folder that cannot be listed
    is there itself, with "/" at its end. Raises InputError where that is the first.
    """
    if is_url(root):
        system, base = _system(root)
        found = _listed(root, lambda: system.find(base))
        skip = len(base.rstrip("/")) + 1
        names = [path[skip:] for path in found]
        return sorted(n for n in names if wanted(n.rpartition("/")[2]) and not _HIDDEN.search(n))
    names = []
    # (folder, how its files' names begin, where the links on the way to it led)
    waiting: list[tuple[str, str, frozenset[str]]] = [(root, "", frozenset((os.path.realpath(root),)))]
    while waiting:
        folder, prefix, met = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == ".":
                        continue
                    # What the folder's own list says, without asking the disk about each of a million files.
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append((entry.path, f"{prefix}{name}/", met))
                    elif wanted(name):
                        names.append(prefix + name)
                    elif entry.is_symlink() and entry.is_dir():
                        place = os.path.realpath(entry.path)
                        if place not in met and not f"{os.path.realpath(folder)}/".startswith(f"{place}/"):
                            waiting.append((entry.path, f"{prefix}{name}/", met | {place}))
        except OSError as error:
            if not prefix:
                raise InputError(f"{root} cannot be listed: {sentence(error)}.") from error
            names.append(prefix)
    names.sort()
    return names


def matches(pattern: str) -> tuple[str, list[str]]:
    """What a pattern with braces and wildcards (`**` descends) names: the folder before its first one, and the names
    below that, sorted, each once. Names that braces alone make up need not be there.

    Raises InputError for an address that cannot be listed.
    """
    magic = re.search(r"[{*?\[]", pattern)
    head = pattern if magic is None else pattern[: magic.start()]
    root, slash, _ = head.rpartition("/")
    root = absolute(root + slash if root or slash else ".")
    names: set[str] = set()
    for one in braces(pattern):
        rest = one[len(head.rpartition("/")[0] + slash) :]
        if is_url(root) and (root.startswith("http") or not glob.has_magic(rest)):
            names.add(rest)
        elif is_url(root):
            system, base = _system(root)
            found = _listed(pattern, lambda s=system, b=base, r=rest: s.glob(f"{b.rstrip('/')}/{r}"))  # type: ignore[misc]
            below = [path[len(base.rstrip("/")) + 1 :] for path in found]
            # As on a disk, where wildcards leave out what is hidden.
            names.update(name for name in below if _HIDDEN.search(rest) or not _HIDDEN.search(name))
        elif glob.has_magic(rest):
            names.update(glob.iglob(rest, root_dir=root, recursive=True))
        else:
            names.add(rest)
    return root, sorted(names)


def braces(pattern: str) -> list[str]:
    """A pattern with a range or a list in braces, written out.

    >>> braces("a/{08..10}.tar")
    ['a/08.tar', 'a/09.tar', 'a/10.tar']
    >>> braces("{x,y}.tar")
    ['x.tar', 'y.tar']
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    span = _SPAN.fullmatch(found[1])
    if span is None:
        parts = found[1].split(",")
    else:
        parts = [f"{i:0{len(span[1])}d}" for i in range(int(span[1]), int(span[2]) + 1)]
    return [rest for part in parts for rest in braces(pattern[: found.start()] + part + pattern[found.end() :])]


def sentence(error: Exception) -> str:
    """What an exception says, without a full stop."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(said).split()).rstrip(".")


def _open_at_once(name: str, flags: int) -> int:
    # Without it, opening a pipe waits for whoever writes to it.
    return os.open(name, flags | os.O_NONBLOCK)


@lru_cache(maxsize=64)
def _system(name: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it. Raises InputError where it, or its package, is missing."""
    try:
        import fsspec
    except ImportError as error:
        raise InputError(f"{name} is an address, which needs fsspec: pip install 'clipfast[data]'.") from error
    try:
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(name))
    except Exception as error:
        raise InputError(f"{name} cannot be reached: {sentence(error)}.") from error


def _asked(name: str, what: str) -> bool:
    system, path = _system(name)
    try:
        return bool(getattr(system, what)(path))
    except Exception as error:
        raise InputError(f"{name} cannot be reached: {sentence(error)}.") from error


def _listed(name: str, ask: Callable[[], Any]) -> Iterator[str]:
    try:
        return iter(ask())
    except Exception as error:
        raise InputError(f"{name} cannot be listed: {sentence(error)}.") from error
