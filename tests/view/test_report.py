from __future__ import annotations

import base64
import io
import json
import re
from datetime import datetime
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from clipfast.errors import InputError
from clipfast.view.report import ReportItem, Strip, write_report

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\u2028'\"`${x}$style"
FIXED = {"created": datetime(2026, 1, 2, 3, 4), "versions": {"clipfast": "1"}}


class Page(HTMLParser):
    """The page's elements, attributes and text, with script content as HTML parsers see it."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def item(prompts=("a dog", "a cat"), side=14, **changes):
    rng = np.random.default_rng(0)
    values = {
        "title": "beach.jpg",
        "image": Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)),
        "prompts": list(prompts),
        "heat": rng.random((len(prompts), side, side)),
        "scores": [0.25 + 0.01 * i for i in range(len(prompts))],
        "words": {"a dog": [("a", -0.1), ("dog", 0.4)]},
    }
    return ReportItem(**{**values, **changes})


def write(path, items, **options):
    options = {"method": "grad_eclip", "model": "demo", "seconds": 1.5, **FIXED, **options}
    page = Page(write_report(path, items, **options).read_text(encoding="utf-8"))
    return page, json.loads(page.scripts[0])


def test_one_file_that_fetches_nothing(tmp_path):
    page, _ = write(tmp_path / "r.html", [item()])
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    assert not [a for _, attrs in page.elements for a in ("src", "href", "action", "srcset") if a in attrs]
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest", text)
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_the_data_is_what_was_given(tmp_path):
    given = item()
    _, data = write(tmp_path / "r.html", [given])
    (shown,) = data["items"]
    assert (shown["title"], shown["width"], shown["height"]) == ("beach.jpg", 80, 60)
    assert [p["text"] for p in shown["prompts"]] == ["a dog", "a cat"]
    assert [p["score"] for p in shown["prompts"]] == pytest.approx(given.scores)
    words = shown["prompts"][0]["words"]
    assert [(w["word"], w["value"], w["strength"]) for w in words] == [("a", -0.1, -0.25), ("dog", 0.4, 1.0)]
    assert shown["prompts"][1]["words"] is None
    for prompt, heat in zip(shown["prompts"], given.heat, strict=True):
        png = Image.open(io.BytesIO(base64.b64decode(prompt["map"].removeprefix("data:image/png;base64,"))))
        assert png.mode == "L"
        assert np.abs(np.asarray(png) / 255 - heat).max() <= 0.5 / 255 + 1e-6
    jpeg = Image.open(io.BytesIO(base64.b64decode(shown["image"].removeprefix("data:image/jpeg;base64,"))))
    assert jpeg.size == (80, 60)


def test_untrusted_text_stays_text(tmp_path):
    hostile = item([HOSTILE], title=HOSTILE, words={HOSTILE: [(HOSTILE, 1.0)]})
    plain, _ = write(tmp_path / "plain.html", [item(["x"], words=None)], failures={"y": "z"})
    names = {"method": HOSTILE, "model": HOSTILE, "title": HOSTILE, "note": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    page, data = write(tmp_path / "r.html", [hostile], failures={HOSTILE: f"{HOSTILE} is broken."}, **names)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert page.scripts[1] == plain.scripts[1]
    assert "alert(1)" in page.text
    assert data["items"][0]["title"] == HOSTILE
    assert data["items"][0]["prompts"][0]["text"] == HOSTILE
    assert "<" not in page.scripts[0]
    assert "\u2028" not in page.scripts[0]


def test_the_page_never_parses_data_as_markup(tmp_path):
    page, _ = write(tmp_path / "r.html", [item()])
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", page.scripts[1])


def test_every_element_the_script_looks_for_exists(tmp_path):
    page, _ = write(tmp_path / "r.html", [item()])
    present = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    wanted = set(re.findall(r'getElementById\("(\w+)"\)', page.scripts[1]))
    assert len(wanted) >= 6
    assert wanted <= present


def test_header_and_failures_are_shown(tmp_path):
    failures = {"broken.jpg": "broken.jpg is truncated.", "x.png": "no file."}
    page, _ = write(tmp_path / "r.html", [item(), item()], failures=failures, seconds=0.25)
    for text in ("grad_eclip", "demo", "250 ms", "2026-01-02 03:04", "clipfast 1"):
        assert text in page.text
    assert "2 images were not explained" in page.text
    assert "broken.jpg is truncated." in page.text
    assert "broken.jpg: broken.jpg" not in page.text
    assert "x.png: no file." in page.text
    assert "not explained" not in write(tmp_path / "r.html", [item()])[0].text


def test_the_same_input_writes_the_same_bytes(tmp_path):
    for name in ("a.html", "b.html"):
        write(tmp_path / name, [item()])
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_large_pictures_and_maps_are_stored_small(tmp_path):
    big = Image.effect_noise((3000, 2000), 90).convert("RGB")
    _, data = write(
        tmp_path / "r.html", [item(["a"], image=big, heat=np.random.default_rng(1).random((1, 2000, 3000)))]
    )
    (shown,) = data["items"]
    assert (shown["width"], shown["height"]) == (3000, 2000)
    assert len(shown["image"]) < 1_500_000
    assert len(shown["prompts"][0]["map"]) < 20_000


def test_many_prompts_stay_light(tmp_path):
    _, data = write(tmp_path / "r.html", [item([f"prompt {i}" for i in range(300)], words=None)])
    assert len(data["items"][0]["prompts"]) == 300
    assert (tmp_path / "r.html").stat().st_size < 300 * 700 + 60_000


def test_strips_extras_and_signs_are_what_was_given(tmp_path):
    heat = np.random.default_rng(2).random((2, 12, 20))
    given = item(
        strips={"a dog": Strip(["a", HOSTILE], heat, [0.1, -0.2], "signed")},
        extras={"delta": [0.00123456, -2.0]},
        palette="signed",
        signed_words=False,
    )
    page, data = write(tmp_path / "r.html", [given])
    (shown,) = data["items"]
    assert [p["extras"] for p in shown["prompts"]] == [{"delta": "0.00123"}, {"delta": "-2"}]
    assert [p["palette"] for p in shown["prompts"]] == ["signed"] * 2 and shown["signedWords"] is False
    strip, none = (p["strip"] for p in shown["prompts"])
    assert none is None and [(w["text"], w["score"], w["palette"]) for w in strip] == [
        ("a", 0.1, "signed"),
        (HOSTILE, -0.2, "signed"),
    ]
    for word, values in zip(strip, heat, strict=True):
        png = Image.open(io.BytesIO(base64.b64decode(word["map"].removeprefix("data:image/png;base64,"))))
        assert np.abs(np.asarray(png) / 255 - values).max() <= 0.5 / 255 + 1e-6
    assert "purple" in page.text and set(data["palettes"]) == {"heat", "jet", "signed"}
    assert "purple" not in write(tmp_path / "r.html", [item()])[0].text


@pytest.mark.parametrize("items", [[], [item([], heat=np.zeros((0, 7, 7)), scores=[])]])
def test_nothing_explained_is_still_a_page(tmp_path, items):
    page, data = write(tmp_path / "r.html", items, failures={"a.jpg": "a.jpg is empty."})
    assert len(data["items"]) == len(items)
    assert "1 image was not explained" in page.text


def test_versions_and_time_are_found_by_default(tmp_path):
    page, _ = write(tmp_path / "r.html", [item()], created=None, versions=None)
    assert re.search(r"torch \d.* Python 3", page.text)
    assert str(datetime.now().year) in page.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"heat": np.full((2, 3, 3), np.nan)},
        {"heat": np.full((2, 3, 3), 7.0)},
        {"heat": np.zeros((1, 3, 3))},
        {"heat": np.zeros((3, 3))},
        {"scores": [0.1]},
        {"scores": [0.1, float("nan")]},
        {"words": {"a dog": [("dog", float("inf"))]}},
        {"strips": {"a dog": Strip(["a"], np.zeros((2, 3, 3)), [0.1])}},
        {"strips": {"a dog": Strip(["a"], np.zeros((1, 3, 3)), [])}},
        {"extras": {"delta": [0.1]}},
    ],
)
def test_what_cannot_be_shown_is_refused_and_leaves_no_file(tmp_path, wrong):
    with pytest.raises(InputError):
        write(tmp_path / "r.html", [item(**wrong)])
    assert not list(tmp_path.iterdir())
