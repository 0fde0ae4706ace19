"""Who computes a run's shards: this process, several on this machine, or a Ray cluster; and which part of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from clipfast.engine.base import Shard
from clipfast.engine.folder import Part
from clipfast.engine.local import Outcome
from clipfast.engine.work import Job, Worker
from clipfast.errors import InputError

Engine = Callable[[Job, Sequence[Shard], Callable[[], bool], Callable[[int], None]], Generator[Outcome]]
"""Computes shards: (job, shards, whether to stop, called with images as they are finished) -> each with its outcome."""


def in_process(
    worker: Worker, shards: Sequence[Shard], stop: Callable[[], bool], progress: Callable[[int], None]
) -> Generator[Outcome]:
    """Shards one after the other, by a worker of this process."""
    for shard in shards:
        if stop():
            return
        yield shard, worker(shard, progress)


def on_ray(
    address: str | None = None, *, workers: int | None = None, cpus: float = 1, gpus: float | None = None
) -> Engine:
    """An engine of `workers` Ray actors with so many CPUs and GPUs each; see `engine.ray.ray_job`."""
    from clipfast.engine.ray import ray_job

    return partial(ray_job, workers=workers, cpus=cpus, gpus=gpus, address=address)


def local_devices(job: Job, processes: int | None) -> list[str | None]:
    """The device of each process on this machine: every GPU, or else the CPU once, where nothing is said.

    Raises InputError for more processes than GPUs, and for several with a model that is in memory.
    """
    if processes is not None and processes < 1:
        raise InputError(f"processes={processes} must be at least 1.")
    if not job.portable or (job.device not in (None, "cpu", "cuda")):
        if processes not in (None, 1):
            raise InputError("several processes need a model's name or path, and cpu or cuda as the device.")
        return [job.device]
    gpus = 0 if job.device == "cpu" else torch.cuda.device_count()
    if not gpus:
        return [job.device] * (processes or 1)
    if processes is not None and processes > gpus:
        raise InputError(f"{processes} processes need a GPU each, and this machine has {gpus}: ask for {gpus}.")
    return [f"cuda:{i}" for i in range(processes or gpus)]


def part_of(given: str | None, environment: Mapping[str, str] | None = None) -> tuple[Part, str | None]:
    """The part of the shards to do, and what it was read from if not from `given`, "i/n".

    Else RANK and WORLD_SIZE, as torchrun sets them, or SLURM_PROCID and SLURM_NTASKS; all shards without either.
    Raises InputError for anything but 0 <= i < n.
    """
    environment = os.environ if environment is None else environment
    if given is not None:
        words, origin = given.split("/"), f"--shard {given}"
    else:
        for names in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if all(name in environment for name in names):
                words, origin = [environment[name] for name in names], f"{names[0]} and {names[1]}"
                break
        else:
            return (0, 1), None
    try:
        index, count = map(int, words)
    except ValueError:
        index, count = -1, 0
    if not 0 <= index < count:
        raise InputError(f"{origin}: a part is i/n with i from 0 to n - 1, such as 0/4 for the first of four.")
    return (index, count), None if given is not None or count == 1 else origin


def process_starts(job: Job, devices: Sequence[str | None]) -> list[partial[Worker]]:
    """How each process starts: on its device, with its share of the machine's cores."""
    cores = max(1, (os.cpu_count() or 1) // len(devices))
    job = replace(job, workers=job.workers or cores, threads=max(1, torch.get_num_threads() // len(devices)))
    return [partial(Worker, replace(job, device=device)) for device in devices]
