"""One shard of a run, from its images to its committed files, wherever that happens.

    worker = Worker(job)       # loads the model
    worker(shard)              # computes and commits a shard; returns its marker

A process, several of them, or the actors of a cluster call the same worker: a shard's files do not depend on who made
them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clipfast.api import Explainer
from clipfast.engine.base import Failure, Shard, Source
from clipfast.engine.config import RunConfig
from clipfast.engine.pipeline import Clock, explained
from clipfast.engine.texts import Prompts
from clipfast.engine.writer import ShardWriter
from clipfast.errors import InputError
from clipfast.methods import build_method
from clipfast.models.digest import weights_digest
from clipfast.models.load import load
from clipfast.models.model import Model, Precision
from clipfast.versions import versions

Marker = dict[str, Any]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """A whole run, small enough to be sent to other processes.

    source, prompts: which images, and what each is asked. out: the folder. model, pretrained: as `clipfast.load` takes
    them; a model in memory (a module, or a `Model`) is for runs in one process. device, precision, resize, method,
    parameters: as for `Explainer`. maps, features: codecs (`storage`); features None keeps none. exact: decode exactly
    as Pillow does. workers: threads that decode. batch: images that go through the model at once. threads: of torch
    on the CPU. digest: of the configuration that the worker must come to, "" where it need not.
    """

    source: Source
    prompts: Prompts
    out: Path
    model: Any = "demo"
    pretrained: str | None = None
    device: str | None = None
    method: str = "grad_eclip"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    precision: Precision = None
    resize: str | None = None
    maps: str = "float16"
    features: str | None = None
    exact: bool = False
    workers: int | None = None
    batch: int | None = None
    threads: int | None = None
    digest: str = ""

    @property
    def portable(self) -> bool:
        """Whether another process can load the model by itself."""
        return isinstance(self.model, (str, Path))

    def explainer(self) -> Explainer:
        """The model and method, loaded. Raises ModelError, InputError as `load` and `Explainer` do."""
        model = load(self.model, self.pretrained, device=self.device) if self.portable else load(self.model)
        return Explainer(model, self.method, precision=self.precision, resize=self.resize, **dict(self.parameters))

    def config(self, explainer: Explainer) -> RunConfig:
        """What the run's files depend on, given the explainer that will make them."""
        model: Model = explainer.model
        method = build_method(self.method, dict(self.parameters))
        return RunConfig(
            source=self.source.config(),
            prompts=self.prompts.config(),
            model=model.name,
            weights=weights_digest(model.module),
            method=self.method,
            parameters={name: getattr(method, name) for name in method.parameters()},
            dtype=str(model.towers(self.precision)[0].dtype).removeprefix("torch."),
            resize=explainer.spec.resize,
            exact=self.exact,
            maps=self.maps,
            features=self.features,
        )


class Worker:
    """Computes shards of a job, one at a time.

    explainer: of the job, where it is loaded already. Raises what `Job.explainer` does, and InputError where the model
    that is loaded here is not the one that the run began with.
    """

    def __init__(self, job: Job, explainer: Explainer | None = None):
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        self.job = job
        self.explainer = explainer or job.explainer()
        self.digest = job.config(self.explainer).digest
        if job.digest and self.digest != job.digest:
            raise InputError(
                f"the model {self.explainer.model.name} or its input here is not what the run began with: "
                "have the same files, weights and clipfast everywhere."
            )
        self._versions = versions("torchvision")

    def __call__(self, shard: Shard, progress: Progress | None = None) -> Marker:
        """Compute and commit a shard; returns its marker, with an error for each image that has no map.

        progress: called with the number of images finished since the last call, whether they have maps or not. Raises
        OutputError where the results cannot be written; nothing of the shard is left then.
        """
        started = time.perf_counter()
        job, errors = self.job, []
        clock = Clock()
        with ShardWriter(job.out, shard.id, maps=job.maps, features=job.features, grid=self.explainer.grid) as writer:
            for found in explained(
                job.source.items(shard),
                self.explainer,
                job.prompts,
                workers=job.workers,
                batch=job.batch,
                exact=job.exact,
                features=job.features is not None,
                clock=clock,
            ):
                if isinstance(found, Failure):
                    errors.append({"key": found.key, "reason": found.reason})
                else:
                    writer.add(found)
                if progress is not None:
                    progress(1 if isinstance(found, Failure) else len(found.keys))
            seconds = {"decode": clock.decode, "model": clock.model, "total": time.perf_counter() - started}
            return writer.commit(
                {
                    "shard": shard.id,
                    "number": shard.number,
                    "errors": errors,
                    "config": self.digest,
                    "versions": self._versions,
                    "seconds": {name: round(value, 4) for name, value in seconds.items()},
                }
            )
