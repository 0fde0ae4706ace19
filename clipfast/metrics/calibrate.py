"""A method's parameters chosen on one's own images, by a protocol that needs no truth about the method.

    found = calibrate("demo", open_dataset("scenes:1", limit=100), "mmel")
    found.best, found.difference, found.flags

Every setting of a grid is measured on one half of the images, every second one; the setting that does best there and
the defaults are then measured on the other half, and only that is reported as what the setting gains. The best of many
settings looks better than it is on the images that it was chosen by.

MMEL's paper searches its parameters on deletion and insertion, without its grid. Ours is `grid_of`: alpha, temperature
and theta. beta is not in it: what orders places is beta + alpha sigmoid(.), and that but for its scale alpha / beta.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from clipfast.data.datasets import Dataset, Sample
from clipfast.errors import InputError, nearest
from clipfast.methods import METHODS, build_method
from clipfast.metrics.base import Difference, Figure, Protocol, compare, figures
from clipfast.metrics.evaluate import Evaluator
from clipfast.metrics.evaluation import Evaluation, needed
from clipfast.metrics.registry import Side, build_protocol, entry_of, label, parse, spelled
from clipfast.metrics.zero_shot import default_templates
from clipfast.models.load import load
from clipfast.models.model import Model
from clipfast.versions import versions
from clipfast.view.files import write_file

FILE = "calibration.json"
_WITH_CLASSES, _WITHOUT = "deletion+insertion/rise:steps=10", "deletion+insertion/cosine:steps=10"
_PROBED = 2

Grid = Mapping[str, Sequence[Any]]


class Half(Dataset):
    """Every second sample of a data set, from the first (0) or the second (1) on."""

    def __init__(self, whole: Dataset, start: int, count: int):
        self.whole, self.start, self.count = whole, start, count
        self.name = f"{whole.name}, {('even', 'odd')[start]} samples"
        self.classes, self.offers = whole.classes, whole.offers

    def __len__(self) -> int:
        return (self.count - self.start + 1) // 2

    def _sample(self, index: int) -> Sample:
        return self.whole[self.start + 2 * index]


@dataclass(frozen=True)
class Objective(Protocol):
    """The one figure that settings are chosen by: insertion less deletion where `of` has both, else its first."""

    of: Protocol

    name: ClassVar[str] = "objective"

    @property
    def terms(self) -> tuple[str, ...]:
        """The figures of `of` that it is made of."""
        for figure in self.of.figures:
            other = figure.replace("deletion", "insertion")
            if figure != other and other in self.of.figures:
                return other, figure
        return (next(iter(self.of.figures)),)

    @property
    def figures(self) -> Mapping[str, str]:  # type: ignore[override]
        """Its name and direction."""
        return {" - ".join(self.terms): "higher" if len(self.terms) == 2 else self.of.figures[self.terms[0]]}

    def summary(self, columns: Mapping[str, Tensor]) -> dict[str, float]:
        found = self.of.summary(columns)
        value = found[self.terms[0]] - (found[self.terms[1]] if len(self.terms) == 2 else 0)
        return {next(iter(self.figures)): value}

    def figure(self, found: Evaluation, method: str) -> Figure:
        """Its value for a method, with error and interval."""
        table = found.tables[method][label(self.of)]
        return figures(self, needed(self.of, table.columns), groups=table.groups, seed=found.seed)[0]

    def difference(self, found: Evaluation, method: str, other: str) -> Difference:
        """How far its value for a method is above that for another, by paired bootstrap."""
        a, b = (found.tables[name][label(self.of)] for name in (method, other))
        columns = (needed(self.of, table.columns) for table in (a, b))
        return compare(self, *columns, groups=a.groups, seed=found.seed)[0]


@dataclass
class Calibration:
    """What a calibration found.

    method: as it was named. settings: by label, what each sets beside that; the first sets nothing. values: the
    objective of each on the half to choose by. best: the label that was chosen. reported: the objective of best and
    default on the other half; difference: of the two there, by paired bootstrap, None where the default is the best.
    """

    method: str
    objective: Objective
    settings: dict[str, dict[str, Any]]
    values: dict[str, Figure]
    best: str
    reported: dict[str, Figure]
    difference: Difference | None
    chosen_on: Evaluation
    reported_on: Evaluation

    @property
    def default(self) -> str:
        return next(iter(self.settings))

    @property
    def flags(self) -> str:
        """What `clipfast explain` takes for the best setting."""
        name, fixed = parse(self.method)
        parts = spelled(fixed | self.settings[self.best]).split(":")[1:]
        return " ".join([f"--method {name}", *(f"--set {part}" for part in parts)])

    def to_json(self) -> dict[str, Any]:
        """All but the rows."""
        of, found = self.objective.of, self.chosen_on
        return {
            "method": self.method,
            "model": found.model,
            "data": self.chosen_on.data.rsplit(",", 1)[0],
            "seed": found.seed,
            "protocol": {"name": entry_of(of)[0], "source": of.source, "parameters": of.parameters()},
            "objective": dict(self.objective.figures),
            "settings": [
                {"label": name, "parameters": own, **_numbers(self.values[name])} for name, own in self.settings.items()
            ],
            "best": self.best,
            "flags": self.flags,
            "reported": {name: _numbers(one) for name, one in self.reported.items()},
            "difference": None if self.difference is None else _numbers(self.difference),
            "samples": {"to choose by": self.chosen_on.samples, "to report by": self.reported_on.samples},
            "errors": self.chosen_on.errors | self.reported_on.errors,
            "versions": versions(),
        }

    def save(self, folder: str | Path) -> Path:
        """Write calibration.json, whole or not at all, and return its path."""
        text = json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False, indent=1)
        return write_file(Path(folder) / FILE, text.encode())


class Calibrator:
    """A calibration, checked and ready to run; arguments as for `calibrate`.

    Raises InputError for a method or parameter that there is not, a value that it cannot take, a grid without a second
    setting, and as `Evaluator`.
    """

    def __init__(
        self,
        model: Any,
        dataset: Dataset,
        method: str = "mmel",
        grid: Grid | None = None,
        protocol: str | Protocol | None = None,
        *,
        limit: int | None = None,
        out: str | Path | None = None,
        **options: Any,
    ):
        self.model: Model = load(model)
        self.method, self.out = method, out
        self.count = len(dataset) if limit is None else min(limit, len(dataset))
        if self.count < 2:
            raise InputError("calibrating takes two samples at least: one to choose by and one to report.")
        self.halves = Half(dataset, 0, self.count), Half(dataset, 1, self.count)
        if protocol is None:
            protocol = _WITH_CLASSES if "labels" in dataset.offers else _WITHOUT
        self.options = {"templates": default_templates(self.model, dataset)} | options
        side = entry_of(protocol if isinstance(protocol, Protocol) else build_protocol(protocol))[1].side
        self.settings = self._settings(grid, side)
        self.protocol = protocol
        self._choosing = self._evaluator(0, list(self.settings))
        self.objective = Objective(next(iter(self._choosing.protocols.values())))

    @property
    def fingerprint(self) -> str:
        """Of everything but the number of samples."""
        return self._choosing.fingerprint

    def _settings(self, grid: Grid | None, side: Side) -> dict[str, dict[str, Any]]:
        """By label what each setting sets, the default, nothing, first."""
        name, fixed = parse(self.method)
        default = build_method(name, fixed)
        grid = grid_of(name, self.model, side) if grid is None else grid
        known = METHODS[name].parameters()
        for parameter, values in grid.items():
            if parameter not in known:
                raise InputError(f"{name} has no parameter {parameter!r}: {nearest(parameter, known)}")
            if parameter in fixed or not values:
                raise InputError(f"the grid's {parameter} must have values, and must not be set in {self.method!r}.")
        found: dict[str, dict[str, Any]] = {self.method: {}}
        for values in itertools.product(*grid.values()):
            own = dict(zip(grid, values, strict=True))
            if build_method(name, fixed | own) != default:
                found[self.method + spelled(own)] = own
        if len(found) < 2:
            raise InputError(f"the grid holds nothing but {self.method} itself: give values other than the default.")
        return found

    def _evaluator(self, half: int, labels: Sequence[str], samples: int | None = None) -> Evaluator:
        _, fixed = parse(self.method)
        methods = {name: fixed | self.settings[name] for name in labels}
        out = None if samples else self.out
        return Evaluator(
            self.model, self.halves[half], methods, [self.protocol], out=out, limit=samples, **self.options
        )

    def left(self) -> int:
        """How many samples are to be measured, summed over settings; at most, as the best one may be the default."""
        choosing = self._choosing.left()
        return choosing + (2 * len(self.halves[1]) if choosing else self._reporting().left())

    def seconds(self) -> float:
        """About how long `left` will take here, from the default setting on the first samples, measured once more."""
        probe = [self._evaluator(0, [self.method], min(_PROBED, len(self.halves[0]))) for _ in range(2)]
        probe[0]()
        started = time.perf_counter()
        probe[1]()
        return (time.perf_counter() - started) / probe[1].count * self.left()

    @cached_property
    def _best(self) -> tuple[dict[str, Figure], str]:
        """Each setting's value on the half to choose by, and the best one's label."""
        found = self._choosing()
        values = {name: self.objective.figure(found, name) for name in self.settings}
        known = {name: one for name, one in values.items() if one.value == one.value}
        if not known:
            raise InputError(f"{label(self.objective.of)} says nothing of any sample of {found.data}.")
        return values, max(known, key=lambda name: known[name].value * (1 if known[name].better == "higher" else -1))

    def _reporting(self) -> Evaluator:
        return self._evaluator(1, list(dict.fromkeys((self.method, self._best[1]))))

    def __call__(self, progress: Callable[[int], None] | None = None) -> Calibration:
        """Measure what is left, and return what was found; progress: called with how much of `left` was done since."""
        chosen_on = self._choosing(progress)
        values, best = self._best
        reporting = self._reporting()
        reported_on = reporting(progress)
        reported = {name: self.objective.figure(reported_on, name) for name in reporting.methods}
        better = best != self.method
        return Calibration(
            method=self.method,
            objective=self.objective,
            settings=self.settings,
            values=values,
            best=best,
            reported=reported,
            difference=self.objective.difference(reported_on, best, self.method) if better else None,
            chosen_on=chosen_on,
            reported_on=reported_on,
        )


def grid_of(method: str, model: Model, side: Side = "image") -> Grid:
    """The settings of a method that are tried unless others are given. Raises InputError for a method without any."""
    if method != "mmel":
        raise InputError(
            f"there is no grid for {method}: give values of its parameters, "
            f"which are {', '.join(METHODS[method].parameters())}."
        )
    image, text = model.towers()
    depth = image.depth if side == "image" else text.depth
    # Layers alike, and the later ones more: softplus(theta) from 0.13 to 2.13.
    later = tuple(round(-2 + 4 * i / max(depth - 1, 1), 2) for i in range(depth))
    return {"alpha": (0.5, 1.0, 2.0, 4.0, 8.0), "temperature": (0.05, 0.1, 0.2), "theta": (1.0, later)}


def calibrate(
    model: Any,
    dataset: Dataset,
    method: str = "mmel",
    grid: Grid | None = None,
    protocol: str | Protocol | None = None,
    *,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> Calibration:
    """Choose a method's parameters on every second sample of a data set, and report what that gains on the others.

    model: what `clipfast.load` takes. method: a name, with parameters behind colons that stay as they are.
    grid: values to try by parameter, all combinations; `grid_of` where it is None. protocol: one, "deletion+insertion/
        rise:steps=10" where the data set has classes, and "deletion+insertion/cosine:steps=10" elsewhere.
    limit: of samples, both halves together. out: a folder for the rows, so that a stopped calibration goes on.
    progress: called with the number of samples measured since the last call, summed over settings.
    seed, batch, precision, resize, prompt, templates, shard: as for `evaluate`.

    Raises as `Calibrator`, and InputError where no sample can be used.
    """
    return Calibrator(model, dataset, method, grid, protocol, **options)(progress)


def _numbers(one: Figure | Difference) -> dict[str, float | None]:
    numbers = {name: getattr(one, name, None) for name in ("value", "error", "low", "high", "p")}
    return {name: v if v == v else None for name, v in numbers.items() if v is not None} | {"pairs": one.count}
