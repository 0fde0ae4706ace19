"""What explaining returns: maps of images, values of words, and attribution features."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipfast.data.geometry import Geometry
from clipfast.data.images import read_image
from clipfast.errors import ImageError, InputError, TextError
from clipfast.methods import METHODS
from clipfast.methods.base import Relu, feature_maps
from clipfast.ops.minmax import minmax
from clipfast.sheet import unit_embeddings

if TYPE_CHECKING:
    from clipfast.view.report import Strip

Source = str | Path | Image.Image | None

_REPORT_SIDE = 1024
# Longer side of a strip's maps, and in a report, which shows them smaller still.
_STRIP_SIDE, _WORD_SIDE = 512, 64
# The share of a pixel map's values that is drawn no stronger than the rest.
_OUTLIERS = 0.005


@dataclass
class Words:
    """A text's map: what each word does for the score with one image.

    words: the W words, text[start:end] for their `offsets` (see `models.words` for what is a word); values (W,): the
    sum over each word's tokens, raw. tokens and token_values: the tokens themselves, as the tokenizer spells them.
    score: cosine similarity, equal to the model's own. extras: see `Attribution`. signed: whether a value says which
    way a word counts, not only how much.
    """

    text: str
    words: list[str]
    values: Tensor
    tokens: list[str]
    token_values: Tensor
    score: float
    extras: dict[str, float] = field(default_factory=dict)
    signed: bool = False
    offsets: list[tuple[int, int]] = field(default_factory=list)

    def pairs(self) -> list[tuple[str, float]]:
        """(word, value) in the order of the text."""
        return list(zip(self.words, self.values.tolist(), strict=True))

    def __str__(self) -> str:
        return "  ".join(f"{word} {value:.3g}" for word, value in self.pairs())


@dataclass
class Attribution:
    """The maps of B images and P prompts.

    maps: (B, P, h, w) on the method's grid (the model's patches, or the input's pixels), raw, on the model's device; a
        list of B tensors (P, h_i, w_i) where images kept aspects of their own.
    scores (B, P): cosine similarities, equal to the model's own.
    texts: the prompts, or None for embeddings; for matched pairs text i belongs to image i, and P is 1.
    extras: what the method says beside its maps, by name, (B, P) each: `delta`, how far a path's integral is from the
        difference of the scores at its ends.
    errors: images that could not be read, by index; their maps and scores are NaN.
    seconds: time from images to maps, decoding included.
    words: by image, what each text's words do for its score (see `Explainer.words`), where it was asked for.
    word_maps: one Attribution a text, whose prompts are that text's words; empty where it was not asked for. sentence:
        in one of those, the text.
    """

    maps: Tensor | list[Tensor]
    scores: Tensor
    texts: list[str] | None
    sources: list[Source]
    geometries: list[Geometry | None]
    method: str
    model: str
    seconds: float
    pairs: bool = False
    errors: dict[int, ImageError] = field(default_factory=dict)
    words: dict[int, list[Words]] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    word_maps: list[Attribution] = field(default_factory=list)
    sentence: str | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        shape = tuple(self.maps.shape) if isinstance(self.maps, Tensor) else f"{len(self.maps)} of different sizes"
        failed = f", {len(self.errors)} failed" if self.errors else ""
        return f"<Attribution of {self.method} on {self.model}: maps {shape}{failed}, {self.seconds:.2f} s>"

    def prompts(self, index: int) -> list[str]:
        """The prompts of image `index`; numbers where the texts came as embeddings."""
        if self.texts is None:
            return [f"prompt {p}" for p in ([index] if self.pairs else range(self.scores.shape[1]))]
        return [self.texts[index]] if self.pairs else self.texts

    def normalized(self) -> Tensor | list[Tensor]:
        """The maps with each min-maxed to [0, 1]; constant maps become zeros."""
        if isinstance(self.maps, Tensor):
            return _unit(self.maps)
        return [_unit(m) for m in self.maps]

    def resize(self, index: int | None = None, *, normalize: bool = False) -> Any:
        """Maps on each image's original pixels: a list of B tensors (P, H_i, W_i), or one of them for `index`.

        Bilinear between patch centres; zero where the model did not look (outside a centre crop). Inputs that came as
        normalised tensors go to the tensor's own size. normalize: min-max each map first.
        """
        if index is None:
            return [self.resize(i, normalize=normalize) for i in range(len(self))]
        maps = _unit(self.maps[index]) if normalize else self.maps[index]
        geometry = self.geometries[index]
        if geometry is None:
            raise self.errors.get(index) or InputError(f"image {index} has no geometry to resize its maps to.")
        return geometry.to_image(maps)

    def drawable(
        self, index: int, prompts: list[int], side: int | None = None, *, together: bool = False
    ) -> tuple[Tensor, str]:
        """Maps of image `index` as they are drawn on its pixels: (P, H, W) in 0..1, and the palette's name.

        See `view.overlay.drawable`. side: no more pixels than this on the longer side. together: one scale for all.
        """
        from clipfast.view.overlay import drawable, two_signed

        geometry, maps = self.geometries[index], self.maps[index][prompts]
        assert geometry is not None
        pixels = tuple(maps.shape[-2:]) == geometry.input
        # Of all maps of the image, so that each looks the same alone and among the others.
        signed = (self.method not in METHODS or METHODS[self.method].signs) and two_signed(self.maps[index])
        unit = drawable(maps, signed, outliers=_OUTLIERS if pixels else 0.0, together=together)
        longer = max(geometry.height, geometry.width)
        if side is not None and longer > side:
            geometry = geometry.resized(*(max(1, round(s * side / longer)) for s in (geometry.height, geometry.width)))
        return geometry.to_image(unit, outside=0.5 if signed else 0.0), "signed" if signed else "heat"

    def strip(self, index: int, picture: Image.Image | None = None, **options: Any) -> Image.Image:
        """The maps of image `index` side by side, each word or prompt beneath its own, on one scale.

        picture: the image, where it is at hand; else it is read again. options: those of `view.strip`.

        Raises InputError where only a normalised tensor is known of the image.
        """
        from clipfast.view.figure import strip

        picture = picture or self.picture(index)
        if picture is None:
            raise InputError(f"image {index} came as a normalised tensor, whose picture is not known.")
        prompts = self.prompts(index)
        heat, palette = self.drawable(index, list(range(len(prompts))), _STRIP_SIDE, together=True)
        options = {"title": self.sentence, "colormap": palette, **options}
        return strip(picture, heat, prompts, **options)

    def title(self, index: int) -> str:
        """A name for image `index`: its file's, or its number."""
        source = self.sources[index]
        return Path(source).name if isinstance(source, str | Path) else f"image {index}"

    def picture(self, index: int) -> Image.Image | None:
        """The original image, read again from its file; None for inputs that came as normalised tensors."""
        source = self.sources[index]
        return None if source is None else read_image(source)

    def best(self, index: int, top: int | None = None) -> list[int]:
        """Which prompts of image `index` to show: all in their order; of more than `top`, its `top` best-scoring."""
        scores = self.scores[index]
        if top is None or len(scores) <= top:
            return list(range(len(scores)))
        return scores.topk(top).indices.tolist()

    def save(self, folder: str | Path, *, overlays: bool = True, top: int | None = None) -> list[Path]:
        """Write one .npz of raw maps an image and, with `overlays`, one PNG a prompt; returns the paths.

        top: of more prompts than this, only each image's best-scoring get a PNG; the .npz holds all.

        The .npz holds maps (P, h, w), scores (P,), texts, box (left, top, right, bottom of the input in original
        pixels) and size (height, width of the original), and `extras` under their names, (P,) each. Where words were
        mapped it holds word_maps (W, h, w), words (W,) and word_texts (W,): which text each belongs to; and each of the
        prompts gets a PNG with the strip of its words.
        """
        from clipfast.view.files import save_image
        from clipfast.view.overlay import overlay

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        stems = _unique([_slug(Path(self.title(i)).stem) for i in range(len(self))])
        for i, stem in enumerate(stems):
            geometry = self.geometries[i]
            if geometry is None:
                continue
            path = folder / f"{stem}.npz"
            partial = path.with_suffix(".npz.partial")
            with partial.open("wb") as file:
                np.savez_compressed(file, **self._arrays(i, geometry))
            partial.replace(path)
            written.append(path)
            picture = self.picture(i) if overlays else None
            if picture is None:
                continue
            chosen, prompts = self.best(i, top), self.prompts(i)
            for prompt, name in zip(chosen, _unique([_slug(prompts[p]) for p in chosen]), strict=True):
                heat, palette = self.drawable(i, [prompt])
                written.append(save_image(overlay(picture, heat[0], colormap=palette), folder / f"{stem}--{name}.png"))
                if self.word_maps:
                    written.append(
                        save_image(self.word_maps[prompt].strip(i, picture), folder / f"{stem}--{name}--words.png")
                    )
        return written

    def _arrays(self, index: int, geometry: Geometry) -> dict[str, Any]:
        arrays: dict[str, Any] = {
            "maps": self.maps[index].cpu().numpy(),
            "scores": self.scores[index].cpu().numpy(),
            "texts": np.array(self.prompts(index)),
            "box": np.array(geometry.box),
            "size": np.array((geometry.height, geometry.width)),
            **{name: values[index].cpu().numpy() for name, values in self.extras.items()},
        }
        if self.word_maps:
            words = [each.prompts(index) for each in self.word_maps]
            arrays["word_maps"] = torch.cat([each.maps[index] for each in self.word_maps]).cpu().numpy()
            arrays["words"] = np.array([word for some in words for word in some])
            arrays["word_texts"] = np.repeat(np.arange(len(words)), [len(some) for some in words])
        return arrays

    def report(self, path: str | Path, *, top: int | None = None) -> Path:
        """Write one self-contained HTML page: every image with its maps, scores and words.

        top: of more prompts than this, only each image's best-scoring are shown.
        """
        from clipfast.view.report import ReportItem, write_report

        items = []
        for i in range(len(self)):
            geometry = self.geometries[i]
            picture = None if geometry is None else self.picture(i)
            if geometry is not None and picture is not None:
                # Originals and maps of their size would fill the memory long before the page is large.
                picture = picture.copy()
                picture.thumbnail((_REPORT_SIDE, _REPORT_SIDE), Image.Resampling.LANCZOS)
                chosen, prompts = self.best(i, top), self.prompts(i)
                heat, palette = self.drawable(i, chosen, _REPORT_SIDE)
                words = self.words.get(i, [])
                items.append(
                    ReportItem(
                        title=self.title(i),
                        image=picture,
                        prompts=[prompts[p] for p in chosen],
                        heat=heat.cpu(),
                        scores=self.scores[i][chosen].tolist(),
                        words={w.text: w.pairs() for w in words} or None,
                        signed_words=any(w.signed for w in words),
                        strips={prompts[p]: self.word_maps[p]._strip(i) for p in chosen} if self.word_maps else None,
                        extras={name: values[i][chosen].tolist() for name, values in self.extras.items()},
                        palette=palette,
                    )
                )
        failures = {self.title(i): str(error) for i, error in self.errors.items()}
        write_report(path, items, method=self.method, model=self.model, seconds=self.seconds, failures=failures)
        return Path(path)

    def _strip(self, index: int) -> Strip:
        from clipfast.view.report import Strip

        prompts = self.prompts(index)
        heat, palette = self.drawable(index, list(range(len(prompts))), _WORD_SIDE, together=True)
        return Strip(prompts, heat.cpu(), self.scores[index].tolist(), palette)

    def to_json(self) -> list[dict[str, Any]]:
        """One plain record an image: prompts, scores, where each map peaks (x, y in original pixels), words, error."""
        records: list[dict[str, Any]] = []
        for i in range(len(self)):
            record: dict[str, Any] = {"image": self.title(i)}
            if i in self.errors:
                records.append({**record, "error": str(self.errors[i])})
                continue
            record["prompts"] = self._prompt_records(i)
            if i in self.words:
                record["words"] = [
                    {"text": w.text, "score": w.score, "words": w.pairs(), **w.extras} for w in self.words[i]
                ]
            if self.word_maps:
                record["word_maps"] = [
                    {"text": each.sentence, "words": each._prompt_records(i)} for each in self.word_maps
                ]
            records.append(record)
        return records

    def _prompt_records(self, index: int) -> list[dict[str, Any]]:
        extras = {name: values[index].tolist() for name, values in self.extras.items()}
        columns = zip(self.prompts(index), self.scores[index].tolist(), self.maps[index], strict=True)
        return [
            {
                "text": text,
                "score": score,
                "peak": _peak(m, self.geometries[index]),
                **{name: values[p] for name, values in extras.items()},
            }
            for p, (text, score, m) in enumerate(columns)
        ]


@dataclass
class Features:
    """Attribution features of B images: the maps of any text, at any time, without the image tower.

    values (B, n, E) and weights (B, n), so that map_i(t) = weight_i ReLU(value_i . t) for a unit text embedding t;
    (B, L, n, E) and (B, L, n) where L layers are explained and ReLU comes before their sum. embeddings (B, E): unit.
    relu: "each" layer, the "sum" of layers, or "none" (signed maps). grid: (h, w). errors: see `Attribution`.
    """

    values: Tensor
    weights: Tensor
    embeddings: Tensor
    grid: tuple[int, int]
    relu: Relu
    sources: list[Source]
    geometries: list[Geometry | None]
    method: str
    model: str
    encode: Callable[[Any], Tensor] | None = None
    errors: dict[int, ImageError] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.embeddings)

    def maps(self, texts: str | Sequence[str] | Tensor) -> Attribution:
        """The maps of all images for texts: strings, or embeddings (P, E), which are normalised here.

        Raises TextError for embeddings that do not fit, and for strings where the features came from a file, and so
        without the model's text tower.
        """
        started = time.perf_counter()
        names = None if isinstance(texts, Tensor) else [texts] if isinstance(texts, str) else list(texts)
        if self.encode is not None:
            wanted = self.encode(texts)
        elif isinstance(texts, Tensor):
            known = self.embeddings
            wanted = unit_embeddings(texts, known.shape[1], known.dtype, known.device)
        else:
            raise TextError(
                "features read from a file know no text tower: "
                "pass embeddings (P, E), as model.encode_texts gives them."
            )
        maps = feature_maps(self.values, self.weights, wanted, self.relu)
        return Attribution(
            maps=maps.unflatten(-1, self.grid),
            scores=self.embeddings @ wanted.T,
            texts=names,
            sources=self.sources,
            geometries=self.geometries,
            method=self.method,
            model=self.model,
            seconds=time.perf_counter() - started,
            errors=self.errors,
        )

    def save(self, path: str | Path) -> Path:
        """Write the features to one .safetensors file; `Features.load` reads it back."""
        from safetensors.torch import save_file

        path = Path(path)
        about = {
            "grid": self.grid,
            "relu": self.relu,
            "method": self.method,
            "model": self.model,
            "errors": {i: str(error) for i, error in self.errors.items()},
            "sources": [str(s) if isinstance(s, str | Path) else None for s in self.sources],
            "geometries": [
                None if g is None else (g.height, g.width, g.box, g.input, g.covered) for g in self.geometries
            ],
        }
        tensors = {"values": self.values, "weights": self.weights, "embeddings": self.embeddings}
        partial = path.with_name(path.name + ".partial")
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"clipfast": json.dumps(about)})
        partial.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Features:
        """Features from a file that `save` wrote. Texts then come as embeddings (P, E).

        Raises InputError for a file that is not one.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as stored:
                about = json.loads((stored.metadata() or {})["clipfast"])
                tensors = {name: stored.get_tensor(name) for name in ("values", "weights", "embeddings")}
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise InputError(
                f"{path} does not hold attribution features as Features.save writes them: {error}"
            ) from error
        geometries = [
            None if g is None else Geometry(g[0], g[1], tuple(g[2]), tuple(g[3]), tuple(g[4]))
            for g in about["geometries"]
        ]
        return cls(
            **tensors,
            grid=tuple(about["grid"]),
            relu=about["relu"],
            sources=about["sources"],
            geometries=geometries,
            method=about["method"],
            model=about["model"],
            errors={int(i): ImageError(error) for i, error in about["errors"].items()},
        )


def _unit(maps: Tensor) -> Tensor:
    return minmax(maps.flatten(-2), constant=0.0).unflatten(-1, maps.shape[-2:])


def _peak(m: Tensor, geometry: Geometry | None) -> list[float] | None:
    """(x, y) in original pixels of the centre of a map's hottest place; None for a map without heat."""
    if geometry is None or not bool(m.max() > m.min()):
        return None
    row, column = divmod(int(m.argmax()), m.shape[1])
    height, width = geometry.input if tuple(m.shape) == geometry.input else geometry.covered
    at = geometry.from_input(torch.tensor(((column + 0.5) * width / m.shape[1], (row + 0.5) * height / m.shape[0])))
    return [round(v, 1) for v in at.tolist()]


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")[:60] or "unnamed"


def _unique(names: list[str]) -> list[str]:
    taken: dict[str, int] = {}
    found = []
    for name in names:
        taken[name] = taken.get(name, 0) + 1
        found.append(name if taken[name] == 1 else f"{name}-{taken[name]}")
    return found
