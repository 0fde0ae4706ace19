"""`clipfast eval --calibrate METHOD`: the method's parameters that do best on one's own images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table
from rich.text import Text

from clipfast.cli.console import note, print_json, print_paths, progress, status, stdout
from clipfast.errors import InputError

if TYPE_CHECKING:
    from clipfast.metrics.base import Figure
    from clipfast.metrics.calibrate import Calibration, Calibrator

_SHORT = 4


def parse_grid(given: Sequence[str]) -> dict[str, list[Any]] | None:
    """Values to try by parameter from NAME=V1,V2; slashes part the numbers of one value that has several.

    None for no grid. Raises InputError for anything else.
    """
    from clipfast.methods import parameter_value

    found: dict[str, list[Any]] = {}
    for text in given:
        name, equals, values = text.partition("=")
        parts = [part.strip() for part in values.split(",")]
        if not equals or not name.strip() or not all(parts):
            raise InputError(f"--grid {text!r} should read NAME=VALUE,VALUE, for example --grid alpha=1,2,4.")
        if name.strip() in found:
            raise InputError(f"--grid names {name.strip()!r} twice: put all of its values behind one.")
        found[name.strip()] = [parameter_value(part.replace("/", ",")) for part in parts]
    return found or None


def run_calibration(calibrator: Calibrator, folder: Path, as_json: bool) -> None:
    """Say what it will cost, run it, write calibration.json, and print what was found."""
    settings, (choosing, reporting) = len(calibrator.settings), (len(half) for half in calibrator.halves)
    if left := calibrator.left():
        status("trying how long it takes ...")
        note(
            f"{settings} settings of {calibrator.method} on {choosing} images to choose by, then the best and the "
            f"default on {reporting} others: {left:,} still to be explained and measured, about "
            f"{_lasting(calibrator.seconds())} here."
        )
    with progress("calibrating", left) as advance:
        found = calibrator(advance)
    path = found.save(folder)
    for sentence in (found.chosen_on.errors | found.reported_on.errors).values():
        note(f"left out: {sentence}")
    if as_json:
        print_json({**found.to_json(), "file": str(path)})
        return
    _print(found)
    print_paths(path)


def _lasting(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 5400 else (
        f"{seconds / 3600:.1f} h"
    )  # fmt: skip


def _print(found: Calibration) -> None:
    console = stdout()
    (name, better), of = next(iter(found.objective.figures.items())), found.chosen_on
    protocol = next(iter(of.protocols))
    parameters = list(dict.fromkeys(key for own in found.settings.values() for key in own))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for parameter in parameters:
        table.add_column(parameter, no_wrap=True)
    table.add_column(f"{name} {'↑' if better == 'higher' else '↓'}", justify="right", no_wrap=True)
    sign = -1 if better == "higher" else 1
    for label in sorted(found.settings, key=lambda one: _rank(sign * found.values[one].value)):
        own = found.settings[label]
        cells = [_value(own[one]) if one in own else "default" for one in parameters]
        table.add_row(*cells, _figure(found.values[label], "bold green" if label == found.best else ""))
    console.print(table)
    console.print(
        f"{protocol} on {found.values[found.best].count:,} pairs of {of.samples:,} images to choose by; "
        "± is the standard error",
        style="dim",
        soft_wrap=True,
    )
    console.print()
    for label, one in found.reported.items():
        console.print(Text.assemble(f"{label}: ", _figure(one, "bold"), (", on the other half", "dim")), soft_wrap=True)
    if (gain := found.difference) is None:
        console.print("no setting of the grid did better than the default: keep it.")
        return
    sure = gain.low > 0 or gain.high < 0
    better_now = (gain.value > 0) == (better == "higher")
    console.print(
        f"difference {gain.value:+.4f}, 95 % interval {gain.low:+.4f} to {gain.high:+.4f} (paired): "
        + ("better" if sure and better_now else "worse" if sure else "no difference that these images show"),
        soft_wrap=True,
    )
    typer.echo(f"\nclipfast explain {found.flags}")


def _rank(value: float) -> float:
    return value if value == value else float("inf")


def _figure(one: Figure, style: str) -> Text:
    if one.value != one.value:
        return Text("–")
    return Text.assemble((f"{one.value:.4f}", style), (f" ± {one.error:.4f}", "dim"))


def _value(value: Any) -> str:
    if isinstance(value, tuple | list):
        several = [f"{one:g}" for one in value]
        return ", ".join(several if len(several) <= _SHORT else [*several[:2], "...", several[-1]])
    return f"{value:g}" if isinstance(value, float) else str(value)
