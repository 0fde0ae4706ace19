"""What a fine-tuning trains for: the part that differs from one kind to the next; `Trainer` does everything else.

class Mine(Objective):
    name = "mine"

    def prepare(self, model): ...          # the copy that trains
    def step(self, trained, batch): ...    # images in, a loss with its graph out

Trainer(Mine(), model, "photos/", Settings(lr=1e-5), "runs/mine").run()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from clipfast.data.geometry import Geometry
from clipfast.engine.base import Item
from clipfast.models.model import Model


@dataclass(frozen=True)
class Batch:
    """b images that go through the model at once.

    images (b, 3, H, W): float32 in [0, 1], before the model's normalisation, on its device. keys, geometries (b,):
    what they are called, and where they lie on the original images. extras (b,): what `Objective.read` made of them.
    generator: on the same device; seeded by the run's seed, the step, and the batch's place in it alone, so that a
    resumed run draws what an uninterrupted one does. measure: whether this step is logged, so that terms that cost
    extra and do not train are wanted.
    """

    images: Tensor
    keys: Sequence[str]
    geometries: Sequence[Geometry]
    extras: Sequence[Any]
    generator: torch.Generator
    measure: bool = False


@dataclass(frozen=True)
class Step:
    """What an objective says of a batch.

    loss: scalar with its graph, the mean over the batch's images. terms: further means over them, for the log.
    counts: events of the batch, added up over the run.
    """

    loss: Tensor
    terms: Mapping[str, Tensor | float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)


class Objective(ABC):
    """One kind of fine-tuning.

    name: as the command line has it. columns: what images must carry beside their pixels, as `open_source` takes it.
    counts: the names of all `Step.counts` that it may give. prefix: where the module that trains lies in the model's
    state dict: "visual." for the image tower, "" for the whole model. moves_statistics: whether it puts the module into
    training mode, in which a batch norm takes in every batch that it sees.
    """

    name: ClassVar[str]
    columns: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    prefix: str = "visual."
    moves_statistics: bool = False

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Everything that decides what it trains, as JSON: a run goes on only where this is the same."""

    @abstractmethod
    def prepare(self, model: Model) -> nn.Module:
        """The module that trains: a copy (see `copied`) on the model's device; what the objective needs frozen it
        keeps itself. Called once, before any step. Raises ModelError for a model that does not fit.
        """

    def read(self, item: Item) -> Any:
        """What of an image's columns `step` needs, as an entry of `Batch.extras`; called in the threads that decode.

        Raises TextError or ImageError where the image cannot be used: it is then left out and counted as failed.
        """
        return None

    @abstractmethod
    def step(self, trained: nn.Module, batch: Batch) -> Step:
        """The loss of a batch. `trained` may be sharded over GPUs: call it, or its submodules, as modules only.

        The trainer has entered autocast where the run is in bfloat16, and steps of several GPUs run side by side.
        """


def copied(module: nn.Module) -> nn.Module:
    """A copy that trains, in evaluation mode; half-precision weights become float32, which small steps need."""
    twin = deepcopy(module).eval().requires_grad_(True)
    halves = any(p.dtype in (torch.float16, torch.bfloat16) for p in twin.parameters())
    return twin.float() if halves else twin


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, gradients are those of inputs alone: none are computed, nor activations kept, for the weights."""
    # FSDP decides at the first use of a weight whether it ever gets a gradient; there, asking for the inputs' only
    # (torch.autograd.grad) must do.
    own = [] if isinstance(module, FSDPModule) else [p for p in module.parameters() if p.requires_grad]
    for parameter in own:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in own:
            parameter.requires_grad_(True)
