"""Writing maps: a shard of a run, encoded, compressed and committed, beside NumPy's own files of the same maps.

make bench, or: pytest benchmarks/bench_writer.py -s --benchmark-json=out.json

20,000 maps of 14 x 14 in batches of 64 images by 20 prompts, float32 as the model gives them: smooth, half of it zero.
Seconds are of one processor, whatever else it does meanwhile.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paired import report

from clipfast.data.geometry import Geometry
from clipfast.engine.base import Explained
from clipfast.engine.stored import RowReader, rows_of
from clipfast.engine.writer import ShardWriter

IMAGES, PROMPTS, BATCH, SIDE = 1000, 20, 64, 14
MAPS = IMAGES * PROMPTS
MAPS_A_SECOND, OF_SINGLE_FILES = 200_000, 0.25


def batches() -> list[Explained]:
    """The maps of a shard, as the model hands them over."""
    torch.manual_seed(0)
    coarse = torch.distributions.Exponential(1.0).sample((IMAGES, PROMPTS, 7, 7))
    smooth = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")
    maps = ((smooth - 0.8).relu() * 1e-5 * (1 + 0.05 * torch.randn_like(smooth))).relu().numpy()
    scores = np.random.default_rng(0).normal(size=(IMAGES, PROMPTS)).astype(np.float32)
    found = []
    for start in range(0, IMAGES, BATCH):
        part = slice(start, min(start + BATCH, IMAGES))
        count = part.stop - part.start
        geometries = [
            Geometry(375 + i % 3, 500, (62.5, 0.0, 437.5, 375.0), (224, 224), (224, 224)) for i in range(count)
        ]
        keys = [f"train/n{i // 100:08d}/picture_{i:06d}.jpg" for i in range(part.start, part.stop)]
        found.append(Explained(keys, geometries, np.tile(np.arange(PROMPTS), (count, 1)), scores[part], maps[part]))
    return found


@pytest.mark.benchmark(group="writer")
def test_writing_keeps_up_with_any_model(benchmark: Any) -> None:
    made = batches()
    maps = np.concatenate([batch.maps.reshape(-1, SIDE, SIDE) for batch in made])
    spent: dict[str, list[float]] = {}
    sizes: dict[str, float] = {}

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)

        def shard(codec: str) -> None:
            with ShardWriter(root, codec, maps=codec, grid=(SIDE, SIDE)) as writer:
                for batch in made:
                    writer.add(batch)
                sizes[codec] = sum(writer.commit({})["files"].values()) / MAPS

        def single() -> None:
            for i, one in enumerate(maps[: MAPS // 20]):
                np.save(root / f"{i}.npy", one.astype(np.float16))

        def clocked(name: str, function: Callable[[], None], times: int = 1) -> Callable[[], None]:
            def call() -> None:
                began = time.process_time()
                function()
                spent.setdefault(name, []).append((time.process_time() - began) * times)

            return call

        for codec, bound in (("float32", 0.0), ("float16", 2.0**-12 * 1.001), ("uint8", 1 / 509)):
            shard(codec)
            reader = RowReader(root / "shards" / f"{codec}.parquet", "maps")
            back = np.concatenate([rows.maps for table in reader.groups() for rows in rows_of(table, reader.codec)])
            error = np.abs(back - maps).max((1, 2))
            assert (error <= bound * np.abs(maps).max((1, 2))).all(), "no speed is reported of a result that is wrong"
            reader.close()
        timings = report(
            benchmark,
            {
                "a 20th as .npy files": clocked("a 20th as .npy files", single, 20),
                "np.save of all as float16": clocked(
                    "np.save of all as float16", lambda: np.save(root / "all.npy", maps.astype(np.float16))
                ),
                **{codec: clocked(codec, lambda codec=codec: shard(codec)) for codec in sizes},  # type: ignore[misc]
            },
            repeats=3,
            warmup=0,
        )
    rates = {name: MAPS / min(seconds) for name, seconds in spent.items()}
    for name, timing in timings.items():
        of_files = min(spent[name]) / min(spent["a 20th as .npy files"])
        size = f", {sizes[name]:.0f} bytes a map" if name in sizes else ""
        print(f"\n{name}: {rates[name]:,.0f} maps/s of processor time, {of_files:.3f} of single files{size}", end="")
        benchmark.extra_info[name] |= {"maps_per_cpu_second": round(rates[name]), "of_single_files": round(of_files, 4)}
        assert timing.median > 0
    benchmark.extra_info["bytes_per_map"] = {name: round(size, 1) for name, size in sizes.items()}
    assert rates["float16"] >= MAPS_A_SECOND
    assert min(spent["float16"]) <= OF_SINGLE_FILES * min(spent["a 20th as .npy files"])
