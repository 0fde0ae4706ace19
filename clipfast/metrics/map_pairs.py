"""The maps of two models for the same pictures and texts: kept as they are made, compared, and drawn side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image
from torch import Tensor

from clipfast.data.datasets import Sample
from clipfast.data.geometry import Geometry
from clipfast.errors import ImageError
from clipfast.methods import METHODS
from clipfast.metrics.evaluate import Evaluator
from clipfast.metrics.evaluation import Evaluation, Table
from clipfast.metrics.rows import Shard
from clipfast.metrics.stability import map_ssim
from clipfast.metrics.work import Work
from clipfast.view.diff_page import Card, Pair
from clipfast.view.overlay import drawable, two_signed

# Sides of the squares that maps are compared on, and of pictures on the page; the share of single pixels that are drawn
# no stronger than the rest.
_SIDE, _SHOWN, _OUTLIERS = 224, 416, 0.005

Kept = tuple[Tensor, Geometry]
"""A picture's maps (P, h, w) on the method's grid, and where they lie on it."""


class Keeping(Evaluator):
    """An evaluator of one method that keeps the maps, by the number of the sample."""

    kept: dict[int, Kept]

    def _explained(self, name: str, samples: Mapping[int, Sample | ImageError], shard: Shard) -> Work | None:
        work = super()._explained(name, samples, shard)
        if work is not None:
            for number, maps, geometry in zip(work.numbers, work.maps, work.geometries, strict=True):
                self.kept[number] = (maps.cpu(), geometry)
        return work


def map_likeness(before: Kept, after: Kept) -> Tensor:
    """SSIM (P,) of two models' maps of one picture; on the picture where they see different parts of it."""
    (a, one), (b, other) = before, after
    if one != other and (one.box != other.box or one.covered != one.input or other.covered != other.input):
        a, b = one.to_image(a), other.to_image(b)
    return map_ssim(a, b, _SIDE)


def only_table(found: Evaluation) -> Table:
    """The rows of an evaluation of one method: those of any of its protocols."""
    (own,) = found.tables.values()
    return next(iter(own.values()))


def cards(
    evaluators: Sequence[Keeping],
    evaluations: Sequence[Evaluation],
    numbers: Mapping[int, str],
    drift: Tensor | None,
) -> list[Card]:
    """Samples as they are shown: numbers with why each is; drift (N,): the cosines of their embeddings, where known."""
    kept, theirs = (one.kept for one in evaluators)
    table, other = (only_table(one) for one in evaluations)
    (method,) = evaluations[0].methods.values()
    rows: dict[int, list[int]] = {}
    for row, number in enumerate(table.numbers):
        rows.setdefault(number, []).append(row)
    found = []
    for number, group in numbers.items():
        picture = evaluators[0].dataset[number].image
        assert isinstance(picture, Image.Image)
        ssim = map_likeness(kept[number], theirs[number]).tolist()
        small, heats, others, palette = drawn(picture, kept[number], theirs[number], METHODS[method["method"]].signs)
        pairs = [
            Pair(table.texts[row], heats[p], others[p], palette, (table.scores[row], other.scores[row]), ssim[p])
            for p, row in enumerate(rows[number])
        ]
        own = None if drift is None else float(drift[number])
        found.append(Card(group, table.keys[rows[number][0]], small, pairs, own))
    return found


def drawn(picture: Image.Image, before: Kept, after: Kept, signs: bool) -> tuple[Image.Image, Tensor, Tensor, str]:
    """A small picture, both models' maps (P, H, W) on its pixels, in 0..1, and their palette.

    signs: whether the method's values below zero mean something. Then those of either model make both maps signed.
    """
    small = picture.copy()
    small.thumbnail((_SHOWN, _SHOWN), Image.Resampling.LANCZOS)
    signed = signs and any(two_signed(maps) for maps, _ in (before, after))
    both = []
    for maps, geometry in (before, after):
        outliers = _OUTLIERS if tuple(maps.shape[-2:]) == geometry.input else 0.0
        heat = drawable(maps, signed, outliers=outliers)
        both.append(geometry.resized(small.height, small.width).to_image(heat, outside=0.5 if signed else 0.0))
    return small, both[0], both[1], "signed" if signed else "heat"
