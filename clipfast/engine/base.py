"""What the parts of a data-set run hand to each other.

A source lists its images in shards; a worker explains one shard at a time; a writer commits what came out. A shard's id
depends on the input alone, so whoever computes it, when, and how often, its results have the same name and content.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipfast.data.geometry import Geometry


@dataclass(frozen=True)
class Item:
    """One image of a source, not read yet.

    key: unique in the source and the same on every run. read: the encoded image's bytes; raises OSError or ImageError.
    columns: what the source says beside the picture: the columns of its table, or "caption".
    """

    key: str
    read: Callable[[], bytes]
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """An image that has no map, and why, in one sentence."""

    key: str
    reason: str


@dataclass(frozen=True)
class Shard:
    """A unit of work: small enough to lose, large enough to be worth a file. Picklable.

    id: a file's name, the same whenever the same input is listed. number: its place in the source, from 0.
    holds: what the source needs to find the images again. images, bytes: how many and how large, where that is known
    without opening them.
    """

    id: str
    number: int
    holds: Any
    images: int | None = None
    bytes: int | None = None


class Source(ABC):
    """Where images come from. Picklable, so that other processes list and read the same."""

    @abstractmethod
    def shards(self) -> Sequence[Shard]:
        """All shards in order; nothing is decoded for it. Raises InputError for a source that cannot be listed."""

    @abstractmethod
    def items(self, shard: Shard) -> Iterator[Item | Failure]:
        """The images of a shard in order. What cannot be found or read is a Failure; nothing is raised for it."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What tells this source from another, as JSON, such as its kind, place and shard size."""


@dataclass
class Explained:
    """b images of one grid with their maps, on the CPU, in the order of the shard.

    keys (b,). geometries (b,). prompts (b, P): numbers of the run's texts, -1 where an image has fewer than P.
    texts: of images with texts of their own, those (else None). scores (b, P) float32, maps (b, P, h, w) float32.
    features: values (b, n, E) or (b, L, n, E), weights (b, n) or (b, L, n), embeddings (b, E), where a run keeps them;
    relu: how maps are made of them (see `results.Features`).
    """

    keys: list[str]
    geometries: list[Geometry]
    prompts: np.ndarray
    scores: np.ndarray
    maps: np.ndarray
    texts: list[list[str]] | None = None
    features: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    relu: str = "each"
