"""The pasted word: its plate, and the shares and scores that come of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from clipfast import Explainer
from clipfast.data.scenes import render
from clipfast.errors import InputError
from clipfast.metrics import paste_word, typographic


@pytest.mark.parametrize("size", [(96, 96), (200, 120), (61, 240)])
@pytest.mark.parametrize("at", [(0.5, 0.5), (0, 1), (1, 0)])
def test_the_plate_is_all_that_changes(size, at) -> None:
    clean = Image.new("RGB", size, (10, 120, 60))
    pasted, (left, top, right, bottom) = paste_word(clean, "boat", at=at)
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    changed = (np.asarray(pasted) != np.asarray(clean)).any(-1)
    assert changed[top:bottom, left:right].all()
    changed[top:bottom, left:right] = False
    assert not changed.any()
    assert (np.asarray(pasted)[top:bottom, left:right] < 100).all(-1).any(), "no ink on the plate"
    assert clean.getpixel((0, 0)) == (10, 120, 60)


def test_shares_and_moves_are_those_of_the_two_explanations() -> None:
    pictures = [Image.fromarray(render(seed, size=96, objects=2).image) for seed in (3, 4)]
    explainer = Explainer("demo")
    found = typographic(explainer, pictures, ["dog", "boat", "car"], ["boat", "car"], at=(0.3, 0.2), width=0.4)
    for i, word in enumerate(("boat", "car")):
        pasted, box = paste_word(pictures[i], word, at=(0.3, 0.2), width=0.4)
        left, top, right, bottom = box
        assert found.boxes[i] == box
        alone = explainer(pasted, ["dog", "boat", "car"])
        torch.testing.assert_close(found.after.scores[i], alone.scores[0])
        torch.testing.assert_close(
            found.moved[i], alone.scores[0] - explainer(pictures[i], ["dog", "boat", "car"]).scores[0]
        )
        heat = alone.resize(0)
        for p in range(3):
            expected = heat[p, top:bottom, left:right].clamp(min=0).sum() / heat[p].clamp(min=0).sum()
            torch.testing.assert_close(found.share_after[i, p], expected)
        area = (right - left) * (bottom - top) / (96 * 96)
        assert found.area[i] == pytest.approx(area)


def test_a_written_word_draws_the_demo_model_s_attention() -> None:
    """It was trained on scenes with words: not what is written, but that something is, moves scores and maps."""
    pictures = [Image.fromarray(render(seed, size=96, objects=1).image) for seed in range(40, 56)]
    found = typographic(Explainer("demo"), pictures, ["boat"], "boat")
    assert found.share_after.mean() > 1.5 * found.share_before.mean()
    assert (found.moved > 0).float().mean() > 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"word": "  "}, "word to paste is empty"),
        ({"word": "boat", "width": 0}, "between 0 and 1"),
        ({"word": "boat", "at": (2, 0.5)}, "between 0 and 1"),
        ({"word": "an extraordinarily long sentence", "width": 0.2}, "cannot be written 12 pixels wide"),
    ],
)
def test_what_cannot_be_pasted_is_said(arguments, message) -> None:
    with pytest.raises(InputError, match=message):
        paste_word(Image.new("RGB", (60, 60)), **arguments)


def test_images_and_words_must_fit() -> None:
    with pytest.raises(InputError, match="2 images and 3 words"):
        typographic(Explainer("demo"), [Image.new("RGB", (64, 64))] * 2, ["dog"], ["a", "b", "c"])
