"""Words taken out of texts and put back: how faithful word maps are to the model.

    deletion     the words that a map ranks first leave the text step by step; a faithful map's score falls fast
    insertion    they come back step by step into a text without words; a faithful map's score rises fast
    confidence   what is left of the score when only the words above the map's median stay

Zhao et al., Grad-ECLIP, ICML 2024, and MMEL's table of retrieval on COCO (`deletion/retrieval`, `insertion/retrieval`);
Wang et al., M2IB, NeurIPS 2023 (`confidence/m2ib`). What becomes of a word's place is our reading: its tokens leave the
sequence and those behind move up, as in `clipfast.methods.leave_one_out`. Start and end of text stay.

A step is a share of each text's own words, halves rounded up. Texts x maps x steps go through the model in batches of
one fixed size, each sequence of tokens once, short ones first.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from clipfast.errors import InputError
from clipfast.methods.masking import positions_kept, without
from clipfast.metrics.base import Columns, Protocol
from clipfast.metrics.perturbation import Clock, Confidence, Curves, Encode, Mode, Score, area, cosine
from clipfast.models.model import Model
from clipfast.results import Words

WordMaps = Tensor | Sequence[Words]
"""Values of words: (B, W), (B, P, W) with P maps a text, or one `Words` a text. What lies behind a text's last word is
not read."""

_MODES: tuple[Mode, Mode] = ("deletion", "insertion")
# Sequences that are laid out at once, and cosines of a gallery.
_ROWS, _COSINES = 8192, 1 << 24


@dataclass(frozen=True)
class Sentences:
    """B texts whose words can be taken out.

    ids (B, T): token ids. words (B, T): k on the tokens of the k-th word, 0 on those of none, as `Method.text` has it.
    padding: as `without` takes it.
    """

    ids: Tensor
    words: Tensor
    padding: int | None = None

    @classmethod
    def of(cls, model: Model, texts: Sequence[str]) -> Sentences:
        """Texts as the model's tokenizer cuts them. Raises TextError as `Model.tokenize_words` does."""
        ids, spans = model.tokenize_words(texts)
        words = torch.zeros_like(ids)
        for row, named in zip(words, spans, strict=True):
            for number, word in enumerate(named, start=1):
                row[word.positions] = number
        return cls(ids, words, model.towers()[1].padding)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def counts(self) -> Tensor:
        """How many words each text has: (B,)."""
        return self.words.amax(-1)

    def keeping(self, texts: Tensor, members: Tensor) -> Tensor:
        """The token ids (R, T) of texts (R,) in which only some words (R, W) stay."""
        return without(self.ids[texts], positions_kept(members, self.words[texts]), self.padding)


def word_values(maps: WordMaps, sentences: Sentences) -> Tensor:
    """Word maps as (B, P, W), -inf behind each text's last word.

    Raises InputError for maps that do not belong to the texts or hold NaN.
    """
    counts = sentences.counts
    if isinstance(maps, Tensor):
        values = maps[:, None] if maps.ndim == 2 else maps
    else:
        lengths = [len(found.values) for found in maps]
        if lengths != counts.tolist():
            raise InputError(f"the maps are of texts of {lengths} words, the texts have {counts.tolist()}.")
        values = pad_sequence([found.values for found in maps], batch_first=True)[:, None]
    if values.ndim != 3 or len(values) != len(sentences) or values.shape[2] < int(counts.max()):
        raise InputError(
            f"maps must be (B, P, W) or (B, W) for {len(sentences)} texts of up to {int(counts.max())} words, "
            f"not {tuple(maps.shape) if isinstance(maps, Tensor) else len(maps)}."
        )
    values = values.to(counts.device)[..., : int(counts.max())]
    inside = (torch.arange(values.shape[2], device=counts.device) < counts[:, None])[:, None]
    if bool((values.isnan() & inside).any()):
        raise InputError("word maps hold NaN.")
    return values.masked_fill(~inside, -torch.inf)


def word_curves(
    encode: Encode,
    score: Score,
    sentences: Sentences,
    maps: WordMaps,
    fractions: Sequence[float],
    *,
    batch: int = 256,
    clock: Clock | None = None,
) -> dict[Mode, Tensor]:
    """The scores along deletion and insertion of words, (B, P, points) each, or (B, P, points, K).

    encode: token ids (n, T) -> (n, E), such as a text tower's. score: as `cosine` makes one, of the B * P pairs.
    fractions: of each text's words, in [0, 1]. Words with equal values go in reading order.

    Raises InputError for maps that do not belong to the texts or hold NaN.
    """
    clock = clock or Clock()
    started = time.perf_counter()
    ranks = _ranks(word_values(maps, sentences))
    texts, prompts = ranks.shape[:2]
    points = len(fractions)
    at_once = max(1, _ROWS // (len(_MODES) * prompts * points))
    found: dict[Mode, list[Tensor]] = {mode: [] for mode in _MODES}
    for some in torch.arange(texts, device=ranks.device).split(at_once):
        members = torch.stack([_members(ranks[some], sentences.counts[some], fractions, mode) for mode in _MODES])
        shape = members.shape[:-1]
        rows = some[:, None, None].expand(shape).flatten()
        z, which = _encoded(encode, sentences.keeping(rows, members.flatten(0, -2)), batch, clock)
        pairs = some[:, None] * prompts + torch.arange(prompts, device=some.device)
        scores = score(z[which], pairs[..., None].expand(shape).flatten())
        for mode, curve in zip(_MODES, scores.unflatten(0, shape), strict=True):
            found[mode].append(curve)
    clock.total += time.perf_counter() - started
    return {mode: torch.cat(parts) for mode, parts in found.items()}


@dataclass(frozen=True)
class WordCurvesCosine(Curves):
    """`deletion/cosine` and `insertion/cosine` of texts, the score a cosine with an image.

    steps: of equal shares of a text's words.
    """

    steps: int = 10

    name: ClassVar[str] = "deletion+insertion/words"
    source: ClassVar[str] = "Zhao et al., Grad-ECLIP, ICML 2024, with the cosine as score"

    def measure(
        self,
        encode: Encode,
        images: Tensor,
        sentences: Sentences,
        maps: WordMaps,
        *,
        batch: int = 256,
        clock: Clock | None = None,
    ) -> Columns:
        """Columns of B * P pairs for unit image embeddings (P, E) or (B, P, E); arguments as for `word_curves`."""
        return self.columns(
            word_curves(encode, cosine(images), sentences, maps, self.fractions(), batch=batch, clock=clock)
        )


@dataclass(frozen=True)
class WordCurvesRetrieval(Protocol):
    """`deletion/retrieval` and `insertion/retrieval`: recall over a data set whose texts lose words, or get them back.

    IR: a text finds its image among the k best of N. TR: an image finds one of its texts among the k best of M, all of
    which have come to the same step. steps: of equal shares of a text's words. k: of recall@k.

    Equal cosines, of texts that have become the same words, are in random order: what counts is the probability that
    one that is searched is among the first k. MMEL does not say how many words go at a step: our reading.
    """

    steps: int = 10
    k: int = 1

    name: ClassVar[str] = "deletion+insertion/retrieval"
    source: ClassVar[str] = "MMEL (arXiv 2509.15243), text deletion and insertion on COCO's Karpathy split"
    figures: ClassVar[Mapping[str, str]] = {
        "deletion IR": "lower",
        "deletion TR": "lower",
        "insertion IR": "higher",
        "insertion TR": "higher",
    }

    def __post_init__(self) -> None:
        if self.steps < 1 or self.k < 1:
            raise InputError(f"steps and k must be at least 1, not {self.steps} and {self.k}.")

    def measure(
        self,
        encode: Encode,
        images: Tensor,
        owners: Tensor,
        sentences: Sentences,
        maps: WordMaps,
        *,
        batch: int = 256,
        clock: Clock | None = None,
    ) -> Columns:
        """Columns of M texts, the whole data set at once.

        images (N, E): unit embeddings. owners (M,): which image each text is of. maps: (M, W), or one `Words` a text.

        TR is of images: it stands on the row of an image's first text, its other texts have NaN, and an image without
        text has none. Bootstrap intervals want `groups=owners`, and take the gallery for given.

        Raises InputError for owners that are no images, and as `word_curves` does.
        """
        clock = clock or Clock()
        started = time.perf_counter()
        values = word_values(maps, sentences)
        if values.shape[1] != 1:
            raise InputError(f"retrieval takes one map a text, not {values.shape[1]}.")
        owners = owners.to(images.device)
        if owners.shape != (len(sentences),) or int(owners.min()) < 0 or int(owners.max()) >= len(images):
            raise InputError(f"owners must say of {len(sentences)} texts which of {len(images)} images each is of.")
        ranks, every = _ranks(values), torch.arange(len(sentences), device=values.device)
        fractions = [i / self.steps for i in range(self.steps + 1)]
        ends: dict[bool, tuple[Tensor, Tensor]] = {}
        columns: Columns = {}
        for mode in _MODES:
            points = []
            for f in fractions:
                whole = (f == 0) == (mode == "deletion")
                if f in (0, 1) and whole in ends:
                    points.append(ends[whole])
                    continue
                members = _members(ranks, sentences.counts, [f], mode)[:, 0, 0]
                z, which = _encoded(encode, sentences.keeping(every, members), batch, clock)
                points.append(recall(z, which.to(images.device), images, owners, self.k))
                if f in (0, 1):
                    ends[whole] = points[-1]
            for kind, found in zip(("IR", "TR"), zip(*points, strict=True), strict=True):
                curve = torch.stack(found, dim=1).cpu()
                columns[f"{mode} {kind}"] = area(curve, fractions)
                columns |= {f"{mode} {kind} {f:.3f}": at for f, at in zip(fractions, curve.unbind(1), strict=True)}
        clock.total += time.perf_counter() - started
        return columns


@dataclass(frozen=True)
class WordConfidence(Protocol):
    """`confidence/m2ib` of texts: what is left of the score when only the words above the median of their map stay.

    drop: as in `Confidence`. The median of an even number of words lies between the two in the middle. In the published
    code the words that go become token 0, and start and end of text go with them: the text is then read at a random
    word. Here they leave the sequence.
    """

    drop: Literal["absolute", "relative"] = "absolute"

    name: ClassVar[str] = "confidence/words"
    source: ClassVar[str] = "Wang et al., M2IB, NeurIPS 2023"
    figures: ClassVar[Mapping[str, str]] = {"drop": "lower", "increase": "higher"}

    def measure(
        self,
        encode: Encode,
        images: Tensor,
        sentences: Sentences,
        maps: WordMaps,
        *,
        batch: int = 256,
        clock: Clock | None = None,
    ) -> Columns:
        """Columns of B * P pairs: `drop` and `increase`, in percent; arguments as for `WordCurvesCosine`."""
        clock = clock or Clock()
        started = time.perf_counter()
        values = word_values(maps, sentences)
        texts, prompts, most = values.shape
        counts = sentences.counts
        ascending = values.masked_fill(values == -torch.inf, torch.inf).sort(-1).values
        middle = torch.stack(((counts - 1) // 2, counts // 2), dim=-1)[:, None].expand(-1, prompts, -1)
        members = values > ascending.gather(-1, middle).mean(-1, keepdim=True)
        both = torch.stack((torch.ones_like(members), members)).view(2, texts * prompts, most)
        rows = torch.arange(texts, device=values.device).repeat_interleave(prompts)
        z, which = _encoded(encode, sentences.keeping(rows.repeat(2), both.flatten(0, 1)), batch, clock)
        scores = cosine(images)(z[which], torch.arange(texts * prompts, device=values.device).repeat(2))
        columns = Confidence(self.drop).columns(*scores.chunk(2))
        clock.total += time.perf_counter() - started
        return columns


def recall(z: Tensor, which: Tensor, images: Tensor, owners: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Recall@k of N images for M texts, and of the texts for the images: (M,) and (M,), float64.

    z (U, E): unit embeddings of the texts that differ, which (M,) the one of each text; images (N, E), owners (M,).
    The second stands on each image's first text, NaN on its others. Equal cosines share their places: see
    `WordCurvesRetrieval`.
    """
    texts = torch.arange(len(which), device=which.device)
    by_text = images.new_empty(len(which), dtype=torch.float64)
    copies = which.bincount(minlength=len(z))
    for first, part in _parts(z, len(images)):
        own = texts[(which >= first) & (which < first + len(part))]
        similar = part @ images.T
        for some in own.split(max(1, _COSINES // len(images))):
            theirs = similar[which[some] - first]
            mine = theirs.gather(1, owners[some, None])
            above, level = (theirs > mine).sum(1), (theirs == mine).sum(1)
            by_text[some] = _among_first(k, above, level, torch.ones_like(level))

    by_image = torch.full_like(by_text, torch.nan)
    leader = torch.full((len(images),), len(which), device=which.device).scatter_reduce(0, owners, texts, "amin")
    for first, part in _parts(images, len(z)):
        own = texts[(owners >= first) & (owners < first + len(part))]
        similar = part @ z.T
        row = owners[own] - first
        mine = similar[row, which[own]]
        best = similar.new_full((len(part),), -torch.inf).scatter_reduce(0, row, mine, "amax")
        above = (copies * (similar > best[:, None])).sum(1)
        level = (copies * (similar == best[:, None])).sum(1)
        right = torch.zeros_like(level).scatter_add(0, row, (mine == best[row]).long())
        told = right > 0
        by_image[leader[first : first + len(part)][told]] = _among_first(k, above[told], level[told], right[told])
    return by_text, by_image


def _among_first(k: int, above: Tensor, level: Tensor, right: Tensor) -> Tensor:
    """The probability that one of `right` of `level` candidates, in random order behind `above` others, is among the
    first k: 1 - C(level - right, places) / C(level, places)."""
    places = (k - above).clamp(min=0).double()
    level, right = level.double(), right.double()
    sure = places > level - right
    places = torch.where(sure, 0, places)

    def log_factorial(n: Tensor) -> Tensor:
        return (n + 1).lgamma()

    # The binomials' own factorials of `places` cancel.
    none = log_factorial(level - right) - log_factorial(level - right - places)
    none = none - log_factorial(level) + log_factorial(level - places)
    return torch.where(sure, 1.0, 1 - none.exp())


def _parts(rows: Tensor, others: int) -> list[tuple[int, Tensor]]:
    """Rows, some at a time, so that their cosines with so many others fit: (the first one's number, the rows)."""
    at_once = max(1, _COSINES // others)
    return [(first, rows[first : first + at_once]) for first in range(0, len(rows), at_once)]


def _ranks(values: Tensor) -> Tensor:
    """The place of each word (..., W) when the highest go first, ties in reading order."""
    return values.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def _members(ranks: Tensor, counts: Tensor, fractions: Sequence[float], mode: Mode) -> Tensor:
    """Which words are there at each point: ranks (B, P, W), counts (B,) -> (B, P, points, W) bool."""
    at = torch.tensor(fractions, dtype=torch.float64, device=counts.device)
    moved = (counts[:, None] * at + 0.5).floor().long()[:, None, :, None]
    reached = ranks[:, :, None] < moved
    return ~reached if mode == "deletion" else reached


def _encoded(encode: Encode, ids: Tensor, batch: int, clock: Clock) -> tuple[Tensor, Tensor]:
    """Embeddings (U, E) of the sequences that differ among ids (R, T), and which of them each row is: (R,)."""
    ids, which = ids.unique(dim=0, return_inverse=True)
    order = (ids != ids[:, -1:]).sum(-1).argsort(stable=True)
    z = torch.cat([clock.run(encode, ids[rows]) for rows in order.split(batch)])
    return torch.empty_like(z).index_copy_(0, order.to(z.device), z), which.to(z.device)
