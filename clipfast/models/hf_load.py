"""Models of transformers from a folder or the Hugging Face hub, each with its tokenizer and image processor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipfast.errors import ModelError

CONFIG = "config.json"
# What there is of where a tokenizer or an image processor came with the model: without its files transformers makes
# an empty tokenizer of some kinds.
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")
_IMAGES = ("preprocessor_config.json", "processor_config.json")


def on_hub(repository: str, file: str) -> bool:
    """Whether a repository of the hub, or what is cached of it, holds a file.

    Raises what huggingface_hub does where there is no such repository.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(repository, file)
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return False
    return True


def load_transformers(source: str) -> tuple[nn.Module, Any, Any]:
    """The model in a folder or repository, in float32, its tokenizer and its image processor, None for what is missing.

    No code that comes with a model is run. Raises ModelError where transformers is not installed, and what
    transformers raises for a model that cannot be loaded.
    """
    try:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
    except ImportError as error:
        raise ModelError(f"{source} is a model of transformers: pip install transformers.") from error
    with _quiet():
        module = AutoModel.from_pretrained(source, trust_remote_code=False, dtype=torch.float32)
        tokenizer = _if_there(AutoTokenizer, source, _TOKENIZER)
        return module, tokenizer, _if_there(AutoImageProcessor, source, _IMAGES)


def _if_there(kind: Any, source: str, files: Sequence[str]) -> Any:
    folder = Path(source)
    if not any((folder / file).is_file() if folder.is_dir() else on_hub(source, file) for file in files):
        return None
    return kind.from_pretrained(source, trust_remote_code=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
