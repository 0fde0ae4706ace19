"""Maps against masks of what the prompt names: pointing, energy, segmentation; and how sparse a map is.

    pointing_game           is the highest pixel on the object?
    energy_pointing_game    how much of the map's mass is on it?
    segmentation/chefer     the map above its mean as a segmentation, and the average precision of [1 - R, R]
    segmentation/mask_iou   overlap of object and map above a threshold
    precision@threshold     how much of the map above a threshold is object
    gini                    sparsity, without a mask

Zhang et al., IJCV 2018 (pointing game; TorchRay is the published code); Wang et al., Score-CAM, CVPRW 2020 (energy);
Chefer et al., CVPR 2021 (segmentation); Hurley and Rickard, IEEE Trans. Inf. Theory 2009 (Gini).

Maps are (N, h, w) or (B, P, h, w) of any grid and any real dtype; masks (N, H, W) or (B, P, H, W), one for each map:
bool, or whole numbers where > 0 is the object, 0 is not, and < 0 (ignore labels) takes no part. Pairs count image by
image. What holds for all:

- a map of another size than its mask is bilinear on the mask's pixels, cell centres to cell centres
  (`F.interpolate(..., align_corners=False)`, without antialiasing where it shrinks);
- a map on a model's grid belongs to masks of the model's whole input, `Attribution.resize(i)` to masks of picture i;
- a constant map says nothing: it points nowhere, and no pixel of it is above a threshold;
- a mask without object, or without any pixel that takes part, gives NaN, which does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from clipfast.errors import InputError
from clipfast.metrics.base import Columns, Protocol
from clipfast.metrics.perturbation import on_pixels
from clipfast.ops.minmax import minmax

# Pixels that are worked on at once; what is measured does not depend on it.
_CHUNK_PIXELS = 1 << 20


def flat_maps(maps: Tensor) -> Tensor:
    """Maps (N, h, w) or (B, P, h, w) as (N, h, w), float32 or float64. Raises InputError for others, and for NaN."""
    if maps.ndim not in (3, 4) or 0 in maps.shape[-2:] or maps.is_complex():
        raise InputError(f"maps must be (N, h, w) or (B, P, h, w) real numbers, not {maps.dtype} {tuple(maps.shape)}.")
    maps = maps.detach().flatten(0, -3)
    maps = maps if maps.dtype == torch.float64 else maps.float()
    if not maps.isfinite().all():
        raise InputError("maps hold values that are not finite.")
    return maps


def spread(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, h, w), bilinear on (H, W): (N, H, W). Constants stay constant to the last bit."""
    low, high = maps.flatten(1).aminmax(dim=1)
    flat = (low == high)[:, None, None]
    return torch.where(flat, low[:, None, None], on_pixels(maps[:, None], size)[:, 0])


def unit(maps: Tensor) -> Tensor:
    """Maps (N, H, W) from 0 to 1, each by its own least and greatest value; a constant map becomes zeros."""
    return minmax(maps.flatten(1), constant=0.0).view_as(maps)


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """The area under the steps of precision over recall, of M scores and which of them are positive (bool).

    Equals scikit-learn's `average_precision_score`: all of a tie is reached at once. NaN without positives.
    """
    values, chosen = scores.cpu().numpy(), positive.cpu().numpy()
    # Every positive adds the precision at its own score. Values sorted without their indices cost a quarter of argsort.
    hits, others = np.sort(values[chosen]), np.sort(values[~chosen])
    if not len(hits):
        return float("nan")
    reached = len(hits) - np.searchsorted(hits, hits)
    false = len(others) - np.searchsorted(others, hits)
    return float((reached / (reached + false)).mean())


class _OnMasks(Protocol):
    """Pairs maps with masks, a few at a time; what is left to a protocol is `_columns` of maps of the masks' size."""

    needs_object: ClassVar[bool] = True

    def measure(self, maps: Tensor, masks: Tensor) -> Columns:
        """Columns of all maps; shapes and rules as at the top of this file.

        Raises InputError for maps and masks that do not belong together, masks that are neither bool nor whole
        numbers, and maps that are not finite.
        """
        heat = flat_maps(maps)
        if masks.is_floating_point() or masks.is_complex() or masks.ndim not in (3, 4) or 0 in masks.shape[-2:]:
            raise InputError(
                "masks must be (N, H, W) or (B, P, H, W), bool or whole numbers, "
                f"not {masks.dtype} {tuple(masks.shape)}."
            )
        labels = masks.flatten(0, -3).to(heat.device)
        if len(labels) != len(heat):
            raise InputError(f"every map needs its mask: there are {len(heat)} maps and {len(labels)} masks.")
        size = self._size(labels)
        once = max(1, _CHUNK_PIXELS // (size[0] * size[1]))
        parts = [self._part(h, m, size) for h, m in zip(heat.split(once), labels.split(once), strict=True)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _part(self, heat: Tensor, labels: Tensor, size: tuple[int, int]) -> Columns:
        # Of torch's unsigned numbers only uint8 can be compared.
        labels = _nearest(labels if labels.dtype == torch.bool else labels.long(), size)
        inside, counted = labels > 0, labels >= 0
        empty = ~(inside if self.needs_object else counted).flatten(1).any(1)
        columns = self._columns(spread(heat, size), inside, counted)
        return {name: column.double().masked_fill(empty, torch.nan).cpu() for name, column in columns.items()}

    def _size(self, labels: Tensor) -> tuple[int, int]:
        return labels.shape[1], labels.shape[2]

    def _columns(self, heat: Tensor, inside: Tensor, counted: Tensor) -> dict[str, Tensor]:
        """(N,) each, of maps (N, H, W), the objects' pixels and those that take part, both (N, H, W) bool."""
        raise NotImplementedError


def _nearest(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels (N, H, W) on (H', W'): each pixel gets what its centre falls on, as PIL's nearest."""
    if tuple(labels.shape[1:]) == size:
        return labels
    rows, cols = (
        (2 * torch.arange(new, device=labels.device) + 1) * old // (2 * new)
        for new, old in zip(size, labels.shape[1:], strict=True)
    )
    return labels[:, rows[:, None], cols]


@dataclass(frozen=True)
class PointingGame(_OnMasks):
    """`pointing_game`: whether the map's highest pixel is on the object.

    tolerance: in pixels of the mask; with more than 0 a hit is any object pixel nearer than that to the highest one
    (TorchRay: 15, nearer and not "as near as"; it averages the classes' means, here every pair counts the same).

    Of equally high pixels the first in reading order points. Pixels of an ignore label cannot.
    """

    tolerance: float = 0

    name: ClassVar[str] = "pointing_game"
    source: ClassVar[str] = "Zhang et al., IJCV 2018; Fong et al., TorchRay, 2019"
    figures: ClassVar[Mapping[str, str]] = {"hit": "higher"}

    def __post_init__(self) -> None:
        if self.tolerance < 0:
            raise InputError(f"tolerance must be at least 0 pixels, not {self.tolerance}.")

    def _columns(self, heat: Tensor, inside: Tensor, counted: Tensor) -> dict[str, Tensor]:
        height, width = heat.shape[1:]
        candidates = heat.masked_fill(~counted, -torch.inf).flatten(1)
        at, highest = candidates.argmax(1), candidates.amax(1)
        lowest = heat.masked_fill(~counted, torch.inf).flatten(1).amin(1)
        down = (torch.arange(height, device=heat.device) - (at // width)[:, None]).square()
        across = (torch.arange(width, device=heat.device) - (at % width)[:, None]).square()
        away = down[:, :, None] + across[:, None, :]
        near = (away == 0) | (away < self.tolerance**2)
        return {"hit": (near & inside).flatten(1).any(1) & (highest > lowest)}


@dataclass(frozen=True)
class EnergyPointingGame(_OnMasks):
    """`energy_pointing_game`: the share of the map's mass that is on the object.

    scale: "positive" (values below zero have no mass) or "minmax" (the map from 0 to 1 first, so that an offset of all
    its values does not count as mass). A map without mass has none on the object: 0.
    """

    scale: Literal["positive", "minmax"] = "positive"

    name: ClassVar[str] = "energy_pointing_game"
    source: ClassVar[str] = "Wang et al., Score-CAM, CVPRW 2020"
    figures: ClassVar[Mapping[str, str]] = {"share": "higher"}

    def __post_init__(self) -> None:
        if self.scale not in ("positive", "minmax"):
            raise InputError(f"scale must be 'positive' or 'minmax', not {self.scale!r}.")

    def _columns(self, heat: Tensor, inside: Tensor, counted: Tensor) -> dict[str, Tensor]:
        mass = unit(heat) if self.scale == "minmax" else heat.clamp(min=0)
        on, of = ((mass * part).flatten(1).sum(1, dtype=torch.float64) for part in (inside, counted))
        return {"share": on / torch.where(of > 0, of, 1)}


@dataclass(frozen=True)
class SegmentationChefer(_OnMasks):
    """`segmentation/chefer`: the map as a segmentation of object and background.

    size: maps are bilinear on size x size pixels, labels take the nearest. There R is the map from 0 to 1, and the
    object is where it is above its mean, ignored pixels included.

    pixel accuracy: right pixels / pixels, over all samples. mean IoU: of background and object, each intersection and
    union summed over all samples. AP: the average precision of [1 - R, R] as scores of background and object, by
    sample. As in the published code, ignored pixels take no part in any of these, a sample without object counts, and
    of a constant map all is background and all scores tie. A class that no sample has or finds is left out of the mean
    (there: 0).
    """

    size: int = 224

    needs_object: ClassVar[bool] = False
    name: ClassVar[str] = "segmentation/chefer"
    source: ClassVar[str] = "Chefer et al., CVPR 2021, and their ImageNet segmentation script"
    figures: ClassVar[Mapping[str, str]] = {"pixel accuracy": "higher", "mean IoU": "higher", "AP": "higher"}

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"size must be at least 1 pixel, not {self.size}.")

    def summary(self, columns: Mapping[str, Tensor]) -> dict[str, float]:
        total = {name: column.nansum() for name, column in columns.items()}
        overlap = torch.stack([total[f"intersection {c}"] / total[f"union {c}"] for c in ("background", "object")])
        return {
            "pixel accuracy": float(total["right"] / total["pixels"]),
            "mean IoU": float(overlap.nanmean()),
            "AP": float(columns["AP"].nanmean()),
        }

    def _size(self, labels: Tensor) -> tuple[int, int]:
        return self.size, self.size

    def _columns(self, heat: Tensor, inside: Tensor, counted: Tensor) -> dict[str, Tensor]:
        r = unit(heat)
        found = (r > r.mean((1, 2), keepdim=True)) & counted
        columns = {"right": _count(found == inside, counted), "pixels": _count(counted)}
        outside = counted & ~inside
        for name, truth, answer in (("background", outside, counted & ~found), ("object", inside, found)):
            columns[f"intersection {name}"] = _count(truth, answer)
            columns[f"union {name}"] = _count(truth | answer)
        flat = r.flatten(1).amax(1) == 0
        background = torch.where(flat[:, None, None], 0, 1 - r)
        columns["AP"] = torch.tensor(
            [
                average_precision(torch.cat((b[k], o[k])), torch.cat((~i[k], i[k])))
                for b, o, i, k in zip(background, r, inside, counted, strict=True)
            ],
            dtype=torch.float64,
            device=heat.device,
        )
        return columns


@dataclass(frozen=True)
class MaskIou(_OnMasks):
    """`segmentation/mask_iou`: intersection over union of the object and the map above a threshold.

    thresholds: for the map from 0 to 1; strictly above. "IoU" is each sample's best over them, averaged (with one
    threshold, simply that); "IoU, one threshold" the best that one threshold for all samples reaches.
    """

    thresholds: tuple[float, ...] = tuple(i / 20 for i in range(20))

    name: ClassVar[str] = "segmentation/mask_iou"
    source: ClassVar[str] = "object IoU by sample, as far as AFT (ICLR 2025) and TCLIP define it"
    figures: ClassVar[Mapping[str, str]] = {"IoU": "higher", "IoU, one threshold": "higher"}

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", tuple(sorted({float(t) for t in self.thresholds})))
        if not self.thresholds or not all(0 <= t < 1 for t in self.thresholds):
            raise InputError(f"thresholds must be one or more numbers in [0, 1), not {self.thresholds}.")

    def summary(self, columns: Mapping[str, Tensor]) -> dict[str, float]:
        each = [float(columns[f"IoU@{t}"].nanmean()) for t in self.thresholds]
        return {"IoU": float(columns["IoU"].nanmean()), "IoU, one threshold": max(each)}

    def _columns(self, heat: Tensor, inside: Tensor, counted: Tensor) -> dict[str, Tensor]:
        # How many thresholds each pixel is above: every threshold's areas are sums over these counts.
        r = unit(heat)
        above = torch.bucketize(r, r.new_tensor(self.thresholds)).flatten(1)
        area, overlap = (_areas(above, part.flatten(1), len(self.thresholds)) for part in (counted, inside))
        iou = overlap / (area + _count(inside)[:, None] - overlap)
        return {"IoU": iou.amax(1)} | {f"IoU@{t}": iou[:, i] for i, t in enumerate(self.thresholds)}


@dataclass(frozen=True)
class PrecisionAt(_OnMasks):
    """`precision@threshold`: the share of object among pixels above a threshold of the map from 0 to 1.

    What TCLIP's table calls pixel accuracy behaves like this one. A map that is nowhere above it has precision 0.
    """

    threshold: float = 0.5

    name: ClassVar[str] = "precision@threshold"
    source: ClassVar[str] = "our reading of TCLIP's pixel accuracy"
    figures: ClassVar[Mapping[str, str]] = {"precision": "higher"}

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise InputError(f"threshold must be in [0, 1), not {self.threshold}.")

    def _columns(self, heat: Tensor, inside: Tensor, counted: Tensor) -> dict[str, Tensor]:
        found = (unit(heat) > self.threshold) & counted
        return {"precision": _count(found, inside) / _count(found).clamp(min=1)}


@dataclass(frozen=True)
class Gini(Protocol):
    """`gini`: how much of a map is in few of its cells, by absolute values, on the map's own grid.

    1 - 2 sum_k c_k / |c|_1 (n - k + 1/2) / n over ascending |c|: 0 for equal values (and for a map of zeros),
    1 - 1 / n where all is in one of n cells.
    """

    name: ClassVar[str] = "gini"
    source: ClassVar[str] = "Hurley and Rickard, IEEE Trans. Inf. Theory 2009; Chalasani et al., ICML 2020"
    figures: ClassVar[Mapping[str, str]] = {"gini": "higher"}

    def measure(self, maps: Tensor) -> Columns:
        """One column, of maps (N, h, w) or (B, P, h, w). Raises InputError for maps that are not finite."""
        c = flat_maps(maps).flatten(1).double().abs().sort(1).values
        n = c.shape[1]
        behind = (n - torch.arange(1, n + 1, dtype=c.dtype, device=c.device) + 0.5) / n
        total = c.sum(1)
        share = c / torch.where(total > 0, total, 1)[:, None]
        return {"gini": torch.where(total > 0, 1 - 2 * share @ behind, 0).cpu()}


def _count(*masks: Tensor) -> Tensor:
    """How many pixels are in all of these masks (N, H, W): (N,) float64, which holds any such count exactly."""
    both = masks[0] if len(masks) == 1 else masks[0] & masks[1]
    return both.flatten(1).sum(1).double()


def _areas(above: Tensor, part: Tensor, count: int) -> Tensor:
    """How many pixels of a part (N, M) are above each of so many ascending thresholds: (N, count)."""
    bins = part.new_zeros(len(above), count + 1, dtype=torch.float64).scatter_add_(1, above, part.double())
    return bins.flip(1).cumsum(1).flip(1)[:, 1:]
