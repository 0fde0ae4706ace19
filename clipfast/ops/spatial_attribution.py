"""Loosened query-key weights times gradient-weighted values: the map of Grad-ECLIP (Zhao et al., ICML 2024, eq. 8-10).

    lambda_i = minmax_i cos(q, k_i)                  once an image
    H_pi     = ReLU(lambda_i * sum_c g_pc v_ic)      = lambda_i * ReLU(v_i . g_p), lambda being in [0, 1]

With attribution features A in the place of v and unit text embeddings in the place of g it is the features form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipfast.errors import InputError
from clipfast.ops.dispatch import Backend, Op, Triton, registered
from clipfast.ops.minmax import minmax

FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})
WIDE = frozenset({torch.float32})
# F.normalize's: shorter vectors count as this long.
SHORTEST = 1e-12
# Products of prompts and patches at a time, few enough for a CPU's caches.
PIECE = 2**20


@dataclass(frozen=True)
class Loosening:
    """What every backend of spatial_weight gets."""

    q: Tensor  # (B, D)
    k: Tensor  # (B, N, D)
    where: Tensor | None  # (B, N) bool


@dataclass(frozen=True)
class Inputs:
    """What every backend of spatial_attribution gets: the weight, or q and k to find it from."""

    q: Tensor | None  # (B, D)
    k: Tensor | None  # (B, N, D)
    weight: Tensor | None  # (B, N)
    v: Tensor  # (B, N, C)
    g: Tensor  # (B, P, C)
    relu: bool
    out: Tensor  # (B, P, N) float32, or float64 where an input is


def define_weight(x: Loosening) -> Tensor:
    """spatial_weight in plain PyTorch: what it means, and what runs where nothing faster can."""
    q, k = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x.q, x.k))
    lengths = k.norm(dim=-1).clamp_(min=SHORTEST) * q.norm(dim=-1, keepdim=True).clamp_(min=SHORTEST)
    # The row first: as a column, the same product takes a CPU five times as long.
    cosine = torch.bmm(q[:, None], k.mT)[:, 0].div_(lengths)
    weight = minmax(cosine, constant=1.0, where=x.where)
    return weight if x.where is None else weight.masked_fill_(~x.where, 0.0)


def define(x: Inputs) -> Tensor:
    """spatial_attribution in plain PyTorch: what it means, and what runs where nothing faster can."""
    weight = x.weight
    if weight is None:
        assert x.q is not None
        assert x.k is not None
        weight = define_weight(Loosening(x.q, x.k, None))
    dtype = x.out.dtype
    if x.g.stride(0):
        for out, g, v, of_image in zip(x.out, x.g, x.v.mT, weight, strict=True):
            torch.mm(g.to(dtype), v.to(dtype), out=out).mul_(of_image)
            if x.relu:
                out.relu_()
        return x.out
    # A g that the images share is read once for all of them, and the ReLU is the move of a piece out of the caches: two
    # thirds of the time that a product and a ReLU for each image take a CPU for 10,000 prompts.
    rows = (x.v.to(dtype) * weight[..., None]).flatten(0, 1).mT
    prompts = max(1, PIECE // rows.shape[1])
    for g, out in zip(x.g[0].to(dtype).split(prompts), x.out.split(prompts, dim=1), strict=True):
        products = (g @ rows).unflatten(1, weight.shape).transpose(0, 1)
        if x.relu:
            torch.clamp_min(products, 0, out=out)
        else:
            out.copy_(products)
    return x.out


class TorchWeight(Backend[Loosening]):
    name = "torch"

    def run(self, inputs: Loosening) -> Tensor:
        return define_weight(inputs)


class Torch(Backend[Inputs]):
    name = "torch"

    def run(self, inputs: Inputs) -> Tensor:
        return define(inputs)


class TritonWeight(Triton[Loosening]):
    """kernels/spatial_attribution.py."""

    dtypes = {"q": FLOATS, "k": FLOATS}  # noqa: RUF012

    def launch(self, inputs: Loosening) -> Tensor:
        from clipfast.kernels import spatial_attribution as kernels

        return kernels.spatial_weight(inputs.q, inputs.k, inputs.where)


class TritonAttribution(Triton[Inputs]):
    """kernels/spatial_attribution.py. Like PyTorch's own, its float32 products keep to float32 unless
    torch.set_float32_matmul_precision allows TF32."""

    dtypes = {"q": FLOATS, "k": FLOATS, "weight": FLOATS, "v": FLOATS, "g": FLOATS, "out": WIDE}  # noqa: RUF012

    def launch(self, inputs: Inputs) -> Tensor:
        from clipfast.kernels import spatial_attribution as kernels

        kernels.spatial_attribution(
            inputs.q,
            inputs.k,
            inputs.weight,
            inputs.v,
            inputs.g,
            inputs.out,
            relu=inputs.relu,
            precision="tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        )
        return inputs.out


_weight = Op("spatial_weight", TritonWeight(), TorchWeight())
_attribution = Op("spatial_attribution", TritonAttribution(), Torch())


def _fake_weight(q: Tensor, k: Tensor, where: Tensor | None = None) -> Tensor:
    return k.new_empty(k.shape[:2], dtype=torch.promote_types(k.dtype, torch.float32))


@registered(_fake_weight)
def spatial_weight(q: Tensor, k: Tensor, where: Tensor | None = None) -> Tensor:
    """lambda (B, N): the cosine of q (B, D) with k (B, N, D), min-maxed over N; float32, or float64 for float64.

    where (B, N): positions that take part; the others get 0. A constant cosine gives ones.
    """
    return _weight(Loosening(q, k, where))


def gradient_weighted(weight: Tensor, v: Tensor, g: Tensor, *, relu: bool = False, out: Tensor | None = None) -> Tensor:
    """weight_i * (v_i . g_p), signed unless `relu`: (B, P, N), float32, or float64 where an input is.

    weight (B, N), v (B, N, C); g (B, P, C), or (P, C) shared by the batch; out: where to write, (B, P, N).
    Raises InputError when a shape does not fit.
    """
    return _into(None, None, weight, v, g, relu, out)


def spatial_attribution(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, relu: bool = True) -> Tensor:
    """Maps (B, P, N) of q (B, D), k (B, N, D), v (B, N, C) and g (B, P, C) or (P, C): lambda_i ReLU(v_i . g_p).

    relu=False keeps the sign. Raises InputError when a shape does not fit.
    """
    return _into(q, k, None, v, g, relu, None)


def _into(
    q: Tensor | None, k: Tensor | None, weight: Tensor | None, v: Tensor, g: Tensor, relu: bool, out: Tensor | None
) -> Tensor:
    batch, patches, channels = v.shape
    prompts = g.shape[-2]
    if out is None:
        dtype = torch.promote_types(torch.promote_types(v.dtype, g.dtype), torch.float32)
        out = v.new_empty(batch, prompts, patches, dtype=dtype)
    fits = g.shape == (prompts, channels) or g.shape == (batch, prompts, channels)
    fits &= out.shape == (batch, prompts, patches)
    if weight is not None:
        fits &= weight.shape == (batch, patches)
    if q is not None and k is not None:
        fits &= q.shape == (batch, k.shape[-1]) and k.shape[:2] == (batch, patches)
    if not fits:
        given = {"q": q, "k": k, "weight": weight, "v": v, "g": g, "out": out}
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in given.items() if t is not None)
        raise InputError(
            "q (B, D), k (B, N, D), weight (B, N), v (B, N, C), g (P, C) or (B, P, C) and out (B, P, N) "
            f"do not fit together: {shapes}."
        )
    if out.numel():
        _spatial_attribution(q, k, weight, v, g.expand(batch, -1, -1), relu, out)
    return out


@registered(lambda q, k, weight, v, g, relu, out: None, mutates=["out"])
def _spatial_attribution(
    q: Tensor | None, k: Tensor | None, weight: Tensor | None, v: Tensor, g: Tensor, relu: bool, out: Tensor
) -> None:
    _attribution(Inputs(q, k, weight, v, g, relu, out))
