"""Attribution methods by name: a tower goes in, maps come out."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from clipfast.errors import InputError, nearest
from clipfast.methods.grad_eclip import GradEclip


@dataclass(frozen=True)
class MethodInfo:
    """What `clipfast methods` says of a method.

    cost: forwards and backwards of the tower an image; prompt_free: whether one pass serves every prompt; agrees: the
    published code its numbers were compared with, and how closely.
    """

    build: type[GradEclip]
    source: str
    cost: str
    prompt_free: bool
    sides: tuple[str, ...]
    agrees: str


METHODS: dict[str, MethodInfo] = {
    "grad_eclip": MethodInfo(
        GradEclip,
        source="Zhao et al., ICML 2024",
        cost="1 forward, 0 backwards",
        prompt_free=True,
        sides=("image", "text"),
        agrees="the authors' released code to 1e-9 in float64, with heads='single', spatial='projected'",
    ),
}


def build_method(name: str, parameters: dict[str, Any]) -> GradEclip:
    """The method called `name`. Raises InputError for an unknown name or parameter, with the nearest known ones."""
    if name not in METHODS:
        raise InputError(f"there is no method {name!r}: {nearest(str(name), METHODS)}")
    build = METHODS[name].build
    known = [field.name for field in fields(build)]
    for parameter in parameters:
        if parameter not in known:
            raise InputError(f"{name} has no parameter {parameter!r}: {nearest(parameter, known)}")
    return build(**parameters)
