"""Whether a map's numbers are the score's: what they add up to, and what they say of perturbed images.

    infidelity     mean over perturbations I of  (sum_i I_i A_i - (S(x) - S(x - I)))^2
    completeness   sum_i A_i = S(x) - S(b), b a baseline

Yeh et al., On the (In)fidelity and Sensitivity of Explanations, NeurIPS 2019, eq. 1; Sundararajan et al., Axiomatic
Attribution for Deep Networks, ICML 2017. Both hold for maps whose unit is the score's (gradients, integrated gradients,
Shapley values); a map known up to its scale is measured with `normalize`.

A perturbation is the same for all prompts of an image, and so is its pass through the model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.errors import InputError
from clipfast.metrics.base import Columns, Protocol
from clipfast.metrics.perturbation import Clock, Encode


@dataclass(frozen=True)
class Infidelity(Protocol):
    """`infidelity`, as in captum, of maps whose channels are summed.

    kind: "removal" takes random rectangles of the image away (to zero, the mean colour): I is 1 there and the maps are
        shares of the score, as those of integrated gradients. "noise" takes Gaussian noise off the image, the same in
        all channels: maps are the score's signed gradients.
    samples: perturbations an image. cells: rectangles along each side of the image. share: how likely one is removed.
    sigma: of the noise, in the normalised image. seed: of both; an image's perturbations depend on its number.
    normalize: whether each map is first scaled as fits best, beta = sum (I.A) (S(x) - S(x - I)) / sum (I.A)^2.
    """

    kind: Literal["removal", "noise"] = "removal"
    samples: int = 50
    cells: int = 7
    share: float = 0.25
    sigma: float = 0.2
    seed: int = 0
    normalize: bool = True

    name: ClassVar[str] = "infidelity"
    source: ClassVar[str] = "Yeh et al., NeurIPS 2019, and captum.metrics.infidelity"
    figures: ClassVar[Mapping[str, str]] = {"infidelity": "lower"}

    def __post_init__(self) -> None:
        if self.kind not in ("removal", "noise"):
            raise InputError(f"kind must be 'removal' or 'noise', not {self.kind!r}.")
        if self.samples < 1 or self.cells < 1 or not 0 < self.share < 1 or self.sigma <= 0:
            raise InputError("samples and cells must be at least 1, share in (0, 1) and sigma above 0.")

    def measure(
        self,
        encode: Encode,
        texts: Tensor,
        images: Tensor,
        maps: Tensor,
        *,
        first: int = 0,
        batch: int = 32,
        clock: Clock | None = None,
    ) -> Columns:
        """One column of B * P pairs for unit text embeddings (P, E) or (B, P, E).

        images (B, C, H, W), normalised. maps (B, P, h, w), raw: a cell's value counts for what of I lies in it, the
        mean. first: the number of the first image in the data set. batch: how many perturbed images go through the
        model at once.

        Raises InputError for maps that do not belong to the images.
        """
        clock = clock or Clock()
        started = time.perf_counter()
        texts = _own(texts, images, maps)
        clean = _scores(encode, images, texts, clock, batch)  # (B, P)
        # Sums over perturbations of (I.A)^2, (I.A) (S(x) - S(x - I)) and (S(x) - S(x - I))^2.
        sums = clean.new_zeros(3, *clean.shape)
        drawn = self.perturbations(len(images), (images.shape[2], images.shape[3]), first)
        for start in range(0, len(images) * self.samples, batch):
            noise = torch.stack(list(islice(drawn, batch))).to(images.device)
            rows = torch.arange(start, start + len(noise), device=images.device) // self.samples
            x = self.perturbed(images[rows], noise)
            cells = F.adaptive_avg_pool2d(noise[:, None], (maps.shape[2], maps.shape[3]))
            said = (cells * maps[rows].double()).flatten(2).sum(-1)
            moved = clean[rows] - _scores(encode, x, texts[rows], clock, batch)
            sums.index_add_(1, rows, torch.stack((said * said, said * moved, moved * moved)))
        aa, ab, bb = sums.flatten(1).cpu() / self.samples
        beta = ab / torch.where(aa > 0, aa, 1) if self.normalize else torch.ones_like(aa)
        clock.total += time.perf_counter() - started
        # What rounding leaves of a perfect fit may be below zero.
        return {"infidelity": (beta * beta * aa - 2 * beta * ab + bb).clamp(min=0)}

    def perturbations(self, images: int, size: tuple[int, int], first: int = 0) -> Iterator[Tensor]:
        """The I of so many images of (H, W), `samples` of each one after the other: (H, W) float64, on the CPU."""
        height, width = size
        rows, columns = (torch.arange(side) * self.cells // side for side in size)
        for number in range(first, first + images):
            generator = np.random.default_rng((self.seed, number))
            for _ in range(self.samples):
                if self.kind == "noise":
                    yield self.sigma * torch.from_numpy(generator.standard_normal((height, width)))
                else:
                    gone = torch.from_numpy(generator.random((self.cells, self.cells)) < self.share)
                    yield gone[rows[:, None], columns].double()

    def perturbed(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images (n, C, H, W) after perturbations (n, H, W)."""
        off = noise[:, None].to(images.dtype)
        return images - off if self.kind == "noise" else images * (1 - off)


@dataclass(frozen=True)
class Completeness(Protocol):
    """`completeness`: how far maps are from adding up to what the score gains over a baseline; captum's delta.

    error: |sum A - (S(x) - S(b))|. relative error: that over |S(x) - S(b)|; a map of zeros has 1.

    baseline: what `clipfast eval` takes for b, "mean" (colour), "black" or "blur"; None is the method's own, and the
        mean colour for a method that has none. `measure` is handed its own.
    """

    baseline: Literal["mean", "black", "blur"] | None = None

    name: ClassVar[str] = "completeness"
    source: ClassVar[str] = "Sundararajan et al., ICML 2017, and captum's compute_convergence_delta"
    figures: ClassVar[Mapping[str, str]] = {"error": "lower", "relative error": "lower"}

    def __post_init__(self) -> None:
        if self.baseline not in (None, "mean", "black", "blur"):
            raise InputError(f"baseline must be 'mean', 'black', 'blur' or None, not {self.baseline!r}.")

    def measure(
        self,
        encode: Encode,
        texts: Tensor,
        images: Tensor,
        maps: Tensor,
        baselines: Tensor | float = 0.0,
        *,
        batch: int = 32,
        clock: Clock | None = None,
    ) -> Columns:
        """Columns of B * P pairs: the figures, and `delta`, the error with its sign. Arguments as for `Infidelity`.

        baselines: normalised images that broadcast to (B, C, H, W), or a number; 0 is the mean colour. A pair whose
        score gains nothing has no relative error: NaN.

        Raises InputError for maps that do not belong to the images.
        """
        clock = clock or Clock()
        started = time.perf_counter()
        texts = _own(texts, images, maps)
        bare = torch.as_tensor(baselines, dtype=images.dtype, device=images.device).expand_as(images)
        gain = _scores(encode, images, texts, clock, batch) - _scores(encode, bare, texts, clock, batch)
        delta = (maps.flatten(2).sum(-1, dtype=torch.float64) - gain).flatten().cpu()
        gain = gain.flatten().abs().cpu()
        clock.total += time.perf_counter() - started
        relative = torch.where(gain > 0, delta.abs() / gain, torch.nan)
        return {"error": delta.abs(), "relative error": relative, "delta": delta}


def _own(texts: Tensor, images: Tensor, maps: Tensor) -> Tensor:
    """Each image's own texts, (B, P, E). Raises InputError for maps that do not belong to images and texts."""
    if images.ndim != 4 or maps.ndim != 4 or len(images) != len(maps) or maps.shape[1] != texts.shape[-2]:
        raise InputError(
            f"images, maps and texts must be (B, C, H, W), (B, P, h, w) and (P, E) or (B, P, E), "
            f"not {tuple(images.shape)}, {tuple(maps.shape)} and {tuple(texts.shape)}."
        )
    return texts.expand(len(images), -1, -1)


def _scores(encode: Encode, images: Tensor, texts: Tensor, clock: Clock, batch: int) -> Tensor:
    """Cosines (n, P), float64, of images with texts of their own (n, P, E)."""
    parts = []
    for x, own in zip(images.split(batch), texts.split(batch), strict=True):
        z = clock.run(encode, x)
        parts.append((z[:, None] @ own.mT)[:, 0].double())
    return torch.cat(parts)
