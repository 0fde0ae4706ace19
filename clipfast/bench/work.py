"""How much arithmetic a call is, how fast the machine multiplies matrices, and what a GPU needs for it."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clipfast.ops.dispatch import backend

# Seconds over which energy is counted: NVML's counter moves every few dozen milliseconds.
_ENERGY = 1.0


@dataclass(frozen=True)
class Product:
    """A product of two square matrices, as large as a device needs to reach its speed: the roofline of arithmetic."""

    a: Tensor
    b: Tensor
    out: Tensor

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype) -> Product:
        side = {"cpu": 512 if torch.get_num_threads() <= 4 else 1536, "mps": 2048}.get(device.type, 8192)
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
        return cls(a, b, torch.empty_like(a))

    @property
    def multiplications(self) -> int:
        return int(self.a.shape[0] ** 3)

    def __call__(self) -> Tensor:
        return torch.mm(self.a, self.b, out=self.out)


def multiplications(call: Callable[[], object]) -> int:
    """Multiplications of numbers in the matrix products, convolutions and attentions of one call, counted as it runs.

    Fast paths whose insides cannot be seen (transformer layers as one operator, kernels) are off meanwhile.
    """
    with _plain_attention(), backend("torch"), FlopCounterMode(display=False) as counter:
        call()
    # The counter takes an addition for an operation of its own.
    return int(counter.get_total_flops()) // 2


@contextmanager
def _plain_attention() -> Iterator[None]:
    mha = torch.backends.mha
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(before)


def gpu_peak(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that one call adds on a GPU at its peak, its results included, as PyTorch's allocator counts them."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def joules(call: Callable[[], object], device: torch.device) -> float | None:
    """Energy of one call by NVML's counter of the whole GPU; None where there is no NVIDIA GPU, pynvml or counter."""
    if device.type != "cuda":
        return None
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = nvml.nvmlDeviceGetHandleByUUID(name)
        torch.cuda.synchronize(device)
        calls, started, before = 0, time.perf_counter(), nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        while calls == 0 or time.perf_counter() - started < _ENERGY:
            call()
            torch.cuda.synchronize(device)
            calls += 1
        return (nvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1000 / calls
    except nvml.NVMLError:
        return None
