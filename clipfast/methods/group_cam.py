"""Group-CAM: groups of channels as masks between the image and its blur (Zhang, Rao and Yang, 2021, arXiv 2103.13859).

A_g = ReLU( sum_{c in g} w_c h_c ),   w_c = the mean over places of dS/dh_c,   M_g = minmax of A_g, brought up
H   = ReLU( sum_g ( S(x * M_g + blur(x) * (1 - M_g)) - S(blur(x)) ) M_g )
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.errors import InputError
from clipfast.methods.base import Explained, MethodInfo, at_least
from clipfast.methods.masking import encode_images, every_pair, whole_patches
from clipfast.methods.score_cam import ChannelMethod, Channels
from clipfast.models.families import AnyImageTower


@dataclass(frozen=True)
class GroupCamExplained(Explained):
    """x and blurred (B, 3, H, W). blank (B, E): the unit embeddings of the blurred images."""

    z: Tensor
    tower: AnyImageTower
    channels: Channels
    x: Tensor
    blurred: Tensor
    blank: Tensor
    groups: int

    @torch.no_grad()
    def maps(self, texts: Tensor, *, out: Tensor | None = None) -> Tensor:
        weights = self.channels.mean_gradient(texts)  # (B, P, C)
        texts = texts.expand(len(self.z), *texts.shape[-2:])
        if out is None:
            out = self.z.new_empty(*weights.shape[:2], self.channels.features[0, 0].numel())
        for p in range(weights.shape[1]):
            self._map(weights[:, p], texts[:, p], out[:, p])
        return out

    def _map(self, weights: Tensor, text: Tensor, out: Tensor) -> None:
        """One prompt of each image: weights (B, C), text (B, E) -> out (B, h * w)."""
        features = self.channels.features
        parts = (weights[..., None, None] * features).tensor_split(self.groups, dim=1)
        maps = torch.stack([part.sum(1) for part in parts], dim=1).relu_()  # (B, G, h, w)
        up = F.interpolate(maps, size=self.x.shape[2:], mode="bilinear", align_corners=False)
        low, high = up.flatten(2).aminmax(dim=-1)
        # A group that is flat hides the whole image, and gains nothing.
        span = torch.where(high > low, high - low, torch.inf)

        def masked(images: Tensor, groups: Tensor) -> Tensor:
            one = (images, groups)
            mask = (up[one] - low[one][:, None, None]) / span[one][:, None, None]
            return torch.lerp(self.blurred[images], self.x[images], mask[:, None].to(self.x.dtype))

        count = maps.shape[1]
        z = encode_images(self.tower, self.x, *every_pair(len(self.x), count), masked)
        gains = ((z.unflatten(0, (count, -1)) - self.blank) * text).sum(-1).T  # (B, G)
        normalised = (maps.flatten(2) - low[..., None]) / span[..., None]
        out.copy_((gains[:, None] @ normalised)[:, 0].relu_())


@dataclass(frozen=True)
class GroupCam(ChannelMethod):
    """Group-CAM.

    layer: as for `score_cam`. groups: of neighbouring channels, as even as can be. kernel and sigma: of the Gaussian
        that blurs the image, in pixels of the input.

    Raises InputError for numbers out of range.
    """

    groups: int = 32
    kernel: int = 51
    sigma: float = 50.0

    info: ClassVar = MethodInfo(
        source="Zhang, Rao and Yang, 2021 (arXiv 2103.13859)",
        forwards="groups * P + 2",
        backwards="0; P through the blocks from layer up, where that is not the last",
        prompt_free=False,
        agrees="the authors' algorithm restated on open_clip's own transformer and ResNet: 1e-10 in float64",
        our_reading="groups are runs of neighbouring channels, as in the authors' code (in gScoreCAM's, k-means), "
        "without its cut at each group's 70th percentile; gains are of the cosine, not of a softmax; masks are "
        "min-maxed in pixels and summed up at the layer's places",
    )

    def __post_init__(self) -> None:
        at_least(self, "groups", 1, whole=True)
        at_least(self, "kernel", 1, whole=True)
        at_least(self, "sigma", 0)
        if self.kernel % 2 == 0 or not self.sigma:
            raise InputError(f"kernel={self.kernel} must be odd and sigma={self.sigma:g} above zero.")

    @torch.no_grad()
    def image(self, tower: AnyImageTower, x: Tensor) -> GroupCamExplained:
        """Prepare normalised images (B, 3, H, W); n is the number of the layer's places, row by row."""
        channels = self.channels(tower, x)
        x = whole_patches(tower, x)
        blurred = self.blur(x)
        groups = min(self.groups, channels.features.shape[1])
        return GroupCamExplained(channels.z, tower, channels, x, blurred, tower.encode(blurred), groups)

    def blur(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) under the Gaussian, mirrored at the centres of their outermost pixels."""
        rows, columns = (self._smoothing(side).to(x) for side in x.shape[2:])
        return rows @ x @ columns.mT

    def _smoothing(self, side: int) -> Tensor:
        """What each pixel of a line takes from each: (side, side). A line may be shorter than the kernel."""
        taps = torch.arange(self.kernel) - self.kernel // 2
        weights = torch.exp(-0.5 * (taps.double() / self.sigma) ** 2)
        period = max(1, 2 * (side - 1))
        at = (torch.arange(side)[:, None] + taps) % period
        weights = (weights / weights.sum()).expand(side, -1)
        return weights.new_zeros(side, side).scatter_add_(1, torch.minimum(at, period - at), weights)
