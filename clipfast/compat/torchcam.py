"""torchcam's LeGrad and DeletionInsertionMetric for CLIP, by torchcam's signatures.

    from clipfast.compat.torchcam import DeletionInsertionMetric, LeGrad
    from clipfast.compat.score import Score

    score = Score(model, ["a dog", "a red car"])
    with LeGrad(score) as extractor:
        maps = extractor(1, score(x))  # a list with one tensor (B, h, w), from 0 to 1

torchcam's own LeGrad needs blocks with `torch.nn.MultiheadAttention`, which open_clip's are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clipfast.api import Explainer
from clipfast.compat.accelerate import faster_classes, replay_of, running
from clipfast.compat.score import Score
from clipfast.errors import InputError, ModelError

if TYPE_CHECKING:
    from torchcam.metrics import ClassificationMetric, DeletionInsertionMetric

__all__ = ["ClassificationMetric", "DeletionInsertionMetric", "LeGrad"]


class LeGrad:
    """LeGrad of a `Score`'s image tower, as one of torchcam's extractors.

    target_layer: the lowest of the blocks that are explained, or all of them in a list, as modules; None takes the last
    two. The user runs the score; the extractor keeps the images that went in.

    Raises ModelError for another model, InputError for blocks that are not the tower's last ones.
    """

    def __init__(
        self, model: Score, target_layer: nn.Module | Sequence[nn.Module] | None = None, *, enable_hooks: bool = True
    ):
        if not isinstance(model, Score):
            raise ModelError(
                "LeGrad explains CLIP's score: wrap the model as clipfast.compat.score.Score(model, texts)."
            )
        self.model = model
        visual: Any = model.module.visual
        blocks = list(visual.transformer.resblocks)
        named = blocks[-2:] if target_layer is None else target_layer
        chosen = [named] if isinstance(named, nn.Module) else list(named)
        numbers = sorted(i for i, block in enumerate(blocks) if any(block is one for one in chosen))
        if len(numbers) != len(chosen) or (len(chosen) > 1 and numbers != list(range(numbers[0], len(blocks)))):
            raise InputError("target_layer must be a block of the image tower, or its last ones.")
        self.target_names = [f"visual.transformer.resblocks.{i}" for i in range(numbers[0], len(blocks))]
        self._explainer = Explainer(model.model, "legrad", layers=len(blocks) - numbers[0])
        self._enabled = enable_hooks
        self._input: Tensor | None = None
        self._hook: Any = model.register_forward_pre_hook(self._note)

    def __enter__(self) -> LeGrad:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove_hooks()

    def __call__(
        self, class_idx: int | list[int], scores: Tensor | None = None, normalized: bool = True, **_: Any
    ) -> list[Tensor]:
        """One tensor (B, h, w) in a list, the mean over blocks; from 0 to 1 unless normalized is False.

        class_idx: the number of the text, or one an image. Raises InputError before the score was run, and for a
        number too few or too many.
        """
        if self._input is None:
            raise InputError("run the score on the images first: the extractor explains what went in last.")
        numbers = [class_idx] * len(self._input) if isinstance(class_idx, int) else list(class_idx)
        if len(numbers) != len(self._input):
            raise InputError(f"there must be one class an image: {len(numbers)} came for {len(self._input)} images.")
        found = self._explainer(self._input, self.model.texts[numbers], pairs=True)
        # torchcam takes the mean over blocks where the paper adds up.
        maps = torch.as_tensor(found.maps)[:, 0] / len(self.target_names)
        return [self._normalize(maps) if normalized else maps]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        """The one map that there is, (B, h, w)."""
        return cams[0]

    def remove_hooks(self) -> None:
        """Forget the images, and let go of the score."""
        self._hook.remove()
        self._input = None

    def _note(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        if self._enabled:
            self._input = args[0].detach()

    @contextmanager
    def _hooks_off(self) -> Iterator[None]:
        """torchcam's metrics run changed images in between."""
        self._enabled, before = False, self._enabled
        try:
            yield
        finally:
            self._enabled = before

    @staticmethod
    def _normalize(maps: Tensor) -> Tensor:
        low = maps - maps.flatten(1).amin(1)[:, None, None]
        return low / (low.flatten(1).amax(1)[:, None, None] + 1e-8)


def _faster(kind: Any) -> type:
    """A metric of torchcam's whose model runs on the stand-in."""

    class Faster(kind):  # type: ignore[misc]
        def update(self, *args: Any, **kwargs: Any) -> None:
            with running(replay_of(self.cam_extractor.model)):
                super().update(*args, **kwargs)

    return Faster


__getattr__ = faster_classes(__name__, __all__, "torchcam.metrics", _faster)
