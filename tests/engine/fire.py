"""A process that imports once and then runs a tiny model in forks of itself, which may be killed at any moment.

Reads a JSON object a line: the arguments of `clipfast.run`; "kill_after" in seconds or "after_shards", when "signal" is
sent; and "largest_file" in bytes. Answers with a line: the fork's status as `waitpid` gives it, and the seconds that it
lived.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from clipfast.engine.run import run
from clipfast.models.model import Model


def tokens(texts: list[str]) -> torch.Tensor:
    ids = torch.zeros(len(texts), 20, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        words = [298, *(1 + sum(map(ord, word)) % 297 for word in text.split()), 299]
        row[: len(words)] = torch.tensor(words)
    return ids


def tiny() -> Model:
    torch.manual_seed(0)
    vision = CLIPVisionCfg(image_size=64, patch_size=16, layers=2, width=32, head_width=8)
    text = CLIPTextCfg(context_length=20, vocab_size=300, width=32, heads=4, layers=2)
    return Model(CLIP(24, vision, text).eval(), tokens, name="tiny")


def child(model: Model, request: dict[str, Any]) -> int:
    """The exit code of a run, as the command line has it."""
    largest = request.pop("largest_file", None)
    if largest is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    try:
        run(**request, model=model)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def main() -> None:
    torch.set_num_threads(1)
    model = tiny()
    # What would be imported late is imported before the forks.
    for name in ("pyarrow.parquet", "torchvision.io", "torchvision.transforms.v2.functional"):
        import_module(name)
    pyarrow.array(np.zeros(1))
    for line in sys.stdin:
        request = json.loads(line)
        kill_after, number = request.pop("kill_after", None), request.pop("signal", signal.SIGKILL)
        after_shards, markers = request.pop("after_shards", None), Path(request["out"]) / "shards"
        begun = time.monotonic()
        process = os.fork()
        if process == 0:
            os._exit(child(model, request))
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(process, number)
        if after_shards is not None:
            while len(list(markers.glob("[!.]*.json"))) < after_shards:
                time.sleep(0.01)
            os.kill(process, number)
        _, status = os.waitpid(process, 0)
        print(json.dumps([status, time.monotonic() - begun]), flush=True)


if __name__ == "__main__":
    main()
