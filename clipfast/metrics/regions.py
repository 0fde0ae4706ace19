"""Region classification: what a model's patches say is in a box, among the names of all classes.

    c_i = share of patch i that the box covers          0 where the patch lies outside
    r   = sum_i c_i e_i / sum_i c_i                     e_i: unit embeddings of patches, by the value path of MaskCLIP
    prediction = arg max over k of cos(r, class k)

Grad-ECLIP's fine-tuning is judged by it (Zhao et al., arXiv 2502.18816), on COCO's boxes; the figure is the mean over
classes of the share of their boxes that are classified rightly. Our reading: patches count by the area of them that a
box covers (RoIAlign, common elsewhere, samples points).

With pooling="grad_eclip" each class is asked for where Grad-ECLIP sees it: c_i is multiplied by the min-maxed map of
class k, so that every class pools a region of its own; a class whose map marks nothing in the box comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.data.datasets import Dataset
from clipfast.data.geometry import Geometry
from clipfast.errors import InputError
from clipfast.methods.grad_eclip import GradEclip
from clipfast.methods.mask_clip import MaskClip, last_attention, patch_embeddings
from clipfast.metrics.base import Columns, Protocol
from clipfast.metrics.samples import OnError, batches
from clipfast.metrics.zero_shot import Templates, class_embeddings, template_texts
from clipfast.models.image import ImageTower
from clipfast.models.model import Model, Precision
from clipfast.ops.minmax import minmax

# Numbers of pooled regions, boxes x classes x embedding, that are in memory at once.
_POOLED = 1 << 24


@dataclass(frozen=True)
class Regions(Protocol):
    """`regions`: how often a box is given its own class, by class ("mAcc") and over all boxes ("top-1", "top-5").

    templates: of the classes' names, see `template_texts`. pooling: "mean" over the box, or "grad_eclip". Of equally
    near classes the one of the lower label is first.
    """

    templates: Templates = "photo"
    pooling: Literal["mean", "grad_eclip"] = "mean"

    name: ClassVar[str] = "regions"
    source: ClassVar[str] = "Zhao et al., Grad-ECLIP, arXiv 2502.18816"
    figures: ClassVar[Mapping[str, str]] = {"mAcc": "higher", "top-1": "higher", "top-5": "higher"}

    def __post_init__(self) -> None:
        if not isinstance(self.templates, str):
            object.__setattr__(self, "templates", tuple(self.templates))
        template_texts(self.templates)
        if self.pooling not in ("mean", "grad_eclip"):
            raise InputError(f"pooling must be 'mean' or 'grad_eclip', not {self.pooling!r}.")

    def summary(self, columns: Mapping[str, Tensor]) -> dict[str, float]:
        """mAcc: the mean over the classes that have boxes of the mean over their boxes."""
        hits = columns["top-1"]
        seen = ~hits.isnan()
        labels, which = columns["label"][seen].unique(return_inverse=True)
        sums = hits.new_zeros(len(labels)).index_add_(0, which, hits[seen])
        by_class = sums / which.bincount(minlength=len(labels))
        return {"mAcc": float(by_class.mean()), **{name: float(columns[name].nanmean()) for name in ("top-1", "top-5")}}

    @torch.inference_mode(False)
    @torch.no_grad()
    def measure(
        self,
        model: Model,
        dataset: Dataset,
        *,
        precision: Precision = None,
        on_error: OnError = "raise",
        progress: Callable[[int], None] | None = None,
    ) -> Columns:
        """Columns of all boxes: hits ("top-1", "top-5"), "label", "prediction", and the number of the "sample".

        A box that shows nothing that the model sees, as where its preprocessing crops, has neither hits nor prediction
        (NaN). progress: called with the number of samples done since the last call.

        Raises InputError for a data set without classes or boxes, no box in it, or a tower without patches; ImageError
        for a sample that cannot be read, unless on_error="skip" leaves it out.
        """
        if dataset.classes is None or "boxes" not in dataset.offers:
            raise InputError(f"{dataset.name} has no boxes of classes; it offers {', '.join(sorted(dataset.offers))}.")
        tower, _ = model.towers(precision)
        lacks = MaskClip.why_not(tower) or GradEclip.why_not(tower)
        if lacks is not None:
            raise InputError(f"regions are pooled from patches, and {model.name} is a model whose image tower {lacks}.")
        assert isinstance(tower, ImageTower)
        classes = class_embeddings(model, dataset.classes, self.templates, precision)
        rows: list[Tensor] = []
        for batch in batches(model, dataset, precision=precision, on_error=on_error, progress=progress):
            x = batch.inputs(model, precision)
            grid = tower.grid_of(x)
            fitted = tower.fitted(grid)
            h = fitted.run(fitted.embed(x), stop=fitted.depth - 1)
            patches = patch_embeddings(fitted, h, last_attention(fitted, h)[1])
            marks: Sequence[Tensor | None] = [None] * len(patches)
            if self.pooling == "grad_eclip":
                marks = minmax(GradEclip().from_last_block(fitted, h).maps(classes), constant=0.0).unbind()
            for i, sample in enumerate(batch.samples):
                boxes = [(t.label, box) for t in sample.targets if t.label is not None for box in t.boxes or ()]
                if not boxes:
                    continue
                shares = coverage(torch.tensor([box for _, box in boxes]), batch.geometries[i], grid)
                shares = shares.flatten(1).to(patches)
                scores = region_scores(patches[i], shares, classes, marks[i])
                labels = torch.tensor([label for label, _ in boxes], dtype=torch.float64)
                rows.append(_row(scores.cpu(), labels, batch.numbers[i]))
        if not rows:
            raise InputError(f"{dataset.name} has no box to classify.")
        return dict(zip(_COLUMNS, torch.cat(rows).unbind(1), strict=True))


def coverage(boxes: Tensor, geometry: Geometry, grid: tuple[int, int]) -> Tensor:
    """The share of each patch that boxes cover: (K, h, w) float64, for boxes (K, 4) in the picture's own pixels.

    boxes: (left, top, right, bottom), right and bottom exclusive. grid: (h, w), over what the geometry says is covered.
    """
    corners = geometry.to_input(boxes.double().view(-1, 2, 2))
    (height, width), (h, w) = geometry.covered, grid
    across = _overlap(corners[..., 0] * w / width, w)
    down = _overlap(corners[..., 1] * h / height, h)
    return down[:, :, None] * across[:, None, :]


def _overlap(ends: Tensor, cells: int) -> Tensor:
    """How much of each unit cell lies between two ends: (K, 2) -> (K, cells)."""
    low = torch.arange(cells, dtype=ends.dtype)
    return (torch.minimum(ends[:, 1:], low + 1) - torch.maximum(ends[:, :1], low)).clamp_(min=0)


def region_scores(patches: Tensor, shares: Tensor, classes: Tensor, marks: Tensor | None = None) -> Tensor:
    """Cosines (K, C) of K regions of one picture with C classes; NaN where a region covers nothing.

    patches (n, E): unit embeddings. shares (K, n): weights of the patches of each region. classes (C, E): unit
    embeddings. marks (C, n): further weights for each class; a region in which a class has none of them gets -1.
    """
    if marks is None:
        scores = F.normalize(shares @ patches, dim=-1) @ classes.T
    else:
        scores = shares.new_empty(len(shares), len(classes))
        once = max(1, _POOLED // (len(shares) * patches.shape[1]))
        for start in range(0, len(classes), once):
            some = slice(start, start + once)
            weights = shares[:, None] * marks[some].to(shares)
            pooled = F.normalize(weights @ patches, dim=-1)
            scores[:, some] = torch.where(weights.sum(-1) > 0, (pooled * classes[some]).sum(-1), -1)
    return scores.masked_fill_(shares.sum(-1, keepdim=True) <= 0, torch.nan)


def _row(scores: Tensor, labels: Tensor, number: int) -> Tensor:
    """The columns of one sample's boxes: (K, 5)."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :5].double()
    hits = order == labels[:, None]
    found = torch.stack((hits[:, 0].double(), hits.any(1).double(), order[:, 0]), dim=1)
    found.masked_fill_(scores.isnan().any(1, keepdim=True), torch.nan)
    return torch.column_stack((found, labels, torch.full_like(labels, number)))


_COLUMNS = ("top-1", "top-5", "prediction", "label", "sample")
