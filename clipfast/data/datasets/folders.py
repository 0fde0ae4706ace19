"""Data sets of one class a picture: any folder of class folders, ImageNet, Imagenette, Caltech-256."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from clipfast.data.datasets.base import (
    Box,
    Dataset,
    Sample,
    Source,
    Target,
    chosen_split,
    first_existing,
    folders,
    in_turn,
    missing,
    pictures,
    reading,
    safe_keys,
)
from clipfast.errors import InputError

_WNID = re.compile(r"n\d{8}")


@lru_cache(maxsize=1)
def imagenet_names() -> dict[str, str]:
    """ImageNet's 1,000 classes in the order of their labels: WordNet id -> the name that CLIP is asked for.

    The names are open_clip's, the ids timm's, which open_clip depends on.
    """
    # Both take seconds to import.
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from timm.data.imagenet_info import ImageNetInfo

    return dict(zip(ImageNetInfo("imagenet-1k").label_names(), IMAGENET_CLASSNAMES, strict=True))


def class_name(folder: str) -> str:
    """The name of a class from that of its folder: ImageNet's for a WordNet id, else with blanks for underscores."""
    return imagenet_names().get(folder, folder) if _WNID.fullmatch(folder) else folder.replace("_", " ").strip()


class _OneClass(Dataset):
    """Pictures with a label each."""

    offers = frozenset({"labels"})

    def _list(self, files: Sequence[Path], labels: Sequence[int], names: Sequence[str], limit: int | None) -> None:
        keys = safe_keys(names)
        self._rows = [(keys[i], files[i], labels[i]) for i in in_turn(labels, limit)]

    def _list_groups(self, groups: Iterable[tuple[int, list[Path]]], limit: int | None) -> None:
        """Labels with the pictures of each one's folder."""
        rows = [(file, label) for label, files in groups for file in files]
        files, labels = [file for file, _ in rows], [label for _, label in rows]
        self._list(files, labels, [f"{file.parent.name}/{file.stem}" for file in files], limit)

    def __len__(self) -> int:
        return len(self._rows)

    def _sample(self, index: int) -> Sample:
        key, file, label = self._rows[index]
        return Sample(key, file, [self._target(file, label)], [])

    def _target(self, file: Path, label: int) -> Target:
        assert self.classes is not None
        return Target(self.classes[label], label)


class ClassFolders(_OneClass):
    """Any set with a folder of pictures for each class, named as the class is, or by its WordNet id."""

    source: ClassVar[Source] = Source(
        "A set of class folders",
        "wherever your pictures are",
        "ROOT/golden_retriever/one.jpg\nROOT/tabby_cat/two.jpg\nor, with a split, ROOT/SPLIT/golden_retriever/one.jpg",
    )
    kind: ClassVar[str] = "folder"
    example: ClassVar[str] = "CLASS/PICTURE.jpg"

    def __init__(self, root: Path, split: str | None, limit: int | None):
        folder = root / self._split(split)
        groups = {path.name: files for path in self._folders(folder) if (files := pictures(path))}
        if not groups:
            raise missing(self.kind, self.source, folder / self.example)
        self.name = str(Path(self.kind, self._split(split)))
        self.classes = [self._class_name(name) for name in groups]
        self._list_groups(enumerate(groups.values()), limit)

    def _split(self, split: str | None) -> str:
        return split or ""

    def _folders(self, folder: Path) -> list[Path]:
        return folders(folder)

    def _class_name(self, folder: str) -> str:
        return class_name(folder)


class Imagenette(ClassFolders):
    """Ten easy classes of ImageNet, and its sisters of the same layout (Imagewoof)."""

    source: ClassVar[Source] = Source(
        "Imagenette",
        "fast.ai (the imagenette repository on GitHub: imagenette2.tgz, imagenette2-320.tgz, imagenette2-160.tgz)",
        "ROOT/val/n01440764/ILSVRC2012_val_00009111.JPEG\nROOT/train/n01440764/...",
        ("val", "train"),
    )
    kind: ClassVar[str] = "imagenette"
    example: ClassVar[str] = "n01440764/ILSVRC2012_val_00009111.JPEG"

    def _split(self, split: str | None) -> str:
        return chosen_split(self.kind, self.source, split)


class Caltech256(ClassFolders):
    """256 classes of objects; the 257th folder, clutter, is none."""

    source: ClassVar[Source] = Source(
        "Caltech-256",
        "CaltechDATA (data.caltech.edu, search for Caltech-256: 256_ObjectCategories.tar)",
        "ROOT/001.ak47/001_0001.jpg\nROOT/002.american-flag/...",
    )
    kind: ClassVar[str] = "caltech256"
    example: ClassVar[str] = "001.ak47/001_0001.jpg"

    def _split(self, split: str | None) -> str:
        if split is not None:
            raise InputError(f"caltech256 has no splits, so none called {split!r}.")
        return ""

    def _folders(self, folder: Path) -> list[Path]:
        inner = folder / "256_ObjectCategories"
        found = folders(inner if inner.is_dir() else folder)
        return [path for path in found if re.match(r"\d{3}\.", path.name) and not path.name.endswith(".clutter")]

    def _class_name(self, folder: str) -> str:
        # "-101" marks what was already in Caltech-101.
        return folder.split(".", 1)[1].removesuffix("-101").replace("-", " ")


class ImageNet(_OneClass):
    """ImageNet (ILSVRC 2012): 1,000 classes, in class folders, or flat with a file that says which picture is what.

    Labels are those of the 1,000 classes, however few are there. Boxes come with LOC_val_solution.csv.
    """

    source: ClassVar[Source] = Source(
        "ImageNet (ILSVRC 2012)",
        "image-net.org (after registration), or Kaggle's ImageNet Object Localization Challenge",
        "ROOT/val/n01440764/ILSVRC2012_val_00000293.JPEG    in class folders, or\n"
        "ROOT/val/ILSVRC2012_val_00000001.JPEG              flat, with one of these in ROOT:\n"
        "ROOT/LOC_val_solution.csv                          (Kaggle's; brings boxes, also for class folders)\n"
        "ROOT/val.txt                                       (lines of a file name and its WordNet id or 0...999)\n"
        "ROOT/imagenet_2012_validation_synset_labels.txt    (line n is picture n's WordNet id)",
        ("val", "train"),
    )

    def __init__(self, root: Path, split: str | None, limit: int | None):
        split = chosen_split("imagenet", self.source, split)
        self.name = f"imagenet/{split}"
        self.classes = list(imagenet_names().values())
        labels = {wnid: label for label, wnid in enumerate(imagenet_names())}
        inner = first_existing(root / split, root / "ILSVRC" / "Data" / "CLS-LOC" / split)
        folder = inner or root
        solution = first_existing(root / f"LOC_{split}_solution.csv", folder / f"LOC_{split}_solution.csv")
        truth, self._boxes = _read_solution(solution) if solution else ({}, {})
        if solution:
            self.offers = frozenset({"labels", "boxes"})

        groups = [(labels[path.name], pictures(path)) for path in folders(folder) if path.name in labels]
        if groups:
            self._list_groups(groups, limit)
        else:
            files = pictures(folder)
            if not files:
                raise missing("imagenet", self.source, inner or root / split)
            wnids = [truth[file.stem] for file in files if file.stem in truth] if truth else []
            if len(wnids) != len(files):
                wnids = _read_flat_truth(files, root, folder, split, list(labels))
            stray = next((wnid for wnid in wnids if wnid not in labels), None)
            if stray is not None:
                raise InputError(f"the ground truth of {folder} names {stray!r}, which is none of ImageNet's classes.")
            self._list(files, [labels[wnid] for wnid in wnids], [file.stem for file in files], limit)
        if not self._rows:
            raise missing("imagenet", self.source, folder / "n01440764" / "ILSVRC2012_val_00000293.JPEG")

    def _target(self, file: Path, label: int) -> Target:
        assert self.classes is not None
        return Target(self.classes[label], label, boxes=self._boxes.get(file.stem))


def _read_solution(path: Path) -> tuple[dict[str, str], dict[str, list[Box]]]:
    """Kaggle's table: for each picture its WordNet id, and its boxes of that class."""
    wnids: dict[str, str] = {}
    boxes: dict[str, list[Box]] = {}
    with reading(path), path.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            words = row["PredictionString"].split()
            if not words or len(words) % 5:
                raise ValueError(f"the row of {row['ImageId']} is not of a class and four numbers each")
            wnids[row["ImageId"]] = words[0]
            entries = [(words[i], [float(word) for word in words[i + 1 : i + 5]]) for i in range(0, len(words), 5)]
            boxes[row["ImageId"]] = [(a, b, c, d) for wnid, (a, b, c, d) in entries if wnid == words[0]]
    return wnids, boxes


def _read_flat_truth(files: Sequence[Path], root: Path, folder: Path, split: str, order: Sequence[str]) -> list[str]:
    """The WordNet id of each picture of a flat folder.

    Raises InputError where no file says so, or where it leaves out a picture.
    """
    by_name = first_existing(*(place / f"{split}.txt" for place in (root, folder, folder.parent)))
    by_number = first_existing(
        *(place / "imagenet_2012_validation_synset_labels.txt" for place in (root, folder, folder.parent))
    )
    if by_name is not None:
        with reading(by_name):
            pairs = [line.split() for line in by_name.read_text(encoding="utf-8").splitlines() if line.strip()]
            truth = {Path(name).stem: order[int(word)] if word.isdigit() else word for name, word in pairs}
            return [_known(truth, file.stem, by_name) for file in files]
    if by_number is not None:
        with reading(by_number):
            lines = enumerate(by_number.read_text(encoding="utf-8").split(), start=1)
            truth = {f"{number:08d}": wnid for number, wnid in lines}
            return [_known(truth, file.stem[-8:], by_number) for file in files]
    devkit = first_existing(root / "ILSVRC2012_validation_ground_truth.txt")
    if devkit is not None:
        raise InputError(
            f"{devkit} numbers the classes in an order of its own (its meta.mat): put the pictures into class folders, "
            "or put LOC_val_solution.csv or imagenet_2012_validation_synset_labels.txt beside them."
        )
    raise missing("imagenet", ImageNet.source, root / f"LOC_{split}_solution.csv")


def _known(truth: dict[str, str], picture: str, path: Path) -> str:
    if picture not in truth:
        raise InputError(f"{path} does not say what the picture {picture} shows.")
    return truth[picture]
