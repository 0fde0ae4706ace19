"""MaskCLIP, CLIP Surgery and GEM beside one encode of the same images.

    pytest benchmarks/bench_dense.py -o python_files='bench_*.py' -s

open_clip's ViT-B/16 with random weights, maps left on the patch grid. Their numbers are first compared with float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import open_clip
import torch
import torch.nn.functional as F
from claims import claim

import clipfast

BATCH, PROMPTS = 2, 10
METHODS = {"MaskCLIP": "mask_clip", "CLIP Surgery": "clip_surgery", "GEM": "gem"}


def test_dense() -> None:
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16").eval()
    x, texts = torch.randn(BATCH, 3, 224, 224), F.normalize(torch.randn(PROMPTS, 512), dim=-1)
    exact = copy.deepcopy(model).double()
    functions: dict[str, Callable[[], object]] = {"encode_image": torch.no_grad()(partial(model.encode_image, x))}
    errors = {}
    for title, name in METHODS.items():
        explainer = clipfast.Explainer(model, name)
        expected = torch.as_tensor(clipfast.Explainer(exact, name)(x.double(), texts.double()).maps)
        found = torch.as_tensor(explainer(x, texts).maps)
        errors[title] = float((found - expected).norm() / expected.norm())
        functions[title] = partial(explainer, x, texts)
    assert max(errors.values()) < 1e-5
    claim(
        "dense",
        f"MaskCLIP, CLIP Surgery and GEM, ViT-B/16, {BATCH} images, {PROMPTS} prompts",
        "encode_image of the same images",
        functions,
        errors=errors,
        notes="Maps of all pairs and their scores. The errors are relative L2 to float64.",
    )
