"""Class activation maps of convolutional CLIPs as the pytorch-grad-cam library computes them.

    grad_cam++   ReLU(sum_c w_c h_c),  w_c = sum_i a_ic ReLU(g_ic),  a = g^2 / (2 g^2 + (sum_i h_ic) g^3 + 1e-6)
    xgrad_cam    ReLU(sum_c w_c h_c),  w_c = sum_i g_ic h_ic / (sum_i h_ic + 1e-7)
    layer_cam    ReLU(sum_c ReLU(g_c) h_c)

h (C, h, w): a layer's features; g = dS/dh, i running over its places. The library gets both and gives the map, which is
the one step in which its methods differ (`get_cam_image`). What it does around that step is left out: hooks on the
model, a pass of it for every prompt, and the picture it makes of the map, resized to the image and min-maxed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clipfast.errors import InputError
from clipfast.methods.base import Explained, Method, MethodInfo
from clipfast.models.families import FeatureTower
from clipfast.models.gradients import score_gradients


@dataclass(frozen=True)
class CamExplained(Explained):
    """features (B, C, h, w); graph (B, E): the unit embeddings as made of them; cam: the library's object."""

    z: Tensor
    features: Tensor
    graph: Tensor
    cam: Any

    def maps(self, texts: Tensor, *, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = self.z.new_empty(len(self.z), texts.shape[-2], self.features[0, 0].numel())
        features = self.features.detach().cpu().numpy()
        for p, (gradient,) in enumerate(score_gradients(self.graph, [self.features], texts, keep=True)):
            cams = self.cam.get_cam_image(None, None, None, features, gradient.cpu().numpy(), eigen_smooth=False)
            out[:, p] = torch.from_numpy(cams).flatten(1).relu_()
        return out


@dataclass(frozen=True)
class LibraryCam(Method):
    """What the library's methods share. A subclass names the library's class."""

    layer: int | str = -1

    library: ClassVar[str]
    needs: ClassVar = "features"
    keeps_activations: ClassVar[bool] = True

    def grid(self, tower: FeatureTower, size: tuple[int, int]) -> tuple[int, int]:
        return tower.grid_at(size, self.layer)

    @torch.no_grad()
    def image(self, tower: FeatureTower, x: Tensor) -> CamExplained:
        """Prepare normalised images (B, 3, H, W); n is the number of the layer's places, row by row.

        Raises InputError where the library is not installed, and for a layer that there is not.
        """
        features = tower.features(x, self.layer).to(tower.result_dtype)
        with torch.enable_grad():
            graph = tower.from_features(features.requires_grad_(), self.layer)
        # Of a model the library wants to know its device; without layers to watch it neither hooks nor runs it. One
        # whose weights start as ones leaves the caller's random numbers alone.
        cam = getattr(_library(), self.library)(nn.LayerNorm(1), target_layers=[])
        return CamExplained(graph.detach(), features, graph, cam)


def _info(source: str) -> MethodInfo:
    """All that the library's methods have in common."""
    return MethodInfo(
        source=source,
        forwards="1",
        backwards="P (through the blocks above layer, and what pools them)",
        prompt_free=False,
        agrees="pytorch-grad-cam as released, hooked to open_clip's own ResNet and timm's ConvNeXt, to 1e-9 in float64",
    )


@dataclass(frozen=True)
class GradCamPlusPlus(LibraryCam):
    """Grad-CAM++ of a convolutional CLIP.

    The library's 1e-6 stands beside squared gradients of a cosine, which are smaller.

    layer: whose output is explained: a ResNet's block, of other towers a stage; its number, from the top where
        negative, or its name ("layer3", "layer4.0", "stages.2"). Every prompt takes a backward pass from the embedding
        down to it.
    """

    library: ClassVar[str] = "GradCAMPlusPlus"
    info: ClassVar = _info("Chattopadhay et al., WACV 2018")


@dataclass(frozen=True)
class XGradCam(LibraryCam):
    """XGrad-CAM of a convolutional CLIP.

    layer: as for `grad_cam++`.
    """

    library: ClassVar[str] = "XGradCAM"
    info: ClassVar = _info("Fu et al., BMVC 2020")


@dataclass(frozen=True)
class LayerCam(LibraryCam):
    """LayerCAM of a convolutional CLIP.

    layer: as for `grad_cam++`.
    """

    library: ClassVar[str] = "LayerCAM"
    info: ClassVar = _info("Jiang et al., IEEE TIP 2021")


def _library() -> Any:
    try:
        import pytorch_grad_cam
    except ImportError as error:
        raise InputError(
            "grad_cam++, xgrad_cam and layer_cam need the pytorch-grad-cam library: pip install 'clipfast[cam]'."
        ) from error
    return pytorch_grad_cam
