"""TCLIP: every token of a text against every patch of an image, thresholded by a mixture of two Gaussians.

    S = T^ I^T       T^: token states, I^: patch states, each through its tower's final norm and projection, of length 1

One pass of the image tower, whose last block runs for all patches, and no gradient. A prompt costs one product with the
patches and a mixture over its n scores. The paper is a poster without code; what it leaves open is our reading: which
token speaks for a prompt (`aggregate`), how the mixture is fitted and used (`ops/gmm_threshold.py`), and what its "25
forward passes" are (`views`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.errors import InputError
from clipfast.methods.base import Explained, Method, MethodInfo, Relu, at_least, choice
from clipfast.models.image import ImageTower
from clipfast.models.tokens import TokenStates
from clipfast.ops.gmm_threshold import gmm_threshold
from clipfast.ops.token_patch_similarity import token_patch_similarity, token_patch_threshold

# Scores at a time: what is between similarity and map stays small beside the maps of thousands of prompts.
_SCORES = 2**22


@dataclass(frozen=True)
class PatchStates(Explained):
    """The patches of B images in the joint space.

    z (B, E): unit embeddings. patches (B, h, w, E): states of any length; with `side` x `side` views the grid is `side`
    times finer than the tower's, each place the state of the patch centred there.
    """

    z: Tensor
    patches: Tensor
    threshold: str
    aggregate: str
    side: int
    relu: Relu = "none"

    def maps(self, texts: Any, *, out: Tensor | None = None) -> Tensor:
        """Maps (B, P, n) for embeddings or any other states, (P, E) or (B, P, E); they scale with a state's length.

        Or for `TokenStates`, as `aggregate` says; a list of B of them holds the P texts of each image.
        """
        batch, height, width, _ = self.patches.shape
        each = texts[0] if isinstance(texts, list) else texts
        prompts = each.shape[-2] if isinstance(each, Tensor) else len(each)
        if out is None:
            out = self.z.new_empty(batch, prompts, height * width)
        if isinstance(texts, Tensor):
            self._map(self.patches, texts, out)
        elif isinstance(texts, TokenStates):
            self._aggregate(self.patches, texts, out)
        else:
            for i, own in enumerate(texts):
                self._aggregate(self.patches[i : i + 1], own, out[i : i + 1])
        return out

    def prompt_free(self) -> tuple[Tensor, Tensor]:
        unit = F.normalize(self.patches, dim=-1)
        values = _averaged(unit.permute(0, 3, 1, 2), self.side).flatten(2).mT
        return values, values.new_ones(values.shape[:2])

    def _map(self, patches: Tensor, directions: Tensor, out: Tensor) -> None:
        """The thresholded maps of states (P, E) or (B, P, E)."""
        rows = patches.flatten(1, 2)
        lengths = torch.linalg.vector_norm(directions, dim=-1)[..., None]
        for some in _pieces(out):
            if self.side == 1:
                found = token_patch_threshold(directions[..., some, :], rows, self.threshold)
            else:
                found = gmm_threshold(self._similarity(patches, directions[..., some, :]), self.threshold)
            # The scores of a shorter state are those of its direction, scaled; and so is what the threshold leaves.
            torch.mul(found, lengths[..., some, :], out=out[:, some])

    def _similarity(self, patches: Tensor, directions: Tensor) -> Tensor:
        """Cosines (B, P, n), averaged over the views that see a place."""
        scores = token_patch_similarity(directions, patches.flatten(1, 2))
        return _averaged(scores.unflatten(2, patches.shape[1:3]), self.side).flatten(2)

    def _aggregate(self, patches: Tensor, texts: TokenStates, out: Tensor) -> None:
        if self.aggregate == "words":
            # A mean of maps before the threshold is the map of the mean.
            self._map(patches, texts.means, out)
            return
        for p, words in enumerate(texts.by_text):
            scores = self._similarity(patches, words)
            scores *= torch.linalg.vector_norm(words, dim=-1)[:, None]
            out[:, p] = gmm_threshold(scores.amax(1), self.threshold)


@dataclass(frozen=True)
class Tclip(Method):
    """TCLIP.

    threshold: what the mixture leaves of a map. "soft": the height above the mean of the lower component, times the
        posterior of the higher; "hard": that height where the posterior is at least 1/2; "none": the cosines.
    aggregate: what a prompt's map is. "eot": that of the end-of-text token, which is the text's embedding; "words":
        the mean of its words' maps; "max": the highest of its words at each place. A word's map is the mean of its
        pieces'. The threshold comes after.
    views: 1, or an odd square such as 25: the mean over 5 x 5 views of the image, shifted by fifths of a patch (rounded
        to whole pixels, the image's edge repeated), on a grid five times finer.
    """

    threshold: Literal["soft", "hard", "none"] = "soft"
    aggregate: Literal["eot", "words", "max"] = "eot"
    views: int = 1

    signs: ClassVar[bool] = False
    needs: ClassVar = "tokens"
    info: ClassVar = MethodInfo(
        source="TCLIP (poster, without code)",
        forwards="views",
        backwards="0",
        prompt_free=True,
        agrees="there is no published code; a loop over tokens, patches and views in float64 with scikit-learn's "
        "GaussianMixture, to 1e-8",
        our_reading="the mixture's start, stop and lower mean as zero; the end-of-text token for a prompt; 25 forwards "
        "as 5 x 5 shifts by fifths of a patch, averaged on a grid five times finer",
    )
    maps_words: ClassVar[bool] = True

    def __post_init__(self) -> None:
        choice(self, "threshold", "soft", "hard", "none")
        choice(self, "aggregate", "eot", "words", "max")
        at_least(self, "views", 1, whole=True)
        if self._side**2 != self.views or self._side % 2 == 0:
            raise InputError(f"views={self.views!r} must be an odd number squared: 1, 9, 25, 49 ...")

    @property
    def reads_words(self) -> bool:
        return self.aggregate != "eot"

    @property
    def has_features(self) -> bool:
        """Without a threshold a map is a product with the text's embedding."""
        return self.threshold == "none" and not self.reads_words

    @property
    def _side(self) -> int:
        return math.isqrt(self.views)

    def grid(self, tower: ImageTower, size: tuple[int, int]) -> tuple[int, int]:
        height, width = super().grid(tower, size)
        return height * self._side, width * self._side

    @torch.no_grad()
    def image(self, tower: ImageTower, x: Tensor) -> PatchStates:
        """Prepare normalised images (B, 3, H, W); n is the number of patches, times `views`.

        Raises InputError where a patch has fewer pixels a side than there are shifts.
        """
        side, (height, width), prefix = self._side, tower.grid_of(x), tower.prefix
        if side > min(tower.patch_size):
            raise InputError(
                f"views={self.views} shifts patches of {min(tower.patch_size)} pixels by less than one: "
                f"at most {min(tower.patch_size)} squared."
            )
        batch = len(x)
        down, across = (_shifts(pixels, side) for pixels in tower.patch_size)
        size = (batch, height, side, width, side, tower.embed_dim)
        patches = torch.empty(size, dtype=tower.result_dtype, device=tower.device)
        z = patches.new_empty(batch, tower.embed_dim)
        views = [(i, j) for i in range(side) for j in range(side)]
        # As many views in one pass as the tower takes images.
        step = max(1, tower.rows_at_once(height * width) // batch)
        for start in range(0, len(views), step):
            some = views[start : start + step]
            h = tower.embed(torch.cat([_shifted(_shifted(x, down[i], 2), across[j], 3) for i, j in some]))
            states = tower.run(h).unflatten(0, (len(some), batch))
            for (i, j), of_view in zip(some, states, strict=True):
                patches[:, :, i, :, j] = tower.project(of_view[:, prefix:]).unflatten(1, (height, width))
                if down[i] == across[j] == 0:
                    z = tower.top(of_view, tower.pooled(of_view))
        fine = patches.view(batch, height * side, width * side, tower.embed_dim)
        return PatchStates(z, fine, self.threshold, self.aggregate, side)


def _shifts(pixels: int, side: int) -> Sequence[int]:
    """By how many whole pixels each of `side` views is moved along one axis: -0.4 to 0.4 of a patch for five."""
    return [round((i - side // 2) * pixels / side) for i in range(side)]


def _shifted(x: Tensor, by: int, dim: int) -> Tensor:
    """What the image shows `by` pixels further on, its edge repeated beyond itself."""
    if by == 0:
        return x
    at = torch.arange(x.shape[dim], device=x.device).add_(by).clamp_(0, x.shape[dim] - 1)
    return x.index_select(dim, at)


def _averaged(maps: Tensor, side: int) -> Tensor:
    """Maps (B, P, h, w) on the fine grid, whose places each hold one view's patch centred there -> each place's mean
    over the views, of the patch in which a view sees the place. At the edge some views see it in no patch."""
    return F.avg_pool2d(maps, side, 1, side // 2, count_include_pad=False) if side > 1 else maps


def _pieces(out: Tensor) -> list[slice]:
    step = max(1, _SCORES // (out.shape[0] * out.shape[2]))
    return [slice(start, start + step) for start in range(0, out.shape[1], step)]
