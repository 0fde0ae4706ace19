"""The README's two tables of costs, out of the committed figures in benchmarks/results/.

python benchmarks/readme_figures.py           writes them between their marks
python benchmarks/readme_figures.py --check   fails where the README says something else
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from claims import RESULTS as METHODS
from explain_page import RESULTS as EXPLAIN

README = Path(__file__).parent.parent / "README.md"

PROMPTS = (1, 10, 100, 1000, 10_000)
# What the first table says of each model: the part of explain.json, its method or peer, what a reader is told.
EXPLAINED = (
    ("ViT-B-16", "clipfast", "clipfast", "**clipfast**, ViT-B/16"),
    ("ViT-B-32", "clipfast", "clipfast", "**clipfast**, ViT-B/32"),
    (
        *("ViT-B-16", "autograd", "autograd for each prompt, image by image (as published)"),
        "autograd for each prompt, as published, ViT-B/16",
    ),
    ("ViT-B-16", "peers", "layer_grad_cam", "captum LayerGradCam, ViT-B/16"),
    ("ViT-B-16", "peers", "grad_cam_frozen", "pytorch-grad-cam {version} GradCAM, ViT-B/16, trunk frozen by hand"),
    ("ViT-B-16", "peers", "legrad", "LeGrad {version}, ViT-B/16"),
)


def tables() -> dict[str, str]:
    """What belongs between the marks, by their names."""
    claims = {path.stem: json.loads(path.read_text()) for path in METHODS.glob("*.json")}
    return {"explaining": explaining(json.loads(EXPLAIN.read_text())["models"]), "methods": methods(claims)}


def explaining(models: dict[str, Any]) -> str:
    """Grad-ECLIP in encodes, by the number of prompts, beside its peers."""
    lines = [f"| prompts | {' | '.join(f'{p:,}' for p in PROMPTS)} |", f"|---|{'--:|' * len(PROMPTS)}"]
    for model, part, name, words in EXPLAINED:
        rows = models[model][part]
        rows = rows[name] if part == "peers" else [row for row in rows if row["method"] == name]
        found = {row["prompts"]: number(row["ratio"]) for row in rows}
        cells = [found.get(p, "") for p in PROMPTS]
        bold = "**" if part == "clipfast" else ""
        told = words.format(version=rows[0].get("version"))
        lines.append(f"| {told} |" + "|".join(f" {bold}{cell}{bold} " if cell else " " for cell in cells) + "|")
    return "\n".join(lines)


def methods(claims: dict[str, Any]) -> str:
    """The other methods, each beside what people use for it."""

    def of(claim: str, subject: str, unit: str | None = None) -> float:
        """A subject's ratio, in units of another subject of the same claim where one is named."""
        ratios = {row["subject"]: row["ratio"] for row in claims[claim]["rows"]}
        return ratios[subject] / (1 if unit is None else ratios[unit])

    captum = [of("integrated_gradients_pixels", f"captum, {how}") for how in ("internal_batch_size=1", "its default")]
    step, recipe = "the authors' recipe, one of its ten steps", "the authors' recipe, its masks made beforehand"
    rows = [
        (
            *("LeGrad, 8 prompts, in encodes", of("legrad", "clipfast, 8 prompts")),
            f"{number(of('legrad', 'LeGrad package, 8 prompts'))}, the LeGrad package",
        ),
        (
            *("GAME (Chefer), 8 prompts, in encodes", of("attention", "GAME, last block")),
            f"{number(of('attention', 'GAME, last block, as the authors do it'))}, the authors' recipe",
        ),
        (
            *("Grad-CAM, 8 prompts, in encodes", of("attention", "Grad-CAM")),
            f"{number(of('attention', 'pytorch-grad-cam, trunk frozen by hand'))}, pytorch-grad-cam",
        ),
        (
            "LayerIntegratedGradients' numbers, 10 steps, in encodes",
            of("integrated_gradients_last_block", "clipfast, with delta"),
            f"{number(of('integrated_gradients_last_block', 'captum LayerIntegratedGradients'))}, captum",
        ),
        (
            "integrated gradients in pixels, 16 steps, in encodes",
            of("integrated_gradients_pixels", "clipfast, with delta"),
            f"{number(min(captum))} to {number(max(captum))}, captum",
        ),
        # A unit of that claim is one of the recipe's ten equal steps.
        (
            "M2IB, 10 steps of 10 copies, of the authors' recipe",
            of("m2ib", "clipfast, all ten steps", step) / 10,
            "1",
        ),
        (
            *("MMEL, 100 prompts, in Grad-ECLIPs", of("mmel_100", "MMEL, pooled")),
            "1.15, as its paper claims; no code is public",
        ),
        (
            "TCLIP, image and 10 sentences, in encodes of both with trimmed padding",
            of("tclip", "tclip", "encode, the texts' padding trimmed"),
            "no code is public",
        ),
        (
            *("RISE, 100 masks, in bare forwards", of("rise_vit-b-16", "RISE, 100 masks")),
            f"{number(of('rise_vit-b-16', recipe))}, the authors' recipe",
        ),
    ]
    return "\n".join(
        ["| | clipfast | the peer |", "|---|--:|--:|", *(f"| {a} | **{number(b)}** | {c} |" for a, b, c in rows)]
    )


def number(ratio: float) -> str:
    """Two decimals, one from ten on."""
    return f"{ratio:.1f}" if ratio >= 9.995 else f"{ratio:.2f}"


def filled(text: str, found: dict[str, str]) -> str:
    """The README's text with its tables replaced. Raises ValueError where a pair of marks is not there once."""
    for name, table in found.items():
        start, end = f"<!-- figures: {name} -->", f"<!-- /figures: {name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"{README.name} must have {start} and {end} once each.")
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{table}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail where something would change")
    check = parser.parse_args().check
    text = README.read_text()
    after = filled(text, tables())
    if check and after != text:
        raise SystemExit("README.md does not say what was measured: python benchmarks/readme_figures.py")
    if not check:
        README.write_text(after)


if __name__ == "__main__":
    main()
