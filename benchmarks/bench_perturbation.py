"""Deletion and insertion against as many bare forwards of the same images; IMAGES=16 for the whole claim.

python -m pytest benchmarks/bench_perturbation.py -o python_files='bench_*.py' -s
"""

from __future__ import annotations

import os

import open_clip
import torch
import torch.nn.functional as F
from claims import claim

from clipfast import load
from clipfast.metrics.perturbation import Classes, Clock, CurvesRise

IMAGES, STEPS, BATCH = int(os.environ.get("IMAGES", "4")), 28, 16


def test_curves_cost_their_forwards() -> None:
    torch.manual_seed(0)
    module = open_clip.create_model("ViT-B-32").eval()
    tower, _ = load(module).towers()
    images = torch.randn(IMAGES, 3, 224, 224)
    maps = torch.rand(IMAGES, 1, 7, 7)
    embeddings = F.normalize(torch.randn(1000, tower.embed_dim), dim=-1)
    classes = Classes(embeddings, 100.0, torch.arange(IMAGES))
    forwards = IMAGES * (2 * STEPS + 1)
    clock = Clock()

    def bare() -> None:
        with torch.no_grad():
            for start in range(0, forwards, BATCH):
                module.encode_image(images[torch.arange(start, min(start + BATCH, forwards)) % IMAGES])

    def ours() -> None:
        with torch.no_grad():
            CurvesRise(STEPS).measure(tower.encode, classes, images, maps, batch=BATCH, clock=clock)

    def theirs() -> None:
        with torch.no_grad():
            CurvesRise(STEPS).measure(
                lambda x: F.normalize(module.encode_image(x), dim=-1), classes, images, maps, batch=BATCH
            )

    found = claim(
        "perturbation",
        f"Deletion and insertion, {STEPS} steps each, {IMAGES} images, ViT-B/32",
        f"the {2 * STEPS + 1} bare forwards an image, in batches of {BATCH}",
        {"bare forwards": bare, "clipfast": ours, "clipfast's curves with the model's own forward": theirs},
        at_most={"clipfast": 1.06},
        repeats=int(os.environ.get("ROUNDS", "5")),
    )
    print(f"beside the forwards: {clock.beside:.1%}")
    assert clock.beside < 0.05
    assert found["rows"][1]["ratio"] <= 1.06
