"""mask_sequence: the native module against the definition, and against copying as many bytes as it writes.

make bench, or: pytest benchmarks/bench_mask_sequence.py --benchmark-json=out.json
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paired import report

import clipfast.native
from clipfast.ops.dispatch import backend
from clipfast.ops.mask_sequence import Noise, mask_sequence, rank_map

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

CASES: dict[str, dict[str, Any]] = {
    "1 float32 image, 28 steps": {},
    "1 uint8 image, 28 steps": {"uint8": True},
    "1 uint8 image, 28 steps, noise": {"uint8": True, "fill": Noise(0)},
    "1 uint8 image, 28 steps, bfloat16": {"uint8": True, "dtype": torch.bfloat16},
    "1 float32 image, 10 prompts, 10 steps": {"prompts": 10, "steps": 10},
    "16 float32 images, 1 step": {"batch": 16, "steps": 1},
}


@pytest.mark.benchmark(group="mask_sequence")
@pytest.mark.skipif(clipfast.native.problem("_native") is not None, reason="the native module is not built here")
@pytest.mark.parametrize("case", CASES)
def test_native_beats_the_definition(benchmark: Any, case: str) -> None:
    settings: dict[str, Any] = {"batch": 1, "prompts": 1, "steps": 28, "uint8": False, "fill": 0.0}
    settings |= {"dtype": torch.float32} | CASES[case]
    shape = (settings["batch"], 3, 224, 224)
    images = torch.randint(0, 256, shape, dtype=torch.uint8) if settings["uint8"] else torch.randn(shape)
    items = settings["batch"] * settings["prompts"] * settings["steps"]
    out = torch.zeros(items, 3, 224, 224, dtype=settings["dtype"])
    other = torch.zeros_like(out)
    arguments: dict[str, Any] = {
        "images": images,
        "order": rank_map(torch.rand(settings["batch"], settings["prompts"], 224, 224)),
        "fractions": torch.linspace(0, 1, settings["steps"]),
        "fill": settings["fill"],
        "out": out,
    }
    if settings["uint8"]:
        arguments |= {"mean": MEAN, "std": STD}

    def run(name: str) -> None:
        with backend(name):
            mask_sequence(**arguments)

    run("torch")
    expected = out.clone()
    run("native")
    assert torch.equal(out, expected), "no speed is reported of a result that is wrong"
    timings = report(
        benchmark,
        {"torch": lambda: run("torch"), "native": lambda: run("native"), "copy": lambda: other.copy_(out)},
        repeats=15,
    )
    print(f"\n{case}: " + ", ".join(f"{name} {t.median * 1e3:.2f} ms ({t.ratio:.2f})" for name, t in timings.items()))
    assert timings["native"].ratio < 1
