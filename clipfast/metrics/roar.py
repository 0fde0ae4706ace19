"""ROAR: how much a classifier can still learn once the pixels that maps rank first are gone from every picture.

    for each share   the highest-ranked pixels of all training and test pictures become the training set's mean colour
                     a classifier is trained on the one and tested on the other
    area             mean accuracy over the shares (trapezoids over the width), the untouched pictures' at share 0

Hooker et al., A Benchmark for Interpretability Methods in Deep Neural Networks, NeurIPS 2019. As the classifier learns
from pictures that are masked themselves, it cannot fail for their looking strange, only for what they no longer show;
an explanation is worth something where accuracy falls faster than for pixels in random order. What stays
visible, though, is the outline of what was taken away, and classes can be learned from outlines (Rong et al., A
Consistent and Efficient Evaluation Strategy for Attribution Methods, ICML 2022): for maps that fit an object closely
accuracy falls less than their quality would have it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from clipfast.data.datasets import Dataset
from clipfast.data.geometry import normalize
from clipfast.errors import InputError, nearest
from clipfast.metrics.base import Columns, Protocol
from clipfast.metrics.orders import Order, Split
from clipfast.metrics.perturbation import area, on_pixels
from clipfast.metrics.probe import Encoded, fit_held_out
from clipfast.metrics.rows import fingerprint, slug
from clipfast.metrics.samples import OnError, batches, only_label
from clipfast.metrics.scratch import Training, predictions, train_resnet18
from clipfast.models.digest import weights_digest
from clipfast.models.model import Model, Precision
from clipfast.ops.mask_sequence import mask_sequence, rank_map
from clipfast.versions import versions
from clipfast.view.files import write_file

_CLASSIFIERS = ("probe", "resnet18")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Roar(Protocol):
    """`roar`: accuracy after removing and retraining, at each share and as an area; lower is better.

    shares: of the pixels that the model sees, ascending. seeds: of the trainings. classifier: "probe", a linear probe
    on the frozen tower, or "resnet18", from scratch, trained as `training` says.

    A probe has one solution, so a seed draws which fifth of the training pictures chooses its penalty and is not
    fitted (our reading of three seeds); of a ResNet it decides weights, order and mirroring. Pixels with equal values
    go in reading order. Samples of no class, or of several, are left out.
    """

    shares: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    seeds: tuple[int, ...] = (0, 1, 2)
    classifier: str = "probe"
    training: Training = field(default_factory=Training)

    name: ClassVar[str] = "roar"
    source: ClassVar[str] = "Hooker et al., A Benchmark for Interpretability Methods, NeurIPS 2019"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(self.shares))
        object.__setattr__(self, "seeds", tuple(self.seeds))
        if not self.shares or not all(0 < a < b <= 1 for a, b in zip((1e-9, *self.shares), self.shares, strict=False)):
            raise InputError(f"shares must be ascending shares of the pixels, in (0, 1], not {self.shares}.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError(f"seeds must be one or more whole numbers, each once, not {self.seeds}.")
        if self.classifier not in _CLASSIFIERS:
            raise InputError(f"there is no classifier {self.classifier!r}: {nearest(self.classifier, _CLASSIFIERS)}")
        figures = {"area": "lower", **{f"accuracy {share:.3f}": "lower" for share in (0.0, *self.shares)}}
        object.__setattr__(self, "figures", figures)

    @torch.inference_mode(False)
    @torch.no_grad()
    def measure(
        self,
        model: Model,
        order: Order,
        train: Dataset,
        test: Dataset,
        *,
        folder: str | Path | None = None,
        shard: int = 250,
        precision: Precision = None,
        on_error: OnError = "raise",
        progress: Callable[[str], None] | None = None,
    ) -> Columns:
        """Columns of the test samples: `area` and accuracies, means over the seeds; "hit 0.300 seed 1" singly.

        folder: where features (masked pictures, for "resnet18") and hits are kept, so that a stopped run goes on: each
        shard of so many samples is made once, and so is each training. What does not depend on the order (share 0) is
        kept once for all orders. progress: called with what was just finished.

        Raises InputError for data sets of different classes, and as `fit_probe` and `samples.batches` do.
        """
        if train.classes is None or train.classes != test.classes:
            raise InputError(f"{train.name} and {test.name} must have the same classes, in the same order.")
        run = _Run(self, model, train, test, precision, on_error, shard, progress or (lambda done: None))
        about, root = run.about(), None if folder is None else Path(folder)
        mark = fingerprint(**about, order=order.name, settings=order.settings(), shares=self.shares)
        whole = _Store(root and root / f"whole-{fingerprint(**about)}")
        own = _Store(root and root / f"{slug(order.name)}-{mark}")
        fill = whole.get("mean", lambda: {"colour": run.mean_colour()})["colour"]
        points = (0.0, *self.shares)
        found = [*run.hits(None, whole, (0.0,), fill), *run.hits(order, own, self.shares, fill)]
        columns = {f"accuracy {share:.3f}": hits.mean(0) for share, hits in zip(points, found, strict=True)}
        for share, hits in zip(points, found, strict=True):
            columns |= {f"hit {share:.3f} seed {seed}": row for seed, row in zip(self.seeds, hits, strict=True)}
        return {"area": area(torch.stack(found).mean(1).T, points) / points[-1], **columns}

    def by_seed(self, columns: Mapping[str, Tensor]) -> list[float]:
        """The area of each seed's trainings."""
        points = (0.0, *self.shares)
        return [
            float(area(torch.stack([columns[f"hit {share:.3f} seed {s}"].mean() for share in points]), points))
            / points[-1]
            for s in self.seeds
        ]


class _Store:
    """Tensors by name, in files that are whole or not there, or in memory alone."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._held: dict[str, dict[str, Tensor]] = {}

    def get(self, name: str, make: Callable[[], dict[str, Tensor]], keys: Sequence[str] | None = None) -> Tensors:
        """What `make` gave when it was first asked for; of a file only the keys that are wanted are read."""
        if self._folder is None:
            if name not in self._held:
                self._held[name] = make()
            return self._held[name]
        path = self._folder / f"{name}.safetensors"
        if not path.exists():
            write_file(path, save({key: value.contiguous() for key, value in make().items()}))
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in (keys or file.keys())}


@dataclass(frozen=True)
class _Run:
    """One measurement: what all of its stages need."""

    roar: Roar
    model: Model
    train: Dataset
    test: Dataset
    precision: Precision
    on_error: OnError
    shard: int
    progress: Callable[[str], None]

    def about(self) -> dict[str, Any]:
        """All that trainings on untouched pictures depend on, but seeds."""
        return {
            "model": self.model.name,
            "weights": weights_digest(self.model.module),
            "spec": self.model.spec,
            "precision": self.precision,
            "data": [(data.name, len(data)) for data in (self.train, self.test)],
            "classifier": self.roar.classifier,
            "training": self.roar.training if self.roar.classifier == "resnet18" else None,
            "shard": self.shard,
            "clipfast": versions()["clipfast"],
        }

    def mean_colour(self) -> Tensor:
        """The mean of the training pictures' pixels that the model sees, (3,) on the scale 0..1."""
        sums, count = torch.zeros(3, dtype=torch.float64), 0
        for _, _, pixels in self._labelled(self.train, range(len(self.train))):
            sums += pixels.double().sum((0, 2, 3))
            count += pixels.numel() // 3
        if not count:
            raise InputError(f"{self.train.name} has no sample of exactly one class, which is what ROAR trains on.")
        return (sums / count / 255).float()

    def hits(self, order: Order | None, store: _Store, shares: Sequence[float], fill: Tensor) -> list[Tensor]:
        """For each share, which test samples the classifier of each seed gets right: (seeds, N) float64, 0 or 1."""
        found = []
        for at, share in enumerate(shares):
            seen = partial(self._seen, order, store, shares, fill, at)
            rows = [
                store.get(f"hits-{share:.3f}-{seed}", partial(self._trained, seen, share, seed))["hits"]
                for seed in self.roar.seeds
            ]
            found.append(torch.stack(rows).double())
        return found

    def _trained(self, seen: Callable[[Split], Encoded], share: float, seed: int) -> Tensors:
        """The hits (N,) of a classifier that was trained on what is seen of the training pictures."""
        train, test = seen("train"), seen("test")
        if self.roar.classifier == "probe":
            hits = fit_held_out(train, seed=seed).hits(test.z, test.labels)
        else:
            device, classes = self.model.device, len(train.classes)
            network = train_resnet18(train.z, train.labels, classes, self.roar.training, seed=seed, device=device)
            hits = predictions(network, test.z, device=device) == test.labels
        self.progress(f"share {share:.2f}, seed {seed}: accuracy {float(hits.double().mean()):.3f}")
        return {"hits": hits.byte()}

    def _seen(
        self, order: Order | None, store: _Store, shares: Sequence[float], fill: Tensor, at: int, split: Split
    ) -> Encoded:
        """What a classifier sees of all samples of one class at a share: features (N, E), or pixels (N, 3, H, W)."""
        data = self.train if split == "train" else self.test
        parts = []
        for start in range(0, len(data), self.shard):
            numbers = range(start, min(start + self.shard, len(data)))
            make = partial(self._masked, order, shares, fill, split, numbers)
            parts.append(store.get(f"{split}-{start:06d}", make, [f"seen {at}", "labels", "numbers"]))
        if len({part[f"seen {at}"].shape[1:] for part in parts if len(part["labels"])}) != 1:
            raise InputError(
                f"{data.name} must have samples of exactly one class, and pictures that come to one size: "
                "choose a preprocessing that crops or squashes."
            )
        z, labels, rows = (
            torch.cat([part[key] for part in parts if len(part["labels"])])
            for key in (f"seen {at}", "labels", "numbers")
        )
        return Encoded(z, labels, rows, data.classes or [])

    def _masked(
        self, order: Order | None, shares: Sequence[float], fill: Tensor, split: Split, numbers: range
    ) -> Tensors:
        """One shard: "seen 0" and so on at each share, "labels" and "numbers"."""
        data = self.train if split == "train" else self.test
        tower, _ = self.model.towers(self.precision)
        spec, seen, labels, rows = self.model.spec, [], [], []
        for some, own, pixels in self._labelled(data, numbers):
            pixels = pixels.to(tower.device)
            ranks = torch.zeros(len(some), 1, *pixels.shape[2:], dtype=torch.int32, device=tower.device)
            if order is not None:
                x = normalize(pixels, spec, tower.dtype)
                maps = order.maps(x, own, some, split).to(tower.device)
                ranks = rank_map(on_pixels(maps[:, None], (pixels.shape[2], pixels.shape[3])))
            if self.roar.classifier == "probe":
                copies = mask_sequence(
                    pixels, ranks, shares, fill=fill.to(pixels.device), mean=spec.mean, std=spec.std, dtype=tower.dtype
                )
                once = tower.rows_at_once(math.prod(tower.grid_of(copies)))
                found = torch.cat([tower.encode(part) for part in copies.split(once)]).float()
            else:
                # The op writes floats; what is not covered comes back to the level that it had.
                found = mask_sequence(pixels, ranks, shares, fill=fill.to(pixels.device)).mul_(255).round_().byte()
            seen.append(found.cpu().unflatten(0, (len(some), len(shares))))
            labels += own
            rows += some
        self.progress(f"{split} {numbers.stop:,} of {len(data):,}")
        if len({x.shape[2:] for x in seen}) > 1:
            raise InputError("ROAR's pictures must come to one size: choose a preprocessing that crops or squashes.")
        whole = torch.cat(seen) if seen else torch.empty(0, len(shares))
        by_share = {f"seen {at}": whole[:, at] for at in range(len(shares))}
        return {**by_share, "labels": torch.tensor(labels).long(), "numbers": torch.tensor(rows).long()}

    def _labelled(self, data: Dataset, numbers: range) -> Iterator[tuple[list[int], list[int], Tensor]]:
        """The samples of exactly one class: numbers, labels, and the uint8 pixels (b, 3, H, W) that the model sees."""
        for batch in batches(self.model, data, numbers=numbers, precision=self.precision, on_error=self.on_error):
            labels = [only_label(sample) for sample in batch.samples]
            rows = [row for row, label in enumerate(labels) if label is not None]
            if rows:
                height, width = batch.geometries[0].covered
                own = [label for label in labels if label is not None]
                yield [batch.numbers[row] for row in rows], own, batch.pixels[rows, :, :height, :width]
