"""Robust accuracy: how often zero-shot classification is right when every pixel may move a little for the worse.

    robust = share of pictures x whose class stays the first choice for all x' that the attacks find with
             x' in [0, 1],  max |x' - x| <= radius             x: the pixels that the model sees, before normalisation

The attacks are APGD on the cross-entropy and then, on the pictures that are still right, APGD on the targeted
difference of logits ratio towards the nearest wrong classes: Croce and Hein, Reliable evaluation of adversarial
robustness with an ensemble of diverse parameter-free attacks, ICML 2020, as torchattacks runs them. Both for 100
iterations at 2/255 and 4/255 on 1,000 pictures is how fine-tuned CLIPs are compared: Schlarmann et al., Robust CLIP,
ICML 2024. An attack that fails proves nothing, so robust accuracy is an upper bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clipfast.data.datasets import Dataset
from clipfast.errors import InputError, ModelError
from clipfast.metrics.base import Columns, Figure, Protocol, figures
from clipfast.metrics.samples import OnError, batches, only_label
from clipfast.metrics.zero_shot import Templates, class_embeddings, template_texts
from clipfast.models.model import Model, Precision

# What rounding may add to a distance between pixels in 0..1, float32.
_SLACK = 1e-6
# The targeted loss divides by a difference of the first, third and fourth logit.
_LEAST_CLASSES = 4


class Classifier(nn.Module):
    """A zero-shot classifier of pixels, differentiable in them: (B, 3, H, W) in 0..1 -> logits (B, K).

    classes (K, E): unit text embeddings. The model's parameters are read and not held: none of them is trained by it.
    """

    def __init__(self, model: Model, classes: Tensor, precision: Precision = None):
        super().__init__()
        self.tower, _ = model.towers(precision)
        # A parameter, because attacks look there for the device.
        self.classes = nn.Parameter(classes, requires_grad=False)
        self.mean, self.std = (classes.new_tensor(v).view(3, 1, 1) for v in (model.spec.mean, model.spec.std))

    def forward(self, x: Tensor) -> Tensor:
        z = self.tower.encode((x - self.mean) / self.std)
        return self.tower.logit_scale * z @ self.classes.T


@dataclass(frozen=True)
class Robustness:
    """What the attacks on a model came to.

    columns: see `RobustAccuracy.measure`. seconds: all of it, decoding included. invalid: how often an attack gave
    something that is no picture within its radius (NaN where gradients are), which breaks nothing.
    """

    protocol: RobustAccuracy
    columns: Columns
    seconds: float
    invalid: int

    def figures(self) -> list[Figure]:
        """Clean accuracy, and robust accuracy at each radius, with bootstrap errors and intervals over pictures."""
        return figures(self.protocol, self.columns, seed=self.protocol.seed)


@dataclass(frozen=True)
class RobustAccuracy(Protocol):
    """`robust_accuracy`: the share of pictures that are classified rightly, clean and under attack.

    radii: how far each pixel may move, on the scale 0..1. steps: iterations of each attack. targets: how many of the
    nearest wrong classes the targeted attack is run towards, 0 for cross-entropy alone. count: of pictures at most,
    drawn by the seed where there are more. batch: pictures that are attacked together. templates: see `zero_shot`.

    A picture that is wrong within a radius is wrong within every larger one, so each radius attacks only what the
    smaller ones left. Random starts depend on seed and batch; an attacked picture's pixels are not rounded to 255.
    """

    radii: tuple[float, ...] = (2 / 255, 4 / 255)
    steps: int = 100
    targets: int = 9
    count: int = 1000
    batch: int = 50
    templates: Templates = "photo"
    seed: int = 0

    name: ClassVar[str] = "robust_accuracy"
    source: ClassVar[str] = "Croce and Hein, ICML 2020; Schlarmann et al., Robust CLIP, ICML 2024"

    def __post_init__(self) -> None:
        if not self.radii or not all(0 <= r <= 1 for r in self.radii) or sorted(set(self.radii)) != list(self.radii):
            raise InputError(f"radii must be one or more distances in 0..1, smaller ones first, not {self.radii}.")
        if min(self.steps, self.count, self.batch) < 1 or self.targets < 0:
            raise InputError("steps, count and batch must be at least 1, and targets at least 0.")
        if not isinstance(self.templates, str):
            object.__setattr__(self, "templates", tuple(self.templates))
        template_texts(self.templates)

    @property
    def figures(self) -> Mapping[str, str]:  # type: ignore[override]
        return dict.fromkeys(("clean", *(_title(radius) for radius in self.radii)), "higher")

    @property
    def runs(self) -> int:
        """How many attacks on a picture there are, each of `steps`: by cross-entropy and towards each target."""
        return len(self.radii) * (1 + self.targets)

    def check(self, dataset: Dataset) -> None:
        """Raises InputError where torchattacks is missing, or the data set's classes are, or are too few."""
        _attacks()
        if dataset.classes is None:
            raise InputError(
                f"{dataset.name} has no classes to choose from; it offers {', '.join(sorted(dataset.offers))}."
            )
        if self.targets and len(dataset.classes) < _LEAST_CLASSES:
            raise InputError(
                f"the targeted loss compares {_LEAST_CLASSES} classes, and {dataset.name} has {len(dataset.classes)}: "
                "give targets=0 to attack by cross-entropy alone."
            )

    def measure(self, model: Model, dataset: Dataset, **options: Any) -> Columns:
        """Columns of the attacked pictures: "number" in the data set, whether it is right "clean" and "robust 2/255".

        Arguments as for `attack`.
        """
        return self.attack(model, dataset, **options).columns

    @torch.inference_mode(False)
    @torch.no_grad()
    def attack(
        self,
        model: Model,
        dataset: Dataset,
        *,
        precision: Precision = None,
        on_error: OnError = "raise",
        progress: Callable[[int], None] | None = None,
    ) -> Robustness:
        """Attack pictures that have exactly one class; others are left out. The model stays as it is.

        progress: called with the number of attacks done since the last call, `runs` for each picture in the end.

        Raises InputError as `check` does and for a data set without such pictures; ModelError where no picture has
        finite logits; ImageError for a picture that cannot be read.
        """
        started = time.perf_counter()
        self.check(dataset)
        attacks = _attacks()
        assert dataset.classes is not None
        classes = class_embeddings(model, dataset.classes, self.templates, precision)
        classifier = Classifier(model, classes, precision)
        parts: list[Columns] = []
        finite, invalid = False, 0
        for numbers, x, y in self._batches(model, dataset, precision, on_error):
            x, y = x.to(classes.device), y.to(classes.device)
            finite = finite or bool(classifier(x).isfinite().all(1).any())
            columns, bad = self._attack(attacks, classifier, x, y, progress)
            parts.append({"number": torch.tensor(numbers, dtype=torch.float64), **columns})
            invalid += bad
        if not parts:
            raise InputError(f"{dataset.name} has no picture of exactly one class, and those are what is attacked.")
        if not finite:
            raise ModelError(f"no logit of {model.name} is finite: load intact weights.")
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return Robustness(self, whole, time.perf_counter() - started, invalid)

    def _batches(
        self, model: Model, dataset: Dataset, precision: Precision, on_error: OnError
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Numbers, pixels (b, 3, H, W) in 0..1 and labels (b,) of the pictures that are attacked together."""
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.seed))
        left = self.count
        waiting: list[tuple[int, Tensor, int]] = []
        for batch in batches(model, dataset, numbers=order.tolist(), precision=precision, on_error=on_error):
            for number, sample, pixels in zip(batch.numbers, batch.samples, batch.pixels, strict=True):
                label = only_label(sample)
                if label is None or not left:
                    continue
                if waiting and (len(waiting) == self.batch or waiting[0][1].shape != pixels.shape):
                    yield _together(waiting)
                    waiting = []
                waiting.append((number, pixels, label))
                left -= 1
            if not left:
                break
        if waiting:
            yield _together(waiting)

    def _attack(
        self,
        attacks: Sequence[Any],
        classifier: nn.Module,
        x: Tensor,
        y: Tensor,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[Columns, int]:
        """Columns (b,) of pictures x (b, 3, H, W) of the classes y (b,), and how many answers were no such pictures."""
        by_entropy, by_targets = attacks
        right = _right(classifier(x), y)
        columns, invalid = {"clean": right.double().cpu()}, 0
        classes = classifier(x[:1]).shape[1]
        for radius in self.radii:
            own = {"eps": radius, "steps": self.steps, "seed": self.seed}
            plan = [(by_entropy(classifier, loss="ce", **own), 1)]
            if self.targets:
                targeted = by_targets(classifier, n_classes=min(self.targets + 1, classes), **own)
                plan.append((targeted, self.targets))
            for attack, runs in plan:
                rows = right.nonzero()[:, 0]
                if len(rows):
                    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
                        found = attack(x[rows], y[rows])
                    # Believed is what is seen here, not what the attack says of itself.
                    inside = _inside(found, x[rows], radius)
                    right[rows] = ~inside | _right(classifier(found), y[rows])
                    invalid += int((~inside).sum())
                if progress is not None:
                    progress(runs * len(x))
            columns[_title(radius)] = right.double().cpu()
        return columns, invalid


def _attacks() -> tuple[Any, Any]:
    """torchattacks' APGD and targeted APGD. Raises InputError where it is missing."""
    try:
        from torchattacks import APGD, APGDT
    except ImportError as error:
        raise InputError("pictures are attacked by torchattacks: pip install 'clipfast[robust]'.") from error
    return APGD, APGDT


def _together(waiting: Sequence[tuple[int, Tensor, int]]) -> tuple[list[int], Tensor, Tensor]:
    numbers, pixels, labels = zip(*waiting, strict=True)
    return list(numbers), torch.stack(pixels).float() / 255, torch.tensor(labels)


def _right(logits: Tensor, y: Tensor) -> Tensor:
    """Which rows of logits (b, K) have their class y (b,) first; none that holds NaN or infinity has."""
    return logits.isfinite().all(1) & (logits.argmax(1) == y)


def _inside(found: Tensor, x: Tensor, radius: float) -> Tensor:
    """Which of the pictures found are pictures, and within the radius of x: (b,). NaN is neither."""
    moved = (found - x).abs().flatten(1).amax(1)
    return (moved <= radius + _SLACK) & (found.flatten(1).amin(1) >= 0) & (found.flatten(1).amax(1) <= 1)


def _title(radius: float) -> str:
    return f"robust {255 * radius:g}/255"
