"""The images of a shard, decoded in threads beside the model and explained in batches.

What is explained together depends on the order of the images alone, so that a shard gives the same bytes whatever the
number of threads and whoever is faster: images of one input size, and of one number of texts where each has its own, go
together in the order of the shard. An image that cannot be read keeps its seat in the batch, empty, so that those after
it sit where they always sit (but where its seat is not known: with resize="keep", or without its own texts). Images of
several sizes wait in one bucket a size; when buckets hold more than `_WAITING` batches, the fullest is explained as it
is, and at the end of the shard all are.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from clipfast.api import Explainer
from clipfast.batch import Batch
from clipfast.data.decode import decode
from clipfast.data.inputs import Prepared
from clipfast.engine.ahead import ahead
from clipfast.engine.base import Explained, Failure, Item
from clipfast.engine.texts import Prompts
from clipfast.errors import ImageError, InputError, TextError
from clipfast.methods.base import Relu
from clipfast.sheet import Asked

# As many batches may lie in buckets that are not full, and as many elements may the maps of one batch have.
_WAITING = 4
_ELEMENTS = 1 << 26


@dataclass
class Clock:
    """Seconds of a shard: waited for images (`decode`), and in the model or waiting for its results (`model`)."""

    decode: float = 0.0
    model: float = 0.0

    @contextmanager
    def counts(self, part: str) -> Iterator[None]:
        """What runs inside counts as `part`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, part, getattr(self, part) + time.perf_counter() - begun)


@dataclass(frozen=True)
class _Seat:
    """An image and its place in a batch. reason: why it has no map. texts: its own, where images have such."""

    key: str
    prepared: Prepared | None = None
    texts: list[str] | None = None
    reason: str | None = None


@dataclass
class _Bucket:
    """Seats of one input size and one number of texts; `room` of them make a batch."""

    size: tuple[int, int]
    room: int
    seats: list[_Seat] = field(default_factory=list)


@dataclass(frozen=True)
class _Answer:
    """What the model said of a batch, on its way to the CPU. reasons: of seats whose texts could not be encoded."""

    seats: list[_Seat]
    reasons: dict[int, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    relu: Relu = "each"
    ready: torch.cuda.Event | None = None


def explained(
    items: Iterable[Item | Failure],
    explainer: Explainer,
    prompts: Prompts,
    *,
    workers: int | None = None,
    batch: int | None = None,
    exact: bool = False,
    features: bool = False,
    clock: Clock | None = None,
) -> Iterator[Explained | Failure]:
    """The maps of a shard's images, a batch at a time, and a `Failure` for each image that has none.

    workers: threads that read and decode; by default as many as the machine's cores where the model runs on a GPU,
        and half of them beside a model that needs the cores itself. batch: images that go through the model at once; by
        default what `Explainer.batch_size` says, or fewer where their maps would be more than 256 MB.
    exact: see `decode`. features: attribution features, too; maps are then products with them.
    clock: where the seconds go.

    Texts longer than the model's context are cut without a word. With `Prompts.top` the images' scores with all texts
    choose, and maps are those of the chosen ones alone. Memory: at most two batches of images decoded ahead, and those
    in buckets.

    Raises InputError for arguments or a method that cannot be used, ModelError for weights with NaN or infinite values,
    TextError for shared texts that cannot be encoded, and what listing `items` raises.
    """
    for name, value in (("workers", workers), ("batch", batch)):
        if value is not None and value < 1:
            raise InputError(f"{name}={value} must be at least 1.")
    if features:
        explainer.check_features()
    clock = Clock() if clock is None else clock
    shard = _Shard(explainer, prompts, features)
    on_gpu = explainer.model.device.type == "cuda"
    workers = workers or default_workers(on_gpu)
    most = max(2 * workers, 2 * (batch or explainer.batch_size(*explainer.spec.size)))
    with closing(ahead(items, shard.reader(exact), workers, most)) as seats:
        waiting: deque[_Answer] = deque()
        for found in shard.buckets(_timed(seats, clock), batch):
            if isinstance(found, Failure):
                yield found
                continue
            with clock.counts("model"):
                waiting.append(shard.ask(found))
            # While a GPU works on one batch, the one before is brought home.
            while len(waiting) > on_gpu:
                with clock.counts("model"):
                    done = shard.read(waiting.popleft())
                yield from done
        for answer in waiting:
            with clock.counts("model"):
                done = shard.read(answer)
            yield from done


def default_workers(on_gpu: bool) -> int:
    """How many threads should decode."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if on_gpu else max(1, cores // 2)


def _timed(seats: Iterator[_Seat], clock: Clock) -> Iterator[_Seat]:
    while True:
        with clock.counts("decode"):
            seat = next(seats, None)
        if seat is None:
            return
        yield seat


class _Shard:
    """How a shard's images are asked."""

    def __init__(self, explainer: Explainer, prompts: Prompts, features: bool):
        self.explainer, self.prompts, self.features = explainer, prompts, features
        self.shared = None if prompts.column is not None else _shared(explainer, prompts)
        self.upload = _Upload(explainer.model.device)
        self._overflowed = False

    def reader(self, exact: bool) -> Callable[[Item | Failure], _Seat]:
        """An item -> its seat; never raises for an image or its texts."""
        spec, prompts = self.explainer.spec, self.prompts

        def read(item: Item | Failure) -> _Seat:
            if isinstance(item, Failure):
                return _Seat(item.key, reason=item.reason)
            texts = None
            try:
                texts = None if prompts.column is None else prompts.own(item)
                return _Seat(item.key, decode(item.read(), spec, exact=exact, name=item.key), texts)
            except (ImageError, TextError) as error:
                return _Seat(item.key, None, texts, str(error))
            except Exception as error:
                # Whatever a file system, a network or a codec may raise: one image is not worth a shard.
                detail = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")
                reason = f"{item.key} cannot be read: {detail or type(error).__name__}."
                return _Seat(item.key, None, texts, reason)

        return read

    def buckets(self, seats: Iterable[_Seat], batch: int | None) -> Iterator[_Bucket | Failure]:
        """Full batches as they come, then the rest; failures at once."""
        spec = self.explainer.spec
        fixed = None if spec.resize == "keep" else spec.size
        open_: dict[tuple[tuple[int, int], int], _Bucket] = {}
        for seat in seats:
            if seat.reason is not None:
                yield Failure(seat.key, seat.reason)
            size = fixed if seat.prepared is None else seat.prepared.geometry.input
            prompts = self.prompts.per_image if seat.texts is None else len(seat.texts)
            if size is None or prompts is None:
                continue
            key = (size, prompts)
            if key not in open_:
                open_[key] = _Bucket(size, self._room(size, prompts, batch))
            bucket = open_[key]
            bucket.seats.append(seat)
            if len(bucket.seats) == bucket.room:
                yield open_.pop(key)
            elif sum(len(each.seats) / each.room for each in open_.values()) > _WAITING:
                yield open_.pop(max(open_, key=lambda k: len(open_[k].seats) / open_[k].room))
        yield from open_.values()

    def _room(self, size: tuple[int, int], prompts: int, batch: int | None) -> int:
        height, width = self.explainer.grid_of(*size)
        most = _ELEMENTS // max(1, prompts * height * width)
        return max(1, min(batch or self.explainer.batch_size(*size), most))

    def ask(self, bucket: _Bucket) -> _Answer:
        """Put a batch through the model."""
        seats = bucket.seats
        if all(seat.prepared is None for seat in seats):
            return _Answer(seats)
        empty = torch.zeros(3, *bucket.size, dtype=torch.uint8)
        shown = self.explainer.batch(self.upload([s.prepared.pixels if s.prepared else empty for s in seats]))
        found: dict[str, Tensor] = {}
        if self.features:
            found["values"], found["weights"] = shown.features
            found["embeddings"] = shown.embeddings
        reasons: dict[int, str] = {}
        if self.shared is None:
            asked, numbers, reasons = self._own([seat.texts or [] for seat in seats])
            if asked is None:
                return _Answer(seats, reasons)
            found |= _questions(shown, asked, numbers)
        elif self.prompts.top is None:
            found |= _questions(shown, self.shared, None)
        else:
            numbers = self.prompts.chosen(shown.scores(self.shared))
            found |= _questions(shown, self.shared, numbers) | {"prompts": numbers}
        finite = shown.embeddings.isfinite().all(-1)
        found["finite"] = finite & found["maps"].sum((1, 2, 3)).isfinite()
        home = {name: t.to("cpu", non_blocking=True) for name, t in found.items()}
        ready = torch.cuda.Event() if shown.embeddings.device.type == "cuda" else None
        if ready is not None:
            ready.record()
        return _Answer(seats, reasons, home, shown.explained.relu if self.features else "each", ready)

    def _own(self, texts: list[list[str]]) -> tuple[Asked | None, Tensor, dict[int, str]]:
        """The texts of b images, P each: all of them encoded once, their numbers (b, P), and why some cannot be."""
        reasons: dict[int, str] = {}
        flat = list(dict.fromkeys(text for own in texts for text in own))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "a text of .* tokens was cut")
            try:
                asked = self.explainer.asks(flat)
            except TextError:
                reasons = {i: reason for i, own in enumerate(texts) if (reason := self._refused(own))}
                flat = list(dict.fromkeys(text for i, own in enumerate(texts) if i not in reasons for text in own))
                if not flat:
                    return None, torch.empty(0), reasons
                asked = self.explainer.asks(flat)
        place = {text: number for number, text in enumerate(flat)}
        return asked, torch.tensor([[place.get(text, 0) for text in own] for own in texts]), reasons

    def _refused(self, texts: list[str]) -> str | None:
        try:
            self.explainer.asks(texts)
        except TextError as error:
            return str(error)
        return None

    def read(self, answer: _Answer) -> list[Explained | Failure]:
        """What a batch came to, and a failure for each image that has no finite answer."""
        if answer.ready is not None:
            answer.ready.synchronize()
        failures: list[Explained | Failure] = []
        arrays = {name: _array(t) for name, t in answer.tensors.items()}
        kept = []
        for i, seat in enumerate(answer.seats):
            if seat.prepared is None:
                continue
            if i in answer.reasons:
                failures.append(Failure(seat.key, f"{seat.key}: {answer.reasons[i]}"))
            elif arrays["finite"][i]:
                kept.append(i)
            else:
                failures.append(Failure(seat.key, self._overflow(seat.key)))
        if not kept:
            return failures
        if len(kept) < len(answer.seats):
            arrays = {name: values[kept] for name, values in arrays.items()}
        seats = [answer.seats[i] for i in kept]
        maps = arrays["maps"]
        every = np.tile(np.arange(maps.shape[1]), (len(maps), 1))
        batch = Explained(
            keys=[seat.key for seat in seats],
            geometries=[seat.prepared.geometry for seat in seats if seat.prepared is not None],
            prompts=arrays.get("prompts", every),
            scores=arrays["scores"],
            maps=maps,
            texts=None if self.shared is not None else [seat.texts or [] for seat in seats],
            features=(arrays["values"], arrays["weights"], arrays["embeddings"]) if self.features else None,
            relu=answer.relu,
        )
        return [*failures, batch]

    def _overflow(self, key: str) -> str:
        """Why an image has no finite answer. Raises ModelError where none can have one."""
        if not self._overflowed:
            self.explainer.check_weights()
            self._overflowed = True
        model = self.explainer.model
        dtype = str(model.towers(self.explainer.precision)[0].dtype).removeprefix("torch.")
        instead = "" if dtype == "float32" else ": use precision='float32'"
        return f"{key} makes {model.name} overflow in {dtype}{instead}."


def _array(t: Tensor) -> np.ndarray:
    return (t.float() if t.is_floating_point() else t).numpy()


def _questions(shown: Batch, asked: Asked, numbers: Tensor | None) -> dict[str, Tensor]:
    return {"scores": shown.scores(asked, numbers), "maps": shown.maps(asked, numbers)}


_SHARED: WeakKeyDictionary[Explainer, tuple[Prompts, object, Asked]] = WeakKeyDictionary()


def _shared(explainer: Explainer, prompts: Prompts) -> Asked:
    """The texts of all images, encoded once for all shards that an explainer works on."""
    tower = explainer.model.towers(explainer.precision)[1]
    known = _SHARED.get(explainer)
    if known is None or known[0] != prompts or known[1] is not tower:
        _SHARED[explainer] = known = (prompts, tower, explainer.asks(prompts.asked(explainer)))
    return known[2]


class _Upload:
    """uint8 rows (3, H, W) -> a batch on the device; to a GPU through two pinned buffers by turns, without waiting."""

    def __init__(self, device: torch.device):
        self.device = device
        self._buffers: list[Tensor] = [torch.empty(0, dtype=torch.uint8)] * 2
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def __call__(self, rows: list[Tensor]) -> Tensor:
        if self.device.type != "cuda":
            return torch.stack(rows)
        self._turn = turn = 1 - self._turn
        sent, elements = self._sent[turn], len(rows) * rows[0].numel()
        if sent is not None:
            sent.synchronize()
        if self._buffers[turn].numel() < elements:
            self._buffers[turn] = torch.empty(elements, dtype=torch.uint8, pin_memory=True)
        host = self._buffers[turn][:elements].view(len(rows), *rows[0].shape)
        x = torch.stack(rows, out=host).to(self.device, non_blocking=True)
        self._sent[turn] = event = torch.cuda.Event()
        event.record()
        return x
