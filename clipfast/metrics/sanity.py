"""Sanity checks: maps must change with the model that they explain, and with the class that is asked for.

    cascade             parts of a tower are randomised one by one from the top down, on a copy of the model; a map that
                        stays the same has nothing to do with what the model learned
    class sensitivity   the maps of an object that is in the image and of one that is not; equal maps show what is
                        salient, not what is asked for

Likeness is Spearman's rank correlation on the map's own grid, and SSIM (`clipfast.metrics.stability`). Adebayo et al.,
Sanity Checks for Saliency Maps, NeurIPS 2018.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from clipfast.api import Explainer, Texts
from clipfast.errors import InputError, ModelError
from clipfast.metrics.base import Columns, Protocol
from clipfast.metrics.stability import inputs, map_ssim
from clipfast.models.model import Model

Maps = Tensor | list[Tensor]
Side = Literal["image", "text"]

_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.|(layer\d+\.\d+)\.")
_BELOW = re.compile(r"conv\d|bn\d|class_embedding|positional_embedding|ln_pre|token_embedding")


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """The rank correlation of each row of a and b (N, n): (N,) float64. Equal values share the mean of their ranks.

    A constant row has no order, and the correlation is not defined: here it is 1 with another constant row, which says
    as little, and 0 with all others.

    Raises InputError for rows of different shapes, without values, or with NaN.
    """
    if a.shape != b.shape or a.ndim != 2 or not a.shape[1] or bool((a.isnan() | b.isnan()).any()):
        raise InputError(
            f"rank correlation compares rows (N, n) of one shape, n at least 1, without NaN, "
            f"not {tuple(a.shape)} and {tuple(b.shape)}."
        )
    x, y = (_ranks(rows) - (rows.shape[1] - 1) / 2 for rows in (a, b))
    spread = (x.square().sum(1) * y.square().sum(1)).sqrt()
    alike = ((x == 0).all(1) & (y == 0).all(1)).double()
    return torch.where(spread > 0, (x * y).sum(1) / spread.clamp(min=0.5), alike)


def _ranks(rows: Tensor) -> Tensor:
    rows = rows.contiguous()
    ordered = rows.sort(1).values
    before = torch.searchsorted(ordered, rows)
    upto = torch.searchsorted(ordered, rows, right=True)
    return (before + upto - 1).double() / 2


def likeness(a: Maps, b: Maps, side: int) -> tuple[Tensor, Tensor]:
    """Spearman's correlation and SSIM of the maps of B images and P prompts, (B, P, h, w) or B of (P, h, w): (B * P,).

    side: SSIM is taken on side x side pixels.
    """
    both = [(spearman(x.flatten(1), y.flatten(1)), map_ssim(x, y, side)) for x, y in zip(a, b, strict=True)]
    ranks, structure = zip(*both, strict=True)
    return torch.cat(ranks).cpu(), torch.cat(structure).cpu()


def parts(module: nn.Module, side: Side) -> dict[str, list[str]]:
    """The names of a tower's parameters, from the top down: its "projection", "block 11" ... "block 0", "embedding".

    The blocks of a ResNet are "layer4.2" and so on; its attention pool is part of the projection. All that is below the
    blocks is the embedding. Raises ModelError for a module without blocks.
    """
    prefix = "visual." if side == "image" else "text." if getattr(module, "text", None) is not None else ""
    blocks: dict[str, list[str]] = {}
    above: list[str] = []
    below: list[str] = []
    for name, _ in module.named_parameters():
        own = name.removeprefix(prefix)
        if not name.startswith(prefix) or (not prefix and name.startswith(("visual.", "logit_"))):
            continue
        if block := _BLOCK.match(own):
            blocks.setdefault(f"block {block[1]}" if block[1] else block[2], []).append(name)
        else:
            (below if _BELOW.match(own) else above).append(name)
    if not blocks:
        raise ModelError(f"{type(module).__name__} has no blocks on its {side} side that could be randomised.")
    return {"projection": above, **dict(reversed(blocks.items())), "embedding": below}


def randomized(
    explainer: Explainer, side: Side, *, seed: int = 0, alone: bool = False
) -> Iterator[tuple[str, Explainer]]:
    """The explainer on a copy of its model, whose parts are randomised from the top down: (the latest part, explainer).

    It is one copy: what was handed out before changes with the next part. alone: each part is restored before the next.

    Every tensor is drawn anew from a normal distribution of its own mean and standard deviation, so that activations
    stay in their range and what was learned is gone. The draws depend on the seed and the part's number alone.
    """
    model = explainer.model
    original = dict(model.module.named_parameters())
    # Of tensors made under a caller's inference_mode nobody could tell that they have changed.
    with torch.inference_mode(False):
        module = deepcopy(model.module)
        other = explainer.on(Model(module, model.tokenizer, model.spec, model.name))
    copies = dict(module.named_parameters())
    for number, (part, names) in enumerate(parts(module, side).items()):
        generator = np.random.default_rng((seed, number))
        with torch.no_grad():
            for name in names:
                wide = original[name].double()
                drawn = torch.from_numpy(generator.standard_normal(tuple(wide.shape), dtype=np.float32))
                copies[name].copy_(wide.mean() + wide.std(correction=0) * drawn.to(wide))
        yield part, other
        if alone:
            with torch.no_grad():
                for name in names:
                    copies[name].copy_(original[name])


@dataclass(frozen=True)
class SanityCascade(Protocol):
    """`sanity/cascade`: how alike maps stay while the model's parts are randomised from the top down.

    tower: which is randomised, "image" or "text". alone: each part by itself, restored before the next ("independent
    randomisation"), in place of the cascade. seed: of the draws; see `randomized`. side: of the maps for SSIM.
    """

    tower: Side = "image"
    alone: bool = False
    seed: int = 0
    side: int = 224

    name: ClassVar[str] = "sanity/cascade"
    source: ClassVar[str] = "Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018"
    figures: ClassVar[Mapping[str, str]] = {"Spearman": "lower", "SSIM": "lower"}

    def __post_init__(self) -> None:
        _check(self.tower)

    def measure(self, explainer: Explainer, images: Any, texts: Texts, *, pairs: bool = False) -> Columns:
        """Columns of B * P pairs, image by image: "Spearman" and "SSIM", means over all parts, and "SSIM block 11" of
        each.

        images, texts, pairs: as an `Explainer` takes them. The whole cascade runs once a call: pass many images at
        once. With tower="text", texts are strings.

        Raises as the explainer does, and as `parts`.
        """
        x = inputs(explainer, images)
        before = explainer(x, texts, pairs=pairs).maps
        columns: Columns = {}
        for part, other in randomized(explainer, self.tower, seed=self.seed, alone=self.alone):
            found = likeness(before, other(x, texts, pairs=pairs).maps, self.side)
            columns |= {f"{figure} {part}": column for figure, column in zip(self.figures, found, strict=True)}
        return _means(columns, self.figures) | columns


@dataclass(frozen=True)
class SanityWordCascade(Protocol):
    """`sanity/cascade` of word maps: their rank correlation while the text tower's parts are randomised.

    alone, seed: as in `SanityCascade`. tower: "text", or "image" for the other one, whose embedding is what words are
    mapped for.
    """

    tower: Side = "text"
    alone: bool = False
    seed: int = 0

    name: ClassVar[str] = "sanity/cascade/words"
    source: ClassVar[str] = SanityCascade.source
    figures: ClassVar[Mapping[str, str]] = {"Spearman": "lower"}

    def __post_init__(self) -> None:
        _check(self.tower)

    def measure(self, explainer: Explainer, images: Any, texts: Sequence[str]) -> Columns:
        """Columns of B pairs, image i with text i; NaN for a text of one word, which has no order.

        Raises InputError where images and texts are not as many, and as the explainer does.
        """
        x = inputs(explainer, images)
        if len(x) != len(texts):
            raise InputError(f"word maps need one text an image: there are {len(x)} images and {len(texts)} texts.")
        before = self._values(explainer, x, texts)
        columns: Columns = {}
        for part, other in randomized(explainer, self.tower, seed=self.seed, alone=self.alone):
            after = self._values(other, x, texts)
            columns[f"Spearman {part}"] = torch.cat(
                [
                    spearman(a[None], b[None]) if len(a) > 1 else a.new_full((1,), torch.nan, dtype=torch.float64)
                    for a, b in zip(before, after, strict=True)
                ]
            ).cpu()
        return _means(columns, self.figures) | columns

    def _values(self, explainer: Explainer, x: list[Tensor], texts: Sequence[str]) -> list[Tensor]:
        return [explainer.words(image, text).values for image, text in zip(x, texts, strict=True)]


@dataclass(frozen=True)
class ClassSensitivity(Protocol):
    """`sanity/class_sensitivity`: how alike the maps of a present and of an absent object are.

    side: of the maps for SSIM. seed: of what `clipfast eval` asks for that is absent, other classes of the data set,
    drawn anew for each image.
    """

    side: int = 224
    seed: int = 0

    name: ClassVar[str] = "sanity/class_sensitivity"
    source: ClassVar[str] = "our reading of class sensitivity: Nie et al., ICML 2018; Adebayo et al., NeurIPS 2018"
    figures: ClassVar[Mapping[str, str]] = {"Spearman": "lower", "SSIM": "lower"}

    def measure(self, explainer: Explainer, images: Any, present: Texts, absent: Texts) -> Columns:
        """Columns of B images, each with its own text of something present and of something absent.

        Raises InputError where they are not as many, and as the explainer does.
        """
        x = inputs(explainer, images)
        there, away = (explainer(x, texts, pairs=True).maps for texts in (present, absent))
        return self.columns(there, away)

    def columns(self, there: Maps, away: Maps) -> Columns:
        """Columns of B * P pairs, from the maps (B, P, h, w) of what is present and of what is absent."""
        return dict(zip(self.figures, likeness(there, away, self.side), strict=True))


def _means(columns: Columns, figures: Mapping[str, str]) -> Columns:
    """For each figure the mean of its columns."""
    return {
        figure: torch.stack([column for name, column in columns.items() if name.startswith(figure)]).mean(0)
        for figure in figures
    }


def _check(tower: str) -> None:
    if tower not in ("image", "text"):
        raise InputError(f"tower must be 'image' or 'text', not {tower!r}.")
