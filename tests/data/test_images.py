from __future__ import annotations

import contextlib
import io
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipfast.data.images import expand, read_image
from clipfast.errors import ImageError, InputError

RED, BLUE = (220, 30, 40), (20, 40, 210)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def halves(mode: str = "RGB") -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", (40, 20), RED)
    image.paste(BLUE, (20, 0, 40, 20))
    return image.quantize(2) if mode == "P" else image.convert(mode)


def near(image: Image.Image, xy: tuple[int, int], colour: tuple[int, int, int], within: int = 12) -> bool:
    return all(abs(a - b) <= within for a, b in zip(image.getpixel(xy), colour, strict=True))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *[("RGB", k) for k in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "QOI")],
        *[("P", k) for k in ("PNG", "GIF", "TIFF", "BMP")],
        *[("CMYK", k) for k in ("JPEG", "TIFF")],
        *[("YCbCr", k) for k in ("JPEG", "TIFF")],
        ("HSV", None),
        ("RGBA", "PNG"),
        ("RGBX", "TIFF"),
    ],
)
def test_every_colour_mode_and_format_keeps_its_colours(mode, kind, tmp_path):
    picture = halves(mode)
    if kind:
        options = {"lossless": True} if kind == "WEBP" else {}
        (tmp_path / "picture").write_bytes(encoded(picture, kind, **options))
        picture = tmp_path / "picture"
    read = read_image(picture)
    assert (read.mode, read.size) == ("RGB", (40, 20))
    assert near(read, (5, 10), RED)
    assert near(read, (35, 10), BLUE)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_once(orientation, kind):
    upright = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}
    stored = Image.new("RGB", (64, 32), "black")
    stored.paste(RED, (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = read_image(encoded(stored, kind, exif=exif))
    right, bottom = upright[orientation]
    assert read.size == ((64, 32) if orientation < 5 else (32, 64))
    assert near(read, (read.width - 4 if right else 3, read.height - 4 if bottom else 3), RED, 40)
    assert read_image(read).tobytes() == read.tobytes()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_picture():
    data = encoded(halves(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff broken")
    assert near(read_image(data), (5, 10), RED)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_transparency_becomes_white(kind):
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    clear.paste((*RED, 255), (0, 0, 4, 8))
    read = read_image(encoded(clear, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert near(read, (1, 4), RED)
    assert read.getpixel((7, 4)) == (255, 255, 255)


def test_half_transparent_and_keyed_colours():
    assert read_image(Image.new("RGBA", (2, 2), (0, 0, 0, 128))).getpixel((0, 0)) == (127, 127, 127)
    assert read_image(Image.new("LA", (2, 2), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert read_image(encoded(Image.new("RGB", (2, 2), RED), "PNG", transparency=RED)).getpixel((0, 0)) == (255,) * 3
    assert read_image(encoded(halves("P"), "PNG", transparency=b"\0" * 256)).getpixel((0, 0)) == (255,) * 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled(kind):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(1, 256).repeat(4, 0)
    read = np.asarray(read_image(encoded(Image.fromarray(ramp), kind)))
    assert np.abs(read[0, :, 0].astype(int) - np.arange(256)).max() <= 1
    assert (read == read[..., :1]).all()


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 255.0), (-3.0, 8.0), (0.0, 1e6)])
def test_float_images_use_the_whole_range(low, high):
    ramp = np.linspace(low, high, 256, dtype=np.float32).reshape(1, 256)
    assert np.abs(np.asarray(read_image(Image.fromarray(ramp)))[0, :, 0].astype(int) - np.arange(256)).max() <= 1


def test_odd_grey_images():
    assert read_image(Image.new("1", (3, 2), 1)).getpixel((0, 0)) == (255,) * 3
    assert read_image(Image.new("L", (3, 2), 9)).getpixel((0, 0)) == (9,) * 3
    assert read_image(Image.new("F", (3, 2), 300.0)).getpixel((0, 0)) == (0,) * 3
    wide = Image.fromarray(np.array([[0, 2**31 - 1]], dtype=np.int32))
    assert [read_image(wide).getpixel((x, 0))[0] for x in (0, 1)] == [0, 255]
    for bad in (np.nan, np.inf):
        with pytest.raises(ImageError, match="not finite"):
            read_image(Image.fromarray(np.full((2, 2), bad, np.float32)))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_give_their_first_frame(kind):
    frames = [Image.new("RGB", (6, 6), c) for c in (RED, BLUE)]
    assert near(read_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:])), (3, 3), RED)


def test_a_pil_image_is_left_alone_and_returned_when_it_fits():
    image = halves()
    before = image.tobytes()
    assert read_image(image) is image
    assert image.tobytes() == before


def test_whatever_is_wrong_is_one_sentence_naming_the_file(tmp_path):
    png, jpeg = encoded(halves(), "PNG"), encoded(Image.effect_noise((90, 90), 60).convert("RGB"), "JPEG")
    (tmp_path / "photo_0001.jpg").write_bytes(jpeg)
    contents = {
        "empty.png": (b"", "empty"),
        "text.jpg": (b"hello, this is no picture", "not an image"),
        "page.jpg": (b"\n<!DOCTYPE html><html>", "web page"),
        "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        "cut.png": (png[: len(png) // 2], "truncated|damaged|decoded"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "header.png": (png[:12], "damaged|truncated|decoded"),
        "drawing.eps": (encoded(halves(), "EPS"), "PostScript"),
    }
    for name, (data, _) in contents.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    expected = {name: words for name, (_, words) in contents.items()}
    expected |= {"folder": "folder", "pipe.jpg": "regular file", "Photo_001.jpg": "did you mean 'photo_0001.jpg'"}
    expected |= {
        "nowhere/a.jpg": "nor does the folder",
        "zzzzzz": "does not exist",
        "photo_0001.jpg/a": "does not exist",
    }
    for name, words in expected.items():
        with pytest.raises(ImageError, match=words) as caught:
            read_image(tmp_path / name)
        message = str(caught.value)
        assert name in message
        assert "\n" not in message
        assert message[-1] in ".?"
        assert caught.value.source == str(tmp_path / name)


@pytest.mark.parametrize(
    "bad", [3, None, np.zeros((4, 4, 3)), "https://example.org/a.jpg", "nul\0byte.png", "a" * 5000]
)
def test_what_is_no_image_source_is_refused(bad):
    with pytest.raises(ImageError):
        read_image(bad)


def test_zero_sized_and_bombs(monkeypatch):
    with pytest.raises(ImageError, match="no pixels"):
        read_image(Image.new("RGB", (0, 5)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="too large"):
        read_image(encoded(halves(), "PNG"))


@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]), st.randoms(use_true_random=False), st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_never_raise_anything_else(kind, random, data):
    raw = bytearray(encoded(halves(), kind))
    for _ in range(data.draw(st.integers(1, 12))):
        raw[random.randrange(len(raw))] = random.randrange(256)
    raw = bytes(raw[: data.draw(st.integers(0, len(raw)))])
    with contextlib.suppress(ImageError):
        assert read_image(raw).mode == "RGB"


@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_garbage_never_raises_anything_else(raw):
    with pytest.raises(ImageError):
        read_image(raw)


@pytest.fixture
def gallery(tmp_path):
    for name in ("b.jpg", "a.PNG", "c.txt", ".hidden.jpg", "plain", "odd[1].png", "deep/d.webp"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def names(paths):
    return [p.name for p in paths]


def test_expand(gallery):
    assert names(expand([gallery])) == ["a.PNG", "b.jpg", "odd[1].png"]
    assert names(expand([gallery / "*.jpg"])) == ["b.jpg"]
    assert names(expand([str(gallery / "*")])) == ["a.PNG", "b.jpg", "odd[1].png"]
    assert names(expand([gallery / "**" / "*.*"])) == ["a.PNG", "b.jpg", "d.webp", "odd[1].png"]
    assert names(expand([gallery / "b.jpg", gallery, gallery / "plain"])) == ["b.jpg", "a.PNG", "odd[1].png", "plain"]
    assert names(expand([gallery / "odd[1].png"])) == ["odd[1].png"]
    assert names(expand(str(gallery / "b.jpg"))) == ["b.jpg"]
    assert names(expand([gallery / "missing.jpg", gallery / "b.jpg"])) == ["missing.jpg", "b.jpg"]


def test_expand_says_what_has_no_images(gallery):
    for pattern in (gallery / "*.tif", gallery / "folder.png", gallery / "c*"):
        with pytest.raises(InputError, match="no image found under") as caught:
            expand([gallery / "b.jpg", pattern])
        assert str(pattern) in str(caught.value)
    with pytest.raises(InputError, match="no image was named"):
        expand([])


def test_expand_knows_home(gallery, monkeypatch):
    monkeypatch.setenv("HOME", str(gallery))
    assert expand(["~/b.jpg"]) == [gallery / "b.jpg"]
