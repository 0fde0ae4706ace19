"""Marks turn with their pictures: what is drawn on stored pixels lies on the same things of the upright picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipfast.data.datasets import Sample, Target
from clipfast.data.images import read_image
from clipfast.data.upright import read_sample

HEIGHT, WIDTH = 40, 64


def stored(tmp_path: Path, orientation: int) -> tuple[Path, np.ndarray]:
    """A file with a white rectangle off its centre, in PNG, which keeps pixels; and where it is in the file."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[5:15, 8:36] = True
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"{orientation}.png"
    Image.fromarray(np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)).save(path, exif=exif)
    return path, mask


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_and_boxes_stay_on_the_object(tmp_path: Path, orientation: int, as_file: bool) -> None:
    path, mask = stored(tmp_path, orientation)
    labels = mask.astype(np.int8)
    labels[20:, :] = -1
    target = Target("thing", 0, labels, [(8, 5, 36, 15)])
    picture, (found,) = read_sample(Sample("a", path if as_file else Image.open(path), [target], []))
    white = np.asarray(picture)[..., 0] == 255
    assert picture.size == read_image(path).size
    assert found.mask is not None and found.boxes is not None
    assert np.array_equal(found.mask == 1, white)
    assert (found.mask == -1).sum() == 20 * WIDTH
    rows, columns = white.any(1).nonzero()[0], white.any(0).nonzero()[0]
    assert found.boxes == [(columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_of_the_upright_size_was_drawn_upright(tmp_path: Path, orientation: int) -> None:
    path, _ = stored(tmp_path, orientation)
    upright = np.asarray(read_image(path))[..., 0] == 255
    picture, (found,) = read_sample(Sample("a", path, [Target("thing", 0, upright, [(1, 2, 3, 4)])], []))
    assert found.mask is upright
    assert found.boxes == [(1, 2, 3, 4)]
    assert picture.size == (HEIGHT, WIDTH)


def test_boxes_alone_are_on_stored_pixels_and_nothing_marked_stays(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, 6)
    targets = [Target("thing", 0, None, [(8, 5, 36, 15)]), Target("class", 1)]
    _, (boxed, plain) = read_sample(Sample("a", path, targets, []))
    assert boxed.boxes == [(HEIGHT - 15, 8, HEIGHT - 5, 36)]
    assert plain == Target("class", 1)
    assert read_sample(Sample("a", path, [Target("class", 1)], []))[1] == [Target("class", 1)]


def test_an_orientation_that_is_none_turns_nothing(tmp_path: Path) -> None:
    path, mask = stored(tmp_path, 9)
    assert read_sample(Sample("a", path, [Target("thing", 0, mask)], []))[1][0].mask is mask
