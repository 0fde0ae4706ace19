"""Explaining against encoding: what maps for any number of prompts cost, in encodes of the same images.

make bench, or: pytest benchmarks/bench_explain.py --benchmark-enable [--rounds 7] [-k ViT-B-32]

open_clip models with random weights, 4 images of 224 x 224, maps left on the patch grid. Everything takes turns with
`model.encode_image` in one run. No speed is reported of maps that are wrong: each case is first compared with float64.
Results land in results/explain.json and, as tables, in docs/benchmarks.md.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import explain_page
import open_clip
import peers
import pytest
import torch
import torch.nn.functional as F
from paired import machine, report
from peak_memory import peak_memory
from torch import Tensor

import clipfast
from clipfast.bench.cases import relative
from clipfast.bench.peers import autograd_maps
from clipfast.models.model import multiplies_bfloat16

MODELS = ("ViT-B-16", "ViT-B-32")
BATCH, PIXELS = 4, 224
PROMPTS = (1, 100, 1000, 10_000)
AUTOGRAD_PROMPTS = (1, 10, 100)
LIMITS = {
    "ViT-B-16": dict(zip(PROMPTS, (0.95, 1.01, 1.05, 1.15), strict=True)),
    "ViT-B-32": dict(zip(PROMPTS, (0.97, 1.03, 1.05, 1.15), strict=True)),
}
MEMORY_LIMIT = 1.10
FLOAT32_ERROR, BFLOAT16_ERROR = 1e-5, 2e-2
PUBLISHED = 7

Functions = dict[str, Callable[[], object]]


@lru_cache(maxsize=1)
def setting(name: str) -> tuple[Any, Tensor, Tensor, dict[int, Any]]:
    """A model, images (B, 3, H, W), unit text embeddings (10,000, E), and the maps in float64 for each of PROMPTS."""
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    x = torch.randn(BATCH, 3, PIXELS, PIXELS)
    texts = F.normalize(torch.randn(max(PROMPTS), model.text_projection.shape[1]), dim=-1)
    explainer = clipfast.Explainer(copy.deepcopy(model).double())
    exact = {p: explainer(x.double(), texts[:p].double()).maps for p in PROMPTS}
    return model, x, texts, exact


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What the suite found, by model; written down at its end."""
    found: dict[str, Any] = {name: {} for name in MODELS}
    yield found
    if request.config.getoption("rounds") >= PUBLISHED:
        explain_page.write({"machine": machine(), "models": found})


def encode(model: Any, x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return model.encode_image(x)

    return call


def row(
    method: str, prompts: int | None, seconds: Sequence[float], reference: Sequence[float], **more: Any
) -> dict[str, Any]:
    """One line of a table: the median, lowest and highest ratio of the rounds to the reference's."""
    ratios = sorted(a / b for a, b in zip(seconds, reference, strict=True))
    return {
        "method": method,
        "prompts": prompts,
        "ratio": round(statistics.median(ratios), 3),
        "lowest": round(ratios[0], 3),
        "highest": round(ratios[-1], 3),
        "seconds": round(statistics.median(seconds), 4),
        "rounds": len(ratios),
    } | more


def image_by_image(model: Any, x: Tensor, texts: Tensor) -> Tensor:
    return torch.cat([autograd_maps(model, image[None], texts) for image in x])


@pytest.mark.benchmark(group="explain")
@pytest.mark.parametrize("name", MODELS)
def test_explaining_costs_one_encode(benchmark: Any, name: str, results: dict[str, Any], pytestconfig: Any) -> None:
    model, x, texts, exact = setting(name)
    explainer = clipfast.Explainer(model)
    embeddings = encode(model, x)()
    errors = {}
    for p in PROMPTS:
        found = explainer(x, texts[:p])
        errors[p] = relative(found.maps, exact[p])
        assert errors[p] < FLOAT32_ERROR, "no speed is reported of maps that are wrong"
        assert (found.scores - F.normalize(embeddings, dim=-1) @ texts[:p].T).abs().max() < 1e-6
    features = relative(explainer.features(x).maps(texts[:100]).maps, exact[100])
    assert features < FLOAT32_ERROR

    functions: Functions = {"encode": encode(model, x)}
    functions |= {f"{p}": partial(explainer, x, texts[:p]) for p in PROMPTS}
    functions["features"] = partial(explainer.features, x)
    timings = report(benchmark, functions, pytestconfig.getoption("rounds"), warmup=1)
    seconds = {key: timing.seconds for key, timing in timings.items()}
    reference = seconds["encode"]
    limits = LIMITS[name]
    results[name] |= {
        "encode_seconds": round(statistics.median(reference), 4),
        "clipfast": [row("clipfast", p, seconds[f"{p}"], reference, limit=limits[p], error=errors[p]) for p in PROMPTS]
        + [row("clipfast, features alone", None, seconds["features"], reference, error=features)],
    }
    missed = [f"{p} prompts: {timings[f'{p}'].ratio:.3f}" for p in PROMPTS if timings[f"{p}"].ratio > limits[p]]
    assert not missed, f"{name} misses {limits}: {'; '.join(missed)}"


@pytest.mark.benchmark(group="explain")
@pytest.mark.parametrize("name", MODELS)
def test_autograd_for_each_prompt(benchmark: Any, name: str, results: dict[str, Any], pytestconfig: Any) -> None:
    model, x, texts, exact = setting(name)
    methods = {
        "autograd for each prompt, image by image (as published)": image_by_image,
        "autograd for each prompt, images batched": autograd_maps,
    }
    for maps in methods.values():
        found = maps(model, x, texts[:3]).unflatten(-1, exact[1].shape[-2:])
        assert relative(found, exact[100][:, :3]) < FLOAT32_ERROR, "no speed is reported of maps that are wrong"
    functions: Functions = {"encode": encode(model, x)}
    for method, maps in methods.items():
        functions |= {f"{method}, {p}": partial(maps, model, x, texts[:p]) for p in AUTOGRAD_PROMPTS}
    timings = report(benchmark, functions, pytestconfig.getoption("rounds"), warmup=1)
    results[name]["autograd"] = [
        row(method, p, timings[f"{method}, {p}"].seconds, timings["encode"].seconds)
        for method in methods
        for p in AUTOGRAD_PROMPTS
    ]


@pytest.mark.benchmark(group="peers")
@pytest.mark.parametrize("peer", peers.PEERS)
@pytest.mark.parametrize("name", MODELS)
def test_peers(benchmark: Any, name: str, peer: str, results: dict[str, Any], pytestconfig: Any) -> None:
    try:
        found = benchmark.pedantic(peers.run, (peer, name, pytestconfig.getoption("rounds")), rounds=1, iterations=1)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    seconds = found["seconds"]
    versions = {key: found[key] for key in ("version", "open_clip")}
    rows = [row(found["method"], p, seconds[str(p)], seconds["encode"], **versions) for p in peers.PROMPTS]
    benchmark.extra_info["rows"] = rows
    results[name].setdefault("peers", {})[peer] = rows


@pytest.mark.benchmark(group="bfloat16")
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16(benchmark: Any, name: str, results: dict[str, Any], pytestconfig: Any) -> None:
    model, x, texts, exact = setting(name)
    explainer = clipfast.Explainer(model, precision="bfloat16")
    errors = {p: relative(explainer(x, texts[:p]).maps, exact[p]) for p in PROMPTS}
    assert max(errors.values()) < BFLOAT16_ERROR, "no speed is reported of maps that are wrong"
    half = copy.deepcopy(model).bfloat16()
    functions: Functions = {"encode": encode(half, x.bfloat16()), "float32 encode": encode(model, x)}
    functions |= {f"{p}": partial(explainer, x, texts[:p]) for p in PROMPTS}
    timings = report(benchmark, functions, pytestconfig.getoption("rounds"), warmup=1)
    seconds = {key: timing.seconds for key, timing in timings.items()}
    results[name]["bfloat16"] = {
        "native": multiplies_bfloat16(x.device),
        "encode": row("encode in bfloat16", None, seconds["encode"], seconds["float32 encode"]),
        "clipfast": [
            row("clipfast in bfloat16", p, seconds[f"{p}"], seconds["encode"], error=errors[p], limit=LIMITS[name][p])
            for p in PROMPTS
        ],
    }


@pytest.mark.benchmark(group="memory")
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("name", MODELS)
def test_memory_is_the_encode_and_the_results(benchmark: Any, name: str, results: dict[str, Any]) -> None:
    cases = ["encode", *map(str, PROMPTS)]
    found = benchmark.pedantic(lambda: {case: peak_memory(name, case) for case in cases}, rounds=1, iterations=1)
    encode_bytes = found["encode"]["increase"]
    rows = [
        {
            "prompts": p,
            "bytes": found[str(p)]["increase"],
            "results": found[str(p)]["results"],
            "ratio": round(found[str(p)]["increase"] / (encode_bytes + found[str(p)]["results"]), 3),
            "limit": MEMORY_LIMIT,
        }
        for p in PROMPTS
    ]
    benchmark.extra_info["rows"] = rows
    results[name]["memory"] = {"encode": encode_bytes, "clipfast": rows}
    missed = [f"{r['prompts']} prompts: {r['ratio']} > {MEMORY_LIMIT}" for r in rows if r["ratio"] > MEMORY_LIMIT]
    assert not missed, f"{name}: {'; '.join(missed)}"
