"""What markers say together: how far a run is, what failed and why, and where the time went."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from clipfast.errors import ClipfastError

CHECKED_FROM = 200
"""Images before whose count a share of failures says nothing yet."""
_REASONS, _EXAMPLES = 20, 3


class RunError(ClipfastError):
    """A run that stopped before its end; what is done stays, and the same command goes on."""


@dataclass
class Totals:
    """Sums over shards. images: with maps; errors: without; rows: maps; bytes: of files. seconds: decode, model, write
    and total, summed over workers. reasons: how many images failed by what, keys taken out of the sentences."""

    shards: int = 0
    images: int = 0
    errors: int = 0
    rows: int = 0
    bytes: int = 0
    seconds: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, marker: dict[str, Any]) -> None:
        self.shards += 1
        self.images += marker["images"]
        self.errors += len(marker["errors"])
        self.rows += marker["rows"]
        self.bytes += sum(marker["files"].values())
        self.seconds.update(marker.get("seconds", {}))
        self.reasons.update(_kind(error["key"], error["reason"]) for error in marker["errors"])

    @classmethod
    def of(cls, markers: Iterable[dict[str, Any]]) -> Totals:
        totals = cls()
        for marker in markers:
            totals.add(marker)
        return totals

    @property
    def failing(self) -> float:
        """The share of images without a map."""
        return self.errors / max(self.images + self.errors, 1)

    def share(self, part: str) -> float:
        """The share of the workers' time that decoding ("decode"), the model ("model") or writing ("write") took."""
        return self.seconds[part] / self.seconds["total"] if self.seconds["total"] else 0.0

    def check(self, most: float) -> None:
        """Raises RunError where more than the share `most` of enough images failed."""
        if self.images + self.errors >= CHECKED_FROM and self.failing > most:
            raise RunError(
                f"{self.errors:,} of {self.images + self.errors:,} images failed, more than --max-error-rate {most:g} "
                f"allows: {self.why()}"
            )

    def why(self) -> str:
        """The most frequent reasons in a sentence."""
        some = [f"{reason.rstrip('.')} ({count:,} times)" if count > 1 else reason.rstrip(".")
                for reason, count in self.reasons.most_common(_EXAMPLES)]  # fmt: skip
        return "; ".join(some) + "."

    def to_json(self) -> dict[str, Any]:
        return {
            "shards": self.shards,
            "images": self.images,
            "errors": self.errors,
            "maps": self.rows,
            "bytes": self.bytes,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "reasons": dict(self.reasons.most_common(_REASONS)),
        }


def _kind(key: str, reason: str) -> str:
    """A reason without the image that it is about, so that equal ones count together."""
    for name in (key, key.rpartition("/")[2]):
        reason = re.sub(r"\S*" + re.escape(name), "the image", reason) if name else reason
    return reason
