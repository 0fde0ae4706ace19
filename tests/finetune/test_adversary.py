from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import clipfast
from clipfast.errors import InputError
from clipfast.finetune.adversary import Adversary, Perturbed, perturb

NUMBERS = {"eps": 4 / 255, "eta": 1 / 255, "eps2": 0.3, "group": 3}
PENALTIES = ("huber", "elastic_net", "group_norm", "none")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(side: int = 12, width: int = 9) -> nn.Module:
    """A smooth function of pixels in float64."""
    torch.manual_seed(0)
    layers = nn.Linear(3 * side * side, 16), nn.Tanh(), nn.Linear(16, width)
    return nn.Sequential(nn.Flatten(), *layers).double()


def solve(adversary: Adversary, x: Tensor, seed: int = 0, side: int = 12) -> Perturbed:
    """The inner problem of the network above, moved a little away from the frozen one."""
    encode = network(side)
    with torch.no_grad():
        frozen = F.normalize(encode(x), dim=-1)
        encode[1 + 2].weight.mul_(1.1).add_(0.01)
    return perturb(
        lambda pixels: F.normalize(encode(pixels), dim=-1),
        lambda found: adversary.distance(found, frozen),
        x,
        adversary,
        seeded(seed),
    )


def published(x: Tensor, frozen: Tensor, encode: Callable[[Tensor], Tensor], norm: str, adversary: Adversary) -> Tensor:
    """The released loop, transcribed without clipfast: delta. norm as the code calls it; groups of 3 x 3."""
    generator, cells = seeded(), 4
    delta = torch.empty_like(x).uniform_(-adversary.eps, adversary.eps, generator=generator)
    velocity = torch.zeros_like(x)

    def in_groups(g: Tensor) -> Tensor:
        squares = g.square().reshape(-1, 3, cells, 3, cells, 3).sum((3, 5))
        return squares.sqrt().repeat_interleave(3, 2).repeat_interleave(3, 3)

    def directed(g: Tensor) -> Tensor:
        if norm in ("huber", "linf"):
            return g.sign()
        if norm == "elastic":
            return F.normalize(g.flatten(1), dim=1).view_as(g)
        return g / in_groups(g)

    for _ in range(adversary.steps):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype) * adversary.sigma if adversary.sigma else 0.0
        delta = delta.detach().requires_grad_()
        loss = (encode((x + noise).clamp(0, 1) + delta) - frozen).square().sum(1).mean()
        if norm == "huber":
            loss = loss - adversary.eta / adversary.eps * torch.linalg.norm(delta, dim=1).mean()
        if norm == "elastic":
            squares = torch.square(delta.abs() - adversary.eps).clamp(0)
            loss = loss - 0.25 / adversary.eps2 * squares.sum(dim=[1, 2, 3]).mean()
        gradient = torch.autograd.grad(loss, delta)[0]
        velocity = directed(adversary.momentum * velocity + directed(gradient))
        delta = delta.detach() + adversary.step_size * velocity
        if norm in ("huber", "linf"):
            delta = delta.clamp(-adversary.eps, adversary.eps)
        if norm == "group":
            norms = in_groups(delta)
            delta = delta * torch.where(norms > adversary.eps, adversary.eps / norms, 1.0)
        delta = (x + delta).clamp(0, 1) - x
    return delta


@pytest.mark.parametrize(
    ("name", "norm"), [("huber", "huber"), ("none", "linf"), ("elastic_net", "elastic"), ("group_norm", "group")]
)
def test_the_released_recipe_computes_what_its_code_does(name: str, norm: str) -> None:
    adversary = replace(Adversary.aft("released"), penalty=name, **NUMBERS)
    x, encode = torch.rand(3, 3, 12, 12, dtype=torch.float64, generator=seeded(1)), network()
    frozen = encode(x).detach()
    found = perturb(encode, lambda e: adversary.distance(e, frozen), x, adversary, seeded())
    torch.testing.assert_close(found.delta, published(x, frozen, encode, norm, adversary), rtol=1e-8, atol=1e-12)


def test_fare_is_the_released_loop_without_noise() -> None:
    adversary = Adversary.fare(eps=2 / 255)
    x, encode = torch.rand(2, 3, 12, 12, dtype=torch.float64, generator=seeded(1)), network()
    frozen = encode(x).detach()
    found = perturb(encode, lambda e: adversary.distance(e, frozen), x, adversary, seeded())
    assert torch.equal(found.delta.abs() > 0, found.delta != 0) and found.delta.abs().max() <= 2 / 255
    torch.testing.assert_close(found.delta, published(x, frozen, encode, "linf", adversary), rtol=1e-8, atol=1e-12)


def test_the_papers_recipe_by_hand() -> None:
    """Half the squared distance of x + z + delta, whose noise is not clamped, less eta / (2 eps) |delta|^2."""
    adversary = replace(Adversary.aft(), steps=3, direction="gradient", step_size=0.5)
    x, encode = torch.rand(2, 3, 12, 12, dtype=torch.float64, generator=seeded(1)).round(), network()
    frozen = encode(x + 0.01).detach()
    generator = seeded()
    delta = torch.empty_like(x).uniform_(-4 / 255, 4 / 255, generator=generator)
    delta = (x + delta).clamp(0, 1) - x
    for _ in range(3):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype) / 255
        delta.requires_grad_()
        distances = 0.5 * (encode(x + noise + delta) - frozen).square().sum(1)
        objective = distances - (1 / 255) / (2 * 4 / 255) * delta.square().sum((1, 2, 3))
        (gradient,) = torch.autograd.grad(objective.sum(), delta)
        delta = (x + (delta.detach() + 0.5 * gradient).clamp(-4 / 255, 4 / 255)).clamp(0, 1) - x
    found = perturb(encode, lambda e: adversary.distance(e, frozen), x, adversary, seeded())
    torch.testing.assert_close(found.delta, delta, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found.objective, objective.detach(), rtol=1e-8, atol=1e-12)
    assert not found.objective.requires_grad and not found.delta.requires_grad


def linear(adversary: Adversary, u: Tensor) -> Tensor:
    """What the steps reach of the largest <u, delta> - h(delta), in grey images."""
    found = perturb(
        lambda p: p.flatten(1), lambda e: (e * u.flatten(1)).sum(1), torch.full_like(u, 0.5), adversary, seeded()
    )
    reached = (u * found.delta).flatten(1).sum(1) - adversary.h().value(found.delta)
    return reached / adversary.h().conjugate(u)


def test_ten_sign_steps_nearly_solve_the_linearised_problem_and_one_gradient_step_does() -> None:
    u = torch.randn(3, 3, 12, 12, generator=seeded(), dtype=torch.float64) / 255
    u *= torch.tensor([1, 3, 10])[:, None, None, None]
    share = linear(Adversary(start="zero", sigma=0.0), u)
    assert (share > 0.97).all() and (share <= 1 + 1e-12).all()
    groups = Adversary(penalty="group_norm", start="zero", sigma=0.0, **NUMBERS)
    share = linear(groups, u)
    assert (share > 0.97).all() and (share <= 1 + 1e-12).all()
    exact = Adversary(start="zero", sigma=0.0, direction="gradient", steps=1, step_size=4.0)
    torch.testing.assert_close(linear(exact, u), torch.ones(3, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("start", ["zero", "uniform"])
def test_the_linearised_problem_of_each_penalty_is_solved_by_gradient_steps(name: str, start: str) -> None:
    u = torch.randn(3, 3, 12, 12, generator=seeded(), dtype=torch.float64) / 255
    # The box alone has no curvature that would limit a step.
    size = 100.0 if name == "none" else 0.5
    adversary = Adversary(
        penalty=name, start=start, sigma=0.0, direction="gradient", step_size=size, steps=400, **NUMBERS
    )
    torch.testing.assert_close(linear(adversary, u), torch.ones(3, dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("recipe", ["paper", "released"])
@pytest.mark.parametrize("direction", ["auto", "sign", "normalized", "gradient"])
@pytest.mark.parametrize("name", PENALTIES)
def test_perturbations_are_feasible_on_grey_black_and_white(name: str, direction: str, recipe: str) -> None:
    adversary = Adversary(penalty=name, direction=direction, recipe=recipe, momentum=0.5, steps=4, **NUMBERS)
    x = torch.rand(4, 3, 12, 12, dtype=torch.float64, generator=seeded(1))
    x[1], x[2] = 0.0, 1.0
    found = solve(adversary, x)
    assert (x + found.delta).min() >= 0 and (x + found.delta).max() <= 1
    assert adversary.h().contains(found.delta).all() and found.objective.isfinite().all()
    assert found.nan_gradients == 0 and (found.delta.flatten(1).abs().amax(1) > 0).all()
    assert found.delta[1].min() == 0 and found.delta[2].max() == 0


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(PENALTIES),
    direction=st.sampled_from(["sign", "normalized", "gradient"]),
    recipe=st.sampled_from(["paper", "released"]),
    batch=st.integers(1, 3),
    height=st.integers(3, 9),
    width=st.integers(3, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_shape(
    name: str, direction: str, recipe: str, batch: int, height: int, width: int, dtype: torch.dtype
) -> None:
    adversary = Adversary(penalty=name, direction=direction, recipe=recipe, steps=2, **NUMBERS)
    x = torch.rand(batch, 3, height, width, dtype=dtype, generator=seeded())
    found = perturb(lambda p: p.flatten(1).tanh(), lambda e: e.square().sum(1), x, adversary, seeded())
    assert found.delta.shape == x.shape and found.delta.dtype == x.dtype and found.objective.shape == (batch,)
    assert adversary.h().contains(found.delta).all()
    if name == "group_norm":
        assert not found.delta[:, :, height // 3 * 3 :].any() and not found.delta[..., width // 3 * 3 :].any()


def test_more_steps_find_more() -> None:
    x = torch.rand(4, 3, 12, 12, dtype=torch.float64, generator=seeded(1))
    for name in ("huber", "none"):
        few, many = (solve(Adversary(penalty=name, sigma=0.0, steps=n), x).objective for n in (2, 30))
        assert (many > few).all()


def test_images_do_not_see_each_other() -> None:
    x = torch.rand(3, 3, 12, 12, dtype=torch.float64, generator=seeded(1))
    for direction in ("sign", "normalized", "gradient"):
        adversary = Adversary(start="zero", sigma=0.0, direction=direction, momentum=0.9)
        whole = solve(adversary, x)
        for i in range(3):
            alone = solve(adversary, x[i : i + 1])
            torch.testing.assert_close(whole.delta[i], alone.delta[0], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(whole.objective[i], alone.objective[0], rtol=1e-9, atol=1e-12)


def test_all_randomness_is_the_generators() -> None:
    x, adversary = torch.rand(2, 3, 12, 12, dtype=torch.float64, generator=seeded(1)), Adversary()
    before = torch.get_rng_state()
    first, again, other = solve(adversary, x, 5), solve(adversary, x, 5), solve(adversary, x, 6)
    assert torch.equal(first.delta, again.delta) and torch.equal(first.objective, again.objective)
    assert not torch.equal(first.delta, other.delta)

    def ascend(generator: torch.Generator) -> Tensor:
        return perturb(lambda p: p.flatten(1).cos(), lambda e: e.square().sum(1), x, adversary, generator).delta

    torch.set_rng_state(before)
    generator = seeded()
    ascend(generator)
    state = generator.get_state()
    second = ascend(generator)
    assert torch.equal(ascend(torch.Generator().set_state(state)), second)
    assert torch.equal(torch.get_rng_state(), before)


def test_parameters_get_no_gradients_and_none_are_computed() -> None:
    """By functions, not modules: there the counter of operations cannot follow a gradient of chosen tensors."""
    x = torch.rand(2, 3, 12, 12, generator=seeded(1))
    first, second = torch.randn(16, 432, generator=seeded()).requires_grad_(), torch.randn(9, 16, requires_grad=True)
    bias = torch.randn(9)
    second.grad = torch.ones_like(second)

    def encode(pixels: Tensor) -> Tensor:
        return F.linear(F.linear(pixels.flatten(1), first).tanh(), second, bias)

    with FlopCounterMode(display=False) as once, torch.no_grad():
        encode(x)
    with FlopCounterMode(display=False) as ascent:
        perturb(encode, lambda e: e.square().sum(1), x, Adversary(steps=3), seeded())
    # A forward pass, and as much again for the gradient of the pixels; that of the weights would be a third part.
    assert ascent.get_total_flops() == 3 * 2 * once.get_total_flops()
    assert first.requires_grad and second.requires_grad and not bias.requires_grad
    assert first.grad is None and torch.equal(second.grad, torch.ones_like(second))


def test_gradients_that_are_not_a_number_stay_with_their_image() -> None:
    x = torch.rand(3, 3, 12, 12, dtype=torch.float64, generator=seeded(1))
    bad = torch.tensor([1.0, torch.nan, 1.0], dtype=torch.float64)
    adversary = Adversary(steps=2, start="zero", sigma=0.0, penalty="none")
    found = perturb(lambda p: p.flatten(1), lambda e: e.square().sum(1) * bad, x, adversary, seeded())
    assert found.nan_gradients == 2 * 3 * 12 * 12
    assert not found.delta[1].any() and found.objective[1].isnan()
    assert found.delta[[0, 2]].abs().min() > 0 and found.objective[[0, 2]].isfinite().all()


def test_without_noise_and_from_zero_the_frozen_model_itself_stays() -> None:
    encode, x = network(), torch.rand(2, 3, 12, 12, dtype=torch.float64, generator=seeded(1))
    adversary = replace(Adversary.fare(), start="zero")
    frozen = encode(x).detach()
    found = perturb(encode, lambda e: adversary.distance(e, frozen), x, adversary, seeded())
    assert not found.delta.any() and found.nan_gradients == 0
    assert perturb(encode, lambda e: adversary.distance(e, frozen), x, Adversary.fare(), seeded()).delta.any()


def test_inside_of_no_grad_and_autocast() -> None:
    x, encode = torch.rand(2, 3, 12, 12, generator=seeded(1)), network().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = perturb(encode, lambda e: e.float().square().sum(1), x, Adversary(), seeded())
        assert not torch.is_grad_enabled()
    assert found.delta.dtype == torch.float32 and found.delta.any() and found.nan_gradients == 0


def test_the_demo_models_embedding_is_moved_further_than_by_noise() -> None:
    model = clipfast.load("demo")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.spec.mean, model.spec.std))
    x = torch.rand(2, 3, 96, 96, generator=seeded(1))
    adversary = Adversary.fare()

    def encode(pixels: Tensor) -> Tensor:
        return F.normalize(model.module.encode_image((pixels - mean) / std), dim=-1)

    with torch.no_grad():
        clean = encode(x)
    before = {name: (p.requires_grad, p.grad) for name, p in model.module.named_parameters()}
    found = perturb(encode, lambda e: adversary.distance(e, clean), x, adversary, seeded())
    with torch.no_grad():
        attacked = adversary.distance(encode(x + found.delta), clean)
        shaken = adversary.distance(encode((x + adversary.eps * torch.randn_like(x).sign()).clamp(0, 1)), clean)
    assert (attacked > 3 * shaken).all()
    assert {name: (p.requires_grad, p.grad) for name, p in model.module.named_parameters()} == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"penalty": "l1"}, "penalty 'l1' is not known"),
        ({"recipe": "papers"}, "recipe 'papers' is not known; .*'?paper"),
        ({"direction": "signs"}, "direction 'signs' is not known; did you mean 'sign'"),
        ({"start": "random"}, "start 'random' is not known; known: zero, uniform"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"step_size": 0.0}, "step_size=0.0 must be above 0"),
        ({"sigma": -1.0}, "sigma=-1.0 and momentum=0.0 must be at least 0"),
        ({"momentum": math.nan}, "momentum=nan must be at least 0"),
        ({"eta": -1.0}, "eta=-1.0 of Huber must be above 0"),
        ({"penalty": "elastic_net", "eps2": 0.0}, "eps2=0.0 of ElasticNet must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Adversary(**changed)


def test_inputs_that_do_not_fit_are_refused() -> None:
    def run(x: Tensor, loss: Callable[[Tensor], Tensor] = lambda e: e.sum(1), **changed: Any) -> None:
        perturb(lambda p: p.flatten(1), loss, x, Adversary(**changed), seeded())

    x = torch.rand(2, 3, 6, 6)
    with pytest.raises(InputError, match=r"pixels in \[0, 1\], before the model's normalisation, not from -"):
        run(torch.linspace(-2, 2, 216).view(2, 3, 6, 6))
    with pytest.raises(InputError, match=r"pixels in \[0, 1\].* not from nan to nan"):
        run(torch.full((2, 3, 6, 6), torch.nan))
    with pytest.raises(InputError, match=r"must be \(B, 3, H, W\) of float32 or float64, not .* of torch.uint8"):
        run(torch.zeros(2, 3, 6, 6, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"not \(0, 3, 6, 6\)"):
        run(x[:0])
    with pytest.raises(InputError, match=r"one number for each of 2 images, not \(\)"):
        run(x, lambda e: e.sum())
    with pytest.raises(InputError, match="does not depend on the pixels"):
        run(x, lambda e: e.detach().sum(1))
    with pytest.raises(InputError, match="cell=14 must be from 1 to the image's shorter side, 6"):
        run(x, penalty="group_norm")
    with pytest.raises(InputError, match="the generator is on cpu, and the images on meta"):
        run(x.to("meta"))
