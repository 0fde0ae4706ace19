"""Entropies against scipy's and by hand: over all classes, within groups, and what the chain rule says of both."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy as published

import clipfast
from clipfast.data.datasets.rendered import RenderedScenes
from clipfast.errors import InputError
from clipfast.metrics.base import figures
from clipfast.metrics.class_entropy import ClassEntropy, entropy
from clipfast.metrics.probe import encode, zero_shot_head

PETS = {"pets": ["dog", "cat"], "things": ["car", "bus", "train"]}
CLASSES = ["dog", "car", "cat", "bus", "train", "sun"]


def test_literal_values() -> None:
    p = torch.tensor([
        [1.0, 0, 0, 0, 0, 0],
        [1 / 6] * 6,
        [0.3, 0.5, 0.1, 0, 0.1, 0],
        [0.2, 0.1, 0.2, 0.1, 0.1, 0.3],
    ], dtype=torch.float64)  # fmt: skip
    found = ClassEntropy(PETS).columns(p, torch.tensor([0, 1, 2, 5]), CLASSES)
    assert found["entropy"][:2].tolist() == pytest.approx([0, math.log(6)])
    assert found["entropy share"][:2].tolist() == pytest.approx([0, 1])
    assert found["within"].tolist()[:2] == pytest.approx([0, math.log(3)])
    assert found["within share"].tolist()[:2] == pytest.approx([0, 1])
    assert float(found["within"][2]) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert found["group mass"].tolist()[:3] == pytest.approx([1, 0.5, 0.4])
    # The sun is in no group.
    assert found["within"].isnan().tolist() == found["group mass"].isnan().tolist() == [False, False, False, True]


@given(st.integers(0, 2**32 - 1), st.integers(2, 9))
def test_entropies_are_scipys_and_obey_the_chain_rule(seed: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = (8 * torch.randn(5, classes, generator=generator, dtype=torch.float64)).softmax(-1)
    p[0] = 0
    p[0, 0] = 1
    names = [f"class {k}" for k in range(classes)]
    which = torch.randint(3, (classes,), generator=generator)
    groups = {f"group {g}": [names[k] for k in range(classes) if which[k] == g] for g in range(3)}
    labels = torch.randint(classes, (5,), generator=generator)
    found = ClassEntropy(groups).columns(p, labels, names)
    for i, row in enumerate(p.tolist()):
        assert float(found["entropy"][i]) == pytest.approx(published(row), abs=1e-12)
        own = [k for k in range(classes) if which[k] == which[labels[i]]]
        assert float(found["group mass"][i]) == pytest.approx(sum(row[k] for k in own))
        if len(own) == 1:
            assert math.isnan(found["within"][i])
        elif sum(row[k] for k in own):
            assert float(found["within"][i]) == pytest.approx(published([row[k] for k in own]), abs=1e-10)
    # H = H(groups) + sum of p(G) H(within G), with a sample of every group.
    for row in p[1:]:
        total, masses = 0.0, []
        for own in groups.values():
            if not own:
                continue
            one = ClassEntropy(groups).columns(row[None], torch.tensor([names.index(own[0])]), names)
            masses.append(float(one["group mass"]))
            total += masses[-1] * (0.0 if len(own) == 1 else float(one["within"]))
        assert total + entropy(torch.tensor(masses, dtype=torch.float64)) == pytest.approx(
            float(entropy(row)), abs=1e-9
        )


def test_a_group_without_any_probability_is_undecided() -> None:
    p = torch.tensor([[0.0, 1, 0, 0, 0, 0]])
    found = ClassEntropy(PETS).columns(p, torch.tensor([0]), CLASSES)
    assert float(found["within"]) == pytest.approx(math.log(2)) and float(found["group mass"]) == 0


def test_without_groups_there_is_nothing_within() -> None:
    found = ClassEntropy().columns(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([0, 1]), ["a", "b"])
    assert found["entropy"].tolist() == pytest.approx([math.log(2), 0])
    assert found["within"].isnan().all() and found["group mass"].isnan().all()
    values = {figure.name: figure.value for figure in figures(ClassEntropy(), found, resamples=5)}
    assert values["entropy"] == pytest.approx(math.log(2) / 2) and math.isnan(values["within"])


def test_what_cannot_be_measured() -> None:
    p, labels = torch.full((2, 6), 1 / 6), torch.tensor([0, 1])
    with pytest.raises(InputError, match="'dog' is in the groups 'pets' and 'wild'"):
        ClassEntropy({"pets": ["dog"], "wild": ["fox", "dog"]})
    with pytest.raises(InputError, match="'pets' has 'dgo', which is no class: did you mean 'dog'"):
        ClassEntropy({"pets": ["dgo"]}).columns(p, labels, CLASSES)
    with pytest.raises(InputError, match=r"must be \(2, 6\)"):
        ClassEntropy().columns(p[:, :5], labels, CLASSES)
    for wrong in (p * 2, p - 0.5, p * torch.nan):
        with pytest.raises(InputError, match="sum to one"):
            ClassEntropy().columns(wrong, labels, CLASSES)
    with pytest.raises(InputError, match="two or more classes"):
        ClassEntropy().columns(torch.ones(2, 1), labels * 0, ["dog"])


def test_the_demo_model_on_scenes() -> None:
    model = clipfast.load("demo", device="cpu")
    scenes = RenderedScenes(11, 24, objects=1)
    assert scenes.classes is not None
    head = zero_shot_head(model, scenes.classes, "bare")
    pets = ClassEntropy({"pets": ["dog", "cat", "mouse", "rabbit", "fox"], "rest": scenes.classes[5:]})
    found = pets.measure(model, scenes, head)
    encoded = encode(model, scenes)
    tower, _ = model.towers()
    logits = tower.logit_scale * encoded.z @ model.encode_texts(scenes.classes).T
    want = torch.distributions.Categorical(logits=logits.double()).entropy()
    assert torch.allclose(found["entropy"], want, atol=1e-5)
    # A sharper head is less in doubt.
    sharper = type(head)(4 * head.weight, head.bias, head.classes)
    assert float(pets.measure(model, scenes, sharper)["entropy"].mean()) < 0.5 * float(want.mean())
    with pytest.raises(InputError, match="must have the classes"):
        pets.measure(model, scenes, zero_shot_head(model, scenes.classes[:5], "bare"))
