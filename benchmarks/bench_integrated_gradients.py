"""Integrated gradients beside captum's, on the same open_clip model with its weights frozen.

That is in captum's favour: otherwise autograd walks the graph of the weights, too.

pytest benchmarks/bench_integrated_gradients.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients as CaptumIntegratedGradients
from captum.attr import LayerIntegratedGradients
from claims import claim
from torch import Tensor

from clipfast.bench.memory import ENVIRONMENT, resident_peak
from clipfast.methods.integrated_gradients import IntegratedGradients
from clipfast.models.openclip import image_tower

BATCH, STEPS, LAYER_STEPS = 1, 16, 10


def setting() -> tuple[Any, Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """A frozen model, images, one text, and the score that captum differentiates."""
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16").eval().requires_grad_(False)
    x, text = torch.randn(BATCH, 3, 224, 224), F.normalize(torch.randn(1, 512), dim=-1)
    return model, x, text, lambda x: F.normalize(model.encode_image(x), dim=-1) @ text[0]


@torch.no_grad()
def ours(model: Any, x: Tensor, text: Tensor, **parameters: Any) -> Tensor:
    """Maps and, as the engine asks for it, `delta`."""
    explained = IntegratedGradients(baseline="mean", **parameters).image(image_tower(model), x)
    maps = explained.maps(text)[:, 0]
    explained.extras()
    return maps


def encode(model: Any, x: Tensor) -> Callable[[], Tensor]:
    return torch.no_grad()(lambda: model.encode_image(x))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_pixels() -> None:
    model, x, text, score = setting()
    captum = CaptumIntegratedGradients(score)

    def peer(rows: int | None) -> Callable[[], Any]:
        return lambda: captum.attribute(x, n_steps=STEPS, internal_batch_size=rows)

    error = relative(ours(model, x, text, steps=STEPS), peer(4)().sum(1).flatten(1))
    assert error < 1e-5, "no speed is reported of maps that are wrong"
    peaks = {steps: peak(steps) for steps in (8, 32)}
    claim(
        "integrated_gradients_pixels",
        f"Integrated gradients in pixels, ViT-B/16, {BATCH} image, {STEPS} steps, 1 prompt",
        "encode_image of the same batch",
        {
            "encode_image": encode(model, x),
            "clipfast, with delta": lambda: ours(model, x, text, steps=STEPS),
            "captum, internal_batch_size=1": peer(1),
            "captum, its default": peer(None),
        },
        against={
            ("clipfast, with delta", "captum, internal_batch_size=1"): 0.95,
            ("clipfast, with delta", "captum, its default"): 0.80,
        },
        errors={"clipfast, with delta": error},
        notes="Weights frozen, which is in captum's favour; of its batch sizes 1, 2, 4, 8, 16 (its default), 1 is the "
        "best. Peak of the process above its resting state, MB: "
        + ", ".join(f"{steps} steps {bytes_ / 1e6:.0f}" for steps, bytes_ in peaks.items()),
        repeats=6,
    )


def test_the_last_block() -> None:
    model, x, text, score = setting()
    captum = LayerIntegratedGradients(score, model.visual.transformer.resblocks[-1])

    def peer() -> Tensor:
        found = captum.attribute(x, n_steps=LAYER_STEPS, attribute_to_layer_input=True)
        return found[:, 1:].sum(-1)

    error = relative(ours(model, x, text, steps=LAYER_STEPS, at=-1), peer())
    assert error < 1e-5, "no speed is reported of maps that are wrong"
    claim(
        "integrated_gradients_last_block",
        f"LayerIntegratedGradients' numbers at the last block, ViT-B/16, {BATCH} image, {LAYER_STEPS} steps, 1 prompt",
        "encode_image of the same batch",
        {
            "encode_image": encode(model, x),
            "clipfast, with delta": lambda: ours(model, x, text, steps=LAYER_STEPS, at=-1),
            "captum LayerIntegratedGradients": peer,
        },
        at_most={"clipfast, with delta": 3},
        errors={"clipfast, with delta": error},
        notes="weights frozen, which is in captum's favour",
        repeats=7,
    )


def peak(steps: int) -> int:
    """How far one call raises a fresh process's memory, in bytes, as peak_memory.py measures it."""
    environment = os.environ | ENVIRONMENT
    command = [sys.executable, __file__, str(steps)]
    return int(json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout))


def _measure(steps: int) -> int:
    model, x, text, _ = setting()
    ours(model, x, text, steps=2)
    return resident_peak(lambda: ours(model, x, text, steps=steps))[0]


if __name__ == "__main__":
    print(json.dumps(_measure(int(sys.argv[1]))))
