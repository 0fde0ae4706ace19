"""Passes over a data set: its samples in batches of one size, as a model takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from clipfast.data.datasets import Dataset, Sample, Source
from clipfast.data.geometry import Geometry, normalize
from clipfast.data.inputs import prepare_all, sources
from clipfast.errors import ImageError, InputError
from clipfast.models.model import Model, Precision

OnError = Literal["raise", "skip"]

# Samples that are opened at once; what comes out does not depend on it.
_SAMPLES = 64


@dataclass(frozen=True)
class Batch:
    """Some samples whose inputs have one size.

    numbers: of the samples in the data set. pixels (b, 3, H, W): uint8, as the model's preprocessing leaves them;
    geometries lead back to the pictures.
    """

    numbers: list[int]
    samples: list[Sample]
    pixels: Tensor
    geometries: list[Geometry]

    def inputs(self, model: Model, precision: Precision = None) -> Tensor:
        """What the tower takes: normalised, (b, 3, H, W), on the model's device."""
        tower, _ = model.towers(precision)
        return normalize(self.pixels, model.spec, tower.dtype, tower.device)


def batches(
    model: Model,
    dataset: Dataset,
    *,
    numbers: Sequence[int] | None = None,
    precision: Precision = None,
    on_error: OnError = "raise",
    progress: Callable[[int], None] | None = None,
) -> Iterator[Batch]:
    """The samples of a data set in their order, as many at once as one pass of the image tower takes.

    numbers: of the samples that are wanted; all unless given. on_error: "raise" for the first sample that cannot be
    read, or "skip" it. progress: called with the number of samples done since the last call.

    Raises InputError for another on_error, ImageError for a sample that cannot be read.
    """
    if on_error not in ("raise", "skip"):
        raise InputError(f"on_error={on_error!r} must be 'raise' or 'skip'.")
    tower, _ = model.towers(precision)
    wanted = range(len(dataset)) if numbers is None else numbers
    waiting: list[tuple[int, Sample, Tensor, Geometry]] = []
    for start in range(0, len(wanted), _SAMPLES):
        opened = [(number, _opened(dataset, number, on_error)) for number in wanted[start : start + _SAMPLES]]
        items = prepare_all([sample.image for _, sample in opened if sample is not None], model.spec)
        for number, sample in opened:
            item = None if sample is None else next(items)
            if isinstance(item, ImageError):
                if on_error == "raise":
                    raise item
            elif item is not None and sample is not None:
                if waiting and waiting[0][2].shape != item.pixels.shape:
                    yield _together(waiting)
                    waiting = []
                waiting.append((number, sample, item.pixels, item.geometry))
                height, width = item.geometry.covered
                patches = height // tower.patch_size[0] * (width // tower.patch_size[1])
                if len(waiting) >= tower.rows_at_once(patches):
                    yield _together(waiting)
                    waiting = []
            if progress is not None:
                progress(1)
    if waiting:
        yield _together(waiting)


def only_label(sample: Sample) -> int | None:
    """The class of a sample that has exactly one; None where it has none, or several."""
    labels = {target.label for target in sample.targets if target.label is not None}
    return labels.pop() if len(labels) == 1 else None


class Pictures(Dataset):
    """Pictures of which nothing else is known: paths, folders, patterns, PIL images or uint8 arrays."""

    source: ClassVar[Source] = Source("Pictures", "anywhere", "any pictures, in any folders")
    offers = frozenset()
    classes = None
    name = "pictures"

    def __init__(self, images: Any):
        self._found = sources(images)

    def __len__(self) -> int:
        return len(self._found)

    def _sample(self, index: int) -> Sample:
        return Sample(f"picture_{index:06d}", self._found[index], [], [])


def _together(waiting: Sequence[tuple[int, Sample, Tensor, Geometry]]) -> Batch:
    numbers, samples, pixels, geometries = zip(*waiting, strict=True)
    return Batch(list(numbers), list(samples), torch.stack(pixels), list(geometries))


def _opened(dataset: Dataset, number: int, on_error: OnError) -> Sample | None:
    try:
        return dataset[number]
    except ImageError:
        if on_error == "raise":
            raise
        return None
