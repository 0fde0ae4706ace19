from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipfast.errors import BackendError, InputError
from clipfast.ops.dispatch import backend
from clipfast.ops.spatial_attribution import gradient_weighted, spatial_attribution, spatial_weight


def naive_weight(q: Tensor, k: Tensor) -> list[list[float]]:
    """lambda by loops, in float64."""
    weights = []
    for query, keys in zip(q.tolist(), k.tolist(), strict=True):
        length = math.sqrt(sum(x * x for x in query))
        cosines = [
            sum(x * y for x, y in zip(query, key, strict=True)) / (length * math.sqrt(sum(y * y for y in key)))
            for key in keys
        ]
        low, high = min(cosines), max(cosines)
        weights.append([1.0 if high == low else (c - low) / (high - low) for c in cosines])
    return weights


def naive(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The maps by loops, in float64."""
    maps = torch.empty(len(q), g.shape[1], k.shape[1], dtype=torch.float64)
    for b, weights in enumerate(naive_weight(q, k)):
        for p, direction in enumerate(g[b].tolist()):
            for i, value in enumerate(v[b].tolist()):
                product = sum(x * y for x, y in zip(direction, value, strict=True))
                maps[b, p, i] = max(weights[i] * product, 0.0)
    return maps


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


SIZES = st.integers(1, 5)


@settings(deadline=None, max_examples=40)
@given(batch=SIZES, patches=st.integers(1, 9), width=SIZES, channels=SIZES, prompts=SIZES, seed=st.integers(0, 2**31))
def test_agrees_with_loops(batch: int, patches: int, width: int, channels: int, prompts: int, seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    # Of one dimension a cosine is 1 or -1 but for rounding, which min-max would blow up.
    q, k = (torch.randn(*shape, width + 1, generator=make) for shape in ((batch,), (batch, patches)))
    v = torch.randn(batch, patches, channels, generator=make)
    g = torch.randn(batch, prompts, channels, generator=make)
    torch.testing.assert_close(spatial_attribution(q, k, v, g).double(), naive(q, k, v, g), rtol=1e-4, atol=1e-4)


def test_float32_agrees_with_float64_as_promised() -> None:
    q, k, v, g = torch.randn(3, 768), torch.randn(3, 196, 768), torch.randn(3, 196, 768), torch.randn(3, 20, 768)
    maps = spatial_attribution(q, k, v, g)
    exact = spatial_attribution(q.double(), k.double(), v.double(), g.double())
    assert exact.dtype == torch.float64
    assert (maps - exact).norm() <= 1e-5 * exact.norm()


def test_half_precision_is_computed_and_handed_back_in_float32() -> None:
    q, k, v, g = (torch.randn(*shape).bfloat16() for shape in ((2, 32), (2, 9, 32), (2, 9, 32), (2, 4, 32)))
    maps = spatial_attribution(q, k, v, g)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps, spatial_attribution(q.float(), k.float(), v.float(), g.float()))
    assert spatial_weight(q, k).dtype == torch.float32


def test_packed_and_padded_inputs_are_read_in_place() -> None:
    packed = torch.full((2, 11, 5, 8), torch.nan)
    packed[:, 1:10, 1:4] = torch.randn(2, 9, 3, 8)
    q, k, v = packed[:, 1, 1], packed[:, 1:10, 2], packed[:, 1:10, 3]
    g = torch.randn(8, 4).T.expand(2, -1, -1)
    expected = spatial_attribution(q.contiguous(), k.contiguous(), v.contiguous(), g.contiguous())
    torch.testing.assert_close(spatial_attribution(q, k, v, g), expected)


def test_directions_may_be_shared_by_the_batch() -> None:
    weight, v, g = torch.rand(3, 7), torch.randn(3, 7, 6), torch.randn(4, 6)
    shared = gradient_weighted(weight, v, g)
    torch.testing.assert_close(shared, gradient_weighted(weight, v, g.expand(3, -1, -1).clone()))
    torch.testing.assert_close(shared, torch.einsum("bi,bic,pc->bpi", weight, v, g))


def test_writes_into_a_view_and_nowhere_else() -> None:
    buffer = torch.full((2, 9, 12), torch.nan)
    weight, v, g = torch.rand(2, 7), torch.randn(2, 7, 6), torch.randn(2, 4, 6)
    out = buffer[:, 2:10:2, 3:10]
    assert gradient_weighted(weight, v, g, relu=True, out=out) is out
    assert torch.equal(out, gradient_weighted(weight, v, g).relu())
    assert buffer.isnan().sum() == buffer.numel() - out.numel()


def test_positions_outside_get_no_weight_and_set_no_range() -> None:
    q, k = torch.randn(2, 6), torch.randn(2, 8, 6)
    where = torch.tensor([[True] * 5 + [False] * 3, [False, True] * 4])
    weight = spatial_weight(q, k, where)
    for b in range(2):
        assert torch.equal(weight[b, where[b]], spatial_weight(q[b : b + 1], k[b : b + 1, where[b]])[0])
    assert not weight[~where].any()
    k[0, 7] = torch.nan
    assert torch.equal(spatial_weight(q, k, where), weight)


def test_equal_keys_weigh_one() -> None:
    weight = spatial_weight(torch.ones(1, 4), torch.ones(1, 3, 4))
    assert torch.equal(weight, torch.ones(1, 3))
    assert torch.equal(spatial_weight(torch.ones(1, 4), torch.zeros(1, 3, 4)), torch.ones(1, 3))


@pytest.mark.parametrize("empty", ["images", "prompts", "patches"])
def test_nothing_to_do_is_done(empty: str) -> None:
    batch, prompts, patches = (0 if empty == name else 2 for name in ("images", "prompts", "patches"))
    maps = gradient_weighted(torch.rand(batch, patches), torch.rand(batch, patches, 3), torch.rand(prompts, 3))
    assert maps.shape == (batch, prompts, patches)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"do not fit together: weight \(2, 7\), v \(2, 8, 6\)"):
        gradient_weighted(torch.rand(2, 7), torch.rand(2, 8, 6), torch.rand(3, 6))
    with pytest.raises(InputError, match=r"g \(3, 5\), out \(2, 3, 8\)"):
        gradient_weighted(torch.rand(2, 8), torch.rand(2, 8, 6), torch.rand(3, 5))
    with pytest.raises(InputError, match=r"q \(2, 4\), k \(2, 8, 5\)"):
        spatial_attribution(torch.rand(2, 4), torch.rand(2, 8, 5), torch.rand(2, 8, 6), torch.rand(3, 6))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here Triton may run")
def test_triton_says_why_it_cannot() -> None:
    q, k, v, g = torch.rand(2, 4), torch.rand(2, 8, 4), torch.rand(2, 8, 6).double(), torch.rand(3, 6)
    with backend("triton"):
        with pytest.raises(BackendError, match=r"no CUDA GPU; q is on cpu.*v is float64, not bfloat16 or float16"):
            spatial_attribution(q, k, v, g)
        with pytest.raises(BackendError, match=r"spatial_weight of q \(2, 4\) float32 on cpu.*cannot run as asked"):
            spatial_weight(q, k)


def test_torch_library_knows_them() -> None:
    q, k, v, g = torch.randn(2, 4), torch.randn(2, 8, 4), torch.randn(2, 8, 6), torch.randn(2, 3, 6)
    torch.library.opcheck(torch.ops.clipfast.spatial_weight.default, (q, k, torch.rand(2, 8) > 0.5))
    maps = torch.empty(2, 3, 8)
    torch.library.opcheck(torch.ops.clipfast.spatial_attribution.default, (q, k, None, v, g, True, maps))
    torch.library.opcheck(
        torch.ops.clipfast.spatial_attribution.default, (None, None, torch.rand(2, 8), v, g, False, maps)
    )


def test_they_compile_whole() -> None:
    def explain(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        both = q.new_empty(2, 2, 3, 8)
        gradient_weighted(spatial_weight(q, k), v, g, out=both[0])
        both[1] = spatial_attribution(q, k, v, g)
        return both * 2

    inputs = torch.randn(2, 4), torch.randn(2, 8, 4), torch.randn(2, 8, 6), torch.randn(3, 6)
    compiled = torch.compile(explain, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), explain(*inputs))
