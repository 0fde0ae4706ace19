"""Several processes that train one model: torchrun starts them, torch's own DDP or FSDP2 joins them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from clipfast.errors import InputError, nearest
from clipfast.finetune.objective import Batch, Objective, Step

PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True)
class Group:
    """The processes of a run, and this one's number among them, from 0."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Sums over the processes, in float64; each calls it with as many numbers."""
        if self.world == 1:
            return list(numbers)
        summed = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(summed)
        return summed.tolist()

    def gather(self, things: list[Any]) -> list[Any]:
        """The things of all processes, in their order."""
        if self.world == 1:
            return things
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, things)
        return [thing for each in found for thing in each]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def processes() -> Iterator[Group]:
    """Joins the processes that torchrun started, as its variables say; without them there is one.

    A process group that there is already is taken, and left as it is.
    """
    if dist.is_available() and dist.is_initialized():
        yield Group(dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ:
        yield Group()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Counts and decisions travel between the CPUs, gradients between the GPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Group(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def own_device() -> str | None:
    """The GPU that is this process's where torchrun started several; None to choose as ever."""
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return None


def blocks(module: nn.Module) -> list[nn.Module]:
    """A tower's repeated parts, the innermost ones: what is sharded, and recomputed, by itself.

    They are the children, two or more and all of one class, of a ModuleList or Sequential: the residual blocks of a
    transformer, the bottlenecks of a ResNet.
    """
    found: list[nn.Module] = []
    for parent in module.modules():
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            own = list(parent.children())
            composed = all(next(child.children(), None) is not None for child in own)
            if len(own) > 1 and composed and len({type(child) for child in own}) == 1:
                found += own
    return [block for block in found if not any(part in found for part in block.modules() if part is not block)]


def recompute(module: nn.Module) -> None:
    """Gradient checkpointing: each block keeps its input alone and runs again in the backward pass; in place."""
    for block in blocks(module):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


class _Loss(nn.Module):
    """The objective as the forward of a module: what DDP wants to wrap."""

    def __init__(self, objective: Objective, trained: nn.Module):
        super().__init__()
        self.objective, self.trained = objective, trained

    def forward(self, batch: Batch) -> Step:
        return self.objective.step(self.trained, batch)


class Joined:
    """An objective and the module that trains, over one or several processes.

    Raises InputError for an unknown kind of parallelism.
    """

    def __init__(self, objective: Objective, trained: nn.Module, group: Group, parallel: str, device: torch.device):
        if parallel not in PARALLEL:
            raise InputError(f"there is no parallelism {parallel!r}: {nearest(parallel, PARALLEL)}")
        self.trained = trained
        self._loss: nn.Module = _Loss(objective, trained)
        if group.world > 1 and parallel == "fsdp":
            mesh = init_device_mesh(device.type, (group.world,))
            for part in (*blocks(trained), trained):
                fully_shard(part, mesh=mesh)
        elif group.world > 1:
            self._loss = DistributedDataParallel(self._loss, device_ids=[device] if device.type == "cuda" else None)

    def __call__(self, batch: Batch, last: bool) -> Step:
        """The step's loss; `last`: of the batches that are accumulated, after whose backward gradients are shared."""
        if isinstance(self.trained, FSDPModule):
            self.trained.set_requires_gradient_sync(last)
        return self._loss(batch)

    def unshared(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward: whether gradients stay in this process for now."""
        if isinstance(self._loss, DistributedDataParallel) and not last:
            return self._loss.no_sync()
        return nullcontext()


def whole(value: Tensor) -> float:
    """A scalar that may be spread over processes."""
    return float(value.full_tensor() if hasattr(value, "full_tensor") else value)
