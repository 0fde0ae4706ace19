from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfast.data.scenes import (
    COLOURABLE,
    HUES,
    PLURALS,
    VISIBLE_FLOOR,
    Scenes,
    names,
    pictogram,
    render,
)
from clipfast.errors import InputError


def test_a_scene_is_a_function_of_its_seed():
    one, same, other = render(11), render(11), render(12)
    assert np.array_equal(one.image, same.image)
    assert one.caption == same.caption
    assert one.foil == same.foil
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(one.objects, same.objects, strict=True))
    assert not np.array_equal(one.image, other.image)


def test_sixty_four_distinct_names_each_with_its_own_picture():
    assert len(names()) == len(set(names())) == 64
    pictures = {hashlib.sha256(pictogram(name).tobytes()).hexdigest() for name in names()}
    assert len(pictures) == 64


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 60), st.sampled_from([32, 96, (64, 200), (240, 320)]), st.integers(0, 4), st.booleans())
def test_masks_and_boxes_are_the_visible_pixels(seed, size, objects, word):
    scene = render(seed, size, objects, word=word)
    height, width = (size, size) if isinstance(size, int) else size
    assert scene.image.shape == (height, width, 3)
    assert scene.image.dtype == np.uint8
    assert (len(scene.objects) >= 1) if objects else not scene.objects
    layers = [thing.mask for thing in scene.objects]
    if scene.word_mask is not None:
        layers.append(scene.word_mask)
    assert all(layer.shape == (height, width) and layer.dtype == bool and layer.any() for layer in layers)
    assert (np.sum(layers, 0) <= 1).all() if layers else True
    for thing in scene.objects:
        x0, y0, x1, y1 = thing.box
        inside = thing.mask[y0:y1, x0:x1]
        assert inside.sum() == thing.mask.sum()
        assert inside[0].any()
        assert inside[-1].any()
        assert inside[:, 0].any()
        assert inside[:, -1].any()


def test_what_is_drawn_later_takes_pixels_from_what_lies_below():
    """The same seed with and without a word differs only by the word: objects lose exactly the pixels it covers."""
    seen = 0
    for seed in range(60):
        plain, typed = render(seed, objects=2), render(seed, objects=2, word="cat")
        if typed.word is None:
            continue
        for before, after in zip(plain.objects, typed.objects, strict=True):
            assert np.array_equal(after.mask, before.mask & ~typed.word_mask)
            assert after.mask.sum() >= 0.5 * VISIBLE_FLOOR * before.mask.sum()
            seen += after.mask.sum() < before.mask.sum()
        changed = (plain.image != typed.image).any(-1)
        assert not (changed & ~_grown(typed.word_mask)).any()
    assert seen > 10


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask and its neighbours: ink has soft edges."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    return np.logical_or.reduce([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)])


def test_masks_hold_the_pictogram_and_not_the_background():
    """A red heart's mask is red, what surrounds it is not what the mask says."""
    red = 0
    for seed in range(40):
        scene = render(seed, objects=1, only=["heart"], distractors=0)
        (heart,) = scene.objects
        if heart.colour != "red":
            continue
        red += 1
        inside = scene.image[heart.mask].astype(int)
        assert np.median(inside[:, 0]) > 200
        assert np.median(inside[:, 1]) < 110
    assert red > 2


def test_captions_name_what_is_there_and_foils_do_not_match():
    plural = {PLURALS.get(name, name + "s"): name for name in names()}
    for seed in range(300):
        scene = render(seed, objects=(1, 4))
        words = scene.caption.replace(",", "").split()
        told = {plural.get(word, word) for word in words if word in names() or word in plural}
        assert told
        assert told <= set(scene.names)
        assert scene.foil != scene.caption
        for colour in HUES:
            if colour in words:
                assert any(thing.colour == colour for thing in scene.objects)
        if "on the left" in scene.caption:
            assert any("left" in thing.position for thing in scene.objects)


def test_positions_and_sizes_are_where_and_how_big_things_are():
    for scene in Scenes(80, seed=3, size=96, objects=1):
        (thing,) = scene.objects
        x0, y0, x1, y1 = thing.box
        if "left" in thing.position:
            assert (x0 + x1) / 2 < 0.45 * 96
        if "bottom" in thing.position:
            assert (y0 + y1) / 2 > 0.55 * 96
        extent = max(x1 - x0, y1 - y0) / 96
        assert (extent > 0.4) if thing.size == "big" else (extent < 0.6)


def test_written_words():
    scenes = Scenes(60, seed=5, objects=(0, 1), word=True)
    typed = [scene for scene in scenes if scene.word is not None]
    assert len(typed) > 50
    assert all(scene.word in names() and scene.word_mask.sum() > 30 for scene in typed)
    by_word = sum(scene.word in scene.caption.split() for scene in typed if scene.objects)
    by_thing = sum(scene.word not in scene.caption.split() for scene in typed if scene.objects)
    assert by_word > 5
    assert by_thing > 5
    assert render(1, word="hello").word == "hello"


def test_several_words_each_stay_legible():
    scene = render(5, size=160, objects=0, word=["cat", "dog", "sun"])
    assert [thing.name for thing in scene.written] == ["cat", "dog", "sun"]
    assert scene.word == "cat"
    assert scene.caption.split()[-1] in ("cat", "dog", "sun")
    assert scene.foil.split()[-1] not in ("cat", "dog", "sun")
    for seed in range(40):
        for thing in render(seed, objects=0, word=["cat"] * 5).written:
            x0, y0, x1, y1 = thing.box
            assert thing.mask.sum() >= 0.3 * (x1 - x0) * (y1 - y0)


def test_scenes_without_objects():
    scene = render(3, objects=0)
    assert scene.objects == ()
    assert scene.names == ()
    assert not set(scene.caption.split()) & set(names())
    with pytest.raises(InputError, match="nothing"):
        scene.mask("dog")


def test_colours():
    for name in COLOURABLE:
        sprites = {hashlib.sha256(pictogram(name, colour).tobytes()).hexdigest() for colour in HUES}
        assert len(sprites) == len(HUES)
    with pytest.raises(InputError, match="cannot be 'blue'"):
        pictogram("dog", "blue")


def test_a_benchmark_is_a_sequence_of_its_own_scenes():
    a, b = Scenes(10, seed=1), Scenes(10, seed=2)
    assert len(a) == 10
    assert len(list(a)) == 10
    assert len(a[2:5]) == 3
    assert np.array_equal(a[-1].image, a[9].image)
    assert not any(np.array_equal(x.image, y.image) for x, y in zip(a, b, strict=True))
    with pytest.raises(IndexError):
        a[10]


def test_two_of_a_kind_share_a_mask_by_name():
    scene = next(s for s in (render(i, objects=2, repeat=1.0) for i in range(50)) if len(s.objects) == 2)
    assert len(scene.names) == 1
    assert scene.mask(scene.names[0]).sum() == sum(thing.mask.sum() for thing in scene.objects)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 20}, "32 pixels"),
        ({"objects": 5}, "0 to 4"),
        ({"objects": (3, 1)}, "0 to 4"),
        ({"only": ["dgo"]}, "did you mean 'dog'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        render(0, **arguments)
