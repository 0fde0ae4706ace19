"""`clipfast methods`: what `--method` and `--set` take."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from clipfast.cli.console import print_json, stdout
from clipfast.cli.options import Json
from clipfast.errors import InputError, nearest

if TYPE_CHECKING:
    from clipfast.methods import MethodInfo


def methods(
    name: Annotated[str | None, typer.Argument(metavar="METHOD", help="Only this one, with all it says.")] = None,
    as_json: Json = False,
) -> None:
    """List the attribution methods: where each comes from, what it costs, and its parameters.

    clipfast methods
    clipfast methods grad_eclip
    """
    from clipfast.methods import METHODS

    if name is not None and name not in METHODS:
        raise InputError(f"there is no method {name!r}: {nearest(name, METHODS)}")
    found = {key: info for key, info in METHODS.items() if name in (None, key)}
    if as_json:
        print_json([_record(key, info) for key, info in found.items()])
        return
    console = stdout()
    for key, info in found.items():
        about = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        about.add_column(style="dim", no_wrap=True)
        about.add_column()
        about.add_row("from", Text(info.source))
        about.add_row("explains", Text(" and ".join(f"{side}s" for side in info.sides)))
        about.add_row("costs", Text(info.cost + (", whatever the number of texts" if info.prompt_free else " a text")))
        about.add_row("agrees with", Text(info.agrees))
        for parameter in parameters_of(info):
            choices = f"  ({' | '.join(parameter['choices'])})" if parameter["choices"] else ""
            about.add_row("--set", Text(f"{parameter['name']}={_spelled(parameter['default'])}{choices}"))
        console.print(Text(key, style="bold"))
        console.print(about)
        if name is not None:
            console.print()
            console.print(Text(inspect.getdoc(info.build) or ""))


def parameters_of(info: MethodInfo) -> list[dict[str, Any]]:
    """A method's parameters: name, default, and the choices where its type lists them."""
    hints = typing.get_type_hints(info.build)
    return [
        {"name": field.name, "default": field.default, "choices": _choices(hints[field.name])}
        for field in dataclasses.fields(info.build)
    ]


def _record(name: str, info: MethodInfo) -> dict[str, Any]:
    about = {field.name: getattr(info, field.name) for field in dataclasses.fields(info) if field.name != "build"}
    return {"name": name, **about, "parameters": parameters_of(info)}


def _choices(hint: Any) -> list[str]:
    if hint is bool:
        return ["true", "false"]
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return [str(choice) for choice in typing.get_args(hint)]
    if origin in (typing.Union, types.UnionType):
        return [choice for part in typing.get_args(hint) for choice in _choices(part)]
    return []


def _spelled(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
