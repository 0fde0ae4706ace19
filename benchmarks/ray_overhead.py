"""What Ray costs beside processes of clipfast's own: the same shards, in turn, once everybody works.

    python benchmarks/ray_overhead.py [--rounds 3]    # writes benchmarks/results/ray_overhead.json

Once with small shards of small images by the small demo model, so that whatever is paid a shard shows; once with shards
that do nothing but wait, which tell what giving them out takes even where other work disturbs the machine. A round's
figure is the wall time between the first shard that is done after every worker has started, and the last; Ray itself
runs already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from paired import machine
from PIL import Image

import clipfast
from clipfast.data.scenes import Scenes
from clipfast.engine.base import Shard
from clipfast.engine.engines import on_ray
from clipfast.engine.local import local_workers
from clipfast.engine.ray import connected, ray_workers
from clipfast.engine.totals import Totals
from clipfast.engine.watch import Watch

RESULTS = Path(__file__).parent / "results" / "ray_overhead.json"
_WORKERS = 2
# Milliseconds that a shard waits, and how many do.
_WAIT, _WAITS = 20, 200


class Ends(Watch):
    """When shards are done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def shard(self, totals: Totals) -> None:
        self.times.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--shard-size", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, connected(None):
        photos = Path(folder, "photos")
        photos.mkdir()
        scenes = [Image.fromarray(scene.image) for scene in Scenes(100, size=96, seed=3)]
        for i in range(options.shards * options.shard_size):
            scenes[i % len(scenes)].save(photos / f"{i:05d}.jpg")
        rounds = [
            {
                name: _seconds(photos, Path(folder, f"{name} {i}"), options.shard_size, engine)
                for name, engine in _ENGINES
            }
            for i in range(options.rounds)
        ]
        waits = [{name: _waited(name) for name, _ in _ENGINES} for _ in range(options.rounds)]
    ratios = [each["ray"] / each["processes"] for each in rounds]
    shards = options.shards - _WORKERS
    found = {
        "shards": shards,
        "images a shard": options.shard_size,
        "workers": _WORKERS,
        "ratio": round(statistics.median(ratios), 4),
        "low": round(min(ratios), 4),
        "high": round(max(ratios), 4),
        "milliseconds a shard": {
            name: round(1e3 * _WORKERS * statistics.median(each[name] for each in rounds) / shards, 1)
            for name, _ in _ENGINES
        },
        "milliseconds a shard beyond its own time, of shards that wait": {
            name: round(
                1e3 * _WORKERS * statistics.median(each[name] for each in waits) / (_WAITS - _WORKERS) - _WAIT, 2
            )
            for name, _ in _ENGINES
        },
        "machine": machine(),
    }
    print(json.dumps(found, indent=1))
    if options.rounds >= parser.get_default("rounds"):
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def _seconds(photos: Path, out: Path, shard_size: int, engine: Any) -> float:
    ends = Ends()
    clipfast.run(
        str(photos), ["a dog", "a cat"], out, device="cpu", shard_size=shard_size, watch=ends, workers=1, **engine
    )
    return ends.times[-1] - ends.times[_WORKERS - 1]


def _waited(name: str) -> float:
    shards = [Shard(str(i), i, None) for i in range(_WAITS)]
    times = []
    if name == "ray":
        found = ray_workers(_sleeper, shards, workers=_WORKERS)
    else:
        found = local_workers([partial(_sleeper, 0)] * _WORKERS, shards)
    for _ in found:
        times.append(time.perf_counter())
    return times[-1] - times[_WORKERS - 1]


def _sleeper(gpus: float) -> Callable[..., dict[str, Any]]:
    return _sleep


def _sleep(shard: Shard, *_: Any) -> dict[str, Any]:
    time.sleep(_WAIT / 1e3)
    return {}


_ENGINES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("processes", {"processes": _WORKERS}),
    ("ray", {"engine": on_ray(workers=_WORKERS, cpus=1)}),
)

if __name__ == "__main__":
    main()
