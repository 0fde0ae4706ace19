"""Boxes drawn around what a map marks, against boxes of what the prompt names.

    box/gscorecam    the largest bounding rectangle above one threshold; BoxAcc at an IoU of 0.5
    box/max          boxes at many thresholds; MaxBoxAcc, the best that one threshold reaches over all samples

Chen et al., gScoreCAM, ACCV 2022; Choe et al., Evaluating Weakly Supervised Object Localization Methods Right,
CVPR 2020. Contours and Otsu's threshold are OpenCV's.

Boxes are (left, top, right, bottom) in pixels, right and bottom exclusive (COCO's x, y, x + width, y + height), and yet
both protocols take areas as (right - left + 1) (bottom - top + 1), as their published codes do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipfast.errors import InputError
from clipfast.metrics.base import Columns, Protocol
from clipfast.metrics.localisation import flat_maps, spread, unit

Image = NDArray[np.uint8]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class BoxGScoreCam(Protocol):
    """`box/gscorecam`: whether the largest bounding rectangle of what a map marks fits a box of the class.

    threshold: of the map from 0 to 1, in steps of 1/255; None takes Otsu's of each map. iou: what a hit needs.

    The map becomes 0..255; pixels strictly above the threshold form regions, the bounding rectangle of greatest area is
    the answer (of equals the first in OpenCV's order), and the pixel at the top left where nothing is above it: so of a
    constant map. A rectangle without width or height has no area; 1e-6 is added to the union, so that an overlap of
    exactly `iou` is none.
    """

    threshold: float | None = None
    iou: float = 0.5

    name: ClassVar[str] = "box/gscorecam"
    source: ClassVar[str] = "Chen et al., gScoreCAM, ACCV 2022, and their COCO evaluation"
    figures: ClassVar[Mapping[str, str]] = {"BoxAcc": "higher", "IoU": "higher"}

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise InputError(f"threshold must be in [0, 1), or None for Otsu's, not {self.threshold}.")
        if not 0 < self.iou <= 1:
            raise InputError(f"iou must be in (0, 1], not {self.iou}.")

    def measure(self, maps: Tensor, boxes: Sequence[Tensor] | Tensor, size: tuple[int, int] | None = None) -> Columns:
        """Columns of all maps: hit ("BoxAcc"), best IoU, and the answer's left, top, right and bottom.

        maps: (N, h, w) or (B, P, h, w). boxes: for each map, image by image, all boxes of its class (K, 4) in pixels
        of `size` (height, width), which is the maps' own by default and which they are made bilinear on otherwise. A
        map without boxes gives NaN.

        Raises InputError for maps and boxes that do not belong together, a box that ends before it begins, and a
        missing OpenCV.
        """
        heat, truths = _paired(maps, boxes)
        cv2 = _opencv()
        height, width = size or heat.shape[1:]
        answers, ious = [], []
        for m, truth in zip(heat, truths, strict=True):
            wide = _scaled(spread(m[None], (height, width))[0]).cpu().numpy()
            levels = cv2.normalize(wide, None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U)
            answer = self._box(cv2, levels)
            answers.append(answer)
            ious.append(_best(torch.tensor([answer]), truth, thin=0, eps=1e-6)[0])
        iou = torch.stack(ious) if ious else torch.zeros(0, dtype=torch.float64)
        columns = {"BoxAcc": (iou >= self.iou).double().masked_fill(iou.isnan(), torch.nan), "IoU": iou}
        sides = torch.tensor(answers, dtype=torch.float64).view(-1, 4).unbind(1)
        return columns | dict(zip(("left", "top", "right", "bottom"), sides, strict=True))

    def _box(self, cv2: Any, levels: Image) -> Box:
        level, kind = (0, cv2.THRESH_OTSU) if self.threshold is None else (round(self.threshold * 255), 0)
        marked = cv2.threshold(levels, level, 255, cv2.THRESH_BINARY + kind)[1]
        contours = cv2.findContours(marked, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]
        rectangles = [cv2.boundingRect(contour) for contour in contours] or [(0, 0, 1, 1)]
        left, top, width, height = max(rectangles, key=lambda r: r[2] * r[3])
        return left, top, left + width, top + height


@dataclass(frozen=True)
class MaxBoxAcc(Protocol):
    """`box/max`: MaxBoxAcc, how many samples have a fitting box at the one threshold that fits most of them.

    steps: thresholds 0, 1 / steps, 2 / steps, ... of the map's maximum (the published code takes 100, gScoreCAM's
    1,000; of 256 levels, which is what maps are rounded down to). contours: "largest" takes the region whose outline
    encloses most, "all" whichever region fits best (MaxBoxAccV2's rule). size: maps are bilinear on size x size
    pixels (theirs: bicubic), and boxes go there with their fractions cut off; None keeps the boxes' own pixels.

    Right and bottom are held inside the image; where nothing is above the threshold the box is the pixel at the top
    left. "MaxBoxAcc" is the mean over IoUs of 0.3, 0.5 and 0.7, each at its own best threshold.
    """

    steps: int = 100
    contours: Literal["largest", "all"] = "largest"
    size: int | None = 224

    overlaps: ClassVar[tuple[float, ...]] = (0.3, 0.5, 0.7)
    name: ClassVar[str] = "box/max"
    source: ClassVar[str] = "Choe et al., CVPR 2020, and their wsolevaluation"
    figures: ClassVar[Mapping[str, str]] = {"MaxBoxAcc": "higher"} | {f"MaxBoxAcc@{d}": "higher" for d in overlaps}

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.size is not None and self.size < 1):
            raise InputError(f"steps and size must be at least 1, not {self.steps} and {self.size}.")
        if self.contours not in ("largest", "all"):
            raise InputError(f"contours must be 'largest' or 'all', not {self.contours!r}.")

    def summary(self, columns: Mapping[str, Tensor]) -> dict[str, float]:
        iou = torch.stack([columns[name] for name in self._names()], dim=1)
        iou = iou[~iou[:, 0].isnan()]
        if not len(iou):
            return dict.fromkeys(self.figures, torch.nan)
        best = {f"MaxBoxAcc@{d}": float((iou >= d).double().mean(0).max()) for d in self.overlaps}
        return {"MaxBoxAcc": sum(best.values()) / len(best)} | best

    def measure(self, maps: Tensor, boxes: Sequence[Tensor] | Tensor, size: tuple[int, int] | None = None) -> Columns:
        """For each threshold the IoU of its box with the best of the sample's own, "IoU@0.25": N values each.

        Arguments and errors as for `BoxGScoreCam.measure`: boxes are in pixels of `size`, by default the maps' own.
        """
        heat, truths = _paired(maps, boxes)
        cv2 = _opencv()
        height, width = size or heat.shape[1:]
        to = (height, width) if self.size is None else (self.size, self.size)
        rows = []
        for m, truth in zip(heat, truths, strict=True):
            levels = (unit(spread(m[None], to))[0] * 255).to(torch.uint8).cpu().numpy()
            if self.size is not None:
                truth = (truth * self.size / truth.new_tensor((width, height, width, height))).trunc()
            rows.append(self._ious(cv2, levels, truth))
        ious = torch.stack(rows) if rows else torch.zeros(0, self.steps, dtype=torch.float64)
        return dict(zip(self._names(), ious.unbind(1), strict=True))

    def boxes(self, levels: Image) -> list[list[Box]]:
        """The boxes of one map (H, W), 0 to 255, at each threshold: one, or with contours="all" any number."""
        return self._boxes(_opencv(), levels)

    def _names(self) -> list[str]:
        return [f"IoU@{i / self.steps}" for i in range(self.steps)]

    def _ious(self, cv2: Any, levels: Image, truth: Tensor) -> Tensor:
        found = self._boxes(cv2, levels)
        best = _best(torch.tensor([box for boxes in found for box in boxes]), truth, thin=1, eps=0)
        return torch.stack([part.max() for part in best.split([len(boxes) for boxes in found])])

    def _boxes(self, cv2: Any, levels: Image) -> list[list[Box]]:
        # The published code's own rounding: 0.29 of 100 is level 28, as np.arange has it.
        asked = (np.arange(self.steps) * (1 / self.steps) * levels.max()).astype(np.int64)
        # Levels with as many pixels above them have the same pixels above them.
        above = levels.size - np.bincount(levels.ravel(), minlength=256).cumsum()[asked]
        _, first, which = np.unique(above, return_index=True, return_inverse=True)
        distinct = [self._outlined(cv2, levels, int(asked[i])) for i in first]
        return [distinct[i] for i in which]

    def _outlined(self, cv2: Any, levels: Image, level: int) -> list[Box]:
        marked = cv2.threshold(levels, level, 255, cv2.THRESH_BINARY)[1]
        contours = cv2.findContours(marked, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
        if not contours:
            return [(0, 0, 0, 0)]
        if self.contours == "largest":
            contours = [max(contours, key=cv2.contourArea)]
        height, width = levels.shape
        found = []
        for left, top, wide, high in map(cv2.boundingRect, contours):
            found.append((left, top, min(left + wide, width - 1), min(top + high, height - 1)))
        return found


def inclusive_iou(a: Tensor, b: Tensor, *, thin: int, eps: float) -> Tensor:
    """IoU of boxes (M, 4) and (K, 4) with both ends counted: (M, K), float64.

    thin: the pixels across a box, or an overlap, whose two ends are the same: 1, or 0 for none. eps: added to unions.
    """
    a, b = a.double()[:, None], b.double()[None]

    def area(low: Tensor, high: Tensor) -> Tensor:
        sides = high - low
        return torch.where(sides > -thin, sides + 1, 0).prod(-1)

    both = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    return both / (area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - both + eps)


def _best(found: Tensor, truth: Tensor, *, thin: int, eps: float) -> Tensor:
    """Each found box's IoU with the best of the truth (K, 4): (M,), NaN where there is none."""
    if not len(truth):
        return torch.full((len(found),), torch.nan, dtype=torch.float64)
    return inclusive_iou(found, truth, thin=thin, eps=eps).amax(1)


def _paired(maps: Tensor, boxes: Sequence[Tensor] | Tensor) -> tuple[Tensor, list[Tensor]]:
    heat = flat_maps(maps)
    truths = [torch.as_tensor(box).detach().cpu() for box in boxes]
    if len(truths) != len(heat):
        raise InputError(f"every map needs its boxes: there are {len(heat)} maps and boxes for {len(truths)}.")
    for truth in truths:
        if truth.numel() and truth.shape[-1] != 4:
            raise InputError(f"boxes must be (K, 4): left, top, right, bottom; not {tuple(truth.shape)}.")
    truths = [truth.reshape(-1, 4).double() for truth in truths]
    if any((~truth.isfinite()).any() or (truth[:, 2:] < truth[:, :2]).any() for truth in truths):
        raise InputError("boxes must be finite, with right and bottom not before left and top.")
    return heat, truths


def _scaled(m: Tensor) -> Tensor:
    """A map times a power of two, which is exact: OpenCV takes a range below 2e-16 for a constant."""
    return torch.ldexp(m, -torch.frexp(m.max() - m.min()).exponent.clamp(-126, 126))


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise InputError("boxes need OpenCV: pip install 'clipfast[metrics]'.") from error
    return cv2
