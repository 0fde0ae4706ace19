"""Two benchmarks of one model: which paths cost more encodes than they did, beyond what the rounds scatter."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clipfast.bench.report import OURS, Report, Row
from clipfast.errors import InputError

_DRAWS, _LEVEL = 4000, 0.99

Verdict = Literal["slower", "faster", "same", "wrong"]


@dataclass(frozen=True)
class Change:
    """One path, before and after: `factor` is the ratio to the encode after over that before, low to high its
    bootstrap interval. "wrong": its maps were right before, and are not any more."""

    method: str
    batch: int
    prompts: int
    precision: str
    backend: str
    before: float
    after: float | None
    factor: float | None
    low: float | None
    high: float | None
    verdict: Verdict

    @property
    def regressed(self) -> bool:
        return self.verdict in ("slower", "wrong")


def compare(old: Report, new: Report, tolerance: float = 0.05) -> list[Change]:
    """The paths of ours that both have and that `old` could time.

    Ratios to the encode of the same round are compared, so that another clock or load does not matter. A path is slower
    where the whole 99 % interval of the factor, from medians of resampled rounds of both runs, lies above 1 +
    tolerance; two runs of one code differ by some percent that no single run can see.

    Raises InputError for reports of two models or devices, or with no path in common.
    """
    if (old.model, old.device) != (new.model, new.device):
        raise InputError(
            f"{old.model} on {old.device} and {new.model} on {new.device} are two things: compare runs of one."
        )
    before = {row.key: row for row in old.rows if row.by == OURS and row.timed}
    found = [_change(before[row.key], row, tolerance) for row in new.rows if row.key in before]
    if not found:
        raise InputError(
            "the two runs have timed nothing in common: give the same methods, batches, prompts, precisions and "
            "backends."
        )
    return found


def _change(old: Row, new: Row, tolerance: float) -> Change:
    names = {f.name for f in dataclasses.fields(Change)} & {f.name for f in dataclasses.fields(Row)}
    own = {name: getattr(new, name) for name in names}
    a, b = np.array(old.ratios), np.array(new.ratios)
    before = float(np.median(a))
    if not new.timed:
        return Change(**own, before=before, after=None, factor=None, low=None, high=None, verdict="wrong")
    # From the same seed each time: a verdict must not depend on chance.
    draw = np.random.default_rng(0)
    medians = [np.median(draw.choice(rounds, (_DRAWS, len(rounds))), axis=1) for rounds in (a, b)]
    low, high = (float(q) for q in np.quantile(medians[1] / medians[0], ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2)))
    verdict: Verdict = "slower" if low > 1 + tolerance else "faster" if high < 1 / (1 + tolerance) else "same"
    after = float(np.median(b))
    return Change(**own, before=before, after=after, factor=after / before, low=low, high=high, verdict=verdict)
