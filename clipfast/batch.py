"""Images that a method has prepared, to be asked for any texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clipfast.errors import TextError
from clipfast.methods.base import Explained, feature_maps
from clipfast.sheet import Asked


@dataclass(frozen=True)
class Batch:
    """B images of one size after the tower's pass; each further question costs what the method's maps cost.

    explained: what the method made of them. grid: (h, w) of the maps. companions: the embeddings (C, E) of the texts
    that the method needs beside a number of others, or None. As `Explainer.batch` makes it; the texts of one question
    come from `Explainer.asks`.
    """

    explained: Explained
    grid: tuple[int, int]
    companions: Callable[[int], Tensor | None]

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def embeddings(self) -> Tensor:
        """The images' unit embeddings (B, E), the model's own."""
        return self.explained.z

    @torch.no_grad()
    def scores(self, asked: Asked, numbers: Tensor | None = None) -> Tensor:
        """Cosine similarities (B, P) with all texts, or with those of `numbers` (B, P)."""
        embeddings = asked.embeddings if numbers is None else asked.chosen(numbers)[0]
        return (self.embeddings[:, None] @ embeddings.mT)[:, 0]

    @torch.inference_mode(False)
    @torch.no_grad()
    def maps(self, asked: Asked, numbers: Tensor | None = None) -> Tensor:
        """Maps (B, P, h, w) for all texts, or for those of each image's own `numbers` (B, P): the maps that calling
        the explainer for these texts alone gives.

        Where `features` were asked for before, they are products with those. Raises TextError for numbers without
        texts.
        """
        if numbers is not None and (numbers.ndim != 2 or len(numbers) != len(self) or numbers.shape[1] == 0):
            raise TextError(f"numbers of texts must be ({len(self)}, P) with P at least 1, not {tuple(numbers.shape)}.")
        wanted: Any
        if numbers is None:
            wanted = asked.embeddings if asked.states is None else asked.states
        else:
            wanted = asked.chosen(numbers)[1]
        if "features" in self.__dict__:
            maps = feature_maps(*self.features, wanted, self.explained.relu)
        else:
            companions = self.companions(asked.prompts if numbers is None else numbers.shape[1])
            more = {} if companions is None else {"companions": companions}
            maps = self.explained.maps(wanted, **more)
        return maps.unflatten(-1, self.grid)

    @cached_property
    def features(self) -> tuple[Tensor, Tensor]:
        """Attribution features: values (B, n, E) and weights (B, n), or (B, L, n, E) and (B, L, n); see `Features`."""
        with torch.inference_mode(False), torch.no_grad():
            return self.explained.prompt_free()
