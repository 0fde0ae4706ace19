"""Figures over samples: means, their errors and intervals, and paired differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from clipfast.errors import InputError
from clipfast.metrics.base import Protocol, compare, figures


@dataclass(frozen=True)
class Averaged(Protocol):
    threshold: float = 0.5
    name: ClassVar = "averaged"
    source: ClassVar = "this test"
    figures: ClassVar = {"hit": "higher"}


class Ratio(Protocol):
    name: ClassVar = "ratio"
    source: ClassVar = "this test"
    figures: ClassVar = {"share": "higher"}

    def summary(self, columns):
        return {"share": float(columns["inside"].sum() / columns["all"].sum())}


def normal(count: int, mean: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + torch.randn(count, dtype=torch.float64, generator=generator)


def test_a_mean_and_its_standard_error() -> None:
    column = normal(400, 2.0, 1)
    (found,) = figures(Averaged(), {"hit": column})
    assert found.value == pytest.approx(float(column.mean()))
    assert found.error == pytest.approx(float(column.std()) / 20, rel=0.1)
    assert found.low == pytest.approx(found.value - 1.96 * found.error, abs=0.02)
    assert found.high == pytest.approx(found.value + 1.96 * found.error, abs=0.02)
    assert (found.count, found.better) == (400, "higher")
    assert figures(Averaged(), {"hit": column}) == figures(Averaged(), {"hit": column})


def test_samples_that_do_not_count_are_left_out() -> None:
    column = torch.tensor([1.0, torch.nan, 0.0, torch.nan], dtype=torch.float64)
    (found,) = figures(Averaged(), {"hit": column})
    assert found.value == 0.5


def test_a_ratio_of_sums_is_resampled_as_one() -> None:
    whole = torch.tensor([1.0, 1.0, 98.0], dtype=torch.float64)
    (found,) = figures(Ratio(), {"inside": torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64), "all": whole})
    assert found.value == pytest.approx(0.02)
    assert found.low == 0.0 and found.high > 0.02


def test_paired_samples_see_what_unpaired_ones_would_not() -> None:
    base = 10 * normal(200, 0.0, 2)
    better = base + 0.2 + 0.1 * normal(200, 0.0, 3)
    (found,) = compare(Averaged(), {"hit": better}, {"hit": base})
    assert 0.15 < found.low < found.value < found.high < 0.25
    assert found.p == 1 / 2000
    (back,) = compare(Averaged(), {"hit": base}, {"hit": better})
    assert back.value == pytest.approx(-found.value)
    (same,) = compare(Averaged(), {"hit": base}, {"hit": base})
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def test_what_does_not_pair_is_refused() -> None:
    with pytest.raises(InputError, match="there are 2 and 3"):
        compare(Averaged(), {"hit": torch.zeros(2)}, {"hit": torch.zeros(3)})
    with pytest.raises(InputError, match="at least one sample"):
        figures(Averaged(), {"hit": torch.zeros(0)})
    with pytest.raises(InputError, match="one value a sample"):
        figures(Averaged(), {"hit": torch.zeros(2), "more": torch.zeros(3)})


def test_parameters_are_what_is_printed() -> None:
    assert Averaged(0.3).parameters() == {"threshold": 0.3}


def test_rows_of_one_sample_are_drawn_together() -> None:
    """Copies of a row say nothing new: the error is that of the samples, not of the rows."""
    column = normal(200, 1.0, 5)
    (once,) = figures(Averaged(), {"hit": column})
    copied = {"hit": column.repeat_interleave(3)}
    (grouped,) = figures(Averaged(), copied, groups=torch.arange(200).repeat_interleave(3) * 7)
    assert grouped.value == pytest.approx(once.value)
    assert grouped.error == pytest.approx(once.error)
    (rows,) = figures(Averaged(), copied)
    assert rows.error < 0.7 * grouped.error
    with pytest.raises(InputError, match="which sample"):
        figures(Averaged(), copied, groups=torch.arange(200))


def test_groups_of_several_sizes() -> None:
    """Sums over drawn groups, against a loop over them."""
    sizes = torch.tensor([1, 3, 2])
    groups = torch.arange(3).repeat_interleave(sizes)
    column = torch.tensor([1.0, 10.0, 10.0, 10.0, 100.0, 100.0], dtype=torch.float64)
    (found,) = figures(Averaged(), {"hit": column}, groups=groups, resamples=4000)
    draws = [
        column[torch.cat([torch.nonzero(groups == g)[:, 0] for g in (a, b, c)])].mean()
        for a in range(3)
        for b in range(3)
        for c in range(3)
    ]
    assert found.error == pytest.approx(float(torch.stack(draws).std(correction=0)), rel=0.05)
