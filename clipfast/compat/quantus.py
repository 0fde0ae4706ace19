"""Quantus on clipfast: explanations of any method for its metrics, and its slow metrics sooner with the same numbers.

    from clipfast.compat.quantus import PixelFlipping, explain_func
    from clipfast.compat.score import Score

    score = Score(model, ["a dog", "a red car"])
    PixelFlipping(features_in_step=3584)(score, x, y, explain_func=explain_func("mga_clip"))

Quantus takes one step of all its images after another, although no step waits for a prediction. Here the steps are
drawn up first and go through the model in batches of a size that suits it; then the metric runs with the predictions.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from clipfast.api import Explainer
from clipfast.compat.accelerate import faster_classes, replay_of, running
from clipfast.compat.score import Score
from clipfast.errors import InputError, ModelError
from clipfast.metrics.road import impute

if TYPE_CHECKING:
    # Made as they are asked for: Quantus takes seconds to import.
    MPRT: Any
    ROAD: Any
    PixelFlipping: Any
    RegionPerturbation: Any

__all__ = ["MPRT", "ROAD", "PixelFlipping", "RegionPerturbation", "explain_func", "noisy_linear_imputation"]

# Images that go through a GPU at once. A CPU gains nothing beyond what the tower's own batches already are.
_PACK = 256


def explain_func(method: str = "grad_eclip", **parameters: Any) -> Callable[..., np.ndarray]:
    """A function for Quantus' `explain_func`: (model, inputs, targets, ...) -> maps (N, 1, H, W) at the inputs' size.

    The model is a `Score`, inputs are normalised images (N, 3, H, W), targets (N,) are numbers of its texts. method,
    parameters: as for `clipfast.Explainer`.

    The function raises ModelError for another model, InputError as `Explainer` does.
    """
    # Of the last model alone: randomisation tests come with a copy for every layer.
    last: list[tuple[Score, Explainer]] = []

    def explain(model: Any, inputs: Any, targets: Any, **_: Any) -> np.ndarray:
        score = _score(model)
        if not last or last[0][0] is not score:
            last[:] = [(score, Explainer(score.model, method, **parameters))]
        tower = score.model.towers()[0]
        x = torch.as_tensor(np.asarray(inputs), dtype=tower.dtype, device=tower.device)
        numbers = torch.as_tensor(np.asarray(targets), device=tower.device).long()
        maps = torch.as_tensor(last[0][1](x, score.texts[numbers], pairs=True).maps)
        large = F.interpolate(maps, size=x.shape[2:], mode="bilinear", align_corners=False)
        return large.float().cpu().numpy()

    return explain


def noisy_linear_imputation(arr: np.ndarray, indices: Any, noise: float = 0.01, **_: Any) -> np.ndarray:
    """Quantus' perturbation of ROAD: arr (C, H, W) with the pixels `indices` made up from their neighbours, and noise.

    Indices beyond H W, which Quantus' ROAD makes for images of several channels and its own function fails on, mean the
    same pixels in further channels. Raises InputError for anything but (C, H, W), and where no pixel is left.
    """
    if arr.ndim != 3:
        raise InputError(f"ROAD removes pixels of an image (C, H, W), not of an array of shape {arr.shape}.")
    chosen, pixels = np.asarray(indices).astype(np.int64), arr[0].size
    if chosen.size and chosen.max() >= pixels:
        chosen = np.unique(chosen % pixels)
    gone = torch.zeros(pixels, dtype=torch.bool)
    gone[torch.from_numpy(chosen)] = True
    filled = impute(torch.from_numpy(arr.astype(np.float64)), gone.view(arr.shape[1:])).numpy().reshape(len(arr), -1)
    filled[:, chosen] += noise * np.random.randn(len(arr), chosen.size)
    return filled.reshape(arr.shape).astype(arr.dtype)


def _faster(kind: Any) -> type:
    """A metric of Quantus' whose model runs on the stand-in, and whose steps are packed."""

    class Faster(kind):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any):
            if kind.__name__ == "ROAD":
                kwargs.setdefault("perturb_func", noisy_linear_imputation)
            super().__init__(*args, **kwargs)

        def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            with running(replay_of(model)):
                return super().__call__(model, *args, **kwargs)

        def evaluate_batch(self, *args: Any, model: Any, **kwargs: Any) -> Any:
            if kind.__name__ == "MPRT":
                # Its steps are models, not inputs.
                return super().evaluate_batch(*args, model=model, **kwargs)
            return _packed(lambda one: super(Faster, self).evaluate_batch(*args, model=one, **kwargs), model)

    return Faster


__getattr__ = faster_classes(__name__, __all__, "quantus", _faster)


def _packed(evaluate: Callable[[Any], Any], model: Any) -> Any:
    """What `evaluate(model)` gives, with the inputs of all its predictions sent through the model in batches."""
    drawn = np.random.get_state(), random.getstate(), torch.get_rng_state()

    def rewind() -> None:
        np.random.set_state(drawn[0])
        random.setstate(drawn[1])
        torch.set_rng_state(drawn[2])

    rehearsal = _Rehearsal(model)
    try:
        evaluate(rehearsal)
        predictions = rehearsal.finish()
        rewind()
        return evaluate(_Performance(model, rehearsal.marks, predictions))
    except _Unforeseen:
        rewind()
        return evaluate(model)


class _Unforeseen(Exception):
    """A metric asks for other predictions when it sees predictions: it cannot be rehearsed."""


class _Stage:
    """A model in a metric's hands, all of which but `predict` is the model's own."""

    def __init__(self, model: Any):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _Rehearsal(_Stage):
    """Notes what is to be predicted, and answers with the first prediction over and over."""

    def __init__(self, model: Any):
        super().__init__(model)
        self.marks: list[int] = []
        self._waiting: list[np.ndarray] = []
        self._done: list[np.ndarray] = []
        self._sizes: list[int] = []

    def predict(self, x: np.ndarray, **kwargs: Any) -> np.ndarray:
        if kwargs:
            raise _Unforeseen
        self.marks.append(_mark(x))
        self._sizes.append(len(x))
        self._waiting.append(np.array(x))
        if not self._done or sum(map(len, self._waiting)) >= _PACK:
            self._flush()
        return np.resize(self._done[0], (len(x), *self._done[0].shape[1:]))

    def finish(self) -> list[np.ndarray]:
        """The predictions, one array for each time that they were asked for."""
        self._flush()
        if not self._done:
            return []
        return np.split(np.concatenate(self._done), np.cumsum(self._sizes)[:-1])

    def _flush(self) -> None:
        if self._waiting:
            self._done.append(self._model.predict(np.concatenate(self._waiting)))
            self._waiting = []


class _Performance(_Stage):
    """Answers with predictions that are there."""

    def __init__(self, model: Any, marks: list[int], predictions: list[np.ndarray]):
        super().__init__(model)
        self._known = list(zip(marks, predictions, strict=True))

    def predict(self, x: np.ndarray, **kwargs: Any) -> np.ndarray:
        if kwargs or not self._known or self._known[0][0] != _mark(x):
            raise _Unforeseen
        return self._known.pop(0)[1]


def _mark(x: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(x).tobytes())


def _score(model: Any) -> Score:
    """The score in what Quantus hands over, which may be its own wrapper of it."""
    inner = model.get_model() if hasattr(model, "get_model") else model
    if isinstance(inner, torch.nn.Sequential) and len(inner) and isinstance(inner[0], Score):
        inner = inner[0]
    if not isinstance(inner, Score):
        raise ModelError(
            f"a {type(inner).__name__} is not explained here: pass clipfast.compat.score.Score(model, texts)."
        )
    return inner
