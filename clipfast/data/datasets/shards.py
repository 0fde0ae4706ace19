"""WebDataset shards: tar files of pictures with captions or classes beside them."""

from __future__ import annotations

from glob import glob, has_magic
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import ClassVar

from clipfast.data.datasets.base import Dataset, Sample, Source, Target, first_existing, missing, reading, safe_keys
from clipfast.data.images import read_image
from clipfast.data.places import braces
from clipfast.data.tars import PICTURES, TarError, captions, members, sample_name
from clipfast.errors import ImageError, InputError

_Span = tuple[int, int]


class WebDataset(Dataset):
    """Shards as webdataset and img2dataset write them: files of one name are one sample, their endings say what of it.

    .jpg, .png, .webp and the like: the picture. .txt: a caption; without it, "caption" in .json (a text, or several).
    .cls: the class's number from 0, whose name is a line of classnames.txt beside the shards (or one folder up).

    Opening reads the shards' headers and skips what they hold; a limit stops after as many samples.
    """

    source: ClassVar[Source] = Source(
        "A WebDataset",
        "img2dataset, or the clip-benchmark data sets of Hugging Face (webdataset form)",
        "ROOT/00000.tar, ROOT/00001.tar, ...    (or ROOT a pattern: 'shards/{00000..00099}.tar', 'shards/*.tar')\n"
        "ROOT/classnames.txt                    (for classes)\n"
        "or, with a split, ROOT/SPLIT/0.tar",
    )

    def __init__(self, root: Path, split: str | None, limit: int | None):
        self.name = "webdataset" if split is None else f"webdataset/{split}"
        self._shards = _shards(root, split)
        names = first_existing(*(place / "classnames.txt" for place in self._shards[0].parents[:2]))
        self.classes = None
        if names is not None:
            with reading(names):
                self.classes = [line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip()]
        self._rows: list[tuple[int, str, dict[str, _Span]]] = []
        for number, shard in enumerate(self._shards):
            room = None if limit is None else limit - len(self._rows)
            self._rows += [(number, key, parts) for key, parts in _index(shard, room)]
            if limit is not None and len(self._rows) >= limit:
                break
        endings = {ending for _, _, parts in self._rows for ending in parts}
        if not self._rows:
            raise InputError(f"{self._shards[0]} and the shards after it hold no pictures (.{', .'.join(PICTURES)}).")
        if "cls" in endings and self.classes is None and not endings & {"txt", "json"}:
            raise InputError(
                f"the shards beside {self._shards[0]} hold numbers of classes, and no captions: "
                f"write the classes' names, one a line, into {self._shards[0].parent / 'classnames.txt'}."
            )
        labels = {"labels"} if "cls" in endings and self.classes is not None else set()
        self.offers = frozenset(labels | ({"captions"} if endings & {"txt", "json"} else set()))
        self._keys = safe_keys(f"{self._shards[number].stem}/{key}" for number, key, _ in self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def _sample(self, index: int) -> Sample:
        number, key, parts = self._rows[index]
        shard = self._shards[number]
        called = f"{key} in {shard}"
        try:
            with shard.open("rb") as stream:
                held = {}
                for ending, (offset, size) in parts.items():
                    stream.seek(offset)
                    held[ending] = stream.read(size)
        except OSError as error:
            raise ImageError(f"{shard} cannot be read: {error.strerror or error}.", called) from error
        picture = next(held[ending] for ending in PICTURES if ending in held)
        try:
            image = read_image(picture)
        except ImageError as error:
            raise ImageError(str(error).replace("the image in memory", called), called) from error
        try:
            return Sample(self._keys[index], image, self._targets(held), captions(held))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ImageError(f"{called} has a damaged .txt, .json or .cls: {error}.", called) from error

    def _targets(self, held: dict[str, bytes]) -> list[Target]:
        if "cls" not in held or self.classes is None:
            return []
        label = int(held["cls"])
        if not 0 <= label < len(self.classes):
            raise ValueError(f"class {label} of {len(self.classes)}")
        return [Target(self.classes[label], label)]


def _shards(root: Path, split: str | None) -> list[Path]:
    """The tar files that a folder, a file or a pattern names, by name. Raises InputError where there is none."""
    expected = root / (split or "") / "00000.tar"
    if root.is_file() and split is None:
        return [root]
    if root.is_dir():
        found = [path for path in (root / (split or "")).glob("*.tar") if not path.name.startswith(".")]
    else:
        expected = root
        names = [name for pattern in braces(str(root)) for name in (glob(pattern) if has_magic(pattern) else [pattern])]
        found = [Path(name) for name in names]
        absent = next((path for path in found if not path.is_file()), None)
        if absent is not None:
            raise missing("webdataset", WebDataset.source, absent)
    if not found:
        raise missing("webdataset", WebDataset.source, expected)
    return sorted(found, key=lambda path: (str(path.parent), path.name))


def _index(shard: Path, room: int | None) -> list[tuple[str, dict[str, _Span]]]:
    """The samples of a shard that hold a picture, at most `room`: each one's name, and where its parts lie."""
    try:
        with shard.open("rb") as stream:
            named = ((*sample_name(member.name), member) for member in members(stream))
            groups = groupby((one for one in named if one[0]), key=itemgetter(0))
            samples = ((key, {end: (part.offset_data, part.size) for _, end, part in parts}) for key, parts in groups)
            return list(islice((one for one in samples if _has_picture(one[1])), room))
    except (TarError, OSError) as error:
        raise InputError(
            f"{shard} cannot be read as an uncompressed tar ({error}): unpack or fetch it again, or leave it out."
        ) from error


def _has_picture(parts: dict[str, _Span]) -> bool:
    return any(ending in parts for ending in PICTURES)
