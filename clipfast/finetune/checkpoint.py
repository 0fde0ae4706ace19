"""What a fine-tuning leaves on the disk: the trainer's state, to go on from, and a model that others read.

config.json                       what was asked for
state.pt                          weights, optimizer, place in the data: the step is done whole, or not at all
model/open_clip_config.json       a folder as open_clip's "local-dir:" and `clipfast.load` read it,
model/open_clip_model.safetensors its weights, also by themselves: create_model(name, pretrained=...)
"""

from __future__ import annotations

import json
import pickle
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from clipfast.engine.config import differences, in_words
from clipfast.errors import InputError, OutputError
from clipfast.models.export import header, open_clip_config
from clipfast.models.load import CONFIG as ARCHITECTURE
from clipfast.models.load import WEIGHTS
from clipfast.models.model import Model
from clipfast.view.files import sync, write_file

CONFIG, STATE, SUMMARY, MODEL = "config.json", "state.pt", "summary.json", "model"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; then the disk has it, under its name, or the older file stays.

    Raises OutputError where it cannot be written.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        sync(part)
        part.replace(path)
        sync(path.parent)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error
    except RuntimeError as error:
        # What torch makes of a full disk.
        raise OutputError(f"{path} cannot be written: {' '.join(str(error).split())[:200]}") from error
    finally:
        part.unlink(missing_ok=True)


def agree(folder: Path, config: Mapping[str, Any], first: bool) -> None:
    """See that a folder has no work of another run; `first`: of several processes the one that writes.

    Raises InputError for a run with other settings, naming the difference, or with unknown ones.
    """
    path = folder / CONFIG
    if not ((folder / STATE).exists() or (folder / SUMMARY).exists()):
        if first:
            write_file(path, json.dumps(config, indent=2, ensure_ascii=False).encode(), durable=True)
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder} holds a run and no {CONFIG} that can be read: take another folder.") from error
    changed = differences(before, json.loads(json.dumps(config)))
    if changed:
        raise InputError(
            f"{folder} holds another fine-tuning ({in_words(changed)}): repeat its settings to go on with it, or name "
            "another folder."
        )


def save_state(folder: Path, state: Mapping[str, Any]) -> Path:
    """The trainer's state. Raises OutputError where it cannot be written; an older one stays then."""
    path = folder / STATE
    with replacing(path) as part:
        torch.save(dict(state), part)
    return path


def load_state(folder: Path) -> dict[str, Any] | None:
    """What `save_state` saved, on the CPU, or None where nothing was. Raises InputError for a damaged file."""
    path = folder / STATE
    if not path.exists():
        return None
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged: remove it to begin anew, or take another folder.") from error


def gathered(trained: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and optimizer, whole and on the CPU, by the weights' names however they are sharded.

    Every process calls it; of several, the first alone gets them.
    """
    return {
        "trained": get_model_state_dict(trained, options=_WHOLE),
        "optimizer": get_optimizer_state_dict(trained, optimizer, options=_WHOLE),
    }


def spread(trained: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """What `gathered` gathered, put back; every process has all of it. Raises InputError where it does not fit."""
    own = trained.state_dict()
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in state["trained"].items()}:
        raise InputError(f"the {STATE} is of another model: take another folder.")
    try:
        set_optimizer_state_dict(trained, optimizer, state["optimizer"], options=_WHOLE)
        set_model_state_dict(trained, state["trained"], options=_WHOLE)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the {STATE} does not fit: {reason}") from error


def save_model(folder: Path, model: Model, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> Path:
    """The whole model with trained weights in the place of its own: the folder MODEL, and its path.

    weights: by their names in the model's state dict. about: kept in the file's header, as JSON. The architecture is
    written where it is one of open_clip's; else the weights stand by themselves.

    Raises OutputError where it cannot be written.
    """
    whole = {
        name: weights[name].to(own.dtype) if name in weights else own.detach().cpu()
        for name, own in model.module.state_dict().items()
    }
    metadata = {"format": "pt", "clipfast": json.dumps(about, ensure_ascii=False), **header(model)}
    config = open_clip_config(model)
    if config is not None:
        write_file(folder / MODEL / ARCHITECTURE, json.dumps(config, indent=2).encode(), durable=True)
    with replacing(folder / MODEL / WEIGHTS) as part:
        save_file({name: t.contiguous() for name, t in whole.items()}, part, metadata)
    return folder / MODEL


def finish(folder: Path, summary: Mapping[str, Any]) -> None:
    """Say that a run is complete."""
    write_file(folder / SUMMARY, json.dumps(summary, indent=2).encode(), durable=True)


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a complete run, else None."""
    try:
        return dict(json.loads((folder / SUMMARY).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Finetuned:
    """What a fine-tuning came to.

    start: the model that it began with, as it was. folder: where everything lies. summary: steps, images, and what went
    wrong, counted; "complete" says whether all steps are done.
    """

    start: Model
    folder: Path
    summary: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The model as it is now: a folder that `clipfast.load` and open_clip's "local-dir:" read."""
        return self.folder / MODEL

    def model(self) -> Model:
        """The fine-tuned model, with the tokenizer and preprocessing of the one it began with."""
        module = deepcopy(self.start.module)
        module.load_state_dict(load_file(self.path / WEIGHTS))
        return Model(module.eval(), self.start.tokenizer, self.start.spec, f"{self.start.name}, {self.folder.name}")
