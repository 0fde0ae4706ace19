from __future__ import annotations

import ast
import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipfast.data import decode as module
from clipfast.data.decode import decode
from clipfast.data.geometry import InputSpec, prepare
from clipfast.data.images import read_image
from clipfast.errors import ImageError

MODES = ("crop", "squash", "longest", "keep")
XMP = b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='6' tiff:Orientation=\"6\"/>"


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Soft shapes with some grain, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 20 + 2, width // 20 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    return Image.fromarray((smooth + rng.normal(0, 4, (height, width, 1))).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **{"quality": 92, **options})
    return stream.getvalue()


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def spec(mode: str = "crop", interpolation: str = "bicubic", size=64, patch: int = 16) -> InputSpec:
    most = 150 if mode == "keep" else None
    return InputSpec(size, patch, interpolation=interpolation, resize=mode, fill=90, max_side=most)


def agree(data: bytes, wanted: InputSpec, share: float = 0.012, level: int = 1) -> None:
    """The fast path has Pillow's values but for `level` in a small share of them, and exactly its geometry."""
    pixels, geometry = prepare(read_image(data), wanted)
    found = decode(data, wanted)
    assert found.geometry == geometry
    assert found.pixels.dtype == torch.uint8 and found.pixels.shape == pixels.shape and found.pixels.is_contiguous()
    difference = (found.pixels.int() - pixels.int()).abs()
    assert int(difference.max()) <= level
    assert float((difference > 1).float().mean()) <= 1e-3
    assert float((difference > 0).float().mean()) <= share
    assert torch.equal(decode(data, wanted, exact=True).pixels, pixels)


@pytest.fixture
def fast_only(monkeypatch):
    """Pillow's decoder must not be asked."""

    def refuse(*args, **kwargs):
        raise AssertionError("Pillow was asked to decode")

    monkeypatch.setattr(module, "read_image", refuse)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(375, 500), (500, 375), (60, 90), (200, 200), (400, 100), (100, 400)])
def test_values_are_pillows_to_a_level(mode, interpolation, size):
    agree(jpeg(photo(*size)), spec(mode, interpolation))


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (224, 224)])
@pytest.mark.parametrize("mode", ["crop", "squash", "longest"])
def test_other_inputs(mode, size):
    # Where a side is scaled up, the second pass may make two levels of one.
    agree(jpeg(photo(310, 205)), spec(mode, size=size), level=2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [{"progressive": True}, {"subsampling": 0}, {"quality": 30}, {"restart_marker_rows": 1}, {"dpi": (72, 72)}],
)
def test_every_kind_of_jpeg(options, mode, fast_only, monkeypatch):
    data = jpeg(photo(150, 200), **options)
    decode(data, spec(mode))
    monkeypatch.undo()
    agree(data, spec(mode))


@pytest.mark.parametrize("mode", MODES)
def test_grey(mode, fast_only, monkeypatch):
    data = jpeg(photo(150, 200).convert("L"))
    assert torch.equal(*decode(data, spec(mode)).pixels[:2])
    monkeypatch.undo()
    agree(data, spec(mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation, mode, fast_only, monkeypatch):
    data = jpeg(photo(120, 200), exif=oriented(orientation))
    upright = (200, 120) if orientation >= 5 else (120, 200)
    geometry = decode(data, spec(mode)).geometry
    assert (geometry.height, geometry.width) == upright
    monkeypatch.undo()
    agree(data, spec(mode))


def test_orientation_by_xmp_alone():
    data = jpeg(photo(60, 100))
    segment = b"\xff\xe1" + (len(XMP) + 2).to_bytes(2) + XMP
    data = data[:2] + segment + data[2:]
    assert decode(data, spec()).geometry.height == 100
    agree(data, spec())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_costs_nothing():
    data = jpeg(photo(60, 100), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    assert decode(data, spec()).geometry.height == 60
    agree(data, spec())


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "CMYK"])
@pytest.mark.parametrize("mode", MODES)
def test_everything_else_is_pillows_to_the_bit(kind, mode):
    image, stream = photo(60, 90), io.BytesIO()
    if kind == "CMYK":
        image.convert("CMYK").save(stream, "JPEG")
    else:
        image.save(stream, kind)
    agree(stream.getvalue(), spec(mode), share=0)


def test_other_interpolations_are_pillows_to_the_bit():
    for interpolation in ("nearest", "lanczos", "box"):
        agree(jpeg(photo(60, 90)), spec(interpolation=interpolation), share=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 7), (1, 60_000)])
def test_thin_images(size, mode):
    if mode == "longest" and max(size) > 1000:
        size = size[0], 1000
    agree(jpeg(photo(*size)), spec(mode), share=0.05, level=2)


def test_a_crop_of_what_would_grow_too_large_is_left_to_pillow():
    agree(jpeg(photo(1, 20_000)), spec(size=224, patch=32), share=0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "photo is empty: 0 bytes."),
        (b"\xff\xd8\xff", "photo is not an image in a known format"),
        (b"\xff\xd8\xff\xe0" + bytes(400), "photo is not an image in a known format"),
        (b"not a picture", "photo is not an image in a known format"),
        (b"<!DOCTYPE html><html>", "photo is a web page"),
        (jpeg(photo(60, 90))[:-800], "photo is truncated: the file ends before the picture does."),
        (jpeg(photo(60, 90), progressive=True)[:900], "photo is truncated"),
    ],
)
def test_what_cannot_be_read_says_why_as_ever(data, reason):
    for exact in (False, True):
        with pytest.raises(ImageError) as caught:
            decode(data, spec(), exact=exact, name="photo")
        assert str(caught.value).startswith(reason)
    with pytest.raises(ImageError) as plain:
        read_image(data)
    assert str(plain.value).replace("the image in memory", "photo") == str(caught.value)


def test_enormous_images_are_refused_before_they_are_decoded(monkeypatch):
    data = jpeg(photo(60, 90))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(module, "_decoder", lambda: lambda encoded: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"^photo is too large to decode safely \(Pillow's limit of 1,000 pixels\)"):
        decode(data, spec(), name="photo")
    monkeypatch.undo()
    # A header that promises 60,000 x 60,000 pixels, which would be 10 GB.
    frame = data.index(b"\xff\xc0")
    bomb = data[: frame + 5] + (60_000).to_bytes(2) * 2 + data[frame + 9 :]
    with pytest.raises(ImageError, match="too large to decode safely"):
        decode(bomb, spec(), name="photo")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode(data, spec()).pixels.shape == (3, 64, 64)


def test_without_torchvisions_decoder_pillow_does_all(monkeypatch):
    monkeypatch.setattr(module, "_decoder", lambda: None)
    agree(jpeg(photo(60, 90), exif=oriented(6)), spec(), share=0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_is_an_image_error_or_a_picture(data):
    whole = bytearray(jpeg(photo(30, 40), progressive=data.draw(st.booleans())))
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
        whole[place] = data.draw(st.integers(0, 255))
    damaged = bytes(whole[: data.draw(st.integers(0, len(whole)))]) if data.draw(st.booleans()) else bytes(whole)
    found = []
    for exact in (False, True):
        try:
            found.append(decode(damaged, spec(), exact=exact, name="photo").geometry)
        except ImageError as error:
            found.append(str(error))
    assert found[0] == found[1]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_garbage_is_an_image_error(data, headed):
    with pytest.raises(ImageError):
        decode(b"\xff\xd8\xff" + data if headed else data, spec())


def test_threads_get_the_same_and_need_no_threads_of_torch():
    datas = [jpeg(photo(150, 200, seed), exif=oriented(seed)) for seed in range(1, 9)]
    alone = [decode(data, spec()).pixels for data in datas]
    found: list[torch.Tensor] = [None] * 8
    threads = [
        threading.Thread(target=lambda i=i: found.__setitem__(i, decode(datas[i], spec()).pixels)) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


def test_importing_it_does_not_import_torchvision():
    tree = ast.parse(Path(module.__file__).read_text())
    imports = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports and not any("torchvision" in line for line in imports)
