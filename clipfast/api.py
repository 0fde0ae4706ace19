"""The engine: images and texts go in, every image's map for every text comes out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipfast.batch import Batch
from clipfast.data.geometry import Geometry, normalize
from clipfast.data.inputs import Prepared, prepare_all, sources
from clipfast.errors import ImageError, InputError, ModelError, TextError
from clipfast.methods import METHODS, build_method
from clipfast.methods.base import Relu
from clipfast.models.families import AnyImageTower
from clipfast.models.load import load
from clipfast.models.model import Model, Precision
from clipfast.models.tokens import TokenStates
from clipfast.results import Attribution, Features, Words
from clipfast.sheet import Asked, Sheet, unit_embeddings

Texts = str | Sequence[str] | Tensor

# Texts whose words are explained at once.
_TEXTS = 64


def explain(
    images: Any,
    texts: Texts,
    *,
    model: Any = "demo",
    method: str = "grad_eclip",
    pairs: bool = False,
    precision: Precision = None,
    resize: str | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    words: bool = False,
    **parameters: Any,
) -> Attribution:
    """The maps of B images for P texts, all pairs: `Explainer(model, method, ...)(images, texts)` in one call."""
    if isinstance(model, str):
        model = _loaded(model)
    explainer = Explainer(model, method, precision=precision, resize=resize, **parameters)
    return explainer(images, texts, pairs=pairs, words=words, on_error=on_error)


class Explainer:
    """A model and a method, prepared once and called often.

    model: what `clipfast.load` returns or takes. method: see `clipfast methods`; **parameters are the method's own.
    precision: None runs the weights as they are; "float32", "bfloat16" or "auto" (bfloat16 where the hardware
        multiplies it natively) set the trunk's dtype. Tail and maps stay in float32 (float64 for a float64 model).
    resize: how images become the model's input: None as the model's own preprocessing does, "crop", "squash",
        "longest" (padded) or "keep" (native aspect, sides rounded to the patch).

    Several explainers, in several threads, may share one model; it is only read.

    Raises ModelError, or InputError for an unknown method, parameter, precision or resize.
    """

    def __init__(
        self,
        model: Any = "demo",
        method: str = "grad_eclip",
        *,
        precision: Precision = None,
        resize: str | None = None,
        **parameters: Any,
    ):
        self.model: Model = load(model)
        self.method = method
        self.precision = precision
        self.spec = self.model.spec if resize is None else replace(self.model.spec, resize=resize)
        self._run = build_method(method, parameters)
        self._cached: tuple[Any, tuple[str, ...], Tensor, TokenStates | None] | None = None
        self._cached_companions: tuple[Any, tuple[str, ...], Tensor] | None = None
        self.model.towers(precision)

    def on(self, model: Any) -> Explainer:
        """The same method, precision and preprocessing, for another model (what `clipfast.load` returns or takes)."""
        other = copy(self)
        other.model, other._cached, other._cached_companions = load(model), None, None
        other.model.towers(self.precision)
        return other

    # Several layers need autograd, which refuses tensors made under a caller's inference_mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self,
        images: Any,
        texts: Texts,
        *,
        pairs: bool = False,
        words: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
        progress: Callable[[int], None] | None = None,
    ) -> Attribution:
        """Maps of B images for P texts; with `pairs`, of image i for text i only.

        images: paths, folders, patterns, PIL images, uint8 arrays (H, W, 3), uint8 tensors (3, H, W), normalised float
            tensors (3, H, W), a batch (B, 3, H, W), or a list of any of them.
        texts: strings, or embeddings (P, E), which are normalised here.
        words: map every word of every text, too, in the same pass: `Attribution.word_maps`; see `word_maps`.
        on_error: "raise" for the first image that cannot be read, or "skip" it (see `Attribution.errors`).
        progress: called with the number of images finished since the last call.

        Raises ImageError, TextError, InputError for anything that cannot be used, ModelError for NaN in the weights.
        """
        started = time.perf_counter()
        self._explains("image")
        found = sources(images)
        asked = self._asked(texts, words=words)
        if pairs and words:
            raise InputError("words=True maps the words of every text on every image: leave pairs out.")
        if pairs and len(asked.embeddings) != len(found):
            raise InputError(
                f"pairs=True needs one text an image: there are {len(found)} images and {len(asked.embeddings)} texts."
            )
        if pairs:
            asked = replace(asked, pairs=True)
        asked = replace(asked, companions=self._companions(asked.prompts))
        if not words:
            return self._attributions(found, [asked], started, on_error, progress)[0]
        by_word = self._by_word(asked, [])
        if not self._run.reads_words:
            asked = replace(asked, states=None)
        out, *word_maps = self._attributions(found, [asked, *by_word], started, on_error, progress)
        out.word_maps = word_maps
        return out

    @torch.inference_mode(False)
    @torch.no_grad()
    def word_maps(
        self,
        images: Any,
        text: str | Sequence[str],
        phrases: str | Sequence[str] = (),
        *,
        on_error: Literal["raise", "skip"] = "raise",
        progress: Callable[[int], None] | None = None,
    ) -> Any:
        """A map for each word of a text: an `Attribution` whose prompts are the words; a list for a list of texts.

        Its scores are the cosines of the images with the words' states: those of the text tower's tokens, each in the
        context of its sentence, the mean of a word's pieces. Its `sentence` is the text.

        phrases: runs of words to be mapped as one, behind the words, as the mean of their words' maps (before a
            threshold). Each must occur in one of the texts, and belongs to all in which it does, first occurrence.

        Raises as calling does; InputError for a method that maps no words, TextError for a phrase that does not occur.
        """
        started = time.perf_counter()
        self._explains("image")
        found = sources(images)
        asked = self._asked(text, words=True)
        by_word = self._by_word(asked, [phrases] if isinstance(phrases, str) else list(phrases))
        out = self._attributions(found, by_word, started, on_error, progress)
        return out[0] if isinstance(text, str) else out

    @torch.inference_mode(False)
    @torch.no_grad()
    def features(self, images: Any, *, on_error: Literal["raise", "skip"] = "raise") -> Features:
        """Attribution features of images: `features(images).maps(texts)` equals `self(images, texts)`, whenever asked.

        All images must come to the same patch grid (any resize but "keep", or equal sizes).
        Raises InputError where they do not, for a method that has none, and as calling does.
        """
        self.check_features()
        self._explains("image")
        found = sources(images)
        tower, _ = self.model.towers(self.precision)
        geometries: list[Geometry | None] = [None] * len(found)
        errors: dict[int, ImageError] = {}
        parts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        grids = set()
        relu: Relu = "each"
        for indices, x, batch in self._batches(found, tower, errors, on_error, None):
            explained = self._run.image(tower.fitted(tower.grid_of(x)), x)
            values, weights = explained.prompt_free()
            relu = explained.relu
            grids.add(self._run.grid(tower, (x.shape[2], x.shape[3])))
            if len(grids) > 1:
                raise InputError(
                    "features need one patch grid: these images come to several; choose resize='crop' or 'squash'."
                )
            for row, (i, item) in enumerate(zip(indices, batch, strict=True)):
                geometries[i] = item.geometry
                parts[i] = (values[row], weights[row], explained.z[row])
        if not parts:
            raise next(iter(errors.values()))
        blank = tuple(torch.full_like(t, torch.nan) for t in next(iter(parts.values())))
        stacked = [
            torch.stack(columns) for columns in zip(*(parts.get(i, blank) for i in range(len(found))), strict=True)
        ]
        self._check_finite(stacked[2], errors)
        return Features(
            values=stacked[0],
            weights=stacked[1],
            embeddings=stacked[2],
            grid=grids.pop(),
            relu=relu,
            sources=[_kept(source) for source in found],
            geometries=geometries,
            method=self.method,
            model=self.model.name,
            encode=lambda texts: self._asked(texts).embeddings,
            errors=errors,
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def batch(self, x: Tensor) -> Batch:
        """Images of one size prepared in one pass, to be asked with `Batch.maps` as often as wanted.

        For loops that prepare their own inputs, as data-set runs do. x: (B, 3, H, W), uint8 pixels of the input's size
        or floats normalised for the model; nothing is looked for in them, and no more of them taken than `batch_size`
        says does good. What is not finite in x or overflows on the way is not finite in the answers, row by row.

        Raises InputError for a method that does not explain images, or x of another shape.
        """
        self._explains("image")
        tower, _ = self.model.towers(self.precision)
        if x.ndim != 4 or x.shape[1] != 3 or not (x.dtype == torch.uint8 or x.is_floating_point()):
            raise InputError(f"a batch is (B, 3, H, W), uint8 or normalised, not {x.dtype} {tuple(x.shape)}.")
        x = self._input(x, tower)
        explained = self._run.image(tower.fitted(tower.grid_of(x)), x)
        return Batch(explained, self._run.grid(tower, (x.shape[2], x.shape[3])), self._companions)

    def batch_size(self, height: int, width: int) -> int:
        """How many inputs of so many pixels one pass should take on the model's device."""
        return self._rows(self.model.towers(self.precision)[0], height, width)

    def _rows(self, tower: AnyImageTower, height: int, width: int) -> int:
        patches = height // tower.patch_size[0] * (width // tower.patch_size[1])
        return tower.rows_at_once(patches, gradients=self._run.keeps_activations)

    @property
    def grid(self) -> tuple[int, int] | None:
        """The grid (h, w) of every image's map, None where images have grids of their own (resize="keep")."""
        return None if self.spec.resize == "keep" else self.grid_of(*self.spec.size)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """The grid (h, w) of the maps of inputs of so many pixels."""
        tower, _ = self.model.towers(self.precision)
        return self._run.grid(tower, (height, width))

    @torch.inference_mode(False)
    @torch.no_grad()
    def asks(self, texts: Texts) -> Asked:
        """Texts, or embeddings (P, E), as `Batch.maps` takes them. Raises TextError as calling does."""
        return self._asked(texts)

    def check_features(self) -> None:
        """Raises InputError where the method has no attribution features as it is set, naming those that have."""
        if not self._run.has_features:
            having = ", ".join(name for name, method in METHODS.items() if method().has_features)
            raise InputError(f"{self.method} has no attribution features as it is set; those that can have: {having}.")

    def check_weights(self) -> None:
        """Raises ModelError where the model's weights hold NaN or infinite values, naming the first."""
        for name, parameter in self.model.module.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise ModelError(
                    f"the weights of {self.model.name} hold NaN or infinite values, first in {name}: "
                    "load intact weights."
                )

    @torch.inference_mode(False)
    @torch.no_grad()
    def words(self, image: Any, text: str | Sequence[str]) -> Any:
        """What each word of a text does for its score with an image: a `Words`; a list of them for a list of texts.

        image: one image, as for calling, or its unit embedding (E,).
        Raises as calling does; TextError for a text without words.
        """
        self._explains("text")
        texts = [text] if isinstance(text, str) else list(text)
        embedding = self._embedding(image)
        found: list[Words] = []
        step = _TEXTS // 8 if self._run.keeps_activations else _TEXTS
        for start in range(0, len(texts), step):
            found += self._words(embedding, texts[start : start + step])
        return found[0] if isinstance(text, str) else found

    def _explains(self, side: str) -> None:
        if side not in self._run.sides():
            having = ", ".join(name for name, method in METHODS.items() if side in method.sides())
            raise InputError(f"{self.method} does not explain {side}s; these methods do: {having}.")
        tower, _ = self.model.towers(self.precision)
        if side == "image" and (reason := self._run.why_not(tower)) is not None:
            having = ", ".join(
                name for name, method in METHODS.items() if "image" in method.sides() and method.why_not(tower) is None
            )
            raise InputError(
                f"{self.method} cannot explain images with {self.model.name}, whose image tower {reason}; "
                f"these methods can: {having}."
            )

    def _words(self, embedding: Tensor, texts: list[str]) -> list[Words]:
        _, tower = self.model.towers(self.precision)
        ids, spans = self.model.tokenize_words(texts)
        inside = torch.zeros_like(ids)
        for row, words in zip(inside, spans, strict=True):
            for number, word in enumerate(words, start=1):
                row[word.positions] = number
        explained = self._run.text(tower, ids, inside)
        self._check_finite(explained.z, {})
        maps, scores = explained.maps(embedding[None])[:, 0], explained.z @ embedding
        extras = {name: values[:, 0].tolist() for name, values in explained.extras().items()}
        return [
            Words(
                text=text,
                words=[word.text for word in words],
                values=torch.stack([values[word.positions].sum() for word in words]),
                tokens=[self.model.spell([int(row[p])]) for word in words for p in word.positions],
                token_values=values[[p for word in words for p in word.positions]],
                score=float(score),
                offsets=[(word.start, word.end) for word in words],
                extras={name: found[i] for name, found in extras.items()},
                signed=self._run.signed or bool(values.min() < 0),
            )
            for i, (text, words, row, values, score) in enumerate(zip(texts, spans, ids, maps, scores, strict=True))
        ]

    def _embedding(self, image: Any) -> Tensor:
        tower, _ = self.model.towers(self.precision)
        if isinstance(image, Tensor) and image.ndim == 1:
            return self._embeddings(image[None])[0]
        found = sources(image)
        if len(found) != 1:
            raise InputError(f"words() explains texts with one image at a time, not {len(found)}.")
        (_, x, _), *_ = self._batches(found, tower, {}, "raise", None)
        return tower.encode(x)[0]

    def _asked(self, texts: Texts, *, words: bool = False) -> Asked:
        """The prompts of a call; with the states of their words if `words`, or if the method reads those."""
        _, text = self.model.towers(self.precision)
        if words and not self._run.maps_words:
            having = ", ".join(name for name, method in METHODS.items() if method.maps_words)
            raise InputError(f"{self.method} has no map for a single word; these methods do: {having}.")
        words = words or self._run.reads_words
        if isinstance(texts, Tensor):
            if words:
                raise TextError(
                    f"{self.method} is to read the words of the texts: pass them as strings in place of embeddings."
                )
            return Asked(self._embeddings(texts))
        names = [texts] if isinstance(texts, str) else list(texts)
        if not names:
            raise TextError("there is no text: pass at least one.")
        # Read once: another thread may put its own texts there meanwhile.
        cached = self._cached
        if cached is None or cached[0] is not text or cached[1] != tuple(names) or (words and cached[3] is None):
            states = self.model.token_states(names, self.precision) if words else None
            embeddings = self.model.encode_texts(names, self.precision) if states is None else states.texts
            self._cached = cached = (text, tuple(names), embeddings, states)
        return Asked(cached[2], names, cached[3] if words else None)

    def _embeddings(self, given: Tensor) -> Tensor:
        """A user's embeddings (P, E), of either side, made unit."""
        tower, _ = self.model.towers(self.precision)
        return unit_embeddings(given, tower.embed_dim, tower.result_dtype, tower.device)

    def _companions(self, prompts: int) -> Tensor | None:
        """Embeddings (C, E) of the texts that the method needs beside `prompts` others; encoded once."""
        texts = self._run.companions(prompts)
        if not texts:
            return None
        if self.model.tokenizer is None:
            raise TextError(
                f"{self.method} compares so few texts with {' and '.join(map(repr, texts))}, which needs a tokenizer: "
                "pass tokenizer= to clipfast.load."
            )
        _, tower = self.model.towers(self.precision)
        cached = self._cached_companions
        if cached is None or cached[0] is not tower or cached[1] != texts:
            embeddings = self.model.encode_texts(texts, self.precision, empty=True)
            self._cached_companions = cached = (tower, texts, embeddings)
        return cached[2]

    def _by_word(self, asked: Asked, phrases: list[str]) -> list[Asked]:
        """For each text its words, and those phrases that occur in it, as prompts."""
        states, sentences = asked.states, asked.names
        assert states is not None and sentences is not None
        runs = [[word.text for word in words] for words in self.model.tokenize_words(phrases)[1]] if phrases else []
        found = []
        for i, words in enumerate(states.by_text):
            occurring = {phrase: states.phrase(i, run) for phrase, run in zip(phrases, runs, strict=True)}
            prompts = {phrase: state for phrase, state in occurring.items() if state is not None}
            directions = torch.cat((words, *(state[None] for state in prompts.values())))
            found.append(Asked(directions, [*states.names[i], *prompts], sentence=sentences[i]))
        for phrase in phrases:
            if not any(one.names and phrase in one.names[len(w) :] for one, w in zip(found, states.names, strict=True)):
                raise TextError(f"{phrase!r} is no run of words of {' or '.join(map(repr, sentences))}.")
        return found

    def _attributions(
        self,
        found: list[Any],
        asked: list[Asked],
        started: float,
        on_error: str,
        progress: Callable[[int], None] | None,
    ) -> list[Attribution]:
        """One pass over the images for all that is asked of them."""
        tower, _ = self.model.towers(self.precision)
        grid = self._one_grid(found, tower, sum(one.prompts for one in asked))
        sheets = [Sheet.blank(one, len(found), grid, tower.result_dtype, tower.device) for one in asked]
        geometries: list[Geometry | None] = [None] * len(found)
        errors: dict[int, ImageError] = {}
        for indices, x, batch in self._batches(found, tower, errors, on_error, progress):
            explained = self._run.image(tower.fitted(tower.grid_of(x)), x)
            for sheet in sheets:
                sheet.fill(indices, explained, self._run.grid(tower, (x.shape[2], x.shape[3])))
            for i, item in zip(indices, batch, strict=True):
                geometries[i] = item.geometry
        for sheet in sheets:
            sheet.blot(list(errors))
        self._check_finite(sheets[0].scores, errors)
        kept = [_kept(source) for source in found]
        return [
            Attribution(
                maps=sheet.maps(),
                scores=sheet.scores,
                texts=sheet.asked.names,
                sources=kept,
                geometries=geometries,
                method=self.method,
                model=self.model.name,
                seconds=time.perf_counter() - started,
                pairs=sheet.asked.pairs,
                errors=errors,
                extras=sheet.extras,
                sentence=sheet.asked.sentence,
            )
            for sheet in sheets
        ]

    def _batches(
        self,
        found: list[Any],
        tower: AnyImageTower,
        errors: dict[int, ImageError],
        on_error: str,
        progress: Callable[[int], None] | None,
    ) -> Iterator[tuple[list[int], Tensor, list[Prepared]]]:
        """Micro-batches of inputs of one size: (their indices, x (b, 3, H, W) on the device, the prepared images)."""
        if on_error not in ("raise", "skip"):
            raise InputError(f"on_error={on_error!r} must be 'raise' or 'skip'.")
        waiting: dict[tuple[int, ...], tuple[list[int], list[Prepared]]] = {}
        for i, item in enumerate(prepare_all(found, self.spec)):
            if isinstance(item, ImageError):
                if on_error == "raise":
                    raise item
                errors[i] = item
                if progress is not None:
                    progress(1)
                continue
            key = (*item.pixels.shape, item.pixels.dtype == torch.uint8)
            indices, batch = waiting.setdefault(key, ([], []))
            indices.append(i)
            batch.append(item)
            if len(batch) == self._rows(tower, *item.geometry.covered):
                yield self._ready(indices, batch, tower)
                if progress is not None:
                    progress(len(indices))
                del waiting[key]
        for indices, batch in waiting.values():
            yield self._ready(indices, batch, tower)
            if progress is not None:
                progress(len(indices))

    def _ready(
        self, indices: list[int], batch: list[Prepared], tower: AnyImageTower
    ) -> tuple[list[int], Tensor, list[Prepared]]:
        x = _together([item.pixels for item in batch])
        return indices, self._input(x, tower), batch

    def _input(self, x: Tensor, tower: AnyImageTower) -> Tensor:
        """uint8 pixels or normalised floats (B, 3, H, W) as the tower takes them."""
        if x.dtype == torch.uint8:
            return normalize(x, self.spec, tower.dtype, tower.device)
        x = x.to(tower.device, tower.dtype)
        # Autograd takes nothing that was made under a caller's inference_mode.
        return x.clone() if x.is_inference() else x

    def _one_grid(self, found: list[Any], tower: AnyImageTower, prompts: int) -> tuple[int, int] | None:
        """The grid of all images' maps where it is known beforehand to be one. Raises InputError for too many maps."""
        shapes: set[tuple[int, int]] = {
            (s.shape[-2], s.shape[-1]) if isinstance(s, Tensor) and s.is_floating_point() else self.spec.size
            for s in found
        }
        known = self.spec.resize != "keep" or all(isinstance(s, Tensor) and s.is_floating_point() for s in found)
        grid = self._run.grid(tower, max(shapes, key=lambda s: s[0] * s[1]))
        needed = len(found) * prompts * grid[0] * grid[1] * tower.result_dtype.itemsize
        if needed > _memory(tower.device):
            raise InputError(
                f"{len(found)} x {prompts} maps need {needed / 1e9:.1f} GB: explain fewer at a time, or keep "
                "features(images), which give the map of any text later."
            )
        return grid if known and len(shapes) == 1 and 0 not in grid else None

    def _check_finite(self, numbers: Tensor, errors: dict[int, ImageError]) -> None:
        good = [i for i in range(len(numbers)) if i not in errors]
        if bool(numbers[good].isfinite().all()):
            return
        self.check_weights()
        raise ModelError(
            f"{self.model.name} overflows in {self.model.towers(self.precision)[0].dtype}: use precision='float32'."
        )


def _together(rows: list[Tensor]) -> Tensor:
    """Rows as one batch: a view where they are neighbours in one tensor, as the user's own batch was; else a copy."""
    first = rows[0]
    origin, step = first.storage_offset(), rows[min(1, len(rows) - 1)].storage_offset() - first.storage_offset()
    if step >= 0 and all(
        row.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and row.storage_offset() == origin + i * step
        and row.stride() == first.stride()
        for i, row in enumerate(rows)
    ):
        return first.as_strided((len(rows), *first.shape), (step, *first.stride()), origin)
    return torch.stack(rows)


def _kept(source: Any) -> Any:
    """What an Attribution remembers of a source: enough to draw it, or None for normalised tensors."""
    if isinstance(source, Tensor):
        if source.dtype != torch.uint8:
            return None
        source = source.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(source) if isinstance(source, np.ndarray) else source


def _memory(device: torch.device) -> int:
    """Bytes that results may take on a device: all that is free on a GPU, nine tenths of what a CPU's machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 9 // 10


@lru_cache(maxsize=1)
def _loaded(name: str) -> Model:
    return load(name)
