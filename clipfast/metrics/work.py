"""How each protocol measures a few samples whose maps are there: what stands between data sets, methods and protocols.

`Work` holds images with their maps and the things that were asked for, `WordWork` captions with their words' values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipfast.api import Explainer, Texts
from clipfast.data.datasets import Target
from clipfast.data.geometry import Geometry, normalize
from clipfast.data.inputs import prepare_one
from clipfast.methods.paths import image_baseline
from clipfast.metrics.base import Columns
from clipfast.metrics.infidelity import Completeness
from clipfast.metrics.perturbation import Classes, Clock, Confidence
from clipfast.metrics.sanity import ClassSensitivity
from clipfast.metrics.typographic import PastedWord
from clipfast.metrics.words import Sentences
from clipfast.results import Words

Measure = Callable[[Any, Any], Columns]


@dataclass
class Work:
    """A few samples with one method's maps, as protocols measure them; rows are pairs of a sample and a target.

    numbers: of the samples in the data set. targets: P_i of each sample. asked: P_i prompts as the explainer was asked.
    maps: (P_i, h, w), on the method's grid; geometries bring them to the pictures. scores: (P_i,). texts: (P_i, E),
    unit. names: of the data set's classes, or None; prompt: the words around them. classes: gives theirs (K, E), unit.
    ask: texts as the explainer is asked. parameters: all of the method's. batch: how many masked images go through
    the model at once. masked: by samples, the scores before and after each image is multiplied by its map.
    """

    explainer: Explainer
    numbers: list[int]
    pictures: list[Image.Image]
    targets: list[list[Target]]
    asked: list[Texts]
    maps: list[Tensor]
    scores: list[Tensor]
    geometries: list[Geometry]
    texts: list[Tensor]
    names: Sequence[str] | None
    prompt: str
    classes: Callable[[], Tensor]
    ask: Callable[[Sequence[str]], Texts]
    parameters: Mapping[str, Any]
    batch: int = 32
    clock: Clock = field(default_factory=Clock)
    masked: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(some) for some in self.targets)

    def encode(self, x: Tensor) -> Tensor:
        """Unit embeddings of normalised images."""
        return self.explainer.model.towers(self.explainer.precision)[0].encode(x)

    @cached_property
    def inputs(self) -> list[Tensor]:
        """Each picture as the model sees it, normalised, (1, 3, H, W); without pixels that no whole patch covers."""
        tower = self.explainer.model.towers(self.explainer.precision)[0]
        found = []
        for picture in self.pictures:
            prepared = prepare_one(picture, self.explainer.spec)
            height, width = prepared.geometry.covered
            x = normalize(prepared.pixels[None], self.explainer.spec, tower.dtype, tower.device)
            found.append(x[..., :height, :width])
        return found

    @cached_property
    def on_inputs(self) -> list[Tensor]:
        """The maps (P_i, h, w) over exactly what `inputs` shows."""
        return [
            m[..., : g.covered[0], : g.covered[1]] if tuple(m.shape[-2:]) == g.input else m
            for m, g in zip(self.maps, self.geometries, strict=True)
        ]

    @cached_property
    def on_pictures(self) -> list[Tensor]:
        """The maps on the pictures' own pixels, (P_i, H_i, W_i)."""
        return [g.to_image(m).cpu() for m, g in zip(self.maps, self.geometries, strict=True)]

    def labels(self, rows: Sequence[int]) -> Classes:
        """The classes that the targets of these samples are."""
        own = [target.label for i in rows for target in self.targets[i]]
        scale = float(self.explainer.model.towers(self.explainer.precision)[0].logit_scale)
        embeddings = self.classes()
        return Classes(embeddings, scale, torch.tensor(own, device=embeddings.device))

    def own_texts(self, rows: Sequence[int]) -> Tensor:
        """The text embeddings of these samples, which have equally many: (B, P, E)."""
        return torch.stack([self.texts[i] for i in rows])

    def absent(self, sample: int, seed: int, count: int) -> list[str]:
        """Names of so many classes that a sample does not show, drawn by its number; fewer where there are fewer."""
        assert self.names is not None
        shown = {target.label for target in self.targets[sample]}
        others = [name for label, name in enumerate(self.names) if label not in shown]
        drawn = np.random.default_rng((seed, self.numbers[sample])).permutation(len(others))
        return [others[i] for i in drawn[:count]]


@dataclass
class WordWork:
    """Samples with the values that one method gives the words of their captions; rows are captions.

    numbers: of the samples. pictures: theirs. captions: C_i of each. words: the method's values of each caption's.
    images (n, E): the pictures' unit embeddings. batch: how many texts go through the model at once.
    """

    explainer: Explainer
    numbers: list[int]
    pictures: list[Image.Image]
    captions: list[list[str]]
    words: list[list[Words]]
    images: Tensor
    batch: int = 256
    clock: Clock = field(default_factory=Clock)

    @classmethod
    def joined(cls, parts: Sequence[WordWork]) -> WordWork:
        """Several as one."""
        first = parts[0]
        return replace(
            first,
            numbers=[one for part in parts for one in part.numbers],
            pictures=[one for part in parts for one in part.pictures],
            captions=[one for part in parts for one in part.captions],
            words=[one for part in parts for one in part.words],
            images=torch.cat([part.images for part in parts]),
            clock=Clock(),
        )

    def __len__(self) -> int:
        return sum(len(some) for some in self.captions)

    def encode(self, ids: Tensor) -> Tensor:
        """Unit embeddings of token ids."""
        return self.explainer.model.towers(self.explainer.precision)[1].encode(ids)

    @cached_property
    def owners(self) -> Tensor:
        """Which of the samples each row is of."""
        return torch.tensor([i for i, some in enumerate(self.captions) for _ in some])

    @cached_property
    def sentences(self) -> Sentences:
        return Sentences.of(self.explainer.model, [caption for some in self.captions for caption in some])

    @cached_property
    def maps(self) -> list[Words]:
        return [one for some in self.words for one in some]


def on_masks(protocol: Any, work: Work) -> Columns:
    """Maps and masks on the pictures' pixels."""
    masks = [
        torch.stack([torch.from_numpy(_mask(target, picture)) for target in targets])
        for targets, picture in zip(work.targets, work.pictures, strict=True)
    ]
    return _together(
        [(tuple(m.shape[1:]), k.dtype) for m, k in zip(work.on_pictures, masks, strict=True)],
        work,
        lambda rows: protocol.measure(
            torch.cat([work.on_pictures[i] for i in rows]), torch.cat([masks[i] for i in rows])
        ),
    )


def _mask(target: Target, picture: Image.Image) -> np.ndarray:
    """A target's mask; without object where it has none, which does not count."""
    return np.zeros((picture.height, picture.width), bool) if target.mask is None else np.ascontiguousarray(target.mask)


def on_boxes(protocol: Any, work: Work) -> Columns:
    """Maps and boxes on the pictures' pixels."""
    return _together(
        [tuple(m.shape[1:]) for m in work.on_pictures],
        work,
        lambda rows: protocol.measure(
            torch.cat([work.on_pictures[i] for i in rows]),
            [torch.tensor(target.boxes or [], dtype=torch.float64) for i in rows for target in work.targets[i]],
        ),
    )


def on_grid(protocol: Any, work: Work) -> Columns:
    """Maps as the method gives them."""
    return _together(
        [tuple(m.shape[1:]) for m in work.maps],
        work,
        lambda rows: protocol.measure(torch.cat([work.maps[i] for i in rows])),
    )


def on_inputs(with_what: Callable[[Work, Sequence[int]], Any]) -> Measure:
    """A measure that runs the model on masked inputs, for `with_what` (classes or texts) of some samples."""

    def measure(protocol: Any, work: Work) -> Columns:
        return _alike(work, lambda rows: protocol.measure(*_given(work, rows, with_what(work, rows)), **_how(work)))

    return measure


def on_confidence(protocol: Confidence, work: Work) -> Columns:
    """What is left of the score, from passes that are made once for all who ask."""

    def measure(rows: list[int]) -> Columns:
        key = tuple(rows)
        if key not in work.masked:
            work.masked[key] = protocol.scores(*_given(work, rows, work.own_texts(rows)), **_how(work))
        return protocol.columns(*work.masked[key])

    return _alike(work, measure)


def on_baselines(protocol: Completeness, work: Work) -> Columns:
    """Maps against what the score gains over the protocol's baseline, or the method's own."""
    baseline = protocol.baseline or work.parameters.get("baseline", "mean")
    tower = work.explainer.model.towers(work.explainer.precision)[0]

    def measure(rows: list[int]) -> Columns:
        encode, texts, images, maps = _given(work, rows, work.own_texts(rows))
        start = image_baseline(baseline, tower, images)
        return protocol.measure(encode, texts, images, maps, start, **_how(work))

    return _alike(work, measure)


def on_originals(protocol: Any, work: Work) -> Columns:
    """Pictures that are masked at their own size."""
    tower = work.explainer.model.towers(work.explainer.precision)[0]
    return _each(
        work,
        lambda i: protocol.measure(
            work.encode,
            work.labels([i]),
            [work.pictures[i]],
            [work.on_pictures[i]],
            work.explainer.spec,
            first=work.numbers[i],
            dtype=tower.dtype,
            device=tower.device,
            **_how(work),
        ),
    )


def on_perturbed(protocol: Any, work: Work) -> Columns:
    """By sample, for a protocol whose draws depend on a sample's number."""
    return _each(
        work,
        lambda i: protocol.measure(
            work.encode, work.texts[i], work.inputs[i], work.on_inputs[i][None], first=work.numbers[i], **_how(work)
        ),
    )


def on_noise(protocol: Any, work: Work) -> Columns:
    """Pictures that are explained again with noise on them."""
    return _each(
        work,
        lambda i: protocol.measure(work.explainer, work.pictures[i], work.asked[i], first=work.numbers[i]),
    )


def on_copies(protocol: Any, work: Work) -> Columns:
    """All samples in one call, since every call copies and randomises the model; as strings, which it encodes anew."""
    pictures = [picture for picture, own in zip(work.pictures, work.targets, strict=True) for _ in own]
    texts = [target.text for own in work.targets for target in own]
    columns: Columns = protocol.measure(work.explainer, pictures, texts, pairs=True)
    return columns


def on_absent(protocol: ClassSensitivity, work: Work) -> Columns:
    """Maps of what is there against maps of as many other classes, all of a sample's asked together."""

    def measure(i: int) -> Columns:
        there = work.maps[i]
        names = work.absent(i, protocol.seed, len(there))
        if len(names) < len(there):
            return {name: torch.full((len(there),), torch.nan, dtype=torch.float64) for name in protocol.figures}
        texts = [work.prompt.replace("{}", name) for name in names]
        return protocol.columns([there], [work.explainer(work.pictures[i], work.ask(texts)).maps[0]])

    return _each(work, measure)


def on_pasted(protocol: PastedWord, work: Work) -> Columns:
    """Pictures that are explained again with the name of something else written on them."""

    def measure(i: int) -> Columns:
        word = protocol.word or next(iter(work.absent(i, protocol.seed, 1)), None)
        return protocol.measure(
            work.explainer, work.pictures[i], work.asked[i], word, work.on_pictures[i], work.scores[i]
        )

    return _each(work, measure)


def on_words(protocol: Any, work: WordWork) -> Columns:
    """Captions whose words go and come back, scored with their own images."""
    images = work.images[work.owners.to(work.images.device)][:, None]
    columns: Columns = protocol.measure(work.encode, images, work.sentences, work.maps, **_how(work))
    return columns


def on_gallery(protocol: Any, work: WordWork) -> Columns:
    """The whole data set's captions and images, which search one another."""
    owners = work.owners.to(work.images.device)
    columns: Columns = protocol.measure(work.encode, work.images, owners, work.sentences, work.maps, **_how(work))
    return columns


def on_word_copies(protocol: Any, work: WordWork) -> Columns:
    """All captions in one call, each with its own picture."""
    pictures = [picture for picture, own in zip(work.pictures, work.captions, strict=True) for _ in own]
    columns: Columns = protocol.measure(work.explainer, pictures, [text for own in work.captions for text in own])
    return columns


def _given(work: Work, rows: Sequence[int], what: Any) -> tuple[Any, Any, Tensor, Tensor]:
    """What protocols on masked inputs take: encode, `what`, images (B, 3, H, W) and maps (B, P, h, w)."""
    images = torch.cat([work.inputs[i] for i in rows])
    return work.encode, what, images, torch.stack([work.on_inputs[i] for i in rows])


def _how(work: Work | WordWork) -> dict[str, Any]:
    return {"batch": work.batch, "clock": work.clock}


def _each(work: Work, measure: Callable[[int], Columns]) -> Columns:
    """Columns of all rows, where samples are measured one by one."""
    parts = [measure(i) for i in range(len(work.pictures))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _alike(work: Work, measure: Callable[[list[int]], Columns]) -> Columns:
    """Columns of all rows, where samples with maps and inputs of one shape are measured in one call."""
    return _together([(m.shape, x.shape) for m, x in zip(work.on_inputs, work.inputs, strict=True)], work, measure)


def _together(keys: Sequence[Any], work: Work, measure: Callable[[list[int]], Columns]) -> Columns:
    """Columns of all rows, where samples of one key are measured in one call."""
    starts = np.cumsum([0, *(len(some) for some in work.targets)])
    found: Columns = {}
    for key in dict.fromkeys(keys):
        samples = [i for i, other in enumerate(keys) if other == key]
        rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in samples])
        for name, column in measure(samples).items():
            found.setdefault(name, torch.full((len(work),), torch.nan, dtype=torch.float64))[rows] = column.double()
    return found
