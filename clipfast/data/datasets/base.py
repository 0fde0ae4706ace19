"""What a data set is: samples in a fixed order, each a picture with what is in it, and nothing opened before its turn.

Every data set lists its samples when it is opened, from folders and annotation files, sorted by name: the same order on
every machine. Pictures, masks and the contents of shards are opened in `dataset[i]` and not before.
"""

from __future__ import annotations

import csv
import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from clipfast.data.images import is_image
from clipfast.data.keys import numbered
from clipfast.errors import InputError, nearest

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Target:
    """One thing in a picture that a model can be asked for.

    text: what is asked, the class's name as it stands, without a template. label: its index in the set's `classes`.
    mask: (H, W) on the picture's own pixels, bool, or int8 with 1 = object, 0 = other, -1 = ignore.
    boxes: all boxes of this class, (left, top, right, bottom) in the picture's pixels, right and bottom exclusive.
    None where the data set does not know.
    """

    text: str
    label: int | None = None
    mask: np.ndarray | None = None
    boxes: list[Box] | None = None


@dataclass(frozen=True)
class Sample:
    """A picture and what is known of it.

    key: unique in the data set, the same whatever the limit, made of characters that file names may have.
    image: a file, or a picture that is nowhere a file of its own. targets: one each class in the picture, by label.
    captions: sentences that are true of it. foils: sentences that are nearly so.
    """

    key: str
    image: Path | Image.Image
    targets: list[Target]
    captions: list[str]
    foils: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """Where the files of a data set come from and how they lie on the disk.

    where: the site or the search terms that lead to it. layout: the tree that is expected, one line a file or folder.
    splits: the parts it comes in, the default first; none where it has one part only.
    """

    title: str
    where: str
    layout: str
    splits: tuple[str, ...] = ()


class Dataset(ABC):
    """The base of all data sets: `len(dataset)`, `dataset[i]`, and iteration in a fixed order.

    name: as in `open_dataset`, with the split. classes: the classes' names in the order of labels, or None.
    offers: which of "labels", "masks", "boxes" and "captions" its samples have.
    """

    source: ClassVar[Source]
    name: str
    classes: list[str] | None
    offers: frozenset[str]

    @abstractmethod
    def __len__(self) -> int:
        """How many samples there are."""

    @abstractmethod
    def _sample(self, index: int) -> Sample:
        """The sample of an index that is in range."""

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index`; negative ones count from the end.

        Raises IndexError out of range, ImageError for a damaged picture, mask or record of this sample: the others are
        not affected. A picture that is a file of its own is not opened here, but by whoever reads `image`.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of the {len(self)} of {self.name}")
        return self._sample(index % len(self))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))


def missing(name: str, source: Source, path: Path) -> InputError:
    """The error about a file or folder that is not there: where to get the data, and how it is to lie on the disk."""
    layout = "\n".join(f"    {line}" for line in source.layout.splitlines())
    return InputError(
        f"{name}: there is no {path}.\n{source.title} comes from {source.where}; expected is\n{layout}\n"
        f"with ROOT given as {name}:ROOT."
    )


def chosen_split(name: str, source: Source, split: str | None) -> str:
    """The split asked for, or the data set's default. Raises InputError for one that it does not have."""
    if split is None:
        return source.splits[0]
    if split not in source.splits:
        raise InputError(f"{name} has no split {split!r}: {nearest(split, source.splits)}")
    return split


def folders(path: Path) -> list[Path]:
    """The visible folders in a folder, by name; none where it is no folder."""
    if not path.is_dir():
        return []
    return sorted((p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.name)


def pictures(path: Path) -> list[Path]:
    """The pictures directly in a folder, by name; none where it is no folder."""
    if not path.is_dir():
        return []
    # Entries know what they are; asking the disk for each of a million paths would take minutes.
    with os.scandir(path) as entries:
        return [path / name for name in sorted(e.name for e in entries if is_image(e.name) and e.is_file())]


def first_existing(*paths: Path) -> Path | None:
    """The first of these files and folders that is there."""
    return next((path for path in paths if path.exists()), None)


def safe_keys(names: Iterable[str]) -> list[str]:
    """Names as keys that every file system takes: letters, digits, "_", "-" and "."; equal ones are numbered from ~2.

    >>> safe_keys(["cat/a b", "cat/a:b", "dog"])
    ['cat_a_b', 'cat_a_b~2', 'dog']
    """
    # Some file systems take "A" for "a".
    return numbered((re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "_" for name in names), str.lower)


def in_turn(labels: Sequence[int], limit: int | None) -> list[int]:
    """Which samples a limit keeps, ascending: the first of each class, then the second of each, and so on.

    >>> in_turn([0, 0, 0, 1, 1, 2], 4)
    [0, 1, 3, 5]
    """
    if limit is None or limit >= len(labels):
        return list(range(len(labels)))
    seen: Counter[int] = Counter()
    turns = []
    for i, label in enumerate(labels):
        turns.append((seen[label], i))
        seen[label] += 1
    return sorted(i for _, i in sorted(turns)[:limit])


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """One sentence for whatever goes wrong while an annotation file is read. Raises InputError."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is damaged: no JSON from line {error.lineno} on; fetch it again.") from error
    except KeyError as error:
        raise InputError(f"{path} is damaged, or another file than expected: it lacks {error.args[0]!r}.") from error
    except (ValueError, TypeError, IndexError, AttributeError, csv.Error) as error:
        raise InputError(f"{path} is damaged, or another file than expected: {error}.") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises InputError where it cannot be read."""
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def read_table(path: Path, columns: int) -> list[list[str]]:
    """The rows of a file of columns parted by blanks, the last of which takes the rest of its line.

    Raises InputError for a file that cannot be read, or a row with fewer columns, with its number.
    """
    with reading(path):
        rows = [line.split(maxsplit=columns - 1) for line in path.read_text(encoding="utf-8").splitlines()]
        for number, row in enumerate(rows, start=1):
            if row and len(row) != columns:
                raise InputError(f"{path} is damaged: line {number} has {len(row)} of {columns} columns.")
        return [[cell.strip() for cell in row] for row in rows if row]
