"""Data sets by name: `open_dataset("imagenet:/data/imagenet")`, `open_dataset("scenes:1:200")`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from clipfast.data.datasets.base import Box, Dataset, Sample, Source, Target
from clipfast.data.datasets.captions import CocoKarpathy, ConceptualCaptions, Flickr8k, Flickr30k
from clipfast.data.datasets.coco import Coco
from clipfast.data.datasets.folders import Caltech256, ClassFolders, ImageNet, Imagenette
from clipfast.data.datasets.masks import Cub200, ImageNetS
from clipfast.data.datasets.rendered import RenderedScenes
from clipfast.data.datasets.shards import WebDataset
from clipfast.errors import InputError, nearest

__all__ = ["DATASETS", "Box", "Dataset", "Sample", "Source", "Target", "open_dataset"]

SCENES = 1000

DATASETS: dict[str, type[Dataset]] = {
    "scenes": RenderedScenes,
    "imagenet": ImageNet,
    "imagenet_s": ImageNetS,
    "imagenette": Imagenette,
    "caltech256": Caltech256,
    "cub200": Cub200,
    "folder": ClassFolders,
    "coco": Coco,
    "coco_karpathy": CocoKarpathy,
    "flickr8k": Flickr8k,
    "flickr30k": Flickr30k,
    "conceptual_captions": ConceptualCaptions,
    "webdataset": WebDataset,
}
"""Every data set by name; each one's `source` says where it comes from and how it lies on the disk."""


def open_dataset(spec: str, root: Path | None = None, split: str | None = None, limit: int | None = None) -> Dataset:
    """The data set that a text names, without opening one picture.

    spec: "NAME:PATH", as "imagenet:/data/imagenet", or "scenes:SEED" or "scenes:SEED:COUNT" (1,000 unless it says).
    root: the folder where the spec names none; a relative path of the spec is below it.
    split: the part of the data set; see each one's `source` for its parts and default.
    limit: at most so many samples: the first, and of data sets by class the first of each class in turn. A sample keeps
        its key whatever the limit.

    Raises InputError: an unknown name (with the nearest), files that are not there (with where to get them and how they
    are to lie), annotation files that cannot be read.
    """
    kind, _, rest = spec.partition(":")
    kind = kind.strip().lower().replace("-", "_")
    if kind not in DATASETS:
        raise InputError(f"there is no data set {kind!r}: {nearest(kind, DATASETS)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1 sample, not {limit}.")
    if kind == "scenes":
        return _scenes(spec, rest, split, limit)
    path = Path(rest).expanduser() if rest else None
    folder = path if root is None else Path(root).expanduser() / (path or "")
    opened: Callable[[Path, str | None, int | None], Dataset] = DATASETS[kind]
    if folder is None:
        source = DATASETS[kind].source
        layout = "\n".join(f"    {line}" for line in source.layout.splitlines())
        raise InputError(
            f"{kind} needs the folder that holds it, as {kind}:ROOT.\n"
            f"{source.title} comes from {source.where}; expected is\n{layout}"
        )
    return opened(folder, split, limit)


def _scenes(spec: str, rest: str, split: str | None, limit: int | None) -> Dataset:
    numbers = rest.split(":") if rest else []
    if len(numbers) not in (1, 2) or not all(number.isdecimal() for number in numbers):
        raise InputError(f"{spec!r} must be scenes:SEED or scenes:SEED:COUNT, whole numbers, as scenes:1:200.")
    if split is not None:
        raise InputError(f"scenes have no splits, so none called {split!r}: another seed gives other scenes.")
    count = int(numbers[1]) if len(numbers) == 2 else SCENES
    if not count:
        raise InputError(f"{spec!r} holds no scene: ask for at least one.")
    return RenderedScenes(int(numbers[0]), count if limit is None else min(count, limit))
