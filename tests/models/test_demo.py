from __future__ import annotations

import re

import numpy as np
import open_clip
import pytest
import torch

import clipfast
from clipfast.data.scenes import Scenes, names, render
from clipfast.errors import TextError
from clipfast.models.demo import WEIGHTS, WORDS, DemoTokenizer, build_demo, load_demo


@pytest.fixture(scope="module")
def tokenizer() -> DemoTokenizer:
    return DemoTokenizer()


def test_tokens_are_open_clips_in_compact_numbers(tokenizer):
    full = open_clip.SimpleTokenizer()
    for text in ("a photo of a dog", "two butterflies, a red car and an octopus on the left."):
        pieces = [tokenizer.decoder[i] for i in tokenizer.encode(text)]
        assert pieces == [full.decoder[i] for i in full.encode(text)]
        assert "".join(pieces).replace("</w>", " ").split() == re.findall(r"\w+|[^\w\s]", text)


def test_the_end_token_is_the_largest_and_padding_zero(tokenizer):
    ids = tokenizer(["dog", "a dog and a red car"])
    assert ids.shape == (2, tokenizer.context_length)
    assert ids.dtype == torch.int64
    assert ids.argmax(-1).tolist() == [2, 7]
    assert (ids[:, 0] == tokenizer.sot_token_id).all()
    assert ids[0, 3:].sum() == 0
    assert ids.max() == tokenizer.eot_token_id == tokenizer.vocab_size - 1
    assert 0 not in tokenizer.decoder


def test_long_texts_are_cut_before_the_end_token(tokenizer):
    ids = tokenizer("dog " * 100)
    assert ids.shape == (1, tokenizer.context_length)
    assert ids[0, -1] == tokenizer.eot_token_id


def test_unknown_words_are_named(tokenizer):
    with pytest.raises(TextError, match=r"'zebra', 'skateboard'.*clipfast.models.demo.WORDS"):
        tokenizer("a zebra on a skateboard")
    assert torch.equal(tokenizer("A Photo of a DOG"), tokenizer("a photo of a dog"))


def test_the_vocabulary_is_what_captions_use():
    used: set[str] = set()
    for seed in range(2500):
        scene = render(seed, 32, (0, 4), word=seed % 5 == 0, repeat=0.5)
        used |= set(re.findall(r"\w+", f"{scene.caption} {scene.foil}"))
    assert used <= set(WORDS)
    assert len(set(WORDS) - used) <= 3
    assert len(WORDS) == len(set(WORDS))
    assert set(names()) <= set(WORDS)


def test_architecture_is_open_clips():
    model, tokenizer = build_demo()
    assert type(model) is open_clip.CLIP
    assert sum(p.numel() for p in model.parameters()) < 4e6
    assert open_clip.get_model_preprocess_cfg(model)["size"] == 96
    with torch.no_grad():
        assert model.encode_image(torch.zeros(2, 3, 96, 96)).shape == model.encode_text(tokenizer(["dog", "cat"])).shape


def test_packaged_weights_load():
    model, _ = load_demo()
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert WEIGHTS.stat().st_size < 10e6


@pytest.fixture(scope="module")
def demo() -> clipfast.Model:
    return clipfast.load("demo")


def heats(demo, scenes, prompts):
    """Maps on the scenes' pixels: (B, P, H, W)."""
    return clipfast.explain([scene.image for scene in scenes], prompts, model=demo).resize()


def test_it_tells_sixty_four_things_apart(demo):
    scenes = list(Scenes(100, seed=7, objects=1))
    scores = clipfast.explain(
        [s.image for s in scenes], [f"a photo of a {name}" for name in names()], model=demo
    ).scores
    right = [names()[row.argmax()] == scene.names[0] for row, scene in zip(scores, scenes, strict=True)]
    assert np.mean(right) >= 0.93


@pytest.mark.parametrize("count", [1, 2, 3])
def test_maps_peak_on_the_thing_that_was_asked_for(demo, count):
    scenes = list(Scenes(40, seed=8, objects=count))
    hits = []
    for scene, maps in zip(scenes, heats(demo, scenes, [f"a photo of a {name}" for name in names()]), strict=True):
        for name in scene.names:
            heat = maps[names().index(name)]
            hits.append(bool(scene.mask(name).ravel()[int(heat.argmax())]) and bool(heat.max() > 0))
    assert np.mean(hits) >= 0.80


def test_a_sentence_lights_everything_it_names(demo):
    scenes = [s for s in Scenes(150, seed=9, objects=2, only=["dog", "car"], distractors=0) if len(s.names) == 2][:30]
    lit = []
    for scene in scenes:
        colour = next(thing.colour for thing in scene.objects if thing.name == "car")
        (maps,) = heats(demo, [scene], [f"a dog and a {colour} car"])
        heat = maps[0].numpy()
        background = heat[~(scene.mask("dog") | scene.mask("car"))].mean()
        lit.append(all(heat[scene.mask(name)].mean() > 2 * background for name in ("dog", "car")))
    assert np.mean(lit) >= 0.8


def test_a_written_word_raises_scores(demo):
    """The demo sees that something is written, not what: a word raises every name's score, its own among them."""
    seeds = range(200, 240)
    plain = [render(seed, objects=1, only=["dog"]) for seed in seeds]
    typed = [render(seed, objects=1, only=["dog"], word="cat") for seed in seeds]
    before, after = (clipfast.explain([s.image for s in scenes], "cat", model=demo).scores for scenes in (plain, typed))
    assert (after > before).float().mean() >= 0.9
    assert (after - before).mean() > 0.05


def test_captions_beat_their_foils(demo):
    scenes = list(Scenes(100, seed=10))
    images = [scene.image for scene in scenes]
    true, false = (
        clipfast.explain(images, [getattr(scene, kind) for scene in scenes], model=demo, pairs=True).scores
        for kind in ("caption", "foil")
    )
    assert (true > false).float().mean() >= 0.8
