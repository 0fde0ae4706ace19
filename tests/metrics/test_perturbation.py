"""Deletion and insertion curves and confidence: published outputs, literal values, and naive loops."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from clipfast.data.geometry import InputSpec, normalize, prepare
from clipfast.errors import InputError
from clipfast.metrics.perturbation import (
    Classes,
    Clock,
    Confidence,
    CurvesCosine,
    CurvesGradEclip,
    CurvesRise,
    area,
    blur,
    cosine,
    curves,
)
from clipfast.ops.mask_sequence import Noise

GOLDENS = Path(__file__).parents[1] / "goldens" / "metrics_published.safetensors"


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    with safe_open(GOLDENS, "pt") as stored:
        return {key: stored.get_tensor(key) for key in stored.keys() if key.startswith("rise.")}  # noqa: SIM118


def encoder(seed: int = 0, size: int = 12) -> tuple[torch.nn.Module, Tensor]:
    """A stand-in for an image tower, and unit text embeddings."""
    torch.manual_seed(seed)
    layer = torch.nn.Linear(3 * size * size, 8).double().requires_grad_(False)
    return torch.nn.Sequential(torch.nn.Flatten(), layer), F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=-1)


def test_published_rise_curves(published) -> None:
    image, weight, bias = published["rise.image"], published["rise.weight"], published["rise.bias"]

    def logits(x: Tensor) -> Tensor:
        return F.linear(F.adaptive_avg_pool2d(x, 7).flatten(1).to(weight.dtype), weight, bias)

    target = logits(image).argmax(-1)

    def probability(z: Tensor, pair: Tensor) -> Tensor:
        return z.softmax(-1)[:, target[0]]

    protocol = CurvesRise(steps=28)
    maps = published["rise.saliency"][None, None].to(image.dtype)
    plan = {"deletion": (protocol.fractions(), 0.0), "insertion": (protocol.fractions(), blur(image))}
    found = curves(logits, probability, image, maps, plan, batch=7)
    columns = protocol.columns(found)
    for mode in ("deletion", "insertion"):
        torch.testing.assert_close(found[mode][0, 0].double(), published[f"rise.{mode}"].double(), rtol=0, atol=1e-6)
        assert float(columns[mode]) == pytest.approx(float(published[f"rise.{mode}_auc"]), abs=1e-6)


def test_the_published_blur(published) -> None:
    kernel = published["rise.blur_kernel"].double()
    image = torch.randn(2, 3, 30, 41, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(blur(image), F.conv2d(image, kernel, padding=5), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("values", "fractions", "deletion", "insertion", "areas"),
    [
        ([[0.4, 0.3], [0.2, 0.1]], (0, 0.5, 1), (1, 0.3, 0), (0, 0.7, 1), (0.4, 0.6)),
        ([[0.3, 0.25, 0.2, 0.15, 0.1]], (0, 0.4, 0.8, 1), (1, 0.45, 0.1, 0), (0, 0.55, 0.9, 1), (0.41, 0.59)),
    ],
)
def test_literal_curves(values, fractions, deletion, insertion, areas) -> None:
    image = torch.tensor(values, dtype=torch.float64)[None, None]
    plan = {"deletion": (fractions, 0.0), "insertion": (fractions, 0.0)}
    found = curves(lambda x: x.sum((1, 2, 3))[:, None], lambda z, pair: z[:, 0], image, image, plan)
    assert found["deletion"].flatten().tolist() == pytest.approx(deletion)
    assert found["insertion"].flatten().tolist() == pytest.approx(insertion)
    assert tuple(float(area(found[mode], fractions)) for mode in found) == pytest.approx(areas)


def test_a_naive_loop_agrees_for_images_prompts_and_odd_batches() -> None:
    encode, texts = encoder()
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(3, 3, 12, 12, dtype=torch.float64, generator=generator)
    maps = torch.rand(3, 5, 12, 12, dtype=torch.float64, generator=generator)
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += len(x)
        return F.normalize(encode(x), dim=-1)

    clock = Clock()
    columns = CurvesCosine(steps=4).measure(counted, texts, images, maps, batch=7, clock=clock)
    # The clean images once, and those of bare colour once for each curve.
    assert calls == 3 + 2 * 3 + 2 * 3 * 5 * 3
    assert 0 < clock.forwards < clock.total and 0 < clock.beside < 1
    assert len(columns["deletion"]) == 15
    for b in range(3):
        for p in range(5):
            order = maps[b, p].flatten().argsort(descending=True, stable=True)
            for mode in ("deletion", "insertion"):
                points = []
                for i in range(5):
                    gone = torch.zeros(144, dtype=torch.bool)
                    gone[order[: 36 * i]] = True
                    keep = ~gone if mode == "deletion" else gone
                    masked = images[b] * keep.view(12, 12)
                    points.append(float(F.normalize(encode(masked[None]), dim=-1)[0] @ texts[p]))
                    assert float(columns[f"{mode} {i / 4:.3f}"][b * 5 + p]) == pytest.approx(points[-1], abs=1e-12)
                trapezoid = sum((a + b) / 2 for a, b in pairwise(points)) / 4
                assert float(columns[mode][b * 5 + p]) == pytest.approx(trapezoid, abs=1e-12)


def test_own_prompts_equal_shared_ones() -> None:
    encode, texts = encoder()
    images, maps = torch.randn(2, 3, 12, 12, dtype=torch.float64), torch.rand(2, 5, 6, 6, dtype=torch.float64)
    shared = CurvesCosine(steps=3).measure(encode, texts, images, maps)
    own = CurvesCosine(steps=3).measure(encode, texts.expand(2, 5, 8), images, maps, batch=2)
    assert all(torch.allclose(shared[name], own[name], rtol=0, atol=1e-12) for name in shared)


def test_the_best_map_deletes_best_and_the_worst_worst() -> None:
    image = torch.rand(1, 1, 10, 10, dtype=torch.float64)
    maps = torch.stack((image[0, 0], torch.rand(10, 10, dtype=torch.float64), -image[0, 0]))[None]
    plan = {"deletion": ([i / 20 for i in range(21)], 0.0), "insertion": ([i / 20 for i in range(21)], 0.0)}
    found = curves(lambda x: x.sum((1, 2, 3))[:, None], lambda z, pair: z[:, 0], image, maps, plan)
    best, some, worst = area(found["deletion"], plan["deletion"][0])[0].tolist()
    assert best < some < worst
    best, some, worst = area(found["insertion"], plan["insertion"][0])[0].tolist()
    assert best > some > worst


def test_grad_eclip_s_curves_against_their_recipe() -> None:
    """Masked at the picture's own size, through the preprocessing, then whether the class wins: step by step."""
    encode, texts = encoder(size=12)
    spec = InputSpec(size=(12, 12), patch=(4, 4))
    numbers = np.random.default_rng(0)
    pictures = [Image.fromarray(numbers.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((20, 30), (17, 13))]
    maps = [torch.from_numpy(numbers.random((2, p.height, p.width))) for p in pictures]
    target = torch.tensor([0, 1, 3, 2])
    protocol = CurvesGradEclip(steps=6, every=2, seed=5)
    unit = lambda x: F.normalize(encode(x), dim=-1)  # noqa: E731
    columns = protocol.measure(
        unit, Classes(texts, 1.0, target), pictures, maps, spec, first=7, batch=3, dtype=torch.float64
    )
    for i, (picture, heat) in enumerate(zip(pictures, maps, strict=True)):
        pixels = np.asarray(picture)
        noise = Noise(5, 7 + i).image((1, 3, picture.height, picture.width))[0].permute(1, 2, 0).numpy()
        count = picture.height * picture.width
        for prompt in range(2):
            order = (-heat[prompt]).flatten().argsort(stable=True).numpy()
            shown = {"deletion": [pixels], "insertion": []}
            for step in (2, 4, 6):
                gone = order[: step * max(1, count // 12)]
                deleted, inserted = pixels.copy().reshape(-1, 3), np.zeros_like(pixels).reshape(-1, 3)
                deleted[gone], inserted[gone] = noise.reshape(-1, 3)[gone], pixels.reshape(-1, 3)[gone]
                shown["deletion"].append(deleted.reshape(pixels.shape))
                shown["insertion"].append(inserted.reshape(pixels.shape))
            shown["insertion"].append(pixels)
            for mode, sequence in shown.items():
                hits = []
                for values in sequence:
                    x = normalize(prepare(Image.fromarray(values), spec)[0][None], spec, torch.float64)
                    hits.append(float((unit(x) @ texts.T).argmax() == target[2 * i + prompt]))
                row = 2 * i + prompt
                assert [float(columns[f"{mode} top-1 {k:03d}"][row]) for k in range(4)] == hits
                assert float(columns[f"{mode} top-1"][row]) == pytest.approx((sum(hits) - (hits[0] + hits[-1]) / 2) / 3)
    # All five classes are always among the best five.
    assert protocol.summary(columns)["deletion top-5"] == 1.0
    with pytest.raises(InputError, match="must have its size"):
        protocol.measure(unit, Classes(texts, 1.0, target), pictures[:1], maps[1:], spec, dtype=torch.float64)


def test_confidence_against_its_formula() -> None:
    encode, texts = encoder()
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    maps = torch.rand(2, 5, 3, 3, dtype=torch.float64)
    maps[1, 2] = 0.7
    unit = lambda x: F.normalize(encode(x), dim=-1)  # noqa: E731
    absolute = Confidence().measure(unit, texts, images, maps, batch=3)
    relative = Confidence("relative").measure(unit, texts, images, maps, batch=3)
    for b in range(2):
        for p in range(5):
            wide = F.interpolate(maps[b, p][None, None], size=(12, 12), mode="bilinear")[0, 0]
            spread = wide.max() - wide.min()
            # A constant map masks everything.
            weight = (wide - wide.min()) / spread if spread > 0 else torch.zeros_like(wide)
            before = float(unit(images[b][None])[0] @ texts[p])
            after = float(unit((images[b] * weight)[None])[0] @ texts[p])
            row = b * 5 + p
            assert float(absolute["drop"][row]) == pytest.approx(100 * max(0, before - after), abs=1e-10)
            assert float(absolute["increase"][row]) == 100 * (after > before)
            if before > 0:
                assert float(relative["drop"][row]) == pytest.approx(100 * max(0, before - after) / before, abs=1e-9)
            else:
                assert relative["drop"][row].isnan()


def test_classes_follow_the_model_s_softmax() -> None:
    encode, texts = encoder()
    images = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    z = F.normalize(encode(images), dim=-1)
    classes = Classes(texts, 20.0, torch.tensor([2, 0, 4, 1]))
    expected = (20 * z @ texts.T).softmax(-1)[range(4), [2, 0, 4, 1]]
    torch.testing.assert_close(classes.probability(z, torch.arange(4)), expected)
    hits = Classes(texts, 20.0, (z @ texts.T).argmax(-1)).hit(z, torch.arange(4))
    assert hits.tolist() == [[1, 1]] * 4
    least = Classes(texts, 20.0, (z @ texts.T).argmin(-1)).hit(z, torch.arange(4))
    assert least.tolist() == [[0, 1]] * 4


def test_maps_that_do_not_belong_are_refused() -> None:
    plan = {"deletion": ((0.0, 1.0), 0.0)}
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(InputError, match=r"\(B, C, H, W\) and \(B, P, h, w\)"):
        curves(lambda x: x, cosine(torch.zeros(1, 3)), images, torch.zeros(3, 1, 8, 8), plan)
    with pytest.raises(InputError, match="NaN"):
        curves(lambda x: x, cosine(torch.zeros(1, 3)), images, torch.full((2, 1, 8, 8), torch.nan), plan)
