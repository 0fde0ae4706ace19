"""`clipfast models`: what `--model` takes."""

from __future__ import annotations

import json
from importlib import resources
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from clipfast.cli.console import print_json, stdout
from clipfast.cli.options import Json
from clipfast.errors import InputError, nearest

# What the demo is, which the check of open_clip's architectures does not cover.
_DEMO = {"kind": "vision transformer", "site": "class token", "images": "VisionTransformer"}


def models(
    pattern: Annotated[
        str | None, typer.Argument(metavar="FILTER", help="Part of a name, of a weights tag or of a family's name.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List open_clip's models: what makes their embedding, how many methods explain their images, their weights.

    clipfast models
    clipfast models B-16
    clipfast models siglip

    Join a name and its weights with a colon: -m ViT-B-16:openai. Also read: hf:org/name, folders of transformers'
    models, and checkpoints by their path. "checked" gives the relative error against the model's own modules, measured
    on random weights with few blocks: of embeddings (float32), and of Grad-ECLIP against automatic differentiation
    (float64).
    """
    from clipfast.models.load import known_models

    known = {"demo": ["built in"], **known_models()}
    records = verified()
    wanted = (pattern or "").lower()
    found = {
        name: [tag for tag in tags if wanted in tag.lower()] or tags
        for name, tags in known.items()
        if any(wanted in text.lower() for text in (name, _family(records.get(name)), *tags))
    }
    if not found:
        names = [*known, *sorted({tag for tags in known.values() for tag in tags})]
        raise InputError(f"no model, family or weights have {pattern!r} in their name: {nearest(wanted, names)}")
    if as_json:
        # The demo brings its weights: there is no tag to name.
        rows = [{**records.get(name, {"name": name}), "weights": tags} for name, tags in found.items()]
        print_json([{**row, "weights": []} if row["name"] == "demo" else row for row in rows])
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("model", no_wrap=True)
    table.add_column("family", no_wrap=True)
    table.add_column("pools", no_wrap=True)
    table.add_column("methods", justify="right")
    table.add_column("checked", no_wrap=True)
    table.add_column("weights")
    for name, tags in found.items():
        record = records.get(name)
        table.add_row(
            Text(name, style="bold"),
            _family(record),
            "" if record is None else record.get("site", ""),
            "" if record is None or "methods" not in record else str(len(record["methods"])),
            _checked(record),
            Text(", ".join(tags) or "none published: give a checkpoint's path"),
        )
    stdout().print(table)


def verified() -> dict[str, dict[str, Any]]:
    """What `make test-matrix` found of each of open_clip's architectures, and the demo."""
    text = resources.files("clipfast.models").joinpath("verified.json").read_text()
    found: dict[str, dict[str, Any]] = {record["name"]: record for record in json.loads(text)["models"]}
    # The demo is one of the checked family, ViT with a class token, and has tests of its own.
    like = found.get("ViT-B-32", {})
    return {"demo": {"name": "demo", **_DEMO, "methods": like.get("methods", [])}, **found}


def _family(record: dict[str, Any] | None) -> str:
    return "" if record is None else str(record.get("images", ""))


def _checked(record: dict[str, Any] | None) -> str:
    if record is None or "image_error" not in record:
        return "" if record is None else str(record.get("refused", ""))
    errors = [record["image_error"], record.get("grad_eclip_features_error")]
    return ", ".join(f"{error:.0e}" for error in errors if error is not None)
