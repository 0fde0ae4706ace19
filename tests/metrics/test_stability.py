"""SSIM against its formula window by window, and maps before and after noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipfast import Explainer
from clipfast.data.datasets import open_dataset
from clipfast.data.geometry import normalize, prepare
from clipfast.data.scenes import render
from clipfast.errors import ImageError, InputError
from clipfast.metrics.evaluate import evaluate
from clipfast.metrics.stability import StabilitySsim, map_ssim, ssim


def naive_ssim(a: Tensor, b: Tensor, window: int = 11, sigma: float = 1.5) -> float:
    """Wang et al., eq. 13: the weighted sums of each window, one after the other."""
    middle = (window - 1) / 2
    taps = [math.exp(-((i - middle) ** 2) / (2 * sigma**2)) for i in range(window)]
    weights = {(i, j): x * y / sum(taps) ** 2 for i, x in enumerate(taps) for j, y in enumerate(taps)}
    x, y = a.tolist(), b.tolist()
    found = []
    for top in range(a.shape[0] - window + 1):
        for left in range(a.shape[1] - window + 1):
            pixels = [(w, x[top + i][left + j], y[top + i][left + j]) for (i, j), w in weights.items()]
            m_a, m_b = sum(w * u for w, u, _ in pixels), sum(w * v for w, _, v in pixels)
            s_a = sum(w * (u - m_a) ** 2 for w, u, _ in pixels)
            s_b = sum(w * (v - m_b) ** 2 for w, _, v in pixels)
            s_ab = sum(w * (u - m_a) * (v - m_b) for w, u, v in pixels)
            value = (2 * m_a * m_b + 1e-4) * (2 * s_ab + 9e-4)
            found.append(value / ((m_a**2 + m_b**2 + 1e-4) * (s_a + s_b + 9e-4)))
    return sum(found) / len(found)


def minmaxed(m: Tensor) -> Tensor:
    return (m - m.min()) / (m.max() - m.min()) if m.max() > m.min() else torch.zeros_like(m)


@pytest.mark.parametrize(("window", "sigma"), [(11, 1.5), (5, 0.8)])
def test_ssim_is_that_of_every_window(window, sigma, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 5, 17, 14, dtype=torch.float64, generator=generator)
    b[1] = 0.7 * a[1] + 0.3 * b[1]
    b[2] = 1 - a[2]
    a[3], b[3] = 0.4, 0.9
    a[4] = 0
    monkeypatch.setattr("clipfast.metrics.stability._CHUNK_PIXELS", 500)
    expected = [naive_ssim(x, y, window, sigma) for x, y in zip(a, b, strict=True)]
    assert ssim(a, b, window=window, sigma=sigma).tolist() == pytest.approx(expected, abs=1e-10)
    assert expected[2] < expected[0] < expected[1] < 1 and expected[2] < 0


def test_equal_maps_are_1_and_constants_have_a_value() -> None:
    generator = torch.Generator().manual_seed(1)
    maps = torch.rand(3, 7, 9, generator=generator)
    maps[2] = 0.3
    assert map_ssim(maps, maps, 32).tolist() == [1, 1, 1]
    # Scale and offset are no difference, nor is which constant it is.
    torch.testing.assert_close(map_ssim(5 * maps - 2, maps, 32), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-5)
    with_nothing = map_ssim(maps[:2], torch.full((2, 4, 4), 2.0), 32)
    assert (with_nothing < 0.2).all() and with_nothing.isfinite().all()


def test_maps_that_cannot_be_compared_are_refused() -> None:
    for a, b in (
        (torch.rand(1, 20, 20), torch.rand(1, 20, 19)),
        (torch.rand(1, 10, 20),) * 2,
        (torch.rand(20, 20),) * 2,
    ):
        with pytest.raises(InputError, match="at least 11 x 11"):
            ssim(a, b)
    with pytest.raises(InputError, match="not finite"):
        map_ssim(torch.full((1, 4, 4), torch.nan), torch.rand(1, 4, 4), 20)
    for parameters in ({"sigmas": ()}, {"sigmas": (-1,)}, {"side": 8}):
        with pytest.raises(InputError, match="sigmas must be"):
            StabilitySsim(**parameters)


@pytest.mark.parametrize("method", ["grad_eclip", "saliency"])
def test_noise_is_put_on_the_pixels_that_the_model_sees(method) -> None:
    """Each copy made by hand, explained alone and compared alone; the maps are those of patches, and of pixels."""
    pictures = [Image.fromarray(render(seed, size=80, objects=2).image) for seed in (1, 2)]
    explainer, texts = Explainer("demo", method), ["dog", "red car", "boat"]
    protocol = StabilitySsim(sigmas=(2, 30), seed=3, side=40)
    columns = protocol.measure(explainer, pictures, texts, first=5)
    for i, picture in enumerate(pictures):
        x = normalize(prepare(picture, explainer.spec)[0][None], explainer.spec)[0]
        noise = np.random.default_rng((3, 5 + i)).standard_normal(x.shape)
        std = torch.tensor(explainer.spec.std).double()[:, None, None]
        clean = explainer(x, texts).maps[0]
        for sigma in (2, 30):
            noisy = explainer((x + sigma / 255 * torch.from_numpy(noise) / std).float(), texts).maps[0]
            for p in range(3):
                a, b = (
                    minmaxed(F.interpolate(m[p].double()[None, None], size=(40, 40), mode="bilinear")[0, 0])
                    for m in (clean, noisy)
                )
                assert float(columns[f"SSIM {sigma}/255"][3 * i + p]) == pytest.approx(naive_ssim(a, b), abs=1e-5)
    torch.testing.assert_close(columns["SSIM"], (columns["SSIM 2/255"] + columns["SSIM 30/255"]) / 2)
    assert columns["SSIM 2/255"].mean() > columns["SSIM 30/255"].mean()


def test_no_noise_changes_nothing_and_batches_do_not_matter(monkeypatch) -> None:
    pictures = [Image.fromarray(render(seed, size=80, objects=1).image) for seed in range(3)]
    explainer = Explainer("demo", resize="keep")
    pictures[1] = pictures[1].resize((120, 80))
    still = StabilitySsim(sigmas=(0,)).measure(explainer, pictures, "dog")
    assert still["SSIM"].tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    protocol = StabilitySsim(sigmas=(9,))
    whole = protocol.measure(explainer, pictures, ["dog", "cat"])
    monkeypatch.setattr("clipfast.metrics.stability._IMAGES", 2)
    parts = protocol.measure(explainer, pictures, ["dog", "cat"])
    torch.testing.assert_close(parts["SSIM"], whole["SSIM"], rtol=0, atol=1e-5)
    alone = protocol.measure(explainer, pictures[2], ["dog", "cat"], first=2)
    torch.testing.assert_close(alone["SSIM"], whole["SSIM"][4:], rtol=0, atol=1e-5)
    assert protocol.summary(whole)["SSIM"] == pytest.approx(float(whole["SSIM"].mean()))
    other = StabilitySsim(sigmas=(9,), seed=1).measure(explainer, pictures, ["dog", "cat"])
    assert (other["SSIM"] - whole["SSIM"]).abs().max() > 1e-3


def test_an_image_that_cannot_be_read_is_said() -> None:
    with pytest.raises(ImageError, match="no image"):
        StabilitySsim().measure(Explainer("demo"), np.zeros((4, 4, 3), dtype=np.float32), "dog")


def test_an_evaluation_measures_the_same() -> None:
    """By sample, whose number its noise depends on, for all of its prompts."""
    scenes = open_dataset("scenes:3:2")
    found = evaluate("demo", scenes, ["tclip"], ["stability/ssim:side=32"]).tables["tclip"]["stability/ssim:side=32"]
    protocol = StabilitySsim(side=32)
    alone = [
        protocol.measure(Explainer("demo", "tclip"), sample.image, [t.text for t in sample.targets], first=i)
        for i, sample in enumerate(scenes)
    ]
    for name, column in found.columns.items():
        torch.testing.assert_close(column, torch.cat([one[name] for one in alone]), rtol=0, atol=1e-5)
