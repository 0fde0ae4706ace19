"""What one call asks of its images, and the sheet that micro-batches fill in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.errors import TextError
from clipfast.methods.base import Explained
from clipfast.models.tokens import TokenStates


def unit_embeddings(given: Tensor, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A user's embeddings (P, width) at unit length. Raises TextError for what cannot be some."""
    if given.ndim != 2 or given.shape[1] != width or not given.is_floating_point():
        raise TextError(
            f"text embeddings must be floats of shape (P, {width}), not {given.dtype} {tuple(given.shape)}."
        )
    if len(given) == 0:
        raise TextError("there is no text: pass at least one.")
    embeddings = given.detach().to(device, dtype)
    norms = embeddings.norm(dim=-1)
    if not bool((norms.isfinite() & (norms > 0)).all()):
        raise TextError("text embeddings must be finite and not zero.")
    # Unit already, as most come: a copy of 10,000 would take more memory than the tower does.
    unit = bool((norms - 1).abs().max() <= 4 * torch.finfo(norms.dtype).eps)
    return embeddings if unit else F.normalize(embeddings, dim=-1)


@dataclass(frozen=True)
class Asked:
    """The prompts of a call.

    embeddings (P, E): their products with the images' are the scores. names: the texts, or None where embeddings came.
    states: what the method's maps are made of instead, where it reads the texts' words. pairs: text i is asked of image
    i alone. companions (C, E): texts that the method needs beside these. sentence: the text whose words they are.
    """

    embeddings: Tensor
    names: list[str] | None = None
    states: TokenStates | None = None
    pairs: bool = False
    companions: Tensor | None = None
    sentence: str | None = None

    @property
    def prompts(self) -> int:
        """How many maps each image gets."""
        return 1 if self.pairs else len(self.embeddings)

    def of(self, images: Sequence[int]) -> tuple[Tensor, Any]:
        """For these images: the embeddings (P, E) or (b, 1, E), and what `Explained.maps` takes."""
        if not self.pairs:
            return self.embeddings, self.embeddings if self.states is None else self.states
        return self.chosen(torch.as_tensor(images)[:, None])

    def chosen(self, numbers: Tensor) -> tuple[Tensor, Any]:
        """For b images of which each is asked some of the texts, their numbers (b, P): embeddings (b, P, E), and what
        `Explained.maps` takes."""
        own = self.embeddings[numbers.to(self.embeddings.device)]
        return own, own if self.states is None else [self.states.select(*row) for row in numbers.tolist()]


@dataclass
class Sheet:
    """The maps, scores and extras of B images, row by row as they come in; NaN for what never comes.

    whole (B, P, h, w): where all maps have one grid; else `rows` holds a map (P, h_i, w_i) an image.
    """

    asked: Asked
    scores: Tensor
    whole: Tensor | None
    rows: list[Tensor]
    extras: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def blank(
        cls, asked: Asked, images: int, grid: tuple[int, int] | None, dtype: torch.dtype, device: torch.device
    ) -> Sheet:
        """Room for the answers of `images` images; grid: (h, w) if all maps are known to have it."""
        scores = torch.full((images, asked.prompts), torch.nan, dtype=dtype, device=device)
        if grid is None:
            return cls(asked, scores, None, [scores.new_full((asked.prompts, 1, 1), torch.nan) for _ in range(images)])
        # Not filled: touching every page once more would cost as much as the maps of many prompts.
        return cls(asked, scores, scores.new_empty(images, asked.prompts, *grid), [])

    def fill(self, images: list[int], explained: Explained, grid: tuple[int, int]) -> None:
        """Enter what a micro-batch, these images, says."""
        embeddings, wanted = self.asked.of(images)
        self.scores[images] = (explained.z[:, None] @ embeddings.mT)[:, 0]
        more: dict[str, Any] = {} if self.asked.companions is None else {"companions": self.asked.companions}
        first, last = images[0], images[-1] + 1
        if self.whole is not None and last - first == len(images):
            explained.maps(wanted, out=self.whole[first:last].flatten(-2), **more)
        else:
            found = explained.maps(wanted, **more).unflatten(-1, grid)
            for i, m in zip(images, found, strict=True):
                if self.whole is None:
                    self.rows[i] = m
                else:
                    self.whole[i] = m
        for name, values in explained.extras().items():
            self.extras.setdefault(name, torch.full_like(self.scores, torch.nan))[images] = values.to(self.scores.dtype)

    def blot(self, images: Sequence[int]) -> None:
        """Enter that these images could not be explained."""
        if self.whole is not None:
            for i in images:
                self.whole[i] = torch.nan

    def maps(self, prompts: slice = slice(None)) -> Tensor | list[Tensor]:
        """The maps of some prompts: one tensor (B, P, h, w) where they have one grid, else a list."""
        if self.whole is not None:
            return self.whole[:, prompts]
        rows = [m[prompts] for m in self.rows]
        return torch.stack(rows) if len({m.shape for m in rows}) == 1 else rows
