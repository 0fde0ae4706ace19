from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipfast.errors import BackendError, InputError
from clipfast.ops.dispatch import backend
from clipfast.ops.pgd_step import Slope, pgd_step

SLOPES = [
    Slope(),
    Slope(inner=0.25),
    Slope(inner=0.3, knee=0.01, outer=2.0, level=-0.017),
    Slope(knee=0.0, outer=5.0, level=-0.05),
    Slope(colour=0.02),
]


def step(delta: Tensor, velocity: Tensor | None, gradient: Tensor, image: Tensor, **changed: Any) -> int:
    """One step with settings that tests change one at a time; how many gradients were not finite."""
    given = {"slope": Slope(), "bound": "box", "radius": 0.02, "step_size": 0.005, "momentum": 0.9}
    given |= {"direction": "sign", "cell": 2} | changed
    count = torch.zeros((), dtype=torch.int64)
    pgd_step(delta, velocity, gradient, image, count, **given)
    return int(count)


def naive(
    delta: Any, velocity: Any, gradient: Any, image: Any, slope: Slope, bound: str, radius: float, direction: str
) -> tuple[Any, Any]:
    """One image's step by loops over Python's numbers; cells of 2 x 2."""
    channels, height, width = len(delta), len(delta[0]), len(delta[0][0])
    pixels = [(c, y, x) for c in range(channels) for y in range(height) for x in range(width)]

    def cell(c: int, y: int, x: int) -> Any:
        """The pixels that share a norm with this one; none in a cell that is not whole."""
        if bound != "group":
            return pixels
        if y // 2 * 2 + 2 > height or x // 2 * 2 + 2 > width:
            return []
        return [(c, y // 2 * 2 + i, x // 2 * 2 + j) for i in (0, 1) for j in (0, 1)]

    def directed(g: Any) -> Any:
        if direction == "sign":
            return {p: (g[p] > 0) - (g[p] < 0) for p in pixels}
        if direction == "gradient":
            return g
        norms = {p: math.sqrt(sum(g[q] ** 2 for q in cell(*p))) for p in pixels}
        return {p: g[p] / norms[p] if norms[p] else 0.0 for p in pixels}

    g = {}
    for c, y, x in pixels:
        v = delta[c][y][x]
        h = slope.inner * v if abs(v) <= slope.knee else math.copysign(1, v) * (slope.outer * abs(v) + slope.level)
        norm = math.sqrt(sum(delta[k][y][x] ** 2 for k in range(channels)))
        g[c, y, x] = gradient[c][y][x] - h - (slope.colour * v / norm if norm else 0.0)
    g = directed(g)
    if velocity is not None:
        g = directed({(c, y, x): 0.9 * velocity[c][y][x] + g[c, y, x] for c, y, x in pixels})
    moved = {(c, y, x): delta[c][y][x] + 0.005 * g[c, y, x] for c, y, x in pixels}
    if bound == "box":
        moved = {p: min(max(v, -radius), radius) for p, v in moved.items()}
    if bound == "group":
        norms = {p: math.sqrt(sum(moved[q] ** 2 for q in cell(*p))) for p in pixels}
        moved = {p: v * min(1, radius / max(norms[p], 1e-300)) if cell(*p) else 0.0 for p, v in moved.items()}
    for c, y, x in pixels:
        moved[c, y, x] = min(max(image[c][y][x] + moved[c, y, x], 0), 1) - image[c][y][x]

    def stacked(values: Any) -> Any:
        return torch.tensor([values[p] for p in pixels], dtype=torch.float64).view(channels, height, width)

    return stacked(moved), stacked(g)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 7), st.integers(2, 7)),
    slope=st.sampled_from(SLOPES),
    bound=st.sampled_from(["none", "box", "group"]),
    direction=st.sampled_from(["sign", "normalized", "gradient"]),
    moving=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_a_loop(
    sizes: tuple[int, int, int, int], slope: Slope, bound: str, direction: str, moving: bool, seed: int
) -> None:
    make = torch.Generator().manual_seed(seed)
    # Some pixels are black or white, and some perturbations are zero.
    image = torch.rand(sizes, generator=make, dtype=torch.float64).mul(1.4).sub(0.2).clamp(0, 1)
    delta = torch.randn(sizes, generator=make, dtype=torch.float64).mul(0.02) * (
        torch.rand(sizes, generator=make) > 0.2
    )
    delta = delta.clamp(-image, 1 - image)
    gradient = torch.randn(sizes, generator=make, dtype=torch.float64)
    velocity = torch.randn(sizes, generator=make, dtype=torch.float64) if moving else None
    lists = [[t[b].tolist() for t in (delta, gradient, image)] for b in range(sizes[0])]
    expected = [
        naive(d, None if velocity is None else velocity[b].tolist(), g, i, slope, bound, 0.02, direction)
        for b, (d, g, i) in enumerate(lists)
    ]
    assert step(delta, velocity, gradient, image, slope=slope, bound=bound, direction=direction) == 0
    for b, (moved, speed) in enumerate(expected):
        torch.testing.assert_close(delta[b], moved, rtol=1e-9, atol=1e-12)
        if velocity is not None:
            torch.testing.assert_close(velocity[b], speed, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bound", ["none", "box", "group"])
@pytest.mark.parametrize("direction", ["sign", "normalized", "gradient"])
def test_gradients_that_are_not_finite_move_nothing_and_are_counted(bound: str, direction: str) -> None:
    image, gradient = torch.rand(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    gradient[0, 0, 0, :2] = torch.tensor([torch.nan, torch.inf])
    gradient[1, 2, 4, 4] = -torch.inf
    repaired = gradient.nan_to_num(0.0, 0.0, 0.0)
    delta, velocity = torch.zeros(2, 2, 3, 5, 5)
    same, same_velocity = torch.zeros(2, 2, 3, 5, 5)
    assert step(delta, velocity, gradient, image, bound=bound, direction=direction) == 3
    assert step(same, same_velocity, repaired, image, bound=bound, direction=direction) == 0
    assert torch.equal(delta, same) and torch.equal(velocity, same_velocity)
    assert delta[0, 0, 0, :2].abs().max() == 0 and delta.abs().max() > 0


def test_the_count_grows_from_step_to_step() -> None:
    count = torch.tensor(5)
    gradient = torch.full((1, 3, 2, 2), torch.nan)
    for _ in range(2):
        pgd_step(
            torch.zeros(1, 3, 2, 2), None, gradient, torch.rand(1, 3, 2, 2), count, Slope(), "box", 1, 1, 0, "sign", 1
        )
    assert count == 5 + 2 * 12


@pytest.mark.parametrize("bound", ["box", "group"])
def test_groups_and_images_without_a_gradient_stay(bound: str) -> None:
    gradient = torch.zeros(2, 3, 4, 4)
    gradient[0, :, :2, :2] = torch.randn(3, 2, 2)
    delta, velocity = torch.zeros(2, 2, 3, 4, 4)
    assert step(delta, velocity, gradient, torch.full((2, 3, 4, 4), 0.5), bound=bound, direction="normalized") == 0
    assert delta[0, :, :2, :2].abs().min() > 0
    assert not delta[1].any() and not delta[0, :, 2:].any()


def test_the_image_and_the_perturbation_stay_exactly_within_pixels() -> None:
    image = torch.rand(4, 3, 50, 50).pow(3)
    image[0], image[1] = 0.0, 1.0
    delta = torch.zeros_like(image)
    for _ in range(5):
        step(delta, None, torch.randn_like(image), image)
        assert (image + delta).min() >= 0 and (image + delta).max() <= 1
        assert delta.abs().max() <= torch.tensor(0.02)
    assert delta[0].min() == 0 and delta[1].max() == 0


def test_gradients_of_any_dtype_and_layout() -> None:
    image, gradient = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4).bfloat16()
    delta, same = torch.zeros(2, 2, 3, 4, 4)
    channels_last = gradient.to(memory_format=torch.channels_last)
    step(delta, None, channels_last, image.to(memory_format=torch.channels_last), direction="gradient")
    step(same, None, gradient.float(), image, direction="gradient")
    assert torch.equal(delta, same) and delta.any()


def test_nothing_else_is_written_to() -> None:
    image, gradient = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    before = image.clone(), gradient.clone()
    whole = torch.full((4, 3, 4, 4), torch.nan)
    whole[1:3] = 0
    for bound in ("none", "box", "group"):
        for direction in ("sign", "normalized", "gradient"):
            step(whole[1:3], None, gradient, image, bound=bound, direction=direction)
    assert whole[[0, 3]].isnan().all() and not whole[1:3].isnan().any()
    assert torch.equal(image, before[0]) and torch.equal(gradient, before[1])
    step(torch.zeros(0, 3, 4, 4), None, gradient[:0], image[:0])


def test_what_does_not_fit_is_refused() -> None:
    ones = torch.ones(2, 3, 4, 4)
    with pytest.raises(InputError, match="direction 'signed' of pgd_step is not known; did you mean 'sign'"):
        step(ones.clone(), None, ones, ones, direction="signed")
    with pytest.raises(InputError, match="bound 'sphere' of pgd_step is not known; known: none, box, group"):
        step(ones.clone(), None, ones, ones, bound="sphere")
    with pytest.raises(InputError, match=r"\(2, 3, 4, 4\) and \(3, 4, 4\) and"):
        step(ones.clone(), None, ones[0], ones)
    with pytest.raises(InputError, match="on cpu and meta"):
        step(ones.clone(), None, ones.to("meta"), ones)
    with pytest.raises(InputError, match="half precision loses steps"):
        step(ones.half(), None, ones, ones)
    with pytest.raises(InputError, match="must be contiguous"):
        step(ones.mT, None, ones, ones)
    with pytest.raises(InputError, match=r"count must be one int64 number, not \(2,\)"):
        pgd_step(ones, None, ones, ones, torch.zeros(2, dtype=torch.int64), Slope(), "box", 1, 1, 0, "sign", 1)
    with pytest.raises(InputError, match="cell=5 must be from 1 to the image's shorter side, 4"):
        step(ones.clone(), None, ones, ones, bound="group", cell=5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here Triton may run")
def test_triton_says_why_it_cannot() -> None:
    ones = torch.ones(1, 3, 80, 80)
    with backend("triton"):
        with pytest.raises(BackendError, match=r"delta is on cpu, not on cuda.*needs the whole image first"):
            step(ones.clone(), None, ones, ones, direction="normalized")
        with pytest.raises(BackendError, match="this penalty couples channels; a cell of 65 pixels is larger than 64"):
            step(ones.clone(), None, ones, ones, bound="group", cell=65, slope=Slope(colour=1.0))
        with pytest.raises(BackendError, match="delta is float64, not float32"):
            step(ones.double(), None, ones, ones.double())


def test_torch_library_knows_it() -> None:
    delta, velocity, gradient, image = torch.rand(4, 2, 3, 4, 4)
    count = torch.zeros((), dtype=torch.int64)
    arguments = (gradient, image, count, [0.1, math.inf, 0.0, 0.0, 0.0], "group", 0.1, 0.01, 0.9, "normalized", 2)
    torch.library.opcheck(torch.ops.clipfast.pgd_step.default, (delta, velocity, *arguments))
    torch.library.opcheck(torch.ops.clipfast.pgd_step.default, (delta, None, *arguments))


def test_it_compiles_whole() -> None:
    def ascend(delta: Tensor, gradient: Tensor, image: Tensor) -> Tensor:
        count = torch.zeros((), dtype=torch.int64)
        delta = delta.clone()
        pgd_step(delta, None, gradient.sin(), image, count, list(Slope(inner=0.5)), "box", 0.1, 0.01, 0.0, "sign", 1)
        return delta + count

    inputs = torch.zeros(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    compiled = torch.compile(ascend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), ascend(*inputs))
