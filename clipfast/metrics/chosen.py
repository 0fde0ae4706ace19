"""Which methods are measured by which protocols: what was asked for, checked against the model and the data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from clipfast.data.datasets import Dataset
from clipfast.errors import InputError
from clipfast.methods import METHODS, build_method
from clipfast.methods.base import Method
from clipfast.metrics.base import Protocol
from clipfast.metrics.registry import Side, build_protocol, entry_of, label, offered, parse
from clipfast.models.families import AnyImageTower

DEFAULT_METHODS = ("grad_eclip", "tclip", "mmel", "mga_clip", "mask_clip", "gem", "clip_surgery", "rollout", "grad_cam")
"""Those that cost about one pass of the tower, or a few."""
DEFAULT_PROTOCOLS = (
    "pointing_game",
    "energy_pointing_game",
    "segmentation/mask_iou",
    "deletion+insertion/rise:steps=10",
    "confidence/m2ib",
)

Methods = Mapping[str, Mapping[str, Any]] | Iterable[str]


def sides_of(method: type[Method] | Method, tower: AnyImageTower) -> set[Side]:
    """What a method explains with a model that has this image tower."""
    found: set[Side] = {"text"} if "text" in method.sides() else set()
    return found | {"image"} if "image" in method.sides() and method.why_not(tower) is None else found


def able(tower: AnyImageTower, sides: Iterable[Side]) -> list[str]:
    """The methods that explain something of these sides with this image tower."""
    return [name for name, method in METHODS.items() if sides_of(method, tower) & set(sides)]


def chosen_protocols(given: Iterable[str | Protocol] | None, dataset: Dataset, seed: int) -> dict[str, Protocol]:
    """Protocols by label, seeded where they draw; by default those of `DEFAULT_PROTOCOLS` that fit the data set.

    Raises InputError for none, for one that there is not, and for one that needs more than the data set offers.
    """
    fitting = offered(dataset.offers)
    if given is None:
        given = [name for name in DEFAULT_PROTOCOLS if parse(name)[0] in fitting]
    found: dict[str, Protocol] = {}
    for one in given:
        protocol = one if isinstance(one, Protocol) else _seeded(one, seed)
        name, entry = entry_of(protocol)
        if lacking := entry.needs - dataset.offers:
            raise InputError(
                f"{name} needs {' and '.join(sorted(lacking))}, which {dataset.name} does not have; "
                f"these protocols fit it: {', '.join(fitting)}."
            )
        found[label(protocol)] = protocol
    if not found:
        raise InputError("there is no protocol to evaluate by: name at least one.")
    return found


def _seeded(name: str, seed: int) -> Protocol:
    protocol = build_protocol(name)
    own = "seed" in protocol.parameters() and "seed" not in parse(name)[1]
    return replace(protocol, seed=seed) if own else protocol  # type: ignore[type-var]


def chosen_methods(
    given: Methods | None, protocols: Mapping[str, Protocol], tower: AnyImageTower, model: str, seed: int
) -> tuple[dict[str, dict[str, Any]], dict[tuple[str, Side], list[str]]]:
    """Methods' labels and parameters, seeded where they draw, and by label and side the protocols that measure them.

    A method that explains one side only is measured by that side's protocols. Raises InputError for no method, one that
    there is not, one that no protocol measures, and a protocol that measures no method.
    """
    asked: dict[Side, list[str]] = {}
    for name, protocol in protocols.items():
        asked.setdefault(entry_of(protocol)[1].side, []).append(name)
    if given is None:
        given = [name for name in DEFAULT_METHODS if name in able(tower, asked)]
    found: dict[str, dict[str, Any]] = {}
    jobs: dict[tuple[str, Side], list[str]] = {}
    for title, parameters in (given if isinstance(given, Mapping) else {name: {} for name in given}).items():
        name, written = parse(title)
        both = {**written, **parameters}
        method = build_method(name, both)
        sides = sides_of(method, tower) & set(asked)
        if not sides:
            raise InputError(_unable(name, asked, tower, model))
        if "seed" in method.parameters():
            both.setdefault("seed", seed)
        found[title] = both
        jobs |= {(title, side): asked[side] for side in asked if side in sides}
    if not found:
        raise InputError("there is no method to evaluate: name at least one.")
    for side, names in asked.items():
        if not any(own == side for _, own in jobs):
            raise InputError(
                f"{' and '.join(names)} can measure none of these methods, which do not explain {side}s; "
                f"these methods do: {', '.join(able(tower, [side]))}."
            )
    return found, jobs


def _unable(name: str, asked: Mapping[Side, list[str]], tower: AnyImageTower, model: str) -> str:
    having = ", ".join(able(tower, asked))
    if "image" in asked:
        return f"{name} cannot explain images with {model}; can: {having}."
    return f"{name} does not explain texts, which {' and '.join(asked['text'])} measures; these methods do: {having}."
