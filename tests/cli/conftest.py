"""The command line in a folder of its own, with a demo model whose random weights are made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from clipfast.cli import app
from clipfast.data.scenes import render
from clipfast.models import demo

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, _ = demo.build_demo()
    path = tmp_path_factory.mktemp("weights") / "demo.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path, {"words": json.dumps(demo.WORDS)})
    return path


@pytest.fixture(autouse=True)
def here(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: empty but for scene.png."""
    monkeypatch.setattr(demo, "WEIGHTS", weights)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(render(5).image).save("scene.png")
    return tmp_path


@pytest.fixture
def run() -> Run:
    """Runs `clipfast` with these words; the result has exit_code, stdout and stderr."""

    def call(*words: object, stdin: str | None = None) -> Any:
        result = CliRunner().invoke(app, [str(word) for word in words], input=stdin, prog_name="clipfast")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return call
