from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clipfast.cli.robust import _radii
from clipfast.data.datasets import open_dataset
from clipfast.data.scenes import names, render
from clipfast.metrics.robust import RobustAccuracy
from clipfast.models.load import load

FEW = ("-n", 3, "--steps", 2, "--targets", 0)


def test_it_prints_and_writes_what_was_measured(run: Any) -> None:
    result = run("robust", *FEW, "-d", "scenes:1:20", "--radii", "1/255,0.25")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "runs/robust/robust.json"
    document = json.loads(Path("runs/robust/robust.json").read_text())
    assert document["parameters"]["radii"] == [1 / 255, 0.25] and document["parameters"]["steps"] == 2
    want = RobustAccuracy((1 / 255, 0.25), 2, 0, 3, templates="bare").attack(load("demo"), open_dataset("scenes:1:20"))
    assert [one["value"] for one in document["results"]] == [one.value for one in want.figures()]
    assert [one["figure"] for one in document["results"]] == ["clean", "robust 1/255", "robust 63.75/255"]
    for one in document["results"]:
        assert any(one["figure"] in line and f"{one['value']:.3f}" in line for line in result.stdout.splitlines())
    assert "3 pictures of scenes:1" in result.stdout


def test_json_is_all_there_is_and_torn_pictures_are_left_out(run: Any) -> None:
    for label, name in enumerate(names()[:2]):
        Path("data", name).mkdir(parents=True)
        Image.fromarray(render(label).image).save(f"data/{name}/0.png")
    Path("data", names()[0], "torn.png").write_bytes(b"torn")
    document = json.loads(run("robust", *FEW, "-d", "folder:data", "--radii", "0.1", "--json", "-o", "out").stdout)
    assert document["results"][0]["count"] == 2 and document["folder"] == "out"
    assert (Path("out") / "robust.json").is_file()
    refused = run("robust", "-n", 2, "-d", "folder:data")
    assert refused.exit_code == 2 and "give targets=0" in refused.stderr and not Path("runs").exists()


@pytest.mark.parametrize("text", ["", "2/0", "two", "1/255;2/255"])
def test_radii_that_are_none(run: Any, text: str) -> None:
    result = run("robust", "--radii", text)
    assert result.exit_code == 2 and "--radii" in result.stderr


def test_radii() -> None:
    assert _radii("4/255, 2/255,2/255") == (2 / 255, 4 / 255)
    assert _radii("0.01") == (0.01,)
