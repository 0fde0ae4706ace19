"""Images a second explained, beside images a second that open_clip encodes: the last part of `gpu_check.py`."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import clipfast
from clipfast.bench.timer import paired

# In the order of their worth, should time run out.
MODELS = ("ViT-B-16", "ViT-L-14", "ViT-B-32")
BATCHES = (256, 1, 32, 512)
PROMPTS = (100, 1, 1000)
BOUND = 2e-2


class Clock(Protocol):
    def has(self, seconds: float) -> bool: ...


def run(device: torch.device, clock: Clock, rounds: int) -> Iterator[dict[str, Any]]:
    """One row a model, batch and number of prompts; encoding eager and compiled, of which the faster counts."""
    for name in MODELS:
        if not clock.has(60):
            yield {"model": name, "left_out": "no time"}
            continue
        try:
            yield from _model(name, device, clock, rounds)
        except Exception as error:
            reason = "".join(traceback.format_exception_only(error)).strip()[-500:]
            yield {"model": name, "passed": False, "raised": reason}
        torch.compiler.reset()
        torch.cuda.empty_cache()


def _model(name: str, device: torch.device, clock: Clock, rounds: int) -> Iterator[dict[str, Any]]:
    import open_clip

    torch.manual_seed(0)
    single = open_clip.create_model(name, device=device).eval()
    pixels = single.visual.image_size[0]
    texts = F.normalize(torch.randn(max(PROMPTS), single.text_projection.shape[1], device=device), dim=-1)
    error = _error(single, torch.randn(4, 3, pixels, pixels, device=device), texts[:10])
    yield {"model": name, "case": "bfloat16 maps against float64", "error": error, "passed": error <= BOUND}
    if error > BOUND:
        return
    model = single.bfloat16()
    explainer = clipfast.Explainer(model)
    for batch in BATCHES:
        if not clock.has(40):
            yield {"model": name, "batch": batch, "left_out": "no time"}
            continue
        x = torch.randn(batch, 3, pixels, pixels, device=device, dtype=torch.bfloat16)
        functions: dict[str, Callable[[], object]] = {"encode": partial(_encode, model, x)}
        compiled = torch.compile(_encode, dynamic=False)
        try:
            compiled(model, x)
            functions["encode compiled"] = partial(compiled, model, x)
        except Exception:
            yield {"model": name, "batch": batch, "compiled": "could not be compiled"}
        for prompts in PROMPTS:
            functions[f"explain {prompts}"] = partial(explainer, x, texts[:prompts])
        timings = paired(functions, repeats=max(5, rounds // 2))
        rates = {key: batch / t.median for key, t in timings.items()}
        encoding = max(rates[key] for key in rates if key.startswith("encode"))
        row: dict[str, Any] = {"model": name, "batch": batch}
        row |= {f"{key.replace(' ', '_')}_images_per_second": round(rate, 1) for key, rate in rates.items()}
        for prompts in PROMPTS:
            row[f"explain_{prompts}_over_encode"] = round(rates[f"explain {prompts}"] / encoding, 3)
        yield row


@torch.inference_mode()
def _encode(model: Any, x: Tensor) -> Tensor:
    return model.encode_image(x, normalize=True)


def _error(model: Any, x: Tensor, texts: Tensor) -> float:
    """Relative L2 distance of bfloat16's maps from float64's."""
    exact = clipfast.Explainer(copy.deepcopy(model).double())(x.double(), texts.double()).maps
    found = clipfast.Explainer(copy.deepcopy(model).bfloat16())(x.bfloat16(), texts).maps
    difference = torch.as_tensor(found) - torch.as_tensor(exact)
    return float(difference.norm() / torch.as_tensor(exact).norm())
