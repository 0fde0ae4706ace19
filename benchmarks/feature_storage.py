"""What keeping attribution features costs: bytes an image and error of the maps, codec by codec.

    python benchmarks/feature_storage.py                 # writes benchmarks/results/feature_storage.json
    python benchmarks/feature_storage.py --images 50     # a quick look, written nowhere

Errors are of real maps: the demo model, rendered scenes, and the name of every thing that a scene can show ("a dog"),
whether this one shows it or not; a map from stored features beside the map from the features themselves; once more
with two dimensions of the embedding 20 times as large. Bytes are those of the files a run writes. Models of full size
have random weights, so that only their bytes and times are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paired import machine
from torch import Tensor

import clipfast
from clipfast.data.scenes import Scenes, names
from clipfast.engine.base import Explained
from clipfast.engine.storage import Codec, feature_codec
from clipfast.engine.writer import ShardWriter
from clipfast.methods.base import combine
from clipfast.metrics.sanity import spearman
from clipfast.results import Features

RESULTS = Path(__file__).parent / "results" / "feature_storage.json"
CODECS = (
    "float32", "float16", "int8", "int8:image", "rank:64", "rank:32", "rank:16", "rank:8",
    "rank:64:int8", "rank:32:int8", "rank:24:int8", "rank:16:int8", "rank:8:int8",
)  # fmt: skip
MODELS = ("demo", "ViT-B-32:random", "ViT-B-16:random")
# Full-size features of as many images as this: bytes and times hardly differ between images.
_FEW = 12
_LARGER = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="scenes that the demo model explains")
    images = parser.parse_args().images
    torch.set_num_threads(1)
    found = [_study(name, images if name == "demo" else min(images, _FEW)) for name in MODELS]
    for model in found:
        print(
            f"\n{model['model']}: {model['patches']} patches, embedding {model['embedding']}, {model['images']} images"
        )
        for row in model["codecs"]:
            print(f"  {row['codec']:13}{row['bytes']:>9,} B  {row['encode_ms']:6.2f} ms to encode", end="")
            if "error" in row:
                print("  " + "  ".join(f"{name} {value:.4g}" for name, value in row["error"].items()), end="")
                print(f"  uneven: median {row['uneven']['median']:.4g}", end="")
            print()
    if images == parser.get_default("images"):
        RESULTS.write_text(json.dumps({"models": found, "machine": machine()}, indent=1) + "\n")


def _study(name: str, images: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = clipfast.load(name, device="cpu")
    scenes = Scenes(images, size=model.spec.size[0], seed=7)
    features = clipfast.Explainer(model).features([scene.image for scene in scenes])
    asked, maps, shown = None, None, None
    if name == "demo":
        things = names()
        asked = model.encode_texts([f"a {thing}" for thing in things])
        maps = _maps(features, features.values.numpy(), asked)
        shown = np.array([[thing in scene.names for thing in things] for scene in scenes])
    rows = []
    for codec in map(feature_codec, CODECS):
        row: dict[str, Any] = {"codec": codec.name, "bytes": _bytes(features, codec)}
        encode, decode, stored = _times(codec, features.values.numpy())
        row |= {"encode_ms": encode, "decode_ms": decode}
        if asked is not None and maps is not None and shown is not None:
            row["error"] = _errors(maps, _maps(features, stored, asked), shown)
            row["uneven"] = _uneven(features, codec, asked, shown)
        rows.append(row)
    return {
        "model": name,
        "images": images,
        "patches": features.values.shape[-2],
        "embedding": features.values.shape[-1],
        "texts": 0 if asked is None else len(asked),
        "codecs": rows,
    }


def _maps(features: Features, values: np.ndarray, asked: Tensor) -> np.ndarray:
    """Maps (B, P, n) of texts (P, E) from values as they come out of a codec."""
    out = features.values.new_empty(len(values), len(asked), values.shape[-2])
    return combine([features.weights], [torch.from_numpy(values)], asked, features.relu, out).numpy()


def _uneven(features: Features, codec: Codec, asked: Tensor, shown: np.ndarray) -> dict[str, float]:
    """The same where two dimensions of the embedding are far larger than the rest, as trained models tend to have."""
    values = features.values.numpy() * np.where(np.arange(asked.shape[1]) < 2, np.float32(_LARGER), np.float32(1))
    stored = codec.decode(codec.encode(values), values.shape[1:])
    return _errors(_maps(features, values, asked), _maps(features, stored, asked), shown)


def _errors(maps: np.ndarray, stored: np.ndarray, shown: np.ndarray) -> dict[str, float]:
    """Relative L2 error and Spearman's rank correlation over maps (B, P, n) that are not constant."""
    spread = np.ptp(maps, axis=-1) > 0
    size = np.linalg.norm(maps, axis=-1)
    error = np.linalg.norm(stored - maps, axis=-1)[spread] / size[spread]
    rank = spearman(torch.from_numpy(maps[spread]), torch.from_numpy(stored[spread])).numpy()
    found = {
        "median": np.median(error),
        "p95": np.quantile(error, 0.95),
        "shown": np.median(error[shown[spread]]),
        "rank": np.median(rank),
        "rank_p5": np.quantile(rank, 0.05),
        "constant": (~spread).mean(),
    }
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def _bytes(features: Features, codec: Codec) -> int:
    """Bytes an image in the file of a run's features, keys and geometry included."""
    count, (h, w) = len(features), features.grid
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(folder, "shard", features=codec.name, grid=(h, w)) as writer:
            writer.add(
                Explained(
                    keys=[f"photos/{i:08d}.jpg" for i in range(count)],
                    geometries=[g for g in features.geometries if g is not None],
                    prompts=np.zeros((count, 1), np.int32),
                    scores=np.zeros((count, 1), np.float32),
                    maps=np.zeros((count, 1, h, w), np.float32),
                    features=(features.values.numpy(), features.weights.numpy(), features.embeddings.numpy()),
                    relu=features.relu,
                )
            )
            files = writer.commit({"shard": "shard"})["files"]
        return round(files["features/shard.parquet"] / count)


def _times(codec: Codec, values: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Milliseconds of processor an image to encode and to decode, medians of three, and the decoded values."""
    encode, decode = [], []
    for _ in range(3):
        start = time.process_time()
        parts = codec.encode(values)
        encode.append(time.process_time() - start)
        start = time.process_time()
        stored = codec.decode(parts, values.shape[1:])
        decode.append(time.process_time() - start)
    each = 1e3 / len(values)
    return round(statistics.median(encode) * each, 3), round(statistics.median(decode) * each, 3), stored


if __name__ == "__main__":
    main()
