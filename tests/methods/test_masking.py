"""Packed passes, and words taken out of texts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clipfast.methods.masking import (
    Coalitions,
    encode_images,
    encode_pairs,
    every_pair,
    every_subset,
    explain_words,
    merge_repeated,
)
from clipfast.models import tower as towers
from clipfast.models.openclip import image_tower, text_tower

SOT, EOT = 298, 299


@pytest.mark.parametrize("room", [1, 40, 85, 10_000])
def test_passes_are_full_and_in_order(build_clip, monkeypatch, room):
    monkeypatch.setattr(towers, "CPU_TOKENS", room)
    tower = image_tower(build_clip().double())
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    factors = torch.rand(7, dtype=torch.float64)
    passes = []

    def masked(images, masks):
        passes.append(len(images))
        return x[images] * factors[masks, None, None, None]

    z = encode_images(tower, x, *every_pair(3, 7), masked)
    expected = torch.stack([tower.encode(x * factor) for factor in factors])
    torch.testing.assert_close(z.unflatten(0, (7, 3)), expected, rtol=0, atol=1e-12)
    # 17 tokens an image: all passes but the last are of one size.
    assert passes[0] == min(21, max(1, room // 17)) and set(passes[:-1]) <= {passes[0]} and sum(passes) == 21


def test_any_pairs_may_be_asked_for(build_clip):
    tower = image_tower(build_clip().double())
    inputs, masks = torch.tensor([2, 0, 0]), torch.tensor([5, 1, 4])
    rows = torch.randn(6, 24, dtype=torch.float64)
    found = encode_pairs(tower, 400, inputs, masks, lambda i, m: rows[i] + 10 * rows[m])
    assert torch.equal(found, rows[inputs] + 10 * rows[masks])


def test_subsets_and_repetitions():
    subsets = every_subset(3)
    assert {tuple(row) for row in subsets.int().tolist()} == {(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)}
    assert len(subsets) == 8
    members, counts = merge_repeated(torch.cat((subsets, subsets[:3], subsets[:1])))
    assert len(members) == 8 and counts.sum() == 12
    assert counts[(members == subsets[0]).all(1)] == 3


def test_words_leave_the_text_whole(build_clip):
    """Each coalition's score is that of the text written without the other words' tokens."""
    model = build_clip().double()
    tower = text_tower(model)
    # Words of one, two and one pieces; a text that fills its row; none of the numbers in order of the ids.
    ids = torch.tensor([[SOT, 5, 7, 9, 33, EOT, 0, 0, 0], [SOT, 50, 3, 3, 8, 12, 40, 41, EOT]])
    words = torch.tensor([[0, 1, 2, 2, 3, 0, 0, 0, 0], [0, 1, 2, 3, 3, 4, 4, 4, 0]])
    image = F.normalize(torch.randn(24, dtype=torch.float64), dim=-1)
    shares = {}

    def coalitions(count):
        members = every_subset(count)
        shares[count] = torch.randn(count, len(members), dtype=torch.float64)
        return Coalitions(members, shares[count])

    explained = explain_words(tower, ids, words, coalitions)
    maps = explained.maps(image[None])[:, 0]
    for row, word, found, own, count in zip(ids, words, maps, explained.values, (3, 4), strict=True):
        scores = []
        for members in every_subset(count).tolist():
            kept = [int(i) for i, w in zip(row, word, strict=True) if i != 0 and (w == 0 or members[w - 1])]
            text = torch.tensor([kept + [0] * (20 - len(kept))])
            scores.append(F.normalize(model.encode_text(text), dim=-1)[0] @ image)
        values = shares[count] @ torch.stack(scores).detach()
        for k in range(1, count + 1):
            pieces = found[word == k]
            torch.testing.assert_close(pieces.sum(), values[k - 1], rtol=0, atol=1e-10)
            # Alike to the last bit, which their product with the image need not be: it is up to a row's place.
            assert (own[word == k] == own[word == k][0]).all()
            torch.testing.assert_close(pieces, pieces[:1].expand_as(pieces), rtol=1e-14, atol=1e-15)
        assert (found[word == 0] == 0).all()


def test_booleans_are_words_of_one_token(build_clip):
    tower = text_tower(build_clip().double())
    ids = torch.tensor([[SOT, 5, 7, 9, EOT, 0]])

    def coalitions(count):
        return Coalitions(every_subset(count), torch.arange(count * 2**count).view(count, -1).double())

    found = explain_words(tower, ids, (ids > 0) & (ids < SOT), coalitions)
    numbered = explain_words(tower, ids, torch.tensor([[0, 1, 2, 3, 0, 0]]), coalitions)
    assert torch.equal(found.values, numbered.values) and found.values.abs().max() > 0
