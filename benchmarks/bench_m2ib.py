"""M2IB beside the authors' recipe: ten copies of the pair through both whole towers, ten times, forwards and backwards.

    pytest benchmarks/bench_m2ib.py -o python_files='bench_*.py' -s

open_clip's ViT-B/16 with random weights. The recipe takes minutes and its ten steps are alike, so one of them is timed
and is the unit here; ours is timed whole. A quarter of the recipe is 2.5 of its steps.
"""

from __future__ import annotations

from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from claims import claim
from torch import Tensor

import clipfast
from clipfast.methods.m2ib import M2IB
from clipfast.models.openclip import image_tower

LAYER, COPIES, STEPS, BETA = 9, 10, 10, 0.1


def recipe(model: Any, x: Tensor, ids: Tensor, steps: int, noise: Tensor | None = None) -> Tensor:
    """As published, in plain autograd: information (n,) of the patches of one image (1, 3, H, W) for one text (1, T).

    noise (steps, copies, N, D): given where results are compared; drawn in each step, as published, if not.
    """
    tokens, width = model.visual.positional_embedding.shape
    alpha = torch.full((1, tokens, width), 5.0, requires_grad=True)
    adam = torch.optim.Adam([alpha], lr=1.0)
    kept: list[Tensor] = []

    def bottleneck(module: Any, args: Any, h: Tensor) -> Tensor:
        through = torch.sigmoid(alpha).expand_as(h)
        mean, variance = h * through, (1 - through) ** 2
        kept.append(-0.5 * (1 + variance.log() - mean**2 - variance))
        eps = torch.randn_like(h) if noise is None else noise[len(kept) - 1]
        return mean + variance.sqrt() * eps

    hook = model.visual.transformer.resblocks[LAYER].register_forward_hook(bottleneck)
    images, texts = x.expand(COPIES, -1, -1, -1), ids.expand(COPIES, -1)
    for _ in range(steps):
        adam.zero_grad()
        fit = F.cosine_similarity(model.encode_text(texts), model.encode_image(images), dim=-1, eps=1e-6)
        (BETA * kept[-1].mean() - fit.mean()).backward()
        adam.step()
    hook.remove()
    return kept[-1].detach().mean(0).sum(-1)[1:]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_recipe() -> None:
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16").eval()
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    x, sentence = torch.randn(1, 3, 224, 224), "two brown dogs asleep on a red sofa"
    ids = tokenizer([sentence])
    loaded = clipfast.load(model, tokenizer=tokenizer)

    # Two steps, the last of which only reads the information: one update of every element.
    generator = torch.Generator().manual_seed(0)
    shape = (COPIES, *model.visual.positional_embedding.shape)
    noise = torch.stack([torch.randn(*shape, generator=generator) for _ in range(2)])
    with torch.no_grad():
        text = F.normalize(model.encode_text(ids), dim=-1)
    error = relative(M2IB(steps=2).image(image_tower(model), x).maps(text)[0, 0], recipe(model, x, ids, 2, noise))
    assert error < 1e-3

    explainer = clipfast.Explainer(loaded, "m2ib")
    embedding = F.normalize(torch.randn(512), dim=-1)

    def published() -> None:
        model.requires_grad_(True)
        recipe(model, x, ids, 1)

    def frozen() -> None:
        model.requires_grad_(False)
        recipe(model, x, ids, 1)

    found = claim(
        "m2ib",
        "M2IB, 10 steps x 10 copies, ViT-B/16, 1 image, 1 prompt",
        "one of the ten equal steps of the authors' recipe",
        {
            "the authors' recipe, one of its ten steps": published,
            "one of its ten steps with frozen weights": frozen,
            "clipfast, all ten steps": lambda: explainer(x, [sentence]),
            "clipfast, the words of a text, all ten steps": lambda: explainer.words(embedding, sentence),
        },
        at_most={
            "clipfast, all ten steps": 0.25 * STEPS,
            "clipfast, the words of a text, all ten steps": 0.25 * STEPS,
        },
        errors={"clipfast, all ten steps": error},
        notes="A tenth of the recipe is the unit, since all of it takes minutes: divide by ten for ratios to the whole "
        "recipe (target 0.25). Its weights require gradients, as published, and its texts have open_clip's 77 tokens. "
        "The error is relative L2 after two steps with the same noise, both in float32.",
        repeats=5,
    )
    assert all(row["ratio"] <= row["at_most"] for row in found["rows"] if row["at_most"] is not None)
