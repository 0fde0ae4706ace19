"""What a method costs beside what it is compared with: one claim a file of benchmarks/results/methods/.

A claim is one interleaved run (`paired`): the first function is what all are measured in, the others are ours and the
peers'. `docs/methods-cost.md` is written from these files (benchmarks/methods_page.py).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paired import machine

from clipfast.bench.timer import paired

RESULTS = Path(__file__).parent / "results" / "methods"


def claim(
    name: str,
    title: str,
    unit: str,
    functions: dict[str, Callable[[], object]],
    *,
    at_most: dict[str, float] | None = None,
    against: dict[tuple[str, str], float] | None = None,
    errors: dict[str, float] | None = None,
    notes: str | Callable[[], str] = "",
    repeats: int = 7,
    warmup: int = 1,
    folder: Path = RESULTS,
) -> dict[str, Any]:
    """Time `functions` in turn and keep what came out in `folder`, as <name>.json.

    title: what is claimed, for a reader ("MMEL, pooled, ViT-B/16, 4 images, 100 prompts"). unit: what one of the first
    function is ("Grad-ECLIP of the same call"). at_most: the targets, by function. errors: relative L2 to the float64
    definition, or to the peer whose numbers are the same, by function. notes: conditions that the title does not say,
    or what is asked for them after the last round.
    against: targets for ratios of two functions neither of which is the first, (function, other) -> at most.
    """
    timings = paired(functions, repeats, warmup)
    first = next(iter(functions))
    rows = []
    for subject, timing in timings.items():
        ratios = [a / b for a, b in zip(timing.seconds, timings[first].seconds, strict=True)]
        rows.append(
            {
                "subject": subject,
                "ratio": round(timing.ratio, 4),
                "low": round(min(ratios), 4),
                "high": round(max(ratios), 4),
                "seconds": round(statistics.median(timing.seconds), 4),
                "at_most": (at_most or {}).get(subject),
                "error": (errors or {}).get(subject),
            }
        )
    pairs = []
    for (subject, other), limit in (against or {}).items():
        ratios = [a / b for a, b in zip(timings[subject].seconds, timings[other].seconds, strict=True)]
        pairs.append(
            {
                "subject": f"{subject} / {other}",
                "ratio": round(statistics.median(ratios), 4),
                "low": round(min(ratios), 4),
                "high": round(max(ratios), 4),
                "at_most": limit,
            }
        )
    found = {
        "title": title,
        "unit": unit,
        "rounds": repeats,
        "notes": notes if isinstance(notes, str) else notes(),
        "rows": rows,
        "against": pairs,
        "machine": machine(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    for pair in pairs:
        print(f"{title}: {pair['subject']}: {pair['ratio']:.3f} (at most {pair['at_most']})")
    for row in rows:
        target = "" if row["at_most"] is None else f" (at most {row['at_most']})"
        print(f"{title}: {row['subject']}: {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}] x {unit}{target}")
    return found
