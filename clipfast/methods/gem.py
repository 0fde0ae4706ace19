"""GEM: grounding everything, emerging localization properties in vision-language transformers (Bousselham et al., CVPR
2024), section 3.

Beside the last six blocks a second path adds up self-self attention without MLPs. For x = q, k and v of each head:

    x <- x / |x|;   x <- softmax(tau x x^T) x        once: a refinement step, in which clusters of patches draw together
    x <- x / |x|;   o_x = softmax(tau x x^T) v
    y_l = y_{l-1} + W_o (o_q + o_k + o_v) / 3 + b_o

tau = mean_i |norm_1(h)_i| / sqrt(d) over an image's tokens, d being the width of a head. H_i = cos(f_i, t), f_i being
the second path's patches through the final norm and the projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.methods.base import LinearExplained, Method, MethodInfo, at_least
from clipfast.methods.second_path import second_path
from clipfast.models.image import ImageTower
from clipfast.models.tower import Layer


@dataclass(frozen=True)
class Gem(Method):
    """GEM of images, as parameters of the class.

    layers: how many of the last blocks get the second path; None: the authors' six, or all of a tower with fewer.
    refinements: steps in which q, k and v are replaced by what their own attention makes of them (theirs: 1).
    tau: the inverse temperature of these attentions; None takes the mean length of a token over sqrt(d), as they do.
    """

    layers: int | None = None
    refinements: int = 1
    tau: float | None = None

    signs: ClassVar[bool] = False
    needs: ClassVar = "blocks"
    info: ClassVar = MethodInfo(
        source="Bousselham et al., CVPR 2024",
        forwards="1",
        backwards="0",
        prompt_free=True,
        agrees="the published algorithm, image by image on the model's own modules, to 1e-10 in float64",
    )

    def __post_init__(self) -> None:
        if self.layers is not None:
            at_least(self, "layers", 1, whole=True)
        at_least(self, "refinements", 0, whole=True)
        if self.tau is not None:
            at_least(self, "tau", 0)

    @property
    def has_features(self) -> bool:
        return True

    @torch.no_grad()
    def image(self, tower: ImageTower, x: Tensor) -> LinearExplained:
        """Prepare normalised images (B, 3, H, W); n is the number of patches, row by row."""
        z, patches = second_path(tower, x, self.layers, self._self_self)
        values = F.normalize(patches, dim=-1)
        return LinearExplained(z, values, values.new_ones(values.shape[:2]), relu="none")

    def _self_self(self, layer: Layer) -> Tensor:
        """The mean of q-q, k-k and v-v attention (B, N, D), all three as heads of one call."""
        heads = layer.block.heads
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (layer.q, layer.k, layer.v))
        if self.tau is None:
            lengths = layer.block.norm1(layer.h).norm(dim=-1).mean(-1)
            tau = (lengths * q.shape[-1] ** -0.5)[:, None, None, None]
        else:
            tau = q.new_tensor(self.tau)
        x = F.normalize(torch.cat((q, k, v), dim=1), dim=-1)
        for _ in range(self.refinements):
            x = F.normalize(F.scaled_dot_product_attention(x * tau, x, x, scale=1.0), dim=-1)
        o = F.scaled_dot_product_attention(x * tau, x, v.repeat(1, 3, 1, 1), scale=1.0)
        return o.unflatten(1, (3, heads)).mean(1).transpose(1, 2).flatten(2)
