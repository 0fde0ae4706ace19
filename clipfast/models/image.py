"""Image towers: what lies below the first block, from pixels to tokens and back, for each kind of stem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.errors import InputError
from clipfast.models.block import Block, Rotary
from clipfast.models.layers import Chain, Norm
from clipfast.models.tower import Tower

Resize = Literal["bicubic", "bicubic_antialias", "bilinear_antialias"]


@dataclass(frozen=True, kw_only=True)
class ImageTower(Tower):
    """The image side. What lies below the first block is for each kind of stem to say.

    grid (gh, gw): of the patches that the model was trained on. patch_size (ph, pw): pixels of one of them. prefix: how
    many tokens come before the patches. black: what a black pixel is after the model's normalisation, where its
    preprocessing is known. mean: whether the embedding is of the patches' mean, else the first token is pooled, or all
    by an attention pool.
    """

    grid: tuple[int, int]
    prefix: int
    mean: bool = False
    black: tuple[float, float, float] | None = None

    kind: ClassVar[str] = "vision transformer"
    # Whether `patch` is linear in the pixels.
    linear: ClassVar[bool] = True

    @property
    def patch_size(self) -> tuple[int, int]:
        raise NotImplementedError

    @property
    def has_class_token(self) -> bool:
        """Whether the embedding is that of a token which goes through all blocks: no attention pool, no mean."""
        return isinstance(self.blocks[-1], Block) and not self.mean

    def grid_of(self, x: Tensor) -> tuple[int, int]:
        """Patch grid (h, w) of an input (B, 3, H, W); pixels beyond the last whole patch are not seen, as in the model.

        Raises InputError for an input smaller than one patch.
        """
        return patch_grid(x, self.patch_size)

    def fitted(self, grid: tuple[int, int]) -> ImageTower:
        """The tower for inputs of a patch grid (h, w): itself, where nothing in its blocks depends on the grid."""
        return self

    def patch(self, x: Tensor) -> Tensor:
        """The linear part of the stem: tokens (B, N, D), or where the stem is not linear the pixels that it sees."""
        raise NotImplementedError

    def tokens(self, t: Tensor) -> Tensor:
        """Input of block 0, (B, N, D), of what `patch` gives; differentiable where gradients are enabled."""
        raise NotImplementedError

    def to_pixels(self, gradient: Tensor, size: tuple[int, int]) -> Tensor:
        """Gradients with respect to what `patch` gives as those of all pixels of `size` (H, W): (B, 3, H, W)."""
        raise NotImplementedError

    def embed(self, x: Tensor) -> Tensor:
        """Input of block 0: (B, 3, H, W) -> (B, N, D)."""
        return self.tokens(self.patch(x))

    def from_patch(self, t: Tensor) -> Tensor:
        """Unit embeddings (B, E) of what `patch` gives; differentiable where gradients are enabled."""
        h = self.tokens(t)
        return self.finish(h, self.pooled(h))

    def pooled(self, h: Tensor) -> Tensor:
        """What is pooled of tokens h (B, N, D): the first one's position (B,), or the weights (B, N) of the patches."""
        if not self.mean:
            return torch.zeros(h.shape[0], dtype=torch.long, device=h.device)
        weights = torch.zeros(h.shape[:2], dtype=self.result_dtype, device=h.device)
        weights[:, self.prefix :] = 1 / (h.shape[1] - self.prefix)
        return weights

    def encode(self, x: Tensor) -> Tensor:
        """Unit embeddings (B, E) of normalised images (B, 3, H, W)."""
        tower = self.fitted(self.grid_of(x))
        h = tower.embed(x)
        return tower.finish(h, tower.pooled(h))


@dataclass(frozen=True, kw_only=True)
class PatchTower(ImageTower):
    """A vision transformer whose tokens are one convolution's patches.

    patch_weight (D, 3, ph, pw) and patch_bias: that convolution. first (K, D): class and register tokens, the pooled
    one first. positions (K + gh gw, D) for the grid (gh, gw) the model was trained on, or None; resize: how they are
    brought to another. rotary: what rotary embeddings its blocks take for a grid.
    """

    patch_weight: Tensor
    patch_bias: Tensor | None
    first: Tensor | None = None
    positions: Tensor | None = None
    norm_pre: Norm | Chain = Chain()  # noqa: RUF009 (frozen)
    resize: Resize = "bicubic"
    rotary: Callable[[tuple[int, int]], Rotary] | None = None

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.patch_weight.shape[2], self.patch_weight.shape[3]

    def fitted(self, grid: tuple[int, int]) -> PatchTower:
        if self.rotary is None or grid == self.grid:
            return self
        rotary = self.rotary(grid)
        blocks = [
            replace(block, rotary=rotary) if isinstance(block, Block) and block.rotary is not None else block
            for block in self.blocks
        ]
        positions = None if self.positions is None else self.positions_for(grid)
        return replace(self, blocks=blocks, grid=grid, positions=positions)

    def patch(self, x: Tensor) -> Tensor:
        """Convolution, prefix tokens and positions: (B, 3, H, W) -> (B, N, D).

        Another grid than the trained one gets resized positions (`resize_positions`).
        """
        grid = self.grid_of(x)
        t = self._convolved(x.to(self.patch_weight.dtype), grid)
        if self.first is not None:
            t = torch.cat((self.first.expand(t.shape[0], -1, -1), t), dim=1)
        if self.positions is None:
            return t
        return t.add_(self.positions_for(grid)) if not t.requires_grad else t + self.positions_for(grid)

    def _convolved(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches of pixels (B, 3, H, W) through the convolution: (B, n, D)."""
        if not (x.requires_grad and torch.is_grad_enabled()):
            t = F.conv2d(x, self.patch_weight, self.patch_bias, stride=self.patch_size)
            return t.flatten(2).transpose(1, 2)
        # The same as one product: on a CPU the derivative of such a convolution takes several times as long.
        (h, w), (ph, pw) = grid, self.patch_size
        cells = x[..., : h * ph, : w * pw].unflatten(3, (w, pw)).unflatten(2, (h, ph))
        return F.linear(
            cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), self.patch_weight.flatten(1), self.patch_bias
        )

    def positions_for(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings (N, D) for a patch grid (h, w)."""
        assert self.positions is not None
        return resize_positions(self.positions, self.grid, grid, self.resize)

    def tokens(self, t: Tensor) -> Tensor:
        return self.norm_pre(t)

    def to_pixels(self, gradient: Tensor, size: tuple[int, int]) -> Tensor:
        """The transpose of `patch`, (B, N, D) -> (B, 3, H, W). Pixels beyond the last whole patch get zero."""
        (height, width), (ph, pw) = size, self.patch_size
        grid = (height // ph, width // pw)
        patches = gradient[:, self.prefix :] @ self.patch_weight.to(gradient.dtype).flatten(1)
        found = patches.unflatten(2, self.patch_weight.shape[1:]).unflatten(1, grid).permute(0, 3, 1, 4, 2, 5)
        return F.pad(found.flatten(4).flatten(2, 3), (0, width - grid[1] * pw, 0, height - grid[0] * ph))


@dataclass(frozen=True, kw_only=True)
class PixelTower(ImageTower):
    """A tower whose tokens come out of something that is not linear in the pixels.

    pixels (ph, pw): what one place of the grid covers.
    """

    pixels: tuple[int, int]

    linear: ClassVar[bool] = False

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.pixels

    def patch(self, x: Tensor) -> Tensor:
        """The pixels that the tower sees, in the trunk's dtype: those beyond the last whole patch are not among them.

        Raises InputError for an input smaller than one patch.
        """
        (h, w), (ph, pw) = self.grid_of(x), self.patch_size
        return x[..., : h * ph, : w * pw].to(self.dtype)

    def to_pixels(self, gradient: Tensor, size: tuple[int, int]) -> Tensor:
        return F.pad(gradient, (0, size[1] - gradient.shape[3], 0, size[0] - gradient.shape[2]))


@dataclass(frozen=True, kw_only=True)
class StemTower(PixelTower):
    """A transformer above convolutions.

    stem: pixels (B, 3, H, W) of whole patches -> input of block 0, (B, N, D).
    """

    stem: Callable[[Tensor], Tensor]

    def tokens(self, t: Tensor) -> Tensor:
        return self.stem(t)


def patch_grid(x: Tensor, patch: tuple[int, int]) -> tuple[int, int]:
    """How many patches (ph, pw) an input (B, 3, H, W) holds: (h, w). Raises InputError where there is none."""
    (ph, pw), (height, width) = patch, x.shape[-2:]
    if height < ph or width < pw:
        raise InputError(f"images of {height} x {width} pixels hold no patch: this model cuts patches of {ph} x {pw}.")
    return height // ph, width // pw


def resize_positions(
    positions: Tensor, trained: tuple[int, int], grid: tuple[int, int], how: Resize = "bicubic"
) -> Tensor:
    """Position embeddings (K + gh gw, D), K prefix tokens before the `trained` grid (gh, gw), for another grid (h, w).

    how: "bicubic" as the published explainers and transformers do it, "bicubic_antialias" as timm, "bilinear_antialias"
    as SigLIP 2; all with align_corners=False.
    """
    if grid == trained:
        return positions
    patches = trained[0] * trained[1]
    prefix, spatial = positions.split((positions.shape[0] - patches, patches))
    # Half precision has no bicubic kernel everywhere; the table is small.
    spatial = spatial.T.unflatten(1, trained)[None]
    wide = spatial if spatial.dtype == torch.float64 else spatial.float()
    mode, _, smooth = how.partition("_")
    resized = F.interpolate(wide, size=grid, mode=mode, align_corners=False, antialias=bool(smooth))
    return torch.cat((prefix, resized[0].flatten(1).T.to(prefix.dtype)))
