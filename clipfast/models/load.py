"""From a name, a path or a module to a `Model`."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from clipfast.errors import ModelError, nearest
from clipfast.models import hf_load
from clipfast.models.model import Model, Tokenizer

RANDOM = "random"
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
"""The files of a folder that open_clip calls local-dir: the architecture and the weights."""

_CLIP_VOCABULARY = 49408
_CHECKPOINTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def load(
    model: str | Path | nn.Module | Model = "demo",
    pretrained: str | Path | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    preprocess: Any = None,
    device: str | torch.device | None = None,
) -> Model:
    """A CLIP model, ready to be explained.

    model: "demo"; an open_clip architecture ("ViT-B-16" with `pretrained`, or "ViT-B-16:openai" in one word);
        "hf:org/name" for a model on the Hugging Face hub, open_clip's where it has an open_clip configuration, else
        transformers'; the path of a checkpoint (open_clip's .pt or .safetensors, an OpenAI JIT archive), of a folder
        with an open_clip_config.json and weights, as fine-tuning writes it, or of one as transformers writes it; or a
        module you already have, open_clip's or transformers', which stays as it is.
    pretrained: a weights tag of open_clip, the path of a checkpoint, or "random" for untrained weights.
    tokenizer, preprocess: replace the model's own; preprocess may be a torchvision Compose, an image processor of
        transformers or an InputSpec. A tag brings its own preprocessing; weights in a file get what the architecture's
        tags have in common, and open_clip's default for the rest.
    device: where to load it; CUDA if there is any, else the CPU.

    Raises ModelError: unknown name or tag (with the nearest ones), unreadable or unfitting checkpoint, or structure.
    """
    if isinstance(model, Model):
        return model
    # open_clip takes seconds to import and brings Triton along: whoever only reads results should not wait for it.
    import open_clip

    if isinstance(model, nn.Module):
        if tokenizer is None and getattr(model, "vocab_size", None) == _CLIP_VOCABULARY:
            tokenizer = open_clip.SimpleTokenizer(context_length=getattr(model, "context_length", 77))
        # A processor of transformers is both.
        return Model(model, tokenizer, preprocess or getattr(tokenizer, "image_processor", None))
    name = str(model)
    if pretrained is None and ":" in name and not name.startswith("hf:") and not Path(name).exists():
        name, pretrained = name.split(":", 1)
    module: nn.Module
    own: Tokenizer | None
    if name == "demo":
        from clipfast.models.demo import load_demo

        module, own = load_demo(None if pretrained is None else Path(pretrained))
    elif name.startswith("hf:"):
        with _reading(name):
            mine = hf_load.on_hub(name[3:], CONFIG)
        if mine:
            module, own = _create("hf-hub:" + name[3:], None)
        else:
            module, own, preprocess = _load_transformers(name[3:], preprocess)
    elif (Path(name) / CONFIG).is_file():
        module, own = _load_folder(Path(name))
    elif (Path(name) / hf_load.CONFIG).is_file():
        module, own, preprocess = _load_transformers(name, preprocess)
    elif Path(name).is_dir() and name not in open_clip.list_models():
        raise ModelError(f"the folder {name} holds neither open_clip's {CONFIG} nor transformers' {hf_load.CONFIG}.")
    elif Path(name).is_file() or Path(name).suffix in _CHECKPOINTS:
        module, own = _load_path(Path(name))
        name = Path(name).name
    else:
        module, own = _load_named(name, None if pretrained is None else str(pretrained))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    label = name if pretrained is None else f"{name}:{pretrained}"
    return Model(module.to(device).eval(), tokenizer or own, preprocess, label)


def known_models() -> dict[str, list[str]]:
    """open_clip's architectures, each with its weights tags."""
    import open_clip

    return {name: open_clip.list_pretrained_tags_by_model(name) for name in open_clip.list_models()}


def _load_named(name: str, pretrained: str | None) -> tuple[nn.Module, Tokenizer]:
    import open_clip

    name = name.replace("/", "-")
    names = open_clip.list_models()
    if name not in names:
        raise ModelError(f"there is no model or file {name!r}: {nearest(name, ['demo', *names])}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise ModelError(
            f"{name} needs weights: name them as {name}:{tags[0] if tags else 'path/to/weights.pt'} "
            f"(known: {', '.join(tags) or 'none'}; or a checkpoint's path; or '{RANDOM}')."
        )
    if pretrained == RANDOM:
        return _create(name, None)
    if pretrained.lower() not in [t.lower() for t in tags] and not Path(pretrained).is_file():
        raise ModelError(f"{name} has no weights or file {pretrained!r}: {nearest(pretrained, [*tags, RANDOM])}")
    return _create(name, pretrained)


def _load_folder(folder: Path) -> tuple[nn.Module, Tokenizer]:
    from clipfast.models.demo import is_demo, load_demo

    own = folder / WEIGHTS
    return load_demo(own) if is_demo(own) else _create(f"local-dir:{folder}", None)


def _load_path(path: Path) -> tuple[nn.Module, Tokenizer]:
    import open_clip

    if not path.is_file():
        raise ModelError(f"there is no checkpoint {path}.")
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        return _load_folder(path.parent)
    with _reading(path):
        weights = _state_dict(path)
    if weights is None:
        with _reading(path):
            module = open_clip.load_openai_model(str(path), precision="fp32", device="cpu")
        return module, open_clip.SimpleTokenizer(context_length=module.context_length)
    fitting = architectures(weights)
    if not fitting:
        raise ModelError(
            f"{path} is not told by its weights' shapes: name its architecture, as "
            f"clipfast.load('ViT-B-16-SigLIP', pretrained='{path.name}'), or build the module and pass it."
        )
    if len(fitting) > 1:
        raise ModelError(
            f"{path} fits {' and '.join(fitting)}, which have the same shapes but compute differently: "
            f"say which, as clipfast.load('{fitting[0]}', pretrained='{path.name}')."
        )
    return _create(fitting[0], str(path))


def architectures(weights: Mapping[str, Tensor]) -> list[str]:
    """open_clip's architectures that have the shapes of a state dict, of those with its own kinds of towers."""
    import open_clip

    return [name for name in open_clip.list_models() if _fits(open_clip.get_model_config(name), weights)]


def _state_dict(path: Path) -> Mapping[str, Tensor] | None:
    """The weights in a checkpoint, or None for a TorchScript archive."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.load(str(path), map_location="cpu")
        return None
    except RuntimeError:
        pass
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        stored = stored.get("state_dict", stored)
    except (pickle.UnpicklingError, EOFError, RuntimeError, AttributeError) as error:
        raise ValueError("it holds no weights that open_clip or torch.save could have written.") from error
    return {key.removeprefix("module."): value for key, value in stored.items()}


def _create(name: str, pretrained: str | None) -> tuple[nn.Module, Tokenizer]:
    import open_clip

    with _reading(pretrained or name):
        module = open_clip.create_model(
            name, pretrained=pretrained, force_preprocess_cfg=_preprocessing(name, pretrained)
        )
        return module, open_clip.get_tokenizer(name)


def _preprocessing(name: str, pretrained: str | None) -> dict[str, Any]:
    """What weights that say nothing of their preprocessing are given: all that the architecture's published ones share.

    open_clip takes its own defaults there, OpenAI's, which are wrong for SigLIP, CLIPA, DFN, PE ...
    """
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is not None and pretrained.lower() in [tag.lower() for tag in tags]:
        return {}
    found: dict[str, Any] = {}
    for key in ("mean", "std", "interpolation", "resize_mode"):
        values = {open_clip.get_pretrained_cfg(name, tag).get(key) for tag in tags}
        if len(values) == 1:
            found[key] = values.pop()
    return found


def _load_transformers(source: str, preprocess: Any) -> tuple[nn.Module, Tokenizer | None, Any]:
    """The model, its tokenizer, and what prepares its images unless `preprocess` is to."""
    with _reading(source):
        module, tokenizer, processor = hf_load.load_transformers(source)
    return module, tokenizer, preprocess or processor


@contextmanager
def _reading(source: object) -> Iterator[None]:
    """open_clip, torch and safetensors each fail in their own way on a missing or broken file: one sentence for all."""
    disabled = logging.root.manager.disable
    try:
        # open_clip and the hub's client log every retry, and that random weights are random: the error below is enough.
        logging.disable(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            yield
    except ModelError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{source} cannot be loaded: {shorten(reason, 300)}") from error
    finally:
        logging.disable(disabled)


def _fits(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> bool:
    """Whether a configuration has the shapes of a state dict; head counts and activations leave no trace in them."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision or "hf_model_name" in text or "multimodal_cfg" in config:
        return False
    resnet = isinstance(vision.get("layers"), list)
    if not resnet and ("visual.ln_pre.weight" in weights) == bool(vision.get("no_ln_pre")):
        return False
    prefix = "text." if "text.token_embedding.weight" in weights else ""
    expected = {
        **(_resnet_shapes if resnet else _transformer_shapes)(vision, config["embed_dim"]),
        f"{prefix}token_embedding.weight": (text.get("vocab_size", 49408), text.get("width", 512)),
        f"{prefix}positional_embedding": (text.get("context_length", 77), text.get("width", 512)),
    }
    if any(name not in weights or tuple(weights[name].shape) != shape for name, shape in expected.items()):
        return False
    if bool(prefix) != bool(config.get("custom_text")):
        return False
    if ("visual.transformer.resblocks.0.ls_1.gamma" in weights) != (vision.get("ls_init_value") is not None):
        return False
    counted = [(f"{prefix}transformer.resblocks.{{}}.ln_1.weight", text.get("layers", 12))]
    if resnet:
        counted += [(f"visual.layer{i}.{{}}.conv1.weight", n) for i, n in enumerate(vision["layers"], start=1)]
    else:
        counted += [("visual.transformer.resblocks.{}.ln_1.weight", vision.get("layers", 12))]
    return all(name.format(n - 1) in weights and name.format(n) not in weights for name, n in counted)


def _transformer_shapes(vision: Mapping[str, Any], embed_dim: int) -> dict[str, tuple[int, ...]]:
    width, patch = vision.get("width", 768), vision.get("patch_size", 16)
    size = vision.get("image_size", 224)
    height, wide = (size, size) if isinstance(size, int) else size
    return {
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.positional_embedding": (1 + (height // patch) * (wide // patch), width),
        "visual.proj": (width, embed_dim),
        "visual.transformer.resblocks.0.mlp.c_fc.weight": (int(width * vision.get("mlp_ratio", 4)), width),
    }


def _resnet_shapes(vision: Mapping[str, Any], embed_dim: int) -> dict[str, tuple[int, ...]]:
    width, size = vision.get("width", 64), vision.get("image_size", 224)
    return {
        "visual.conv3.weight": (width, width // 2, 3, 3),
        "visual.attnpool.positional_embedding": (1 + (size // 32) ** 2, 32 * width),
        "visual.attnpool.c_proj.weight": (embed_dim, 32 * width),
    }
