"""How far one call raises a process's memory, by the kernel's own count of resident pages.

python benchmarks/peak_memory.py ViT-B-16 encode       one encode_image without gradients
python benchmarks/peak_memory.py ViT-B-16 1000         one Explainer call for 1000 prompts

The process is fresh and the call has been made once before; `clipfast.bench.memory` counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from clipfast.bench.memory import ENVIRONMENT, resident_peak

BATCH, PIXELS = 4, 224


def peak_memory(model: str, what: str, repeats: int = 3) -> dict[str, int]:
    """`increase`: bytes that the call adds at its peak, its results included; `results`: bytes of those. The median of
    `repeats` fresh processes. `what`: "encode", or a number of prompts."""
    environment = os.environ | ENVIRONMENT
    command = [sys.executable, __file__, model, what]
    runs = [
        json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
        for _ in range(repeats)
    ]
    return {key: sorted(run[key] for run in runs)[repeats // 2] for key in ("increase", "results")}


def _measure(name: str, what: str) -> dict[str, int]:
    import open_clip
    import torch
    import torch.nn.functional as F

    import clipfast

    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    x = torch.randn(BATCH, 3, PIXELS, PIXELS)
    if what == "encode":

        def call() -> list[torch.Tensor]:
            with torch.no_grad():
                return [model.encode_image(x)]
    else:
        texts = F.normalize(torch.randn(int(what), model.visual.output_dim), dim=-1)
        explainer = clipfast.Explainer(model)

        def call() -> list[torch.Tensor]:
            found: Any = explainer(x, texts)
            return [found.maps, found.scores]

    call()
    increase, results = resident_peak(call)
    return {"increase": increase, "results": sum(t.nbytes for t in results)}


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], sys.argv[2])))
