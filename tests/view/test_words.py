from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from clipfast.errors import InputError
from clipfast.view.words import legend, markup, strengths, terminal

finite = st.floats(-1e30, 1e30)


@given(st.lists(finite, max_size=8))
def test_the_scale_is_symmetric(values):
    scaled = strengths(values)
    assert scaled == [-s for s in strengths([-v for v in values])]
    assert all(-1 <= s <= 1 and (s > 0) == (v > 0 and s != 0) for s, v in zip(scaled, values, strict=True))
    assert max(map(abs, scaled), default=0) in (0, 1)


class Reader(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.styles: list[str] = []
        self.data: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.styles.append(dict(attrs).get("style", ""))

    def handle_data(self, data):
        self.data.append(data)


def test_markup_is_one_escaped_span_a_word():
    hostile = '<img src=x onerror="alert(1)">&amp;'
    read = Reader(markup([(hostile, 1.0), ("dog", -0.5), ("of", 0.0)]))
    assert read.tags == ["span"] * 3
    assert read.data == [hostile, " ", "dog", " ", "of"]
    green, red, none = read.styles
    assert "rgba(0,145,105,1.000)" in green
    assert "rgba(213,66,34,0.500)" in red
    assert "0.000)" in none


def test_terminal_colours_by_sign_and_leaves_neutral_words_plain():
    line = terminal([("[bold]dog", 2.0), ("not", -2.0), ("of", 0.01)])
    assert line.plain == "[bold]dog not of"
    styles = [str(line.get_style_at_offset(Console(), i).bgcolor) for i in (0, 10, 14)]
    assert "#009169" in styles[0]
    assert "#d54222" in styles[1]
    assert styles[2] == "None"


def test_nothing_and_all_zero():
    assert terminal([]).plain == ""
    assert markup([]) == ""
    assert terminal([("a", 0.0)]).spans == []


@pytest.mark.parametrize("draw", [terminal, markup])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(draw, bad):
    with pytest.raises(InputError, match="not finite"):
        draw([("a", bad)])


def test_unsigned_words_have_one_colour():
    line = terminal([("dog", 2.0), ("not", 1.0), ("of", 0.0)], signed=False)
    dog, half, none = (str(line.get_style_at_offset(Console(), i).bgcolor) for i in (0, 4, 8))
    assert "#565cc8" in dog and "#aaaee4" in half and none == "None"
    read = Reader(markup([("dog", 2.0)], signed=False))
    assert "rgba(86,92,200,1.000)" in read.styles[0]
    assert "green" in legend(True) and "green" not in legend(False)
