"""A linear probe: multinomial logistic regression on what a frozen tower makes of labelled pictures.

    p(k | z) = softmax_k (w_k . z + b_k)
    w, b     = arg min  mean over samples of -ln p(label | z)  +  l2 / 2 |w|^2         z centred, of unit variance

z are the unit embeddings, so that a class of the probe is a direction in the space of texts, and an explainer maps it
like one: `explainer(images, probe.directions)`. Alain and Bengio, Understanding intermediate layers using linear
classifier probes, ICLR workshop 2017; the strength of the penalty is chosen on samples that are held out, as Radford et
al., CLIP, ICML 2021, do (section 3.2; they probe one layer below the projection).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.data.datasets import Dataset
from clipfast.errors import InputError
from clipfast.metrics.samples import OnError, batches, only_label
from clipfast.metrics.zero_shot import Templates, class_embeddings
from clipfast.models.model import Model, Precision

L2 = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""The strengths of the penalty that are tried where none is given, strongest first."""


@dataclass(frozen=True)
class Encoded:
    """Samples of one class each, as a frozen tower sees them.

    z (N, E): unit embeddings. labels (N,). numbers (N,): of the samples in the data set. classes: the K names.
    """

    z: Tensor
    labels: Tensor
    numbers: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Tensor) -> Encoded:
        """The samples of some rows."""
        return Encoded(self.z[rows], self.labels[rows], self.numbers[rows], self.classes)


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier of unit embeddings: logits = z weight^T + bias.

    weight (K, E), bias (K,). classes: the K names. l2: the penalty it was fitted with, None where it was not fitted.
    """

    weight: Tensor
    bias: Tensor
    classes: list[str] = field(repr=False)
    l2: float | None = None

    def logits(self, z: Tensor) -> Tensor:
        """(N, K) of unit embeddings (N, E)."""
        return F.linear(z.to(self.weight), self.weight, self.bias)

    def probabilities(self, z: Tensor) -> Tensor:
        """(N, K), rows that sum to one."""
        return self.logits(z).softmax(-1)

    def hits(self, z: Tensor, labels: Tensor) -> Tensor:
        """Which samples the head gives their own label, (N,) bool; of equally likely classes the lower one counts."""
        return self.logits(z).argmax(-1).cpu() == labels.cpu()

    def accuracy(self, encoded: Encoded) -> float:
        """The share of samples that the head gives their own label."""
        return float(self.hits(encoded.z, encoded.labels).double().mean())

    @property
    def directions(self) -> Tensor:
        """Unit directions of the classes, (K, E): what an explainer takes as texts.

        A vector that is added to all classes' weights changes no probability, so the weights' mean is taken out first.
        """
        return F.normalize(self.weight - self.weight.mean(0), dim=-1)


def encode(
    model: Model,
    dataset: Dataset,
    *,
    precision: Precision = None,
    on_error: OnError = "raise",
    progress: Callable[[int], None] | None = None,
) -> Encoded:
    """The embeddings of all samples that have exactly one class; others are left out.

    Made once and kept for as long as model and data set live, and made anew when the model's weights change: do not
    write into them. progress: called with the number of samples done since the last call.

    Raises InputError for a data set without classes or without such samples, ImageError as `samples.batches` does.
    """
    if dataset.classes is None:
        raise InputError(f"{dataset.name} has no classes to tell apart; it offers {', '.join(sorted(dataset.offers))}.")
    tower, _ = model.towers(precision)
    held = _cache.setdefault(model, WeakKeyDictionary()).setdefault(dataset, {})
    kept = held.get((precision, on_error))
    if kept is None or kept[0] is not tower:
        found = _encode(model, dataset, precision, on_error, progress)
        held[precision, on_error] = kept = (tower, found)
    return kept[1]


_cache: WeakKeyDictionary[Model, WeakKeyDictionary[Dataset, dict[Any, tuple[Any, Encoded]]]] = WeakKeyDictionary()


@torch.inference_mode(False)
@torch.no_grad()
def _encode(
    model: Model, dataset: Dataset, precision: Precision, on_error: OnError, progress: Callable[[int], None] | None
) -> Encoded:
    tower, _ = model.towers(precision)
    embeddings, labels, numbers = [], [], []
    for batch in batches(model, dataset, precision=precision, on_error=on_error, progress=progress):
        z = tower.encode(batch.inputs(model, precision)).cpu()
        for row, number, sample in zip(z, batch.numbers, batch.samples, strict=True):
            if (label := only_label(sample)) is not None:
                embeddings.append(row)
                labels.append(label)
                numbers.append(number)
    if not embeddings:
        raise InputError(f"{dataset.name} has no sample of exactly one class, which is what a probe learns from.")
    assert dataset.classes is not None
    return Encoded(torch.stack(embeddings), torch.tensor(labels), torch.tensor(numbers), dataset.classes)


def fit_probe(encoded: Encoded, *, l2: float | None = None, held: float = 0.2, seed: int = 0) -> LinearHead:
    """The linear probe of some samples, fitted on all of them, as a head of float64.

    l2: the strength of the penalty. Unless given, it is the one of `L2` with the least cross-entropy on a share `held`
    of each class's samples, drawn by `seed`, after a fit on the others.

    Raises InputError for fewer than two classes, a class without samples, NaN, a penalty that is not positive, or where
    nothing can be held out, and where scikit-learn is missing.
    """
    _check(encoded, l2)
    if l2 is None:
        fitted, kept = hold_out(encoded.labels, held, seed)
        if not len(kept):
            raise InputError("no class has two samples, so none can be held out to choose the penalty by: give l2=.")
        l2 = _chosen(encoded.select(fitted), encoded.select(kept)).l2
        assert l2 is not None
    return _Problem(encoded).solve(l2)


def fit_held_out(encoded: Encoded, *, held: float = 0.2, seed: int = 0) -> LinearHead:
    """The probe of `fit_probe` before it is fitted again: on all samples but those that chose its penalty.

    Logistic regression has one solution, so this is how a seed makes another one of it. Raises as `fit_probe` does.
    """
    _check(encoded, None)
    fitted, kept = hold_out(encoded.labels, held, seed)
    if not len(kept):
        raise InputError("no class has two samples, so none can be held out to choose the penalty by.")
    return _chosen(encoded.select(fitted), encoded.select(kept))


def zero_shot_head(
    model: Model, names: Sequence[str], templates: Templates = "photo", precision: Precision = None
) -> LinearHead:
    """The model's own classifier as a head: logit scale x the classes' unit embeddings, as in `zero_shot`.

    Raises as `class_embeddings` does.
    """
    tower, _ = model.towers(precision)
    classes = class_embeddings(model, names, templates, precision)
    return LinearHead(tower.logit_scale * classes, classes.new_zeros(len(classes)), list(names))


def hold_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows (fitted, held out): of each class this share, rounded, but at least one where it has two, drawn by the seed.

    Raises InputError for a share that is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise InputError(f"the share that is held out must be between 0 and 1, not {share}.")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        own = order[labels[order] == label]
        out[own[: min(max(1, round(share * len(own))), len(own) - 1)]] = True
    return (~out).nonzero()[:, 0], out.nonzero()[:, 0]


def _chosen(fitted: Encoded, kept: Encoded) -> LinearHead:
    """The head of the penalty with the least cross-entropy on samples that were kept from it."""
    problem = _Problem(fitted)
    heads = [problem.solve(l2) for l2 in L2]
    losses = [float(F.cross_entropy(head.logits(kept.z), kept.labels)) for head in heads]
    return heads[losses.index(min(losses))]


def _check(encoded: Encoded, l2: float | None) -> None:
    counts = torch.bincount(encoded.labels, minlength=len(encoded.classes))
    if len(encoded.classes) < 2:
        raise InputError(f"a probe tells two or more classes apart, not {len(encoded.classes)}.")
    if not counts.all():
        lacking = [name for name, count in zip(encoded.classes, counts.tolist(), strict=True) if not count]
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise InputError(
            f"a probe needs a sample of every class, and there is none of {', '.join(lacking[:3])}{more}: "
            "give more samples."
        )
    if l2 is not None and not 0 < l2 < float("inf"):
        raise InputError(f"l2={l2} must be positive and finite.")
    if not bool(encoded.z.isfinite().all()):
        raise InputError("the embeddings hold NaN or infinite values, so nothing can be fitted to them.")


class _Problem:
    """Samples, centred and scaled to unit variance, and solutions for one penalty after the other."""

    def __init__(self, encoded: Encoded):
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise InputError("a linear probe is fitted by scikit-learn: pip install 'clipfast[metrics]'.") from error
        self.kind = LogisticRegression
        z = encoded.z.double()
        self.mean = z.mean(0)
        # One scale for all dimensions, so that the penalty is that of the embeddings' own geometry.
        self.scale = float((z - self.mean).square().mean().sqrt()) or 1.0
        self.x = ((z - self.mean) / self.scale).numpy()
        self.labels, self.classes = encoded.labels.numpy(), encoded.classes

    def solve(self, l2: float) -> LinearHead:
        pair = len(self.classes) == 2
        # Of two classes scikit-learn fits w_1 - w_0 alone, whose square is twice that of both.
        strength = l2 / 2 if pair else l2
        solver = self.kind(C=1 / (strength * len(self.labels)), max_iter=5000, tol=1e-5)
        solver.fit(self.x, self.labels)
        weight, bias = torch.from_numpy(solver.coef_), torch.from_numpy(solver.intercept_)
        if pair:
            weight, bias = torch.cat((-weight, weight)) / 2, torch.cat((-bias, bias)) / 2
        weight = weight / self.scale
        return LinearHead(weight, bias - weight @ self.mean, self.classes, l2)
