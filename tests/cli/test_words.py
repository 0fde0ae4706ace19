from __future__ import annotations

import json
from typing import Any

import pytest

import clipfast


def test_words_and_their_values(run: Any) -> None:
    result = run("words", "scene.png", "a red car", "a dog")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    expected = clipfast.Explainer("demo", signed=True).words("scene.png", ["a red car", "a dog"])
    assert lines[-1] == "green for the score, red against it"
    assert [line for line in lines[:-1] if "+" not in line and "-" not in line[6:]] == [
        f"{words.score:.3f}  {words.text}" for words in expected
    ]
    assert all(f"{word} {value:+.2g}" in result.stdout for words in expected for word, value in words.pairs())


def test_json(run: Any) -> None:
    result = run("words", "scene.png", "-t", "a red car", "--json", "--set", "signed=false")
    (found,) = json.loads(result.stdout)["texts"]
    expected = clipfast.Explainer("demo").words("scene.png", "a red car")
    assert found["text"] == "a red car"
    assert found["score"] == pytest.approx(expected.score)
    assert [word for word, _ in found["words"]] == ["a", "red", "car"]
    assert [value for _, value in found["words"]] == pytest.approx(expected.values.tolist())


def test_json_says_what_else_the_method_says(run: Any) -> None:
    result = run("words", "scene.png", "a dog", "--json", "--method", "integrated_gradients", "--set", "steps=3")
    (found,) = json.loads(result.stdout)["texts"]
    expected = clipfast.Explainer("demo", "integrated_gradients", steps=3).words("scene.png", "a dog")
    assert found["delta"] == pytest.approx(expected.extras["delta"], rel=1e-4)


def test_one_colour_where_a_method_only_weighs(run: Any) -> None:
    result = run("words", "scene.png", "a red car", "--method", "attention")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "the stronger the colour, the more a word counts"
    assert "+" not in result.stdout


def test_a_parameter_of_several_numbers(run: Any) -> None:
    result = run("words", "scene.png", "a dog", "--json", "--method", "mmel", "--set", "theta=1, 2.5,-3")
    (found,) = json.loads(result.stdout)["texts"]
    expected = clipfast.Explainer("demo", "mmel", theta=(1, 2.5, -3), signed=True).words("scene.png", "a dog")
    assert [value for _, value in found["words"]] == pytest.approx(expected.values.tolist())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "clipfast words photo.jpg"),
        (["scene.png"], "clipfast words scene.png"),
        (["a red car", "scene.png"], "clipfast words scene.png 'a red car'"),
        (["scen.png", "a red car"], "did you mean 'scene.png'?"),
        (["scene.png", " "], "is empty"),
        (["scene.png", "a dog", "--method", "grad"], "there is no method 'grad'"),
    ],
)
def test_bad_input(run: Any, words: list[str], said: str) -> None:
    result = run("words", *words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert said in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("error: ")
