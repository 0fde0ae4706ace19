"""A whole tower's forward pass written out on the model's own modules, every attention in the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor


@dataclass
class WrittenOut:
    """h: each block's input (1, N, D); a: its attention (1, H, N, N); after: its output; z (1, E): the embedding."""

    h: list[Tensor] = field(default_factory=list)
    a: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)
    z: Tensor = field(default_factory=lambda: torch.empty(0))


def write_out(model: CLIP, one: Tensor, single_head: tuple[int, ...] = ()) -> WrittenOut:
    """One image (1, 3, H, W) or one text's ids (1, T); blocks in `single_head` run as one head of width D."""
    found = WrittenOut()
    if one.is_floating_point():
        blocks, mask = model.visual.transformer.resblocks, None
        h, pooled = model.visual._embeds(one), 0
    else:
        blocks, mask = model.transformer.resblocks, model.attn_mask.to(model.positional_embedding.dtype)
        h, pooled = model.token_embedding(one) + model.positional_embedding, int(one.argmax())
    for i, block in enumerate(blocks):
        heads = 1 if i in single_head else block.attn.num_heads
        found.h.append(h)
        q, k, v = (
            t.unflatten(-1, (heads, -1)).transpose(1, 2)
            for t in F.linear(block.ln_1(h), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
        )
        logits = q @ k.mT / q.shape[-1] ** 0.5
        found.a.append((logits if mask is None else logits + mask).softmax(-1))
        h = h + block.ls_1(block.attn.out_proj((found.a[-1] @ v).transpose(1, 2).flatten(2)))
        h = h + block.ls_2(block.mlp(block.ln_2(h)))
        found.after.append(h)
    if one.is_floating_point():
        found.z = F.normalize(model.visual.ln_post(h[:, pooled]) @ model.visual.proj, dim=-1)
    else:
        found.z = F.normalize(model.ln_final(h[:, pooled]) @ model.text_projection, dim=-1)
    if not single_head:
        own = model.encode_image(one) if one.is_floating_point() else model.encode_text(one)
        torch.testing.assert_close(found.z, F.normalize(own, dim=-1))
    return found


@pytest.fixture
def written_out() -> Callable[..., WrittenOut]:
    return write_out


@pytest.fixture
def two_texts() -> tuple[Tensor, Tensor, list[int]]:
    """ids (2, 20) for the small models' vocabulary, words (2, 20), and where EOT is."""
    ids = torch.zeros(2, 20, dtype=torch.long)
    ids[0, :7] = torch.tensor([298, 5, 9, 33, 120, 77, 299])
    ids[1, :4] = torch.tensor([298, 250, 3, 299])
    pooled = [6, 3]
    places = torch.arange(20)
    words = (places >= 1) & (places < torch.tensor(pooled)[:, None])
    return ids, words, pooled
