"""The phrases that fine-tuning looks for in a picture: noun chunks of its caption, or names that it mentions.

A phraser takes a caption to its phrases, in reading order, each once: lower case, without a leading article or
possessive, so that "A dog" and "the dog" are the same phrase. What names the picture itself ("a photo"), or holds no
noun ("it"), is no phrase: it is nowhere in particular.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

from clipfast.data.scenes import PLURALS, names
from clipfast.engine.texts import read_texts
from clipfast.errors import InputError, nearest

Phraser = Callable[[str], list[str]]
"""A caption -> its phrases; none where it has none."""

PICTURES = frozenset(
    """
    photo photos photograph photographs picture pictures image images drawing drawings painting paintings illustration
    illustrations scene scenes view views shot shots closeup close-up background foreground top bottom left right side
    front back middle center centre corner nothing
    """.split()  # noqa: SIM905
)
"""Nouns that stand for the picture or a part of its frame: a chunk that ends in one is no phrase."""

_ARTICLES = frozenset(
    "a an the this that these those some any each every another its his her their my your our".split()  # noqa: SIM905
)
_KINDS = ("textblob", "spacy:PIPELINE", "names:FILE", "scenes")
# Universal and Penn tags of nouns.
_NOUNS = ("NOUN", "PROPN", "NN")
_POSSESSIVE = re.compile(r"['’]s?(?!\w)")


def open_phraser(spec: str) -> Phraser:
    """The phraser that a text names.

    "textblob": noun chunks by TextBlob's parser, whose lexicon comes with the package (clipfast[finetune]).
    "spacy:PIPELINE": noun chunks by an installed spaCy pipeline with a parser, such as spacy:en_core_web_sm.
    "names:FILE": those names of a text file, one a line, that the caption mentions.
    "scenes": the things of rendered scenes, in singular and plural, that the caption mentions.

    Raises InputError for another name, and where the library or the pipeline is not installed, with how to get it;
    TextError for a file without names.
    """
    kind, _, rest = spec.partition(":")
    if kind == "textblob" and not rest:
        return _textblob()
    if kind == "spacy" and rest:
        return _spacy(rest)
    if kind == "names" and rest:
        return vocabulary(read_texts(rest))
    if kind == "scenes" and not rest:
        return vocabulary([*names(), *(PLURALS.get(name, f"{name}s") for name in names())])
    raise InputError(f"there is no way to phrases called {spec!r}: {nearest(spec, _KINDS)}")


def vocabulary(names: Iterable[str]) -> Phraser:
    """Phrases are the names, in the form given, that a caption mentions as whole words; of two that overlap the longer.

    >>> vocabulary(["bus", "dog", "hot dog"])("A hot dog, a Dog and the buses")
    ['hot dog', 'dog']

    Raises InputError for no name, or an empty one.
    """
    known = sorted({_spaced(name) for name in names}, key=lambda name: (-len(name), name))
    if not known or "" in known:
        raise InputError("a vocabulary needs at least one name, and none of them empty.")
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, known))})(?!\w)")
    return lambda caption: _once(pattern.findall(_spaced(caption)))


def tidy(phrases: Iterable[Sequence[tuple[str, str]]]) -> list[str]:
    """Noun chunks, each a sequence of (word, tag), as phrases; tags are Penn's or the universal ones.

    >>> tidy([[("A", "DT"), ("photo", "NN")], [("The", "DT"), ("Red", "JJ"), ("car", "NN")], [("it", "PRP")]])
    ['red car']
    """
    found = []
    for chunk in phrases:
        own = [(word.lower(), tag) for word, tag in chunk if any(letter.isalnum() for letter in word)]
        while own and own[0][0] in _ARTICLES:
            del own[0]
        nouns = [word for word, tag in own if tag.startswith(_NOUNS)]
        if nouns and nouns[-1] not in PICTURES:
            found.append(" ".join(word for word, _ in own).replace(" 's", "'s"))
    return _once(found)


def _once(phrases: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(phrases))


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


@lru_cache(maxsize=1)
def _textblob() -> Phraser:
    try:
        parsers = import_module("textblob.en")
    except ImportError as error:
        raise InputError(
            "noun chunks by textblob need TextBlob: pip install 'clipfast[finetune]'; or give the phrases themselves."
        ) from error
    with warnings.catch_warnings():
        # It reads its lexicon at first use and leaves the file to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        parsers.parse("a word")

    def chunks(caption: str) -> list[str]:
        found: list[list[tuple[str, str]]] = []
        # It would take the s of a possessive for a word.
        for sentence in parsers.parse(_POSSESSIVE.sub("", caption)).split():
            for word, tag, chunk, *_ in sentence:
                if chunk == "B-NP" or not found:
                    found.append([])
                if chunk.endswith("-NP"):
                    found[-1].append((word, tag))
        return tidy(found)

    return chunks


@lru_cache(maxsize=4)
def _spacy(name: str) -> Phraser:
    try:
        spacy: Any = import_module("spacy")
    except ImportError as error:
        raise InputError(
            f"noun chunks by spacy:{name} need spaCy: pip install spacy; python -m spacy download {name}."
        ) from error
    try:
        pipeline = spacy.load(name, exclude=["ner"])
    except (OSError, ValueError) as error:
        raise InputError(
            f"spaCy has no pipeline {name!r} installed: python -m spacy download {name}, or textblob in its place."
        ) from error

    def chunks(caption: str) -> list[str]:
        document = pipeline(caption)
        try:
            return tidy([(token.text, token.pos_) for token in chunk] for chunk in document.noun_chunks)
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"spaCy's {name} finds no noun chunks: take one with a parser, for English.") from error

    return chunks
