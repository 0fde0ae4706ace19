"""The two ends of an integral along a straight path: its points as one batch, and the weighted sum of gradients there.

    points[s, b] = start[b] + alphas[s] * delta[b]
    total[b]    += sum_s weights[s] * grad[s, b]

Sundararajan et al., Axiomatic Attribution for Deep Networks, ICML 2017, eq. 1, by any quadrature rule. Points are
computed in float32 and rounded once, to the model's dtype; gradients are summed in float32, step after step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipfast.errors import InputError
from clipfast.ops.dispatch import Backend, Op, Triton, registered

FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})


@dataclass(frozen=True)
class Points:
    """What every backend of path_points gets."""

    start: Tensor  # (B, M), as is delta
    delta: Tensor
    alphas: Tensor  # (S,) float32, or float64 for float64 points
    out: Tensor  # (S, B, M)


@dataclass(frozen=True)
class Sum:
    """What every backend of path_accumulate gets."""

    total: Tensor  # (B, M) float32 or float64, written to
    grad: Tensor  # (S, B, M)
    weights: Tensor  # (S,) in the dtype of total


def define_points(x: Points) -> Tensor:
    """path_points in plain PyTorch: what it means, and what runs where nothing faster can."""
    start, delta = (t.to(x.alphas.dtype) for t in (x.start, x.delta))
    if x.out.dtype == x.alphas.dtype:
        return torch.addcmul(start, delta, x.alphas[:, None, None], out=x.out)
    # Rounded in a pass of its own: on a CPU, addcmul into another dtype takes longer than both.
    wide = torch.empty_like(start)
    for point, alpha in zip(x.out, x.alphas, strict=True):
        point.copy_(torch.addcmul(start, delta, alpha, out=wide))
    return x.out


def define_accumulate(x: Sum) -> Tensor:
    """path_accumulate in plain PyTorch: what it means, and what runs where nothing faster can."""
    for grad, weight in zip(x.grad, x.weights, strict=True):
        x.total.addcmul_(grad, weight)
    return x.total


class TorchPoints(Backend[Points]):
    name = "torch"

    def run(self, inputs: Points) -> Tensor:
        return define_points(inputs)


class TorchSum(Backend[Sum]):
    name = "torch"

    def run(self, inputs: Sum) -> Tensor:
        return define_accumulate(inputs)


class TritonPoints(Triton[Points]):
    """kernels/path.py."""

    dtypes = {"start": FLOATS, "delta": FLOATS, "out": FLOATS}  # noqa: RUF012

    def why_not(self, inputs: Points) -> list[str]:
        return super().why_not(inputs) + [
            f"{name} is not contiguous within an image"
            for name, t in (("start", inputs.start), ("delta", inputs.delta))
            if t.stride(-1) != 1
        ]

    def launch(self, inputs: Points) -> Tensor:
        from clipfast.kernels import path

        path.path_points(inputs.start, inputs.delta, inputs.alphas, inputs.out)
        return inputs.out


class TritonSum(Triton[Sum]):
    """kernels/path.py."""

    dtypes = {"total": frozenset({torch.float32}), "grad": FLOATS}  # noqa: RUF012

    def why_not(self, inputs: Sum) -> list[str]:
        return super().why_not(inputs) + [
            f"{name} is not contiguous within an image"
            for name, t in (("total", inputs.total), ("grad", inputs.grad))
            if t.stride(-1) != 1
        ]

    def launch(self, inputs: Sum) -> Tensor:
        from clipfast.kernels import path

        path.path_accumulate(inputs.total, inputs.grad, inputs.weights)
        return inputs.total


_points = Op("path_points", TritonPoints(), TorchPoints())
_accumulate = Op("path_accumulate", TritonSum(), TorchSum())


def _fake_points(start: Tensor, delta: Tensor, alphas: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    steps, batch = alphas.shape[0], delta.shape[0]
    return delta.new_empty(steps * batch, *delta.shape[1:], dtype=dtype or start.dtype)


@registered(_fake_points)
def path_points(start: Tensor, delta: Tensor, alphas: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The points start + alpha * delta, (S * B, ...): all images' first points, then all images' second, and so on.

    start    where the paths begin: (B, ...), or anything that broadcasts to the shape of delta.
    delta    (B, ...): the image less its start.
    alphas   (S,) in [0, 1], on the same device.
    dtype    of the points, the model's; else that of start.

    Raises InputError when shapes or devices do not fit.
    """
    if alphas.ndim != 1 or delta.ndim == 0:
        raise InputError(f"alphas must be (S,) and delta (B, ...), not {_shapes(alphas, delta)}.")
    _same_device(start, delta, alphas)
    try:
        start = start.expand_as(delta)
    except RuntimeError:
        raise InputError(f"start must broadcast to delta's shape, not {_shapes(start, delta)}.") from None
    out = _fake_points(start, delta, alphas, dtype)
    steps, batch = len(alphas), len(delta)
    if out.numel():
        wide = torch.promote_types(out.dtype, torch.float32)
        rows = out.view(steps, batch, -1)
        _points(Points(_rows(start), _rows(delta), alphas.to(wide).contiguous(), rows))
    return out


@registered(lambda total, grad, weights: None, mutates=["total"])
def path_accumulate(total: Tensor, grad: Tensor, weights: Tensor) -> None:
    """Adds to total (B, ...) in place the weighted sum over steps of grad (S * B, ...), ordered like `path_points`.

    total    float32, or float64; any dtype of grad is summed in it, in the order of the steps.
    weights  (S,) on the same device.

    No gradient flows through it. Raises InputError when shapes, dtype or devices do not fit.
    """
    if total.dtype not in (torch.float32, torch.float64):
        raise InputError(f"total must be float32 or float64, not {total.dtype}: half precision loses the sum.")
    if weights.ndim != 1 or total.ndim == 0 or grad.shape != (len(weights) * total.shape[0], *total.shape[1:]):
        raise InputError(
            f"total, grad and weights must be (B, ...), (S * B, ...) and (S,), not {_shapes(total, grad, weights)}."
        )
    _same_device(total, grad, weights)
    if not grad.numel():
        return
    steps, batch = len(weights), len(total)
    with torch.no_grad():
        try:
            rows = total.detach().view(batch, -1)
        except RuntimeError:
            raise InputError(f"total of strides {total.stride()} must be contiguous within each image.") from None
        _accumulate(Sum(rows, grad.detach().reshape(steps, batch, -1), weights.to(total.dtype).contiguous()))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)


def _same_device(*tensors: Tensor) -> None:
    if any(t.device != tensors[0].device for t in tensors):
        devices = sorted({str(t.device) for t in tensors})
        raise InputError(f"the tensors are on {' and '.join(devices)}; they must be on one device.")


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str(tuple(t.shape)) for t in tensors)
