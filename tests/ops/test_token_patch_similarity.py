from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipfast.errors import BackendError, InputError
from clipfast.ops.dispatch import backend
from clipfast.ops.gmm_threshold import gmm_threshold
from clipfast.ops.token_patch_similarity import token_patch_similarity, token_patch_threshold


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 5),
    patches=st.integers(1, 7),
    width=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_agrees_with_a_loop_over_pairs(batch: int, tokens: int, patches: int, width: int, seed: int) -> None:
    t, p = states(batch, tokens, width, seed=seed), states(batch, patches, width, seed=seed + 1)
    scores = token_patch_similarity(t, p)
    assert scores.dtype == torch.float32
    for b in range(batch):
        for i, one in enumerate(t[b].double().tolist()):
            for j, other in enumerate(p[b].double().tolist()):
                product = math.fsum(x * y for x, y in zip(one, other, strict=True))
                cosine = product / (math.hypot(*one) * math.hypot(*other))
                assert float(scores[b, i, j]) == pytest.approx(cosine, rel=1e-5, abs=1e-6)


def test_float32_agrees_with_float64() -> None:
    t, p = states(2, 7, 512), states(2, 196, 512, seed=1)
    exact = token_patch_similarity(t.double(), p.double())
    assert exact.dtype == torch.float64
    assert (token_patch_similarity(t, p) - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    t, p = states(2, 7, 33).to(dtype), states(2, 20, 33, seed=1).to(dtype)
    assert torch.equal(token_patch_similarity(t, p), token_patch_similarity(t.float(), p.float()))
    assert torch.equal(token_patch_threshold(t, p), token_patch_threshold(t.float(), p))


def test_length_does_not_matter_and_no_length_is_similarity_zero() -> None:
    t, p = states(1, 3, 8), states(1, 5, 8, seed=1)
    scores = token_patch_similarity(t, p)
    assert torch.equal(token_patch_similarity(t * 1024, p / 1024), scores)
    assert scores.abs().max() <= 1 + 1e-6
    t[0, 1] = 0
    scores = token_patch_similarity(t, p)
    assert not scores[0, 1].any()
    assert scores[0, ::2].all()


def test_tokens_may_be_shared_and_anything_may_be_strided() -> None:
    t, p = states(7, 24), states(3, 20, 24, seed=1)
    expected = token_patch_similarity(t.expand(3, -1, -1).clone(), p)
    assert torch.equal(token_patch_similarity(t, p), expected)
    padded = torch.full((3, 21, 50), torch.nan)
    padded[:, 1:, 1:49:2] = p
    torch.testing.assert_close(token_patch_similarity(t.T.contiguous().T, padded[:, 1:, 1:49:2]), expected)


@pytest.mark.parametrize("threshold", ["soft", "hard", "none"])
def test_the_threshold_is_that_of_the_similarity(threshold: str) -> None:
    t, p = states(2, 5, 16), states(2, 49, 16, seed=1)
    expected = gmm_threshold(token_patch_similarity(t, p), threshold)
    assert torch.equal(token_patch_threshold(t, p, threshold), expected)
    with backend("torch"):
        torch.testing.assert_close(token_patch_threshold(t, p, threshold), expected, rtol=1e-5, atol=1e-6)


def test_a_patch_that_is_nan_spoils_its_own_image_alone() -> None:
    t, p = states(5, 16), states(2, 49, 16, seed=1)
    expected = token_patch_threshold(t, p)
    p[1, 3, 7] = math.nan
    spoiled = token_patch_threshold(t, p)
    assert spoiled[1].isnan().all()
    assert torch.equal(spoiled[0], expected[0])


def test_no_images_tokens_or_patches_are_nothing_to_do() -> None:
    assert token_patch_similarity(states(0, 7, 4), states(0, 9, 4)).shape == (0, 7, 9)
    assert token_patch_threshold(states(0, 4), states(2, 9, 4)).shape == (2, 0, 9)
    assert token_patch_threshold(states(7, 4), states(2, 0, 4)).shape == (2, 7, 0)


def test_no_gradient_flows() -> None:
    t, p = states(5, 16).requires_grad_(), states(2, 9, 16, seed=1).requires_grad_()
    assert not token_patch_similarity(t, p).requires_grad
    assert not token_patch_threshold(t, p).requires_grad


def test_what_does_not_fit_is_refused() -> None:
    shapes = r"must be \(B, T, E\) or \(T, E\) and \(B, n, E\), not "
    for t, p in (((2, 7, 4), (3, 9, 4)), ((7, 4), (3, 9, 5)), ((7, 4), (9, 4)), ((4,), (3, 9, 4)), ((7, 0), (3, 9, 0))):
        for function in (token_patch_similarity, token_patch_threshold):
            with pytest.raises(InputError, match=shapes):
                function(states(*t), states(*p))
    with pytest.raises(InputError, match=r"must be floating, not torch.int64 and torch.float32"):
        token_patch_similarity(states(7, 4).long(), states(3, 9, 4))
    with pytest.raises(InputError, match="tokens are on meta and patches on cpu"):
        token_patch_similarity(states(7, 4).to("meta"), states(3, 9, 4))
    with pytest.raises(InputError, match=r"threshold 'Soft' is unknown; did you mean 'soft'\?"):
        token_patch_threshold(states(7, 4), states(3, 9, 4), "Soft")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here Triton may run")
def test_triton_says_why_it_cannot() -> None:
    t, p = states(7, 4), states(1, 2000, 4).double()
    with backend("triton"):
        with pytest.raises(
            BackendError, match=r"token_patch_similarity .* tokens is on cpu, not on cuda; patches is on"
        ):
            token_patch_similarity(t, p)
        with pytest.raises(BackendError, match=r"patches is float64, not .*; 2000 patches are more than 1024"):
            token_patch_threshold(t, p)


def test_torch_library_knows_them() -> None:
    t, p = states(7, 4), states(3, 9, 4)
    torch.library.opcheck(torch.ops.clipfast.token_patch_similarity.default, (t, p.half()))
    for threshold in ("hard", "none"):
        torch.library.opcheck(torch.ops.clipfast.token_patch_threshold.default, (t.double(), p, threshold))


def test_they_compile_whole() -> None:
    def explain(t: Tensor, p: Tensor) -> Tensor:
        return token_patch_threshold(t * 2, p) + token_patch_similarity(t, p)

    t, p = states(7, 4), states(3, 9, 4)
    compiled = torch.compile(explain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(t, p), explain(t, p))
