"""Published preprocessings: open_clip's of every tag, and transformers' image processors; pixels, and the way back."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import asdict
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from torch import Tensor

from clipfast.data.geometry import InputSpec, normalize, prepare
from clipfast.data.spec import spec_of
from clipfast.errors import InputError

SIZES = [(501, 333), (97, 223), (224, 1031)]


def presets() -> dict[tuple[Any, ...], list[str]]:
    """Each distinct preprocessing with its patch, and the name:tag pairs that have it, as `create_model` makes them."""
    found = defaultdict(list)
    for name, tag in open_clip.list_pretrained():
        vision = open_clip.get_model_config(name)["vision_cfg"]
        config = merge_preprocess_dict(PreprocessCfg(), open_clip.get_pretrained_cfg(name, tag))
        config["size"] = vision.get("image_size", 224)
        timm = re.search(r"patch(\d+)", vision.get("timm_model_name", ""))
        patch = int(timm[1]) if timm else vision.get("patch_size") or 32
        found[(*((key, value) for key, value in config.items()), ("patch", patch))].append(f"{name}:{tag}")
    return found


PRESETS = presets()


def noise(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def patch_of(low: float, high: float, pixels: int) -> np.ndarray:
    """How much of each pixel lies in [low, high)."""
    starts = np.arange(pixels)
    return np.clip(np.minimum(starts + 1, high) - np.maximum(starts, low), 0, 1)


def test_the_presets_are_those_of_the_paper_trail() -> None:
    modes, means = defaultdict(int), set()
    for config, names in PRESETS.items():
        modes[dict(config)["resize_mode"]] += len(names)
        means.add(dict(config)["mean"])
    assert set(modes) == {"shortest", "squash"} and min(modes.values()) > 30 and len(means) >= 3
    assert sum(modes.values()) == len(open_clip.list_pretrained())


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: PRESETS[preset][0])
def test_every_tag(preset) -> None:
    """Equal pixels, and each corner's patch shows what `from_input` says, to a fifth of a pixel of the input."""
    config = dict(preset)
    patch = config.pop("patch")
    spec = InputSpec.from_open_clip(config, patch)
    transform = image_transform_v2(PreprocessCfg(**config), is_train=False)
    assert spec_of(transform, patch) == spec
    for height, width in SIZES:
        pixels, _ = prepare(noise(height, width), spec)
        assert torch.equal(normalize(pixels[None], spec)[0], transform(noise(height, width)))
    # Larger than the input: where an image is scaled up, much of what a patch shows is seen beside it.
    short, long = (int(max(spec.size) * scale) for scale in (1.53, 2.17))
    for height, width in ((short, long), (long, short)):
        _, geometry = prepare(Image.new("RGB", (width, height)), spec)
        rows, columns = (side // patch for side in geometry.covered)
        for row in (0, rows - 1):
            for column in (0, columns - 1):
                corners = torch.tensor([[column, row], [column + 1, row + 1]], dtype=torch.float64) * patch
                (left, top), (right, bottom) = geometry.from_input(corners).tolist()
                inside = np.outer(patch_of(top, bottom, height), patch_of(left, right, width))
                image = Image.fromarray((64 + 128 * inside).round().astype(np.uint8)).convert("RGB")
                seen = transform(image)[0].double() * spec.std[0] + spec.mean[0]
                seen = (255 * seen - 64) / 128
                assert seen.sum().item() == pytest.approx(patch**2, rel=0.03)
                assert centre(seen) == pytest.approx(((column + 0.5) * patch, (row + 0.5) * patch), abs=0.2)

                map_ = torch.zeros(rows, columns, dtype=torch.float64)
                map_[row, column] = 1
                back = geometry.to_image(map_)
                assert bool((back[inside == 1] >= 0.25).all())
                assert back[inside == 0].max() <= 0.5 + 1e-6


def centre(weights: Tensor) -> tuple[float, float]:
    """(x, y) of the centre of mass."""
    rows, columns = (torch.arange(n, dtype=torch.float64) + 0.5 for n in weights.shape)
    return float(weights.sum(0) @ columns / weights.sum()), float(weights.sum(1) @ rows / weights.sum())


transformers = pytest.importorskip("transformers")


def processor(name: str, **options: Any) -> Any:
    """An image processor that uses PIL: one of its own since transformers 5, the only one before."""
    return (getattr(transformers, f"{name}ImageProcessorPil", None) or getattr(transformers, f"{name}ImageProcessor"))(
        **options
    )


PROCESSORS = {
    "CLIP": lambda: processor("CLIP"),
    "CLIP 336": lambda: processor("CLIP", size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
    "CLIP, old numbers": lambda: processor("CLIP", size=97, crop_size=97),
    "CLIP, odd values": lambda: processor("CLIP", rescale_factor=1 / 127.5, image_mean=[0.1, 1.2, 0.3], resample=2),
    "CLIP, raw": lambda: processor("CLIP", do_normalize=False),
    "Chinese CLIP": lambda: processor("ChineseCLIP", size={"height": 224, "width": 224}),
    "Chinese CLIP, squashed": lambda: processor(
        "ChineseCLIP", size={"height": 224, "width": 224}, do_center_crop=False
    ),
    "SigLIP": lambda: processor("Siglip"),
    "SigLIP 384": lambda: processor("Siglip", size={"height": 384, "width": 384}),
    "SigLIP, rectangle": lambda: processor("Siglip", size={"height": 96, "width": 224}, resample=2),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_image_processor(name) -> None:
    theirs = PROCESSORS[name]()
    spec = InputSpec.from_transformers(theirs, 16)
    assert spec == spec_of(theirs, 16) == InputSpec.from_transformers(theirs.to_dict(), 16)
    for height, width in [*SIZES, (225, 224), (227, 224), (224, 229)]:
        image = noise(height, width)
        expected = torch.as_tensor(np.asarray(theirs(image)["pixel_values"][0]))
        found = normalize(prepare(image, spec)[0][None], spec)[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


# Before transformers 5 it takes sides of up to three pixels for channels.
@given(st.integers(4, 500), st.integers(4, 500), st.sampled_from([1, 16, 100, 256]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_naflex_budget(height, width, most) -> None:
    theirs = processor("Siglip2", max_num_patches=most)
    spec = InputSpec.from_transformers(theirs, 16)
    assert spec.resize == "keep" and spec.max_patches == most
    image = noise(height, width)
    pixels, geometry = prepare(image, spec)
    out = theirs(image)
    rows, columns = (side // 16 for side in geometry.input)
    assert out["spatial_shapes"][0] == (rows, columns) and rows * columns <= most
    assert geometry.box == pytest.approx((0, 0, width, height)) and geometry.covered == geometry.input
    expected = torch.as_tensor(out["pixel_values"][0][: rows * columns]).view(rows, columns, 16, 16, 3)
    found = normalize(pixels[None], spec)[0]
    torch.testing.assert_close(found, expected.permute(4, 0, 2, 1, 3).reshape(found.shape), rtol=1e-5, atol=2e-6)


def test_the_torchvision_processors_are_seldom_a_level_off() -> None:
    """What `from_transformers` says of them; since transformers 5 they have the plain names."""
    kind = getattr(transformers, "CLIPImageProcessorFast", None) or transformers.CLIPImageProcessor
    theirs = kind()
    spec = InputSpec.from_transformers(theirs, 16)
    far = []
    for height, width in SIZES:
        image = noise(height, width)
        levels = torch.as_tensor(theirs(image, return_tensors="pt")["pixel_values"][0]).double()
        mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (spec.mean, spec.std))
        levels = 255 * (levels * std + mean)
        far.append((levels - prepare(image, spec)[0]).abs())
    worst = torch.cat([f.flatten() for f in far])
    assert worst.max() <= 2.01 and (worst > 0.5).double().mean() < 0.01


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"do_resize": False}, "do_resize=False"),
        ({"do_center_crop": False}, "crop_size=None"),
        ({"crop_size": {"height": 200, "width": 200}}, "crop_size="),
        ({"size": {"longest_edge": 224}}, "size="),
        ({"size": {"shortest_edge": 224, "longest_edge": 300}}, "size="),
        ({"size": None}, "size=None"),
        ({"size": 224, "do_center_crop": None}, "crop_size=None"),
        ({"size": {"height": 256, "width": 256}}, "crop_size="),
        ({"do_pad": True}, "do_pad=True"),
        ({"image_std": None}, "no image_std"),
        ({"resample": 17}, "interpolation must be one of"),
    ],
)
def test_settings_that_cannot_be_read_are_named(changed, named) -> None:
    settings_ = {**processor("CLIP").to_dict(), **changed}
    with pytest.raises(InputError, match=re.escape(named)):
        InputSpec.from_transformers(settings_, 16)


@pytest.mark.parametrize(
    "bad", [{"max_patches": 4}, {"resize": "keep", "max_patches": 0}, {"centre": "up"},
            {"resize": "keep", "max_patches": 4, "max_side": 64}]
)  # fmt: skip
def test_bad_budgets_are_refused(bad) -> None:
    with pytest.raises(InputError):
        InputSpec(64, 16, **bad)


def test_defaults_are_open_clips() -> None:
    ours, theirs = InputSpec.from_open_clip({}, 16), asdict(PreprocessCfg())
    assert ours == InputSpec.from_open_clip(theirs, 16)
