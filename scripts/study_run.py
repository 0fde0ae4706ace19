"""Does a data-set run's memory stay flat? Runs a small CLIP over many images and prints the process's size as it goes.

    python scripts/study_run.py            20,000 images, a minute or two
    python scripts/study_run.py 1000000

Fails if the process is larger at the end than after its first tenth by more than `_SLACK`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image

import clipfast
from clipfast.engine.run import run
from clipfast.engine.totals import Totals
from clipfast.engine.watch import Watch
from clipfast.models.model import Model

_FILES, _SHARD, _SLACK = 200, 500, 40.0


def small() -> Model:
    torch.manual_seed(0)
    vision = CLIPVisionCfg(image_size=64, patch_size=8, layers=2, width=64, head_width=16)
    text = CLIPTextCfg(context_length=8, vocab_size=300, width=64, heads=4, layers=2)

    def tokens(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[298, *(1 + ord(c) % 297 for c in text.ljust(6)[:6]), 299] for text in texts])

    return Model(CLIP(64, vision, text).eval(), tokens, name="small")


class Sizes(Watch):
    """The process's megabytes after each shard."""

    def __init__(self) -> None:
        self.sizes: list[float] = []
        self.started = time.monotonic()

    def shard(self, totals: Totals) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.sizes.append(pages * 4096 / 1e6)
        if len(self.sizes) % 4 == 1:
            rate = totals.images / (time.monotonic() - self.started)
            print(f"{totals.images:9,} images  {self.sizes[-1]:7.1f} MB  {rate:6.0f}/s", flush=True)


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for i in range(_FILES):
            noise = np.random.default_rng(i).integers(0, 255, (9, 12, 3), np.uint8)
            Image.fromarray(noise).resize((100 + i % 50, 75)).save(folder / f"{i:03d}.jpg")
        (folder / "list.txt").write_text("".join(f"{i % _FILES:03d}.jpg\n" for i in range(count)))
        sizes = Sizes()
        run(folder / "list.txt", ["a", "b", "c"], folder / "maps", model=small(), features=True, shard_size=_SHARD,
            watch=sizes)  # fmt: skip
        found = clipfast.open_run(folder / "maps")
        assert len(found) == len(set(found.keys())) == count
        early = max(sizes.sizes[: max(1, len(sizes.sizes) // 10)])
        late = max(sizes.sizes)
        print(f"{early:.1f} MB after a tenth of the images, {late:.1f} MB at most")
        if late - early > _SLACK:
            raise SystemExit(f"memory grew by {late - early:.1f} MB.")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
