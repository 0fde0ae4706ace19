"""What each image of a run is asked: the same texts for all, classes to choose from, or texts of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipfast.data.places import MissingError, read_bytes
from clipfast.engine.base import Item
from clipfast.engine.listing import CAPTION
from clipfast.errors import ImageError, InputError, TextError

if TYPE_CHECKING:
    from torch import Tensor

    from clipfast.api import Explainer
    from clipfast.metrics.zero_shot import Templates


@dataclass(frozen=True)
class Prompts:
    """What each image is asked: `texts`, shared by all, or those of its own in `column` of the source. Picklable.

    texts: asked of every image, or the names of classes where there are templates (see `template_texts`). top: of
    the texts, each image is explained for those with its highest scores only, this many.

    Raises InputError or TextError for what does not go together, and for blank texts.
    """

    texts: tuple[str, ...] = ()
    column: str | None = None
    templates: Templates | None = None
    top: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", tuple(dict.fromkeys(text.strip() for text in self.texts)))
        if self.templates is not None and not isinstance(self.templates, str):
            object.__setattr__(self, "templates", tuple(self.templates))
        if "" in self.texts:
            raise TextError("there is a blank text: leave it out, or say what to look for.")
        if self.column is not None and self.texts:
            raise InputError(
                f"texts for all images and each image's own ({_called(self.column)}) do not go together: choose one."
            )
        if self.column is None and not self.texts:
            raise TextError("there is no text: say what to look for, at least one text.")
        if self.column is not None and (self.top is not None or self.templates is not None):
            raise InputError(f"top and template choose among classes: leave them out with {_called(self.column)}.")
        if self.top is not None and self.top < 1:
            raise InputError(f"top={self.top} must be at least 1.")
        self._templates()

    @classmethod
    def parse(
        cls,
        given: Sequence[str] | None = None,
        spec: str | None = None,
        *,
        top: int | None = None,
        template: Sequence[str] | None = None,
        demo: bool = False,
    ) -> Prompts:
        """What the words of a command line ask for.

        given: texts for all images (-t). spec (--texts): a file with one text a line ("-" is stdin), whose texts
        follow those of -t; "column:NAME" of the source's table; "caption", beside each image; or "classes:FILE", names
        of classes, one a line. template: texts with {} for the class's name, or the name of known ones; by default
        "photo", for the demo model (`demo`) "bare".

        Raises TextError for a file without texts, InputError for what does not go together.
        """
        texts = list(given or [])
        kind, _, rest = (spec or "").partition(":")
        if spec == CAPTION or (kind == "column" and rest):
            if template:
                raise InputError(f"--template is for the names of classes, not for {_called(rest or CAPTION)}.")
            return cls(tuple(texts), rest or CAPTION, None, top)
        if kind == "classes" and rest:
            if texts:
                raise InputError("-t and --texts classes:FILE do not go together: add the text to the file of classes.")
            known: Templates = tuple(template or ()) or ("bare" if demo else "photo")
            return cls(tuple(read_texts(rest)), None, known[0] if len(known) == 1 else known, top)
        if template:
            raise InputError("--template is for the names of classes: give those as --texts classes:FILE.")
        if spec is not None:
            texts += read_texts(spec)
        return cls(tuple(texts), None, None, top)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the source must carry for it: what `open_source` takes as `columns`."""
        return () if self.column is None else (self.column,)

    @property
    def per_image(self) -> int | None:
        """How many maps an image gets, None where that differs from image to image."""
        if self.column is not None:
            return None
        return len(self.texts) if self.top is None else min(self.top, len(self.texts))

    def config(self) -> dict[str, Any]:
        """What the maps depend on, as JSON."""
        templates = list(self.templates) if isinstance(self.templates, tuple) else self.templates
        return {"texts": list(self.texts), "column": self.column, "templates": templates, "top": self.top}

    def asked(self, explainer: Explainer) -> list[str] | Tensor:
        """The shared texts as an `Explainer` takes them: strings, or embeddings (P, E) where several templates are
        averaged. Raises InputError where each image has texts of its own, TextError as `Model.encode_texts` does.
        """
        if self.column is not None:
            raise InputError(f"each image is asked for its own {_called(self.column)}: there are no shared texts.")
        templates = self._templates()
        if len(templates) == 1:
            return [templates[0].replace("{}", name) for name in self.texts]
        from clipfast.metrics.zero_shot import class_embeddings

        return class_embeddings(explainer.model, self.texts, templates, explainer.precision)

    def _templates(self) -> tuple[str, ...]:
        """The texts that names are put into. Raises InputError for unknown or unfit ones."""
        if self.templates is None:
            return ("{}",)
        from clipfast.metrics.zero_shot import template_texts

        return template_texts(self.templates)

    def chosen(self, scores: Tensor) -> Tensor:
        """Which of the shared texts images are explained for, from their scores (b, P): numbers (b, `per_image`).

        With `top` the best first, of equal ones the first of the list; else all in order.
        """
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        if self.top is None:
            return order.sort(dim=-1).values
        return order[:, : self.top]

    def own(self, item: Item) -> list[str]:
        """The texts of one image, from its columns: several where the column holds a list.

        Raises TextError where it has none, or something that is no text, ImageError for a sidecar that cannot be read.
        """
        assert self.column is not None
        value = item.columns.get(self.column)
        texts = []
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is not None and not isinstance(one, str):
                raise TextError(f"{item.key} has {str(one)[:40]!r} as its {_called(self.column)}, which is no text.")
            if one and one.strip():
                texts.append(one.strip())
        if not texts:
            raise TextError(f"{item.key} has no {_called(self.column)}.")
        return list(dict.fromkeys(texts))


def read_texts(file: str | Path) -> list[str]:
    """The lines of a text file that are not blank; it may be an address, and "-" is stdin.

    Raises TextError where there are none.
    """
    try:
        content = sys.stdin.read() if str(file) == "-" else read_bytes("", str(file)).decode("utf-8-sig")
    except MissingError:
        raise TextError(f"--texts {file}: there is no such file; it should hold one text a line.") from None
    except ImageError as error:
        raise TextError(f"--texts: {str(error).rstrip('.')}; it should hold one text a line.") from error
    except UnicodeDecodeError:
        raise TextError(f"--texts {file} is not UTF-8 text: it should hold one text a line.") from None
    lines = [line.strip() for line in content.splitlines() if line.strip()]
    if not lines:
        raise TextError(f"--texts {file} holds no text: it should hold one a line.")
    return lines


def _called(column: str) -> str:
    return CAPTION if column == CAPTION else f"text in column {column!r}"
