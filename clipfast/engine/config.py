"""What the maps of a run depend on, so that a folder never holds maps of two kinds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from textwrap import shorten
from typing import Any

from clipfast.errors import InputError

FORMAT = 1
"""Of the folder; raised when files of older runs can no longer be read beside new ones."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run's files hold; how fast and where they are made does not belong here.

    source, prompts: what these say of themselves. model, weights: a name, and the digest of the weights behind it.
    method, parameters: every parameter, those left at their defaults too. dtype: of the trunk's arithmetic. resize: how
    images become the model's input. exact: whether images are decoded as Pillow does it. maps, features: codecs; None
    for features that are not kept.
    """

    source: Mapping[str, Any]
    prompts: Mapping[str, Any]
    model: str
    weights: str
    method: str
    parameters: Mapping[str, Any]
    dtype: str
    resize: str
    exact: bool = False
    maps: str = "float16"
    features: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As `from_json` takes it, after a trip through JSON text."""
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunConfig:
        """Raises InputError for what is no configuration of this version."""
        try:
            return cls(**data)
        except TypeError as error:
            raise InputError(f"the configuration of a run cannot be read: {error}.") from error

    @property
    def digest(self) -> str:
        """16 hexadecimal digits, the same for equal configurations on every machine."""
        text = json.dumps([FORMAT, self.to_json()], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16]

    def differences(self, other: RunConfig) -> dict[str, tuple[Any, Any]]:
        """The fields in which `other` differs, nested ones by dotted names: (the value here, the value there)."""
        return differences(self.to_json(), other.to_json())


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields in which two JSON documents differ, nested ones by dotted names: (the value here, the value there)."""
    flat, other = _flat(mine), _flat(theirs)
    names = [*flat, *(name for name in other if name not in flat)]
    return {n: (flat.get(n), other.get(n)) for n in names if flat.get(n) != other.get(n)}


def in_words(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Differences as part of a sentence: "method was grad_eclip and is mmel now; ..."."""
    return "; ".join(f"{name} was {_short(a)} and is {_short(b)} now" for name, (a, b) in differences.items())


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _short(value: Any) -> str:
    if value is None or value == {}:
        return "not set"
    if isinstance(value, list) and len(value) > 3:
        first = ", ".join(shorten(json.dumps(v, ensure_ascii=False), 30, placeholder="...") for v in value[:2])
        return f"[{first}, ... {len(value):,} in all]"
    return shorten(json.dumps(value, ensure_ascii=False), 80, placeholder="...")
