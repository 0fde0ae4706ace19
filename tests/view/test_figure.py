from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from clipfast.errors import InputError
from clipfast.view.figure import _font, _wrap, grid, side_by_side, strip

GREY = (90, 90, 90)


def cells(sheet: Image.Image, size: int, count: int) -> list[np.ndarray]:
    """The lower right pixel of each of the bottom row's cells."""
    pixels, gap = np.asarray(sheet), max(size // 24, 4)
    return [pixels[-gap - 1, gap + (i + 1) * size + i * gap - 1] for i in range(count)]


def test_a_row_for_each_image_and_a_column_for_each_prompt():
    images = [Image.new("RGB", (60, 60), GREY)] * 2
    heat = np.stack([np.zeros((3, 3)), np.ones((3, 3))])
    sheet = grid(images, [heat, heat], ["a dog", "a cat"], cell=60)
    assert sheet.width == 4 + 3 * 64
    original, cold, hot = cells(sheet, 60, 3)
    assert tuple(original) == tuple(cold) == GREY
    assert tuple(hot) != GREY
    taller = grid(images, [heat, heat], ["a dog", "a cat"], cell=60, scores=[[0.1, 0.2]] * 2)
    assert taller.height > sheet.height
    assert (
        taller.tobytes() == grid(images, [heat, heat], ["a dog", "a cat"], cell=60, scores=[[0.1, 0.2]] * 2).tobytes()
    )


def test_rows_may_have_their_own_prompts_and_shapes():
    images = [Image.new("RGB", (300, 40)), Image.new("RGB", (5, 400)), Image.new("L", (1, 1))]
    heat = [np.zeros((1, 2, 2)), np.zeros((3, 2, 2)), np.zeros((0, 2, 2))]
    sheet = grid(images, heat, [["one"], ["one", "two", "three"], []], cell=48, titles=["x", "y", "z"])
    assert sheet.width == 4 + 4 * 52


def test_captions_wrap_and_are_cut_within_their_cell():
    font = _font(12)
    for text in ("word " * 40, "x" * 5000, "a b", "", "\n \t"):
        lines = _wrap(text, font, 100)
        assert 1 <= len(lines) <= 2
        assert all(font.getlength(line) <= 100 for line in lines)
    assert _wrap("a photo of a dog", font, 400) == ["a photo of a dog"]
    assert _wrap("x" * 5000, font, 100)[0].endswith("…")


@pytest.mark.parametrize(
    ("heat", "prompts", "more"),
    [
        ([np.zeros((2, 2, 2))], ["a"], {}),
        ([np.zeros((2, 2))], ["a"], {}),
        ([np.zeros((1, 2, 2))] * 2, ["a"], {}),
        ([np.zeros((1, 2, 2))], [["a"], ["b"]], {}),
        ([np.zeros((1, 2, 2))], ["a"], {"titles": []}),
        ([np.zeros((1, 2, 2))], ["a"], {"scores": [[1.0, 2.0]]}),
        ([np.full((1, 2, 2), np.nan)], ["a"], {}),
    ],
)
def test_what_does_not_belong_together_is_refused(heat, prompts, more):
    with pytest.raises(InputError):
        grid([Image.new("RGB", (4, 4))], heat, prompts, **more)
    with pytest.raises(InputError, match="at least one"):
        grid([], [], ["a"])


def test_a_strip_has_a_cell_for_the_picture_and_one_for_each_word():
    image = Image.new("RGB", (100, 50), GREY)
    heat = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])
    sheet = strip(image, heat, ["a", "red", "car"], cell=100)
    gap = 100 // 14
    middles = [tuple(np.asarray(sheet)[gap + 25, gap + i * (100 + gap) + 50]) for i in range(4)]
    assert middles[0] == middles[1] == middles[3] == GREY and middles[2] != GREY
    assert sheet.width == gap + 4 * (100 + gap)
    wrapped = strip(image, heat, ["a", "red", "car"], cell=100, columns=2, title="a red car " * 30, scores=[0.1] * 3)
    assert wrapped.width == gap + 2 * (100 + gap) and wrapped.height > 2 * sheet.height


def test_words_of_a_strip_stand_beneath_their_maps():
    image, blank = Image.new("RGB", (100, 50), GREY), np.zeros((2, 2, 2))
    plain, named = (np.asarray(strip(image, blank, ["", word], cell=100)) for word in ("", "W" * 50))
    rows, columns = np.nonzero((plain != named).any(-1))
    gap = 100 // 14
    assert rows.min() > gap + 50 and columns.min() >= gap + 2 * (100 + gap) and columns.max() < gap + 3 * (100 + gap)


@pytest.mark.parametrize(
    ("heat", "words", "more"),
    [
        (np.zeros((2, 3, 3)), ["a"], {}),
        (np.zeros((3, 3)), ["a"], {}),
        (np.zeros((1, 3, 3)), ["a"], {"scores": [1.0, 2.0]}),
        (np.full((1, 3, 3), 2.0), ["a"], {}),
    ],
)
def test_a_strip_of_what_does_not_belong_together_is_refused(heat, words, more):
    with pytest.raises(InputError):
        strip(Image.new("RGB", (4, 4)), heat, words, **more)


def test_a_row_of_what_does_not_belong_together_is_refused() -> None:
    one, other = Image.new("RGB", (20, 10)), Image.new("RGB", (10, 10))
    assert side_by_side([one, one], ["a", "b"]).width > 40
    for pictures, captions, numbers in (
        ([], [], None),
        ([one, other], ["a", "b"], None),
        ([one], ["a", "b"], None),
        ([one], ["a"], ["1", "2"]),
    ):
        with pytest.raises(InputError, match="a row needs pictures of one size"):
            side_by_side(pictures, captions, numbers=numbers)
