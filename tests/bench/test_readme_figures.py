from __future__ import annotations

import json

import pytest
import readme_figures


def test_the_readme_says_what_was_measured() -> None:
    text = readme_figures.README.read_text()
    assert readme_figures.filled(text, readme_figures.tables()) == text


def test_another_figure_changes_the_readme() -> None:
    models = json.loads(readme_figures.EXPLAIN.read_text())["models"]
    row = next(row for row in models["ViT-B-16"]["clipfast"] if row["prompts"] == 1000)
    row["ratio"] = 3.456
    lines = readme_figures.explaining(models).splitlines()
    assert lines[0] == "| prompts | 1 | 10 | 100 | 1,000 | 10,000 |"
    ours = next(line for line in lines if line.startswith("| **clipfast**, ViT-B/16 |"))
    assert [cell.strip() for cell in ours.strip("|").split("|")][1:4] == ["**0.90**", "", "**0.94**"]
    assert "**3.46**" in ours


def test_only_what_stands_between_the_marks_changes() -> None:
    text = "before\n<!-- figures: a -->\nold\n<!-- /figures: a -->\nafter\n"
    assert readme_figures.filled(text, {"a": "new"}) == text.replace("old", "new")
    with pytest.raises(ValueError, match="once each"):
        readme_figures.filled(text + text, {"a": "new"})


@pytest.mark.parametrize(("ratio", "said"), [(0.904, "0.90"), (9.87, "9.87"), (9.996, "10.0"), (12.42, "12.4")])
def test_digits(ratio: float, said: str) -> None:
    assert readme_figures.number(ratio) == said
