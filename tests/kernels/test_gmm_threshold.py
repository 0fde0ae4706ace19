from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from clipfast.ops.dispatch import backend
from clipfast.ops.gmm_threshold import fit_mixture, gmm_threshold


def maps(count: int, size: int) -> Tensor:
    g = torch.Generator().manual_seed(size)
    background = 0.2 + 0.02 * torch.randn(count, size, generator=g)
    return background + (torch.rand(count, size, generator=g) < 0.2) * 0.2 * torch.rand(count, 1, generator=g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [49, 196, 1024, 8192])
def test_compiles(compiled, size: int, dtype: torch.dtype) -> None:
    from clipfast.kernels import gmm_threshold as kernels

    scores, out = torch.empty(64, size, dtype=dtype), torch.empty(64, size)
    compiled(f"{dtype}, {size}", lambda: kernels.gmm_threshold(scores, False, out))
    if size == 196 and dtype == torch.float32:
        compiled(f"{dtype}, {size}, hard", lambda: kernels.gmm_threshold(scores, True, out))
        compiled(f"{dtype}, {size}, fit", lambda: kernels.gmm_threshold(scores, False, out, torch.empty(64, 7), out))
        cut = torch.empty(64, size + 1, dtype=dtype)[:, 1:]
        compiled(f"{dtype}, {size}, odd strides", lambda: kernels.gmm_threshold(cut, False, out))


@pytest.mark.interpreter
@pytest.mark.parametrize("size", [1, 2, 3, 50, 64, 300])
def test_agrees_with_the_definition(size: int) -> None:
    scores = maps(5 if size == 50 else 2, size)
    if size == 50:
        scores[0] = 0.3
        scores[1] = torch.where(torch.arange(50) < 45, 0.1, 0.7)  # quartiles alike
    with backend("triton"):
        ours, soft, hard = fit_mixture(scores), gmm_threshold(scores), gmm_threshold(scores, "hard")
    with backend("torch"):
        exact = fit_mixture(scores.double())
        expected, kept = gmm_threshold(scores.double()), gmm_threshold(scores.double(), "hard")
    assert torch.equal(ours.iterations, exact.iterations)
    for name, a, b in [*zip(ours._fields, ours, exact, strict=True), ("soft", soft, expected), ("hard", hard, kept)]:
        assert (a.double() - b).norm() <= 1e-5 * b.double().norm(), name


@pytest.mark.interpreter
def test_float16_and_strides_are_read_in_place_and_nothing_else_is_written() -> None:
    from clipfast.kernels import gmm_threshold as kernels

    scores = maps(3, 21).half()
    padded = torch.full((3, 50), torch.nan, dtype=torch.float16)
    padded[:, 4:46:2] = scores
    out, parameters, posterior = torch.full((5, 21), torch.nan), torch.full((5, 7), torch.nan), torch.full((5, 21), 9.0)
    kernels.gmm_threshold(padded[:, 4:46:2], False, out, parameters, posterior)
    with backend("torch"):
        expected = gmm_threshold(scores)
    torch.testing.assert_close(out[:3], expected, rtol=1e-5, atol=1e-7)
    assert out[3:].isnan().all()
    assert parameters[:3].isfinite().all()
    assert parameters[3:].isnan().all()
    assert (posterior[:3] <= 1).all()
    assert (posterior[3:] == 9).all()


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, which interprets
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_its_own_map_alone(bad: float) -> None:
    scores = maps(3, 50)
    with backend("triton"):
        expected = gmm_threshold(scores, "hard")
        scores[1, 17] = bad
        result = gmm_threshold(scores, "hard")
    assert result[1].isnan().all()
    assert torch.equal(result[::2], expected[::2])
