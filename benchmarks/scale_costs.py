"""What an image costs a data-set run, for docs/scale.md: seconds of one core.

    python benchmarks/scale_costs.py    # writes benchmarks/results/scale_costs.json

Seconds are the processor's, of one thread, so that other work on the machine does not count, and the least of several
tries; models have random weights.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from paired import machine
from PIL import Image

import clipfast
from clipfast.data.decode import decode
from clipfast.data.scenes import Scenes
from clipfast.view.files import encode_image

RESULTS = Path(__file__).parent / "results" / "scale_costs.json"
MODELS = ("ViT-B-32:random", "ViT-B-16:random")
PROMPTS = (1, 10, 100)
_IMAGES, _TRIES = 4, 3


def main() -> None:
    torch.set_num_threads(1)
    scenes = [Image.fromarray(scene.image).resize((500, 375)) for scene in Scenes(_IMAGES, size=400, seed=3)]
    files = [encode_image(scene, "JPEG", quality=92) for scene in scenes]
    models = [_costs(name, files) for name in MODELS]
    print(json.dumps(models, indent=1))
    RESULTS.write_text(
        json.dumps(
            {
                "images": _IMAGES,
                "file_bytes": sum(map(len, files)) // len(files),
                "models": models,
                "machine": machine(),
            },
            indent=1,
        )
        + "\n"
    )


def _costs(name: str, files: list[bytes]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = clipfast.load(name, device="cpu")
    explainer = clipfast.Explainer(model)
    pixels = torch.stack([decode(data, model.spec).pixels for data in files])
    texts = torch.randn(max(PROMPTS), model.towers()[0].embed_dim)
    return {
        "model": name,
        "decode_seconds": _seconds(lambda: [decode(data, model.spec) for data in files]),
        "maps_seconds": {p: _seconds(partial(explainer, pixels, texts[:p])) for p in PROMPTS},
        "features_seconds": _seconds(lambda: explainer.features(pixels)),
    }


def _seconds(call: Callable[[], object]) -> float:
    """Seconds of processor an image."""
    tries = []
    for _ in range(_TRIES):
        start = time.process_time()
        call()
        tries.append(time.process_time() - start)
    return round(min(tries) / _IMAGES, 5)


if __name__ == "__main__":
    main()
