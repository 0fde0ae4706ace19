"""Data sets of captions: Karpathy's splits of COCO, Flickr8k and Flickr30k, and Conceptual Captions."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from clipfast.data.datasets.base import (
    Dataset,
    Sample,
    Source,
    chosen_split,
    first_existing,
    missing,
    read_json,
    reading,
    safe_keys,
)
from clipfast.data.images import is_image
from clipfast.errors import InputError

_KARPATHY = ("test", "val", "train", "restval")
# "1000092795.jpg#0<tab>A caption" or "1000092795.jpg| 0| A caption"; one line of the latter lacks its second bar.
_LINE = re.compile(r"([^|#\t]+)(?:#\d+\s*\t|\|\s*\d+[\s|]+)(.+)")
_KARPATHY_WHERE = "cs.stanford.edu/people/karpathy/deepimagesent (caption_datasets.zip)"


class _Captions(Dataset):
    """Pictures with captions, and nothing that has a class."""

    offers = frozenset({"captions"})
    classes = None

    def _list(self, rows: dict[Path, list[str]], limit: int | None) -> None:
        """Pictures and their captions, in the order of the pictures' names."""
        files = sorted(rows, key=lambda file: file.name)
        keys = safe_keys(file.stem for file in files)
        self._rows = [(key, file, rows[file]) for key, file in zip(keys, files, strict=True)][:limit]

    def __len__(self) -> int:
        return len(self._rows)

    def _sample(self, index: int) -> Sample:
        key, file, captions = self._rows[index]
        return Sample(key, file, [], list(captions))


class CocoKarpathy(_Captions):
    """COCO's captions in Karpathy's splits: 5,000 pictures of val2014 are its test."""

    source: ClassVar[Source] = Source(
        "COCO in Karpathy's splits",
        f"cocodataset.org (2014 Train and Val images) and {_KARPATHY_WHERE}",
        "ROOT/dataset_coco.json\nROOT/val2014/COCO_val2014_000000391895.jpg\nROOT/train2014/...",
        _KARPATHY,
    )

    def __init__(self, root: Path, split: str | None, limit: int | None):
        split = chosen_split("coco_karpathy", self.source, split)
        self.name = f"coco_karpathy/{split}"
        path = first_existing(root / "dataset_coco.json", root / "annotations" / "dataset_coco.json")
        if path is None:
            raise missing("coco_karpathy", self.source, root / "dataset_coco.json")
        self._list(dict(_karpathy(path, split, root)), limit)
        needed = {file.parent for _, file, _ in self._rows}
        for folder in sorted(needed):
            if not folder.is_dir():
                raise missing("coco_karpathy", self.source, folder)


class _Flickr(_Captions):
    """Flickr8k or Flickr30k: five captions a picture, in Karpathy's splits, or all that the table of captions names."""

    kind: ClassVar[str]
    tables: ClassVar[tuple[str, ...]]
    folders: ClassVar[tuple[str, ...]]

    def __init__(self, root: Path, split: str | None, limit: int | None):
        asked = chosen_split(self.kind, self.source, split)
        images = first_existing(*(root / folder for folder in self.folders))
        if images is None:
            raise missing(self.kind, self.source, root / self.folders[0])
        splits = root / f"dataset_{self.kind}.json"
        table = first_existing(*(root / table for table in self.tables))
        if splits.exists():
            self.name = f"{self.kind}/{asked}"
            self._list(dict(_karpathy(splits, asked, images)), limit)
        elif split is not None or table is None:
            raise missing(self.kind, self.source, splits)
        else:
            self.name = self.kind
            captions: dict[Path, list[str]] = {}
            with reading(table):
                for name, caption in _captions(table):
                    captions.setdefault(images / name, []).append(caption)
                if not captions:
                    raise ValueError("it names no picture")
            self._list(captions, limit)


class Flickr8k(_Flickr):
    """Flickr8k: 8,000 pictures, five captions each."""

    kind: ClassVar[str] = "flickr8k"
    tables: ClassVar[tuple[str, ...]] = ("Flickr8k.token.txt", "captions.txt")
    folders: ClassVar[tuple[str, ...]] = ("Images", "Flicker8k_Dataset", "Flickr8k_Dataset")
    source: ClassVar[Source] = Source(
        "Flickr8k",
        f"its authors at the University of Illinois (by form) or Kaggle, its splits from {_KARPATHY_WHERE}",
        "ROOT/Images/1000268201_693b08cb0e.jpg    (or ROOT/Flicker8k_Dataset)\n"
        "ROOT/dataset_flickr8k.json               (Karpathy's splits; without it, all pictures of)\n"
        "ROOT/captions.txt                        (or Flickr8k.token.txt)",
        _KARPATHY[:3],
    )


class Flickr30k(_Flickr):
    """Flickr30k: 31,000 pictures, five captions each; 1,000 of them are Karpathy's test."""

    kind: ClassVar[str] = "flickr30k"
    tables: ClassVar[tuple[str, ...]] = ("results_20130124.token", "results.csv", "captions.txt")
    folders: ClassVar[tuple[str, ...]] = ("flickr30k-images", "flickr30k_images", "Images")
    source: ClassVar[Source] = Source(
        "Flickr30k",
        f"its authors at the University of Illinois (by form) or Kaggle, its splits from {_KARPATHY_WHERE}",
        "ROOT/flickr30k-images/1000092795.jpg    (or ROOT/flickr30k_images)\n"
        "ROOT/dataset_flickr30k.json             (Karpathy's splits; without it, all pictures of)\n"
        "ROOT/results_20130124.token             (or results.csv)",
        _KARPATHY[:3],
    )


def _karpathy(path: Path, split: str, images: Path) -> Iterator[tuple[Path, list[str]]]:
    """The pictures of a split with their captions. Raises InputError for a damaged file, and for an empty split."""
    content: Any = read_json(path)
    with reading(path):
        rows = [row for row in content["images"] if row["split"] == split]
        for row in rows:
            captions = [sentence["raw"].strip() for sentence in row["sentences"]]
            yield images / row.get("filepath", "") / row["filename"], captions
        if not rows:
            raise InputError(f"{path} has no pictures of the split {split!r}.")


def _captions(table: Path) -> Iterator[tuple[str, str]]:
    """(picture, caption) of each line of a table in one of the three forms that Flickr's captions come in."""
    with table.open(newline="", encoding="utf-8") as stream:
        if table.name == "captions.txt":
            for row in csv.DictReader(stream):
                yield row["image"], row["caption"].strip()
            return
        lines = (line for line in stream if line.strip())
        if table.name == "results.csv":
            next(lines, None)
        for line in lines:
            found = _LINE.fullmatch(line.strip())
            if found is None:
                raise ValueError(f"{line.strip()[:60]!r} is no picture and caption")
            yield found[1].strip(), found[2].strip()


class ConceptualCaptions(_Captions):
    """Conceptual Captions (CC3M): a caption for each picture of the web that could still be had.

    The published table names addresses, not files: the picture of row n, from 0, is any file called n, with or without
    leading zeros (as img2dataset numbers them), below the split's folder. A table with the columns title and filepath
    (open_clip's) names its files itself. Rows without a picture are left out.
    """

    source: ClassVar[Source] = Source(
        "Conceptual Captions",
        "ai.google.com/research/ConceptualCaptions, the pictures by img2dataset or open_clip's gather_cc.py",
        "ROOT/Validation_GCC-1.1.0-Validation.tsv    (or Train_GCC-training.tsv; or val.tsv, train.tsv)\n"
        "ROOT/val/00000/000000017.jpg                (the picture of row 17, counted from 0)",
        ("val", "train"),
    )
    tables: ClassVar[dict[str, tuple[str, ...]]] = {
        "val": ("Validation_GCC-1.1.0-Validation.tsv", "Validation_GCC-1.1.0-Validation_output.csv", "val.tsv"),
        "train": ("Train_GCC-training.tsv", "Train_GCC-training_output.csv", "train.tsv"),
    }

    def __init__(self, root: Path, split: str | None, limit: int | None):
        split = chosen_split("conceptual_captions", self.source, split)
        self.name = f"conceptual_captions/{split}"
        names = self.tables[split]
        table = first_existing(*(root / name for name in names))
        if table is None:
            raise missing("conceptual_captions", self.source, root / names[0])
        with reading(table), table.open(newline="", encoding="utf-8") as stream:
            header = stream.readline().rstrip("\r\n").split("\t")
            if "filepath" in header:
                rows = csv.DictReader(stream, header, delimiter="\t")
                found = [(root / row["filepath"], row["title"].strip()) for row in rows]
            else:
                files = _numbered(root / split)
                if not files:
                    raise missing("conceptual_captions", self.source, root / split / "00000" / "000000000.jpg")
                first = [] if header[:2] == ["caption", "url"] else ["\t".join(header)]
                captions = (line.split("\t")[0].strip() for line in chain(first, stream))
                found = [(files[i], caption) for i, caption in enumerate(captions) if i in files]
        if not found:
            raise InputError(f"{table} has no row whose picture is there.")
        captions_of: dict[Path, list[str]] = {}
        for file, caption in found:
            captions_of.setdefault(file, []).append(caption)
        self._list(captions_of, limit)


def _numbered(folder: Path) -> dict[int, Path]:
    """The pictures below a folder that are called by a number."""
    files = sorted(folder.rglob("*")) if folder.is_dir() else []
    return {int(file.stem): file for file in files if file.stem.isdecimal() and is_image(file)}
