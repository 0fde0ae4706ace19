"""Towers: what attribution methods need from one side of a CLIP model.

A tower runs its blocks from the model's weights up to the *site*, the attention that writes the pooled token, and
hands out that attention's q, k, v and residual together with the tail above it. Both sides look the same to a method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.errors import InputError
from clipfast.models.block import Block, Norm
from clipfast.models.tail import Tail

# Tokens in one pass of a tower. On a CPU small batches stay in its caches: a tower is about a tenth cheaper an image
# in batches of 4 than of 28 (ViT-B/16); a GPU wants to be filled.
CPU_TOKENS, GPU_TOKENS = 800, 32768


@dataclass(frozen=True)
class Site:
    """The attention of one block that writes the pooled token, for a batch.

    q (B, D): the pooled token's query. k, v (B, N, D): all tokens, prefix included. o (B, D): the pooled token's
    attention output, heads concatenated, before the output projection. residual (B, D): the pooled token's residual
    stream below that attention. mask (B, N): True for tokens that the pooled token may attend to, or None for all.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    residual: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """What happens in one block: its input h, the q, k and v of its attention, that attention's output o; (B, N, D)."""

    block: Block
    h: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


@dataclass(frozen=True)
class Tower:
    """One side of the model: blocks, the final norm and projection, and where the pooled token is.

    `blocks` run in the trunk's dtype; `tail` and everything at the site in float32, or float64 for a float64 model.
    """

    blocks: Sequence[Block]
    tail: Tail
    causal: bool
    # exp of the model's logit scale: what its softmax over classes multiplies cosines by.
    logit_scale: float

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def width(self) -> int:
        return self.blocks[0].width

    @property
    def embed_dim(self) -> int:
        return self.tail.proj.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The trunk's dtype."""
        return self.blocks[0].out_weight.dtype

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of embeddings, scores and maps."""
        return self.tail.proj.dtype

    @property
    def device(self) -> torch.device:
        return self.tail.proj.device

    def block_index(self, index: int | str, name: str) -> int:
        """The number of the block that a parameter `name` means; negative ones count from the top.

        Raises InputError where there is no such block.
        """
        if not isinstance(index, int) or isinstance(index, bool) or not -self.depth <= index < self.depth:
            raise InputError(
                f"{name}={index!r} is no block of this tower of {self.depth}: "
                f"give a whole number from {-self.depth} to {self.depth - 1}."
            )
        return index % self.depth

    def last_blocks(self, layers: int) -> int:
        """The number of the lowest of the last `layers` blocks. Raises InputError where there are fewer."""
        if layers > self.depth:
            raise InputError(f"layers={layers} was asked for, but this tower has {self.depth} blocks.")
        return self.depth - layers

    def rows_at_once(self, tokens: int, *, gradients: bool = False) -> int:
        """How many inputs of so many tokens one pass should take; fewer on a GPU where their activations are kept."""
        return rows_at_once(self.device, tokens, gradients)

    def run(
        self,
        h: Tensor,
        start: int = 0,
        stop: int | None = None,
        *,
        heads: int | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Blocks start..stop-1 on tokens h (B, N, D); stop=None runs to the top."""
        for block in self.blocks[start:stop]:
            h = block(h, heads=heads, mask=mask)
        return h

    def layers(
        self,
        h: Tensor,
        start: int = 0,
        stop: int | None = None,
        *,
        heads: int | None = None,
        mask: Tensor | None = None,
    ) -> Iterator[tuple[Layer, Tensor]]:
        """Blocks start..stop-1, run as they are asked for: (what happened in the block, its output (B, N, D)).

        Differentiable in h where gradients are enabled.
        """
        for block in self.blocks[start:stop]:
            q, k, v = block.query_key_value(h)
            o = block.attend(q, k, v, heads=heads, mask=mask)
            out = block.above(h, o)
            yield Layer(block, h, q, k, v, o), out
            h = out

    def finish(
        self, h: Tensor, pooled: Tensor, start: int = 0, *, mask: Tensor | None = None, visible: Tensor | None = None
    ) -> Tensor:
        """Unit embeddings (B, E) of h (B, N, D), the input of block `start`; the last block runs for the pooled token.

        Differentiable in h where gradients are enabled. Arguments as for `run` and `site`.
        """
        h = self.run(h, start, self.depth - 1, mask=mask)
        site = self.site(h, pooled, visible=visible)
        return self.tail(site.residual, site.o)

    def site(
        self,
        h: Tensor,
        pooled: Tensor,
        *,
        index: int = -1,
        heads: int | None = None,
        visible: Tensor | None = None,
    ) -> Site:
        """The site of block `index` for its input h (B, N, D): keys and values of all tokens, the rest of the pooled.

        pooled (B,): each sequence's pooled position. visible (B, N): True where the pooled token may look.
        """
        block = self.blocks[index]
        rows = torch.arange(h.shape[0], device=h.device)
        x = block.norm1(h)
        residual = h[rows, pooled]
        q = block.query(x[rows, pooled])
        k, v = block.key_value(x)
        del x
        mask = None if visible is None else torch.where(visible, 0.0, -torch.inf).to(q.dtype)[:, None, None, :]
        o = block.attend(q[:, None], k, v, heads=heads, mask=mask)[:, 0]
        dtype = self.tail.proj.dtype
        return Site(q.to(dtype), k.to(dtype), v.to(dtype), o.to(dtype), residual.to(dtype), visible)

    def site_of(self, layer: Layer, pooled: Tensor, *, visible: Tensor | None = None) -> Site:
        """The site of a block that `layers` has run for all tokens."""
        rows = torch.arange(layer.h.shape[0], device=layer.h.device)
        q, o, residual = (t[rows, pooled] for t in (layer.q, layer.o, layer.h))
        q, k, v, o, residual = (t.to(self.tail.proj.dtype) for t in (q, layer.k, layer.v, o, residual))
        return Site(q, k, v, o, residual, visible)


@dataclass(frozen=True)
class ImageTower(Tower):
    """A vision transformer whose embedding is its class token's.

    patch_weight (D, 3, ph, pw) and patch_bias: the patch convolution; prefix (K, D): class and register tokens, the
    pooled one first; positions (K + gh gw, D) for the grid (gh, gw) the model was trained on. black: what a black
    pixel is after the model's normalisation, where its preprocessing is known.
    """

    patch_weight: Tensor
    patch_bias: Tensor | None
    prefix: Tensor
    positions: Tensor
    grid: tuple[int, int]
    norm_pre: Norm | None
    black: tuple[float, float, float] | None = None

    kind: ClassVar[str] = "vision transformer"

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.patch_weight.shape[2], self.patch_weight.shape[3]

    def grid_of(self, x: Tensor) -> tuple[int, int]:
        """Patch grid (h, w) of an input (B, 3, H, W); pixels beyond the last whole patch are not seen, as in the model.

        Raises InputError for an input smaller than one patch.
        """
        (ph, pw), (height, width) = self.patch_size, x.shape[-2:]
        if height < ph or width < pw:
            raise InputError(
                f"images of {height} x {width} pixels hold no patch: this model cuts patches of {ph} x {pw}."
            )
        return height // ph, width // pw

    def patch(self, x: Tensor) -> Tensor:
        """The linear part, (B, 3, H, W) -> (B, N, D): convolution, prefix tokens and positions.

        Another grid than the trained one gets resized positions (`resize_positions`).
        """
        grid = self.grid_of(x)
        t = F.conv2d(x.to(self.patch_weight.dtype), self.patch_weight, self.patch_bias, stride=self.patch_size)
        t = t.flatten(2).transpose(1, 2)
        t = torch.cat((self.prefix.expand(t.shape[0], -1, -1), t), dim=1)
        return t.add_(self.positions_for(grid)) if not t.requires_grad else t + self.positions_for(grid)

    def positions_for(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings (N, D) for a patch grid (h, w)."""
        return resize_positions(self.positions, self.grid, grid)

    def embed(self, x: Tensor) -> Tensor:
        """Input of block 0: (B, 3, H, W) -> (B, N, D)."""
        t = self.patch(x)
        return t if self.norm_pre is None else self.norm_pre(t)

    def from_patch(self, t: Tensor) -> Tensor:
        """Unit embeddings (B, E) of what `patch` gives, (B, N, D); differentiable where gradients are enabled."""
        h = t if self.norm_pre is None else self.norm_pre(t)
        return self.finish(h, self.pooled(h))

    def to_pixels(self, gradient: Tensor, size: tuple[int, int]) -> Tensor:
        """Gradients with respect to what `patch` gives, (B, N, D), as those of the pixels: (B, 3, H, W).

        The transpose of `patch`. Pixels of `size` (H, W) beyond the last whole patch get zero.
        """
        (height, width), (ph, pw) = size, self.patch_size
        grid = (height // ph, width // pw)
        patches = gradient[:, self.prefix.shape[0] :].mT.unflatten(2, grid)
        found = F.conv_transpose2d(patches, self.patch_weight.to(gradient.dtype), stride=self.patch_size)
        return F.pad(found, (0, width - grid[1] * pw, 0, height - grid[0] * ph))

    def pooled(self, h: Tensor) -> Tensor:
        """The pooled position of each sequence: the class token's, (B,)."""
        return torch.zeros(h.shape[0], dtype=torch.long, device=h.device)

    def encode(self, x: Tensor) -> Tensor:
        """Unit embeddings (B, E) of normalised images (B, 3, H, W)."""
        h = self.embed(x)
        return self.finish(h, self.pooled(h))


@dataclass(frozen=True)
class TextTower(Tower):
    """A text transformer whose embedding is one token's.

    table (V, D) and positions (T, D); pool: "argmax" (the largest id is EOT), "eos" (first `eot_id`), "first", "last".
    """

    table: Tensor
    positions: Tensor
    pool: str
    eot_id: int

    @property
    def context_length(self) -> int:
        return self.positions.shape[0]

    def embed(self, ids: Tensor) -> Tensor:
        """Input of block 0 for token ids (B, T): (B, T, D)."""
        return (self.table[ids] + self.positions[: ids.shape[1]]).to(self.dtype)

    def pooled(self, ids: Tensor) -> Tensor:
        """The pooled position of each row of token ids (B, T): (B,)."""
        if self.pool == "argmax":
            return ids.argmax(dim=-1)
        if self.pool == "eos":
            return ids.eq(self.eot_id).int().argmax(dim=-1)
        position = 0 if self.pool == "first" else ids.shape[1] - 1
        return torch.full((ids.shape[0],), position, dtype=torch.long, device=ids.device)

    def reach(self, pooled: Tensor, length: int) -> int:
        """How many of `length` positions matter: in a causal tower, none behind the last pooled token."""
        return int(pooled.max()) + 1 if self.causal else length

    def mask(self, length: int) -> Tensor | None:
        """The additive attention mask (T, T) between tokens, None where every token sees every other."""
        if not self.causal:
            return None
        return torch.full((length, length), -torch.inf, device=self.device, dtype=self.dtype).triu_(1)

    def visible(self, pooled: Tensor, length: int) -> Tensor | None:
        """Which positions each pooled token sees: (B, T), or None for all."""
        return torch.arange(length, device=pooled.device) <= pooled[:, None] if self.causal else None

    def encode(self, ids: Tensor) -> Tensor:
        """Unit embeddings (B, E) of token ids (B, T)."""
        pooled = self.pooled(ids)
        ids = ids[:, : self.reach(pooled, ids.shape[1])]
        length = ids.shape[1]
        return self.finish(self.embed(ids), pooled, mask=self.mask(length), visible=self.visible(pooled, length))


def rows_at_once(device: torch.device, tokens: int, gradients: bool) -> int:
    """How many inputs of so many tokens one pass on a device should take."""
    room = CPU_TOKENS if device.type != "cuda" else GPU_TOKENS // (8 if gradients else 1)
    return max(1, room // tokens)


def resize_positions(positions: Tensor, trained: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Position embeddings (K + gh gw, D), K prefix tokens before the `trained` grid (gh, gw), for another grid (h, w).

    Bicubic, align_corners=False, no antialiasing, as the published explainers do it.
    """
    if grid == trained:
        return positions
    patches = trained[0] * trained[1]
    prefix, spatial = positions.split((positions.shape[0] - patches, patches))
    # Half precision has no bicubic kernel everywhere; the table is small.
    spatial = spatial.T.unflatten(1, trained)[None]
    wide = spatial if spatial.dtype == torch.float64 else spatial.float()
    resized = F.interpolate(wide, size=grid, mode="bicubic", align_corners=False)
    return torch.cat((prefix, resized[0].flatten(1).T.to(prefix.dtype)))
