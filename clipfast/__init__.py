"""clipfast explains CLIP: which patches of an image and which words of a text make their score what it is."""

from clipfast.api import Explainer, explain
from clipfast.errors import (
    BackendError,
    ClipfastError,
    ImageError,
    InputError,
    ModelError,
    TextError,
)
from clipfast.models.load import load
from clipfast.models.model import Model
from clipfast.ops.dispatch import backend
from clipfast.results import Attribution, Features, Words

__version__ = "0.1.0"

__all__ = [
    "Attribution",
    "BackendError",
    "ClipfastError",
    "Explainer",
    "Features",
    "ImageError",
    "InputError",
    "Model",
    "ModelError",
    "TextError",
    "Words",
    "backend",
    "explain",
    "load",
]
