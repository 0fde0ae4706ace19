"""`clipfast models`: what `--model` takes."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from clipfast.cli.console import print_json, stdout
from clipfast.cli.options import Json
from clipfast.errors import InputError, nearest


def models(
    pattern: Annotated[str | None, typer.Argument(metavar="FILTER", help="Part of a name or of a weights tag.")] = None,
    as_json: Json = False,
) -> None:
    """List the models that clipfast reads, each with its weights.

    clipfast models
    clipfast models B-16
    clipfast models dfn

    Join a name and its weights with a colon: -m ViT-B-16:openai. Also read: hf:org/name, and checkpoints by their path.
    """
    from clipfast.models.load import known_models

    known = {"demo": ["built in"], **known_models()}
    wanted = (pattern or "").lower()
    found = {
        name: [tag for tag in tags if wanted in tag.lower()] or tags
        for name, tags in known.items()
        if wanted in name.lower() or any(wanted in tag.lower() for tag in tags)
    }
    if not found:
        names = [*known, *sorted({tag for tags in known.values() for tag in tags})]
        raise InputError(f"no model or weights have {pattern!r} in their name: {nearest(wanted, names)}")
    if as_json:
        # The demo brings its weights: there is no tag to name.
        print_json([{"name": name, "weights": [] if name == "demo" else tags} for name, tags in found.items()])
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("model", no_wrap=True)
    table.add_column("weights")
    for name, tags in found.items():
        table.add_row(Text(name, style="bold"), Text(", ".join(tags) or "none published: give a checkpoint's path"))
    stdout().print(table)
