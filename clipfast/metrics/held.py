"""Data sets for several passes over the same pictures: decoded once, and pictures that are all asked the same texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipfast.data.datasets import Dataset, Sample, Target
from clipfast.data.datasets.base import safe_keys
from clipfast.data.upright import read_sample
from clipfast.metrics.samples import Pictures

# Bytes of pixels and masks that are kept; what is beyond them is read again in each pass.
_ROOM = 1 << 30


class Held(Dataset):
    """The first `count` samples of a data set, decoded and upright, each read once for as long as there is room."""

    def __init__(self, whole: Dataset, count: int, room: int = _ROOM):
        self.whole, self.count, self.room = whole, count, room
        self.name, self.classes, self.offers = whole.name, whole.classes, whole.offers
        self._kept: dict[int, Sample] = {}

    def __len__(self) -> int:
        return self.count

    def _sample(self, index: int) -> Sample:
        if index in self._kept:
            return self._kept[index]
        sample = self.whole[index]
        picture, targets = read_sample(sample)
        found = Sample(sample.key, picture, targets, sample.captions, sample.foils)
        size = 3 * picture.width * picture.height
        size += sum(target.mask.nbytes for target in targets if target.mask is not None)
        if size <= self.room:
            self.room -= size
            self._kept[index] = found
        return found


class Asked(Pictures):
    """Pictures that are each asked for all of some texts, and of which nothing else is known.

    images: files, folders, patterns or PIL images. Raises InputError for no image.
    """

    def __init__(self, images: Any, texts: Sequence[str]):
        super().__init__(images)
        self.name = f"{len(self)} picture{'s' if len(self) > 1 else ''}"
        self._targets = [Target(text) for text in texts]
        # As they are called, so that they are recognised in what is said of them.
        self._keys = safe_keys(
            [one.stem if isinstance(one, Path) else f"picture_{i:06d}" for i, one in enumerate(self._found)]
        )

    def _sample(self, index: int) -> Sample:
        return Sample(self._keys[index], self._found[index], self._targets, [])
