"""What is left of the score while the pixels that a map ranks first are covered: as numbers, and as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from torch import Tensor

from clipfast.api import Explainer
from clipfast.data.geometry import InputSpec
from clipfast.errors import InputError
from clipfast.methods.masking import whole_patches
from clipfast.metrics.base import Columns, Protocol
from clipfast.metrics.perturbation import Clock, Encode, cosine, curves, on_pixels
from clipfast.metrics.stability import inputs
from clipfast.ops.mask_sequence import mask_sequence, rank_map
from clipfast.view.figure import side_by_side


@dataclass(frozen=True)
class Occlusion(Protocol):
    """`occlusion`: the cosine with the top 5, 10 ... 25 percent of the pixels covered.

    fractions: of the pixels that the model sees. fill: what covers them, in the normalised image; 0 is
    the mean colour. Pixels with equal values go in reading order.

    drop: what the score loses, the mean over the fractions.
    """

    fractions: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.25)
    fill: float = 0.0

    name: ClassVar[str] = "occlusion"
    source: ClassVar[str] = "the first points of RISE's deletion curve (Petsiuk et al., BMVC 2018), with the cosine"
    figures: ClassVar[Mapping[str, str]] = {"drop": "higher"}

    def __post_init__(self) -> None:
        if not self.fractions or not all(0 < f <= 1 for f in self.fractions):
            raise InputError(f"fractions must be one or more shares of the pixels, in (0, 1], not {self.fractions}.")

    def measure(
        self,
        encode: Encode,
        texts: Tensor,
        images: Tensor,
        maps: Tensor,
        *,
        batch: int = 32,
        clock: Clock | None = None,
    ) -> Columns:
        """Columns of B * P pairs: `drop`, and "score 0.050" at each fraction, 0 first; arguments as for `curves`."""
        points = (0.0, *self.fractions)
        found = curves(
            encode, cosine(texts), images, maps, {"deletion": (points, self.fill)}, batch=batch, clock=clock
        )["deletion"]
        rows = found.flatten(0, 1).double().cpu()
        scores = {f"score {f:.3f}": row for f, row in zip(points, rows.unbind(1), strict=True)}
        return {"drop": (rows[:, :1] - rows[:, 1:]).mean(1), **scores}

    def strip(self, explainer: Explainer, image: Any, text: str, heat: Tensor | None = None) -> Image.Image:
        """The image as the model sees it, whole and covered more and more, with the scores beneath.

        heat: (h, w), the map of the text, where it is at hand; else it is explained here.

        Raises InputError for more than one image, and as the explainer does.
        """
        found = inputs(explainer, image)
        if len(found) != 1:
            raise InputError(f"a strip shows one image, not {len(found)}.")
        tower, _ = explainer.model.towers(explainer.precision)
        x = whole_patches(tower, found[0][None])
        if heat is None:
            heat = explainer(x, text).maps[0][0]
        elif heat.shape == found[0].shape[1:]:
            heat = heat[: x.shape[2], : x.shape[3]]
        texts = explainer.model.encode_texts([text], explainer.precision)
        ranks = rank_map(on_pixels(heat[None, None].to(x.device), (x.shape[2], x.shape[3])))
        copies = mask_sequence(x, ranks, (0.0, *self.fractions), "deletion", self.fill)
        scores = (tower.encode(copies.to(tower.dtype)) @ texts.T)[:, 0].tolist()
        return side_by_side(
            [_picture(copy, explainer.spec) for copy in copies],
            ["whole", *(f"{100 * f:g} %" for f in self.fractions)],
            numbers=[f"{score:.3f}" for score in scores],
            title=text,
        )


def _picture(x: Tensor, spec: InputSpec) -> Image.Image:
    """A normalised image (3, H, W) as a picture."""
    mean, std = (x.new_tensor(v)[:, None, None] for v in (spec.mean, spec.std))
    values = (x * std + mean).mul(255).round().clamp(0, 255).byte()
    return Image.fromarray(np.ascontiguousarray(values.permute(1, 2, 0).cpu().numpy()))
