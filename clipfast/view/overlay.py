"""Heat maps over pictures."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipfast.errors import InputError

Heat = np.ndarray | Tensor

# Below the first value a map is transparent, above the second it has its full weight.
_RAMP = (0.08, 0.45)
# A map counts as of one sign if nothing lies further below zero than this share of its largest magnitude.
_ONE_SIGN = 0.02


@cache
def palette(name: str = "heat") -> np.ndarray:
    """Colour and weight of heat 0..1 in 256 steps: uint8 (256, 4) red, green, blue, alpha; read-only.

    "heat" is matplotlib's inferno without its blackest part: ordered by lightness, so readable without colour vision,
    and with a dark rim that shows on bright things too. Any other name is matplotlib's own. All fade out where heat is
    low, but "jet", whose weight is the same everywhere, as in the field's older figures, and "signed", for maps whose
    0.5 is nothing: green speaks for the score, purple against it, which the colour-blind can tell apart, too.

    Raises InputError for an unknown name.
    """
    import matplotlib

    at = np.linspace(0, 1, 256)
    known = matplotlib.colormaps
    if name not in ("heat", "signed") and name not in known:
        raise InputError(f"no colour map is called {name!r}: 'heat', 'signed', 'jet' and matplotlib's names are known.")
    rgba = {"heat": known["inferno"](0.12 + 0.86 * at), "signed": known["PRGn"](at)}.get(name)
    if rgba is None:
        rgba = known[name](at)
    if name != "jet":
        strength = np.abs(2 * at - 1) if name == "signed" else at
        ramp = np.clip((strength - _RAMP[0]) / (_RAMP[1] - _RAMP[0]), 0, 1)
        rgba[:, 3] = ramp * ramp * (3 - 2 * ramp)
    table = np.rint(rgba * 255).astype(np.uint8)
    table.setflags(write=False)
    return table


def two_signed(maps: Tensor) -> bool:
    """Whether anything lies below zero by more than 2 % of the largest magnitude."""
    return bool(maps.min() < -_ONE_SIGN * maps.abs().max())


def drawable(maps: Tensor, signed: bool, *, outliers: float = 0.0, together: bool = False) -> Tensor:
    """Raw maps (P, h, w) as they are drawn, in 0..1.

    signed: 0.5 is zero, for the palette "signed"; else maps go from their least to their greatest value, for "heat",
        and a constant one is nothing.
    outliers: this share of each map's strongest values is drawn no stronger than the rest: single pixels can lie far
        above all others. together: one scale for all maps, in place of one for each.
    """
    values = maps.flatten(1)
    strength = values.abs() if signed else values
    high = strength.kthvalue(max(1, math.ceil((1 - outliers) * values.shape[1])), dim=1, keepdim=True).values
    low = torch.zeros_like(high) if signed else values.amin(1, keepdim=True)
    if together:
        high, low = high.amax().expand_as(high), low.amin().expand_as(low)
    span = torch.where(high > low, high - low, torch.inf)
    unit = ((values - low) / span).clamp(-1, 1)
    return (0.5 + 0.5 * unit if signed else unit).view(maps.shape)


def checked(heat: Heat) -> np.ndarray:
    """The map or maps as float32 on the CPU, in 0..1.

    Raises InputError for values that are not finite or lie outside 0..1 (by more than rounding), and for empty maps.
    """
    values = torch.as_tensor(heat).detach().to("cpu", torch.float32).numpy()
    if values.ndim < 2 or 0 in values.shape[-2:]:
        raise InputError(f"a heat map must be (..., H, W) with pixels, not {values.shape}.")
    if not np.isfinite(values).all():
        raise InputError("a heat map holds values that are not finite: NaN or infinity cannot be drawn.")
    if values.size and (values.min() < -1e-4 or values.max() > 1 + 1e-4):
        raise InputError(
            f"a heat map must lie in 0..1, not {values.min():.3g}..{values.max():.3g}: normalise it before it is drawn."
        )
    return np.clip(values, 0, 1)


def overlay(image: Image.Image, heat: Heat, alpha: float | None = None, colormap: str = "heat") -> Image.Image:
    """The picture with one map over it, as a new RGB image of the picture's size.

    heat: (H, W) in 0..1, of any resolution: it is stretched over the picture, bilinear.
    alpha: weight of the hottest colour, 0..1; by default 0.75, and 0.5 with "jet".
    colormap: see `palette`.

    Raises InputError for a heat map that is not finite, not in 0..1 or not two-dimensional, or alpha outside 0..1.
    """
    values = checked(heat)
    if values.ndim != 2:
        raise InputError(f"one heat map must be (H, W), not {values.shape}.")
    alpha = (0.5 if colormap == "jet" else 0.75) if alpha is None else alpha
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must lie in 0..1, not {alpha}.")
    stretched = Image.fromarray(values).resize(image.size, Image.Resampling.BILINEAR)
    table = palette(colormap)[np.rint(np.asarray(stretched) * 255).clip(0, 255).astype(np.uint8)]
    weight = Image.fromarray(np.rint(table[..., 3] * alpha).astype(np.uint8))
    return Image.composite(Image.fromarray(np.ascontiguousarray(table[..., :3])), image.convert("RGB"), weight)
