"""Attention, rollout, Chefer's GAME and Grad-CAM beside one encode of the same images, and their peers in turn.

    pytest benchmarks/bench_attention.py -o python_files='bench_*.py' -s

open_clip's ViT-B/16 with random weights. Numbers are first compared with float64, the peers' with ours where they are
the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import peers
import torch
import torch.nn.functional as F
from claims import claim
from torch import Tensor

import clipfast

BATCH, PROMPTS = 2, 8
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("attention", {}),
    "rollout": ("rollout", {}),
    "Grad-CAM": ("grad_cam", {"mean_over": "patches"}),
    "GAME, last block": ("chefer", {}),
    "GAME, all blocks": ("chefer", {"start_layer": 0}),
}


def test_attention() -> None:
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16").eval()
    x = torch.randn(BATCH, 3, 224, 224)
    texts = F.normalize(torch.randn(PROMPTS, model.text_projection.shape[1]), dim=-1)
    exact = copy.deepcopy(model).double()
    functions: dict[str, Callable[[], object]] = {"encode_image": torch.no_grad()(partial(model.encode_image, x))}
    errors, expected = {}, {}
    for title, (name, parameters) in OURS.items():
        explainer = clipfast.Explainer(model, name, **parameters)
        maps = clipfast.Explainer(exact, name, **parameters)(x.double(), texts.double()).maps
        expected[title] = torch.as_tensor(maps).flatten(2)
        errors[title] = relative(torch.as_tensor(explainer(x, texts).maps).flatten(2), expected[title])
        functions[title] = partial(explainer, x, texts)
    assert max(errors.values()) < 1e-5

    functions["pytorch-grad-cam, trunk frozen by hand"] = partial(
        peers.grad_cam_frozen(copy.deepcopy(model), x, texts), texts
    )
    recipe = partial(game, copy.deepcopy(model).requires_grad_(False), x, texts)
    title = "GAME, last block, as the authors do it"
    errors[title] = relative(recipe(), expected["GAME, last block"])
    assert errors[title] < 1e-4
    functions[title] = recipe
    claim(
        "attention",
        f"Attention, rollout, Grad-CAM and GAME, ViT-B/16, {BATCH} images, {PROMPTS} prompts",
        "encode_image of the same images",
        functions,
        errors=errors,
        notes="Errors are relative L2 to float64. pytorch-grad-cam explains the last block's first norm, as its "
        "documentation has it, where ours explains that norm's input. The authors' GAME is written out here: an image "
        "once a prompt through the tower, and autograd down to the last attention.",
        repeats=5,
    )


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def game(model: Any, x: Tensor, texts: Tensor) -> Tensor:
    """The published notebook's steps with cosines for logits: (B, P, n)."""
    visual, maps = model.visual, []
    for image in x:
        h = visual._embeds(image.expand(len(texts), -1, -1, -1))
        for block in visual.transformer.resblocks:
            q, k, v = (
                t.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2)
                for t in F.linear(block.ln_1(h), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
            )
            a = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).requires_grad_()
            h = h + block.attn.out_proj((a @ v).transpose(1, 2).flatten(2))
            h = h + block.mlp(block.ln_2(h))
        z = F.normalize(visual.ln_post(h[:, 0]) @ visual.proj, dim=-1)
        (gradient,) = torch.autograd.grad((z * texts).sum(), a)
        r = torch.eye(a.shape[-1]) + (gradient * a).detach().clamp(min=0).mean(1)
        maps.append(r[:, 0, 1:])
    return torch.stack(maps)
