"""CLIP Surgery: a closer look at the explainability of contrastive language-image pre-training (Li et al., 2023).

Architecture surgery (section 3.2): beside the last six blocks a second path adds up v-v self-attention without MLPs,

    y_l = y_{l-1} + W_o softmax(v v^T / sqrt(d)) v + b_o            v from the tower's own tokens

and its patches, through the final norm and the projection, are the features f_i. Feature surgery (section 3.3) takes
out what all prompts have in common. Written with tensors of (patches, prompts, channels) in the paper, it is

    S_ti  = cos(f_i, t)
    w_t   = softmax_t(2 cos(cls, t)) / mean_t(...)        cls: the class token of the tower's own path
    H_ti  = w_t S_ti - mean_t(w_t S_ti)                   = f_i . (w_t t - mean_t(w_t t)), one product

A prompt alone has nothing in common with others; then H_i = S_ti - S_0i with the empty text's S_0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.errors import InputError
from clipfast.methods.base import Explained, Method, MethodInfo, at_least
from clipfast.methods.second_path import second_path
from clipfast.models.image import ImageTower
from clipfast.models.tower import Layer
from clipfast.ops.spatial_attribution import gradient_weighted


@dataclass(frozen=True)
class SurgeryExplained(Explained):
    """B images on which the architecture surgery is done. z (B, E); features (B, n, E): unit embeddings of patches."""

    z: Tensor
    features: Tensor

    def maps(self, texts: Tensor, *, out: Tensor | None = None, companions: Tensor | None = None) -> Tensor:
        """Maps (B, P, n) for unit text embeddings (P, E), or (B, P, E) with prompts of their own for each image.

        The prompts of one call compete: a prompt's map depends on which others are asked for with it.
        companions (1, E): the empty text's unit embedding, which a single prompt needs.

        Raises InputError for a single prompt without it.
        """
        batch, n, _ = self.features.shape
        texts = texts.to(self.z.dtype).expand(batch, *texts.shape[-2:])
        if texts.shape[1] > 1:
            # softmax over its mean of 1 / P
            weight = (2 * texts @ self.z[:, :, None]).softmax(1) * texts.shape[1]
            weighted = weight * texts
            directions = weighted - weighted.mean(1, keepdim=True)
        elif companions is None:
            raise InputError("clip_surgery compares prompts: give several, or the empty text's embedding beside one.")
        else:
            directions = texts - companions.to(texts.dtype)
        if out is None:
            out = self.z.new_empty(batch, texts.shape[1], n)
        return gradient_weighted(self.z.new_ones(batch, n), self.features, directions, relu=False, out=out)


@dataclass(frozen=True)
class ClipSurgery(Method):
    """CLIP Surgery of images, as parameters of the class.

    A prompt's map depends on the other prompts of the call, whose common part is taken out; the authors ask for a
    class among some sixty names of things. One prompt alone is compared with the empty text.

    layers: how many of the last blocks get the second path; None: the authors' six, or all of a tower with fewer.

    Features are unit embeddings, as the paper's cosines ask. (The authors' demonstration divides each channel by its
    norm over the image's tokens.)
    """

    layers: int | None = None

    needs: ClassVar = "blocks"
    info: ClassVar = MethodInfo(
        source="Li et al., arXiv 2304.05653",
        forwards="1",
        backwards="0",
        prompt_free=True,
        agrees="the published algorithm, image by image on the model's own modules, to 1e-10 in float64",
    )

    def __post_init__(self) -> None:
        if self.layers is not None:
            at_least(self, "layers", 1, whole=True)

    def companions(self, prompts: int) -> tuple[str, ...]:
        """The empty text where a prompt is alone."""
        return ("",) if prompts == 1 else ()

    @torch.no_grad()
    def image(self, tower: ImageTower, x: Tensor) -> SurgeryExplained:
        """Prepare normalised images (B, 3, H, W); n is the number of patches, row by row."""
        z, patches = second_path(tower, x, self.layers, _value_value)
        return SurgeryExplained(z, F.normalize(patches, dim=-1))


def _value_value(layer: Layer) -> Tensor:
    return layer.block.attend(layer.v, layer.v, layer.v)
