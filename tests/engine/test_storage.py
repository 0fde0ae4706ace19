"""Maps and features come back within the bound that their codec states, whatever their magnitude."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clipfast.engine.storage import FEATURES, MAPS, Codec, feature_codec, map_codec
from clipfast.errors import InputError

HALF_STEP = 2.0**-12
"""Of numbers up to 1: half the distance between neighbouring float16 numbers."""


def _through(codec: Codec, values: np.ndarray) -> np.ndarray:
    shape = values.shape[1:]
    parts = codec.encode(values)
    assert {name: (part.dtype, part.shape[1:]) for name, part in parts.items()} == codec.layout(shape)
    assert all(len(part) == len(values) for part in parts.values())
    # As a file gives them back: bytes that cannot be written to.
    stored = {name: np.frombuffer(part.tobytes(), part.dtype).reshape(part.shape) for name, part in parts.items()}
    found = codec.decode(stored, shape)
    assert found.dtype == np.float32 and found.shape == values.shape
    return found


def _features(seed: int = 0, shape: tuple[int, ...] = (4, 49, 32), fall: float = 0.8) -> np.ndarray:
    """Random arrays whose singular values fall by `fall` from one to the next."""
    rng = np.random.default_rng(seed)
    rows, columns = int(np.prod(shape[1:-1])), shape[-1]
    kept = min(rows, columns)
    left, _ = np.linalg.qr(rng.normal(size=(shape[0], rows, kept)))
    right, _ = np.linalg.qr(rng.normal(size=(shape[0], columns, kept)))
    return ((left * fall ** np.arange(kept)) @ right.swapaxes(1, 2)).reshape(shape).astype(np.float32)


_VALUES = st.floats(-(2.0**100), 2.0**100, width=32)
_ARRAYS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=3, max_dims=3, max_side=6), elements=_VALUES)


@settings(max_examples=150, deadline=None)
@given(_ARRAYS)
def test_float16_is_off_by_half_a_step_of_the_largest_magnitude(maps: np.ndarray) -> None:
    found = _through(map_codec("float16"), maps)
    largest = np.abs(maps).max((1, 2), keepdims=True).astype(np.float64)
    assert (np.abs(found.astype(np.float64) - maps) <= largest * HALF_STEP * (1 + 1e-6)).all()


@settings(max_examples=150, deadline=None)
@given(_ARRAYS)
def test_uint8_is_off_by_half_of_255_steps(maps: np.ndarray) -> None:
    found = _through(map_codec("uint8"), maps)
    low, high = (f((1, 2), keepdims=True) for f in (maps.astype(np.float64).min, maps.astype(np.float64).max))
    rounding = 4 * np.finfo(np.float32).eps * np.maximum(np.abs(low), np.abs(high)) + 1e-44 * 255
    assert (np.abs(found.astype(np.float64) - maps) <= (high - low) / 510 * (1 + 1e-5) + rounding).all()


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=3, max_dims=4, max_side=5), elements=_VALUES), st.booleans())
def test_int8_is_off_by_half_of_127_steps(values: np.ndarray, whole: bool) -> None:
    found = _through(feature_codec("int8:image" if whole else "int8"), values)
    axes = tuple(range(1, values.ndim)) if whole else -2
    largest = np.abs(values).max(axes, keepdims=True).astype(np.float64)
    assert (np.abs(found.astype(np.float64) - values) <= largest / 254 * (1 + 1e-5) + 1e-42).all()


def test_int8_keeps_small_dimensions_beside_large_ones() -> None:
    values = _features()
    values[..., 3] *= 1000
    error = np.abs(_through(feature_codec("int8"), values) - values).max((0, 1))
    assert error[3] > 0.1 and np.delete(error, 3).max() < np.abs(np.delete(values, 3, -1)).max() / 250


def test_float32_changes_nothing() -> None:
    maps = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
    maps[0, 0, 0], maps[1, 2, 3] = np.nan, np.inf
    np.testing.assert_array_equal(_through(map_codec("float32"), maps), maps)


@pytest.mark.parametrize("magnitude", [1e-38, 1e-9, 1e-6, 1.0, 1e5, 1e30])
@pytest.mark.parametrize("name", ["float16", "uint8"])
def test_the_magnitude_of_a_map_costs_nothing(name: str, magnitude: float) -> None:
    """Plain float16 has nothing between 0 and 6e-8 and nothing above 65,504."""
    maps = np.random.default_rng(1).random((8, 14, 14), np.float32)
    scaled = maps * np.float32(magnitude)
    error = np.abs(_through(map_codec(name), scaled) / np.float32(magnitude) - maps).max()
    assert error <= {"float16": HALF_STEP, "uint8": 1 / 510}[name] * (1 + 1e-5)


def test_known_bytes() -> None:
    maps = np.array([[[0, 1, 3, 4]], [[-1, -0.5, 0.5, 1]]], np.float32)
    half = map_codec("float16").encode(maps)
    assert half["scale"].tolist() == [4, 1]
    assert half["values"].tobytes().hex() == "00000034003a003c" + "00bc00b80038003c"
    byte = map_codec("uint8").encode(maps)
    assert byte["values"].tolist() == [[[0, 64, 191, 255]], [[0, 64, 191, 255]]]
    assert byte["offset"].tolist() == [0, -1]
    np.testing.assert_allclose(byte["scale"], [4 / 255, 2 / 255], rtol=1e-7)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-42, 3e38, 0.1])
@pytest.mark.parametrize("name", sorted(MAPS))
def test_constant_maps_come_back_exactly(name: str, value: float) -> None:
    maps = np.full((2, 3, 3), value, np.float32)
    np.testing.assert_array_equal(_through(map_codec(name), maps), maps)


def test_what_is_not_finite_stays_so_and_its_neighbours_stay_right() -> None:
    maps = np.random.default_rng(2).random((3, 4, 4), np.float32)
    maps[0, 1, 1], maps[0, 2, 2], maps[0, 3, 3] = np.nan, np.inf, -np.inf
    maps[2] = np.nan
    half = _through(map_codec("float16"), maps)
    np.testing.assert_allclose(half[:2], maps[:2], atol=HALF_STEP)
    assert np.isnan(half[2]).all()
    byte = _through(map_codec("uint8"), maps)
    assert np.isnan(byte[0]).all() and np.isnan(byte[2]).all()
    np.testing.assert_allclose(byte[1], maps[1], atol=1 / 500)


@pytest.mark.parametrize("name", ["int8", "int8:image", "rank:8", "rank:8:int8"])
def test_features_that_are_not_finite_become_nan(name: str) -> None:
    values = _features()
    values[1, 3, 5], values[2, 0, 0] = np.nan, np.inf
    found = _through(feature_codec(name), values)
    column = slice(5, 6) if name == "int8" else slice(None)
    assert np.isnan(found[1, :, column]).all() and np.isnan(found[2, :, 0]).all()
    assert np.isfinite(found[[0, 3]]).all()
    if name == "int8":
        assert np.isfinite(np.delete(found[1], 5, 1)).all()


@pytest.mark.parametrize("name", sorted({*MAPS, "int8", "int8:image", "rank:3", "rank:3:int8"}))
def test_how_values_come_in_batches_changes_no_byte(name: str) -> None:
    codec = MAPS.get(name) or feature_codec(name)
    values = _features(3, (7, 20, 16))
    whole = codec.encode(values)
    batches = [codec.encode(values[i : i + 2]) for i in (0, 2, 4, 6)]
    for part in whole:
        assert whole[part].tobytes() == np.concatenate([batch[part] for batch in batches]).tobytes()
    assert codec.decode(codec.encode(values[:0]), values.shape[1:]).shape == (0, 20, 16)


@pytest.mark.parametrize("shape", [(2, 49, 32), (2, 20, 32), (2, 3, 30, 32)])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_rank_is_off_by_the_components_left_out(shape: tuple[int, ...], rank: int) -> None:
    """Eckart and Young: no matrix of that rank is nearer than the truncated singular value decomposition."""
    values = _features(4, shape)
    found = _through(feature_codec(f"rank:{rank}"), values)
    for value, back in zip(values.astype(np.float64), found.astype(np.float64), strict=True):
        flat = value.reshape(-1, value.shape[-1])
        least = np.sqrt((np.linalg.svd(flat, compute_uv=False)[rank:] ** 2).sum())
        error = np.linalg.norm(back - value)
        assert least * (1 - 1e-5) <= error <= least + 2e-3 * np.linalg.norm(value)


def test_a_full_rank_is_nearly_exact_and_int8_factors_are_coarser() -> None:
    values = _features(5)
    scale = np.linalg.norm(values)
    half = np.linalg.norm(_through(feature_codec("rank:999"), values) - values) / scale
    coarse = np.linalg.norm(_through(feature_codec("rank:999:int8"), values) - values) / scale
    assert half < 5e-4 < coarse < 1e-2


def test_bytes_of_one_array() -> None:
    assert map_codec("float16").nbytes((14, 14)) == 14 * 14 * 2 + 4
    assert map_codec("uint8").nbytes((14, 14)) == 14 * 14 + 8
    assert map_codec("float32").nbytes((14, 14)) == 14 * 14 * 4
    assert feature_codec("int8").nbytes((196, 512)) == 196 * 512 + 512 * 4
    assert feature_codec("int8:image").nbytes((196, 512)) == 196 * 512 + 4
    assert feature_codec("rank:32").nbytes((196, 512)) == 32 * (196 + 512) * 2 + 2 * 4
    assert feature_codec("rank:32:int8").nbytes((196, 512)) == 32 * (196 + 512) + 2 * 32 * 4
    assert feature_codec("rank:999").nbytes((2, 49, 64)) == 64 * (98 + 64) * 2 + 2 * 4


@pytest.mark.parametrize("name", ["flat16", "rank", "rank:", "rank:0", "rank:-3", "rank:8:float9", "rank:٣", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="cannot be kept as"):
        feature_codec(name)


def test_a_misspelt_name_gets_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'float16'"):
        map_codec("flota16")
    assert next(iter(MAPS)) == "float16" == FEATURES[0]
