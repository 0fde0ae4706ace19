"""spatial_attribution: the definition against the bare matrix products that it contains, q . k and g . v, and against
the same formula as one would write it down; and, with the weight given as the engine does, against g . v alone.

make bench, or: pytest benchmarks/bench_spatial_attribution.py --benchmark-enable --benchmark-json=out.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from paired import report
from torch import Tensor

from clipfast.bench.timer import paired
from clipfast.ops.dispatch import backend
from clipfast.ops.spatial_attribution import gradient_weighted, spatial_attribution


@pytest.mark.benchmark(group="spatial_attribution")
@pytest.mark.parametrize("prompts", [1, 10, 100, 1000])
@pytest.mark.parametrize(("patches", "width"), [(196, 768), (576, 1024)], ids=["B16", "L14-336"])
def test_the_definition_costs_its_products(benchmark: Any, patches: int, width: int, prompts: int) -> None:
    batch = 4
    q, k, v = torch.randn(batch, width), torch.randn(batch, patches, width), torch.randn(batch, patches, width)
    g, weight = torch.randn(batch, prompts, width), torch.rand(batch, patches)

    def products() -> Tensor:
        torch.bmm(q[:, None], k.mT)
        return product()

    def product() -> Tensor:
        maps = torch.empty(batch, prompts, patches)
        for b in range(batch):
            torch.mm(g[b], v[b].T, out=maps[b])
        return maps

    def textbook() -> Tensor:
        cosine = (F.normalize(k, dim=-1) @ F.normalize(q, dim=-1)[:, :, None])[:, :, 0]
        low, high = cosine.amin(1, keepdim=True), cosine.amax(1, keepdim=True)
        return torch.relu(g @ (((cosine - low) / (high - low))[:, :, None] * v).mT)

    def definition() -> Tensor:
        with backend("torch"):
            return spatial_attribution(q, k, v, g)

    def weight_given() -> Tensor:
        with backend("torch"):
            return gradient_weighted(weight, v, g, relu=True)

    assert (definition() - textbook()).norm() < 1e-5 * textbook().norm(), "no speed is reported of wrong results"
    both: dict[str, Callable[[], object]] = {"products": products, "definition": definition, "textbook": textbook}
    timings = report(benchmark, both, repeats=31)
    engine = paired({"product": product, "weight given": weight_given}, repeats=31)
    figures = ", ".join(f"{name} {t.median * 1e3:.2f} ms ({t.ratio:.2f})" for name, t in (timings | engine).items())
    print(f"\n{batch} images, {patches} patches, {prompts} prompts: {figures}")
    benchmark.extra_info |= {
        name: {"median_seconds": t.median, "ratio": t.ratio} for name, t in engine.items() if name == "weight given"
    }
    # With fewer prompts the lengths of the keys take as long to find as the products.
    if prompts >= 1000:
        assert timings["definition"].ratio < 1.1
        assert engine["weight given"].ratio < 1.1
