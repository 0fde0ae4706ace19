"""A model as open_clip describes it: what goes beside weights, so that they are read as what they are."""

from __future__ import annotations

import copy
import json
from typing import Any

from clipfast.data.geometry import InputSpec
from clipfast.models.load import architectures
from clipfast.models.model import Model

_RESIZE = {"crop": "shortest", "squash": "squash", "longest": "longest", "keep": "shortest"}


def open_clip_config(model: Model) -> dict[str, Any] | None:
    """The content of an open_clip_config.json, or None for an architecture that open_clip does not list.

    The activation, the sizes and the preprocessing are the model's own: a name alone leaves them open, and weights that
    were trained with QuickGELU compute something else without.
    """
    found = _config(model)
    if found is None:
        return None
    module: Any = model.module
    size = getattr(module.visual, "image_size", None)
    if size is not None:
        found["vision_cfg"]["image_size"] = size if isinstance(size, int) else list(size)
    quick = any(type(part).__name__ == "QuickGELU" for part in module.modules())
    return {
        "model_cfg": {**found, "quick_gelu": quick},
        "preprocess_cfg": preprocess_config(model.spec),
    }


def header(model: Model) -> dict[str, str]:
    """What the header of a weights file must hold beside, so that the model is known by it: the demo model's words."""
    from clipfast.models.demo import WORDS, WORDS_KEY, DemoTokenizer

    return {WORDS_KEY: json.dumps(WORDS)} if isinstance(model.tokenizer, DemoTokenizer) else {}


def preprocess_config(spec: InputSpec) -> dict[str, Any]:
    """An InputSpec as open_clip's preprocess_cfg."""
    return {
        "size": list(spec.size),
        "mode": "RGB",
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "resize_mode": _RESIZE[spec.resize],
        "fill_color": spec.fill,
    }


def _config(model: Model) -> dict[str, Any] | None:
    import open_clip

    from clipfast.models.demo import EMBED_DIM, TEXT, VISION, DemoTokenizer

    if isinstance(model.tokenizer, DemoTokenizer):
        text = {**TEXT, "vocab_size": model.tokenizer.vocab_size}
        return {"embed_dim": EMBED_DIM, "vision_cfg": dict(VISION), "text_cfg": text}
    name = model.name.partition(":")[0].replace("/", "-")
    if name not in open_clip.list_models():
        # Those that differ in the activation alone count as one; others of the same shapes cannot be told apart.
        fitting = {one.removesuffix("-quickgelu") for one in architectures(model.module.state_dict())}
        name = fitting.pop() if len(fitting) == 1 else ""
    return copy.deepcopy(open_clip.get_model_config(name)) if name else None
