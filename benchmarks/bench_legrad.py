"""LeGrad beside one encode of the image and beside the LeGrad package as released, all in turn.

    pytest benchmarks/bench_legrad.py -o python_files='bench_*.py' -s

open_clip's ViT-B/16 with random weights, one image: the package takes one at a time. It needs an open_clip from before
2.24 and so its own environment (`python benchmarks/peers.py install`): this file, run there as a script, loads the same
weights and explains the same inputs each time it is told to.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import open_clip
import peers
import torch
import torch.nn.functional as F
from torch import Tensor

ARCHITECTURE, PROMPTS = "ViT-B-16", 8
LIMIT = 2.5


def test_legrad(tmp_path: Path) -> None:
    from claims import claim

    import clipfast

    torch.manual_seed(0)
    model = open_clip.create_model(ARCHITECTURE).eval()
    x = torch.randn(1, 3, 224, 224)
    texts = F.normalize(torch.randn(PROMPTS, model.text_projection.shape[1]), dim=-1)
    explainer = clipfast.Explainer(model, "legrad")
    exact = torch.as_tensor(
        clipfast.Explainer(copy.deepcopy(model).double(), "legrad")(x.double(), texts.double()).maps
    )
    ours = f"clipfast, {PROMPTS} prompts"
    functions: dict[str, Callable[[], object]] = {
        "encode_image": torch.no_grad()(partial(model.encode_image, x)),
        ours: partial(explainer, x, texts),
        "clipfast, 1 prompt": partial(explainer, x, texts[:1]),
    }
    errors = {ours: relative(torch.as_tensor(explainer(x, texts).maps), exact)}
    assert errors[ours] < 1e-5
    torch.save({"model": model.state_dict(), "x": x, "texts": texts}, tmp_path / "inputs.pt")
    with package(tmp_path) as explain:
        theirs = f"LeGrad package, {PROMPTS} prompts"
        functions[theirs] = explain
        explain()
        found = torch.load(tmp_path / "maps.pt")[0]
        # As they come: at the image's size, each from 0 to 1.
        maps = F.interpolate(exact, scale_factor=16, mode="bilinear")[0].flatten(1)
        maps = (maps - maps.amin(1, keepdim=True)) / (maps.amax(1, keepdim=True) - maps.amin(1, keepdim=True))
        errors[theirs] = relative(found.flatten(1), maps)
        assert errors[theirs] < 1e-4
        rows = claim(
            "legrad",
            f"LeGrad, last two blocks, ViT-B/16, 1 image, {PROMPTS} prompts",
            "encode_image of the image",
            functions,
            at_most={ours: LIMIT},
            errors=errors,
            notes="The package (legrad_torch 1.1) in a process of its own, taken in turn. Errors are relative L2 to "
            "float64, the package's of maps at the image's size from 0 to 1, as it returns them.",
        )["rows"]
    ratios = {row["subject"]: row["ratio"] for row in rows}
    assert ratios[ours] <= LIMIT < ratios[theirs]


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@contextmanager
def package(folder: Path) -> Iterator[Callable[[], None]]:
    """A function that has the package explain what is in `folder`, in its environment, and waits until it has."""
    interpreter = peers.FOLDER / peers.PEERS["legrad"][0] / "bin" / "python"
    if not interpreter.exists():
        raise FileNotFoundError("the LeGrad package is not installed: python benchmarks/peers.py install")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        [str(interpreter), __file__, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        bufsize=1,
    ) as process:
        asked, told = process.stdin, process.stdout
        assert asked is not None and told is not None

        def explain() -> None:
            print("explain", file=asked)
            # What the package itself prints comes before.
            if not any(line == "explained\n" for line in told):
                raise RuntimeError("the LeGrad package has failed; its error is above.")

        yield explain
        asked.close()


def serve(folder: Path) -> None:
    """In the package's environment: explain once for each line that comes in."""
    inputs = torch.load(folder / "inputs.pt")
    model = open_clip.create_model(ARCHITECTURE).eval()
    model.load_state_dict(inputs["model"])
    maps = peers.legrad(model, inputs["x"], inputs["texts"])
    for count, _ in enumerate(sys.stdin):
        found = maps(inputs["texts"])
        if count == 0:
            torch.save(found, folder / "maps.pt")
        print("explained", flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
