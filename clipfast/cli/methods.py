"""`clipfast methods`: what `--method` and `--set` take."""

from __future__ import annotations

import dataclasses
import inspect
import re
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
    from clipfast.methods.base import Method


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
    found = {key: method for key, method in METHODS.items() if name in (None, key)}
    if as_json:
        print_json([_record(key, method) for key, method in found.items()])
        return
    if name is None:
        _print_table(found)
    else:
        _print_all(name, found[name])


def _print_table(found: dict[str, type[Method]]) -> None:
    """One line a method."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("method", no_wrap=True)
    for heading in ("image", "text", "any P"):
        table.add_column(heading, justify="center")
    for heading in ("forwards", "backwards"):
        table.add_column(heading, justify="right", no_wrap=True, overflow="ellipsis")
    for name, method in found.items():
        info, sides = method.info, method.sides()
        marks = ["•" if told else "" for told in ("image" in sides, "text" in sides, info.prompt_free)]
        table.add_row(Text(name, style="bold"), *marks, _briefly(info.forwards), _briefly(info.backwards))
    console = stdout()
    console.print(table)
    console.print(
        "Passes of the whole tower for an image and P texts; any P: a further text is next to free.", style="dim"
    )
    console.print("All that one says, its parameters too: clipfast methods grad_eclip", style="dim")


def _briefly(cost: str) -> str:
    """A cost's first words: what goes further stands with the method itself."""
    return re.split(r"[,;(]", cost)[0].strip()


NEEDS = {
    "pixels": "any image tower",
    "features": "convolutional feature maps",
    "tokens": "patches that an attention or a mean pools",
    "query": "a token or latent that attends to the patches",
    "blocks": "blocks in which patches attend to each other",
}


def _print_all(name: str, method: type[Method]) -> None:
    """One method with its parameters and its documentation."""
    info = method.info
    about = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    about.add_column(style="dim", no_wrap=True)
    about.add_column()
    about.add_row("from", Text(info.source))
    about.add_row("explains", Text(" and ".join(f"{side}s" for side in method.sides())))
    if "image" in method.sides():
        about.add_row("needs", Text(NEEDS[method.needs]))
    about.add_row("costs", Text(_cost(method)))
    about.add_row("agrees with", Text(info.agrees))
    if info.our_reading:
        about.add_row("our reading", Text(info.our_reading))
    for parameter in parameters_of(method):
        choices = f"  ({' | '.join(parameter['choices'])})" if parameter["choices"] else ""
        about.add_row("--set", Text(f"{parameter['name']}={_spelled(parameter['default'])}{choices}"))
    console = stdout()
    console.print(Text(name, style="bold"))
    console.print(about)
    console.print()
    console.print(Text(inspect.getdoc(method) or ""))


def parameters_of(method: type[Method]) -> list[dict[str, Any]]:
    """A method's parameters: name, default, and the choices where its type lists them."""
    hints = typing.get_type_hints(method)
    return [
        {"name": name, "default": default, "choices": _choices(hints[name])}
        for name, default in method.parameters().items()
    ]


def _cost(method: type[Method]) -> str:
    """Passes of the whole tower, in words."""
    info = method.info
    forwards = f"{info.forwards} forward{'' if info.forwards == '1' else 's'}"
    backwards = f"{info.backwards} backward{'' if info.backwards == '1' else 's'}"
    return f"{forwards}, {backwards} an image" + (", whatever the number of texts" if info.prompt_free else "")


def _record(name: str, method: type[Method]) -> dict[str, Any]:
    return {
        "name": name,
        "sides": method.sides(),
        "needs": method.needs if "image" in method.sides() else None,
        **dataclasses.asdict(method.info),
        "parameters": parameters_of(method),
    }


def _choices(hint: Any) -> list[str]:
    if hint is bool:
        return ["true", "false"]
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return [str(choice) for choice in typing.get_args(hint)]
    if origin in (typing.Union, types.UnionType):
        choices = [choice for part in typing.get_args(hint) for choice in _choices(part)]
        # Not to read as if the words were all.
        return [*choices, "a number"] if choices and int in typing.get_args(hint) else choices
    return []


def _spelled(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
