"""pytorch-grad-cam's classes for CLIP: its constructors, context managers, targets and maps.

    from clipfast.compat.grad_cam import GradCAM, GradECLIP
    from clipfast.compat.score import Score

    with GradECLIP(Score(model, ["a dog", "a red car"])) as cam:
        maps = cam(x, targets=[lambda scores: scores[0]] * len(x))  # (B, H, W) float32 from 0 to 1, at the input's size

GradCAM and its kin are the library's own classes around a faster tower, with the same maps. They also work with frozen
weights and in bfloat16, and a list of targets that is too short is an error: the library leaves out the other images.
GradECLIP is one more class of the same kind, whose layers need no naming.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clipfast.api import Explainer
from clipfast.compat.accelerate import faster_classes, replay_of, running
from clipfast.compat.score import Score
from clipfast.errors import InputError, ModelError

if TYPE_CHECKING:
    from pytorch_grad_cam import (
        EigenCAM,
        EigenGradCAM,
        GradCAM,
        GradCAMElementWise,
        GradCAMPlusPlus,
        HiResCAM,
        LayerCAM,
        ScoreCAM,
        XGradCAM,
    )

Targets = Sequence[Callable[[Tensor], Tensor]] | None

__all__ = [
    "EigenCAM",
    "EigenGradCAM",
    "GradCAM",
    "GradCAMElementWise",
    "GradCAMPlusPlus",
    "GradECLIP",
    "HiResCAM",
    "LayerCAM",
    "ScoreCAM",
    "XGradCAM",
]


class GradECLIP:
    """Grad-ECLIP (Zhao et al., ICML 2024) as a class of pytorch-grad-cam.

    model: a `Score`. target_layers, reshape_transform: taken for the signature's sake; the last attention is explained,
    and its grid is known. **parameters: the method's own, such as layers=2.

    Raises ModelError for another model, InputError as `clipfast.Explainer` does.
    """

    def __init__(
        self,
        model: Score,
        target_layers: Sequence[Any] = (),
        reshape_transform: Callable[..., Any] | None = None,
        **parameters: Any,
    ):
        if not isinstance(model, Score):
            raise ModelError(
                "GradECLIP explains CLIP's score: wrap the model as clipfast.compat.score.Score(model, texts)."
            )
        self.model = model
        self.outputs: Tensor | None = None
        self._explainer = Explainer(model.model, "grad_eclip", **parameters)

    def __enter__(self) -> GradECLIP:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def __call__(self, input_tensor: Tensor, targets: Targets = None) -> np.ndarray:
        """Maps (B, H, W) float32 from 0 to 1 of normalised images (B, 3, H, W).

        targets: for each image a function of its scores (P,), which may be any that can be differentiated; None takes
        the text that scores highest. Raises InputError unless there is one an image.
        """
        import torch.nn.functional as F

        _one_an_image(targets, input_tensor)
        batch = self._explainer.batch(input_tensor)
        z = batch.embeddings
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            self.outputs = self.model.scale * z @ self.model.texts.T
            chosen = targets or [_highest] * len(z)
            total = torch.stack([target(row) for target, row in zip(chosen, self.outputs, strict=True)]).sum()
            (directions,) = torch.autograd.grad(total, z)
        maps = batch.explained.maps(directions[:, None])[:, 0].unflatten(-1, batch.grid).clamp(min=0)
        height, width = input_tensor.shape[-2:]
        # As the library: each map from 0 to 1 on its grid, enlarged, and from 0 to 1 once more.
        large = F.interpolate(_unit(maps)[:, None], size=(height, width), mode="bilinear", align_corners=False)[:, 0]
        return _unit(large).float().cpu().numpy()


def _faster(kind: Any) -> type:
    """A class of the library around the stand-in for the model's tower."""

    class Faster(kind):  # type: ignore[misc]
        def __init__(self, model: Any, *args: Any, **kwargs: Any):
            self._replay = replay_of(model)
            super().__init__(model, *args, **kwargs)

        def forward(self, input_tensor: Tensor, targets: Targets, eigen_smooth: bool = False) -> np.ndarray:
            _one_an_image(targets, input_tensor)
            with running(self._replay):
                if targets is None:
                    # The library asks numpy, which knows no bfloat16.
                    with torch.no_grad():
                        best = self.model(input_tensor.to(self.device)).argmax(-1).tolist()
                    targets = [operator.itemgetter(number) for number in best]
                found: np.ndarray = super().forward(input_tensor, targets, eigen_smooth)
                return found

        def compute_cam_per_layer(self, *args: Any) -> Any:
            kept = self.activations_and_grads
            kept.activations = [a.float() for a in kept.activations]
            kept.gradients = [g.float() for g in kept.gradients]
            return super().compute_cam_per_layer(*args)

    return Faster


__getattr__ = faster_classes(__name__, __all__, "pytorch_grad_cam", _faster)


def _one_an_image(targets: Targets, x: Tensor) -> None:
    if targets is not None and len(targets) != len(x):
        raise InputError(f"there must be one target an image: {len(targets)} targets came for {len(x)} images.")


def _highest(row: Tensor) -> Tensor:
    return row.max()


def _unit(maps: Tensor) -> Tensor:
    """The library's way to 0..1: its epsilon stands beside the maximum."""
    low = maps - maps.flatten(1).amin(1)[:, None, None]
    return low / (low.flatten(1).amax(1)[:, None, None] + 1e-7)
