"""The commands that list what there is: models, methods, doctor."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from clipfast.methods import METHODS
from clipfast.ops import dispatch


def test_models_begin_with_the_demo_and_can_be_filtered(run: Any) -> None:
    models = json.loads(run("models", "--json").stdout)
    assert (models[0]["name"], models[0]["weights"], models[0]["site"]) == ("demo", [], "class token")
    assert "openai" in next(model["weights"] for model in models if model["name"] == "ViT-B-16")
    found = json.loads(run("models", "dfn", "--json").stdout)
    assert 0 < len(found) < len(models)
    assert all("dfn" in tag for model in found for tag in model["weights"])
    table = run("models", "vit-b-16").stdout
    assert "ViT-B-16 " in table
    assert "demo" not in table


def test_no_such_model(run: Any) -> None:
    result = run("models", "opnai")
    assert result.exit_code == 2
    assert "did you mean 'openai'?" in result.stderr


def test_methods_show_what_set_takes(run: Any) -> None:
    listed = json.loads(run("methods", "--json").stdout)
    assert [method["name"] for method in listed] == list(METHODS)
    (eclip,) = json.loads(run("methods", "grad_eclip", "--json").stdout)
    parameters = {parameter["name"]: parameter for parameter in eclip["parameters"]}
    assert parameters["heads"] == {"name": "heads", "default": "model", "choices": ["model", "single"]}
    assert parameters["layers"]["default"] is None
    assert eclip["needs"] == "tokens"
    text = run("methods", "grad_eclip").stdout
    assert METHODS["grad_eclip"].info.source in text
    assert "signed=false  (true | false)" in text
    assert "released" in text
    # Words that a parameter knows beside numbers are not all that it takes.
    assert "path=pixel  (pixel | a number)" in run("methods", "mga_clip").stdout
    table = run("methods").stdout
    assert all(name in table for name in METHODS)


def test_no_such_method(run: Any) -> None:
    result = run("methods", "grad_eclp")
    assert result.exit_code == 2
    assert "did you mean 'grad_eclip'?" in result.stderr


def test_doctor_reports_the_machine(run: Any) -> None:
    result = run("doctor", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert found["devices"][0]["device"] == "cpu"
    assert isinstance(found["devices"][0]["bfloat16"], bool)
    assert [(row["op"], row["backend"]) for row in found["backends"]] == [
        (row.op, row.backend) for row in dispatch.table()
    ]
    assert all(row["available"] != bool(row["reasons"]) for row in found["backends"])
    assert found["backend"] == "auto"


def test_doctor_says_why(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipfast.native._load", lambda name: (None, f"{name} was not built: no compiler"))
    monkeypatch.setenv("CLIPFAST_BACKEND", "tritn")
    result = run("doctor")
    assert result.exit_code == 0
    said = " ".join(result.stdout.split())
    assert "clipfast._native no _native was not built: no compiler" in said
    assert "mask_sequence: native (cpu) no _native was not built: no compiler" in said
    assert "did you mean 'triton'?" in said
