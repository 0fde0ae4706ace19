"""Which reader makes towers of a module: found by what the module has, never by its class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clipfast.errors import ModelError
from clipfast.models import hf, hf_text, openclip, timm
from clipfast.models.conv import ConvTower, conv_tower
from clipfast.models.image import ImageTower
from clipfast.models.opaque import opaque_text
from clipfast.models.resnet import ResNetTower, resnet_tower
from clipfast.models.text import AnyTextTower

AnyImageTower = ImageTower | ConvTower
"""What the image side of a model may be read as."""

FeatureTower = ResNetTower | ConvTower
"""What has convolutional feature maps."""


@dataclass(frozen=True)
class Family:
    """One family of towers: its name, how its modules are known, and what reads them.

    read: (module, trunk dtype or None) -> tower.
    """

    name: str
    fits: Callable[[Any], bool]
    read: Callable[[nn.Module, torch.dtype | None], Any]


def _has(owner: Any, *names: str) -> bool:
    return all(getattr(owner, name, None) is not None for name in names)


def _has_trunk(module: Any, *names: str) -> bool:
    """Whether the image side is open_clip's TimmModel around a model with these parts."""
    return _has(module, "visual") and _has(module.visual, "trunk") and _has(module.visual.trunk, *names)


def _has_encoder(text: Any) -> bool:
    """Whether the text side is open_clip's HFTextEncoder."""
    return _has(text, "transformer", "pooler", "proj")


IMAGE: Sequence[Family] = (
    Family("ModifiedResNet", lambda m: _has(m, "visual") and _has(m.visual, "attnpool"), resnet_tower),
    Family("VisionTransformer", lambda m: _has(m, "visual") and _has(m.visual, "conv1"), openclip.image_tower),
    Family("transformers' CLIP and SigLIP", lambda m: _has(m, "vision_model"), hf.image_tower),
    Family("timm's transformers", lambda m: _has_trunk(m, "patch_embed", "blocks"), timm.image_tower),
    Family("timm's models of stages", lambda m: _has_trunk(m, "stages") or _has_trunk(m, "layers"), conv_tower),
)
TEXT: Sequence[Family] = (
    Family("transformers' encoders", lambda m: _has(m, "text") and _has_encoder(m.text), hf_text.encoder_tower),
    Family("transformers' CLIP and SigLIP", lambda m: _has(m, "text_model"), hf_text.text_tower),
    Family("TextTransformer", lambda m: True, openclip.text_tower),
)


def image_tower(module: nn.Module, dtype: torch.dtype | None = None) -> AnyImageTower:
    """The image side of a CLIP module, whatever its family. Raises ModelError naming the part that does not fit."""
    found: AnyImageTower = _family(IMAGE, module).read(module, dtype)
    return found


def text_tower(module: nn.Module, dtype: torch.dtype | None = None) -> AnyTextTower:
    """The text side, like `image_tower`; where its structure is not known, its embeddings alone."""
    try:
        found: AnyTextTower = _family(TEXT, module).read(module, dtype)
    except ModelError as error:
        return opaque_text(module, dtype, str(error))
    return found


def _family(families: Sequence[Family], module: nn.Module) -> Family:
    for one in families:
        if one.fits(module):
            return one
    names = ", ".join(one.name for one in families)
    parts = ", ".join(name for name, _ in module.named_children()) or "no modules"
    raise ModelError(
        f"{type(module).__name__}, with {parts}, is no model that clipfast knows; the families that it reads: {names}."
    )
