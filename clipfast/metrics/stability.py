"""How far maps stay the same when the pixels hardly change: their structural similarity under noise.

    SSIM = mean over windows of  (2 m_a m_b + C1) (2 s_ab + C2) / ((m_a^2 + m_b^2 + C1) (s_a^2 + s_b^2 + C2))

with the means m, variances s^2 and covariance s_ab of two maps a and b in a window, C1 = 0.01^2, C2 = 0.03^2. Wang et
al., Image Quality Assessment: From Error Visibility to Structural Similarity, IEEE Trans. Image Processing 2004, eq.
13 and section III-C.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from clipfast.api import Explainer, Texts
from clipfast.data.geometry import normalize
from clipfast.data.inputs import prepare_all, sources
from clipfast.errors import ImageError, InputError
from clipfast.metrics.base import Columns, Protocol
from clipfast.metrics.localisation import flat_maps, spread, unit

# Pixels of maps that are compared at once, a few maps that stay in a cache; and images whose noisy copies are explained
# at once.
_CHUNK_PIXELS, _IMAGES = 1 << 18, 16


def ssim(a: Tensor, b: Tensor, *, window: int = 11, sigma: float = 1.5) -> Tensor:
    """The mean structural similarity of maps (N, H, W) with values in 0..1: (N,) float64.

    window, sigma: of the Gaussian that weighs a window's pixels, in pixels; only whole windows count, and variances are
    those of a population, as in the published code. Equal maps have 1 exactly, constant ones, too.

    Raises InputError for maps of different shapes, or smaller than a window.
    """
    if a.shape != b.shape or a.ndim != 3 or min(a.shape[1:]) < window:
        raise InputError(
            f"SSIM compares maps (N, H, W) of one shape, of at least {window} x {window} pixels, "
            f"not {tuple(a.shape)} and {tuple(b.shape)}."
        )
    taps = torch.arange(window, dtype=torch.float64, device=a.device) - (window - 1) / 2
    taps = (-0.5 * (taps / sigma).square()).exp()
    rows, columns = (_bands(taps / taps.sum(), side) for side in a.shape[1:])
    once = max(1, _CHUNK_PIXELS // (a.shape[1] * a.shape[2]))
    parts = zip(a.double().split(once), b.double().split(once), strict=True)
    return torch.cat([_ssim(x, y, rows, columns) for x, y in parts])


def _bands(taps: Tensor, side: int) -> Tensor:
    """The weighted sums over all whole windows along one axis, as a matrix (side - window + 1, side)."""
    places = torch.arange(side - len(taps) + 1, device=taps.device)
    found = taps.new_zeros(len(places), side)
    for offset, tap in enumerate(taps):
        found[places, places + offset] = tap
    return found


def _ssim(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    mean_a, mean_b, squares, products = (rows @ x @ columns.T for x in (a, b, a * a + b * b, a * b))
    c1, c2 = 0.01**2, 0.03**2
    of_squares, of_products = mean_a * mean_a + mean_b * mean_b, mean_a * mean_b
    light = (2 * of_products + c1) / (of_squares + c1)
    structure = (2 * (products - of_products) + c2) / (squares - of_squares + c2)
    return (light * structure).mean((1, 2))


def map_ssim(a: Tensor, b: Tensor, side: int) -> Tensor:
    """SSIM of maps (N, h, w) or (B, P, h, w), whatever their grids and scales: (N,) float64.

    Both are taken to side x side pixels, bilinear, and each from its least to its greatest value to 0..1; a constant
    one becomes zeros. Raises InputError for maps that are not finite, and as `ssim` does.
    """
    return ssim(*(unit(spread(flat_maps(maps), (side, side))) for maps in (a, b)))


@dataclass(frozen=True)
class StabilitySsim(Protocol):
    """`stability/ssim`: the likeness of maps before and after Gaussian noise on the pixels.

    sigmas: standard deviations of the noise, in levels of 255. seed: of the noise; each image has one pattern, which
    depends on its number and grows with sigma. side: maps are compared on side x side pixels.

    The noise is added to what the model sees, after resizing, in all three channels; nothing is clipped or rounded.
    """

    sigmas: tuple[float, ...] = (1, 3, 5, 7, 9)
    seed: int = 0
    side: int = 224

    name: ClassVar[str] = "stability/ssim"
    source: ClassVar[str] = "AFT, ICLR 2025, with the SSIM of Wang et al., IEEE Trans. Image Processing 2004"
    figures: ClassVar[Mapping[str, str]] = {"SSIM": "higher"}

    def __post_init__(self) -> None:
        if not self.sigmas or min(self.sigmas) < 0 or self.side < 11:
            raise InputError(
                f"sigmas must be one or more numbers, none below 0, and side at least 11, "
                f"not {self.sigmas} and {self.side}."
            )

    def measure(self, explainer: Explainer, images: Any, texts: Texts, *, first: int = 0) -> Columns:
        """Columns of B * P pairs, image by image: "SSIM", the mean over sigmas, and "SSIM 3/255" of each.

        images, texts: as an `Explainer` takes them. first: the number of the first image in the data set.

        Raises as the explainer does.
        """
        found = sources(images)
        parts = []
        for start in range(0, len(found), _IMAGES):
            some = found[start : start + _IMAGES]
            copies = [
                copy
                for i, x in enumerate(inputs(explainer, some), first + start)
                for copy in self._copies(explainer, x, i)
            ]
            maps = explainer(copies, texts).maps
            for i in range(0, len(copies), 1 + len(self.sigmas)):
                clean, *noisy = maps[i : i + 1 + len(self.sigmas)]
                parts.append(torch.stack([map_ssim(clean, m, self.side) for m in noisy]).cpu())
        values = torch.cat(parts, dim=1)
        each = {f"SSIM {sigma:g}/255": row for sigma, row in zip(self.sigmas, values, strict=True)}
        return {"SSIM": values.mean(0), **each}

    def _copies(self, explainer: Explainer, x: Tensor, number: int) -> list[Tensor]:
        """An input (3, H, W), and noisier and noisier copies of it."""
        # Drawn on the CPU, so that every device sees the same noise.
        drawn = np.random.default_rng((self.seed, number)).standard_normal(tuple(x.shape))
        std = x.new_tensor(explainer.spec.std)[:, None, None]
        noise = torch.from_numpy(drawn).to(x) / std
        return [x, *(x + sigma / 255 * noise for sigma in self.sigmas)]


def inputs(explainer: Explainer, images: Any) -> list[Tensor]:
    """Images as the explainer's model sees them, normalised, (3, H, W). Raises ImageError as the explainer does."""
    tower, _ = explainer.model.towers(explainer.precision)
    found = []
    for item in prepare_all(sources(images), explainer.spec):
        if isinstance(item, ImageError):
            raise item
        x = item.pixels[None]
        if x.dtype == torch.uint8:
            x = normalize(x, explainer.spec, tower.result_dtype, tower.device)
        found.append(x[0].to(tower.device, tower.result_dtype))
    return found
