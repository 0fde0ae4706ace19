"""Score-CAM and gScoreCAM: each channel of a layer as a mask on the image, weighted by the score it leaves.

    H = ReLU( sum_c w_c h_c ),   w = softmax over all channels c of (logit scale * s_c)
    s_c = S(x * M_c),            M_c = minmax of h_c, brought up to the image bilinearly with its corners kept

Score-CAM (Wang et al., CVPR workshops 2020) takes every channel. gScoreCAM (Chen et al., ACCV 2022) takes those with
the largest mean gradient over places, and gives the others a score of zero: they keep their part of the softmax, which
is why the scores have to be as large as the model's logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.methods.base import Explained, Method, MethodInfo, at_least, combine
from clipfast.methods.grad_cam import GradCam, MeanGradient
from clipfast.methods.masking import encode_images, every_pair, whole_patches
from clipfast.models.families import AnyImageTower
from clipfast.ops.minmax import minmax


@dataclass(frozen=True)
class Channels:
    """A layer of B images. z (B, E): their unit embeddings. features (B, C, h, w): the layer's channels.

    mean_gradient: unit embeddings (P, E) or (B, P, E) -> the means over places of dS/dfeatures, (B, P, C).
    """

    z: Tensor
    features: Tensor
    mean_gradient: MeanGradient


def encode_channels(tower: AnyImageTower, x: Tensor, features: Tensor, images: Tensor, channels: Tensor) -> Tensor:
    """Unit embeddings (R, E) of image i of x (B, 3, H, W) under its channel c, for R pairs of indices on the CPU."""
    seen = whole_patches(tower, x)
    size = (seen.shape[2], seen.shape[3])

    def masked(some: Tensor, of: Tensor) -> Tensor:
        up = F.interpolate(features[some, of][:, None], size=size, mode="bilinear", align_corners=True)
        # A constant channel hides the image.
        return seen[some] * minmax(up.flatten(2), constant=0.0).view_as(up).to(seen.dtype)

    return encode_images(tower, seen, images, channels, masked)


def weigh(features: Tensor, logits: Tensor, out: Tensor | None) -> Tensor:
    """ReLU of the channels (B, C, h, w) summed with the softmax of logits (B, P, C): (B, P, h * w)."""
    if out is None:
        out = logits.new_empty(*logits.shape[:2], features[0, 0].numel())
    values = features.flatten(2).mT
    return combine([values.new_ones(values.shape[:2])], [values], logits.softmax(-1), "each", out)


@dataclass(frozen=True)
class ScoreCamExplained(Explained):
    """masked (B, C, E): the unit embeddings of each image under each of its channels."""

    z: Tensor
    features: Tensor
    masked: Tensor
    logit_scale: float

    def maps(self, texts: Tensor, *, out: Tensor | None = None) -> Tensor:
        return weigh(self.features, self.logit_scale * (texts @ self.masked.mT), out)


@dataclass(frozen=True)
class GScoreCamExplained(Explained):
    """Prompts choose their channels; one that several prompts of an image choose is encoded once."""

    z: Tensor
    tower: AnyImageTower
    x: Tensor
    channels: Channels
    top: int

    @torch.no_grad()
    def maps(self, texts: Tensor, *, out: Tensor | None = None) -> Tensor:
        importance = self.channels.mean_gradient(texts)  # (B, P, C)
        best = importance.topk(min(self.top, importance.shape[-1]), dim=-1).indices
        chosen = torch.zeros_like(importance, dtype=torch.bool).scatter_(-1, best, True)
        images, numbers = chosen.any(1).nonzero().cpu().unbind(1)
        masked = self.z.new_zeros(len(chosen), chosen.shape[-1], self.z.shape[1])
        features = self.channels.features
        masked[images, numbers] = encode_channels(self.tower, self.x, features, images, numbers)
        scores = (texts @ masked.mT).masked_fill_(~chosen, 0)
        return weigh(features, self.tower.logit_scale * scores, out)


@dataclass(frozen=True)
class ChannelMethod(Method):
    """What methods on the channels of a layer share: Grad-CAM's layers, grid and mean gradients over places."""

    layer: int | str = -1

    needs: ClassVar = "pixels"

    @property
    def keeps_activations(self) -> bool:  # type: ignore[override]
        return self._grad_cam.keeps_activations

    def grid(self, tower: AnyImageTower, size: tuple[int, int]) -> tuple[int, int]:
        return self._grad_cam.grid(tower, size)

    def channels(self, tower: AnyImageTower, x: Tensor) -> Channels:
        """The layer's channels for images (B, 3, H, W). Raises InputError for a layer that there is not."""
        weighted = self._grad_cam.image(tower, x)
        features = weighted.features.mT.unflatten(-1, self.grid(tower, (x.shape[2], x.shape[3])))
        return Channels(weighted.z, features, weighted.mean_gradient)

    @property
    def _grad_cam(self) -> GradCam:
        return GradCam(self.layer, mean_over="patches")


@dataclass(frozen=True)
class ScoreCam(ChannelMethod):
    """Score-CAM: a pass for every channel, which all prompts share.

    layer: whose channels: of a transformer the input of block `layer`, at the patches; of a ResNet the output of that
        block, of other convolutional towers of that stage, or of a named one ("layer4", "stages.3"); counted from the
        top where negative.
    """

    info: ClassVar = MethodInfo(
        source="Wang et al., CVPR workshops 2020",
        forwards="channels + 1",
        backwards="0",
        prompt_free=False,
        agrees="pytorch-grad-cam's ScoreCAM as released, on open_clip's own transformer and ResNet, to 1e-5",
        our_reading="a transformer's features are the patches at the input of its last block; scores are the model's "
        "logits",
    )

    @torch.no_grad()
    def image(self, tower: AnyImageTower, x: Tensor) -> ScoreCamExplained:
        """Prepare normalised images (B, 3, H, W); n is the number of the layer's places, row by row."""
        channels = self.channels(tower, x)
        count = channels.features.shape[1]
        masked = encode_channels(tower, x, channels.features, *every_pair(len(x), count))
        masked = masked.unflatten(0, (count, len(x))).transpose(0, 1)
        return ScoreCamExplained(channels.z, channels.features, masked, tower.logit_scale)


@dataclass(frozen=True)
class GScoreCam(ChannelMethod):
    """gScoreCAM: Score-CAM with the `top` channels of each prompt, by their signed mean gradient over places.

    layer: as for `score_cam`. top: how many channels a prompt takes; all where there are fewer.
    """

    top: int = 300

    info: ClassVar = MethodInfo(
        source="Chen et al., ACCV 2022",
        forwards="top * P + 1, channels that prompts share only once",
        backwards="0; P through the blocks from layer up, where that is not the last",
        prompt_free=False,
        agrees="the authors' algorithm restated on open_clip's own transformer and ResNet: 1e-10 in float64",
        our_reading="a transformer's features are the patches at the input of its last block",
    )

    def __post_init__(self) -> None:
        at_least(self, "top", 1, whole=True)

    @torch.no_grad()
    def image(self, tower: AnyImageTower, x: Tensor) -> GScoreCamExplained:
        """Prepare normalised images (B, 3, H, W); n is the number of the layer's places, row by row."""
        channels = self.channels(tower, x)
        return GScoreCamExplained(channels.z, tower, x, channels, self.top)
