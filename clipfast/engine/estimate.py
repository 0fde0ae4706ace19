"""What a run would be: how many images, how long, how many bytes; from the listing and a few images explained."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from clipfast.api import Explainer
from clipfast.engine.base import Failure, Item, Shard, Source
from clipfast.engine.work import Job, Worker

_SAMPLE, _PLACES = 24, 3


@dataclass(frozen=True)
class Estimate:
    """A run before it is run.

    shards, images, bytes: of the input; exact: whether images were counted, rather than estimated from bytes. done: of
    the shards. sample: images tried; failed: of them. images_per_second: of the sample, by one process here. seconds:
    for what is left; None where the sample gave nothing to go by. storage: bytes of the results in all.
    """

    shards: int
    done: int
    images: int | None
    exact: bool
    bytes: int | None
    sample: int
    failed: int
    images_per_second: float | None
    seconds: float | None
    storage: int | None
    bytes_per_image: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Few(Source):
    """Images of a source that are at hand."""

    def __init__(self, items: Sequence[Item | Failure]):
        self._items = items

    def shards(self) -> Sequence[Shard]:
        return [Shard("sample", 0, None, len(self._items))]

    def items(self, shard: Shard) -> Iterator[Item | Failure]:
        return iter(self._items)

    def config(self) -> dict[str, Any]:
        return {}


def estimate(job: Job, explainer: Explainer, shards: Sequence[Shard], done: int, processes: int = 1) -> Estimate:
    """What `job` would be on these shards, of which so many are done; a few images are explained to know.

    Writes to a temporary folder only, which is removed.
    """
    step = max(1, len(shards) // _PLACES)
    places = shards[::step][:_PLACES]
    each = -(-_SAMPLE // len(places))
    items = [item for shard in places for item in islice(job.source.items(shard), each)]
    few = _Few(items)
    with tempfile.TemporaryDirectory(prefix="clipfast-") as folder:
        worker = Worker(replace(job, source=few, out=Path(folder), digest=""), explainer)
        # Once without counting: the first batch pays for what later ones find ready.
        worker(few.shards()[0])
        marker = worker(few.shards()[0])
    explained, failed = marker["images"], len(marker["errors"])
    rate = (explained + failed) / marker["seconds"]["total"] if explained else None
    per_image = sum(marker["files"].values()) / explained if explained else None
    images, total = _counts(shards, items)
    left = None if images is None else images * (len(shards) - done) / len(shards)
    return Estimate(
        shards=len(shards),
        done=done,
        images=images,
        exact=all(shard.images is not None for shard in shards),
        bytes=total,
        sample=explained + failed,
        failed=failed,
        images_per_second=rate,
        seconds=None if rate is None or left is None else left / rate / processes,
        storage=None if per_image is None or images is None else round(images * per_image),
        bytes_per_image=per_image,
    )


def _counts(shards: Sequence[Shard], items: Sequence[Item | Failure]) -> tuple[int | None, int | None]:
    """Images and bytes of all shards; whichever the shards do not say follows from the other and the sample."""
    images = sum(shard.images or 0 for shard in shards) if all(s.images is not None for s in shards) else None
    total = sum(shard.bytes or 0 for shard in shards) if all(s.bytes is not None for s in shards) else None
    sizes = [size for item in items if isinstance(item, Item) and (size := _size(item)) is not None]
    mean = sum(sizes) / len(sizes) if sizes else None
    if mean:
        if images is None and total is not None:
            images = round(total / mean)
        elif total is None and images is not None:
            total = round(images * mean)
    return images, total


def _size(item: Item) -> int | None:
    try:
        return len(item.read())
    except (OSError, ValueError):
        return None
