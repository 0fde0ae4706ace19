from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipfast.errors import InputError
from clipfast.finetune.penalties import (
    Box,
    ElasticNet,
    GroupNorm,
    Huber,
    Penalty,
    ReleasedElasticNet,
    ReleasedGroupNorm,
    ReleasedHuber,
    penalty,
)

EPS, ETA = 4 / 255, 1 / 255
PAPER: list[Penalty] = [Box(EPS), Huber(EPS, ETA), ElasticNet(EPS, ETA, 0.3), GroupNorm(EPS, ETA, 3)]
RELEASED: list[Penalty] = [ReleasedHuber(EPS, ETA), ReleasedElasticNet(EPS, 0.3), ReleasedGroupNorm(EPS, 3)]
EVERY = pytest.mark.parametrize("h", PAPER + RELEASED, ids=lambda h: type(h).__name__)
OF_PAPER = pytest.mark.parametrize("h", PAPER, ids=lambda h: type(h).__name__)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def gradients(*shape: int) -> Tensor:
    """Input gradients around eta and the released penalty's much smaller slope, from 1e-2 to 1e2 of them; some zero."""
    u = torch.randn(shape, dtype=torch.float64) * ETA * 10 ** torch.empty(shape[0], 1, *shape[2:]).uniform_(-3, 1.5)
    u[0, :, 0] = 0
    return u


def inner(u: Tensor, delta: Tensor) -> Tensor:
    return (u * delta).flatten(1).sum(1)


@EVERY
def test_the_maximiser_attains_the_conjugate_and_projected_ascent_does_not_pass_it(h: Penalty) -> None:
    u = gradients(4, 3, 6, 7)
    best = h.maximiser(u)
    attained = inner(u, best) - h.value(best)
    torch.testing.assert_close(attained, h.conjugate(u), rtol=1e-9, atol=1e-12)

    slope = h.slope(42)
    curvature = max(slope.inner, slope.outer, 1e-2)
    # What is published as elastic is lowest away from zero, and zero itself is a stationary point.
    delta = torch.where(u < 0, -1e-6, 1e-6).to(u)
    for k in range(3000):
        # A colour's pull has a corner at zero: there only steps that become smaller settle.
        step = 1 / curvature if not slope.colour else 30 * 0.995**k
        delta = h.project(delta + step * (u - h.gradient(delta)))
    reached = inner(u, delta) - h.value(delta)
    assert (reached <= attained * (1 + 1e-9)).all()
    torch.testing.assert_close(reached, attained, rtol=1e-4, atol=0)


@EVERY
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), height=st.integers(3, 7), width=st.integers(3, 7), scale=st.floats(0.01, 3))
def test_fenchel_young(h: Penalty, seed: int, height: int, width: int, scale: float) -> None:
    torch.manual_seed(seed)
    u = gradients(2, 3, height, width)
    delta = h.project(scale * EPS * torch.randn_like(u))
    assert (h.value(delta) + h.conjugate(u) >= inner(u, delta) - 1e-12).all()


@pytest.mark.parametrize("h", PAPER[1:], ids=lambda h: type(h).__name__)
def test_the_penalty_is_the_conjugate_of_its_conjugate(h: Penalty) -> None:
    delta = h.project(EPS * torch.randn(2, 3, 6, 6, dtype=torch.float64)) * 0.95
    # In units of eta, where the problem has its natural size; not from zero, where a norm has no derivative.
    u = (0.1 * torch.randn_like(delta)).requires_grad_()
    optimizer = torch.optim.LBFGS([u], max_iter=2000, tolerance_grad=1e-13, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (h.conjugate(u * ETA) - inner(u * ETA, delta)).sum() / ETA
        loss.backward()
        return loss

    optimizer.step(closure)
    biconjugate = inner(u.detach() * ETA, delta) - h.conjugate(u.detach() * ETA)
    torch.testing.assert_close(biconjugate, h.value(delta), rtol=1e-7, atol=1e-14)


@OF_PAPER
def test_outside_of_its_set_the_biconjugate_is_infinite_as_the_penalty_is(h: Penalty) -> None:
    outside = torch.full((1, 2, 3, 3), 1.01 * EPS, dtype=torch.float64)
    # Far out along the way from the set to the point <u, delta> - h*(u) keeps growing, but for an elastic net.
    away = outside - h.project(outside)
    if h.bound == "none":
        assert not away.any() and h.value(outside).isfinite().all()
        return
    assert h.value(outside).isinf().all() and h.value(h.project(outside)).isfinite().all()
    values = [float(inner(t * away, outside) - h.conjugate(t * away)) for t in (1e3, 1e5, 1e7)]
    assert values[0] < values[1] < values[2] and values[2] > 1


@EVERY
def test_the_maximiser_is_the_derivative_of_the_conjugate(h: Penalty) -> None:
    u = gradients(3, 3, 6, 6)[:, :, 1:].clone().requires_grad_()
    (found,) = torch.autograd.grad(h.conjugate(u).sum(), u)
    torch.testing.assert_close(found, h.maximiser(u.detach()), rtol=1e-6, atol=1e-10)


@EVERY
def test_the_gradient_agrees_with_finite_differences(h: Penalty) -> None:
    delta = h.project(2 * EPS * torch.randn(1, 3, 4, 5, dtype=torch.float64))
    found, tiny = h.gradient(delta), 1e-8
    for index in [(0, c, y, x) for c in range(3) for y in range(4) for x in range(5)]:
        shift = torch.zeros_like(delta)
        shift[index] = tiny
        difference = float(h.formula(delta + shift) - h.formula(delta - shift)) / (2 * tiny)
        assert difference == pytest.approx(float(found[index]), rel=1e-5, abs=1e-8)


@EVERY
def test_gradients_at_zero_are_zero(h: Penalty) -> None:
    assert not h.gradient(torch.zeros(2, 3, 6, 6)).any()


@EVERY
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    height=st.integers(3, 8),
    width=st.integers(3, 8),
    scale=st.floats(0, 10),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_projections(h: Penalty, seed: int, height: int, width: int, scale: float, dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(seed)
    delta, other = scale * EPS * torch.randn(2, 2, 3, height, width, generator=make, dtype=dtype)
    projected, inside = h.project(delta), h.project(other)
    assert h.contains(projected).all() and h.value(projected).isfinite().all()
    torch.testing.assert_close(h.project(projected), projected, rtol=1e-6, atol=0)
    # Nearest in a convex set: no way from it into the set leads towards the point.
    assert (inner(delta - projected, inside - projected) <= 1e-6 * EPS).all()
    if h.contains(delta).all():
        torch.testing.assert_close(projected, delta, rtol=1e-5, atol=1e-9)


def test_groups_are_squares_of_one_channel_and_leave_a_rest() -> None:
    h = GroupNorm(EPS, ETA, cell=2)
    u = torch.ones(1, 2, 5, 4)
    delta = h.project(u)
    assert not delta[:, :, 4].any()
    torch.testing.assert_close(delta[0, 0, :2, :2], torch.full((2, 2), EPS / 2))
    assert not h.maximiser(u)[:, :, 4].any()
    torch.testing.assert_close(h.conjugate(u), torch.tensor([8 * EPS * (2 - ETA / 2)]))
    u[0, 1] = 0
    torch.testing.assert_close(h.conjugate(u), torch.tensor([4 * EPS * (2 - ETA / 2)]))
    assert not h.maximiser(u)[0, 1].any() and not h.maximiser(u).isnan().any()
    assert h.value(torch.where(torch.arange(5)[:, None] == 4, 1e-3, torch.zeros(1, 2, 5, 4))).isinf().all()


def test_huber_by_hand() -> None:
    h = Huber(0.5, 0.25)
    u = torch.tensor([0.1, -0.25, 1.0]).view(3, 1, 1, 1)
    torch.testing.assert_close(h.maximiser(u).flatten(), torch.tensor([0.2, -0.5, 0.5]))
    torch.testing.assert_close(h.conjugate(u), torch.tensor([0.5 * 0.02, 0.5 * 0.125, 0.5 * 0.875]))
    assert h.value(torch.full((1, 3, 2, 2), 0.5)).tolist() == [0.25 * 12 * 0.25]


def test_what_is_published_as_huber_is_not_the_papers() -> None:
    """A norm of each colour, neither squared nor halved, averaged over pixels (loops over pixels here)."""
    delta = EPS * torch.rand(2, 3, 4, 5, dtype=torch.float64)
    expected = [
        ETA
        / EPS
        * sum(math.sqrt(sum(float(d[c, y, x]) ** 2 for c in range(3))) for y in range(4) for x in range(5))
        / 20
        for d in delta
    ]
    assert ReleasedHuber(EPS, ETA).formula(delta).tolist() == pytest.approx(expected)
    far = delta.new_full((1, 3, 224, 224), 1 / 255)
    assert Huber(EPS, ETA).gradient(far).max() / ReleasedHuber(EPS, ETA).gradient(far).max() > 100


def test_what_is_published_as_elastic_clamps_after_the_square() -> None:
    delta = 3 * EPS * torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = [0.25 / 0.3 * sum(max((abs(v) - EPS) ** 2, 0) for v in d.flatten().tolist()) for d in delta]
    assert ReleasedElasticNet(EPS, 0.3).value(delta).tolist() == pytest.approx(expected)


def test_names_and_recipes() -> None:
    numbers = {"eps": EPS, "eta": ETA, "eps2": 0.3, "cell": 3}
    assert [penalty(n, "paper", **numbers) for n in ("none", "huber", "elastic_net", "group_norm")] == PAPER
    released = [penalty(n, "released", **numbers) for n in ("huber", "elastic_net", "group_norm", "none")]
    assert released == [*RELEASED, Box(EPS)]
    with pytest.raises(InputError, match="penalty 'hubert' is not known; did you mean 'huber'"):
        penalty("hubert", "paper", **numbers)
    with pytest.raises(InputError, match="recipe 'publised' is not known; known: paper, released"):
        penalty("huber", "publised", **numbers)
    with pytest.raises(InputError, match=r"eta=0.0 of Huber must be above 0"):
        penalty("huber", "paper", **numbers | {"eta": 0.0})
    with pytest.raises(InputError, match=r"eps=nan of Box must be above 0"):
        Box(math.nan)
