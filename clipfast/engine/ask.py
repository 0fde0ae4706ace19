"""Texts that nobody had thought of, asked of a run that kept its attribution features.

    best = clipfast.ask("maps", "a red umbrella")
    best.keys, best.scores, best.maps       # the images it fits best, and where they show it

No image is opened for it, and the image tower does not run: scores come from the embeddings that the run kept, maps
from the features. They are those of a fresh explanation but for what the features' codec costs, which is measured on
the run's own maps.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipfast.api import Explainer
from clipfast.data.images import read_image
from clipfast.data.places import is_url, joined
from clipfast.engine.reader import Run, open_run
from clipfast.engine.texts import Prompts
from clipfast.errors import ImageError, InputError, ModelError, TextError
from clipfast.models.digest import weights_digest
from clipfast.models.load import load
from clipfast.results import Attribution
from clipfast.sheet import unit_embeddings

# The error is measured on so many of the run's maps: of images evenly spread over it, with so many texts each.
_CHECKED_IMAGES, _CHECKED_TEXTS = 12, 8
_GREY = (40, 40, 40)


@dataclass(frozen=True)
class StorageError:
    """How far maps from stored features are from those that the run computed of the same images and texts.

    median, largest: relative L2, ||stored - computed|| / ||computed||, over `maps` of them; the rounding of the
    computed ones, which the run keeps in a codec of their own, is in it. codec: of the features.
    """

    median: float
    largest: float
    maps: int
    codec: str


@dataclass
class Answer(Attribution):
    """What a run says to one text: its best images, the best first, as an Attribution of B images and one prompt.

    keys: the images'. searched: of how many they are the best. error: what storing cost, None where it could not be
    measured (texts given as embeddings). Images that are not to be found any more are drawn as heat alone.
    """

    keys: list[str] = field(default_factory=list)
    searched: int = 0
    error: StorageError | None = None

    def title(self, index: int) -> str:
        return Path(self.keys[index]).name

    def picture(self, index: int) -> Image.Image | None:
        source, geometry = self.sources[index], self.geometries[index]
        if source is not None:
            try:
                return read_image(source)
            except ImageError:
                pass
        return None if geometry is None else Image.new("RGB", (geometry.width, geometry.height), _GREY)


def ask(
    run: Run | str | Path,
    texts: str | Sequence[str] | Tensor,
    k: int = 20,
    *,
    model: Any = None,
    device: str | None = None,
    images: str | Path | None = None,
    check: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Any:
    """The images of a run that fit a text best, with their maps; a list of answers for a list of texts.

    run: a folder, or what `open_run` returned. texts: strings, or embeddings (P, E), which need no model. k: images a
    text, fewer where the run has fewer; of equal scores the first of the run. model: as `clipfast.load` takes it; by
    default the one that the run names. It must have the run's weights, and only its text tower runs. images: the folder
    that keys are looked for in, to be drawn; by default where the run found them. check: measure the storage error.
    progress: called with the number of images compared since the last call.

    All embeddings are read once, whatever the number of texts, and no more are held than a file's row group has; then
    the features of the best.

    Raises InputError for a run without features or images, or a model that is not the run's; TextError as for
    explaining; ModelError for a model that cannot be loaded.
    """
    started = time.perf_counter()
    run = run if isinstance(run, Run) else open_run(run)
    if k < 1:
        raise InputError(f"k={k} must be at least 1.")
    if not len(run):
        raise InputError(f"the run in {run.folder} holds no images yet.")
    encoder = None if isinstance(texts, Tensor) else _Encoder(run, model, device)
    names = None if isinstance(texts, Tensor) else [texts] if isinstance(texts, str) else list(texts)
    if encoder is not None and names is not None:
        wanted = encoder.explainer.asks(names).embeddings.cpu().float()
    else:
        assert isinstance(texts, Tensor)
        width = next(run.embeddings()).shape[1]
        wanted = unit_embeddings(texts, width, torch.float32, torch.device("cpu"))
    error = _storage_error(run, encoder) if check and encoder is not None else None
    best = _best(run, wanted.numpy(), k, progress or (lambda images: None))
    answers = _answers(run, wanted, best, _Pictures(run, images))
    for number, answer in enumerate(answers):
        answer.texts = None if names is None else [names[number]]
        answer.error = error
        answer.seconds = time.perf_counter() - started
    return answers[0] if isinstance(texts, str) else answers


class _Encoder:
    """The explainer that a run was made with. Of its model only the text tower is asked."""

    def __init__(self, run: Run, model: Any, device: str | None):
        config = run.config
        try:
            loaded = load(config.model if model is None else model, device=device)
        except ModelError as error:
            if model is not None:
                raise
            raise ModelError(f"the run's model {config.model} cannot be loaded by that name: {error}") from error
        if weights_digest(loaded.module) != config.weights:
            raise InputError(
                f"{loaded.name} has other weights than the {config.model} that the run was made with: "
                "name the same ones, or their file."
            )
        precision: Any = config.dtype if config.dtype in ("float32", "bfloat16") else None
        self.explainer = Explainer(loaded, config.method, precision=precision, **dict(config.parameters))
        prompts = dict(config.prompts)
        templates = prompts.get("templates")
        self._templates = tuple(templates) if isinstance(templates, list) else templates

    def encode(self, texts: list[str]) -> Tensor:
        """Embeddings (P, E) of texts, or of classes where the run's texts are such."""
        asked = Prompts(tuple(texts), None, self._templates).asked(self.explainer)
        return self.explainer.asks(asked).embeddings.cpu().float()


def _storage_error(run: Run, encoder: _Encoder) -> StorageError | None:
    """Maps from features beside the run's own. None where none of those can be made again."""
    numbers = np.unique(np.linspace(0, len(run) - 1, _CHECKED_IMAGES).astype(int)).tolist()
    sample = {number: run.rows(number) for number in numbers}
    texts = {number: run.texts(rows)[:_CHECKED_TEXTS] for number, rows in sample.items()}
    known = list(dict.fromkeys(text for own in texts.values() for text in own))
    try:
        embeddings = dict(zip(known, encoder.encode(known), strict=True))
    except TextError:
        return None
    errors = []
    for number, rows in sample.items():
        wanted = torch.stack([embeddings[text] for text in texts[number]])
        stored = run.features([number]).maps(wanted).maps[0]
        assert isinstance(stored, Tensor)
        computed = torch.from_numpy(rows.maps[: len(wanted)])
        size = computed.flatten(1).norm(dim=1)
        errors += ((stored - computed).flatten(1).norm(dim=1) / size)[size > 0].tolist()
    if not errors:
        return None
    return StorageError(float(np.median(errors)), max(errors), len(errors), run.config.features or "")


def _best(run: Run, texts: np.ndarray, k: int, progress: Callable[[int], None]) -> list[list[int]]:
    """For each text (P, E) the numbers of its k best images, the best first, of equal ones the first."""
    scores, numbers = np.empty((len(texts), 0), np.float32), np.empty((len(texts), 0), np.int64)
    seen = 0
    for embeddings in run.embeddings():
        count = len(embeddings)
        here = np.broadcast_to(np.arange(seen, seen + count), (len(texts), count))
        scores = np.concatenate((scores, texts @ embeddings.T), 1)
        numbers = np.concatenate((numbers, here), 1)
        # Stable, and the earlier images first: equal scores keep the order of the run.
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, numbers = np.take_along_axis(scores, order, 1), np.take_along_axis(numbers, order, 1)
        seen += count
        progress(count)
    return numbers.tolist()


def _answers(run: Run, wanted: Tensor, best: list[list[int]], pictures: _Pictures) -> list[Answer]:
    """The maps of each text (P, E) for its own images; each image's features are read once."""
    asking: dict[int, list[int]] = {}
    for text, numbers in enumerate(best):
        for number in numbers:
            asking.setdefault(number, []).append(text)
    found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    keys, geometries = {}, {}
    for number in sorted(asking):
        features = run.features([number])
        out = features.maps(wanted[asking[number]])
        keys[number], geometries[number] = run.rows(number).keys[0], out.geometries[0]
        for text, m, score in zip(asking[number], out.maps[0], out.scores[0], strict=True):
            found[text, number] = m[None], score[None]
    answers = []
    for text, numbers in enumerate(best):
        maps = [found[text, number][0] for number in numbers]
        answers.append(
            Answer(
                maps=torch.stack(maps) if len({m.shape for m in maps}) == 1 else maps,
                scores=torch.stack([found[text, number][1] for number in numbers]),
                texts=None,
                sources=[pictures.find(keys[number]) for number in numbers],
                geometries=[geometries[number] for number in numbers],
                method=run.config.method,
                model=run.config.model,
                seconds=0.0,
                keys=[keys[number] for number in numbers],
                searched=len(run),
            )
        )
    return answers


class _Pictures:
    """Where a run's images may still lie."""

    def __init__(self, run: Run, images: str | Path | None):
        place = str(run.config.source.get("place", ""))
        self._roots = [str(images)] if images is not None else list(_roots(place))

    def find(self, key: str) -> Path | None:
        """The file of an image, None where there is none: images in archives, behind addresses, or gone."""
        for root in self._roots:
            path = joined(root, key)
            if not is_url(path) and os.path.isfile(path):
                return Path(path)
        return None


def _roots(place: str) -> Iterator[str]:
    """The folders that keys may be relative to: the source's own, that which its pattern begins with, or its list's."""
    if place and not is_url(place):
        fixed = re.split(r"[*?\[{]", place, maxsplit=1)[0]
        yield from (place, fixed.rpartition("/")[0] or ".", os.path.dirname(place))
