"""Other libraries' calls on a CLIP, as they are and under `clipfast.accelerate`, in turn.

    pytest benchmarks/bench_accelerate.py -o python_files='bench_*.py' -s

open_clip's ViT-B/16 with random weights, 4 images. Every call gets images that it has not seen, so that nothing comes
out of what an earlier one left behind. Results are compared first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients, LayerIntegratedGradients
from claims import claim
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.metrics.road import ROADCombined
from torch import Tensor

import clipfast
from clipfast.compat import grad_eclip as authors
from clipfast.compat.replay import own_forwards
from clipfast.compat.score import Score

ARCHITECTURE, BATCH, STEPS, PROMPTS = "ViT-B-16", 4, 10, 100
ROUNDS = int(os.environ.get("ROUNDS", "5"))

Call = Callable[[Tensor], Any]


@pytest.fixture(scope="module")
def score() -> Iterator[Score]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield Score(open_clip.create_model(ARCHITECTURE).eval(), torch.randn(PROMPTS, 512)).eval()


def images(count: int = BATCH) -> Tensor:
    return torch.randn(count, 3, 224, 224)


def compare(
    name: str,
    title: str,
    score: Score,
    library: str,
    calls: dict[str, tuple[Call, float]],
    batch: int,
    close: float = 1e-5,
) -> None:
    """Each call plain and accelerated, with the encode of as many images first; at_most is of the two's ratio."""
    module: Any = score.module
    functions: dict[str, Callable[[], object]] = {
        "encode_image": lambda: torch.no_grad()(module.encode_image)(images(batch))
    }
    errors, limits = {}, {}
    # Entered once, as users do: the check of the stand-in is not what is timed.
    with clipfast.accelerate(library, model=score.model):
        for called, (call, limit) in calls.items():
            x = images(batch)
            torch.manual_seed(1)
            expected = torch.as_tensor(np.asarray(_outside(call)(x)))
            torch.manual_seed(1)
            found = torch.as_tensor(np.asarray(call(x)))
            errors[f"{called}, accelerated"] = float((found - expected).norm() / expected.norm())
            assert errors[f"{called}, accelerated"] < close, "no speed is reported of numbers that are wrong"
            functions[called] = lambda call=call: _outside(call)(images(batch))  # type: ignore[misc]
            functions[f"{called}, accelerated"] = lambda call=call: call(images(batch))  # type: ignore[misc]
            limits[f"{called}, accelerated", called] = limit
        found_claim = claim(
            name,
            title,
            f"encode_image of {batch} image{'s' if batch > 1 else ''}",
            functions,
            against=limits,
            errors=errors,
            notes="errors are to the library's own result; every call gets new images",
            repeats=ROUNDS,
        )
    for pair in found_claim["against"]:
        assert pair["ratio"] <= pair["at_most"], pair


def _outside(call: Call) -> Call:
    """The call as it would be without `accelerate`: its thread replays nothing."""

    def plain(x: Tensor) -> Any:
        with own_forwards():
            return call(x)

    return plain


def test_captum(score: Score) -> None:
    module: Any = score.module
    text = score.texts[0]

    def f(x: Tensor) -> Tensor:
        return F.normalize(module.encode_image(x), dim=-1) @ text

    layer = LayerIntegratedGradients(f, module.visual.transformer.resblocks[-1].ln_1)
    plain = IntegratedGradients(f)
    compare(
        "accelerate_captum",
        f"captum under accelerate, ViT-B/16, {BATCH} images, {STEPS} steps",
        score,
        "captum",
        {
            "LayerIntegratedGradients, last block": (
                lambda x: layer.attribute(x, n_steps=STEPS, internal_batch_size=BATCH).detach(),
                0.25,
            ),
            "IntegratedGradients, default": (lambda x: plain.attribute(x, n_steps=STEPS).detach(), 0.80),
            "IntegratedGradients, internal_batch_size=4": (
                lambda x: plain.attribute(x, n_steps=STEPS, internal_batch_size=BATCH).detach(),
                0.95,
            ),
        },
        BATCH,
    )


def test_grad_cam(score: Score) -> None:
    module: Any = score.module
    module.requires_grad_(True)
    cam = GradCAM(
        score,
        [module.visual.transformer.resblocks[-1].ln_1],
        reshape_transform=lambda t: t[:, 1:].transpose(1, 2).unflatten(2, (14, 14)),
    )
    with torch.enable_grad():
        compare(
            "accelerate_grad_cam",
            f"pytorch-grad-cam's GradCAM under accelerate, ViT-B/16, {BATCH} images",
            score,
            "pytorch_grad_cam",
            {"GradCAM": (lambda x: cam(x, [lambda row: row[0]] * len(x)), 0.40)},
            BATCH,
        )


def test_road(score: Score) -> None:
    cams = np.random.default_rng(0).random((1, 224, 224), dtype=np.float32)
    compare(
        "accelerate_road",
        "pytorch-grad-cam's ROADCombined under accelerate, ViT-B/16, 1 image",
        score,
        "pytorch_grad_cam",
        {"ROADCombined": (lambda x: ROADCombined()(x, cams, [lambda row: row[0]], score), 0.60)},
        1,
        # What is compared are small differences of cosines.
        close=1e-4,
    )


def test_loops_over_prompts(score: Score) -> None:
    """The authors' functions in their own loop, beside the same loop with gradients through the whole model."""
    module: Any = score.module
    module.requires_grad_(True)
    texts = score.texts.T
    authors.use(score.model)
    explainer = clipfast.Explainer(score.model, heads="single", spatial="projected")

    def dropped_in(x: Tensor) -> Tensor:
        outputs, _, _, v, q_out, k_out, _, o, size = authors.clip_encode_dense(x)
        scores = (F.normalize(outputs[:, 0], dim=-1) @ texts)[0]
        return torch.stack([authors.grad_eclip(c, q_out, k_out, v, o, size) for c in scores])

    def plain(x: Tensor) -> Tensor:
        """What the released functions do, with the model's own modules and the graph of all of its blocks."""
        visual, block = module.visual, module.visual.transformer.resblocks[-1]
        h = visual._embeds(x)
        for below in visual.transformer.resblocks[:-1]:
            h = below(h)
        q, k, v = F.linear(block.ln_1(h), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
        o = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        y = h + block.attn.out_proj(o)
        z = F.normalize((visual.ln_post(y + block.mlp(block.ln_2(y))) @ visual.proj)[:, 0], dim=-1)
        with torch.no_grad():
            q, k = block.attn.out_proj(q), block.attn.out_proj(k)
            cosine = F.cosine_similarity(q[0, :1], k[0, 1:], dim=-1)
            weight = (cosine - cosine.min()) / (cosine.max() - cosine.min())
        maps = []
        for c in (z @ texts)[0]:
            (g,) = torch.autograd.grad(c, o, retain_graph=True)
            maps.append((v[0, 1:].detach() @ g[0, 0] * weight).relu().reshape(14, 14))
        return torch.stack(maps)

    with torch.enable_grad():
        x = images(1)
        expected = plain(x)
        errors = {
            "clipfast.compat.grad_eclip in the loop": float((dropped_in(x) - expected).norm() / expected.norm()),
            "clipfast": float((explainer(x, score.texts).maps[0] - expected).norm() / expected.norm()),
        }
        assert max(errors.values()) < 1e-4
        ours = "clipfast.compat.grad_eclip in the loop"
        claim(
            "loops_over_prompts",
            f"Grad-ECLIP of {PROMPTS} prompts, one after the other as published, ViT-B/16, 1 image",
            "encode_image of the image",
            {
                "encode_image": lambda: torch.no_grad()(module.encode_image)(images(1)),
                "a gradient for each prompt, as published": lambda: plain(images(1)),
                ours: lambda: dropped_in(images(1)),
                "clipfast": lambda: explainer(images(1), score.texts),
            },
            against={
                (ours, "a gradient for each prompt, as published"): 0.25,
                ("clipfast", "a gradient for each prompt, as published"): 0.12,
            },
            errors=errors,
            notes="errors are to the loop as published, all in float32",
            repeats=ROUNDS,
        )
