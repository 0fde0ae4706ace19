"""Where neurons of an image tower are active, and which labelled thing is there.

    T_k    = what neuron k exceeds at `quantile` of all patches of the data set
    M_k(x) = pixels of picture x where k's map, bilinear between patch centres, exceeds T_k
    IoU    = sum_x |M_k(x) and L_c(x)| / sum_x |M_k(x) or L_c(x)|            L_c(x): the pixels of concept c

Bau et al., Network Dissection: Quantifying Interpretability of Deep Visual Representations, CVPR 2017, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from clipfast.data.datasets import Dataset, Target
from clipfast.data.geometry import Geometry
from clipfast.errors import InputError
from clipfast.metrics.base import Columns, Protocol
from clipfast.metrics.dissection import Dissection, Neurons
from clipfast.metrics.samples import OnError, batches
from clipfast.models.image import ImageTower
from clipfast.models.model import Model, Precision

# Pixels of maps that are in memory at once.
_PIXELS = 1 << 24


@dataclass(frozen=True)
class NetworkDissect(Protocol):
    """`dissection/network`: the IoU of each neuron's active pixels with the class that they fit best; rows are neurons.

    block, layer: see `Neurons`. quantile: the share of patches that a neuron counts as active on. detector: a neuron
    whose IoU is greater detects its class.
    """

    block: int = -1
    layer: str = "mlp"
    quantile: float = 0.005
    detector: float = 0.04

    name: ClassVar[str] = "dissection/network"
    source: ClassVar[str] = "Bau et al., Network Dissection, CVPR 2017"
    figures: ClassVar[Mapping[str, str]] = {"score": "higher", "detector": "higher"}

    def __post_init__(self) -> None:
        Neurons(self.block, self.layer)
        if not 0 < self.quantile < 1:
            raise InputError(f"quantile={self.quantile} must be a share of the patches, between 0 and 1.")

    def measure(self, model: Model, dataset: Dataset, **options: Any) -> Columns:
        """Columns of the D neurons: the best IoU as "score", the "concept" it is for, and whether it is a "detector".

        Arguments as for `dissect`.
        """
        columns = self.dissect(model, dataset, **options).columns()
        return {**columns, "detector": (columns["score"] > self.detector).double()}

    @torch.inference_mode(False)
    @torch.no_grad()
    def dissect(
        self,
        model: Model,
        dataset: Dataset,
        *,
        precision: Precision = None,
        on_error: OnError = "raise",
        progress: Callable[[int], None] | None = None,
    ) -> Dissection:
        """The IoU of every neuron with every class, (D, K).

        Two passes over the samples that have a mask: one for the thresholds, which keeps the highest values alone, and
        one for the pixels. Pixels that a mask ignores do not count for its class; those that the model does not see are
        not active. A class that is nowhere has an IoU of 0. progress: called with samples done, twice for each.

        Raises InputError for a data set without masks or classes, pictures that come to several patch grids, a tower
        without tokens, and as `samples.batches` does.
        """
        if dataset.classes is None or "masks" not in dataset.offers:
            raise InputError(f"{dataset.name} has no masks of classes; it offers {', '.join(sorted(dataset.offers))}.")
        neurons = Neurons(self.block, self.layer)
        tower, _ = model.towers(precision)
        width = neurons.count(tower)
        assert isinstance(tower, ImageTower)

        def read() -> Iterator[tuple[Tensor, list[Target], Geometry]]:
            """Of each sample with masks: neurons (D, h, w), the targets that have one, the geometry."""
            for batch in batches(model, dataset, precision=precision, on_error=on_error, progress=progress):
                masked = [[t for t in s.targets if t.mask is not None and t.label is not None] for s in batch.samples]
                rows = [i for i, own in enumerate(masked) if own]
                if not rows:
                    continue
                x = batch.inputs(model, precision)[rows]
                values = neurons.read(tower, x)[0][:, tower.prefix :]
                for row, one in zip(rows, values.float().mT.unflatten(2, tower.grid_of(x)), strict=True):
                    yield one, masked[row], batch.geometries[row]

        highest = _Highest(self.quantile, len(dataset))
        for maps, _, _ in read():
            highest.add(maps.flatten(1))
        thresholds = highest.threshold(dataset.name)
        sums = _Sums(width, len(dataset.classes), tower.device)
        for maps, targets, geometry in read():
            sums.add(maps, thresholds, targets, geometry)
        return Dissection(sums.iou(), dataset.classes)


class _Highest:
    """The highest values of D streams: as many as the quantile can need of so many pictures."""

    def __init__(self, quantile: float, pictures: int):
        self.quantile, self.pictures = quantile, pictures
        self.count = self.patches = 0
        self.waiting: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Values (D, n) of one picture."""
        if self.patches and values.shape[1] != self.patches:
            raise InputError("neurons are compared on one patch grid: choose a preprocessing that crops or squashes.")
        self.patches = values.shape[1]
        self.count += self.patches
        self.waiting.append(values)
        # Sorted out only now and then: each time costs as much as there is to keep.
        if sum(part.shape[1] for part in self.waiting[1:]) > max(self._needed(), 4096):
            self.waiting = [self._top()]

    def threshold(self, name: str) -> Tensor:
        """What the quantile of all values, rounded down, exceeds: (D,), halfway between the two values next to it.

        On one of the values itself, rounding would decide whether pixels beyond the outermost patch centres are active.
        """
        if not self.count:
            raise InputError(f"{name} has no sample with a mask, and neurons are dissected by masks.")
        top, at = self._top(), int(self.quantile * self.count)
        return (top[:, max(at - 1, 0)] + top[:, at]) / 2

    def _needed(self) -> int:
        return int(self.quantile * self.pictures * self.patches) + 1

    def _top(self) -> Tensor:
        values = torch.cat(self.waiting, dim=1)
        return values.topk(min(self._needed(), values.shape[1]), dim=1).values


class _Sums:
    """Pixels of D neurons, of K classes, and of both at once, over all pictures."""

    def __init__(self, neurons: int, classes: int, device: torch.device):
        self.active = torch.zeros(neurons, 1, dtype=torch.float64, device=device)
        self.labelled = torch.zeros(classes, dtype=torch.float64, device=device)
        self.both = torch.zeros(neurons, classes, dtype=torch.float64, device=device)
        self.ignored = torch.zeros_like(self.both)

    def add(self, maps: Tensor, thresholds: Tensor, targets: list[Target], geometry: Geometry) -> None:
        """One picture: neurons (D, h, w), thresholds (D,), targets with masks on the picture's pixels."""
        masks = torch.from_numpy(np.stack([np.asarray(target.mask, np.int8) for target in targets])).to(maps.device)
        there, unknown = (masks == 1).float().flatten(1), (masks == -1).float().flatten(1)
        labels = torch.tensor([target.label for target in targets], device=maps.device)
        self.labelled.index_add_(0, labels, there.sum(1).double())
        once = max(1, _PIXELS // (geometry.height * geometry.width))
        for start in range(0, len(maps), once):
            some = slice(start, start + once)
            on_picture = geometry.to_image(maps[some], outside=-torch.inf)
            active = (on_picture > thresholds[some, None, None]).float().flatten(1)
            self.active[some, 0] += active.sum(1).double()
            self.both[some] = self.both[some].index_add(1, labels, (active @ there.T).double())
            if bool(unknown.any()):
                self.ignored[some] = self.ignored[some].index_add(1, labels, (active @ unknown.T).double())

    def iou(self) -> Tensor:
        """(D, K); 0 where there is neither."""
        either = self.active + self.labelled - self.both - self.ignored
        return torch.where(either > 0, self.both / either, 0).cpu()
