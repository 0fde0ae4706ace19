"""Folders of results whose files appear all at once, or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipfast.errors import InputError


class Staging:
    """A hidden folder `path` to write into, whose files go elsewhere in the end."""

    def __init__(self, path: Path, target: Path, numbered: bool):
        self.path = path
        self._target = target
        self._numbered = numbered

    def publish(self) -> Path:
        """Move everything to its place and return that folder; files of the same name are replaced."""
        if not self._numbered:
            self._target.mkdir(exist_ok=True)
            for path in sorted(self.path.iterdir()):
                path.replace(self._target / path.name)
            return self._target
        number, target = 1, self._target
        while True:
            # Making the folder claims its number, against other runs too.
            try:
                target.mkdir()
            except FileExistsError:
                number += 1
                target = self._target.with_name(f"{self._target.name}-{number}")
            else:
                return self.path.replace(target)


@contextmanager
def staging(wanted: Path | None, default: str) -> Iterator[Staging]:
    """A place for results: the folder `wanted`, or the first free one of runs/default, runs/default-2 ...

    Unless `publish` was called, nothing remains. Raises InputError where `wanted` is a file, OSError where nothing can
    be written, before any work is done.
    """
    target = Path("runs", default) if wanted is None else wanted.expanduser()
    if wanted is not None and target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file: --out names the folder to write to.")
    parent = target if wanted is not None and target.is_dir() else target.parent
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    path = parent / f".{target.name}.{secrets.token_hex(4)}.part"
    try:
        path.mkdir(parents=True)
        yield Staging(path, target, wanted is None)
    finally:
        shutil.rmtree(path, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
