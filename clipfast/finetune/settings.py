"""How a fine-tuning goes about it, whatever its objective: settings, and the learning rate that follows from them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from clipfast.errors import InputError
from clipfast.models.model import Precision

# Warm-up of the authors' runs: 1,400 of 20,000 steps.
WARMUP = 0.07


@dataclass(frozen=True)
class Settings:
    """How a fine-tuning goes about it; the defaults are those of AFT's paper.

    What decides the weights:

    epochs: over the images; steps, where given, in its place: optimizer steps. batch: images a step, of all processes
    together. micro: how many of them go through a process's model at once; by default its share of the batch. lr,
    warmup, betas, weight_decay: of AdamW; the rate rises over `warmup` steps (by default 7 % of all) and falls as a
    cosine to zero. clip: the largest norm of the gradient, by default any. precision: "bfloat16" for autocast, with
    weights and optimizer in float32; "auto" where the device multiplies it natively. seed: of order and noise.

    What does not (but for rounding):

    checkpointing: blocks keep their inputs alone and run twice, for a third more time and far less memory. compile:
    torch.compile of the tower. parallel: of several processes, "ddp", or "fsdp" where the model is too large for each.
    workers: threads that decode. save_every: steps between checkpoints. log_every: steps between lines of the log.
    tensorboard: its files beside the log.

    Raises InputError for numbers that cannot be.
    """

    epochs: float = 2
    steps: int | None = None
    batch: int = 128
    micro: int | None = None
    lr: float = 1e-5
    warmup: int | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-4
    clip: float | None = None
    precision: Precision = None
    seed: int = 0
    checkpointing: bool = False
    compile: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    workers: int | None = None
    save_every: int = 500
    log_every: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro", "workers", "save_every", "log_every"):
            value = getattr(self, name)
            if value is not None and (value != int(value) or value < 1):
                raise InputError(f"{name}={value} must be a whole number of at least 1.")
        for name in ("epochs", "lr", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name}={value} must be above 0 and finite.")
        if not 0 <= self.weight_decay < math.inf or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"weight_decay={self.weight_decay} must be at least 0, and betas={self.betas} below 1.")
        if self.warmup is not None and self.warmup < 0:
            raise InputError(f"warmup={self.warmup} must be at least 0 steps.")
        if self.precision not in (None, "float32", "bfloat16", "auto"):
            raise InputError(f"precision={self.precision!r} must be float32, bfloat16 or auto.")

    def config(self) -> dict[str, Any]:
        """What of it decides the weights, as JSON."""
        names = ("batch", "micro", "lr", "betas", "weight_decay", "clip", "precision", "seed")
        return {name: value for name, value in asdict(self).items() if name in names}


def rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """The learning rate of a step, from 0: a straight line up to `peak` over `warmup` steps, then a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
