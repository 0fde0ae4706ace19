"""Options that several commands take, and the explainer they describe."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipfast.cli.console import note, status
from clipfast.errors import InputError, nearest

if TYPE_CHECKING:
    from clipfast.api import Explainer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write to; made if missing.")]
Texts = Annotated[
    list[str] | None, typer.Option("--text", "-t", metavar="TEXT", help="A text to explain; repeat for more.")
]
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help='"demo", "ViT-B-16:openai" or any other of `clipfast models`, "hf:org/name", or a checkpoint\'s path.',
        rich_help_panel="Model",
    ),
]
Pretrained = Annotated[
    str | None,
    typer.Option(
        help='Weights tag, or a checkpoint\'s path, where --model names an architecture; "random" for untrained ones.',
        rich_help_panel="Model",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help='"cpu", "cuda", "cuda:1", "mps"; by default the GPU if there is one.', rich_help_panel="Model"),
]
Precision = Annotated[
    str | None,
    typer.Option(
        help='"float32", "bfloat16" or "auto" (bfloat16 where it is native); by default as the weights are.',
        rich_help_panel="Model",
    ),
]
MethodName = Annotated[str, typer.Option("--method", help="One of `clipfast methods`.", rich_help_panel="Method")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="A parameter of the method; repeat for more.", rich_help_panel="Method"
    ),
]
Resize = Annotated[
    str | None,
    typer.Option(
        help='How images become the model\'s input: "crop", "squash", "longest" (padded) or "keep" (native aspect); '
        "by default as the model does it.",
        rich_help_panel="Model",
    ),
]


def build_explainer(
    model: str,
    pretrained: str | None,
    device: str | None,
    precision: str | None,
    resize: str | None,
    method: str,
    assignments: list[str] | None,
) -> Explainer:
    """The explainer that the options ask for.

    Raises InputError or ModelError for what cannot be had, the cheap mistakes before the model is loaded.
    """
    from clipfast.api import Explainer
    from clipfast.methods import build_method
    from clipfast.models.load import load

    parameters = parse_parameters(method, assignments or [])
    build_method(method, parameters)
    check_device(device)
    status(f"loading {model if pretrained is None else f'{model}:{pretrained}'} ...")
    loaded = load(model, pretrained, device=device)
    return Explainer(loaded, method, precision=precision, resize=resize, **parameters)  # type: ignore[arg-type]


def build_for_words(explainer: Explainer, assignments: list[str] | None = None) -> Explainer:
    """The explainer that colours words: the same, but signed, where its method can be and the user did not decide.

    Words are read for what they do against the score, too, which the final ReLU of a method would hide.
    """
    from clipfast.api import Explainer

    parameters = parse_parameters(explainer.method, assignments or [])
    if "signed" in parameters or "signed" not in _defaults(explainer.method):
        return explainer
    return Explainer(explainer.model, explainer.method, precision=explainer.precision, signed=True, **parameters)


def warn_of_demo(model: str) -> None:
    """Say what the demo model cannot do, where someone may not have chosen it."""
    if model == "demo":
        note("the demo model only knows drawings of 64 everyday things; for photographs take -m ViT-B-16:openai.")


def parse_parameters(method: str, assignments: list[str]) -> dict[str, Any]:
    """Parameters of a method from NAME=VALUE: numbers, true, false and none are what they look like, all else is text.
    Numbers with commas between them are several.

    Raises InputError for anything else than NAME=VALUE, an unknown method, or text where a number or switch is due.
    """
    from clipfast.methods import parameter_value

    defaults = _defaults(method)
    parameters = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.strip():
            raise InputError(f"--set {shlex.quote(assignment)} should read NAME=VALUE, for example --set layers=2.")
        name, parsed = name.strip(), parameter_value(value.strip())
        default = defaults.get(name)
        if isinstance(default, bool) and not isinstance(parsed, bool):
            raise InputError(f"--set {shlex.quote(assignment)}: {name} is a switch, so give true or false.")
        parameters[name] = parsed
    return parameters


def _defaults(method: str) -> dict[str, Any]:
    from clipfast.methods import METHODS

    if method not in METHODS:
        raise InputError(f"there is no method {method!r}: {nearest(method, METHODS)}")
    return METHODS[method].parameters()


def check_device(device: str | None) -> None:
    """Raises InputError for a device that there is not."""
    if device is None:
        return
    import torch

    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise InputError(
            f"there is no device {device!r}: give cpu, cuda, cuda:1 (the second GPU), mps or xpu."
        ) from None
    if wanted.type == "cpu":
        return
    backend = getattr(torch, wanted.type, None)
    if backend is None or not hasattr(backend, "is_available") or not backend.is_available():
        raise InputError(f"--device {device}: this machine, or this build of torch, has no {wanted.type} device.")
    if (wanted.index or 0) >= backend.device_count():
        raise InputError(f"--device {device}: this machine has only {backend.device_count()} of them, counted from 0.")
