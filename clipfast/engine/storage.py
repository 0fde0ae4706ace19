"""How maps and attribution features are kept: arrays of numbers into columns of bytes, and back.

A codec turns N arrays of one shape into named parts, each (N, ...) with a little-endian type of its own, which a file
holds as a column each. What comes back differs by no more than the codec says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
import torch

from clipfast.errors import InputError, nearest

Parts = dict[str, np.ndarray]
Shape = tuple[int, ...]

_HALF, _SINGLE = np.dtype("<f2"), np.dtype("<f4")
_PIECE = 1 << 15


class Codec(ABC):
    """Arrays of one shape as named parts, and back.

    name: what a run's configuration calls it. Encoding is deterministic: the same values give the same bytes, however
    they come in batches.
    """

    name: str

    @abstractmethod
    def layout(self, shape: Shape) -> dict[str, tuple[np.dtype, Shape]]:
        """What one array of this shape becomes: for each part its type and shape, () for a plain number."""

    @abstractmethod
    def encode(self, values: np.ndarray) -> Parts:
        """Values (N, *shape), float32, as parts (N, ...)."""

    @abstractmethod
    def decode(self, parts: Mapping[str, np.ndarray], shape: Shape) -> np.ndarray:
        """Parts as `layout` describes them, each (N, ...), as values (N, *shape), float32."""

    def nbytes(self, shape: Shape) -> int:
        """Bytes of one array of this shape before a file compresses them."""
        return sum(dtype.itemsize * prod(part) for dtype, part in self.layout(shape).values())


@dataclass(frozen=True)
class Full(Codec):
    """float32 as it is."""

    name: str = "float32"

    def layout(self, shape: Shape) -> dict[str, tuple[np.dtype, Shape]]:
        return {"values": (_SINGLE, shape)}

    def encode(self, values: np.ndarray) -> Parts:
        return {"values": np.ascontiguousarray(values, _SINGLE)}

    def decode(self, parts: Mapping[str, np.ndarray], shape: Shape) -> np.ndarray:
        return parts["values"].astype(np.float32)


@dataclass(frozen=True)
class Half(Codec):
    """float16 of each array divided by its largest magnitude, `scale`.

    Off by at most 2^-12 of that magnitude. Without the scale, maps that peak below 1e-3 would lose their weaker half to
    float16's subnormal numbers, and those above 65,504 would overflow. NaN stays NaN, infinity infinity; they do not
    count for the scale, which is 1 where nothing but zeros and such is left.
    """

    name: str = "float16"

    def layout(self, shape: Shape) -> dict[str, tuple[np.dtype, Shape]]:
        return {"values": (_HALF, shape), "scale": (_SINGLE, ())}

    def encode(self, values: np.ndarray) -> Parts:
        scale = _magnitude(values, 1)
        return {"values": _rounded(values / _spread(scale, values.ndim), _HALF), "scale": scale}

    def decode(self, parts: Mapping[str, np.ndarray], shape: Shape) -> np.ndarray:
        values = _rounded(parts["values"].copy(), _SINGLE)
        values *= _spread(parts["scale"], values.ndim)
        return values


@dataclass(frozen=True)
class Bytes(Codec):
    """uint8 in 255 even steps from each array's least value, `offset`, to its greatest: value = offset + scale * byte.

    Off by at most half a step; a constant array comes back exactly. One with NaN or infinity comes back as NaN
    throughout: a byte has no room for them.
    """

    name: str = "uint8"

    def layout(self, shape: Shape) -> dict[str, tuple[np.dtype, Shape]]:
        return {"values": (np.dtype("u1"), shape), "scale": (_SINGLE, ()), "offset": (_SINGLE, ())}

    def encode(self, values: np.ndarray) -> Parts:
        flat = values.reshape(len(values), prod(values.shape[1:]))
        low, high = flat.min(1), flat.max(1)
        # In float64 as the span of two float32 numbers may be none.
        scale = ((high.astype(np.float64) - low) / 255).astype(_SINGLE)
        lost = ~(np.isfinite(low) & np.isfinite(high))
        step = np.where((scale > 0) & ~lost, scale, 1).astype(np.float32)
        flat = np.where(lost[:, None], 0, flat) if lost.any() else flat
        steps = (flat - np.where(lost, 0, low)[:, None]) / step[:, None]
        return {
            "values": np.rint(steps).clip(0, 255).astype("u1").reshape(values.shape),
            "scale": np.where(lost, np.nan, scale).astype(_SINGLE),
            "offset": low.astype(_SINGLE),
        }

    def decode(self, parts: Mapping[str, np.ndarray], shape: Shape) -> np.ndarray:
        values = parts["values"].astype(np.float32)
        values *= _spread(parts["scale"], values.ndim)
        values += _spread(parts["offset"], values.ndim)
        return values


@dataclass(frozen=True)
class Signed(Codec):
    """int8 of numbers divided by 1/127 of the largest magnitude along `axis` (None: of an array), which is `scale`.

    Off by at most half a step. What shares its scale with NaN or infinity comes back as NaN.
    """

    name: str = "int8"
    axis: Literal[-1, -2] | None = -1

    def layout(self, shape: Shape) -> dict[str, tuple[np.dtype, Shape]]:
        scales = {-1: shape[:-1], -2: (*shape[:-2], *shape[-1:]), None: ()}[self.axis]
        return {"values": (np.dtype("i1"), shape), "scale": (_SINGLE, scales)}

    def encode(self, values: np.ndarray) -> Parts:
        scale = np.abs(values).max(self._along(values.ndim), keepdims=True) / np.float32(127)
        lost = ~np.isfinite(scale)
        step = np.where(lost | (scale == 0), np.float32(1), scale)
        steps = np.nan_to_num(values, nan=0, posinf=0, neginf=0) if lost.any() else values
        steps = np.rint(steps / step).clip(-127, 127)
        scale = np.where(lost, np.nan, scale).astype(_SINGLE)
        return {"values": steps.astype("i1"), "scale": scale.squeeze(self._along(values.ndim))}

    def decode(self, parts: Mapping[str, np.ndarray], shape: Shape) -> np.ndarray:
        values = parts["values"].astype(np.float32)
        values *= np.expand_dims(parts["scale"], self._along(values.ndim))
        return values

    def _along(self, ndim: int) -> tuple[int, ...]:
        return tuple(range(1, ndim)) if self.axis is None else (self.axis,)


@dataclass(frozen=True)
class Rank(Codec):
    """The `rank` strongest of the singular components of each (..., n, E) array, rows taken together.

    values = sum over k of left_k right_k: one of `left` (K, n) and `right` (K, E), the shorter, has orthonormal rows.
    But for rounding, the error's Frobenius norm is that of the components left out, the least of any matrix of that
    rank (Eckart and Young, 1936). factors: how the two are kept. An array with NaN or infinity comes back as NaN.
    """

    name: str
    rank: int
    factors: Codec

    def layout(self, shape: Shape) -> dict[str, tuple[np.dtype, Shape]]:
        rows, columns = prod(shape[:-1]), shape[-1]
        kept = min(self.rank, rows, columns)
        return {
            f"{side}_{name}": part
            for side, factor in (("left", (kept, rows)), ("right", (kept, columns)))
            for name, part in self.factors.layout(factor).items()
        }

    def encode(self, values: np.ndarray) -> Parts:
        flat = values.reshape(len(values), prod(values.shape[1:-1]), values.shape[-1])
        lost = ~np.isfinite(flat).all((1, 2))
        flat = np.where(lost[:, None, None], 0, flat) if lost.any() else flat
        tall = flat.shape[1] > flat.shape[2]
        sides = flat.swapaxes(1, 2) if tall else flat
        kept = min(self.rank, sides.shape[1])
        # The eigenvectors of the smaller Gram matrix are singular vectors, at a tenth of a decomposition's time.
        vectors = np.linalg.eigh(sides @ sides.swapaxes(1, 2))[1][:, :, : -kept - 1 : -1].swapaxes(1, 2)
        # Whether a vector or its negative comes out is the library's choice.
        strongest = np.take_along_axis(vectors, np.abs(vectors).argmax(2)[:, :, None], 2)
        vectors = vectors * np.where(strongest < 0, np.float32(-1), np.float32(1))
        others = vectors @ sides
        others[lost] = np.nan
        left, right = (others, vectors) if tall else (vectors, others)
        return {
            f"{side}_{name}": part
            for side, factor in (("left", left), ("right", right))
            for name, part in self.factors.encode(factor).items()
        }

    def decode(self, parts: Mapping[str, np.ndarray], shape: Shape) -> np.ndarray:
        rows = prod(shape[:-1])
        kept = min(self.rank, rows, shape[-1])
        factors = [
            self.factors.decode({n.removeprefix(side): p for n, p in parts.items() if n.startswith(side)}, (kept, size))
            for side, size in (("left_", rows), ("right_", shape[-1]))
        ]
        return (factors[0].swapaxes(1, 2) @ factors[1]).reshape(-1, *shape)


MAPS: dict[str, Codec] = {codec.name: codec for codec in (Half(), Full(), Bytes())}
"""By name, how maps (h, w) can be kept; the first is the default."""

FEATURES = ("float16", "float32", "int8", "int8:image", "rank:K", "rank:K:int8")
"""How the values (n, E) or (L, n, E) of attribution features can be kept; K stands for a number."""


def map_codec(name: str) -> Codec:
    """The codec of maps of that name. Raises InputError for an unknown one."""
    if name not in MAPS:
        raise InputError(f"maps cannot be kept as {name!r}: {nearest(name, MAPS)}")
    return MAPS[name]


def feature_codec(name: str) -> Codec:
    """The codec of attribution features of that name, such as "int8" or "rank:32".

    "int8" has a scale for each dimension of the embedding, as some may be much larger than others, "int8:image" one for
    the image; "rank:K" keeps K singular components as float16, "rank:K:int8" as int8. Raises InputError for an unknown
    one.
    """
    if name in ("float16", "float32"):
        return MAPS[name]
    if name in ("int8", "int8:image"):
        return Signed(name, -2 if name == "int8" else None)
    kind, _, rest = name.partition(":")
    number, _, parts = rest.partition(":")
    if kind == "rank" and number.isascii() and number.isdigit() and int(number) > 0 and parts in ("", "int8"):
        return Rank(name, int(number), Signed() if parts else Half())
    raise InputError(f"features cannot be kept as {name!r}: {nearest(name, FEATURES)}")


def _magnitude(values: np.ndarray, otherwise: float) -> np.ndarray:
    """The largest finite magnitude of each array (N, ...): (N,), or `otherwise` where it would be zero."""
    flat = np.abs(values.reshape(len(values), prod(values.shape[1:])))
    largest = flat.max(1)
    if not np.isfinite(largest).all():
        largest = np.where(np.isfinite(flat), flat, 0).max(1)
    return np.where(largest > 0, largest, otherwise).astype(_SINGLE)


def _rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """As `values.astype(dtype)` between float16 and float32, by torch, which is several times as fast."""
    found = np.empty(values.shape, dtype)
    source, target = (torch.from_numpy(array).view(-1) for array in (np.ascontiguousarray(values), found))
    # Larger pieces it would divide among threads, which the model needs.
    for start in range(0, len(target), _PIECE):
        target[start : start + _PIECE] = source[start : start + _PIECE]
    return found


def _spread(numbers: np.ndarray, ndim: int) -> np.ndarray:
    return numbers.reshape(*numbers.shape, *(1,) * (ndim - numbers.ndim))
