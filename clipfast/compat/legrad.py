"""The LeGrad package's wrapper (Bousselham et al., 2024), for today's open_clip and many images.

    from clipfast.compat.legrad import LeWrapper, LePreprocess  # in place of: from legrad import ...

The package needs an open_clip from before 2.24, replaces methods of the model that it is given, and takes one image at
a time; here the model is only read. Maps are the package's: of the last blocks, at the input's size, from 0 to 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.api import Explainer
from clipfast.errors import InputError, ModelError
from clipfast.models.image import ImageTower
from clipfast.models.load import load
from clipfast.ops.minmax import minmax


class LeWrapper(nn.Module):
    """An open_clip model, or what `clipfast.load` returns or takes, with `compute_legrad`; all else is the model's own.

    layer_index: the lowest block that is explained, from the top where negative. Raises InputError where there is no
    such block, ModelError for a model whose image tower is no vision transformer with a class token.
    """

    def __init__(self, model: Any, layer_index: int = -2):
        super().__init__()
        loaded = load(model)
        tower, _ = loaded.towers()
        if not isinstance(tower, ImageTower) or not tower.has_class_token:
            raise ModelError(f"LeGrad cannot explain {loaded.name}: its image tower is a {tower.kind}.")
        self.starting_depth = tower.block_index(layer_index, "layer_index")
        self.patch_size = tower.patch_size[0]
        # Not a submodule: the model's parameters stay its own, and are not listed twice.
        object.__setattr__(self, "_explainer", Explainer(loaded, "legrad", layers=tower.depth - self.starting_depth))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._explainer.model.module, name)

    def compute_legrad(self, text_embedding: Tensor, image: Tensor | None = None) -> Tensor:
        """Maps (B, P, H, W) from 0 to 1 of normalised images (B, 3, H, W) for text embeddings (P, E).

        Each is divided by its own maximum; a constant one is zero. Raises InputError without an image: nothing is kept
        from an earlier `encode_image`.
        """
        if image is None:
            raise InputError("compute_legrad keeps nothing of an earlier encode_image: pass image=.")
        maps = self._explainer(image, text_embedding).maps
        # Theirs enlarges each layer's map and adds up; enlarging is linear, so the sum's is the same.
        sides = [int(side) * self.patch_size for side in maps.shape[-2:]]
        large = F.interpolate(maps, size=sides, mode="bilinear", align_corners=False)
        return minmax(large.flatten(2), constant=0.0).unflatten(2, sides)

    compute_legrad_clip = compute_legrad


class LePreprocess(nn.Module):
    """A model's preprocessing for square inputs of any size: squashed, bicubic, then the model's last steps."""

    def __init__(self, preprocess: Any, image_size: int):
        super().__init__()
        from torchvision.transforms import Compose, InterpolationMode, Resize

        steps = list(preprocess.transforms)[-3:]
        self.transform = Compose([Resize((image_size, image_size), interpolation=InterpolationMode.BICUBIC), *steps])

    @torch.no_grad()
    def forward(self, image: Any) -> Tensor:
        """A PIL image as the model's input (3, image_size, image_size)."""
        return self.transform(image)
