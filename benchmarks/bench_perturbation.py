"""Deletion and insertion against as many bare forwards of the same images, and beside Quantus and pytorch-grad-cam.

python -m pytest benchmarks/bench_perturbation.py -o python_files='bench_*.py' -s

IMAGES=16 for the whole claim, which takes minutes a round; ROUNDS says how many there are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from typing import Any
from unittest import mock

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from claims import claim
from torch import Tensor, nn

from clipfast import load
from clipfast.metrics.perturbation import Classes, Clock, CurvesRise, curves
from clipfast.metrics.road import Road
from clipfast.ops.mask_sequence import rank_map

IMAGES, STEPS, BATCH = int(os.environ.get("IMAGES", "4")), 28, 16
ROUNDS = int(os.environ.get("ROUNDS", "5"))
# Quantus counts channel values, and what goes in a step must divide the pixels: 28 steps cannot be had, and these are
# of 2090 2/3 pixels, so that the curves agree nearly.
FLIPS, FLIPPED, IMPUTED = 24, 4, 2


class Similarity(nn.Module):
    """Images -> scaled cosines with classes (K, E), or with a text: what the two libraries measure."""

    def __init__(self, module: Any, texts: Tensor, scale: float):
        super().__init__()
        self.module, self.texts, self.scale = module, texts, scale
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.normalize(self.module.encode_image(x), dim=-1) @ self.texts.T


def vit(seed: int = 0) -> tuple[Any, Tensor]:
    """ViT-B/32 with random weights, and unit embeddings of 1000 classes."""
    torch.manual_seed(seed)
    module = open_clip.create_model("ViT-B-32").eval()
    return module, F.normalize(torch.randn(1000, 512), dim=-1)


def forwards(module: Any, images: Tensor, count: int) -> None:
    """So many images through the model, in batches."""
    with torch.no_grad():
        for start in range(0, count, BATCH):
            module.encode_image(images[torch.arange(start, min(start + BATCH, count)) % len(images)])


def distinct(count: int) -> Tensor:
    """Maps (B, 1, 224, 224) without ties, whose order the libraries leave open."""
    return torch.stack([torch.randperm(224 * 224) for _ in range(count)]).view(-1, 1, 224, 224) / 224**2


def test_curves_cost_their_forwards() -> None:
    module, embeddings = vit()
    tower, _ = load(module).towers()
    images = torch.randn(IMAGES, 3, 224, 224)
    maps = torch.rand(IMAGES, 1, 7, 7)
    classes = Classes(embeddings, 100.0, torch.arange(IMAGES))
    clock = Clock()

    def bare() -> None:
        forwards(module, images, IMAGES * (2 * STEPS + 1))

    def ours() -> None:
        with torch.no_grad():
            CurvesRise(STEPS).measure(tower.encode, classes, images, maps, batch=BATCH, clock=clock)

    small, large = (peak(steps) for steps in (STEPS, 8 * STEPS))
    forwards(module, images, BATCH)
    with torch.no_grad():
        CurvesRise(1).measure(tower.encode, classes, images, maps, batch=BATCH)
    found = claim(
        "perturbation",
        f"Deletion and insertion, {STEPS} steps each, {IMAGES} images, ViT-B/32",
        f"the {2 * STEPS + 1} bare forwards an image, in batches of {BATCH}",
        {"bare forwards": bare, "clipfast": ours},
        at_most={"clipfast": 1.06},
        notes=lambda: (
            f"{clock.beside:.1%} of clipfast's time was outside the forwards. At their peak, the curves added "
            f"{small / 2**20:.1f} MiB to a process without a model, and {large / 2**20:.1f} MiB in {8 * STEPS} steps."
        ),
        repeats=ROUNDS,
        warmup=0,
    )
    print(found["notes"])
    assert clock.beside < 0.05
    assert large < 1.1 * small
    assert found["rows"][1]["ratio"] <= 1.06


def test_deletion_beside_quantus() -> None:
    from quantus.metrics.faithfulness.pixel_flipping import PixelFlipping

    module, embeddings = vit()
    tower, _ = load(module).towers()
    images, maps = torch.randn(FLIPPED, 3, 224, 224), distinct(FLIPPED)
    labels = torch.arange(FLIPPED)
    classes = Classes(embeddings, 100.0, labels)
    similarity = Similarity(module, embeddings, 100.0)
    metric = PixelFlipping(
        features_in_step=3 * 224**2 // FLIPS,
        perturb_baseline=0.0,  # type: ignore[arg-type]  # numbers are taken, whatever its annotation says
        disable_warnings=True,
        display_progressbar=False,
    )

    def ours() -> Tensor:
        plan = {"deletion": ([i / FLIPS for i in range(FLIPS + 1)], 0.0)}
        with torch.no_grad():
            return curves(tower.encode, classes.probability, images, maps, plan, batch=BATCH)["deletion"]  # type: ignore[arg-type]

    def theirs() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = metric(
                model=similarity,
                x_batch=images.numpy(),
                y_batch=labels.numpy(),
                a_batch=maps.numpy().copy(),
                channel_first=True,
                softmax=True,
            )
        return torch.tensor(np.array(found))

    agreed = theirs()
    error = float((ours()[:, 0, 1:].double() - agreed).norm() / agreed.norm())
    assert error < 2e-2
    found = claim(
        "perturbation_quantus",
        f"Deletion in {FLIPS} steps, {FLIPPED} images, ViT-B/32, beside Quantus",
        f"the {FLIPS} bare forwards of perturbed images, in batches of {BATCH}",
        {
            "bare forwards": lambda: forwards(module, images, FLIPS * FLIPPED),
            "clipfast": ours,
            "Quantus PixelFlipping": theirs,
        },
        against={("clipfast", "Quantus PixelFlipping"): 1.0},
        notes=(
            f"The curves agree to {error:.1%}, since Quantus' steps are of 2090 2/3 pixels. clipfast encodes the clean "
            "image, too."
        ),
        repeats=ROUNDS,
    )
    assert found["against"][0]["ratio"] <= 1.0


def test_road_beside_grad_cam() -> None:
    from pytorch_grad_cam.metrics.road import ROADCombined

    module, embeddings = vit()
    tower, _ = load(module).towers()
    images = torch.randn(IMPUTED, 3, 224, 224)
    # In the order of a model's maps on 7 x 7 patches, without their ties.
    smooth = F.interpolate(torch.rand(IMPUTED, 1, 7, 7), size=(224, 224), mode="bilinear")
    maps = 1 - rank_map(smooth) / 224**2
    similarity = Similarity(module, embeddings[:1], 1.0)
    metric = ROADCombined()

    def ours(noise: float = 0.01) -> Tensor:
        with torch.no_grad():
            return Road(noise=noise).measure(tower.encode, embeddings[:1], images, maps, batch=BATCH)["road"]

    def theirs() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = metric(images, maps[:, 0].numpy(), [lambda row: row[0]] * IMPUTED, similarity)
        return torch.from_numpy(found).double()

    with mock.patch.object(torch, "randn_like", torch.zeros_like):
        agreed = theirs()
    difference = float((ours(noise=0) - agreed).abs().max())
    assert difference < 1e-5
    found = claim(
        "road",
        f"ROAD, MoRF and LeRF at 9 percentiles, {IMPUTED} images, ViT-B/32, beside pytorch-grad-cam",
        f"the 18 bare forwards of perturbed images, in batches of {BATCH}",
        {
            "bare forwards": lambda: forwards(module, images, 18 * IMPUTED),
            "clipfast": ours,
            "pytorch-grad-cam ROADCombined": theirs,
        },
        against={("clipfast", "pytorch-grad-cam ROADCombined"): 1.0},
        notes=f"Without noise, the two scores (cosines) differ by at most {difference:.0e}.",
        repeats=ROUNDS,
    )
    assert found["against"][0]["ratio"] <= 1.0


def peak(steps: int) -> int:
    """Bytes that the curves of so many steps add to a fresh process at their peak, with a model that costs nothing."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, str(steps)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(json.loads(run.stdout))


def _peak(steps: int) -> int:
    from clipfast.bench.memory import resident_peak

    images, maps = torch.randn(IMAGES, 3, 224, 224), torch.rand(IMAGES, 1, 7, 7)
    classes = Classes(F.normalize(torch.randn(5, 3), dim=-1), 100.0, torch.arange(IMAGES) % 5)

    def measure(count: int) -> None:
        CurvesRise(count).measure(lambda x: x.mean((2, 3)), classes, images, maps, batch=BATCH)

    measure(2)
    return resident_peak(lambda: measure(steps))[0]


if __name__ == "__main__":
    print(json.dumps(_peak(int(sys.argv[1]))))
