"""What images are asked: from the words of a command line to strings, embeddings, and choices among them."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import clipfast
from clipfast.engine.base import Item
from clipfast.engine.texts import Prompts, read_texts
from clipfast.errors import InputError, TextError


@pytest.fixture
def labels(tmp_path: Path) -> str:
    path = tmp_path / "labels.txt"
    path.write_bytes("\ufeffdog\n\n  red car \nHäuser\ndog\n".encode())
    return str(path)


def item(**columns: Any) -> Item:
    return Item("k", bytes, columns)


def test_one_list_for_all_images(labels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ("a cat", "dog", "red car", "Häuser")
    assert Prompts.parse(["a cat"], labels).texts == expected
    assert Prompts.parse(["a cat", " a cat ", "b"]).texts == ("a cat", "b")
    monkeypatch.setattr(sys, "stdin", io.StringIO("dog\nred car\nHäuser\n"))
    assert Prompts.parse(["a cat"], "-").texts == expected
    prompts = Prompts.parse(["a cat"], labels, top=2)
    assert prompts.config() == {"texts": list(expected), "column": None, "templates": None, "top": 2}
    assert prompts.columns == () and prompts.per_image == 2
    assert Prompts.parse(["a"], top=3).per_image == 1 and Prompts.parse(["a", "b"]).per_image == 2
    assert pickle.loads(pickle.dumps(prompts)) == prompts and hash(prompts) == hash(pickle.loads(pickle.dumps(prompts)))


def test_texts_of_its_own() -> None:
    prompts = Prompts.parse(None, "column:label")
    assert prompts.columns == ("label",) and prompts.per_image is None and prompts.texts == ()
    assert prompts.config() == {"texts": [], "column": "label", "templates": None, "top": None}
    assert prompts.own(item(label=" a dog ", other=3)) == ["a dog"]
    assert prompts.own(item(label=["a dog", "", None, "a cat", "a dog"])) == ["a dog", "a cat"]
    assert prompts.own(item(label=("x",))) == ["x"]
    assert Prompts.parse([], "caption").own(item(caption=["x"])) == ["x"]


@pytest.mark.parametrize("value", [None, "", "  ", [], [None], [""]])
def test_an_image_without_text_says_so(value: Any) -> None:
    with pytest.raises(TextError, match="k has no text in column 'label'"):
        Prompts.parse(None, "column:label").own(item(label=value))
    with pytest.raises(TextError, match="k has no caption"):
        Prompts.parse(None, "caption").own(item(caption=value))
    with pytest.raises(TextError, match="k has no caption"):
        Prompts.parse(None, "caption").own(item())


@pytest.mark.parametrize("value", [3, 0, 1.5, {"a": 1}, b"x", ["x", 4], True, float("nan")])
def test_what_is_no_text_is_not_asked(value: Any) -> None:
    with pytest.raises(TextError, match=r"k has .* as its text in column 'label', which is no text"):
        Prompts.parse(None, "column:label").own(item(label=value))


def test_classes(labels: str) -> None:
    prompts = Prompts.parse(None, f"classes:{labels}", top=2)
    assert prompts.texts == ("dog", "red car", "Häuser") and prompts.templates == "photo" and prompts.per_image == 2
    assert Prompts.parse(None, f"classes:{labels}", demo=True).templates == "bare"
    assert Prompts.parse(None, f"classes:{labels}", template=["openai"]).templates == "openai"
    two = Prompts.parse(None, f"classes:{labels}", template=["a {}.", "the {}."])
    assert two.config()["templates"] == ["a {}.", "the {}."]
    assert {prompts, two, pickle.loads(pickle.dumps(two))} == {prompts, two}


def test_what_an_explainer_is_asked(build_clip: Callable[..., Any]) -> None:
    class Letters:
        """Each letter a token, the last position the end of the text."""

        context_length = 20

        def __call__(self, texts: Any, context_length: int | None = None) -> torch.Tensor:
            rows = [
                [298, *(ord(c) % 256 for c in text[:18]), 299]
                for text in ([texts] if isinstance(texts, str) else texts)
            ]
            return torch.tensor([row + [0] * (20 - len(row)) for row in rows])

    explainer = clipfast.Explainer(clipfast.load(build_clip(), tokenizer=Letters()))
    names = ("dog", "car", "bird")
    assert Prompts(names).asked(explainer) == list(names)
    one = Prompts(names, templates="photo").asked(explainer)
    assert one == ["a photo of a dog.", "a photo of a car.", "a photo of a bird."]
    two = Prompts(names, templates=("a {}.", "the {}")).asked(explainer)
    expected = [
        F.normalize(explainer.model.encode_texts([f"a {name}.", f"the {name}"], None).mean(0), dim=0) for name in names
    ]
    assert isinstance(two, torch.Tensor) and torch.allclose(two, torch.stack(expected), atol=1e-6)
    with pytest.raises(InputError, match="there are no shared texts"):
        Prompts(column="caption").asked(explainer)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=7), st.integers(1, 9))
def test_the_best_texts_are_chosen_first_ones_first(scores: list[int], top: int) -> None:
    prompts = Prompts(tuple(map(str, range(len(scores)))), top=top)
    row = torch.tensor(scores, dtype=torch.float32)
    expected = sorted(range(len(scores)), key=lambda p: (-scores[p], p))[:top]
    assert prompts.chosen(torch.stack((row, row))).tolist() == [expected, expected]
    assert len(expected) == prompts.per_image
    every = Prompts(prompts.texts).chosen(row[None])
    assert every.tolist() == [list(range(len(scores)))]


def test_texts_by_address() -> None:
    system: Any = fsspec.filesystem("memory")
    system.pipe("/labels.txt", b"dog\ncat\n")
    try:
        assert read_texts("memory://labels.txt") == ["dog", "cat"]
        assert Prompts.parse(None, "classes:memory://labels.txt").texts == ("dog", "cat")
        with pytest.raises(TextError, match=r"memory://gone\.txt: there is no such file"):
            read_texts("memory://gone.txt")
    finally:
        system.store.clear()


@pytest.mark.parametrize(
    ("given", "spec", "options", "said"),
    [
        (None, None, {}, "there is no text"),
        ([], None, {}, "there is no text"),
        (["a", " "], None, {}, "there is a blank text"),
        (None, "gone.txt", {}, r"gone\.txt: there is no such file; it should hold one text a line"),
        (None, "classes:gone.txt", {}, r"gone\.txt: there is no such file"),
        (None, "classes:", {}, "classes:: there is no such file"),
        (None, ".", {}, "is a folder; it should hold one text a line"),
        (None, "empty.txt", {}, r"empty\.txt is empty"),
        (None, "blank.txt", {}, "holds no text"),
        (None, "latin.txt", {}, "is not UTF-8 text"),
        (["a"], "caption", {}, r"each image's own \(caption\) do not go together"),
        (["a"], "column:x", {}, r"each image's own \(text in column 'x'\) do not go together"),
        (["a"], "classes:one.txt", {}, "-t and --texts classes:FILE do not go together"),
        (["a"], None, {"template": ["a {}"]}, "--template is for the names of classes"),
        (None, "caption", {"template": ["a {}"]}, "--template is for the names of classes, not for caption"),
        (None, "caption", {"top": 3}, "leave them out with caption"),
        (["a"], None, {"top": 0}, "top=0 must be at least 1"),
        (None, "classes:one.txt", {"template": ["nope"]}, "there are no templates 'nope'"),
        (None, "classes:one.txt", {"template": ["a {}", "x"]}, "must hold {} for the class's name; 'x' does not"),
    ],
)
def test_what_does_not_go_together(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: list[str] | None,
    spec: str | None,
    options: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("empty", b""), ("blank", b" \n"), ("latin", b"\xff\n"), ("one", b"dog\n")):
        Path(f"{name}.txt").write_bytes(content)
    with pytest.raises(InputError, match=said):
        Prompts.parse(given, spec, **options)
