"""Kernel SHAP against Shapley values from their definition, plain weighted regression, and captum."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import KernelShap as CaptumKernelShap

from clipfast.errors import InputError
from clipfast.methods.kernel_shap import KernelShap
from clipfast.models import tower as towers
from clipfast.models.openclip import image_tower, text_tower
from clipfast.models.resnet import resnet_tower


def pixels_of(player, grid, patch):
    """Which player each pixel belongs to."""
    return player.view(grid).repeat_interleave(patch, 0).repeat_interleave(patch, 1)


def score(model, x, text):
    with torch.no_grad():
        return F.normalize(model.encode_image(x), dim=-1) @ text


def shapley(value, players):
    """The mean gain over the sets of the others, from the definition."""
    phi = np.zeros(players)
    for i in range(players):
        others = [j for j in range(players) if j != i]
        for size in range(players):
            weight = math.factorial(size) * math.factorial(players - size - 1) / math.factorial(players)
            for some in itertools.combinations(others, size):
                phi[i] += weight * (value({*some, i}) - value(set(some)))
    return torch.from_numpy(phi)


@pytest.mark.parametrize(
    ("size", "players", "patch"), [((64, 64), 2, 16), ((48, 80), 7, 24), ((48, 80), 2, 16), ((64, 64), 2, None)]
)
def test_few_players_get_shapley_values(build_clip, build_resnet, size, players, patch):
    if patch is None:
        model = build_resnet(image_size=64, width=4).double()
        tower = resnet_tower(model)
    else:
        model = build_clip(image_size=size, patch_size=patch).double()
        tower = image_tower(model)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    texts = F.normalize(torch.randn(2, 24, dtype=torch.float64), dim=-1)
    method = KernelShap(players=players)
    grid = tower.grid_of(x)
    player = method.players_of(grid)
    count = int(player.max()) + 1
    assert count == min(players, grid[0]) * min(players, grid[1]) and 2**count <= 1000
    maps = method.image(tower, x).maps(texts)
    pixels = pixels_of(player, grid, tower.patch_size[0])
    x = x[..., : pixels.shape[0], : pixels.shape[1]]
    for b in range(2):
        for t in range(2):
            known = {}

            def value(some, b=b, t=t, known=known):
                key = frozenset(some)
                if key not in known:
                    mask = torch.isin(pixels, torch.tensor(sorted(some), dtype=torch.long))
                    known[key] = float(score(model, full(x[b : b + 1] * mask, size), texts[t]))
                return known[key]

            phi = shapley(value, count)
            for k in range(count):
                found = maps[b, t, player == k]
                torch.testing.assert_close(found.sum(), phi[k], rtol=0, atol=1e-10)
                assert (found - found[0]).abs().max() < 1e-15
            torch.testing.assert_close(
                maps[b, t].sum().item(), value(set(range(count))) - value(set()), rtol=0, atol=1e-10
            )


def full(x, size):
    """Zeros where the picture is larger than its whole patches."""
    return F.pad(x, (0, size[1] - x.shape[-1], 0, size[0] - x.shape[-2]))


def test_sampled_values_are_the_weighted_regression(build_clip):
    """Least squares with none and all held by a weight that leaves no play; in float64, with no elimination."""
    model = build_clip().double()
    tower, x = image_tower(model), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    texts = F.normalize(torch.randn(3, 24, dtype=torch.float64), dim=-1)
    method = KernelShap(samples=60, players=4, seed=5)
    maps = method.image(tower, x).maps(texts)
    drawn = method._draw(16)
    assert drawn.shape == (60, 16) and not drawn[0].any() and drawn[1].all()
    pixels = pixels_of(method.players_of((4, 4)), (4, 4), 16)
    design = np.concatenate((np.ones((60, 1)), drawn.numpy()), 1)
    root = np.where(np.arange(60) < 2, 1e6, 1.0)
    for b in range(2):
        masked = torch.cat([x[b : b + 1] * torch.isin(pixels, m.nonzero()[:, 0]) for m in drawn])
        for t in range(3):
            scores = score(model, masked, texts[t]).numpy()
            fit = np.linalg.lstsq(design * root[:, None], scores * root, rcond=None)[0]
            torch.testing.assert_close(maps[b, t], torch.from_numpy(fit[1:]), rtol=0, atol=1e-9)
            np.testing.assert_allclose(float(maps[b, t].sum()), scores[1] - scores[0], rtol=0, atol=1e-12)


def test_values_are_captums(build_clip):
    """captum, as released, with our coalitions in the place of its own.

    It computes in float32, and its weight of 1e6 for none and all moves values by about samples / 1e8.
    """
    model = build_clip().double()
    tower, x = image_tower(model), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    texts = F.normalize(torch.randn(2, 24, dtype=torch.float64), dim=-1)
    method = KernelShap(samples=100, players=4, seed=2)
    maps = method.image(tower, x).maps(texts)
    pixels = pixels_of(method.players_of((4, 4)), (4, 4), 16)

    def ours(inputs, **kwargs):
        for members in method._draw(16):
            yield members[None].long()

    captum = CaptumKernelShap(lambda y, t: score(model, y, texts[t]))
    captum.perturb_func = ours
    for b in range(2):
        for t in range(2):
            found = captum.attribute(
                x[b : b + 1],
                additional_forward_args=(t,),
                feature_mask=pixels[None, None].expand(1, 3, -1, -1),
                n_samples=100,
                perturbations_per_eval=50,
                return_input_shape=False,
            )[0]
            error = (found - maps[b, t]).norm() / maps[b, t].norm()
            assert error < 1e-5


def test_sizes_are_drawn_from_the_kernel():
    drawn = KernelShap(samples=20_002)._draw(6)[2:]
    sizes = drawn.sum(-1).bincount(minlength=7).double() / 20_000
    expected = torch.tensor([0] + [1 / (k * (6 - k)) for k in range(1, 6)] + [0], dtype=torch.float64)
    torch.testing.assert_close(sizes, expected / expected.sum(), rtol=0, atol=0.015)
    torch.testing.assert_close(drawn.double().mean(0), torch.full((6,), 0.5, dtype=torch.float64), rtol=0, atol=0.02)


def test_samples_come_close_to_the_exact_values(build_clip):
    tower, x = image_tower(build_clip().double()), torch.randn(1, 3, 48, 64, dtype=torch.float64)
    text = F.normalize(torch.randn(1, 24, dtype=torch.float64), dim=-1)
    exact = KernelShap(samples=4096).image(tower, x).maps(text)
    errors = [(KernelShap(samples=n).image(tower, x).maps(text) - exact).norm() / exact.norm() for n in (40, 400, 3000)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.1


@pytest.mark.parametrize("room", [20, 60])
def test_a_seed_gives_the_same_maps_at_any_size_of_batch(build_clip, monkeypatch, room):
    tower = image_tower(build_clip().double())
    x = torch.randn(5, 3, 64, 64, dtype=torch.float64)
    texts = F.normalize(torch.randn(2, 24, dtype=torch.float64), dim=-1)
    expected = KernelShap(samples=50, seed=3).image(tower, x).maps(texts)
    monkeypatch.setattr(towers, "CPU_TOKENS", room)
    for rows in ([0], [4, 1], [2, 3, 0]):
        found = KernelShap(samples=50, seed=3).image(tower, x[rows]).maps(texts)
        torch.testing.assert_close(found, expected[rows], rtol=0, atol=1e-12)
    assert (KernelShap(samples=50, seed=4).image(tower, x[:1]).maps(texts) - expected[:1]).abs().max() > 1e-4


def test_words_are_players(build_clip):
    model = build_clip().double()
    images = F.normalize(torch.randn(2, 24, dtype=torch.float64), dim=-1)
    ids = torch.tensor([[298, 5, 7, 9, 33, 18, 299, 0], [298, 50, 299, 0, 0, 0, 0, 0]])
    words = torch.tensor([[0, 1, 2, 2, 3, 4, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]])
    maps = KernelShap().text(text_tower(model), ids, words).maps(images)
    for b in range(2):
        for t in range(2):

            def value(some, b=b, t=t):
                row = zip(ids[b].tolist(), words[b].tolist(), strict=True)
                kept = [i for i, w in row if i > 0 and (w == 0 or w - 1 in some)]
                text = torch.tensor([kept + [0] * (20 - len(kept))])
                return float(F.normalize(model.encode_text(text), dim=-1)[0].detach() @ images[t])

            count = int(words[b].max())
            for k, phi in enumerate(shapley(value, count), start=1):
                found = maps[b, t, words[b, : maps.shape[-1]] == k]
                torch.testing.assert_close(found.sum(), phi, rtol=0, atol=1e-10)


def test_players_cover_the_grid_evenly():
    player = KernelShap().players_of((14, 14)).view(14, 14)
    assert player.unique().numel() == 49 and (player.flatten().bincount() == 4).all()
    assert KernelShap().players_of((3, 16)).bincount().tolist() == [3, 2, 2, 3, 2, 2, 2] * 3


@pytest.mark.parametrize(
    ("parameters", "message"),
    [({"samples": 1}, "samples=1"), ({"players": 0}, "players=0"), ({"seed": 0.5}, "seed=0.5")],
)
def test_bad_parameters(parameters, message):
    with pytest.raises(InputError, match=message):
        KernelShap(**parameters)


def test_fewer_samples_than_players(build_clip):
    with pytest.raises(InputError, match="samples=10 cannot tell 16 players apart: give at least 17"):
        KernelShap(samples=10).image(image_tower(build_clip()), torch.randn(1, 3, 64, 64))
