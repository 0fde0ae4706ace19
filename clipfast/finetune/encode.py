"""Pixels to embeddings for the inner problem, where gradients are wanted of pixels and of no weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from clipfast.errors import ModelError
from clipfast.finetune.adversary import Encode
from clipfast.models.conv import ConvTower
from clipfast.models.families import image_tower


def pixel_encoder(visual: nn.Module, mean: Tensor, std: Tensor, *, normalize: bool) -> Encode:
    """Pixels (B, 3, H, W) in [0, 1] -> the module's embeddings (B, E), by a tower of clipfast's own on its weights.

    visual     the image side of a CLIP, as in evaluation mode; never called.
    mean, std  of the model's preprocessing, (3, 1, 1) on its device.
    normalize  whether embeddings have unit length; they are float32, or float64 of a float64 module.

    Differentiable in the pixels alone, and for that cheaper than the module: the last block runs for the pooled token,
    and gradients reach pixels through a product in place of a convolution. Made inside of autocast, it has a copy of
    the weights in that dtype, which autocast would cast anew in each pass, as it does with all that need no gradient.
    To be made anew when the weights have changed.

    Raises ModelError for a module that clipfast reads no tower of, and for one that is compiled, sharded, hooked, or
    keeps less for the backward pass by running parts twice: a tower would do without all that.
    """
    if any(_told_how(module) for module in visual.modules()):
        raise ModelError("the tower is compiled, sharded, hooked or recomputed in parts; it runs so as itself alone.")
    device = mean.device.type
    side = nn.Module()
    side.visual = visual
    tower = image_tower(side, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)

    def encode(pixels: Tensor) -> Tensor:
        with torch.autocast(device, enabled=False):
            fitted, x = tower.fitted(tower.grid_of(pixels)), (pixels - mean) / std
            if isinstance(fitted, ConvTower):
                found = fitted.unnormalized(fitted.features(x))
            else:
                h = fitted.embed(x)
                found = fitted.unnormalized(h, fitted.pooled(h))
        return F.normalize(found, dim=-1) if normalize else found

    return encode


def _told_how(module: nn.Module) -> bool:
    """Whether a module runs otherwise than its class does."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return bool(hooked) or isinstance(module, FSDPModule) or module._compiled_call_impl is not None
