from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform, image_transform_v2
from PIL import Image
from torchvision import transforms as T

from clipfast.data.geometry import Geometry, InputSpec, normalize, prepare
from clipfast.data.spec import spec_of
from clipfast.errors import InputError

side = st.integers(1, 300)


def noise(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _convert_image_to_rgb(image):
    return image.convert("RGB")


def whole(height: int, width: int, size: int = 64) -> Geometry:
    return Geometry(height, width, (0.0, 0.0, width, height), (size, size), (size, size))


@given(side, side, st.sampled_from(["shortest", "squash", "longest"]), st.sampled_from([64, (48, 64), (64, 48)]))
@settings(max_examples=60, deadline=None)
def test_input_equals_open_clip_bit_for_bit(height, width, mode, size):
    cfg = PreprocessCfg(size=size, resize_mode=mode, mean=(0.1, 0.5, 0.3), std=(0.3, 0.25, 0.2), fill_color=90)
    if mode == "longest" and max(height, width) > 100 * min(height, width):
        height = width  # open_clip itself rounds the short side to no pixels at all
    image = noise(height, width)
    spec = InputSpec.from_open_clip(dataclasses.asdict(cfg), patch=16)
    pixels, _ = prepare(image, spec)
    assert torch.equal(normalize(pixels[None], spec)[0], image_transform_v2(cfg, is_train=False)(image))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_spec_is_read_back_from_open_clips_own_transform(mode, interpolation):
    cfg = PreprocessCfg(size=96, resize_mode=mode, interpolation=interpolation, fill_color=7)
    read = spec_of(image_transform_v2(cfg, is_train=False), patch=8)
    wrote = InputSpec.from_open_clip(dataclasses.asdict(cfg), patch=8)
    assert read == dataclasses.replace(wrote, fill=wrote.fill if mode == "longest" else 0)


def test_spec_of_rectangles_and_of_openais_transform():
    assert spec_of(image_transform((64, 96), False), 16).size == (64, 96)
    openai = T.Compose(
        [
            T.Resize(224, T.InterpolationMode.BICUBIC),
            T.CenterCrop(224),
            _convert_image_to_rgb,
            T.ToTensor(),
            T.Normalize(0.5, (0.5, 0.5, 0.5)),
        ]
    )
    assert spec_of(openai, 32) == InputSpec(224, 32, mean=0.5, std=0.5)


@pytest.mark.parametrize(
    ("steps", "named"),
    [
        ([T.Resize(256), T.CenterCrop(224)], "Resize"),
        ([T.Resize(224)], "Resize"),
        ([T.Resize((224, 224)), T.CenterCrop(200)], "CenterCrop"),
        ([T.RandomResizedCrop(224)], "RandomResizedCrop"),
        ([T.CenterCrop(224), T.Resize(224)], "Resize"),
        ([T.Resize(224, max_size=500), T.CenterCrop(224)], "max_size"),
        ([T.CenterCrop(224)], "no Resize"),
        ([T.Resize((224, 224)), T.Lambda(lambda i: i)], "Lambda"),
    ],
)
def test_unreadable_preprocessing_is_named(steps, named):
    normal = T.Normalize((0.5,) * 3, (0.5,) * 3)
    with pytest.raises(InputError, match=named):
        spec_of(T.Compose([*steps, T.ToTensor(), normal]), 16)
    with pytest.raises(InputError, match="no Normalize"):
        spec_of(T.Compose([T.Resize((224, 224)), T.ToTensor()]), 16)
    with pytest.raises(InputError, match="no torchvision Compose"):
        spec_of(len, 16)


@pytest.mark.parametrize(
    "bad",
    [
        {"size": 0},
        {"size": (1, 2, 3)},
        {"patch": 65},
        {"interpolation": "cubic"},
        {"resize": "stretch"},
        {"std": (1, 0, 1)},
        {"mean": float("nan")},
        {"fill": 256},
        {"max_side": 15},
    ],
)
def test_bad_specs_are_refused(bad):
    with pytest.raises(InputError):
        InputSpec(**{"size": 64, "patch": 16, **bad})
    with pytest.raises(InputError):
        InputSpec.from_open_clip({"resize_mode": "fit"}, 16)


@given(side, side, st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_whole_image_maps_equal_interpolate(height, width, h, w):
    maps = torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(h * 10 + w))
    expected = F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)
    torch.testing.assert_close(whole(height, width).to_image(maps), expected, atol=2e-5, rtol=0)


@given(side, side, st.sampled_from(["crop", "squash", "longest", "keep"]))
@settings(max_examples=60, deadline=None)
def test_constant_maps_stay_constant_where_the_model_looked(height, width, resize):
    spec = InputSpec(64, 16, resize=resize)
    pixels, geometry = prepare(noise(height, width), spec)
    assert pixels.shape[1:] == geometry.input
    assert all(s % p == 0 and s >= p for s, p in zip(geometry.input, spec.patch, strict=True))
    back = geometry.to_image(torch.full((1, *[s // 16 for s in geometry.input]), 0.7), outside=-1.0)[0]
    assert back.shape == (height, width)
    seen = back == torch.tensor(0.7)
    assert seen.any()
    assert ((back == -1) | seen).all()
    left, top, right, bottom = geometry.box
    if resize != "crop":
        assert seen.all()
        assert left <= 0
        assert top <= 0
        assert right >= width - 1e-6
        assert bottom >= height - 1e-6
    else:
        short = min(height, width)
        assert abs(seen.sum() - short**2) <= short * (short / 64 + 2)


@given(
    st.integers(80, 400),
    st.integers(80, 400),
    st.sampled_from(["crop", "squash", "longest", "keep"]),
    st.floats(0.3, 0.7),
    st.floats(0.3, 0.7),
)
@settings(max_examples=40, deadline=None)
def test_a_mark_comes_back_where_it_was(height, width, resize, cy, cx):
    """A red square drawn on the original: pooled to patches and mapped back, its centre of mass has not moved."""
    short = min(height, width)
    r = short // 10
    y = int((height - short) / 2 + cy * short)
    x = int((width - short) / 2 + cx * short)
    image = Image.new("RGB", (width, height))
    image.paste((255, 0, 0), (x - r, y - r, x + r, y + r))
    pixels, geometry = prepare(image, InputSpec(96, 4, resize=resize))
    patches = F.avg_pool2d(pixels[:1].float(), 4)
    back = geometry.to_image(patches)[0]
    back = torch.where(back > back.max() / 2, back, 0)
    ys, xs = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    patch = 4 * max(height, width) / min(geometry.input)
    assert abs((ys * back).sum() / back.sum() - y) <= 0.5 * patch
    assert abs((xs * back).sum() / back.sum() - x) <= 0.5 * patch


def test_patches_that_do_not_fill_the_input_cover_less():
    _, geometry = prepare(noise(384, 384), InputSpec(384, 14, resize="squash"))
    assert geometry.covered == (378, 378)
    back = geometry.to_image(torch.ones(27, 27), outside=0.0)
    assert back[:378, :378].all()
    assert not back[378:].any()
    assert not back[:, 378:].any()
    assert geometry.to_image(torch.ones(384, 384)).all()


@given(side, side)
@settings(max_examples=40, deadline=None)
def test_resampling_only_what_the_crop_keeps_is_the_same_to_two_grey_levels(height, width):
    # Mid greys: the order of Pillow's two passes depends on the sizes, and shows where bicubic overshoots are clipped.
    image = noise(height, width).point(lambda v: 64 + v // 2)
    spec = InputSpec(64, 16)
    expected, where = prepare(image, spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clipfast.data.geometry._MAX_RESIZED_PIXELS", 0)
        pixels, geometry = prepare(image, spec)
    assert geometry == where
    assert (pixels.int() - expected.int()).abs().max() <= 2


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 50_000)])
def test_extreme_aspect_shows_the_middle(size):
    ramp = torch.linspace(0, 255, max(size)).round().to(torch.uint8).expand(min(size), -1)
    image = Image.fromarray((ramp if size[0] < size[1] else ramp.T).numpy()).convert("RGB")
    pixels, geometry = prepare(image, InputSpec(224, 16))
    assert (pixels.float() - 127.5).abs().max() <= 1
    assert geometry.to_image(torch.ones(14, 14)).sum() == min(size) ** 2


def test_keep_rounds_to_patches_and_obeys_max_side():
    def sides(height, width, **kw):
        return tuple(prepare(noise(height, width), InputSpec(224, 16, resize="keep", **kw))[0].shape[1:])

    assert sides(100, 330) == (96, 336)
    assert sides(1, 40) == (16, 32)
    assert sides(300, 1200, max_side=400) == (96, 400)
    assert sides(1200, 1200, max_side=100) == (96, 96)


def test_points_go_there_and_back():
    _, geometry = prepare(noise(300, 200), InputSpec(64, 16))
    corners = torch.tensor([[0.0, 50.0], [200.0, 250.0]], dtype=torch.float64)
    torch.testing.assert_close(geometry.to_input(corners), torch.tensor([[0.0, 0], [64, 64]], dtype=torch.float64))
    torch.testing.assert_close(geometry.from_input(geometry.to_input(corners)), corners)


def test_a_thumbnails_map_is_the_map_scaled_down():
    _, geometry = prepare(noise(400, 300), InputSpec(64, 16))
    maps = torch.rand(2, 4, 4)
    small = geometry.resized(100, 75).to_image(maps)
    expected = F.avg_pool2d(geometry.to_image(maps), 4)
    assert (small[:, 14:-14] - expected[:, 14:-14]).abs().max() < 0.02
    assert geometry.resized(400, 300) == geometry


def test_dtypes_and_leading_shapes():
    geometry = whole(10, 20)
    assert geometry.to_image(torch.rand(3, 2, 4, 4, dtype=torch.float64)).dtype == torch.float64
    assert geometry.to_image(torch.rand(4, 4).bfloat16()).dtype == torch.float32
    assert geometry.to_image(torch.rand(0, 4, 4)).shape == (0, 10, 20)
    assert geometry.to_image(torch.rand(2, 4, 4).transpose(1, 2)).shape == (2, 10, 20)
    with pytest.raises(InputError, match="at least 1"):
        geometry.to_image(torch.rand(3, 0, 4))


def test_many_maps_in_chunks_equal_one_by_one(monkeypatch):
    maps = torch.rand(7, 4, 4)
    at_once = whole(30, 40).to_image(maps)
    monkeypatch.setattr("clipfast.data.geometry._CHUNK_ELEMENTS", 2 * 30 * 40)
    assert torch.equal(whole(30, 40).to_image(maps), at_once)


def test_normalize_refuses_other_tensors_and_casts_last():
    spec = InputSpec(64, 16)
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    before = pixels.clone()
    assert torch.equal(normalize(pixels, spec, torch.float64), normalize(pixels, spec).double())
    assert torch.equal(pixels, before)
    for bad in (pixels.float(), pixels[0], pixels[:, :1]):
        with pytest.raises(InputError, match="uint8"):
            normalize(bad, spec)
