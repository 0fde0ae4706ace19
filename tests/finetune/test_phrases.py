"""What of a caption is a phrase, by each of the ways to find out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from clipfast.data.scenes import PLURALS, Scenes, names
from clipfast.errors import InputError, TextError
from clipfast.finetune import phrases
from clipfast.finetune.phrases import open_phraser, tidy, vocabulary


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    for loader in (phrases._textblob, phrases._spacy):
        loader.cache_clear()
    yield
    for loader in (phrases._textblob, phrases._spacy):
        loader.cache_clear()


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([], []),
        ([[("It", "PRP")], [("two", "CD")], [("!", ".")], []], []),
        ([[("A", "DET"), ("Dog", "NOUN")], [("the", "DET"), ("dog", "NOUN")]], ["dog"]),
        ([[("all", "DT"), ("the", "DT"), ("red", "JJ"), ("cars", "NNS")]], ["all the red cars"]),
        ([[("the", "DT"), ("man", "NN"), ("'s", "POS"), ("black", "JJ"), ("hat", "NN")]], ["man's black hat"]),
        ([[("a", "DT"), ("photo", "NN")], [("the", "DT"), ("bottom", "NN"), ("left", "NN"), ("corner", "NN")]], []),
        # A picture on the wall is a thing in the picture when something is said of it behind.
        ([[("a", "DT"), ("photo", "NN"), ("frame", "NN")]], ["photo frame"]),
        ([[('"', "``"), ("the", "DT"), ("Café", "NNP")]], ["café"]),
    ],
)
def test_chunks_become_phrases(chunks, expected) -> None:
    assert tidy(chunks) == expected


def test_a_vocabulary_finds_whole_words_and_the_longer_name() -> None:
    find = vocabulary(["dog", "hot dog", "c++ book", "Ice  Cream", "bus"])
    assert find("Hot  dog and\nDOG, dog; ice cream for the c++ book") == ["hot dog", "dog", "ice cream", "c++ book"]
    assert find("dogs, buses, a hotdog, underdog, bus_stop") == []
    assert find("") == []
    for wrong in ([], [""], ["dog", "  "]):
        with pytest.raises(InputError, match="at least one name"):
            vocabulary(wrong)


def test_scenes_phrases_are_the_things_a_caption_mentions() -> None:
    find, plain = open_phraser("scenes"), set(names())
    singular = {PLURALS.get(name, f"{name}s"): name for name in names()}
    several = 0
    for scene in Scenes(200, seed=3):
        found = find(scene.caption)
        things = {one if one in plain else singular[one] for one in found}
        assert things <= set(scene.names)
        # A caption leaves out one thing at most.
        assert len(things) >= max(1, len(scene.names) - 1)
        several += len(found) > 1
    assert several > 50
    assert find("an empty background") == []


def test_names_come_from_a_file(tmp_path) -> None:
    (tmp_path / "names.txt").write_text("zebra crossing\nzebra\n\n")
    assert open_phraser(f"names:{tmp_path / 'names.txt'}")("A zebra on a zebra crossing") == ["zebra", "zebra crossing"]
    with pytest.raises(TextError, match="no such file"):
        open_phraser("names:/nowhere/names.txt")


@pytest.mark.parametrize("spec", ["textblub", "spacy", "spacy:", "textblob:en", "names:", "scenes:1:200", ""])
def test_unknown_ways_are_refused(spec) -> None:
    with pytest.raises(InputError, match="no way to phrases"):
        open_phraser(spec)


@pytest.mark.parametrize(("spec", "module"), [("textblob", "textblob.en"), ("spacy:en_core_web_sm", "spacy")])
def test_without_the_library_it_says_how_to_get_it(spec, module, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match="pip install"):
        open_phraser(spec)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a photo of a small red car on the left and two dogs", ["small red car", "two dogs"]),
        ("A man riding a wave on top of a surfboard.", ["man", "wave", "surfboard"]),
        ("The man's black hat. It's raining!", ["man", "black hat"]),
        ("dog, dog, Dog", ["dog"]),
        ("there is nothing here", []),
        ("running fast", []),
        ("", []),
        (" \n", []),
        ("...", []),
    ],
)
def test_textblobs_noun_chunks(caption, expected) -> None:
    pytest.importorskip("textblob")
    assert open_phraser("textblob")(caption) == expected


def word(text: str, tag: str) -> SimpleNamespace:
    return SimpleNamespace(text=text, pos_=tag)


def test_spacys_noun_chunks(monkeypatch) -> None:
    asked = []

    def load(name, exclude):
        asked.append(name)
        if name != "en_core_web_sm":
            raise OSError(f"[E050] Can't find model '{name}'.")
        dogs = [[word(article, "DET"), word(dog, "NOUN")] for article, dog in (("A", "Dog"), ("the", "dog"))]
        chunks = [dogs[0], [word("it", "PRON")], dogs[1]]
        return lambda text: SimpleNamespace(noun_chunks=chunks if text else [])

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    assert open_phraser("spacy:en_core_web_sm")("A Dog, it is the dog") == ["dog"]
    assert open_phraser("spacy:en_core_web_sm")("") == []
    assert asked == ["en_core_web_sm"]
    with pytest.raises(InputError, match="spacy download de_nothing"):
        open_phraser("spacy:de_nothing")


def test_a_spacy_pipeline_without_a_parser_is_refused(monkeypatch) -> None:
    class Unparsed:
        @property
        def noun_chunks(self):
            raise ValueError("[E029] noun_chunks requires the dependency parse")

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=lambda name, exclude: lambda text: Unparsed()))
    with pytest.raises(InputError, match="with a parser"):
        open_phraser("spacy:xx")("a dog")
