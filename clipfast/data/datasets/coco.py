"""COCO's instances: masks and boxes of 80 classes, and its captions where they are there."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from clipfast.data.datasets.base import (
    Dataset,
    Sample,
    Source,
    Target,
    chosen_split,
    missing,
    read_json,
    reading,
    safe_keys,
)
from clipfast.errors import ImageError, InputError


class Coco(Dataset):
    """COCO: one target for each class in a picture, its mask all its instances together, its boxes one an instance.

    Crowds of a class are -1 in its mask (they take no part) where no instance is, and have no boxes; a class of which
    a picture shows crowds only is no target. Pictures without annotations stay, without targets.
    """

    source: ClassVar[Source] = Source(
        "COCO",
        "cocodataset.org (2017 Val images, 2017 Train/Val annotations)",
        "ROOT/annotations/instances_val2017.json\n"
        "ROOT/annotations/captions_val2017.json      (for captions)\n"
        "ROOT/val2017/000000000139.jpg",
        ("val2017", "train2017", "val2014", "train2014"),
    )
    offers = frozenset({"labels", "masks", "boxes"})

    def __init__(self, root: Path, split: str | None, limit: int | None):
        split = chosen_split("coco", self.source, split)
        self.name = f"coco/{split}"
        self._mask = _mask_api()
        self._path = root / "annotations" / f"instances_{split}.json"
        self._images = root / split
        for needed in (self._path, self._images):
            if not needed.exists():
                raise missing("coco", self.source, needed)
        content = read_json(self._path)
        with reading(self._path):
            categories = sorted(content["categories"], key=lambda category: category["id"])
            self.classes = [category["name"] for category in categories]
            self._labels = {category["id"]: label for label, category in enumerate(categories)}
            self._rows = sorted(content["images"], key=lambda row: row["id"])[:limit]
            self._keys = safe_keys(Path(row["file_name"]).stem for row in self._rows)
            kept = {row["id"] for row in self._rows}
            self._of: dict[int, list[dict[str, Any]]] = defaultdict(list)
            for annotation in content["annotations"]:
                if annotation["image_id"] in kept:
                    self._of[annotation["image_id"]].append(annotation)
        captions = root / "annotations" / f"captions_{split}.json"
        self._captions: dict[int, list[str]] = {}
        if captions.exists():
            self.offers = frozenset({"labels", "masks", "boxes", "captions"})
            content = read_json(captions)
            with reading(captions):
                for row in sorted(content["annotations"], key=lambda row: row["id"]):
                    self._captions.setdefault(row["image_id"], []).append(row["caption"].strip())

    def __len__(self) -> int:
        return len(self._rows)

    def _sample(self, index: int) -> Sample:
        row = self._rows[index]
        by_class: dict[int, list[dict[str, Any]]] = defaultdict(list)
        try:
            for annotation in self._of.get(row["id"], []):
                by_class[self._labels[annotation["category_id"]]].append(annotation)
            targets = [self._target(label, by_class[label], row) for label in sorted(by_class)]
        except Exception as error:  # pycocotools meets damaged masks with whatever it happens to run into
            raise ImageError(
                f"{self._path} has annotations of image {row['id']} that cannot be read: {error!r}.", row["file_name"]
            ) from error
        captions = self._captions.get(row["id"], [])
        file = self._images / row["file_name"]
        return Sample(self._keys[index], file, [target for target in targets if target is not None], captions)

    def _target(self, label: int, annotations: list[dict[str, Any]], row: dict[str, Any]) -> Target | None:
        assert self.classes is not None
        things = [annotation for annotation in annotations if not annotation.get("iscrowd")]
        crowds = [annotation for annotation in annotations if annotation.get("iscrowd")]
        if not things:
            return None
        mask = self._decode(things, row["height"], row["width"])
        if crowds:
            ignored = self._decode(crowds, row["height"], row["width"]) & ~mask
            mask = mask.astype(np.int8) - ignored.astype(np.int8)
        corners = [tuple(map(float, annotation["bbox"])) for annotation in things]
        boxes = [(x, y, x + width, y + height) for x, y, width, height in corners]
        return Target(self.classes[label], label, mask, boxes)

    def _decode(self, annotations: list[dict[str, Any]], height: int, width: int) -> np.ndarray:
        """The pixels of all of them, (H, W) bool."""
        runs = []
        for annotation in annotations:
            shape = annotation["segmentation"]
            # Polygons, runs as numbers, or runs as pycocotools packs them.
            packed = isinstance(shape, dict) and isinstance(shape["counts"], str | bytes)
            part = shape if packed else self._mask.frPyObjects(shape, height, width)
            runs += part if isinstance(part, list) else [part]
        found: np.ndarray = self._mask.decode(self._mask.merge(runs)).astype(bool)
        if found.shape != (height, width):
            raise ValueError(f"a mask of {found.shape} in a picture of {(height, width)}")
        return found


def _mask_api() -> Any:
    try:
        from pycocotools import mask
    except ImportError:
        raise InputError("coco needs pycocotools to read masks: pip install pycocotools.") from None
    return mask
