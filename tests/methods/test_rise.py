"""RISE against the authors' recipe, mask by mask, through the model itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from clipfast.errors import InputError
from clipfast.methods.masking import every_subset
from clipfast.methods.rise import Rise
from clipfast.models import tower as towers
from clipfast.models.openclip import image_tower, text_tower
from clipfast.models.resnet import resnet_tower


def authors_masks(grids, shifts, size):
    """As the authors make them: each grid resized by spline interpolation of order one, then cropped."""
    cells = grids.shape[1]
    cell = np.ceil(np.array(size) / cells).astype(int)
    zoom = (cells + 1) * cell / cells
    masks = []
    for grid, (top, left) in zip(grids.double().numpy(), shifts.tolist(), strict=True):
        up = ndimage.zoom(grid, zoom, order=1, mode="mirror", grid_mode=True)
        assert up.shape == tuple((cells + 1) * cell)
        masks.append(up[top : top + size[0], left : left + size[1]])
    return torch.from_numpy(np.stack(masks))


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (50, 67)], ids=["square", "wide", "ragged"])
@pytest.mark.parametrize(("cells", "p"), [(8, 0.5), (3, 0.2)])
def test_maps_are_the_authors(build_clip, size, cells, p):
    model = build_clip(image_size=size, quick_gelu=True).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    texts = F.normalize(torch.randn(3, 24, dtype=torch.float64), dim=-1)
    method = Rise(masks=30, cells=cells, p=p)
    drawn = method.draw(size)
    masks = authors_masks(drawn.grids, drawn.shifts, size)
    assert masks.shape == (30, *size) and (drawn.shifts.amax(0) > 0).all()
    torch.testing.assert_close(drawn(0, 30, masks), masks, rtol=0, atol=1e-12)
    expected = torch.zeros(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        for b in range(2):
            for t in range(3):
                for mask in masks:
                    score = F.normalize(model.encode_image(x[b : b + 1] * mask), dim=-1)[0] @ texts[t]
                    expected[b, t] += score * mask / (30 * p)
    explained = method.image(image_tower(model), x)
    torch.testing.assert_close(explained.maps(texts), expected.flatten(2), rtol=0, atol=1e-10)
    own = torch.stack((texts[[1, 0]], texts[[2, 2]]))
    torch.testing.assert_close(
        explained.maps(own), torch.stack((expected[0, [1, 0]], expected[1, [2, 2]])).flatten(2), rtol=0, atol=1e-10
    )
    values, weights = explained.prompt_free()
    torch.testing.assert_close((texts @ values.mT) * weights[:, None], expected.flatten(2), rtol=0, atol=1e-10)
    assert method.grid(image_tower(model), size) == size


def test_resnets(build_resnet):
    model = build_resnet(image_size=64, width=4).double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    text = F.normalize(torch.randn(24, dtype=torch.float64), dim=-1)
    method = Rise(masks=5)
    masks = method.draw((64, 64))(0, 5, x)
    with torch.no_grad():
        scores = F.normalize(model.encode_image(x * masks[:, None]), dim=-1) @ text
    found = method.image(resnet_tower(model), x).maps(text[None])[0, 0]
    torch.testing.assert_close(found, (scores[:, None, None] * masks / 0.5).mean(0).flatten(), rtol=0, atol=1e-10)


def test_cells_are_kept_with_their_probability():
    for p in (0.1, 0.5):
        drawn = Rise(masks=4000, cells=8, p=p).draw((224, 224))
        assert abs(drawn.grids.double().mean() - p) < 4 * (p * (1 - p) / 4000 / 64) ** 0.5
        assert drawn.shifts.amin() == 0 and drawn.shifts.amax() == 27


@pytest.mark.parametrize("room", [20, 60, 10_000])
def test_a_seed_gives_the_same_maps_at_any_size_of_batch(build_clip, monkeypatch, room):
    tower = image_tower(build_clip().double())
    x = torch.randn(5, 3, 64, 64, dtype=torch.float64)
    texts = F.normalize(torch.randn(2, 24, dtype=torch.float64), dim=-1)
    expected = Rise(masks=70, seed=3).image(tower, x).maps(texts)
    monkeypatch.setattr(towers, "CPU_TOKENS", room)
    for rows in ([0], [4, 1], [2, 3, 0]):
        found = Rise(masks=70, seed=3).image(tower, x[rows]).maps(texts)
        torch.testing.assert_close(found, expected[rows], rtol=0, atol=1e-12)
    assert (Rise(masks=70, seed=4).image(tower, x[:1]).maps(texts) - expected[:1]).abs().max() > 1e-3


def test_half_precision_masks(build_clip):
    x = torch.randn(2, 3, 64, 64)
    texts = F.normalize(torch.randn(2, 24), dim=-1)
    exact = Rise(masks=40).image(image_tower(build_clip().double()), x.double()).maps(texts.double())
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        found = Rise(masks=40).image(image_tower(build_clip(), dtype), x.to(dtype)).maps(texts)
        assert found.dtype == torch.float32
        assert (found - exact).norm() / exact.norm() < tolerance


IDS = torch.tensor([[298, 5, 7, 9, 33, 299, 0], [298, 50, 12, 299, 0, 0, 0]])
WORDS = torch.tensor([[0, 1, 2, 2, 3, 0, 0], [0, 1, 2, 0, 0, 0, 0]])


def naive_words(model, image, row, word, members):
    """The score of a text from which the words that are not members are gone."""
    kept = [int(i) for i, w in zip(row, word, strict=True) if i > 0 and (w == 0 or members[w - 1])]
    text = torch.tensor([kept + [0] * (20 - len(kept))])
    return (F.normalize(model.encode_text(text), dim=-1)[0] @ image).detach()


def test_few_words_get_the_exact_mean(build_clip):
    model = build_clip().double()
    image = F.normalize(torch.randn(24, dtype=torch.float64), dim=-1)
    p = 0.3
    maps = Rise(masks=8, p=p).text(text_tower(model), IDS, WORDS).maps(image[None])[:, 0]
    for row, word, found in zip(IDS, WORDS, maps, strict=True):
        count = int(word.max())
        values = torch.zeros(count, dtype=torch.float64)
        for members in every_subset(count).tolist():
            probability = p ** sum(members) * (1 - p) ** (count - sum(members))
            score = naive_words(model, image, row, word, members)
            values += probability * score / p * torch.tensor(members)
        for k in range(count):
            torch.testing.assert_close(found[: len(word)][word[: len(found)] == k + 1].sum(), values[k])


def test_many_words_are_sampled(build_clip):
    """Twelve words have more sets than masks: as drawn, and closer to the exact mean the more there are."""
    model = build_clip().double()
    tower, image = text_tower(model), F.normalize(torch.randn(1, 24, dtype=torch.float64), dim=-1)
    ids = torch.tensor([[298, *range(5, 17), 299]])
    words = torch.tensor([[0, *range(1, 13), 0]])
    exact = Rise(masks=4096).text(tower, ids, words).maps(image)[0, 0, 1:13]
    errors = []
    for masks in (100, 4000):
        drawn = torch.rand(masks, 12, generator=torch.Generator().manual_seed(7), dtype=torch.float64) < 0.5
        scores = torch.stack([naive_words(model, image[0], ids[0], words[0], m) for m in drawn.tolist()[:100]])
        found = Rise(masks=masks, seed=7).text(tower, ids, words).maps(image)[0, 0, 1:13]
        errors.append((found - exact).norm())
        if masks == 100:
            naive = (scores[:, None] * drawn / 0.5).mean(0)
            torch.testing.assert_close(found, naive, rtol=0, atol=1e-10)
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"masks": 0}, "masks=0"),
        ({"cells": 1}, "cells=1"),
        ({"p": 0.0}, "between 0 and 1"),
        ({"p": 1}, "between 0 and 1"),
        ({"p": "half"}, "must be a number"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_parameters(parameters, message):
    with pytest.raises(InputError, match=message):
        Rise(**parameters)
