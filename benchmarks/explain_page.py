"""docs/benchmarks.md out of results/explain.json.

python benchmarks/explain_page.py     writes the page again from the figures that are there
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peers

RESULTS = Path(__file__).parent / "results" / "explain.json"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"

HEAD = """# What explaining costs

`make bench` measures this page's figures and writes it (`benchmarks/bench_explain.py`; raw figures in
`benchmarks/results/explain.json`).

A figure is a ratio: a call's time over that of `model.encode_image` (no gradients, evaluation mode) of the same 4
images of 224 x 224 pixels, both in the same round of one interleaved run; the median over the rounds, lowest and
highest in brackets. open_clip models with random weights, text embeddings given, maps left on the patch grid, float32
unless said otherwise. The times of one's own machine will differ, the ratios much less.
"""

NOTES = """
- *clipfast* is the public call `Explainer(model)(images, embeddings)`. *Error*: relative L2 distance of its maps from
  the float64 ones; a case whose error is above 1e-5 reports no speed. *Features alone* is
  `Explainer(model).features(images)`: afterwards the maps of any text cost one small matrix product.
- *Autograd for each prompt* is the published way to the same maps: a forward pass that keeps its graph, then one
  gradient through the last block for each prompt. Its maps are checked against the same float64 ones.
- The libraries compute maps of their own definition, as released, each in the fastest way its interface offers, in a
  process and environment of its own (`python benchmarks/peers.py install`), beside the encode of the open_clip version
  it runs on. pytorch-grad-cam raises on a model frozen entirely; *trunk frozen by hand* leaves only the last block's
  parameters trainable. captum explains layers shaped as images, so the benchmark shows it the patch tokens as one.
  LeGrad 1.1 needs an open_clip before 2.24. torchcam 0.5's LeGrad is not in the table: it wants blocks with a child
  named `self_attention`, which open_clip's have not.
"""


def write(results: dict[str, Any]) -> None:
    """Writes the figures of the models that were measured over those that are there, and the page."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}}
    for model, parts in results["models"].items():
        if parts:
            before = known["models"].get(model, {})
            parts["peers"] = before.get("peers", {}) | parts.get("peers", {})
            known["models"][model] = before | parts
    known["machine"] = results["machine"]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(known, indent=2) + "\n")
    PAGE.write_text(page(known))


def page(results: dict[str, Any]) -> str:
    """The page in Markdown."""
    machine = results["machine"]
    lines = [
        HEAD,
        f"Measured on a machine with {machine['cores']} cores ({machine['cpu']}) and no GPU, on {machine['threads']} "
        f"thread{'s' if machine['threads'] > 1 else ''}, with Python {machine['python']}, torch {machine['torch']} and "
        f"clipfast at {machine['commit']} or little before. Other work shared it: see the brackets.\n",
    ]
    for model, parts in sorted(results["models"].items()):
        lines += [f"## {model}\n", *_speed(parts), *_bfloat16(parts), *_memory(parts)]
    return "\n".join([*lines, "## How to read the tables", NOTES])


def _speed(parts: dict[str, Any]) -> list[str]:
    rows = parts.get("clipfast", []) + parts.get("autograd", [])
    rows += [r for name in peers.PEERS for r in parts.get("peers", {}).get(name, [])]
    if not rows:
        return []
    lines = [] if "encode_seconds" not in parts else [f"One encode took {parts['encode_seconds'] * 1e3:.0f} ms.\n"]
    lines += ["| | prompts | time / encode | target | error |", "|---|--:|--:|--:|--:|"]
    lines += [f"| {_name(r)} | {_count(r['prompts'])} | {_ratio(r)} | {_limit(r)} | {_error(r)} |" for r in rows]
    missing = [peers.PEERS[name][2] for name in peers.PEERS if name not in parts.get("peers", {})]
    return [*lines, *([f"\nNot measured on this model: {'; '.join(missing)}."] if missing else []), ""]


def _bfloat16(parts: dict[str, Any]) -> list[str]:
    if "bfloat16" not in parts:
        return []
    half = parts["bfloat16"]
    native = (
        "This CPU multiplies bfloat16 natively."
        if half["native"]
        else "This CPU has no native bfloat16 products, they are emulated; precision='auto' stays in float32 here. "
        "The table shows whether the ratios hold, not that bfloat16 is fast."
    )
    lines = [
        f"Trunk in bfloat16, beside the encode of the model in bfloat16, itself {_ratio(half['encode'])} of float32's. "
        f"{native}\n",
        "| | prompts | time / bfloat16 encode | error |",
        "|---|--:|--:|--:|",
    ]
    lines += [f"| {r['method']} | {_count(r['prompts'])} | {_ratio(r)} | {_error(r)} |" for r in half["clipfast"]]
    return [*lines, ""]


def _memory(parts: dict[str, Any]) -> list[str]:
    if "memory" not in parts:
        return []
    memory = parts["memory"]
    lines = [
        "Peak memory: what one call adds to the resident pages of a fresh process, as the kernel counts them "
        f"(`benchmarks/peak_memory.py`). The encode adds {memory['encode'] / 1e6:.1f} MB.\n",
        "| prompts | clipfast adds | of which results | ratio to encode + results | target |",
        "|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {_count(r['prompts'])} | {r['bytes'] / 1e6:.1f} MB | {r['results'] / 1e6:.2f} MB | {r['ratio']:.2f} "
        f"| {r['limit']:.2f} |"
        for r in memory["clipfast"]
    ]
    return [*lines, ""]


def _name(row: dict[str, Any]) -> str:
    return f"{row['method']} {row['version']} (open_clip {row['open_clip']})" if "version" in row else row["method"]


def _count(prompts: int | None) -> str:
    return "any" if prompts is None else f"{prompts:,}"


def _ratio(row: dict[str, Any]) -> str:
    return f"**{row['ratio']:.2f}** ({row['lowest']:.2f}-{row['highest']:.2f})"


def _limit(row: dict[str, Any]) -> str:
    return f"{row['limit']:.2f}" if "limit" in row else ""


def _error(row: dict[str, Any]) -> str:
    return f"{row['error']:.0e}" if "error" in row else ""


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(RESULTS.read_text())))
