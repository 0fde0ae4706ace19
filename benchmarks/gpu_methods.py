"""Every method on the GPU against itself in float64 on the CPU, beside the time of encoding: part of `gpu_check.py`."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F

import clipfast
from clipfast.bench.cases import BOUND, BOUNDS, CHEAP
from clipfast.bench.timer import paired
from clipfast.methods import METHODS

MODEL, BATCH, PROMPTS = "ViT-B-32", 32, 10


class Clock(Protocol):
    def has(self, seconds: float) -> bool: ...


def run(device: torch.device, clock: Clock, rounds: int) -> Iterator[dict[str, Any]]:
    """One row a method that explains images: its error on 2 images and 3 prompts, its time over the encode's on 32."""
    import open_clip

    torch.manual_seed(0)
    exact = open_clip.create_model(MODEL).eval()
    pixels = exact.visual.image_size
    size = pixels if isinstance(pixels, tuple) else (pixels, pixels)
    model = copy.deepcopy(exact).to(device)
    exact = exact.double()
    x, texts = torch.randn(BATCH, 3, *size), F.normalize(torch.randn(PROMPTS, exact.text_projection.shape[1]), dim=-1)
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        for name, method in METHODS.items():
            if "image" not in method.sides() or method.needs == "features":
                continue
            if not clock.has(20):
                yield {"method": name, "left_out": "no time"}
                continue
            try:
                yield _row(name, model, exact, x, texts, device, rounds)
            except Exception as error:
                reason = "".join(traceback.format_exception_only(error)).strip()[-500:]
                yield {"method": name, "passed": False, "raised": reason}
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def _row(
    name: str, model: Any, exact: Any, x: torch.Tensor, texts: torch.Tensor, device: torch.device, rounds: int
) -> dict[str, Any]:
    parameters = CHEAP.get(name, {})
    explainer = clipfast.Explainer(model, name, **parameters)
    there, asked = x.to(device), texts.to(device)
    found = torch.as_tensor(explainer(there[:2], asked[:3]).maps).double().cpu()
    expected = torch.as_tensor(clipfast.Explainer(exact, name, **parameters)(x[:2].double(), texts[:3].double()).maps)
    error = float((found - expected).norm() / expected.norm())
    bound = BOUNDS.get(name, BOUND)
    row = {"method": name, "error": error, "bound": bound, "passed": error <= bound}
    if row["passed"]:
        timings = paired(
            {"encode": lambda: _encode(model, there), name: lambda: explainer(there, asked)}, max(3, rounds // 3), 1
        )
        row |= {"images": BATCH, "prompts": PROMPTS, "over_encode": round(timings[name].ratio, 3)} | parameters
    return row


@torch.inference_mode()
def _encode(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model.encode_image(x, normalize=True)
