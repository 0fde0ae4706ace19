"""Words taken out and put back: naive loops over the model itself, extremes, ties and what is refused."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast import Explainer, load
from clipfast.data.datasets import open_dataset
from clipfast.errors import InputError
from clipfast.metrics.perturbation import Clock
from clipfast.metrics.stability import inputs
from clipfast.metrics.words import (
    Sentences,
    WordConfidence,
    WordCurvesCosine,
    WordCurvesRetrieval,
    recall,
    word_curves,
    word_values,
)

SOT, EOT = 298, 299
# Texts as lists of words, each a list of tokens.
TEXTS = [
    [[5], [17, 18], [40]],
    [[7], [8], [9], [10, 11, 12], [13]],
    [[200, 201]],
    [[5], [6], [5], [60], [61], [62, 63], [64]],
    [[40], [17, 18], [5], [9]],
]


@pytest.fixture
def sentences() -> Sentences:
    ids, words = torch.zeros(len(TEXTS), 14, dtype=torch.long), torch.zeros(len(TEXTS), 14, dtype=torch.long)
    for row, text in enumerate(TEXTS):
        at = [0, *(k for k, word in enumerate(text, start=1) for _ in word)]
        ids[row, : len(at) + 1] = torch.tensor([SOT, *(t for word in text for t in word), EOT])
        words[row, : len(at)] = torch.tensor(at)
    return Sentences(ids, words)


@pytest.fixture
def model(build_clip) -> Any:
    return build_clip(context_length=14).double()


def unit(rows: int, seed: int, width: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, dtype=torch.float64, generator=generator), dim=-1)


def encode_words(model: Any, words: list[list[int]]) -> Tensor:
    """The model's own embedding of some words between start and end: (E,)."""
    ids = torch.zeros(1, 14, dtype=torch.long)
    tokens = [SOT, *(t for word in words for t in word), EOT]
    ids[0, : len(tokens)] = torch.tensor(tokens)
    with torch.no_grad():
        return F.normalize(model.encode_text(ids), dim=-1)[0]


def ordered(values: list[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])


def shown(text: list[list[int]], values: list[float], mode: str, f: float) -> list[list[int]]:
    """The words of a text that are there at a point of a curve."""
    moved = ordered(values)[: int(len(text) * f + 0.5)]
    return [word for i, word in enumerate(text) if (i in moved) == (mode == "insertion")]


def test_curves_against_texts_encoded_one_by_one(model, sentences) -> None:
    images = unit(2, 1)
    maps = torch.rand(5, 2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    maps[3, 1, :7] = torch.tensor([1.0, 2, 1, 2, 1, 2, 0])
    maps[:, :, 7:] = torch.nan
    tower = load(model).towers()[1]
    clock = Clock()
    columns = WordCurvesCosine(steps=4).measure(tower.encode, images, sentences, maps, batch=7, clock=clock)
    assert 0 < clock.forwards < clock.total
    for b, text in enumerate(TEXTS):
        for p in range(2):
            for mode in ("deletion", "insertion"):
                values = maps[b, p, : len(text)].tolist()
                points = [float(encode_words(model, shown(text, values, mode, i / 4)) @ images[p]) for i in range(5)]
                for i, point in enumerate(points):
                    assert float(columns[f"{mode} {i / 4:.3f}"][2 * b + p]) == pytest.approx(point, abs=1e-10)
                area = sum((x + y) / 2 for x, y in pairwise(points)) / 4
                assert float(columns[mode][2 * b + p]) == pytest.approx(area, abs=1e-10)


def test_each_sequence_is_encoded_once_whatever_the_batch(model, sentences, monkeypatch) -> None:
    maps, images = torch.rand(5, 3, 7, dtype=torch.float64), unit(5 * 3, 3).view(5, 3, 24)
    tower = load(model).towers()[1]
    seen: list[tuple[int, ...]] = []

    def counted(ids: Tensor) -> Tensor:
        seen.extend(map(tuple, ids.tolist()))
        return tower.encode(ids)

    whole = WordCurvesCosine(steps=6).measure(counted, images, sentences, maps)
    assert len(seen) == len(set(seen))
    monkeypatch.setattr("clipfast.metrics.words._ROWS", 60)
    parts = WordCurvesCosine(steps=6).measure(tower.encode, images, sentences, maps, batch=1)
    for name, column in whole.items():
        torch.testing.assert_close(parts[name], column, rtol=0, atol=1e-12)


def test_leave_one_out_puts_the_best_word_first() -> None:
    """For texts of two words the map of leave-one-out deletes as well as can be, and its opposite as badly."""
    model = load("demo")
    texts = ["dog boat", "red car", "cake house"]
    image = unit(1, 4, 128)[0].float()
    found = Explainer(model, "leave_one_out").words(image, texts)
    sentences = Sentences.of(model, texts)
    tower = model.towers()[1]
    measured = [
        WordCurvesCosine(steps=2).measure(tower.encode, image[None], sentences, maps)
        for maps in (found, torch.stack([-w.values for w in found]))
    ]
    assert (measured[0]["deletion"] < measured[1]["deletion"]).all()
    assert (measured[0]["insertion"] > measured[1]["insertion"]).all()
    assert [w.words for w in found] == [text.split() for text in texts]


def test_leaving_words_out_finds_those_that_retrieve() -> None:
    """On scenes and their captions, beside words in random order: all protocols see the difference."""
    model, scenes = load("demo"), open_dataset("scenes:2:40")
    explainer = Explainer(model, "leave_one_out")
    images = model.towers()[0].encode(torch.stack(inputs(explainer, [sample.image for sample in scenes])))
    captions = [sample.captions[0] for sample in scenes]
    sentences, encode = Sentences.of(model, captions), model.towers()[1].encode
    found = [explainer.words(z, caption) for z, caption in zip(images, captions, strict=True)]
    chance = torch.rand(40, int(sentences.counts.max()), generator=torch.Generator().manual_seed(0))
    retrieval, cosines, confidence = WordCurvesRetrieval(), WordCurvesCosine(), WordConfidence()
    good, bad = (
        retrieval.summary(retrieval.measure(encode, images, torch.arange(40), sentences, maps))
        | cosines.summary(cosines.measure(encode, images[:, None], sentences, maps))
        | confidence.summary(confidence.measure(encode, images[:, None], sentences, maps))
        for maps in (found, chance)
    )
    for name in ("deletion IR", "deletion TR", "deletion", "drop"):
        assert good[name] < bad[name] - 0.1, name
    for name in ("insertion IR", "insertion TR", "insertion", "increase"):
        assert good[name] > bad[name] + 0.1, name


def naive_recall(similar: Tensor, relevant: list[list[int]], k: int) -> list[float]:
    """How likely a row has a relevant column among its k highest, equal ones in every order."""
    found = []
    for row, right in zip(similar.tolist(), relevant, strict=True):
        level = sorted(row, reverse=True)[min(k, len(row)) - 1]
        above = [i for i, s in enumerate(row) if s > level]
        tied = [i for i, s in enumerate(row) if s == level]
        if set(above) & set(right):
            found.append(1.0)
            continue
        draws = list(combinations(tied, min(k, len(row)) - len(above)))
        found.append(sum(bool(set(draw) & set(right)) for draw in draws) / len(draws))
    return found


@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_recall_with_ties(k, monkeypatch) -> None:
    """Whole numbers make exact ties; small parts make several of them."""
    generator = torch.Generator().manual_seed(k)
    images = torch.randint(-1, 2, (6, 3), generator=generator).double()
    z = torch.randint(-1, 2, (5, 3), generator=generator).double()
    which = torch.tensor([0, 1, 2, 3, 4, 1, 1, 0])
    owners = torch.tensor([0, 0, 1, 3, 4, 4, 3, 0])
    monkeypatch.setattr("clipfast.metrics.words._COSINES", 13)
    by_text, by_image = recall(z, which, images, owners, k)
    similar = z[which] @ images.T
    assert by_text.tolist() == pytest.approx(naive_recall(similar, [[o] for o in owners.tolist()], k), abs=1e-12)
    texts_of = [[m for m in range(8) if owners[m] == n] for n in range(6)]
    expected = naive_recall(similar.T, texts_of, k)
    for n, own in enumerate(texts_of):
        for place, m in enumerate(own):
            assert by_image[m].isnan() if place else float(by_image[m]) == pytest.approx(expected[n], abs=1e-12)
    assert by_image.isnan().sum() == 8 - 4


def test_retrieval_against_texts_encoded_one_by_one(model, sentences) -> None:
    owners, maps = torch.tensor([0, 1, 2, 1, 0]), torch.rand(5, 7, dtype=torch.float64)
    texts = torch.stack([encode_words(model, text) for text in TEXTS])
    # Images near their texts, and one of none, so that recall is neither nothing nor all.
    images = F.normalize(torch.stack((texts[0], texts[1], texts[2], texts[4])) + 0.02 * unit(4, 7), dim=-1)
    tower = load(model).towers()[1]
    for k in (1, 2):
        protocol = WordCurvesRetrieval(steps=3, k=k)
        columns = protocol.measure(tower.encode, images, owners, sentences, maps, batch=3)
        for mode in ("deletion", "insertion"):
            points: dict[str, list[float]] = {"IR": [], "TR": []}
            for i in range(4):
                left = [shown(text, maps[m, : len(text)].tolist(), mode, i / 3) for m, text in enumerate(TEXTS)]
                z = torch.stack([encode_words(model, words) for words in left])
                similar = (z @ images.T * 1e10).round()
                points["IR"].append(sum(naive_recall(similar, [[o] for o in owners.tolist()], k)) / 5)
                points["TR"].append(sum(naive_recall(similar.T[:3], [[0, 4], [1, 3], [2]], k)) / 3)
            for kind, values in points.items():
                for i, value in enumerate(values):
                    assert float(columns[f"{mode} {kind} {i / 3:.3f}"].nanmean()) == pytest.approx(value, abs=1e-9)
                area = sum((x + y) / 2 for x, y in pairwise(values)) / 3
                assert protocol.summary(columns)[f"{mode} {kind}"] == pytest.approx(area, abs=1e-9)
    assert 0 < protocol.summary(columns)["deletion IR"] < 1


def test_without_words_recall_is_chance(model, sentences) -> None:
    """All texts are then the same: an image finds one of its own by luck, and the nearest image is found by its own."""
    owners, images = torch.tensor([0, 1, 2, 1, 0]), unit(3, 8)
    tower = load(model).towers()[1]
    columns = WordCurvesRetrieval(steps=2).measure(tower.encode, images, owners, sentences, torch.rand(5, 7))
    torch.testing.assert_close(columns["deletion TR 1.000"].nan_to_num(), torch.tensor([2, 2, 1, 0, 0]).double() / 5)
    nearest = int((encode_words(model, []) @ images.T).argmax())
    assert columns["insertion IR 0.000"].tolist() == (owners == nearest).double().tolist()


@pytest.mark.parametrize("drop", ["absolute", "relative"])
def test_confidence_keeps_the_words_above_the_median(model, sentences, drop) -> None:
    images = unit(2, 9)
    maps = torch.rand(5, 2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    maps[1, 0, :5] = 0.25
    tower = load(model).towers()[1]
    columns = WordConfidence(drop).measure(tower.encode, images, sentences, maps, batch=4)
    counted = 0
    for b, text in enumerate(TEXTS):
        for p in range(2):
            values = maps[b, p, : len(text)]
            above = (values > values.quantile(0.5)).tolist()
            # A constant map keeps nothing.
            assert any(above) == (len(text) > 1 and (b, p) != (1, 0))
            c = float(encode_words(model, text) @ images[p])
            left = float(encode_words(model, [w for w, kept in zip(text, above, strict=True) if kept]) @ images[p])
            row = 2 * b + p
            assert float(columns["increase"][row]) == 100 * (left > c)
            if drop == "relative" and c <= 0:
                assert columns["drop"][row].isnan()
                continue
            counted += left < c
            expected = 100 * max(0, c - left) / (c if drop == "relative" else 1)
            assert float(columns["drop"][row]) == pytest.approx(expected, abs=1e-8)
    assert counted


def test_sentences_are_the_tokenizer_s(build_clip, tokenizer) -> None:
    model = load(build_clip(), tokenizer=tokenizer)
    found = Sentences.of(model, ["a red car", "boat"])
    assert found.words[:, :5].tolist() == [[0, 1, 2, 3, 0], [0, 1, 0, 0, 0]]
    assert found.counts.tolist() == [3, 1] and len(found) == 2
    torch.testing.assert_close(found.ids, tokenizer(["a red car", "boat"]))


def test_what_does_not_fit_is_refused(model, sentences) -> None:
    encode = load(model).towers()[1].encode
    for maps in (torch.rand(4, 7), torch.rand(5, 6), torch.rand(5)):
        with pytest.raises(InputError, match="5 texts of up to 7 words"):
            word_values(maps, sentences)
    with pytest.raises(InputError, match="NaN"):
        word_curves(encode, lambda z, pair: z[:, 0], sentences, torch.full((5, 7), torch.nan), [0, 1])
    words = Explainer("demo", "leave_one_out").words(torch.ones(128), ["dog", "red car"])
    with pytest.raises(InputError, match=r"texts of \[1, 2\] words"):
        word_values(words, sentences)
    retrieval = WordCurvesRetrieval()
    with pytest.raises(InputError, match="one map a text"):
        retrieval.measure(encode, unit(2, 0), torch.zeros(5).long(), sentences, torch.rand(5, 2, 7))
    for owners in (torch.zeros(4).long(), torch.full((5,), 2), torch.full((5,), -1)):
        with pytest.raises(InputError, match="which of 2 images"):
            retrieval.measure(encode, unit(2, 0), owners, sentences, torch.rand(5, 7))
    with pytest.raises(InputError, match="at least 1"):
        WordCurvesRetrieval(k=0)
    with pytest.raises(InputError, match="at least 1"):
        WordCurvesCosine(steps=0)
