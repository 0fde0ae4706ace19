"""Covered images scored one by one, and the strip that shows them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipfast import Explainer
from clipfast.data.geometry import normalize, prepare
from clipfast.data.scenes import render
from clipfast.errors import InputError
from clipfast.metrics.occlusion import Occlusion
from clipfast.metrics.perturbation import Clock


def test_scores_are_those_of_images_covered_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 3 * 20 * 15, dtype=torch.float64, generator=generator)
    images = torch.randn(3, 3, 20, 15, dtype=torch.float64, generator=generator)
    maps = torch.rand(3, 2, 20, 15, dtype=torch.float64, generator=generator)
    maps[1, 0] = maps[1, 0].mul(4).round()
    texts = F.normalize(torch.randn(2, 8, dtype=torch.float64, generator=generator), dim=-1)

    def encode(x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x.flatten(1) @ weight.T, dim=-1)

    clock = Clock()
    protocol = Occlusion(fill=0.5)
    columns = protocol.measure(encode, texts, images, maps, batch=4, clock=clock)
    assert 0 < clock.forwards < clock.total
    for b in range(3):
        for p in range(2):
            order = maps[b, p].flatten().argsort(descending=True, stable=True)
            scores = []
            for percent in (0, 5, 10, 15, 20, 25):
                covered = images[b].flatten(1).clone()
                covered[:, order[: 300 * percent // 100]] = 0.5
                scores.append(float(encode(covered[None])[0] @ texts[p]))
                assert float(columns[f"score {percent / 100:.3f}"][2 * b + p]) == pytest.approx(scores[-1], abs=1e-12)
            drop = sum(scores[0] - s for s in scores[1:]) / 5
            assert float(columns["drop"][2 * b + p]) == pytest.approx(drop, abs=1e-12)
    assert protocol.summary(columns)["drop"] == pytest.approx(float(columns["drop"].mean()))


def test_the_best_map_costs_most_and_a_constant_one_goes_in_reading_order() -> None:
    image = torch.rand(1, 1, 10, 10, dtype=torch.float64)
    maps = torch.stack((image[0, 0], torch.zeros(10, 10, dtype=torch.float64), -image[0, 0]))[None]
    columns = Occlusion().measure(lambda x: x.flatten(1).sum(1)[:, None], torch.ones(3, 1).double(), image, maps)
    best, constant, worst = columns["drop"].tolist()
    assert best > constant > worst
    first = float(image[0, 0, 0].sum() + image[0, 0, 1].sum())
    assert float(columns["score 0.000"][1] - columns["score 0.200"][1]) == pytest.approx(first)


@pytest.mark.parametrize("method", ["grad_eclip", "saliency"])
def test_the_strip_shows_what_is_scored(method) -> None:
    picture = Image.fromarray(render(3, size=80, objects=1).image)
    explainer = Explainer("demo", method)
    protocol = Occlusion((0.1, 0.5))
    strip = protocol.strip(explainer, picture, "dog")
    assert strip.tobytes() == protocol.strip(explainer, picture, "dog", explainer(picture, "dog").maps[0, 0]).tobytes()
    x = normalize(prepare(picture, explainer.spec)[0][None], explainer.spec)
    size = x.shape[-1]
    gap = max(size // 14, 4)
    cells = [
        np.asarray(strip)[-size - 200 :, gap + i * (size + gap) : gap + i * (size + gap) + size].astype(int)
        for i in range(3)
    ]
    mean = np.array(explainer.spec.mean) * 255
    covered = [float((np.abs(cell - mean).max(-1) < 1).mean()) * cells[0].size / 3 / size**2 for cell in cells]
    assert covered[0] < 0.05 and covered[1] == pytest.approx(0.1 + covered[0], abs=0.02)
    assert covered[2] == pytest.approx(0.5 + covered[0], abs=0.04)
    with pytest.raises(InputError, match="one image, not 2"):
        protocol.strip(explainer, [picture, picture], "dog")


@pytest.mark.parametrize("fractions", [(), (0.0,), (1.2,), (0.1, float("nan"))])
def test_fractions_are_shares(fractions) -> None:
    with pytest.raises(InputError, match="shares of the pixels"):
        Occlusion(fractions)
