from __future__ import annotations

import os

import pytest
from PIL import Image

from clipfast.view.files import save_image, write_file


def test_folders_are_made_and_nothing_is_left_beside(tmp_path):
    path = write_file(tmp_path / "a" / "b" / "c.html", b"one")
    assert write_file(path, b"two") == path
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["c.html"]
    assert path.stat().st_mode & 0o044 == (~os.umask(os.umask(0o022)) & 0o044)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_file(tmp_path / "c.html", b"old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["c.html"]


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.webp", "WEBP"), ("a", "PNG")])
def test_images_are_written_as_their_suffix_says(tmp_path, name, kind):
    with Image.open(save_image(Image.new("RGB", (3, 2)), tmp_path / name)) as image:
        assert (image.format, image.size) == (kind, (3, 2))
