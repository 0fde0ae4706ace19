"""The images of a fine-tuning: shuffled anew each epoch, in an order that the seed alone decides, from any place on.

An image keeps its place in the order whether or not it can be read: a batch is the next so many places, and is smaller
where some of their images cannot be read. So neither threads, nor processes, nor a stop in between change what a step
trains on.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass
from functools import cache, partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipfast.data.datasets import open_dataset
from clipfast.data.datasets.base import Sample
from clipfast.data.decode import decode
from clipfast.data.geometry import InputSpec
from clipfast.data.inputs import Prepared
from clipfast.engine.ahead import ahead
from clipfast.engine.base import Failure, Item, Shard, Source
from clipfast.engine.listing import CAPTION, Files, shard_id
from clipfast.engine.sources import open_source
from clipfast.engine.tables import Tables
from clipfast.engine.tars import Tars
from clipfast.errors import ClipfastError, InputError
from clipfast.view.files import encode_image

# Images a shard where each can be had by itself, so that finding one is quick; and where shards are read in order.
_FINE, _COARSE = 64, 1000
# What no source holds: with it as the limit, tars are counted.
_ALL = 1 << 48


@dataclass(frozen=True)
class Place:
    """Where in the order a run is: what it needs to go on from there.

    epoch. shard, start: the shard of the epoch's order, and the image in it, at which the window begins (0, 0 where
    images can be had one by one). taken: how many images of the window are behind.
    """

    epoch: int = 0
    shard: int = 0
    start: int = 0
    taken: int = 0

    def to_json(self) -> list[int]:
        """As `Place(*...)` takes it."""
        return list(astuple(self))


class Order(ABC):
    """The images of a source without end, epoch after epoch, each epoch in an order of its own.

    images: how many an epoch has, None where nobody knows.
    """

    def __init__(self, source: Source, seed: int):
        self.source, self.seed = source, seed
        counts = [shard.images for shard in source.shards()]
        self.images = None if None in counts else sum(count or 0 for count in counts)
        if self.images == 0:
            raise InputError("the source of images holds none.")

    @abstractmethod
    def items(self, place: Place) -> Iterator[tuple[Item | Failure, Place]]:
        """The images from a place on, each with the place behind it."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Everything that the order depends on, as JSON."""

    def _about(self) -> dict[str, Any]:
        ids = "\n".join(shard.id for shard in self.source.shards())
        return {**self.source.config(), "listing": hashlib.sha256(ids.encode()).hexdigest()[:16]}

    def _permutation(self, count: int, *numbers: int) -> np.ndarray:
        return np.random.default_rng([self.seed, *numbers]).permutation(count)


class Indexed(Order):
    """Of images that can be had one by one: all of an epoch in random order, and nothing is read to find a place."""

    def __init__(self, source: Source, seed: int):
        super().__init__(source, seed)
        self._shards = source.shards()
        self._ends = list(accumulate(shard.images or 0 for shard in self._shards))

    def items(self, place: Place) -> Iterator[tuple[Item | Failure, Place]]:
        while True:
            order = self._permutation(self._ends[-1], place.epoch)
            for taken in range(place.taken, len(order)):
                last = taken + 1 == len(order)
                yield self._item(int(order[taken])), Place(place.epoch + last, taken=0 if last else taken + 1)
            place = Place(place.epoch + 1)

    def _item(self, index: int) -> Item | Failure:
        number = bisect_right(self._ends, index)
        shard = self._shards[number]
        start = self._ends[number] - (shard.images or 0)
        return next(islice(self.source.items(shard), index - start, None))

    def config(self) -> dict[str, Any]:
        return self._about()


class Streamed(Order):
    """Of images that come in the order of their shards, tars and tables: the shards shuffled, then windows of them.

    A window is the next `shuffle` images, over as many shards as they take, and is shuffled as a whole; their encoded
    bytes are in memory meanwhile. To find a place, the shard in which its window begins is read from its beginning, no
    other.
    """

    def __init__(self, source: Source, seed: int, shuffle: int):
        super().__init__(source, seed)
        if shuffle < 1:
            raise InputError(f"shuffle={shuffle} must be at least 1 image.")
        self._shuffle = shuffle

    def items(self, place: Place) -> Iterator[tuple[Item | Failure, Place]]:
        while True:
            empty = True
            for window, begins, after in self._windows(place):
                empty = False
                order = self._permutation(len(window), begins.epoch, begins.shard, begins.start)
                taken = place.taken if begins.shard == place.shard and begins.start == place.start else 0
                for i in range(taken, len(window)):
                    behind = Place(begins.epoch, begins.shard, begins.start, i + 1)
                    yield window[order[i]], behind if i + 1 < len(window) else after
            if empty and (place.shard, place.start) == (0, 0):
                raise InputError("the source of images holds none.")
            place = Place(place.epoch + 1)

    def _windows(self, place: Place) -> Iterator[tuple[list[Item | Failure], Place, Place]]:
        """The windows of the rest of an epoch: the images, where it begins, and where the one behind it does."""
        shards = self.source.shards()
        order = self._permutation(len(shards), place.epoch)
        begins = Place(place.epoch, place.shard, place.start)
        window: list[Item | Failure] = []
        for number in range(place.shard, len(shards)):
            first = place.start if number == place.shard else 0
            for at, item in enumerate(islice(self.source.items(shards[order[number]]), first, None), first):
                if len(window) == self._shuffle:
                    after = Place(place.epoch, number, at)
                    yield window, begins, after
                    window, begins = [], after
                window.append(item)
        if window:
            yield window, begins, Place(place.epoch + 1)

    def config(self) -> dict[str, Any]:
        return {**self._about(), "shuffle": self._shuffle}


class _Scenes(Source):
    """Rendered scenes, which have no files, as a source: drawn when they are read. Their column is "caption"."""

    def __init__(self, spec: str, limit: int | None):
        self._spec, self._scenes = spec, open_dataset(spec, limit=limit)

    def shards(self) -> Sequence[Shard]:
        count = len(self._scenes)
        starts = range(0, count, _FINE)
        return [Shard(shard_id(i, f"{start}"), i, start, min(_FINE, count - start)) for i, start in enumerate(starts)]

    def items(self, shard: Shard) -> Iterator[Item | Failure]:
        for index in range(shard.holds, shard.holds + (shard.images or 0)):
            drawn = cache(partial(self._scenes.__getitem__, index))
            yield Item(f"scene_{index:06d}", partial(_encoded, drawn), _Captions(drawn))

    def config(self) -> dict[str, Any]:
        return {"kind": "scenes", "place": self._spec, "count": len(self._scenes)}


def _encoded(drawn: Callable[[], Sample]) -> bytes:
    image = drawn().image
    assert isinstance(image, Image.Image)
    return encode_image(image, compress_level=1)


class _Captions(Mapping[str, Any]):
    def __init__(self, drawn: Callable[[], Sample]):
        self._drawn = drawn

    def __getitem__(self, column: str) -> list[str]:
        if column != CAPTION:
            raise KeyError(column)
        return self._drawn().captions

    def __iter__(self) -> Iterator[str]:
        return iter((CAPTION,))

    def __len__(self) -> int:
        return 1


def open_images(
    images: str | Path | Sequence[str] | Source,
    *,
    seed: int = 0,
    shuffle: int = 4096,
    limit: int | None = None,
    columns: Sequence[str] = (),
    image_column: str | None = None,
    key_column: str | None = None,
    counted: bool = True,
) -> Order:
    """The order in which a fine-tuning sees the images of a source.

    images: whatever `clipfast run` reads (see `open_source`), or "scenes:SEED:COUNT". shuffle: images of a window,
    where the source is read in order: tars and tables. counted: whether the number of images is needed; that of tars
    is found by going through them once.

    Raises InputError as `open_source` does.
    """
    if isinstance(images, Source):
        source = images
    elif isinstance(images, str) and images.startswith("scenes:"):
        lacking = next((column for column in columns if column != CAPTION), None)
        if lacking is not None:
            raise InputError(f"scenes have no column {lacking!r}: they have {CAPTION!r}.")
        source = _Scenes(images, limit)
    else:
        opened = partial(open_source, images, columns=columns, image_column=image_column, key_column=key_column)
        source = opened(shard_size=_FINE, limit=limit)
        if isinstance(source, Tables):
            source = opened(shard_size=_COARSE, limit=limit)
        elif isinstance(source, Tars) and counted and limit is None:
            source = opened(limit=_ALL)
    if isinstance(source, Files | _Scenes):
        return Indexed(source, seed)
    return Streamed(source, seed, shuffle)


@dataclass(frozen=True)
class Loaded:
    """A step's images of this process. parts: those of each of its micro-batches. place: where the next step begins."""

    parts: list[list[Read]]
    failures: list[Failure]
    place: Place


@dataclass(frozen=True)
class Read:
    """An image that a step trains on. extra: what `Objective.read` made of its columns."""

    key: str
    prepared: Prepared
    extra: Any


class Loader:
    """Steps of images, decoded in threads ahead of whoever trains.

    batch: places of the order a step, of all processes. micro: how many of them go through the model at once. rank,
    world: this process, which gets the rank-th part of every batch. read: what becomes of an image's columns.
    workers: threads.
    """

    def __init__(
        self,
        order: Order,
        spec: InputSpec,
        read: Callable[[Item], Any],
        *,
        batch: int,
        micro: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 1,
    ):
        self.order, self._spec, self._read = order, spec, read
        self._batch, self._micro, self._workers = batch, micro, workers
        own = batch // world
        self._own = range(rank * own, (rank + 1) * own)

    def steps(self, place: Place) -> Generator[Loaded]:
        """The steps from a place on, without end. Close it, so that its threads end."""
        most = max(2 * self._workers, 2 * len(self._own))
        with closing(ahead(self._listed(place), self._made, self._workers, most)) as arriving:
            while True:
                parts: list[list[Read]] = [[] for _ in range(0, len(self._own), self._micro)]
                failures: list[Failure] = []
                for i in range(len(self._own)):
                    made, place = next(arriving)
                    if isinstance(made, Failure):
                        failures.append(made)
                    else:
                        parts[i // self._micro].append(made)
                yield Loaded(parts, failures, place)

    def _listed(self, place: Place) -> Iterator[tuple[Item | Failure, Place]]:
        """This process's images, each with the place behind the step's last image."""
        items = self.order.items(place)
        while True:
            step = list(islice(items, self._batch))
            yield from ((step[i][0], step[-1][1]) for i in self._own)

    def _made(self, listed: tuple[Item | Failure, Place]) -> tuple[Read | Failure, Place]:
        item, place = listed
        if isinstance(item, Failure):
            return item, place
        try:
            return Read(item.key, decode(item.read(), self._spec, name=item.key), self._read(item)), place
        except ClipfastError as error:
            return Failure(item.key, str(error)), place
        except Exception as error:
            # Whatever a file system, a network or a codec may raise: one image is not worth a run.
            detail = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")
            return Failure(item.key, f"{item.key} cannot be read: {detail or type(error).__name__}."), place
