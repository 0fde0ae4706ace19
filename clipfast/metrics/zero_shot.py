"""Zero-shot classification: classes as embeddings of their names, and how often a model picks the right one.

    class k = mean over templates t of text(t with name k), made unit again
    prediction = arg max over k of image . class k

Radford et al., CLIP, ICML 2021, with their ensembles of templates. What a model takes a picture for is also what
deletion and insertion follow where the truth is not asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.data.datasets import Dataset
from clipfast.errors import InputError, nearest
from clipfast.metrics.base import Columns, Protocol
from clipfast.metrics.samples import OnError, batches
from clipfast.models.model import Model, Precision

Templates = str | Sequence[str]
"""The name of known templates ("openai", "simple", "photo", "bare"), or texts with {} where the class's name goes."""

# Texts that are encoded at once; what comes out does not depend on it.
_TEXTS = 4096

_Key = tuple[tuple[str, ...], tuple[str, ...]]
_cache: WeakKeyDictionary[Model, dict[Precision, tuple[Any, Any, dict[_Key, Tensor]]]] = WeakKeyDictionary()


def template_texts(given: Templates) -> tuple[str, ...]:
    """Texts with {} where the class's name goes.

    "openai": CLIP's 80 for ImageNet. "simple": the 7 that nearly match them. "photo": "a photo of a {}." alone.
    "bare": the name as it stands. Texts of the caller's own are returned as they are.

    Raises InputError for an unknown name, no template, or one without {}.
    """
    if isinstance(given, str):
        known: dict[str, Callable[[], tuple[str, ...]]] = {
            "openai": lambda: _published("OPENAI_IMAGENET_TEMPLATES"),
            "simple": lambda: _published("SIMPLE_IMAGENET_TEMPLATES"),
            "photo": lambda: ("a photo of a {}.",),
            "bare": lambda: ("{}",),
        }
        if "{}" in given:
            return (given,)
        if given not in known:
            raise InputError(f"there are no templates {given!r}: {nearest(given, known)}")
        return known[given]()
    texts = tuple(given)
    blank = next((text for text in texts if "{}" not in text), None)
    if not texts or blank is not None:
        raise InputError(f"a template must hold {{}} for the class's name; {blank!r} does not.")
    return texts


def _published(name: str) -> tuple[str, ...]:
    """Templates that open_clip holds as functions of the name."""
    import open_clip.zero_shot_metadata as published

    return tuple(template("{}") for template in getattr(published, name))


def default_templates(model: Model, dataset: Dataset) -> str:
    """What a model is asked with on a data set: the demo model knows bare names, ImageNet has CLIP's 80 templates."""
    if model.name == "demo":
        return "bare"
    return "openai" if dataset.name.startswith("imagenet") else "photo"


def class_embeddings(
    model: Model, names: Sequence[str], templates: Templates = "photo", precision: Precision = None
) -> Tensor:
    """Unit embeddings of K classes (K, E): means over templates of unit text embeddings, made unit again.

    names: of the classes, without article. templates: see `template_texts`. The result is kept, and made anew when the
    model's weights change; do not write into it. Equal to open_clip's `build_zero_shot_classifier`, transposed.

    Raises InputError for no class and as `template_texts` does, TextError as `Model.encode_texts` does.
    """
    texts, asked = template_texts(templates), tuple(names)
    if not asked:
        raise InputError("there is no class to embed: give at least one name.")
    # Towers are read anew when the weights change, so the tower stands for the model's state.
    tower = model.towers(precision)[1]
    held = _cache.setdefault(model, {})
    state = held.get(precision)
    if state is None or state[0] is not tower or state[1] is not model.tokenizer:
        held[precision] = state = (tower, model.tokenizer, {})
    found = state[2].get((asked, texts))
    if found is None:
        state[2][asked, texts] = found = _embed(model, asked, texts, precision)
    return found


@torch.no_grad()
def _embed(model: Model, names: Sequence[str], texts: Sequence[str], precision: Precision) -> Tensor:
    once = max(1, _TEXTS // len(texts))
    parts = []
    for start in range(0, len(names), once):
        chunk = names[start : start + once]
        z = model.encode_texts([text.replace("{}", name) for name in chunk for text in texts], precision)
        parts.append(F.normalize(z.unflatten(0, (len(chunk), len(texts))).mean(1), dim=-1))
    return torch.cat(parts)


@dataclass(frozen=True)
class ZeroShot(Protocol):
    """`zero_shot`: how often a class that is in the picture is the model's first choice, or among its first five.

    templates: see `template_texts`. Of equally near classes the one of the lower label is first.
    """

    templates: Templates = "photo"

    name: ClassVar[str] = "zero_shot"
    source: ClassVar[str] = "Radford et al., CLIP, ICML 2021"
    figures: ClassVar[Mapping[str, str]] = {"top-1": "higher", "top-5": "higher"}

    def __post_init__(self) -> None:
        if not isinstance(self.templates, str):
            object.__setattr__(self, "templates", tuple(self.templates))
        template_texts(self.templates)

    @torch.inference_mode(False)
    @torch.no_grad()
    def measure(
        self,
        model: Model,
        dataset: Dataset,
        *,
        precision: Precision = None,
        on_error: OnError = "raise",
        progress: Callable[[int], None] | None = None,
    ) -> Columns:
        """Columns of all samples: hits ("top-1", "top-5") and the label that the model picks ("prediction").

        A sample without labels has a prediction and no hits (NaN); one that cannot be read has neither with
        on_error="skip". progress: called with the number of samples done since the last call.

        Raises InputError for a data set without classes, ImageError for a sample that cannot be read.
        """
        if dataset.classes is None:
            raise InputError(f"{dataset.name} has no classes to choose from; it offers {', '.join(dataset.offers)}.")
        classes = class_embeddings(model, dataset.classes, self.templates, precision)
        columns = {name: torch.full((len(dataset),), torch.nan, dtype=torch.float64) for name in _COLUMNS}
        tower, _ = model.towers(precision)
        for batch in batches(model, dataset, precision=precision, on_error=on_error, progress=progress):
            z = tower.encode(batch.inputs(model, precision))
            order = (z @ classes.T).sort(dim=-1, descending=True, stable=True).indices[:, :5].cpu()
            for row, choice, sample in zip(batch.numbers, order, batch.samples, strict=True):
                columns["prediction"][row] = choice[0]
                right = {target.label for target in sample.targets if target.label is not None}
                if right:
                    hits = torch.isin(choice, torch.tensor(sorted(right)))
                    columns["top-1"][row], columns["top-5"][row] = hits[0], hits.any()
        return columns


_COLUMNS = ("top-1", "top-5", "prediction")
