from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from clipfast.errors import InputError
from clipfast.view.overlay import drawable, overlay, palette, two_signed


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))


def lightness(colours: np.ndarray) -> np.ndarray:
    return colours[:, :3].astype(float) @ [0.299, 0.587, 0.114]


def test_default_palette_is_ordered_by_lightness_and_fades_in():
    table = palette("heat")
    assert (np.diff(lightness(table)) >= -1).all()
    assert lightness(table)[255] - lightness(table)[0] > 150
    assert table[0, 3] == 0
    assert table[255, 3] == 255
    assert (np.diff(table[:, 3].astype(int)) >= 0).all()
    assert (palette("jet")[:, 3] == 255).all()


def test_cold_maps_leave_the_picture_alone_and_hot_ones_colour_it(picture):
    before = picture.tobytes()
    assert overlay(picture, np.zeros((7, 7))).tobytes() == before
    hot = np.asarray(overlay(picture, np.ones((7, 7)), alpha=1.0))
    assert (hot == palette("heat")[255, :3]).all()
    assert overlay(picture, np.ones((7, 7)), alpha=0.0).tobytes() == before
    assert picture.tobytes() == before


def test_jet_is_half_and_half_everywhere(picture):
    cold = np.asarray(overlay(picture, np.zeros((2, 2)), colormap="jet")).astype(int)
    mean = (np.asarray(picture).astype(int) + palette("jet")[0, :3]) / 2
    assert np.abs(cold - mean).max() <= 2


def test_heat_lands_where_it_is(picture):
    heat = np.zeros((3, 5))
    heat[2, 4] = 1
    changed = (np.asarray(overlay(picture, heat)) != np.asarray(picture)).any(-1)
    assert changed[25:, 45:].all()
    assert not changed[:15].any()
    assert not changed[:, :30].any()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_modes_and_tensors(picture, mode):
    heat = torch.rand(4, 4, requires_grad=True).to(torch.bfloat16)
    result = overlay(picture.convert(mode), heat)
    assert (result.mode, result.size) == ("RGB", picture.size)
    assert result.tobytes() == overlay(picture.convert(mode).convert("RGB"), heat.detach().float().numpy()).tobytes()


@pytest.mark.parametrize(
    ("heat", "options", "words"),
    [
        (np.full((2, 2), np.nan), {}, "not finite"),
        (np.full((2, 2), np.inf), {}, "not finite"),
        (np.full((2, 2), 1.5), {}, "0..1"),
        (np.full((2, 2), -0.5), {}, "0..1"),
        (np.zeros((1, 2, 2)), {}, "must be"),
        (np.zeros(4), {}, "must be"),
        (np.zeros((0, 4)), {}, "with pixels"),
        (np.zeros((2, 2)), {"alpha": 1.1}, "alpha"),
        (np.zeros((2, 2)), {"alpha": float("nan")}, "alpha"),
        (np.zeros((2, 2)), {"colormap": "infrno"}, "infrno"),
    ],
)
def test_what_cannot_be_drawn_is_refused(picture, heat, options, words):
    with pytest.raises(InputError, match=words):
        overlay(picture, heat, **options)


def test_signed_maps_show_nothing_in_the_middle_and_two_colours_at_the_ends() -> None:
    table = palette("signed").astype(int)
    assert table[127, 3] == table[128, 3] == 0
    assert table[0, 3] == table[255, 3] == 255
    red, green, blue, _ = table[255]
    assert green > red and green > blue
    red, green, blue, _ = table[0]
    assert red > green and blue > green


def test_maps_of_one_sign_are_stretched_and_constant_ones_are_nothing() -> None:
    maps = torch.tensor([[[1.0, 3.0], [2.0, 1.0]], [[5.0, 5.0], [5.0, 5.0]], [[-0.01, 1.0], [0.0, 0.0]]])
    assert not two_signed(maps)
    unit = drawable(maps, False)
    assert unit[0].tolist() == [[0.0, 1.0], [0.5, 0.0]] and unit[1].max() == 0 and unit[2].amax() == 1
    together = drawable(maps, False, together=True)
    torch.testing.assert_close(together, (maps + 0.01) / 5.01)


def test_maps_of_both_signs_keep_zero_in_the_middle() -> None:
    maps = torch.tensor([[[-1.0, 4.0], [0.0, 2.0]], [[-6.0, 3.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert two_signed(maps)
    unit = drawable(maps, True)
    assert unit[0].tolist() == [[0.375, 1.0], [0.5, 0.75]]
    assert unit[1].tolist() == [[0.0, 0.75], [0.5, 0.5]] and (unit[2] == 0.5).all()
    torch.testing.assert_close(drawable(maps, True, together=True), 0.5 + maps / 12)


@pytest.mark.parametrize("sign", [1, -1])
def test_single_outliers_do_not_hide_the_rest(sign) -> None:
    maps = torch.rand(1, 100, 100, generator=torch.Generator().manual_seed(0))
    maps[0, 3, 4] = sign * 1000.0
    unit = drawable(maps, two_signed(maps), outliers=0.005)
    assert unit[0, 3, 4] == (1.0 if sign > 0 else 0.0)
    assert 0.4 < (unit[0] if sign > 0 else unit[0] * 2 - 1).mean() < 0.6


def test_maps_whose_sign_says_nothing_are_heat() -> None:
    maps = torch.tensor([[[-3.0, -1.0], [-2.0, 1.0]]])
    assert drawable(maps, False).flatten().tolist() == [0.0, 0.5, 0.25, 1.0]
