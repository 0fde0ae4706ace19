"""MGA-CLIP's coarse branch in encodes: its S steps are forward passes, and nothing else that counts.

pytest benchmarks/bench_mga_clip.py
"""

from __future__ import annotations

import copy

import open_clip
import torch
import torch.nn.functional as F
from claims import claim
from torch import Tensor

from clipfast.methods.grad_eclip import GradEclip
from clipfast.methods.mga_clip import MgaClip
from clipfast.models.openclip import image_tower

BATCH, STEPS = 1, 16


def test_coarse() -> None:
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16").eval()
    x = torch.randn(BATCH, 3, 224, 224)
    texts = F.normalize(torch.randn(100, 512), dim=-1)
    tower = image_tower(model)

    @torch.no_grad()
    def encode() -> Tensor:
        return model.encode_image(x)

    @torch.no_grad()
    def coarse(prompts: int, **parameters: int) -> Tensor:
        return MgaClip(part="coarse", steps=STEPS, **parameters).image(tower, x).maps(texts[:prompts])  # type: ignore[arg-type]

    with torch.no_grad():
        at_the_image = MgaClip(part="coarse", steps=1, rule="riemann_right").image(tower, x).maps(texts)
        exact = GradEclip(spatial="none").image(tower, x).maps(texts)
        tower64 = image_tower(copy.deepcopy(model).double())
        wide = MgaClip(part="coarse", steps=STEPS).image(tower64, x.double()).maps(texts.double())
    assert (at_the_image - exact).norm() < 1e-5 * exact.norm()
    error = float((coarse(100) - wide).norm() / wide.norm())
    assert error < 1e-5, "no speed is reported of maps that are wrong"
    claim(
        "mga_clip_coarse",
        f"MGA-CLIP coarse, ViT-B/16, {BATCH} image, {STEPS} steps",
        "encode_image of the same batch",
        {
            "encode_image": encode,
            "1 prompt": lambda: coarse(1),
            "100 prompts": lambda: coarse(100),
            "100 prompts, path in the last block": lambda: coarse(100, path=-1),
        },
        at_most={"1 prompt": STEPS + 1, "100 prompts": STEPS + 1},
        errors={"100 prompts": error},
        notes="the pixel path runs the tower for each step; in the last block only that block's attention",
        repeats=5,
    )
