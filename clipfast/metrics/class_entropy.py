"""How alike a model finds its classes: the entropy of a classifier's output, over all classes and among like ones.

    H      = - sum_k p_k ln p_k                       p: a linear head's probabilities for one picture
    within = - sum_{k in G} q_k ln q_k                q_k = p_k / sum_{j in G} p_j,  G: the group of the picture's class

A classifier that tells dogs from cars but not a beagle from a basset has little entropy over all groups and much within
them: with groups, H = H(groups) + sum_G p(G) H(within G). The inter-class similarity of AFT (ICLR 2025), by which
fine-tuned towers are compared; the paper has no formula, so natural logarithms and shares of the largest possible
entropy are our reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clipfast.data.datasets import Dataset
from clipfast.errors import InputError, nearest
from clipfast.metrics.base import Columns, Protocol
from clipfast.metrics.probe import LinearHead, encode
from clipfast.metrics.samples import OnError
from clipfast.models.model import Model, Precision


def entropy(probabilities: Tensor) -> Tensor:
    """In nats, of rows (..., K) that sum to one: (...). What has no probability adds nothing."""
    return torch.special.entr(probabilities).sum(-1)


@dataclass(frozen=True)
class ClassEntropy(Protocol):
    """`class_entropy`: the mean entropy of a head's output, and of its part in the group of each sample's class.

    groups: names of classes by the name of their group, each class in one group at most; without them there is nothing
    within. A sample whose class is in no group, or alone in it, does not count there (NaN).

    entropy, within: in nats; "entropy share" and "within share": of ln K and of ln |G|, so that sets with different
    numbers of classes can be compared. "group mass": the probability that all of the sample's group gets.
    """

    groups: Mapping[str, Sequence[str]] | None = None

    name: ClassVar[str] = "class_entropy"
    source: ClassVar[str] = "AFT, ICLR 2025: inter-class similarity, our reading"
    figures: ClassVar[Mapping[str, str]] = {
        "entropy": "lower",
        "entropy share": "lower",
        "within": "lower",
        "within share": "lower",
        "group mass": "higher",
    }

    def __post_init__(self) -> None:
        if self.groups is None:
            return
        groups = {group: tuple(names) for group, names in self.groups.items()}
        object.__setattr__(self, "groups", groups)
        seen: dict[str, str] = {}
        for group, names in groups.items():
            for name in names:
                if name in seen:
                    raise InputError(f"{name!r} is in the groups {seen[name]!r} and {group!r}: give each class one.")
                seen[name] = group

    @torch.inference_mode(False)
    @torch.no_grad()
    def measure(
        self,
        model: Model,
        dataset: Dataset,
        head: LinearHead,
        *,
        precision: Precision = None,
        on_error: OnError = "raise",
        progress: Callable[[int], None] | None = None,
    ) -> Columns:
        """Columns of the samples of exactly one class; head: a probe (`fit_probe`) or `zero_shot_head`.

        Raises InputError for a head of other classes than the data set's, and as `probe.encode` does.
        """
        if dataset.classes != head.classes:
            raise InputError(f"the head must have the classes of {dataset.name}, in the same order.")
        found = encode(model, dataset, precision=precision, on_error=on_error, progress=progress)
        return self.columns(head.probabilities(found.z), found.labels, head.classes)

    def columns(self, probabilities: Tensor, labels: Tensor, classes: Sequence[str]) -> Columns:
        """Columns of any classifier's probabilities (N, K) and the samples' labels (N,).

        Raises InputError for shapes that do not belong together, rows that do not sum to one, and a name in a group
        that is no class.
        """
        p = probabilities.detach().double().cpu()
        if p.ndim != 2 or p.shape != (len(labels), len(classes)):
            raise InputError(
                f"probabilities must be ({len(labels)}, {len(classes)}), a row a sample and a column a class, "
                f"not {tuple(p.shape)}."
            )
        if not bool((p >= 0).all()) or not bool(((p.sum(1) - 1).abs() < 1e-3).all()):
            raise InputError("probabilities must be at least 0 and sum to one in every row: pass the softmax.")
        if len(classes) < 2:
            raise InputError(f"two or more classes can be like one another, not {len(classes)}.")
        over_all = entropy(p)
        member = self._member(classes)[labels.cpu()]
        alike = torch.where(member, p, 0)
        mass = alike.sum(1)
        sizes = member.sum(1)
        # Where a group has no probability at all, none of its classes is likelier than another.
        inside = torch.where(mass[:, None] > 0, alike / mass[:, None], member / sizes[:, None])
        within = torch.where(sizes > 1, entropy(torch.where(member, inside, 0)), torch.nan)
        return {
            "entropy": over_all,
            "entropy share": over_all / math.log(len(classes)),
            "within": within,
            "within share": within / sizes.double().log(),
            "group mass": torch.where(sizes > 0, mass, torch.nan),
        }

    def _member(self, classes: Sequence[str]) -> Tensor:
        """Which classes are in the group of each class, (K, K) bool; none for a class without group."""
        at = {name: k for k, name in enumerate(classes)}
        member = torch.zeros(len(classes), len(classes), dtype=torch.bool)
        for group, names in (self.groups or {}).items():
            for name in names:
                if name not in at:
                    raise InputError(f"the group {group!r} has {name!r}, which is no class: {nearest(name, classes)}")
            rows = torch.tensor([at[name] for name in names], dtype=torch.long)
            member[rows[:, None], rows] = True
        return member
