"""A tiny model and a fine-tuning of it: for tests, and as a process that may be killed or be one of several.

python tiny.py '{"images": "photos", "out": "runs/a", "settings": {"steps": 6}, "kill_at": 3}'
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from clipfast.finetune.checkpoint import Finetuned
from clipfast.finetune.log import Follow
from clipfast.finetune.recipe import aft_objective
from clipfast.finetune.settings import Settings
from clipfast.finetune.train import Trainer
from clipfast.models.model import Model


def tokens(texts: list[str]) -> torch.Tensor:
    ids = torch.zeros(len(texts), 20, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        words = [298, *(1 + sum(map(ord, word)) % 297 for word in text.split()), 299]
        row[: len(words)] = torch.tensor(words)
    return ids


def tiny(dtype: torch.dtype = torch.float32, **vision: Any) -> Model:
    torch.manual_seed(0)
    given = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 8, **vision}
    text = CLIPTextCfg(context_length=20, vocab_size=300, width=32, heads=4, layers=2)
    return Model(CLIP(24, CLIPVisionCfg(**given), text).eval().to(dtype), tokens, name="tiny")


class At(Follow):
    """Does something at the end of a step; keeps the records."""

    def __init__(self, step: int | None = None, number: int = signal.SIGKILL):
        self._step, self._number = step, number
        self.records: list[Mapping[str, Any]] = []

    def step(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)
        if record["step"] == self._step:
            os.kill(os.getpid(), self._number)


def finetune(
    images: Any,
    out: Any,
    *,
    model: Model | None = None,
    follow: Follow | None = None,
    objective: Any = None,
    **given: Any,
) -> Finetuned:
    """AFT of the tiny model: two inner steps, so that a step takes milliseconds."""
    settings = {"steps": 6, "batch": 4, "lr": 1e-3, "save_every": 2, "log_every": 1, "workers": 2, **given}
    objective = objective or aft_objective(steps=2)
    return Trainer(objective, model or tiny(), str(images), Settings(**settings), out).run(follow)


def main() -> None:
    torch.set_num_threads(1)
    for request in map(json.loads, sys.argv[1:]):
        adversary = request.get("adversary", {"steps": 2})
        done = finetune(
            request["images"],
            request["out"],
            model=tiny(getattr(torch, request.get("dtype", "float32"))),
            follow=At(request.get("kill_at")),
            objective=aft_objective(**adversary),
            **request["settings"],
        )
        print(json.dumps(done.summary))


if __name__ == "__main__":
    main()
