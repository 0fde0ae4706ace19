"""Infidelity and completeness against captum's, and where both must be nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients
from captum.metrics import infidelity
from torch import Tensor

from clipfast import Explainer, load
from clipfast.data.datasets import open_dataset
from clipfast.errors import InputError
from clipfast.metrics.evaluate import evaluate
from clipfast.metrics.infidelity import Completeness, Infidelity
from clipfast.metrics.perturbation import Clock
from clipfast.metrics.stability import inputs


@pytest.fixture
def case(build_clip) -> tuple[Any, Tensor, Tensor]:
    """A model, images, and unit text embeddings."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64, generator=generator)
    texts = F.normalize(torch.randn(2, 24, dtype=torch.float64, generator=generator), dim=-1)
    return build_clip(quick_gelu=True).double(), images, texts


@pytest.mark.parametrize("kind", ["removal", "noise"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("grid", [(64, 64), (4, 8)])
def test_captum_agrees_on_the_same_perturbations(case, kind, normalize, grid) -> None:
    module, images, texts = case
    tower = load(module).towers()[0]
    maps = 0.01 * torch.randn(3, 2, *grid, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    protocol = Infidelity(kind, samples=6, normalize=normalize, seed=3)
    clock = Clock()
    columns = protocol.measure(tower.encode, texts, images, maps, first=4, batch=5, clock=clock)
    assert 0 < clock.forwards < clock.total
    drawn = torch.stack(list(protocol.perturbations(3, (64, 64), 4)))[:, None].expand(-1, 3, -1, -1)
    # All of a map in one channel, and what belongs to a cell shared by its pixels.
    tall, wide = 64 // grid[0], 64 // grid[1]
    spread = maps.repeat_interleave(tall, 2).repeat_interleave(wide, 3) / (tall * wide)
    with torch.no_grad():
        for p in range(2):
            attributions = torch.zeros_like(images)
            attributions[:, 0] = spread[:, p]

            def perturb(x: Tensor) -> tuple[Tensor, Tensor]:
                return drawn, x - drawn * (x if kind == "removal" else 1)

            expected = infidelity(
                lambda x, p=p: F.normalize(module.encode_image(x), dim=-1) @ texts[p],
                perturb,
                images,
                attributions,
                n_perturb_samples=6,
                normalize=normalize,
            )
            torch.testing.assert_close(columns["infidelity"][p::2], expected, rtol=0, atol=1e-10)
            assert (expected > 1e-6).all()


def linear(x: Tensor) -> Tensor:
    weight = torch.randn(4, x[0].numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return x.flatten(1) @ weight.T


def test_a_linear_model_s_own_attribution_is_faithful_and_complete() -> None:
    """Input times gradient explains what is removed, the gradient what noise does; and any multiple, normalised."""
    images, texts = torch.randn(2, 1, 21, 14, dtype=torch.float64), torch.eye(4, dtype=torch.float64)[:3]
    weight = linear(torch.eye(21 * 14, dtype=torch.float64).view(-1, 1, 21, 14)).T[:3].view(3, 21, 14)
    products = weight * images
    for kind, maps in (("removal", products), ("noise", weight.expand(2, -1, -1, -1))):
        exact = Infidelity(kind, samples=20, normalize=False).measure(linear, texts, images, maps)
        assert exact["infidelity"].abs().max() < 1e-12
        scaled = Infidelity(kind, samples=20).measure(linear, texts, images, 7 * maps)
        assert scaled["infidelity"].abs().max() < 1e-12
        off = Infidelity(kind, samples=20, normalize=False).measure(linear, texts, images, 7 * maps)
        assert (off["infidelity"] > 1e-2).all()
        # A map of nothing explains nothing, whatever the scale.
        nothing = [
            Infidelity(kind, samples=20, normalize=n).measure(linear, texts, images, 0 * maps)["infidelity"]
            for n in (True, False)
        ]
        assert torch.equal(*nothing) and (nothing[0] > 1e-2).all()
    columns = Completeness().measure(linear, texts, images, products)
    assert columns["error"].max() < 1e-10 and columns["relative error"].max() < 1e-9
    assert Completeness().measure(linear, texts, images, 0 * products)["relative error"].tolist() == pytest.approx(
        [1] * 6
    )
    still = Completeness().measure(linear, texts, images, products, images)
    assert still["relative error"].isnan().all()
    torch.testing.assert_close(still["delta"], products.sum((-2, -1)).flatten())


def test_batches_and_own_texts_change_nothing(case) -> None:
    module, images, texts = case
    tower = load(module).towers()[0]
    maps = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    own = texts.expand(3, -1, -1)
    for protocol in (Infidelity(samples=5), Completeness()):
        whole = protocol.measure(tower.encode, texts, images, maps)
        parts = protocol.measure(tower.encode, own, images, maps, batch=2)
        for name, column in whole.items():
            torch.testing.assert_close(parts[name], column, rtol=0, atol=1e-12)
    alone = Infidelity(samples=5).measure(tower.encode, texts, images[2:], maps[2:], first=2)
    whole = Infidelity(samples=5).measure(tower.encode, texts, images, maps)
    torch.testing.assert_close(alone["infidelity"], whole["infidelity"][4:], rtol=0, atol=1e-12)


def test_completeness_is_captum_s_delta(case) -> None:
    module, images, texts = case
    model = load(module)
    baseline = torch.randn(3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    out = Explainer(model, "integrated_gradients", steps=4, baseline=baseline)(images, texts)
    columns = Completeness().measure(model.towers()[0].encode, texts, images, out.maps, baseline, batch=2)
    torch.testing.assert_close(columns["delta"], out.extras["delta"].flatten(), rtol=0, atol=1e-10)
    for p in range(2):
        ig = IntegratedGradients(lambda x, p=p: F.normalize(module.encode_image(x), dim=-1) @ texts[p])
        start = baseline.expand_as(images)
        attributions = ig.attribute(images, start, n_steps=4)
        expected = ig.compute_convergence_delta(attributions, start, images)
        torch.testing.assert_close(columns["delta"][p::2], expected, rtol=0, atol=1e-9)


def test_what_does_not_fit_is_refused(case) -> None:
    _, images, texts = case
    for protocol in (Infidelity(), Completeness()):
        for maps in (torch.rand(2, 2, 4, 4), torch.rand(3, 3, 4, 4), torch.rand(3, 4, 4)):
            with pytest.raises(InputError, match=r"\(B, P, h, w\)"):
                protocol.measure(linear, texts, images, maps)
    with pytest.raises(InputError, match="'removal' or 'noise'"):
        Infidelity("blur")
    for parameters in ({"samples": 0}, {"cells": 0}, {"share": 1.0}, {"sigma": 0}):
        with pytest.raises(InputError, match="share in"):
            Infidelity(**parameters)


def test_an_evaluation_measures_the_same() -> None:
    scenes, explainer = open_dataset("scenes:3:2"), Explainer("demo")
    found = evaluate("demo", scenes, ["grad_eclip"], ["infidelity:samples=4"]).tables["grad_eclip"]
    expected = []
    for i, sample in enumerate(scenes):
        texts = [target.text for target in sample.targets]
        (x,) = inputs(explainer, sample.image)
        maps, embeddings = explainer(x, texts).maps, explainer.model.encode_texts(texts)
        encode = explainer.model.towers()[0].encode
        columns = Infidelity(samples=4).measure(encode, embeddings, x[None], maps, first=i)
        expected.append(columns["infidelity"])
    torch.testing.assert_close(found["infidelity:samples=4"].columns["infidelity"], torch.cat(expected))
