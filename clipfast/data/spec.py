"""The input that a model wants, and how it is read from the preprocessing that comes with models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from clipfast.errors import InputError

RESAMPLING = {r.name.lower(): r for r in Image.Resampling}
_RESIZE = ("crop", "squash", "longest", "keep")
_OPEN_CLIP_RESIZE = {"shortest": "crop", "squash": "squash", "longest": "longest"}
_Triple = tuple[float, float, float]
_OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
_OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_READ_NOTHING = ("ToTensor", "MaybeToTensor", "MaybeConvertMode", "ToImage", "PILToTensor", "RGB", "ToDtype")


@dataclass(frozen=True)
class InputSpec:
    """What a model wants to see: the size of its input and how an image becomes it.

    size: (H, W) of the input in pixels; with resize="keep" only the default for tensors, images keep their own aspect.
    patch: (ph, pw), pixels of one patch.
    mean, std: of red, green and blue on the 0..1 scale.
    interpolation: a name of PIL's `Image.Resampling` in lower case.
    resize: "crop" (the shortest edge to the input's, then the centre), "squash" (both sides, aspect lost),
        "longest" (the longest edge to the input's, then padded with `fill`) or
        "keep" (native aspect, each side rounded to whole patches, at least one; scaled down to `max_side` if given, or
        up or down to as many patches as `max_patches` allows, each side rounded up, as NaFlex has it).
    fill: colour of the padding, 0..255.
    centre: where a crop begins that is half a pixel off the centre: "round" (to the even pixel, torchvision's) or
        "floor" (transformers').

    Raises InputError for a value that cannot be used.
    """

    size: tuple[int, int]
    patch: tuple[int, int]
    mean: tuple[float, float, float] = _OPENAI_MEAN
    std: tuple[float, float, float] = _OPENAI_STD
    interpolation: str = "bicubic"
    resize: str = "crop"
    fill: int = 0
    max_side: int | None = None
    max_patches: int | None = None
    centre: str = "round"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _pair(self.size, "size"))
        object.__setattr__(self, "patch", _pair(self.patch, "patch"))
        object.__setattr__(self, "mean", _triple(self.mean, "mean"))
        object.__setattr__(self, "std", _triple(self.std, "std"))
        if min(self.std) <= 0:
            raise InputError(f"std must be positive, not {self.std}.")
        if self.interpolation not in RESAMPLING:
            raise InputError(f"interpolation must be one of {', '.join(RESAMPLING)}, not {self.interpolation!r}.")
        if self.resize not in _RESIZE:
            raise InputError(f"resize must be one of {', '.join(_RESIZE)}, not {self.resize!r}.")
        if not (isinstance(self.fill, int) and 0 <= self.fill <= 255):
            raise InputError(f"fill must be a whole number from 0 to 255, not {self.fill!r}.")
        if any(s < p for s, p in zip(self.size, self.patch, strict=True)):
            raise InputError(
                f"an input of {self.size} holds no patch of {self.patch}: size must be at least the patch."
            )
        if self.max_side is not None and self.max_side < max(self.patch):
            raise InputError(f"max_side must be at least one patch ({max(self.patch)} pixels), not {self.max_side}.")
        if self.max_patches is not None and (self.resize != "keep" or self.max_side is not None):
            raise InputError("max_patches goes with resize='keep', and without max_side.")
        if self.max_patches is not None and self.max_patches < 1:
            raise InputError(f"max_patches must be at least 1, not {self.max_patches}.")
        if self.centre not in ("round", "floor"):
            raise InputError(f"centre must be 'round' or 'floor', not {self.centre!r}.")

    @property
    def black(self) -> tuple[float, float, float]:
        """A black pixel's red, green and blue in the model's input."""
        red, green, blue = (-mean / std for mean, std in zip(self.mean, self.std, strict=True))
        return red, green, blue

    @classmethod
    def from_open_clip(cls, cfg: Mapping[str, Any], patch: int | Sequence[int]) -> InputSpec:
        """From open_clip's `model.visual.preprocess_cfg` and the tower's patch size; absent keys mean its defaults.

        Raises InputError for a mode other than RGB or a resize mode that open_clip does not have.
        """
        if cfg.get("mode", "RGB") != "RGB":
            raise InputError(f"the model wants {cfg['mode']!r} images, only 'RGB' is supported.")
        mode = cfg.get("resize_mode") or "shortest"
        if mode not in _OPEN_CLIP_RESIZE:
            raise InputError(f"resize_mode must be one of {', '.join(_OPEN_CLIP_RESIZE)}, not {mode!r}.")
        size = _pair(cfg.get("size", 224), "size")
        interpolation = cfg.get("interpolation") or "bicubic"
        # open_clip reads "random" (a training augmentation) as bicubic, and its crop to a rectangle is always bicubic.
        if interpolation == "random" or (mode == "shortest" and size[0] != size[1]):
            interpolation = "bicubic"
        return cls(
            size=size,
            patch=_pair(patch, "patch"),
            mean=_triple(cfg.get("mean") or _OPENAI_MEAN, "mean"),
            std=_triple(cfg.get("std") or _OPENAI_STD, "std"),
            interpolation=interpolation,
            resize=_OPEN_CLIP_RESIZE[mode],
            fill=cfg.get("fill_color") or 0,
        )

    @classmethod
    def from_transformers(cls, processor: Any, patch: int | Sequence[int]) -> InputSpec:
        """From an image processor of transformers, a processor that has one, or its settings as `to_dict` gives them.

        Of the kinds of CLIP, Chinese CLIP, SigLIP and SigLIP 2, NaFlex included, which becomes resize="keep" with its
        budget of patches. The pixels are those of the processors that use PIL; of the ones that use torchvision, less
        than one value in a hundred is a level off, on noise.

        Raises InputError, naming the setting, for an effect on the pixels that is none of these.
        """
        processor = getattr(processor, "image_processor", processor)
        settings = processor if isinstance(processor, Mapping) else processor.to_dict()
        size, resize, budget = _sizes_of(settings)
        rows, columns = _pair(patch, "patch")
        if size is None:
            side = math.isqrt(budget or 1)
            size = (rows * side, columns * side)
        resample = settings.get("resample")
        names = {int(value): name for name, value in RESAMPLING.items()}
        interpolation = "bilinear" if resample is None else names.get(resample, getattr(resample, "value", resample))
        mean, std = _normalisation(settings)
        return cls(
            size=size,
            patch=(rows, columns),
            mean=mean,
            std=std,
            interpolation=str(interpolation),
            resize=resize,
            max_patches=budget,
            centre="floor" if resize == "crop" else "round",
        )


def spec_of(preprocess: object, patch: int | Sequence[int]) -> InputSpec:
    """Read an InputSpec from a torchvision `Compose`, open_clip's and OpenAI's own and others made of the same parts,
    or from an image processor of transformers (`InputSpec.from_transformers`).

    patch: the tower's patch size in pixels.

    Raises InputError, naming the transform, for anything whose effect on the geometry is not known.
    """
    if hasattr(preprocess, "image_processor") or hasattr(preprocess, "image_mean"):
        return InputSpec.from_transformers(preprocess, patch)
    steps = getattr(preprocess, "transforms", None)
    if not isinstance(steps, Iterable):
        raise _unread(preprocess, "is no torchvision Compose, and no image processor of transformers")
    found: dict[str, Any] = {}
    for step in steps:
        name = _name(step)
        if name in _READ_NOTHING or "convert" in name.lower():
            continue
        kind = "CenterCrop" if name == "CenterCropOrPad" else name
        if kind not in ("Resize", "ResizeKeepRatio", "ResizeMaxSize", "CenterCrop", "Normalize"):
            raise _unread(step, "is not known")
        slot = "Resize" if kind.startswith("Resize") else kind
        if slot in found or ("Normalize" in found) or (slot == "Resize" and "CenterCrop" in found):
            raise _unread(step, "comes where Resize, CenterCrop, Normalize is the order that can be read")
        found[slot] = step
    for slot in ("Resize", "Normalize"):
        if slot not in found:
            raise _unread(preprocess, f"has no {slot}")
    size, resize, fill = _read_resize(found["Resize"], found.get("CenterCrop"))
    interpolation = getattr(found["Resize"], "interpolation", "bicubic")
    return InputSpec(
        size=size,
        patch=_pair(patch, "patch"),
        mean=_triple(np.atleast_1d(found["Normalize"].mean).tolist(), "mean"),
        std=_triple(np.atleast_1d(found["Normalize"].std).tolist(), "std"),
        interpolation=str(getattr(interpolation, "value", interpolation)),
        resize=resize,
        fill=fill,
    )


def _read_resize(step: Any, crop: Any) -> tuple[tuple[int, int], str, int]:
    """(size, resize mode, fill) of a resizing transform and the crop after it."""
    name = _name(step)
    if name == "ResizeMaxSize":
        return _pair(step.max_size, "max_size"), "longest", int(step.fill)
    window = None if crop is None else _pair(crop.size, "size")
    if name == "ResizeKeepRatio":
        size = _pair(step.size, "size")
        if window != size or step.longest not in (0.0, 1.0) or step.random_scale_prob or step.random_aspect_prob:
            raise _unread(step, "is not followed by a crop to the same size, or is random")
        if step.longest == 1.0:
            if _name(crop) != "CenterCropOrPad":
                raise _unread(crop, "after ResizeKeepRatio(longest=1) is no CenterCropOrPad")
            return size, "longest", int(crop.fill)
        if size[0] == size[1]:
            raise _unread(step, "to a square rounds other than Resize does")
        return size, "crop", 0
    if getattr(step, "max_size", None) is not None:
        raise _unread(step, "has a max_size")
    if not isinstance(step.size, int) and len(step.size) == 2:
        size = _pair(step.size, "size")
        if window not in (None, size):
            raise _unread(crop, f"cuts {window} out of {size}")
        return size, "squash", 0
    size = _pair(step.size, "size")
    if window != size:
        raise _unread(step, f"to a shortest edge of {size[0]} is not followed by a CenterCrop of that size")
    return size, "crop", 0


def _name(step: object) -> str:
    return str(getattr(step, "__name__", type(step).__name__))


def _unread(step: object, why: str) -> InputError:
    return InputError(
        f"the preprocessing cannot be read: {_name(step)} {why}; pass normalised tensors instead, or an InputSpec."
    )


def _normalisation(settings: Mapping[str, Any]) -> tuple[_Triple, _Triple]:
    """(mean, std) on the 0..1 scale of an image processor's settings."""
    # It makes (x * rescale_factor - mean) / std of x in 0..255: the scale that is left over goes into mean and std.
    scale = 255 * (settings.get("rescale_factor") or 1 / 255) if settings.get("do_rescale", True) else 255.0
    normalises = settings.get("do_normalize", True)
    found = []
    for name, neutral in (("image_mean", 0.0), ("image_std", 1.0)):
        value = settings.get(name) if normalises else neutral
        if value is None:
            raise InputError(f"the image processor normalises and has no {name}.")
        red, green, blue = _triple(value, name)
        found.append((red / scale, green / scale, blue / scale))
    return found[0], found[1]


def _sizes_of(settings: Mapping[str, Any]) -> tuple[tuple[int, int] | None, str, int | None]:
    """(size, resize mode, budget of patches) of an image processor's settings."""
    for name in ("do_pad", "do_splits", "do_reduce_labels"):
        if settings.get(name):
            raise _unread_setting(name, settings[name])
    if not settings.get("do_resize", True):
        raise _unread_setting("do_resize", False)
    if settings.get("max_num_patches") is not None:
        return None, "keep", int(settings["max_num_patches"])
    cropped = _sides(settings, "crop_size") if settings.get("do_center_crop") else None
    size = _given(settings, "size")
    if isinstance(size, int):
        size = {"shortest_edge": size}
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        if cropped != (size["shortest_edge"],) * 2:
            raise _unread_setting("crop_size", settings.get("crop_size") if cropped else None)
        return cropped, "crop", None
    found = _sides(settings, "size")
    if cropped not in (None, found):
        raise _unread_setting("crop_size", settings["crop_size"])
    return found, "squash", None


def _given(settings: Mapping[str, Any], name: str) -> Any:
    found = settings.get(name)
    if isinstance(found, Mapping):
        return {key: value for key, value in found.items() if value is not None}
    return found


def _sides(settings: Mapping[str, Any], name: str) -> tuple[int, int]:
    found = _given(settings, name)
    if isinstance(found, dict) and set(found) == {"height", "width"}:
        found = (found["height"], found["width"])
    if found is None or isinstance(found, dict):
        raise _unread_setting(name, settings.get(name))
    return _pair(found, name)


def _unread_setting(name: str, value: Any) -> InputError:
    return InputError(
        f"the image processor cannot be read: {name}={value!r} is none of a shortest edge with the centre crop of that "
        "size, a height and width, or a budget of patches; pass normalised tensors instead, or an InputSpec."
    )


def _pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    sides = (value, value) if isinstance(value, int) else tuple(value)
    if len(sides) == 1:
        sides = sides * 2
    if len(sides) != 2 or any(int(s) != s or s < 1 for s in sides):
        raise InputError(f"{name} must be one or two positive whole numbers (height, width), not {value!r}.")
    return int(sides[0]), int(sides[1])


def _triple(value: float | Sequence[float], name: str) -> _Triple:
    values = (value,) if isinstance(value, (int, float)) else tuple(value)
    if len(values) == 1:
        values = values * 3
    if len(values) != 3 or not all(math.isfinite(v) for v in values):
        raise InputError(f"{name} must be three finite numbers (red, green, blue), not {value!r}.")
    return float(values[0]), float(values[1]), float(values[2])
