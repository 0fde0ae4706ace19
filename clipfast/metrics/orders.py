"""In which order a picture's pixels go: by the maps of a method, or at random."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from clipfast.api import Explainer
from clipfast.errors import InputError
from clipfast.methods import build_method
from clipfast.metrics.registry import parse
from clipfast.metrics.rows import fingerprint
from clipfast.models.model import Model, Precision

Split = Literal["train", "test"]


class Order(ABC):
    """Which pixels of a picture go first: higher values of a map do."""

    name: str

    @abstractmethod
    def maps(self, x: Tensor, labels: Sequence[int], numbers: Sequence[int], split: Split) -> Tensor:
        """Maps (b, h, w), any grid, of normalised inputs (b, 3, H, W), each for its own class.

        numbers: of the samples in their data set, which is the one to train on or the one to test on.
        """

    def settings(self) -> dict[str, Any]:
        """All that the maps depend on beside the model."""
        return {}


class ByMaps(Order):
    """By a method's maps of each picture for its own class.

    method: its name and parameters, as "mmel:steps=8". texts: of all K classes, by label, in the words to ask with, or
    embeddings (K, E), such as a probe's directions.

    Raises InputError as `Explainer` does.
    """

    def __init__(self, model: Model, method: str, texts: Sequence[str] | Tensor, *, precision: Precision = None):
        self.name = method
        kind, parameters = parse(method)
        self._method = build_method(kind, parameters)
        self._explainer = Explainer(model, kind, precision=precision, **parameters)
        self.texts = texts
        # Encoded once; a method that reads the words of a text gets it as it stands.
        if not isinstance(texts, Tensor) and not self._method.reads_words:
            self.texts = model.encode_texts(texts, precision)

    def maps(self, x: Tensor, labels: Sequence[int], numbers: Sequence[int], split: Split) -> Tensor:
        if max(labels) >= len(self.texts):
            raise InputError(
                f"{self.name} has the texts of {len(self.texts)} classes, but there is a class {max(labels)}."
            )
        own = self.texts[list(labels)] if isinstance(self.texts, Tensor) else [self.texts[label] for label in labels]
        found = self._explainer(x, own, pairs=True).maps
        assert isinstance(found, Tensor)
        return found[:, 0]

    def settings(self) -> dict[str, Any]:
        parameters = {name: getattr(self._method, name) for name in self._method.parameters()}
        texts = self.texts.tolist() if isinstance(self.texts, Tensor) else list(self.texts)
        return {"method": parse(self.name)[0], "parameters": parameters, "texts": fingerprint(texts=texts)}


class AtRandom(Order):
    """In random order, each picture in its own: the baseline.

    cells: None for single pixels, as in the paper, or the grid (h, w) of a random map: its blots are as large as those
    of maps by the patch, and leave as little between them.
    """

    def __init__(self, seed: int = 0, cells: tuple[int, int] | None = None):
        self.seed, self.cells = seed, cells
        self.name = "random" if cells is None else "random patches"

    def maps(self, x: Tensor, labels: Sequence[int], numbers: Sequence[int], split: Split) -> Tensor:
        height, width = self.cells or x.shape[-2:]
        drawn = [
            np.random.default_rng([self.seed, split == "test", number]).random((height, width), np.float32)
            for number in numbers
        ]
        return torch.from_numpy(np.stack(drawn)).to(x.device)

    def settings(self) -> dict[str, Any]:
        return {"seed": self.seed, "cells": self.cells}
