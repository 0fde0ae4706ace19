"""What every protocol is: a name, fixed parameters, a few numbers a sample, and a way to sum them up.

A protocol measures samples one batch at a time and gives columns, one value a sample; `summary` turns columns into the
protocol's figures. Means, standard errors, bootstrap intervals and paired tests all work on columns, so a protocol that
divides sums over a data set (`segmentation/chefer`) gets them as honestly as one that averages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from clipfast.errors import InputError

Columns = dict[str, Tensor]
"""Values by name, (N,) float64 on the CPU; NaN where a sample does not count (an empty mask)."""


class Protocol:
    """The base of all protocols: frozen dataclasses whose fields are their parameters.

    name: as in reports, "family/variant". source: the paper or code whose protocol it is. figures: what `summary`
    gives, and whether more or less of it is better.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    figures: ClassVar[Mapping[str, str]]

    def summary(self, columns: Mapping[str, Tensor]) -> dict[str, float]:
        """The protocol's figures over all samples; by default each column's mean, samples that are NaN left out."""
        return {figure: float(columns[figure].nanmean()) for figure in self.figures}

    def parameters(self) -> dict[str, Any]:
        """The parameters, to be printed beside every number."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Figure:
    """One number of a protocol over N samples. error: its standard error; low and high: a bootstrap interval."""

    name: str
    value: float
    error: float
    low: float
    high: float
    count: int
    better: str


def figures(
    protocol: Protocol,
    columns: Mapping[str, Tensor],
    *,
    groups: Tensor | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> list[Figure]:
    """The protocol's figures with their bootstrap standard errors and percentile intervals (Efron, 1979).

    columns: (N,) each. Samples, not pixels or prompts, are what is drawn again. groups (N,) whole numbers: which rows
    are of one sample, such as the prompts of one image, and are drawn together; by default each row is its own.
    Raises InputError for no samples.
    """
    count = _count(columns)
    values = protocol.summary(columns)
    drawn = [protocol.summary(_take(columns, rows)) for rows in _draws(count, resamples, seed, groups)]
    tail = (1 - level) / 2
    found = []
    for name, value in values.items():
        spread = torch.tensor([one[name] for one in drawn], dtype=torch.float64)
        spread = spread[spread.isfinite()]
        low, high = (float(spread.quantile(at)) for at in (tail, 1 - tail)) if len(spread) else (torch.nan, torch.nan)
        error = float(spread.std()) if len(spread) > 1 else torch.nan
        found.append(Figure(name, value, error, low, high, count, protocol.figures[name]))
    return found


@dataclass(frozen=True)
class Difference:
    """How much one explanation's figure is above another's on the same samples.

    low and high: a paired bootstrap interval; p: its two-sided level, the share of resamples on the other side of zero,
    doubled, and never below 1 / resamples.
    """

    name: str
    value: float
    low: float
    high: float
    p: float
    count: int


def compare(
    protocol: Protocol,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    *,
    groups: Tensor | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> list[Difference]:
    """The differences a - b, by paired bootstrap: both explanations are drawn on the same samples each time.

    groups: as for `figures`.

    Raises InputError where a and b do not hold the same number of samples.
    """
    count = _count(a)
    if _count(b) != count:
        raise InputError(f"paired samples are needed: there are {count} and {_count(b)}.")
    first, second = protocol.summary(a), protocol.summary(b)
    drawn = []
    for rows in _draws(count, resamples, seed, groups):
        one, other = protocol.summary(_take(a, rows)), protocol.summary(_take(b, rows))
        drawn.append({name: one[name] - other[name] for name in one})
    tail = (1 - level) / 2
    found = []
    for name in first:
        spread = torch.tensor([one[name] for one in drawn], dtype=torch.float64)
        spread = spread[spread.isfinite()]
        if not len(spread):
            found.append(Difference(name, first[name] - second[name], torch.nan, torch.nan, torch.nan, count))
            continue
        below = float(((spread < 0) + 0.5 * (spread == 0)).double().mean())
        p = min(1.0, max(2 * min(below, 1 - below), 1 / resamples))
        low, high = (float(spread.quantile(at)) for at in (tail, 1 - tail))
        found.append(Difference(name, first[name] - second[name], low, high, p, count))
    return found


def _count(columns: Mapping[str, Tensor]) -> int:
    lengths = {len(column) for column in columns.values()}
    if len(lengths) != 1 or not min(lengths):
        raise InputError(f"columns must hold one value a sample, and at least one sample; their lengths are {lengths}.")
    return lengths.pop()


def _take(columns: Mapping[str, Tensor], rows: Tensor) -> Columns:
    return {name: column[rows] for name, column in columns.items()}


def _draws(count: int, resamples: int, seed: int, groups: Tensor | None) -> Iterator[Tensor]:
    """The rows of each resample: those of as many groups as there are, drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    if groups is None:
        groups = torch.arange(count)
    if groups.shape != (count,):
        raise InputError(f"groups must say of each of {count} rows which sample it is of, not {tuple(groups.shape)}.")
    order, sizes = groups.argsort(stable=True), groups.unique(return_counts=True)[1]
    starts = sizes.cumsum(0) - sizes
    for _ in range(resamples):
        drawn = torch.randint(len(sizes), (len(sizes),), generator=generator)
        wanted = sizes[drawn]
        behind = wanted.cumsum(0) - wanted
        yield order[torch.arange(int(wanted.sum())) + (starts[drawn] - behind).repeat_interleave(wanted)]
