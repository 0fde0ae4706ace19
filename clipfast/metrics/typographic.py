"""The typographic attack: a word is pasted on an image; where does the attribution go, how far do the scores move?

Goh et al., Multimodal Neurons in Artificial Neural Networks, Distill 2021, found that CLIP takes an apple with a note
that says "iPod" for one; MGA-CLIP explains such images. Plate, place and measure are our reading:

    share = sum of max(map, 0) inside the plate / sum of max(map, 0)        on the image's own pixels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from clipfast.api import Explainer, Texts
from clipfast.data.images import read_image
from clipfast.errors import InputError
from clipfast.metrics.base import Columns, Protocol
from clipfast.results import Attribution

_INK, _PLATE = (16, 16, 20), (250, 250, 250)


@dataclass(frozen=True)
class Typographic:
    """What a pasted word did to B images and P prompts.

    before and after: the explanations of the clean and of the attacked images, (B, P) maps each.
    share_before, share_after (B, P): the share of positive attribution inside the plate's pixels (0 for a map without
        any); on the clean image these are the same pixels without the plate.
    area (B,): the plate's share of the pixels that the model sees, which is what an indifferent map would give.
    boxes: (left, top, right, bottom) of the plates in pixels.
    """

    before: Attribution
    after: Attribution
    share_before: Tensor
    share_after: Tensor
    area: Tensor
    boxes: list[tuple[int, int, int, int]]

    @property
    def moved(self) -> Tensor:
        """How far each score moved, after less before: (B, P)."""
        return self.after.scores - self.before.scores


def paste_word(
    image: Image.Image, word: str, at: tuple[float, float] = (0.5, 0.82), width: float = 0.5
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """A copy of the image with the word on a white plate, and the plate's box (left, top, right, bottom).

    at: the plate's centre, as shares of the image's width and height; moved inwards where it would stick out.
    width: of the plate, as a share of the image's. The plate is as high as the word needs.

    Raises InputError for an empty word, or a plate that cannot hold it at the image's size.
    """
    if not word.strip():
        raise InputError("the word to paste is empty.")
    _check_plate(at, width)
    wide = round(width * image.width)
    size = wide
    while size > 4 and _extent(word, size)[0] > 0.88 * wide:
        size -= 1
    across, down = _extent(word, size)
    high = round(down * 1.5)
    if across > wide or high > image.height:
        raise InputError(
            f"{word!r} cannot be written {wide} pixels wide on an image of {image.width} x {image.height}."
        )
    left = min(max(round(at[0] * image.width - wide / 2), 0), image.width - wide)
    top = min(max(round(at[1] * image.height - high / 2), 0), image.height - high)
    pasted = image.convert("RGB")
    draw = ImageDraw.Draw(pasted)
    draw.rectangle((left, top, left + wide - 1, top + high - 1), fill=_PLATE)
    draw.text((left + wide / 2, top + high / 2), word, font=ImageFont.load_default(size), fill=_INK, anchor="mm")
    return pasted, (left, top, left + wide, top + high)


def typographic(
    explainer: Explainer, images: Any, texts: Sequence[str] | Tensor, words: str | Sequence[str], **plate: Any
) -> Typographic:
    """Explain images before and after a word is pasted on each, for the same prompts.

    images: files or PIL images, B of them. texts: P prompts, usually what is there and what is written. words: one
    word for all images, or one each. **plate: `at` and `width` of `paste_word`.

    Raises InputError where images and words do not fit together, and as `Explainer` and `paste_word` do.
    """
    pictures = [read_image(image) for image in (images if isinstance(images, list | tuple) else [images])]
    written = [words] * len(pictures) if isinstance(words, str) else list(words)
    if len(written) != len(pictures):
        raise InputError(f"there are {len(pictures)} images and {len(written)} words: give one word, or one an image.")
    attacked, boxes = [], []
    for picture, word in zip(pictures, written, strict=True):
        pasted, box = paste_word(picture, word, **plate)
        attacked.append(pasted)
        boxes.append(box)
    before, after = explainer(pictures, texts), explainer(attacked, texts)
    seen = [_seen(before, i) for i in range(len(pictures))]
    return Typographic(
        before=before,
        after=after,
        share_before=torch.stack([_share(before.resize(i), box) for i, box in enumerate(boxes)]),
        share_after=torch.stack([_share(after.resize(i), box) for i, box in enumerate(boxes)]),
        area=torch.stack([_share(mask, box) for mask, box in zip(seen, boxes, strict=True)]),
        boxes=boxes,
    )


@dataclass(frozen=True)
class PastedWord(Protocol):
    """`typographic`: what is left on an image of the maps of what it shows, once something else is written on it.

    word: what is written; None: the name of a class that the image does not show, drawn by its number in the data set.
    at, width: of the plate, as `paste_word` takes them. seed: of the draws.

    share before, share after: of each map's positive attribution, inside the plate's pixels. score moved: the score
    after less that before, which is the model's alone and the same for all methods.
    """

    word: str | None = None
    at: tuple[float, float] = (0.5, 0.82)
    width: float = 0.5
    seed: int = 0

    name: ClassVar[str] = "typographic"
    source: ClassVar[str] = "our reading of MGA-CLIP's experiment; Goh et al., Distill 2021"
    figures: ClassVar[Mapping[str, str]] = {"share before": "lower", "share after": "lower", "score moved": "higher"}

    def __post_init__(self) -> None:
        if not isinstance(self.at, tuple) or len(self.at) != 2:
            raise InputError(f"at must be two shares of the image, across and down, not {self.at!r}.")
        if self.word is not None and not (isinstance(self.word, str) and self.word.strip()):
            raise InputError(f"word must be a word to paste, or None, not {self.word!r}.")
        _check_plate(self.at, self.width)

    def measure(
        self, explainer: Explainer, image: Image.Image, texts: Texts, word: str | None, maps: Tensor, scores: Tensor
    ) -> Columns:
        """Columns of P pairs: the figures and `area`, the plate's share of what the model sees.

        texts: P of them. maps (P, H, W), scores (P,): those of the clean image, on its own pixels. NaN where there is
        no word, or it cannot be written on an image so small.

        Raises as the explainer does.
        """
        columns = {name: torch.full((len(maps),), torch.nan, dtype=torch.float64) for name in (*self.figures, "area")}
        try:
            pasted, box = paste_word(image, word or "", self.at, self.width)
        except InputError:
            return columns
        after = explainer(pasted, texts)
        found = (
            _share(maps, box),
            _share(after.resize(0), box),
            after.scores[0] - scores,
            _share(_seen(after, 0), box).expand(len(maps)),
        )
        return {name: values.double().cpu() for name, values in zip(columns, found, strict=True)}


def _check_plate(at: tuple[float, float], width: float) -> None:
    if not 0 < width <= 1 or not all(0 <= v <= 1 for v in at):
        raise InputError(f"at={at} and width={width} are shares of the image, between 0 and 1.")


def _extent(word: str, size: int) -> tuple[float, float]:
    left, top, right, bottom = ImageFont.load_default(size).getbbox(word)
    return right - left, bottom - top


def _share(maps: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """The share of positive mass of maps (..., H, W) inside a box: (...)."""
    left, top, right, bottom = box
    positive = maps.clamp(min=0)
    total = positive.sum((-2, -1))
    inside = positive[..., top:bottom, left:right].sum((-2, -1))
    return torch.where(total > 0, inside / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)


def _seen(result: Attribution, index: int) -> Tensor:
    """Which of an image's own pixels the model looked at: (H, W), 1 or 0."""
    geometry = result.geometries[index]
    assert geometry is not None
    return geometry.to_image(torch.ones(1, *geometry.covered))[0]
