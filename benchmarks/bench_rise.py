"""RISE beside as many bare forwards of the model, and beside its authors' recipe."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from claims import claim
from torch import Tensor

import clipfast
from clipfast.bench.timer import paired
from clipfast.methods.rise import Rise


def best_batch(module: Any, x: Tensor) -> int:
    """The size of batch, of 1 to 16, at which this machine encodes an image in the least time."""
    batches = {size: x.expand(size, -1, -1, -1).contiguous() for size in (1, 2, 4, 8, 16)}

    def sixteen(batch: Tensor) -> None:
        for _ in range(16 // len(batch)):
            module.encode_image(batch)

    functions: dict[str, Callable[[], object]] = {str(size): partial(sixteen, batch) for size, batch in batches.items()}
    timings = paired(functions, repeats=5, warmup=1)
    return min(batches, key=lambda size: min(timings[str(size)].seconds))


@pytest.mark.parametrize(("name", "masks", "repeats"), [("ViT-B-32", 500, 5), ("ViT-B-16", 100, 3)])
@torch.no_grad()
def test_rise(name: str, masks: int, repeats: int) -> None:
    torch.manual_seed(0)
    module = open_clip.create_model(name).eval().requires_grad_(False)
    x = torch.randn(1, 3, 224, 224)
    texts = F.normalize(torch.randn(1, 512), dim=-1)
    size = best_batch(module, x)
    explainer = clipfast.Explainer(clipfast.load(module), "rise", masks=masks)
    pictures = Rise(masks=masks).draw((224, 224))(0, masks, x)

    def forwards() -> None:
        batch = x.expand(size, -1, -1, -1).contiguous()
        for _ in range(masks // size):
            module.encode_image(batch)
        if masks % size:
            module.encode_image(batch[: masks % size])

    def authors() -> Tensor:
        # Masks made and kept beforehand, all masked images at once, the model in batches of 100.
        stack = x * pictures[:, None]
        scores = torch.cat([F.normalize(module.encode_image(some), dim=-1) @ texts.T for some in stack.split(100)])
        return (scores.T @ pictures.flatten(1)).view(1, 1, 224, 224) / masks / 0.5

    def rise() -> Tensor:
        maps = explainer(x, texts).maps
        assert isinstance(maps, Tensor)
        return maps

    expected = authors()
    error = float((rise() - expected).norm() / expected.norm())
    assert error < 1e-5
    subject = f"RISE, {masks} masks"
    functions: dict[str, Callable[[], object]] = {f"{masks} bare forwards": forwards, subject: rise}
    if masks <= 100:
        functions["the authors' recipe, its masks made beforehand"] = authors
    found = claim(
        f"rise_{name.lower()}",
        f"RISE, {name}, 1 image, 1 prompt",
        f"{masks} bare forwards in batches of {size}",
        functions,
        at_most={subject: 1.05},
        errors={subject: error},
        notes="error: to the authors' recipe with the same masks, in float32",
        repeats=repeats,
        warmup=0,
    )
    assert found["rows"][1]["ratio"] < 1.05
