"""The loop of every fine-tuning: data, optimizer, schedule, checkpoints, log, several processes.

A run's weights depend on its settings alone. Whatever is drawn at random is drawn from the seed and the number of the
step, so that a run that was killed goes on from its last checkpoint as if nothing had been; on a CPU bit for bit.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from clipfast.engine.base import Source
from clipfast.engine.pipeline import default_workers
from clipfast.engine.watch import Stop
from clipfast.errors import InputError, ModelError
from clipfast.finetune.checkpoint import (
    Finetuned,
    agree,
    finish,
    finished,
    gathered,
    load_state,
    save_model,
    save_state,
    spread,
)
from clipfast.finetune.data import Loaded, Loader, Order, Place, Read, open_images
from clipfast.finetune.log import Follow, Log
from clipfast.finetune.objective import Batch, Objective, Step
from clipfast.finetune.parallel import Group, Joined, processes, recompute, whole
from clipfast.finetune.settings import WARMUP, Settings, rate
from clipfast.models.digest import weights_digest
from clipfast.models.model import Model, multiplies_bfloat16

_FORMAT = 1
# So many steps in a row without a usable gradient, and no later one will have any.
_HOPELESS = 10


class Trainer:
    """One fine-tuning: an objective, the model it starts from, images, settings, and the folder it leaves its work in.

    images: what `open_images` takes (anything that `clipfast run` reads), or an Order. model: only read; a copy trains.
    options: of `open_images`: limit, shuffle, image_column ...

    Raises InputError where the data cannot be opened or settings do not go together, ModelError as the objective does.
    """

    def __init__(
        self,
        objective: Objective,
        model: Model,
        images: str | Path | Sequence[str] | Source | Order,
        settings: Settings,
        out: str | Path,
        **options: Any,
    ):
        self.objective, self.model, self.settings, self.out = objective, model, settings, Path(out)
        if model.spec.resize == "keep":
            raise InputError("images of a batch need one size: load the model with another resize than 'keep'.")
        if isinstance(images, Order):
            self.order = images
        else:
            options = {"columns": objective.columns, "counted": settings.steps is None, **options}
            self.order = open_images(images, seed=settings.seed, **options)
        self.steps = self._steps()
        self.warmup = round(WARMUP * self.steps) if settings.warmup is None else settings.warmup
        if self.warmup > self.steps:
            raise InputError(f"warmup={self.warmup} is more than the {self.steps} steps there are.")

    def _steps(self) -> int:
        if self.settings.steps is not None:
            return self.settings.steps
        if self.order.images is None:
            raise InputError("nobody knows how many images this source holds: give steps in the place of epochs.")
        return max(1, int(self.settings.epochs * self.order.images / self.settings.batch))

    def config(self) -> dict[str, Any]:
        """Everything that the weights depend on, as JSON."""
        return {
            "format": _FORMAT,
            "objective": {"name": self.objective.name, **self.objective.config()},
            "model": self.model.name,
            "weights": weights_digest(self.model.module),
            "images": self.order.config(),
            "settings": {**self.settings.config(), "steps": self.steps, "warmup": self.warmup},
        }

    def run(self, follow: Follow | None = None) -> Finetuned:
        """Train until all steps are done, or until Ctrl-C or SIGTERM ends it after the step at hand.

        A folder with a checkpoint of the same run is gone on with; a finished one is read.

        Raises InputError for a folder of another run, OutputError where nothing can be written, ModelError where
        gradients stay NaN or infinite.
        """
        follow = follow or Follow()
        with processes() as group, Stop(follow) as stop, torch.random.fork_rng(_devices(self.model.device)):
            agree(self.out, self.config(), group.first)
            group.wait()
            done = finished(self.out)
            if done is None:
                done = _Run(self, group, follow)(stop)
            else:
                done["this_run"] = {"steps": 0, "seconds": 0.0, "images_per_second": None, "processes": group.world}
            group.wait()
        return Finetuned(self.model, self.out, done)


class _Run:
    """What a run holds while it trains."""

    def __init__(self, trainer: Trainer, group: Group, follow: Follow):
        settings, objective = trainer.settings, trainer.objective
        if settings.batch % group.world:
            raise InputError(f"batch={settings.batch} cannot be shared evenly by {group.world} processes.")
        self.trainer, self.settings, self.group, self.follow = trainer, settings, group, follow
        self.device = trainer.model.device
        self.micro = min(settings.micro or settings.batch, settings.batch // group.world)
        self.trained = objective.prepare(trainer.model)
        if settings.checkpointing:
            norms = any(isinstance(part, _BatchNorm) for part in self.trained.modules())
            if norms and objective.moves_statistics:
                raise InputError(
                    "with checkpointing, blocks run twice, and so would a batch norm's statistics take in each batch: "
                    "leave it out, or take batch_norm='frozen'."
                )
            recompute(self.trained)
        if settings.compile:
            self.trained.compile()
        self.joined = Joined(objective, self.trained, group, settings.parallel, self.device)
        self.weights = [p for p in self.trained.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self.step, self.place, self.unusable = 0, Place(), 0
        self.counts = dict.fromkeys(("images", "failed", "skipped", *objective.counts), 0)
        self.spare: Read | None = None
        state = load_state(trainer.out)
        if state is not None:
            spread(self.trained, self.optimizer, state)
            self.step, self.unusable = state["step"], state["unusable"]
            self.place, self.counts = Place(*state["place"]), dict(state["counts"])

    def __call__(self, stop: Stop) -> dict[str, Any]:
        """Train until the end, or until asked to stop; the run's summary."""
        settings, steps = self.settings, self.trainer.steps
        loader = Loader(
            self.trainer.order,
            self.trainer.model.spec,
            self.trainer.objective.read,
            batch=settings.batch,
            micro=self.micro,
            rank=self.group.rank,
            world=self.group.world,
            workers=settings.workers or default_workers(self.device.type == "cuda"),
        )
        first, begun, asked = self.step, time.monotonic(), False
        self.follow.starts(steps, first, settings.batch)
        with (
            Log(self.trainer.out, first, settings.tensorboard and self.group.first, self.group.first) as log,
            closing(loader.steps(self.place)) as arriving,
        ):
            while self.step < steps and not asked:
                loaded = next(arriving)
                measure = (self.step + 1) % settings.log_every == 0 or self.step + 1 == steps
                record, asked = self._advance(loaded, measure, stop)
                spent = (time.monotonic() - begun) / (self.step - first)
                record |= {"images_per_second": settings.batch / spent, "seconds_left": spent * (steps - self.step)}
                log.failed(self.step, self.group.gather(loaded.failures))
                if measure:
                    log.step(record)
                self.follow.step(record)
                if self.step % settings.save_every == 0 or self.step == steps or asked:
                    self._save()
        return self._summary(first, time.monotonic() - begun)

    def _advance(self, loaded: Loaded, measure: bool, stop: Stop) -> tuple[dict[str, Any], bool]:
        """One optimizer step; what the log says of it, and whether some process was asked to stop."""
        lr = rate(self.step, self.trainer.steps, self.settings.lr, self.trainer.warmup)
        used, failed = self.group.total([sum(map(len, loaded.parts)), len(loaded.failures)])
        if not used:
            reason = loaded.failures[0].reason if loaded.failures else "other processes say why."
            raise InputError(
                f"not one of the {self.settings.batch} images of step {self.step + 1} can be read: {reason}"
            )
        means, events = self._backward(loaded.parts, used, measure)
        *totals, asked = self.group.total([*means.values(), *events.values(), stop()])
        norm = whole(torch.nn.utils.clip_grad_norm_(self.weights, self.settings.clip or math.inf))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self.place = self.step + 1, loaded.place
        self.unusable = 0 if math.isfinite(norm) else self.unusable + 1
        if self.unusable == _HOPELESS:
            raise ModelError(
                f"gradients have been NaN or infinite for {_HOPELESS} steps, the last of them step {self.step}: take a "
                "smaller lr, or precision='float32'."
            )
        counted = {"images": used, "failed": failed, "skipped": not math.isfinite(norm)}
        counted |= dict(zip(events, totals[len(means) :], strict=True))
        for name, count in counted.items():
            self.counts[name] += int(count)
        terms = {name: total / used for name, total in zip(means, totals, strict=False)}
        record = {"step": self.step, "epoch": self.place.epoch, "lr": lr, **terms, "grad_norm": norm, **self.counts}
        return record, bool(asked)

    def _backward(
        self, parts: list[list[Read]], used: float, measure: bool
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Gradients of a step's mean loss over `used` images; this process's sums of loss and terms, and its events."""
        sums: dict[str, float] = {}
        events: dict[str, float] = dict.fromkeys(self.trainer.objective.counts, 0)
        for number, part in enumerate(parts):
            last, weight = number + 1 == len(parts), len(part)
            self.spare = part[0] if part else self.spare
            if not part and self.group.world == 1:
                continue
            # Processes wait for each other in every backward pass: one without images takes part, for nothing.
            with self.joined.unshared(last):
                step = self._forward(part or self._spared(), number, measure, last)
                (step.loss * (weight * self.group.world / used)).backward()
            if measure:
                for name, value in {"loss": step.loss.detach(), **step.terms}.items():
                    sums[name] = sums.get(name, 0.0) + weight * float(value)
            for name, count in step.counts.items():
                events[name] += count
        return sums, events

    def _spared(self) -> list[Read]:
        if self.spare is None:
            raise InputError(f"process {self.group.rank} could read none of its images.")
        return [self.spare]

    def _forward(self, part: list[Read], number: int, measure: bool, last: bool) -> Step:
        at = self.group.rank * (self.settings.batch // self.group.world) + number * self.micro
        seed = _mixed(self.settings.seed, self.step, at)
        # A tower that drops patches or paths draws from torch's own generators.
        torch.manual_seed(seed)
        pixels = torch.stack([read.prepared.pixels for read in part])
        batch = Batch(
            images=pixels.to(self.device, non_blocking=True).float().div_(255),
            keys=[read.key for read in part],
            geometries=[read.prepared.geometry for read in part],
            extras=[read.extra for read in part],
            generator=torch.Generator(self.device).manual_seed(seed),
            measure=measure,
        )
        with self._autocast(), warnings.catch_warnings():
            # What torch.compile says of normalised pixels, whose own gradient nobody asks for.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            return self.joined(batch, last)

    def _autocast(self) -> AbstractContextManager[Any]:
        wanted = self.settings.precision
        half = wanted == "bfloat16" or (wanted == "auto" and multiplies_bfloat16(self.device))
        return torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext()

    def _save(self) -> None:
        """The model, then the state: a run that is killed in between goes on from the state before."""
        trainer = self.trainer
        state = gathered(self.trained, self.optimizer)
        if self.group.first:
            weights = {trainer.objective.prefix + name: t for name, t in state["trained"].items()}
            about = {**trainer.config(), "step": self.step}
            save_model(trainer.out, trainer.model, weights, about)
            more = {"step": self.step, "place": self.place.to_json(), "counts": self.counts, "unusable": self.unusable}
            save_state(trainer.out, {**state, **more})
        self.group.wait()

    def _summary(self, first: int, seconds: float) -> dict[str, Any]:
        steps = self.step - first
        summary = {
            "objective": self.trainer.objective.name,
            "complete": self.step == self.trainer.steps,
            "step": self.step,
            "steps": self.trainer.steps,
            **self.counts,
            "this_run": {
                "steps": steps,
                "seconds": seconds,
                "images_per_second": steps * self.settings.batch / seconds if steps else None,
                "processes": self.group.world,
            },
        }
        if self.group.first and summary["complete"]:
            finish(self.trainer.out, summary)
        return summary


def _mixed(*numbers: int) -> int:
    """A seed that stands for several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
