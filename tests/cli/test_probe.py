from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from clipfast import Explainer
from clipfast.data.datasets import open_dataset
from clipfast.metrics.probe import encode, fit_probe, hold_out
from clipfast.models.load import load


@pytest.fixture
def folder(here: Path) -> Path:
    """Three classes of ten pictures that differ in colour; one picture is torn."""
    generator = torch.Generator().manual_seed(0)
    for name, colour in (("dog", (200, 40, 40)), ("cat", (40, 200, 40)), ("zeppelin", (40, 40, 200))):
        Path("data", name).mkdir(parents=True)
        for i in range(10):
            noise = torch.randint(-40, 40, (96, 96, 3), generator=generator)
            pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(f"data/{name}/{i}.png")
    Path("data/cat/torn.png").write_bytes(b"torn")
    return Path("data")


def test_a_folder_is_enough(run: Any, folder: Path) -> None:
    result = run("probe", folder, "--show", 2)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "runs/probe/report.html"
    document = json.loads(Path("runs/probe/probe.json").read_text())
    dataset, model = open_dataset("folder:data"), load("demo")
    encoded = encode(model, dataset, on_error="skip")
    fitted, kept = hold_out(encoded.labels, 0.2, 0)
    head = fit_probe(encoded.select(fitted))
    assert document["classes"] == ["cat", "dog", "zeppelin"] and document["fitted"] == 24
    found = document["accuracy"]["linear probe"]
    assert found["value"] == head.accuracy(encoded.select(kept)) == 1.0 and found["count"] == 6
    assert "linear probe: 1.000" in result.stdout
    # The demo model does not know zeppelins, which a probe can be taught.
    assert "zero-shot" not in document["accuracy"] and "zero-shot accuracy is left out" in result.stderr
    with safe_open("runs/probe/probe.safetensors", "pt") as stored:
        assert json.loads(stored.metadata()["classes"]) == document["classes"]
        assert torch.equal(stored.get_tensor("weight"), head.weight) and torch.equal(
            stored.get_tensor("bias"), head.bias
        )
        directions = stored.get_tensor("directions")
    maps = Explainer(model)(Path("data/dog/0.png"), directions).maps
    assert maps.shape[1] == 3 and bool(maps.isfinite().all())
    page = Path("runs/probe/report.html").read_text()
    assert "Classes of a linear probe" in page and page.count('"title":') == 2 and "probability" in page


def test_json_and_zero_shot_beside_it(run: Any, folder: Path) -> None:
    Path("data/zeppelin").rename("data/balloon")
    document = json.loads(run("probe", "folder:data", "--json", "-o", "out", "--held", 0.5).stdout)
    assert set(document["accuracy"]) == {"linear probe", "zero-shot"}
    assert document["accuracy"]["zero-shot"]["count"] == document["fitted"] == 15
    assert sorted(path.name for path in Path("out").iterdir()) == ["probe.json", "probe.safetensors", "report.html"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "there is no nowhere"),
        (["data", "--method", "grad_eclp"], "did you mean 'grad_eclip'"),
        (["data", "-n", 3], "none can be held out"),
        (["data", "--device", "gpu"], "there is no device"),
    ],
)
def test_bad_input(run: Any, folder: Path, words: list[object], said: str) -> None:
    result = run("probe", *words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not Path("runs").exists()
