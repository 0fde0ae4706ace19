"""Models of transformers from a folder or the Hugging Face hub, each with its tokenizer and image processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from clipfast.errors import ModelError

CONFIG = "config.json"


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
        return module, _if_there(AutoTokenizer, source), _if_there(AutoImageProcessor, source)


def _if_there(kind: Any, source: str) -> Any:
    load: Callable[..., Any] = kind.from_pretrained
    try:
        return load(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
