from __future__ import annotations

import pytest
import torch

from clipfast.ops.dispatch import backend
from clipfast.ops.spatial_attribution import gradient_weighted, spatial_attribution, spatial_weight

HALF, SINGLE, BRAIN = torch.float16, torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("label", "batch", "patches", "width", "prompts", "v_dtype", "g_dtype"),
    [
        ("ViT-B/16, 1 prompt, float16", 8, 196, 768, 1, HALF, HALF),
        ("ViT-B/16, 1 prompt, float32", 8, 196, 768, 1, SINGLE, SINGLE),
        ("ViT-B/16, 20 prompts, bfloat16", 8, 196, 768, 20, BRAIN, BRAIN),
        ("ViT-B/16, 1000 prompts, float32", 8, 196, 768, 1000, SINGLE, SINGLE),
        ("ViT-B/16, 100 prompts, float16", 8, 196, 768, 100, HALF, HALF),
        ("ViT-B/16, 100 prompts, bfloat16 by float32", 8, 196, 768, 100, BRAIN, SINGLE),
        ("width 1531, 100 prompts, float16", 8, 50, 1531, 100, HALF, HALF),
        ("width 1531, 1 prompt, float32", 1, 50, 1531, 1, SINGLE, SINGLE),
    ],
)
def test_compiles(compiled, label, batch, patches, width, prompts, v_dtype, g_dtype) -> None:
    from clipfast.kernels import spatial_attribution as kernels

    packed = torch.empty(batch, patches + 1, 3 * width, dtype=v_dtype)
    q, k, v = packed[:, 0, :width], packed[:, 1:, width : 2 * width], packed[:, 1:, 2 * width :]
    g, maps = torch.empty(batch, prompts, width, dtype=g_dtype), torch.empty(batch, prompts, patches)
    compiled(label, lambda: kernels.spatial_attribution(q, k, None, v, g, maps, relu=True, precision="tf32x3"))
    if prompts <= kernels.FEW:
        weight = torch.empty(batch, patches)
        compiled(
            f"{label}, weight given",
            lambda: kernels.spatial_attribution(None, None, weight, v, g, maps, relu=True, precision="tf32x3"),
        )


def test_compiles_with_a_mask(compiled) -> None:
    from clipfast.kernels import spatial_attribution as kernels

    q, k, where = torch.empty(8, 512), torch.empty(8, 77, 512), torch.empty(8, 77, dtype=torch.bool)
    compiled("text of ViT-B/16, float32", lambda: kernels.spatial_weight(q, k, where))


# The interpreter multiplies bfloat16 wrongly, so bfloat16 meets float32 here, where both are widened first.
@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("v_dtype", "g_dtype"), [(SINGLE, SINGLE), (HALF, HALF), (BRAIN, SINGLE), (HALF, SINGLE)], ids=str
)
@pytest.mark.parametrize(
    ("batch", "patches", "width", "prompts"), [(2, 9, 24, 3), (1, 70, 150, 1), (2, 65, 33, 40), (1, 3, 16, 70)]
)
def test_agrees_with_the_definition(v_dtype, g_dtype, batch: int, patches: int, width: int, prompts: int) -> None:
    # A token before the patches and one behind them, that must not be read.
    packed = torch.full((batch, patches + 2, 3 * width), torch.nan, dtype=v_dtype)
    packed[:, 1:-1] = torch.randn(batch, patches, 3 * width).to(v_dtype)
    k, v = packed[:, 1:-1, width : 2 * width], packed[:, 1:-1, 2 * width :]
    q, g = torch.randn(batch, width).to(v_dtype), torch.randn(prompts, width).to(g_dtype)
    weight = torch.rand(batch, patches)
    found, expected = (torch.full((2, batch, prompts, 2 * patches), torch.nan) for _ in range(2))
    for maps, name in ((found, "triton"), (expected, "torch")):
        with backend(name):
            maps[0, :, :, 1::2] = spatial_attribution(q, k, v, g)
            gradient_weighted(weight, v, g, out=maps[1, :, :, 1::2])
    assert (found[..., 1::2] - expected[..., 1::2]).norm() <= 1e-5 * expected[..., 1::2].norm()
    assert found[..., ::2].isnan().all()


@pytest.mark.interpreter
def test_masked_weights_agree_with_the_definition() -> None:
    q, k, where = torch.randn(3, 20), torch.randn(3, 40, 20), torch.rand(3, 80)[:, ::2] > 0.4
    k[0, ~where[0]] = torch.nan
    with backend("triton"):
        found = spatial_weight(q, k, where)
    with backend("torch"):
        torch.testing.assert_close(found, spatial_weight(q, k, where), rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
def test_equal_keys_weigh_one_and_nan_is_not_hidden() -> None:
    q, k = torch.randn(3, 8), torch.randn(3, 1, 8).expand(3, 50, 8).clone()
    k[1, 7, 2] = torch.nan
    k[2] = 0
    with backend("triton"):
        weight = spatial_weight(q, k)
    assert torch.equal(weight[[0, 2]], torch.ones(2, 50))
    assert weight[1].isnan().all()
