"""Data sets of pictures with masks drawn by hand: ImageNet-S, and CUB-200 with its boxes."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

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
    read_table,
    safe_keys,
)
from clipfast.data.datasets.folders import class_name
from clipfast.data.images import read_image
from clipfast.errors import ImageError, InputError

# ImageNet-S-50, -300 and the whole; ids of pixels that take no part.
_SIZES, _IGNORE = (50, 300, 919), 1000


class ImageNetS(Dataset):
    """ImageNet-S: pictures of ImageNet with every pixel's class; one target for each class that a picture shows.

    A pixel's id is R + 256 G: 0 is another class, 1000 takes no part, i is the i-th of the classes' sorted WordNet ids.
    """

    source: ClassVar[Source] = Source(
        "ImageNet-S",
        "the LUSSeg/ImageNet-S repository on GitHub, whose data_preparation.sh picks the pictures out of your ImageNet",
        "ROOT/validation/n01440764/ILSVRC2012_val_00000293.JPEG\n"
        "ROOT/validation-segmentation/n01440764/ILSVRC2012_val_00000293.png\n"
        "with 50, 300 or 919 class folders; of fewer, also the repository's ROOT/ImageNetS_categories_im919.txt",
        ("validation", "train-semi"),
    )
    offers = frozenset({"labels", "masks"})

    def __init__(self, root: Path, split: str | None, limit: int | None):
        split = chosen_split("imagenet_s", self.source, split)
        self.name = f"imagenet_s/{split}"
        folder, masks = root / split, root / f"{split}-segmentation"
        for needed in (folder, masks):
            if not needed.is_dir():
                raise missing("imagenet_s", self.source, needed)
        self.classes = [class_name(wnid) for wnid in self._wnids(root, masks)]
        rows = [
            (group, file, masks / path.name / f"{file.stem}.png")
            for group, path in enumerate(folders(folder))
            for file in pictures(path)
        ]
        if not rows:
            raise missing("imagenet_s", self.source, folder / "n01440764" / "ILSVRC2012_val_00000293.JPEG")
        keys = safe_keys(f"{file.parent.name}/{file.stem}" for _, file, _ in rows)
        kept = in_turn([group for group, _, _ in rows], limit)
        self._rows = [(keys[i], rows[i][1], rows[i][2]) for i in kept]

    def _wnids(self, root: Path, masks: Path) -> list[str]:
        """The classes' WordNet ids in the order of pixel ids."""
        names = [f"ImageNetS_categories_im{size}.txt" for size in _SIZES]
        listed = first_existing(*(root / name for name in names))
        if listed is not None:
            return sorted(row[0] for row in read_table(listed, 1))
        found = [path.name for path in folders(masks)]
        if len(found) not in _SIZES:
            raise InputError(
                f"{masks} has {len(found)} class folders, so that pixel ids cannot be told apart: put the list of all "
                f"classes beside it, {root / names[-1]} (or {', '.join(names[:-1])}) of the LUSSeg/ImageNet-S "
                "repository on GitHub."
            )
        return found

    def __len__(self) -> int:
        return len(self._rows)

    def _sample(self, index: int) -> Sample:
        key, file, mask = self._rows[index]
        assert self.classes is not None
        pixels = np.asarray(read_image(mask)).astype(np.int32)
        ids = pixels[..., 0] + 256 * pixels[..., 1]
        targets = []
        for i in np.unique(ids).tolist():
            if i in (0, _IGNORE):
                continue
            if i > len(self.classes):
                raise ImageError(f"{mask} holds the class id {i} of {len(self.classes)} classes.", str(mask))
            labels = (ids == i).astype(np.int8)
            labels[ids == _IGNORE] = -1
            targets.append(Target(self.classes[i - 1], i - 1, mask=labels))
        return Sample(key, file, targets, [])


class Cub200(Dataset):
    """CUB-200-2011: a bird a picture, with its box, and its mask where the segmentations are there.

    A segmentation holds the share of annotators who drew a pixel; more than half of them make it bird.
    """

    source: ClassVar[Source] = Source(
        "CUB-200-2011",
        "CaltechDATA (data.caltech.edu, search for CUB-200-2011: CUB_200_2011.tgz and segmentations.tgz)",
        "ROOT/images.txt, classes.txt, image_class_labels.txt, train_test_split.txt, bounding_boxes.txt\n"
        "ROOT/images/001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.jpg\n"
        "ROOT/segmentations/001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.png    (for masks)",
        ("test", "train"),
    )
    offers = frozenset({"labels", "boxes"})

    def __init__(self, root: Path, split: str | None, limit: int | None):
        split = chosen_split("cub200", self.source, split)
        self.name = f"cub200/{split}"
        root = root / "CUB_200_2011" if (root / "CUB_200_2011").is_dir() else root
        tables = ("images", "classes", "image_class_labels", "train_test_split", "bounding_boxes")
        for needed in (*(f"{table}.txt" for table in tables), "images"):
            if not (root / needed).exists():
                raise missing("cub200", self.source, root / needed)
        self._images = root / "images"
        segmentations = first_existing(root / "segmentations", root.parent / "segmentations")
        self._masks = segmentations
        if segmentations is not None:
            self.offers = frozenset({"labels", "boxes", "masks"})

        names = dict(read_table(root / "classes.txt", 2))
        numbers = {number: label for label, number in enumerate(names)}
        # "001.Black_footed_Albatross"
        self.classes = [name.split(".", 1)[-1].replace("_", " ") for name in names.values()]
        of = dict(read_table(root / "image_class_labels.txt", 2))
        training = {i: flag == "1" for i, flag in read_table(root / "train_test_split.txt", 2)}
        boxes = {i: _box(root / "bounding_boxes.txt", row) for i, *row in read_table(root / "bounding_boxes.txt", 5)}
        wanted = [
            (name, numbers.get(of.get(i, ""), -1), boxes.get(i))
            for i, name in read_table(root / "images.txt", 2)
            if training.get(i, True) == (split == "train")
        ]
        rows = [(name, label, box) for name, label, box in sorted(wanted, key=lambda row: row[0]) if box is not None]
        if len(rows) != len(wanted) or any(label < 0 for _, label, _ in rows):
            raise InputError(f"the tables in {root} do not fit together: unpack CUB_200_2011.tgz again.")
        if not rows:
            raise missing("cub200", self.source, self._images / "001.Black_footed_Albatross")
        keys = safe_keys(name.removesuffix(".jpg") for name, _, _ in rows)
        self._rows = [(keys[i], *rows[i]) for i in in_turn([label for _, label, _ in rows], limit)]

    def __len__(self) -> int:
        return len(self._rows)

    def _sample(self, index: int) -> Sample:
        key, name, label, box = self._rows[index]
        assert self.classes is not None
        mask = None
        if self._masks is not None:
            mask = np.asarray(read_image((self._masks / name).with_suffix(".png")))[..., 0] > 127
        return Sample(key, self._images / name, [Target(self.classes[label], label, mask, [box])], [])


def _box(path: Path, row: list[str]) -> Box:
    try:
        x, y, width, height = map(float, row)
    except ValueError:
        raise InputError(f"{path} is damaged: {' '.join(row)!r} is no box.") from None
    return x, y, x + width, y + height
