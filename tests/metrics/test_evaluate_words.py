"""Evaluations of words, and of what explains again: rows against the protocols called by hand, and what goes on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipfast
from clipfast.data.datasets import Dataset, Sample, Target, open_dataset
from clipfast.data.geometry import InputSpec
from clipfast.errors import InputError
from clipfast.metrics import (
    Completeness,
    Evaluation,
    Sentences,
    WordConfidence,
    WordCurvesCosine,
    WordCurvesRetrieval,
    typographic,
)
from clipfast.metrics.evaluate import Evaluator, evaluate
from clipfast.metrics.evaluation import merged
from clipfast.metrics.perturbation import Confidence
from clipfast.metrics.sanity import likeness
from clipfast.metrics.stability import inputs
from clipfast.models.model import Model

WORDS = ["deletion+insertion/words:steps=3", "confidence/words", "deletion/retrieval:steps=2"]
RETRIEVAL = "deletion+insertion/retrieval:steps=2"


class Captioned(Dataset):
    """Scenes with one to three captions each; of one picture there is none."""

    offers = frozenset({"labels", "masks", "boxes", "captions"})

    def __init__(self, count: int = 6) -> None:
        self.scenes = open_dataset("scenes:1", limit=count)
        self.name, self.classes = "captioned", self.scenes.classes

    def __len__(self) -> int:
        return len(self.scenes)

    def _sample(self, index: int) -> Sample:
        found = self.scenes[index]
        more = ["something red beside a thing", "a thing on grass"]
        captions = [] if index == 2 else [*found.captions, *found.foils, *more][: 1 + index % 3]
        return Sample(found.key, found.image, found.targets, captions)


@pytest.fixture
def model(build_clip: Any, tokenizer: Any) -> Model:
    return clipfast.load(
        build_clip(layers=2).double(), tokenizer=tokenizer, preprocess=InputSpec(size=(64, 64), patch=(16, 16))
    )


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values.double(), atol=1e-9, rtol=1e-9, equal_nan=True)


def by_hand(model: Model, data: Dataset, method: str) -> dict[str, dict[str, torch.Tensor]]:
    explainer, (image, text) = clipfast.Explainer(model, method), model.towers()
    samples = [sample for sample in data if sample.captions]
    with torch.no_grad():
        z = torch.cat([image.encode(x[None]) for x in inputs(explainer, [sample.image for sample in samples])])
        captions = [caption for sample in samples for caption in sample.captions]
        owners = torch.tensor([i for i, sample in enumerate(samples) for _ in sample.captions])
        words = [explainer.words(samples[i].image, t) for i, t in zip(owners.tolist(), captions, strict=True)]
        sentences = Sentences.of(model, captions)
        own = z[owners][:, None]
        return {
            "deletion+insertion/words:steps=3": WordCurvesCosine(3).measure(text.encode, own, sentences, words),
            "confidence/words": WordConfidence().measure(text.encode, own, sentences, words),
            RETRIEVAL: WordCurvesRetrieval(2).measure(text.encode, z, owners, sentences, words),
        }


def test_rows_of_words_are_what_each_protocol_gives_by_itself(model: Model) -> None:
    data = Captioned()
    found = evaluate(model, data, ["grad_eclip"], WORDS, shard=2)
    for name, expected in by_hand(model, data, "grad_eclip").items():
        assert_equal(found.tables["grad_eclip"][name].columns, expected)
    table = found.tables["grad_eclip"]["confidence/words"]
    assert table.texts == [caption for sample in data for caption in sample.captions]
    assert table.numbers == [0, 1, 1, 3, 4, 4, 5, 5, 5]
    explainer = clipfast.Explainer(model)
    scores = [explainer(data[n].image, t).scores.item() for n, t in zip(table.numbers, table.texts, strict=True)]
    assert table.scores == pytest.approx(scores, abs=1e-9)
    assert found.curves("grad_eclip", RETRIEVAL)["deletion IR"].at == [0, 0.5, 1]


def test_retrieval_is_measured_once_for_all_and_goes_on(model: Model, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"methods": ["grad_eclip", "rise:masks=10"], "protocols": WORDS[1:], "shard": 2}
    whole = evaluate(model, Captioned(), **settings)

    class Stop(Exception):
        pass

    done = 0

    def stop(count: int) -> None:
        nonlocal done
        done += count
        if done > 8:
            raise Stop

    with pytest.raises(Stop):
        evaluate(model, Captioned(), out=tmp_path, progress=stop, **settings)
    again = Evaluator(model, Captioned(), out=tmp_path, **settings)
    assert (again.whole, again.left()) == (12, 12), "a gallery needs all of its texts"
    found = again()
    for method in settings["methods"]:
        for name, table in whole.tables[method].items():
            assert_equal(found.tables[method][name].columns, table.columns)
            assert found.tables[method][name].keys == table.keys
    assert Evaluator(model, Captioned(), out=tmp_path, **settings).left() == 0
    found.save(tmp_path)
    assert_equal(Evaluation.load(tmp_path).tables["grad_eclip"][RETRIEVAL].columns,
                 whole.tables["grad_eclip"][RETRIEVAL].columns)  # fmt: skip

    # Another gallery is another measurement, and pairs stay what they are.
    fewer = Evaluator(model, Captioned(), limit=4, out=tmp_path, **settings)
    assert fewer.left() == 8
    assert Evaluator(model, Captioned(), limit=4, out=tmp_path, **(settings | {"protocols": WORDS[1:2]})).left() == 0
    columns = evaluate(model, Captioned(4), ["grad_eclip"], WORDS[2:]).tables["grad_eclip"][RETRIEVAL].columns
    assert_equal(fewer().tables["grad_eclip"][RETRIEVAL].columns, columns)


def test_methods_are_measured_on_the_sides_that_they_explain(model: Model, tmp_path: Path) -> None:
    methods = ["grad_eclip", "mask_clip", "leave_one_out"]
    found = evaluate(model, Captioned(3), methods, ["gini", "energy_pointing_game", WORDS[1]], out=tmp_path)
    assert {name: list(own) for name, own in found.tables.items()} == {
        "grad_eclip": ["gini", "energy_pointing_game", "confidence/words"],
        "mask_clip": ["gini", "energy_pointing_game"],
        "leave_one_out": ["confidence/words"],
    }
    assert found.telling() == ("energy_pointing_game", "share", "higher")
    assert len(list(tmp_path.glob("rows/*-words-*"))) == 2
    evaluator = Evaluator(model, Captioned(3), methods, ["energy_pointing_game", WORDS[1]], out=tmp_path)
    assert set(evaluator.examples(found, 1)) == {"grad_eclip", "mask_clip"}
    assert set(Evaluator(model, Captioned(3), None, WORDS).methods) == {"grad_eclip", "mmel", "rollout", "grad_cam"}


@pytest.mark.parametrize(
    ("methods", "protocols", "said"),
    [
        (
            ["mask_clip"],
            WORDS[:1],
            r"mask_clip does not explain texts, which .*words.* measures; .* do: grad",
        ),
        (["leave_one_out"], ["gini"], "leave_one_out cannot explain images"),
        (["mask_clip"], ["gini", *WORDS[:1]], "can measure none of these methods, which do not explain texts"),
    ],
)
def test_what_cannot_be_measured_is_said(model: Model, methods: Any, protocols: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Evaluator(model, Captioned(2), methods, protocols)


def test_captions_that_cannot_be_read_leave_their_sample_out(model: Model) -> None:
    class Blank(Captioned):
        def _sample(self, index: int) -> Sample:
            found = super()._sample(index)
            return Sample(found.key, found.image, found.targets, ["  "]) if index == 1 else found

    data = Blank(4)
    found = evaluate(model, data, ["grad_eclip", "rollout"], WORDS[1:])
    assert list(found.errors) == [data[1].key]
    assert "empty" in found.errors[data[1].key]
    assert set(found.tables["rollout"][RETRIEVAL].numbers) == {0, 3}


def test_what_explains_again_by_hand(model: Model) -> None:
    data = open_dataset("scenes:1", limit=4)
    names = ["sanity/class_sensitivity:side=32:seed=4", "typographic:width=0.6", "completeness"]
    found = evaluate(model, data, ["integrated_gradients:steps=3"], names, prompt="a {}")
    tables = found.tables["integrated_gradients:steps=3"]
    explainer = clipfast.Explainer(model, "integrated_gradients", steps=3)
    rows = 0
    for number, sample in enumerate(data):
        texts = [f"a {target.text}" for target in sample.targets]
        here = slice(rows, rows := rows + len(texts))
        out = explainer(sample.image, texts)

        shown = {target.text for target in sample.targets}
        others = [name for name in data.classes or [] if name not in shown]

        def drawn(seed: int, count: int, others: list[str] = others, number: int = number) -> list[str]:
            return [others[i] for i in np.random.default_rng((seed, number)).permutation(len(others))[:count]]

        away = explainer(sample.image, [f"a {name}" for name in drawn(4, len(texts))]).maps
        ranks, structure = likeness(out.maps, away, 32)
        columns = tables["sanity/class_sensitivity:side=32:seed=4"].columns
        assert_equal({name: values[here] for name, values in columns.items()}, {"Spearman": ranks, "SSIM": structure})

        (word,) = drawn(0, 1)
        pasted = typographic(explainer, [sample.image], texts, word, width=0.6)
        expected = {"share before": pasted.share_before[0], "share after": pasted.share_after[0],
                    "score moved": pasted.moved[0], "area": pasted.area.expand(len(texts))}  # fmt: skip
        columns = tables["typographic:width=0.6"].columns
        assert_equal({name: values[here] for name, values in columns.items()}, expected)

        # integrated_gradients says itself how far its integral is from the difference: its own baseline, blurred.
        delta = tables["completeness"].columns["delta"][here]
        torch.testing.assert_close(delta, out.extras["delta"][0].double(), atol=1e-9, rtol=1e-9)
    assert rows == len(tables["completeness"].keys)


def test_completeness_takes_the_baseline_that_it_is_told(model: Model) -> None:
    methods = {"integrated_gradients": {"baseline": "mean", "steps": 3}}
    data = open_dataset("scenes:1", limit=2)
    found = evaluate(
        model, data, methods, ["completeness", "completeness:baseline=mean", "completeness:baseline=black"]
    )
    own, mean, black = (table.columns["delta"] for table in found.tables["integrated_gradients"].values())
    assert torch.equal(own, mean)
    assert not torch.allclose(own, black)
    with pytest.raises(InputError, match="baseline must be"):
        Completeness("grey")  # type: ignore[arg-type]


def test_where_nothing_is_absent_and_no_word_fits_does_not_count(model: Model) -> None:
    class All(Dataset):
        name, classes, offers = "all", ["dog", "cat"], frozenset({"labels"})

        def __len__(self) -> int:
            return 2

        def _sample(self, index: int) -> Sample:
            targets = [Target("dog", 0), Target("cat", 1)][: 2 - index]
            return Sample(str(index), Image.new("RGB", (64, 64), (index, 90, 20)), targets, [])

    found = evaluate(model, All(), ["grad_eclip"], ["class_sensitivity", "typographic:word=Donaudampfschiff:width=0.1"])
    alike, pasted = (table.columns for table in found.tables["grad_eclip"].values())
    assert alike["SSIM"].isnan().tolist() == [True, True, False]
    assert pasted["share after"].isnan().all()
    assert math.isnan(found.figures("grad_eclip", "typographic:word=Donaudampfschiff:width=0.1")[0].value)


def test_both_confidences_come_of_the_same_passes(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    ordinary = Confidence.scores

    def scores(self: Confidence, *args: Any, **options: Any) -> Any:
        calls.append(len(args[2]))
        return ordinary(self, *args, **options)

    monkeypatch.setattr(Confidence, "scores", scores)
    data = open_dataset("scenes:1", limit=3)
    both = evaluate(model, data, ["grad_eclip"], ["confidence/m2ib", "confidence/gradcam++"])
    together, calls[:] = list(calls), []
    alone = evaluate(model, data, ["grad_eclip"], ["confidence/gradcam++"])
    assert together == calls
    name = "confidence/gradcam++"
    assert_equal(both.tables["grad_eclip"][name].columns, alone.tables["grad_eclip"][name].columns)


def test_only_what_had_the_same_pairs_is_compared(model: Model) -> None:
    data = open_dataset("scenes:1", limit=6)
    many = evaluate(model, data, ["grad_eclip", "mask_clip", "tclip"], ["gini"])
    few = evaluate(model, data, ["rollout"], ["gini"], limit=2)
    whole = merged([many, few])
    assert whole.compared("gini") == ["grad_eclip", "mask_clip", "tclip"]
    assert whole.best("gini", 0) == many.best("gini", 0)
    marked = {row["method"]: row["compared"] for row in whole.to_json()["results"]}
    assert marked == {"grad_eclip": True, "mask_clip": True, "tclip": True, "rollout": False}
    # Two methods of one evaluation differ on what both had.
    (one,) = whole.differences("tclip", whole, "rollout", "gini")
    same = evaluate(model, data, ["tclip", "rollout"], ["gini"], limit=2)
    (alone,) = same.differences("tclip", same, "rollout", "gini")
    assert (one.value, one.low, one.high, one.count) == pytest.approx((alone.value, alone.low, alone.high, alone.count))
    assert merged([few]).best("gini", 0) == set()
    twice = evaluate(model, data, ["grad_eclip", "grad_eclip:layers=1"], ["gini"])
    assert twice.best("gini", 0) == set(), "of equals none is the best"
