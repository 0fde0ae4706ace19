from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfast.errors import BackendError, InputError
from clipfast.ops.dispatch import backend
from clipfast.ops.path import path_accumulate, path_points


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


SIZES = st.integers(1, 6)


@settings(deadline=None, max_examples=30)
@given(batch=SIZES, steps=SIZES, size=SIZES, seed=st.integers(0, 2**31))
def test_points_agree_with_a_loop(batch: int, steps: int, size: int, seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    start, delta = torch.randn(2, batch, size, 3, generator=make)
    alphas = torch.rand(steps, generator=make)
    points = path_points(start, delta, alphas)
    assert points.shape == (steps * batch, size, 3)
    for s in range(steps):
        for b in range(batch):
            expected = start[b].double() + alphas[s].double() * delta[b].double()
            torch.testing.assert_close(points[s * batch + b].double(), expected, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(batch=SIZES, steps=SIZES, size=SIZES, seed=st.integers(0, 2**31))
def test_the_sum_agrees_with_a_loop(batch: int, steps: int, size: int, seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    total = torch.randn(batch, size, 2, generator=make)
    grad, weights = torch.randn(steps * batch, size, 2, generator=make), torch.randn(steps, generator=make)
    expected = total.double()
    for b in range(batch):
        for s in range(steps):
            expected[b] += weights[s].double() * grad[s * batch + b].double()
    path_accumulate(total, grad, weights)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_points_are_rounded_once(dtype: torch.dtype) -> None:
    start, delta, alphas = torch.randn(2, 50), torch.randn(2, 50), torch.rand(3)
    wide = torch.promote_types(dtype, torch.float32)
    expected = torch.addcmul(start.to(wide), delta.to(wide), alphas.to(wide)[:, None, None])
    assert torch.equal(path_points(start, delta, alphas, dtype), expected.to(dtype).view(6, 50))


def test_half_precision_gradients_are_summed_in_float32() -> None:
    total = torch.full((1, 4), 4096.0)
    path_accumulate(total, torch.ones(100, 4, dtype=torch.bfloat16), torch.full((100,), 0.25))
    assert torch.equal(total, torch.full((1, 4), 4121.0))


def test_one_start_serves_all_images() -> None:
    start, delta, alphas = torch.randn(1, 4, 5), torch.randn(3, 4, 5), torch.rand(2)
    assert torch.equal(path_points(start, delta, alphas), path_points(start.expand(3, -1, -1).clone(), delta, alphas))


def test_a_total_may_be_a_slice_of_a_larger_one() -> None:
    whole = torch.zeros(2, 3, 8)
    grad, weights = torch.randn(4 * 2, 8), torch.rand(4)
    path_accumulate(whole[:, 1], grad, weights)
    expected = torch.einsum("sbi,s->bi", grad.view(4, 2, 8), weights)
    torch.testing.assert_close(whole[:, 1], expected)
    assert not whole[:, ::2].any()


def test_no_images_and_no_steps_are_nothing_to_do() -> None:
    assert path_points(torch.randn(0, 4), torch.randn(0, 4), torch.rand(3)).shape == (0, 4)
    assert path_points(torch.randn(2, 4), torch.randn(2, 4), torch.rand(0)).shape == (0, 4)
    path_accumulate(total := torch.ones(2, 4), torch.randn(0, 4), torch.rand(0))
    assert torch.equal(total, torch.ones(2, 4))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"alphas must be \(S,\)"):
        path_points(torch.ones(2, 4), torch.ones(2, 4), torch.ones(1, 3))
    with pytest.raises(InputError, match=r"broadcast to delta's shape, not \(2, 3\) and \(2, 4\)"):
        path_points(torch.ones(2, 3), torch.ones(2, 4), torch.ones(3))
    with pytest.raises(InputError, match="on cpu and meta"):
        path_points(torch.ones(2, 4, device="meta"), torch.ones(2, 4), torch.ones(3))
    with pytest.raises(InputError, match="half precision loses the sum"):
        path_accumulate(torch.ones(2, 4).half(), torch.ones(6, 4), torch.ones(3))
    with pytest.raises(InputError, match=r"not \(2, 4\) and \(5, 4\) and \(3,\)"):
        path_accumulate(torch.ones(2, 4), torch.ones(5, 4), torch.ones(3))
    with pytest.raises(InputError, match="contiguous within each image"):
        path_accumulate(torch.ones(2, 4, 3).transpose(1, 2), torch.ones(6, 3, 4), torch.ones(3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here Triton may run")
def test_triton_says_why_it_cannot() -> None:
    with backend("triton"):
        with pytest.raises(BackendError, match=r"path_points .* start is on cpu, not on cuda; delta is on cpu"):
            path_points(torch.ones(2, 4), torch.ones(2, 4), torch.ones(3))
        with pytest.raises(BackendError, match="total is float64, not float32; grad is on cpu"):
            path_accumulate(torch.ones(2, 4, dtype=torch.float64), torch.ones(6, 4), torch.ones(3))


def test_torch_library_knows_them() -> None:
    start, delta, alphas = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.rand(5)
    torch.library.opcheck(torch.ops.clipfast.path_points.default, (start, delta, alphas, torch.bfloat16))
    torch.library.opcheck(torch.ops.clipfast.path_accumulate.default, (start, torch.randn(10, 3, 4), alphas))


def test_they_compile_whole() -> None:
    def integrate(start: torch.Tensor, delta: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(start)
        path_accumulate(total, path_points(start, delta, alphas).square(), alphas)
        return total

    inputs = torch.randn(2, 3), torch.randn(2, 3), torch.rand(4)
    compiled = torch.compile(integrate, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), integrate(*inputs))
