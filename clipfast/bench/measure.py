"""The whole benchmark: check each path against float64, then time it in turn with the bare encode."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from clipfast.bench.cases import CHECKED, Setting, bound, relative
from clipfast.bench.memory import peaks
from clipfast.bench.peers import PEERS, peers_of
from clipfast.bench.report import MODEL, OURS, Report, Row, merged_encodes
from clipfast.bench.timer import paired, seconds
from clipfast.bench.work import Product, gpu_peak, joules, multiplications
from clipfast.models.model import Model, Precision
from clipfast.versions import machine, versions

FEWEST, MOST = 5, 50
_PEER_PROMPTS = 10


@dataclass(frozen=True)
class Plan:
    """What is to be timed: every combination.

    rounds: of each group of paths that take turns; None takes as many as fit into `budget` seconds, 5 to 50. peers:
    whether installed libraries are timed, too, for 10 prompts at most. source: the model's name and weights tag, from
    which a fresh process can load it to measure memory on the CPU, or None.
    """

    methods: Sequence[str]
    batches: Sequence[int]
    prompts: Sequence[int]
    precisions: Sequence[Precision] = (None,)
    backends: Sequence[str] = ("auto",)
    rounds: int | None = None
    budget: float = 1.0
    peers: bool = True
    source: tuple[str, str | None] | None = None

    def groups(self) -> list[tuple[int, Precision, str, str]]:
        """Batch, precision, backend and method of each group of paths that take turns."""
        return list(product(self.batches, self.precisions, self.backends, self.methods))


@dataclass
class _Path:
    row: Row
    call: Callable[[], Any]


def measure(model: Model, plan: Plan, advance: Callable[[int], None] = lambda done: None) -> Report:
    """Run the plan. `advance` is called with 1 after each group.

    A path that fails, by an error or by its maps, has a row with the reason and no time.
    """
    started = time.perf_counter()
    setting = Setting.of(model, max(plan.batches), max(plan.prompts))
    rows: list[Row] = []
    encoded: set[tuple[int, Precision]] = set()
    for batch, precision, by, method in plan.groups():
        found = _group(setting, plan, batch, precision, by, method, count_encode=(batch, precision) not in encoded)
        if any(row.by == MODEL for row in found):
            encoded.add((batch, precision))
        rows += found
        advance(1)
    rows = merged_encodes(rows)
    if setting.x.device.type == "cpu" and plan.source is not None:
        rows = _with_memory(rows, plan.source, setting)
    settings: dict[str, Any] = {
        **{name: list(getattr(plan, name)) for name in ("methods", "batches", "prompts", "precisions", "backends")},
        **{name: getattr(plan, name) for name in ("rounds", "budget", "peers")},
        "size": list(model.spec.size),
    }
    about = versions(*sorted({peer.distribution for peer in PEERS if peer.distribution is not None}))
    spent = time.perf_counter() - started
    return Report(model.name, str(setting.x.device), machine(), about, settings, tuple(rows), spent)


def _group(
    setting: Setting, plan: Plan, batch: int, precision: Precision, by: str, method: str, *, count_encode: bool
) -> list[Row]:
    """The rows of one method for all numbers of prompts, its peers', and the encode's beside them."""
    dtype = setting.dtype(precision)
    named = str(dtype).removeprefix("torch.")
    encode = setting.encode(precision, batch)
    paths: list[_Path] = []
    for prompts in plan.prompts:
        blank = Row(method, OURS, batch, prompts, named, by)
        make = _explaining(setting, method, prompts, precision, by, batch)
        paths.append(_checked(blank, make, setting, method, bound(method, dtype)))
        if plan.peers and by == plan.backends[0] and prompts <= _PEER_PROMPTS and dtype.itemsize >= 4:
            paths += _peers(blank, setting, dtype)
    right = [path for path in paths if path.row.reason is None]
    if not right:
        return [path.row for path in paths]
    device = setting.x.device
    roof = Product.on(device, dtype)
    functions: dict[str, Callable[[], object]] = {"encode": encode, "product": roof}
    functions |= {str(i): path.call for i, path in enumerate(right)}
    rounds = plan.rounds or _rounds(functions, plan.budget)
    times = {name: timing.seconds for name, timing in paired(functions, rounds, warmup=1).items()}
    beside: dict[str, Any] = {
        "encode": times["encode"],
        "product": times["product"],
        "product_multiplications": roof.multiplications,
    }
    bare = Row("encode", MODEL, batch, 0, named, "auto", seconds=times["encode"], **beside)
    rows = [_costs(bare, encode, device) if count_encode else bare]
    timed = {id(path): times[str(i)] for i, path in enumerate(right)}
    for path in paths:
        row = path.row
        if id(path) in timed:
            row = replace(row, seconds=timed[id(path)], **beside)
            row = _costs(row, path.call, device) if row.by == OURS else row
        rows.append(row)
    return rows


def _explaining(setting: Setting, *case: Any) -> Callable[[], Callable[[], Tensor]]:
    return lambda: setting.explain(*case)


def _peers(ours: Row, setting: Setting, dtype: torch.dtype) -> list[_Path]:
    tower, _ = setting.model.towers()
    x, texts = setting.x[: ours.batch].to(dtype), setting.texts[: ours.prompts]
    found = []
    for peer in peers_of(ours.method, tower):

        def make(peer: Any = peer) -> Callable[[], Tensor]:
            return peer.call(setting.module(dtype), x, texts, ours.method)

        def shown(maps: Tensor, peer: Any = peer) -> Tensor:
            return peer.shown(maps, setting.model.spec.size)

        row = replace(ours, by=peer.label, backend=ours.backend)
        found.append(_checked(row, make, setting, peer.ours(ours.method), bound(ours.method, dtype), shown))
    return found


def _checked(
    row: Row,
    make: Callable[[], Callable[[], Tensor]],
    setting: Setting,
    method: str,
    limit: float,
    shown: Callable[[Tensor], Tensor] = lambda maps: maps,
) -> _Path:
    """The path with its error, and the reason where there is to be no speed of it."""
    call: Callable[[], Any] = lambda: None  # noqa: E731
    try:
        call = make()
        found = call()[:CHECKED]
        error = relative(found, shown(setting.exact(method, row.batch, row.prompts)))
    except Exception as failure:
        # A library or a backend may raise anything; the other paths are still worth their time.
        words = " ".join(str(failure).split()) or type(failure).__name__
        return _Path(replace(row, bound=limit, reason=words.rstrip(".")[:300]), call)
    if error != error:
        return _Path(replace(row, bound=limit, reason="its maps are all zero or not finite: nothing is checked"), call)
    right = error <= limit
    reason = None if right else f"its maps are wrong, {error:.1e} from the float64 definition, where {limit:g} may be"
    return _Path(replace(row, error=error, bound=limit, reason=reason), call)


def _rounds(functions: dict[str, Callable[[], object]], budget: float) -> int:
    once = sum(seconds(function) for function in functions.values())
    return max(FEWEST, min(MOST, int(budget / once)))


def _costs(row: Row, call: Callable[[], object], device: torch.device) -> Row:
    """The row with what a call multiplies and, on a GPU, its memory and energy."""
    row = replace(row, multiplications=multiplications(call))
    if device.type == "cuda":
        row = replace(row, memory=gpu_peak(call, device), joules=joules(call, device))
    return row


def _with_memory(rows: list[Row], source: tuple[str, str | None], setting: Setting) -> list[Row]:
    """The rows with what a call of the model's or of ours adds to the memory of a fresh process."""
    asked = [row for row in rows if row.timed and row.by in (OURS, MODEL)]
    own = str(setting.dtype(None)).removeprefix("torch.")
    cases = [
        {
            "method": None if row.by == MODEL else row.method,
            "batch": row.batch,
            "prompts": max(row.prompts, 1),
            "precision": None if row.precision == own else row.precision,
            "backend": row.backend,
        }
        for row in asked
    ]
    found = peaks(*source, cases)
    if found is None:
        return rows
    by_key = {row.key: added for row, added in zip(asked, found, strict=True)}
    return [replace(row, memory=by_key.get(row.key)) for row in rows]
