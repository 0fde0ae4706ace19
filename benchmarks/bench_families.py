"""Explaining against encoding, for a model of each family: by Grad-ECLIP, in encodes of the same images.

    pytest benchmarks/bench_families.py -o python_files='bench_*.py' -s [-k SigLIP]

Models at full depth with random weights, 4 images of the model's own size. No speed is reported of maps that are wrong:
each model's maps are first compared with those of its own float64 copy.
"""

from __future__ import annotations

import copy
import os
from functools import partial
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from claims import claim
from torch import nn

import clipfast
from clipfast.bench.cases import relative

BATCH, PROMPTS = 4, (1, 100, 1000)
ROUNDS = int(os.environ.get("ROUNDS", "5"))
FLOAT32_ERROR = 1e-5

# What 1, 100 and 1,000 prompts may cost. Below a pool of its own there is no block to prune, and where the mean is
# pooled every patch is a query.
CLASS_TOKEN, POOL, MEAN = (0.97, 1.04, 1.07), (1.02, 1.08, 1.10), (1.05, 1.12, 1.15)
FAMILIES = {
    "ViT-B-32": CLASS_TOKEN,
    "EVA02-B-16": CLASS_TOKEN,
    "MobileCLIP-B": CLASS_TOKEN,
    "ViT-B-16-SigLIP": POOL,
    "PE-Core-B-16": POOL,
    "coca_ViT-B-32": POOL,
    "RN50": POOL,
    "ViTamin-S": MEAN,
    "ViT-L-14-CLIPA": MEAN,
    "transformers CLIP": CLASS_TOKEN,
    "transformers SigLIP": POOL,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if not name.startswith("transformers "):
        return open_clip.create_model(name).eval()
    import transformers

    kind = "CLIP" if name.endswith("CLIP") else "Siglip"
    config = getattr(transformers, f"{kind}Config")()
    return getattr(transformers, f"{kind}Model")(config).eval()


def encode(module: Any, x: torch.Tensor) -> object:
    with torch.no_grad():
        return module.encode_image(x) if hasattr(module, "encode_image") else module.get_image_features(pixel_values=x)


@pytest.mark.parametrize("name", FAMILIES)
def test_explaining_costs_one_encode(name: str) -> None:
    module = build(name)
    explainer = clipfast.Explainer(module)
    tower, _ = explainer.model.towers()
    x = torch.randn(BATCH, 3, *explainer.model.spec.size)
    texts = F.normalize(torch.randn(max(PROMPTS), tower.embed_dim), dim=-1)
    exact = clipfast.Explainer(copy.deepcopy(module).double())(x[:1].double(), texts[:100].double()).maps
    error = relative(explainer(x[:1], texts[:100]).maps, exact)
    assert error < FLOAT32_ERROR, "no speed is reported of maps that are wrong"
    limits = dict(zip((f"{p} prompts" for p in PROMPTS), FAMILIES[name], strict=True))
    found = claim(
        f"family_{name.replace(' ', '_')}",
        f"Grad-ECLIP of {name}, {BATCH} images",
        f"encode of the same {BATCH} images by the model itself",
        {"encode": partial(encode, module, x)} | {f"{p} prompts": partial(explainer, x, texts[:p]) for p in PROMPTS},
        at_most=limits,
        errors=dict.fromkeys(limits, error),
        repeats=ROUNDS,
    )
    missed = [row for row in found["rows"] if row["at_most"] is not None and row["ratio"] > row["at_most"]]
    assert not missed, missed
