"""Explained batches out of thin air, and runs made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipfast.data.geometry import Geometry
from clipfast.engine.base import Explained
from clipfast.engine.config import RunConfig
from clipfast.engine.writer import ShardWriter


def _batch(
    keys: list[str], prompts: int, grid: tuple[int, int], seed: int, features: tuple[int, ...] | None
) -> Explained:
    """Maps of these images, each a function of its key, the prompt and the seed alone."""
    h, w = grid
    rows = [np.random.default_rng([seed, *key.encode()]) for key in keys]
    geometries = [
        Geometry(50 + len(key), 80 + i % 3, (0.1, -1.5, 80.0, 51 / 3), (h * 16, w * 16), (h * 16, w * 16))
        for i, key in enumerate(keys)
    ]
    maps = np.stack([np.maximum(r.normal(size=(prompts, h, w)), 0) * 1e-6 for r in rows]).astype(np.float32)
    scores = np.stack([r.normal(size=prompts) for r in rows]).astype(np.float32)
    kept = None
    if features is not None:
        kept = tuple(
            np.stack([r.normal(size=shape) for r in rows]).astype(np.float32)
            for shape in (features, features[:-1], features[-1:])
        )
    return Explained(keys, geometries, np.tile(np.arange(prompts), (len(keys), 1)), scores, maps, features=kept)  # type: ignore[arg-type]


@pytest.fixture
def explained() -> Callable[..., Explained]:
    """A factory of batches: keys (or how many), prompts, grid, seed, and the shape of features (n, E) or (L, n, E)."""

    def build(
        keys: list[str] | int = 4,
        prompts: int = 3,
        grid: tuple[int, int] = (4, 5),
        seed: int = 0,
        features: tuple[int, ...] | None = None,
    ) -> Explained:
        keys = [f"folder {i // 3}/image {i}.jpg" for i in range(keys)] if isinstance(keys, int) else keys
        return _batch(keys, prompts, grid, seed, features)

    return build


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., Path]:
    """A factory of run folders: batches of each shard, the run's texts (none: each image has its own), codecs."""

    def build(
        shards: list[list[Explained]],
        texts: list[str],
        *,
        name: str = "run",
        grid: tuple[int, int] | None = (4, 5),
        maps: str = "float16",
        features: str | None = None,
        errors: dict[int, list[dict[str, str]]] | None = None,
        source: dict[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = RunConfig(
            source=source or {},
            prompts={"texts": texts, "column": None if texts else "caption", "templates": None, "top": None},
            model="tiny",
            weights="0",
            method="grad_eclip",
            parameters={},
            dtype="float32",
            resize="crop",
            maps=maps,
            features=features,
        )
        (folder / "run.json").write_text(json.dumps({"format": 1, "config": config.to_json()}))
        for number, batches in enumerate(shards):
            shard = f"{number:06d}-abc"
            with ShardWriter(folder, shard, maps=maps, features=features, grid=grid) as writer:
                for batch in batches:
                    writer.add(batch)
                writer.commit(
                    {
                        "shard": shard,
                        "number": number,
                        "errors": (errors or {}).get(number, []),
                        "config": config.digest,
                    }
                )
        return folder

    return build
