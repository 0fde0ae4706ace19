"""A data-set run from end to end: decoding, explaining, both together, and the whole of `clipfast.run`.

    pytest benchmarks/bench_run.py -o python_files='bench_*.py' -s
    CLIPFAST_BENCH_IMAGES=2000 pytest benchmarks/bench_run.py -o python_files='bench_*.py' -s

JPEGs of 500 x 375 pixels (quality 92, 4:2:0, smooth shapes with grain, about 55 kB) and ViT-B/32 with random weights,
all on the same cores. Figures land in results/engine/.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from claims import RESULTS, claim
from open_clip.transform import PreprocessCfg, image_transform_v2
from paired import machine
from PIL import Image

import clipfast
from clipfast.data.decode import decode
from clipfast.data.geometry import InputSpec, normalize
from clipfast.engine.base import Explained, Item
from clipfast.engine.pipeline import explained
from clipfast.engine.run import run
from clipfast.engine.texts import Prompts

IMAGES = int(os.environ.get("CLIPFAST_BENCH_IMAGES", 300))
PICTURES, HEIGHT, WIDTH = 40, 375, 500
TEXTS = ("a dog", "a red car", "two birds on a wire", "snow on a mountain", "a bowl of soup")
ENGINE = RESULTS.parent / "engine"
FASTER_THAN_OPEN_CLIP, OF_THE_SLOWER = 2.5, 0.90


@lru_cache(maxsize=1)
def pictures() -> list[bytes]:
    """`PICTURES` different JPEGs; larger sets repeat them under other names."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(PICTURES):
        coarse = rng.integers(0, 256, (HEIGHT // 25, WIDTH // 25, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float64)
        grainy = smooth + rng.normal(0, 3.5, (HEIGHT, WIDTH, 1))
        stream = io.BytesIO()
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=92, subsampling="4:2:0")
        found.append(stream.getvalue())
    return found


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def test_decode() -> None:
    torch.set_num_threads(1)
    datas = pictures()
    spec = InputSpec((224, 224), (32, 32))
    transform = image_transform_v2(PreprocessCfg(size=224), is_train=False)

    def each(function: Callable[[bytes], object]) -> Callable[[], None]:
        def call() -> None:
            for data in datas:
                function(data)

        return call

    exact = [decode(data, spec, exact=True).pixels for data in datas]
    differing = []
    for data, pixels in zip(datas, exact, strict=True):
        assert torch.equal(normalize(pixels[None], spec)[0], transform(Image.open(io.BytesIO(data))))
        difference = (decode(data, spec).pixels.int() - pixels.int()).abs()
        assert int(difference.max()) <= 1
        differing.append(float((difference > 0).float().mean()))
    found = claim(
        "decode",
        f"Decoding {PICTURES} JPEGs of {WIDTH} x {HEIGHT} for a 224-pixel input, one thread",
        "open_clip's own preprocess of the same files",
        {
            "open_clip": each(lambda data: transform(Image.open(io.BytesIO(data)))),
            "decode": each(lambda data: decode(data, spec)),
            "decode, normalised": each(lambda data: normalize(decode(data, spec).pixels[None], spec)),
            "decode, exact": each(lambda data: decode(data, spec, exact=True)),
        },
        at_most={"decode": 1 / FASTER_THAN_OPEN_CLIP},
        notes=f"{sum(map(len, datas)) / len(datas) / 1000:.0f} kB a file. decode is one level off open_clip's pixels "
        f"in {np.mean(differing):.2%} of the values, exact in none; open_clip's is a float tensor.",
        folder=ENGINE,
    )
    assert found["rows"][1]["ratio"] <= 1 / FASTER_THAN_OPEN_CLIP


def run_case(images: int = IMAGES, *, threads: int | None = None, repeats: int = 3, **arguments: Any) -> dict[str, Any]:
    """Time decoding, explaining, both and the whole run of `images` JPEGs in turn, and keep it as the claim "run".

    threads: of torch, by default all cores. arguments: of `explained` and `run`: workers, batch.
    """
    torch.set_num_threads(threads or cores())
    torch.manual_seed(0)
    datas = [pictures()[i % PICTURES] for i in range(images)]
    module = open_clip.create_model("ViT-B-32").eval()
    model = clipfast.load(module, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    explainer = clipfast.Explainer(model)
    prompts, asked = Prompts(TEXTS), explainer.asks(list(TEXTS))
    size = arguments.get("batch") or explainer.batch_size(224, 224)
    ready = [decode(data, explainer.spec).pixels for data in datas]
    batches = [torch.stack(ready[i : i + size]) for i in range(0, images, size)]

    def decoding() -> None:
        with ThreadPoolExecutor(cores()) as pool:
            for _ in pool.map(partial(decode, spec=explainer.spec), datas):
                pass

    def explaining() -> list[torch.Tensor]:
        return [explainer.batch(x).maps(asked) for x in batches]

    def both() -> list[Explained]:
        items = (Item(str(i), lambda data=data: data) for i, data in enumerate(datas))  # type: ignore[misc]
        return [part for part in explained(items, explainer, prompts, **arguments) if isinstance(part, Explained)]

    together = np.concatenate([part.maps for part in both()])
    np.testing.assert_array_equal(together, torch.cat(explaining()).numpy())

    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        photos.mkdir()
        for i, data in enumerate(datas):
            (photos / f"{i:06d}.jpg").write_bytes(data)
        outs = iter(range(1000))

        def whole() -> None:
            out = Path(folder, f"maps {next(outs)}")
            summary = run(photos, prompts, out, model=model, **arguments)
            assert summary["images"] == images

        found = claim(
            "run",
            f"A run over {images} JPEGs of {WIDTH} x {HEIGHT}, ViT-B/32, {len(TEXTS)} texts",
            "explaining the same images, decoded beforehand",
            {"explain alone": explaining, "decode alone": decoding, "pipeline": both, "clipfast run": whole},
            at_most={"pipeline": 1 / OF_THE_SLOWER},
            notes=f"{cores()} cores for each, {torch.get_num_threads()} of them torch's. The pipeline reads from "
            "memory; the run lists a folder, checks the weights and writes parquet, too.",
            repeats=repeats,
            warmup=0,
            folder=ENGINE,
        )
    for row in found["rows"]:
        print(f"{row['subject']}: {images / row['seconds']:.0f} images/s")
    return found


def test_run() -> None:
    found = {row["subject"]: row["seconds"] for row in run_case()["rows"]}
    slower = max(found["explain alone"], found["decode alone"])
    print(f"pipeline: {slower / found['pipeline']:.3f} of the slower of the two, on {machine()['cpu']}")
    assert slower / found["pipeline"] >= OF_THE_SLOWER
