"""token_patch_similarity and token_patch_threshold on the CPU: what they cost beside the bare product of the states.

make bench, or: pytest benchmarks/bench_token_patch_similarity.py --benchmark-enable --benchmark-json=out.json
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paired import report
from torch import Tensor

import clipfast.native
from clipfast.ops.dispatch import backend
from clipfast.ops.token_patch_similarity import token_patch_similarity, token_patch_threshold


@pytest.mark.benchmark(group="token_patch_similarity")
@pytest.mark.skipif(clipfast.native.problem("_native") is not None, reason="the native module is not built here")
@pytest.mark.parametrize(("patches", "width"), [(196, 512), (576, 768)], ids=["B16", "L14-336"])
def test_the_native_mixture_beats_the_definition(benchmark: Any, patches: int, width: int) -> None:
    tokens, states = torch.randn(16, 77, width), torch.randn(16, patches, width)

    def threshold(name: str) -> Tensor:
        with backend(name):
            return token_patch_threshold(tokens, states)

    torch.testing.assert_close(threshold("auto"), threshold("torch"), rtol=1e-3, atol=1e-5)
    timings = report(
        benchmark,
        {
            "product": lambda: tokens @ states.mT,
            "similarity": lambda: token_patch_similarity(tokens, states),
            "threshold, native": lambda: threshold("auto"),
            "threshold, torch": lambda: threshold("torch"),
        },
    )
    figures = ", ".join(f"{name} {t.median * 1e3:.1f} ms ({t.ratio:.1f})" for name, t in timings.items())
    print(f"\n16 images, 77 tokens, {patches} patches: {figures}")
    assert timings["threshold, native"].median < timings["threshold, torch"].median
