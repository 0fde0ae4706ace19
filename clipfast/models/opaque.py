"""Text encoders of unknown structure: run as they are, for embeddings alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipfast.errors import ModelError
from clipfast.models.frozen import frozen
from clipfast.models.openclip import read_logit_scale
from clipfast.models.text import OpaqueText

_CLIP_CONTEXT = 77


def opaque_text(module: nn.Module, dtype: torch.dtype | None, why: str) -> OpaqueText:
    """The text side of a module that encodes texts as open_clip's models do (`encode_text`) or as transformers' do
    (`get_text_features`, which is told what is padding where its configuration says so; but SigLIP's sees it).

    Raises ModelError with `why` for a module that does neither, and as `frozen` does.
    """
    config: Any = getattr(module, "config", None)
    text = getattr(config, "text_config", None)
    padding = None if "siglip" in getattr(config, "model_type", "") else getattr(text, "pad_token_id", None)
    encoder: Callable[[Tensor], Tensor]
    if hasattr(module, "encode_text"):
        encoder = cast(Any, frozen(module, dtype)).encode_text
    elif hasattr(module, "get_text_features"):
        run = cast(Any, frozen(module, dtype)).get_text_features

        def encoder(ids: Tensor) -> Tensor:
            found = run(input_ids=ids) if padding is None else run(input_ids=ids, attention_mask=ids != padding)
            # An output object since transformers 5.
            return found if isinstance(found, Tensor) else found.pooler_output
    else:
        raise ModelError(why)
    weight = next(part for part in module.parameters() if part.is_floating_point())
    context = getattr(module, "context_length", None) or getattr(text, "max_position_embeddings", None)
    return OpaqueText(
        encoder=encoder,
        context_length=context or _CLIP_CONTEXT,
        result_dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
        device=weight.device,
        logit_scale=read_logit_scale(module),
        why=why,
        padding=padding,
    )
