"""ROAD: what removing pixels costs when neither the hole nor its shape gives them away.

A removed pixel is neither black nor grey but what its neighbours make of it, and a little noise: all removed pixels x_i
together solve

    sum_j w_ij (x_i - x_j) = 0,    j the eight neighbours inside the image, w = 1/6 beside i and 1/12 diagonally,

with the pixels that are left as boundary values. So little is left of a mask's shape, which may itself tell the class,
and models see images much like those they know. Rong et al., A Consistent and Efficient Evaluation Strategy for
Attribution Methods, ICML 2022, sec. 4.

    MoRF    score after removal of the pixels that a map ranks first, less the score before
    LeRF    the same for those that it ranks last
    road    (LeRF - MoRF) / 2, each the mean over the percentiles

The matrix is symmetric, and the same for all channels. It is factorised directly, with unknowns in nested-dissection
order (George, SIAM J. Numer. Anal. 1973), one image a thread.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipfast.errors import InputError
from clipfast.metrics.base import Columns, Protocol
from clipfast.metrics.perturbation import Clock, Encode, check_maps, cosine, on_pixels
from clipfast.ops.mask_sequence import rank_map

Order = Literal["MoRF", "LeRF"]


def impute(image: Tensor, gone: Tensor) -> Tensor:
    """An image (C, H, W) with the pixels where `gone` (H, W) bool is true made up from the others, without noise.

    The result has the image's dtype and device; the system is solved in float64 on the CPU.

    Raises InputError where no pixel is left to make others from, for shapes that do not fit, and for a missing SciPy.
    """
    if image.ndim != 3 or gone.dtype != torch.bool or gone.shape != image.shape[1:]:
        raise InputError(
            f"image and gone must be (C, H, W) and (H, W) bool, not {tuple(image.shape)} and "
            f"{gone.dtype} {tuple(gone.shape)}."
        )
    order, matrix = _grid(*gone.shape)
    removed = gone.flatten().cpu().numpy()[order]
    if removed.all():
        raise InputError("removed pixels are made up from those that are left, and none is.")
    filled = image.clone()
    if removed.any():
        values = image.flatten(1).T.double().cpu().numpy()[order]
        rows = matrix[removed]
        known = -(rows @ np.where(removed[:, None], 0, values))
        # Symmetric and diagonally dominant: no pivoting, and the order of the unknowns is the grid's.
        factors = _scipy("sparse.linalg").splu(
            rows[:, removed].tocsc(), "NATURAL", 0.0, options={"SymmetricMode": True}
        )
        solved = torch.from_numpy(factors.solve(known)).to(image)
        filled.flatten(1)[:, torch.from_numpy(order[removed]).to(image.device)] = solved.T
    return filled


@dataclass(frozen=True)
class Road(Protocol):
    """`road`: the cosine after noisy linear imputation of the pixels that a map ranks first, and of those ranked last.

    percentiles: of the pixels, how many are left at least; each in (0, 100). noise: standard deviation of what is added
    to removed pixels, in the normalised image. seed: of it; an image has one pattern, which depends on its number and
    is the same for all maps and percentiles.

    Left are ceil(q / 100 (H W - 1)) pixels, which is what pytorch-grad-cam's thresholds leave of a map whose values all
    differ; of equal values the first in reading order rank first here, and there all go that are not below (above) the
    threshold.
    """

    percentiles: tuple[float, ...] = (10, 20, 30, 40, 50, 60, 70, 80, 90)
    noise: float = 0.01
    seed: int = 0

    name: ClassVar[str] = "road"
    source: ClassVar[str] = "Rong et al., ROAD, ICML 2022, and pytorch-grad-cam's ROADCombined"
    figures: ClassVar[Mapping[str, str]] = {"road": "higher", "MoRF": "lower", "LeRF": "higher"}

    def __post_init__(self) -> None:
        if not self.percentiles or not all(0 < q < 100 for q in self.percentiles):
            raise InputError(f"percentiles must be one or more numbers in (0, 100), not {self.percentiles}.")
        if self.noise < 0:
            raise InputError(f"noise must be at least 0, not {self.noise}.")

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
        """Columns of B * P pairs for unit text embeddings (P, E) or (B, P, E): the figures, and "MoRF 10" of each.

        images (B, C, H, W), normalised. maps (B, P, h, w), any grid: bilinear to the image where it is not the image's.
        first: the number of the first image in the data set. batch: how many images go through the model at once. As
        many are made up side by side as torch has threads.

        Raises InputError for maps that do not belong to the images or hold NaN, and for a missing SciPy.
        """
        check_maps(images, maps)
        clock = clock or Clock()
        started = time.perf_counter()
        b, p = maps.shape[:2]
        score = cosine(texts)
        pairs = torch.arange(b * p, device=images.device)
        clean = torch.cat([clock.run(encode, x) for x in images.split(batch)]).repeat_interleave(p, 0)
        before = score(clean, pairs).double().cpu()

        each = 2 * len(self.percentiles)
        after = []
        jobs = self._removals(rank_map(on_pixels(maps, (images.shape[2], images.shape[3]))).flatten(0, 1).cpu())
        pixels = images.cpu()
        noise = torch.stack([self.pattern(tuple(images.shape[1:]), first + i) for i in range(b)]).to(pixels.dtype)

        def made_up(job: tuple[int, Tensor]) -> Tensor:
            pair, gone = job
            return impute(pixels[pair // p], gone) + self.noise * noise[pair // p] * gone

        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            for start in range(0, b * p * each, batch):
                x = torch.stack(list(threads.map(made_up, islice(jobs, batch)))).to(images.device)
                owners = torch.arange(start, start + len(x), device=images.device) // each
                after.append(score(clock.run(encode, x), owners).double().cpu())

        moved = torch.cat(after).view(b * p, 2, -1) - before[:, None, None]
        columns = {
            f"{order} {q:g}": moved[:, i, j]
            for i, order in enumerate(("MoRF", "LeRF"))
            for j, q in enumerate(self.percentiles)
        }
        most, least = moved.mean(-1).unbind(1)
        clock.total += time.perf_counter() - started
        return {"road": (least - most) / 2, "MoRF": most, "LeRF": least} | columns

    def gone(self, ranks: Tensor, order: Order, percentile: float) -> Tensor:
        """Which pixels go: ranks (H, W), 0 for the highest, -> (H, W) bool."""
        left = math.ceil(percentile * (ranks.numel() - 1) / 100)
        return ranks < ranks.numel() - left if order == "MoRF" else ranks >= left

    def pattern(self, shape: tuple[int, ...], number: int) -> Tensor:
        """The standard normal noise of image `number`, (C, H, W) float64, before it is scaled."""
        return torch.from_numpy(np.random.default_rng((self.seed, number)).standard_normal(shape))

    def _removals(self, ranks: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Which pixels go of each pair's image: percentile by percentile, first those of MoRF."""
        for pair, own in enumerate(ranks):
            for order in ("MoRF", "LeRF"):
                for q in self.percentiles:
                    yield pair, self.gone(own, order, q)


@lru_cache(maxsize=8)
def _grid(height: int, width: int) -> tuple[npt.NDArray[np.int64], Any]:
    """A nested-dissection order of the pixels, (H W,), and the matrix of all equations in it, CSR (H W, H W)."""
    sparse = _scipy("sparse")
    index = np.arange(height * width).reshape(height, width)
    parts: list[npt.NDArray[np.int64]] = []
    _dissect(index, parts)
    order = np.concatenate(parts)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    place = place.reshape(height, width)

    here, there, weights = [], [], []
    for down, right, weight in ((0, 1, 1 / 6), (1, 0, 1 / 6), (1, 1, 1 / 12), (1, -1, 1 / 12)):
        rows, left = height - down, max(0, -right)
        columns = width - abs(right)
        one = place[:rows, left : left + columns].ravel()
        other = place[down:, left + right : left + right + columns].ravel()
        here += [one, other]
        there += [other, one]
        weights.append(np.full(2 * len(one), weight))
    pairs = (np.concatenate(here), np.concatenate(there))
    beside = sparse.csr_matrix((np.concatenate(weights), pairs), shape=(len(order), len(order)))
    total = np.asarray(beside.sum(1)).ravel()
    return order, (sparse.diags(total) - beside).tocsr()


def _dissect(block: npt.NDArray[np.int64], parts: list[npt.NDArray[np.int64]]) -> None:
    """Adds a block's pixels to the order: both halves, then the line between them, which alone connects them."""
    if max(block.shape) <= 4:
        parts.append(block.ravel())
        return
    if block.shape[0] < block.shape[1]:
        block = block.T
    middle = len(block) // 2
    _dissect(block[:middle], parts)
    _dissect(block[middle + 1 :], parts)
    parts.append(block[middle])


def _scipy(name: str) -> Any:
    try:
        return importlib.import_module(f"scipy.{name}")
    except ImportError as error:
        raise InputError("ROAD needs SciPy: pip install 'clipfast[metrics]'.") from error
