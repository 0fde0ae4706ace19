from __future__ import annotations

import pytest
import torch

from clipfast.ops.dispatch import backend
from clipfast.ops.token_patch_similarity import token_patch_similarity, token_patch_threshold

WIDE = "sixteen maps of 1,024 scores and their posteriors are more than 64 registers a thread hold"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("patches", "width"), [(49, 512), (256, 1152), (1024, 1536)])
def test_compiles(compiled, patches: int, width: int, dtype: torch.dtype) -> None:
    from clipfast.kernels import token_patch_similarity as kernels

    t, p, out = torch.empty(8, 77, width, dtype=dtype), torch.empty(8, patches, width, dtype=dtype), torch.empty(0)
    label = f"{dtype}, {patches}, {width}"
    compiled(label, lambda: kernels.token_patch_similarity(t, p, out))
    spills = WIDE if patches > 512 else None
    compiled(label, lambda: kernels.token_patch_threshold(t, p, False, out), spills=spills)


@pytest.mark.parametrize("patches", [20, 100, 196, 400])
def test_compiles_for_shared_tokens_and_odd_strides(compiled, patches: int) -> None:
    from clipfast.kernels import token_patch_similarity as kernels

    t = torch.empty(5, 100).half().expand(3, -1, -1)
    p = torch.empty(3, patches + 1, 103).half()[:, 1:, 3:]
    if patches == 196:
        compiled(f"odd, {patches}", lambda: kernels.token_patch_similarity(t, p, torch.empty(0)))
    compiled(f"odd, {patches}", lambda: kernels.token_patch_threshold(t, p, True, torch.empty(0)))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "tokens", "patches", "width"), [(2, 3, 49, 40), (1, 18, 70, 33), (1, 1, 1, 1)])
def test_agrees_with_the_definition(dtype: torch.dtype, batch: int, tokens: int, patches: int, width: int) -> None:
    g = torch.Generator().manual_seed(0)
    t = torch.randn(batch, tokens, width, generator=g).to(dtype)
    p = torch.full((batch, patches + 2, 2 * width + 1), torch.nan, dtype=dtype)[:, 1:-1, 1::2]
    p[:] = torch.randn(batch, patches, width, generator=g).to(dtype)
    for function in (token_patch_similarity, token_patch_threshold):
        with backend("triton"):
            ours = function(t, p)
        with backend("torch"):
            expected = function(t.double(), p.double())
        assert (ours.double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.interpreter
def test_tokens_may_be_shared_and_nothing_else_is_written() -> None:
    from clipfast.kernels import token_patch_similarity as kernels

    g = torch.Generator().manual_seed(0)
    t, p = torch.randn(5, 20, generator=g), torch.randn(2, 40, 20, generator=g)
    for hard in (None, False, True):
        out = torch.full((3, 5, 40), torch.nan)
        if hard is None:
            kernels.token_patch_similarity(t.expand(2, -1, -1), p, out)
        else:
            kernels.token_patch_threshold(t.expand(2, -1, -1), p, hard, out)
        threshold = {None: "none", False: "soft", True: "hard"}[hard]
        with backend("torch"):
            expected = token_patch_threshold(t, p, threshold)
        torch.testing.assert_close(out[:2], expected, rtol=1e-4, atol=1e-6)
        assert out[2].isnan().all()
