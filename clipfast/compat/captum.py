"""captum's methods for CLIP, by captum's own names, constructors and `attribute`: the same numbers, sooner.

    from clipfast.compat.captum import IntegratedGradients
    from clipfast.compat.score import Score

    score = Score(model, ["a dog", "a red car"])
    IntegratedGradients(score).attribute(x, target=1)

The forward function is a `Score`, a clipfast model (its embeddings are the outputs), or any module that holds one CLIP:
whatever it does beside running the image tower stays as it is. Other forward functions run as in captum; for a lambda
around a model use `clipfast.accelerate`, which is told the model. captum's NoiseTunnel takes these methods, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from clipfast.compat.accelerate import faster_classes, library, replay_of, running
from clipfast.compat.replay import Replay
from clipfast.models.load import load
from clipfast.models.model import Model

if TYPE_CHECKING:
    from captum.attr import (
        FeatureAblation,
        GradientShap,
        InputXGradient,
        IntegratedGradients,
        KernelShap,
        LayerGradCam,
        LayerIntegratedGradients,
        Occlusion,
        Saliency,
    )

__all__ = [
    "FeatureAblation",
    "GradientShap",
    "InputXGradient",
    "IntegratedGradients",
    "KernelShap",
    "LayerGradCam",
    "LayerIntegratedGradients",
    "Occlusion",
    "Saliency",
    "fast_gradient_func",
]


def fast_gradient_func(model: Any) -> Callable[..., tuple[Tensor, ...]]:
    """For the slot `gradient_func` of captum's objects: gradients (B, 3, H, W) through `model`'s tower.

    `method = captum.attr.Saliency(f); method.gradient_func = fast_gradient_func(model)`. model: the one that f runs,
    what `clipfast.load` takes. Raises ModelError for one without a vision transformer.
    """
    library("captum")
    from captum._utils.gradient import compute_gradients

    replay = Replay(load(model))

    @functools.wraps(compute_gradients)
    def gradient_func(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        with running(replay):
            return compute_gradients(*args, **kwargs)

    return gradient_func


def _faster(kind: Any) -> type:
    """A captum class that takes clipfast models for forward functions, and whose `attribute` runs the stand-in."""
    original = kind.attribute

    class Faster(kind):  # type: ignore[misc]
        def __init__(self, forward_func: Any, *args: Any, **kwargs: Any):
            self._replay = replay_of(forward_func)
            if isinstance(forward_func, Model):
                forward_func = forward_func.module.encode_image
            super().__init__(forward_func, *args, **kwargs)

        def attribute(self, *args: Any, **kwargs: Any) -> Any:
            return replayed(self, *args, **kwargs)

    def replayed(self: Any, *args: Any, **kwargs: Any) -> Any:
        with running(self._replay):
            return original(self, *args, **kwargs)

    # captum's classes, NoiseTunnel above all, call one another through `__wrapped__`.
    functools.update_wrapper(Faster.attribute, original).__wrapped__ = replayed
    return Faster


__getattr__ = faster_classes(__name__, __all__, "captum.attr", _faster)
