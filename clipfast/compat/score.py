"""CLIP's score as a module: what general attribution libraries are given to explain."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.models.load import load
from clipfast.models.model import Model
from clipfast.sheet import unit_embeddings


class Score(nn.Module):
    """Normalised images (B, 3, H, W) -> cosines (B, P) with P texts: targets are the texts' numbers.

    model: what `clipfast.load` takes or returns. texts: strings, or embeddings (P, E), which are normalised here.
    scale: what cosines are multiplied by; None takes the model's own logit scale, so that a softmax gives CLIP's.

    Raises ModelError and TextError as `clipfast.load` and `Model.encode_texts` do.
    """

    texts: Tensor

    def __init__(self, model: Any, texts: str | list[str] | Tensor, *, scale: float | None = 1.0):
        super().__init__()
        self.model: Model = load(model)
        self.module = self.model.module
        # Libraries look at the outermost module's mode.
        self.training = self.module.training
        tower, _ = self.model.towers()
        if isinstance(texts, Tensor):
            embeddings = unit_embeddings(texts, tower.embed_dim, tower.result_dtype, tower.device)
        else:
            embeddings = self.model.encode_texts([texts] if isinstance(texts, str) else texts)
        self.register_buffer("texts", embeddings, persistent=False)
        self.scale = tower.logit_scale if scale is None else scale

    def forward(self, image: Tensor) -> Tensor:
        module: Any = self.module
        z = F.normalize(module.encode_image(image.to(self.model.towers()[0].dtype)).to(self.texts.dtype), dim=-1)
        return self.scale * z @ self.texts.T
