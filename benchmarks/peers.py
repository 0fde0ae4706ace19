"""Other libraries' maps of the same images, as released, timed beside the same model's `encode_image`.

python benchmarks/peers.py install             makes their environments under build/peers
python benchmarks/peers.py grad_cam ViT-B-16   prints what one of them costs, as JSON

Each runs in a process and an environment of its own: LeGrad needs an open_clip from before 2.24, and without raising an
error computes something else on later ones. The environments share this one's torch, so that every library is timed on
the same. CLIPFAST_PEERS names another folder for them.

Every library is used in the fastest way that its interface offers, weights frozen wherever it works with frozen
weights. None of them takes several prompts of one image at once but LeGrad, which encodes the image again for each.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import site
import subprocess
import venv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOLDER = Path(os.environ.get("CLIPFAST_PEERS", Path(__file__).parent.parent / "build" / "peers"))

# Without their own dependencies where those would bring another torch or hold back numpy.
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "current": ("captum==0.9.0", "grad-cam==1.5.7", "ttach", "opencv-python-headless"),
    "legrad": ("legrad_torch==1.1", "open_clip_torch==2.23.0", "einops", "opencv-python-headless"),
}
PEERS = {
    "grad_cam": ("current", "grad-cam", "pytorch-grad-cam GradCAM"),
    "grad_cam_frozen": ("current", "grad-cam", "pytorch-grad-cam GradCAM, trunk frozen by hand"),
    "layer_grad_cam": ("current", "captum", "captum LayerGradCam"),
    "legrad": ("legrad", "legrad_torch", "LeGrad"),
}
PROMPTS = (1, 10)
BATCH, PIXELS = 4, 224

Maps = Callable[[Tensor], Tensor]


class Similarity(nn.Module):
    """Images -> cosines (B, P) with unit text embeddings (P, E); what the two general libraries explain."""

    def __init__(self, model: Any, texts: Tensor):
        super().__init__()
        self.model = model
        self.texts = texts

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.model.encode_image(x), dim=-1) @ self.texts.T


class Spatial(nn.Module):
    """Shows a layer's patch tokens as an image (B, D, h, w) in passing: captum explains layers of that shape alone."""

    def __init__(self, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.image = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        image = self.image(x[:, 1:].transpose(1, 2).unflatten(2, self.grid))
        return torch.cat((x[:, :1], image.flatten(2).transpose(1, 2)), dim=1)


def grad_cam(model: Any, x: Tensor, texts: Tensor) -> Maps:
    """As its documentation does for vision transformers: one call a prompt, at the last block's first norm."""
    from pytorch_grad_cam import GradCAM

    grid = model.visual.grid_size
    cam = GradCAM(
        Similarity(model, texts),
        [model.visual.transformer.resblocks[-1].ln_1],
        reshape_transform=lambda t: t[:, 1:].transpose(1, 2).unflatten(2, grid),
    )

    def maps(chosen: Tensor) -> Tensor:
        found = [cam(x, [lambda similarities, p=p: similarities[p] for _ in range(len(x))]) for p in range(len(chosen))]
        return torch.stack([torch.from_numpy(f) for f in found], dim=1)

    return maps


def grad_cam_frozen(model: Any, x: Tensor, texts: Tensor) -> Maps:
    """The same without gradients below the last block; frozen entirely, it raises."""
    model.requires_grad_(False)
    model.visual.transformer.resblocks[-1].requires_grad_(True)
    return grad_cam(model, x, texts)


def layer_grad_cam(model: Any, x: Tensor, texts: Tensor) -> Maps:
    """One call a prompt, all weights frozen."""
    from captum.attr import LayerGradCam

    model.requires_grad_(False)
    block = model.visual.transformer.resblocks[-1]
    spatial = Spatial(model.visual.grid_size)
    block.ln_1 = nn.Sequential(block.ln_1, spatial)
    cam = LayerGradCam(Similarity(model, texts), spatial.image)
    return lambda chosen: torch.cat(
        [cam.attribute(x, target=p, relu_attributions=True).detach() for p in range(len(chosen))], dim=1
    )


def legrad(model: Any, x: Tensor, texts: Tensor) -> Maps:
    """One call an image with all prompts, which its interface takes."""
    from legrad import LeWrapper  # type: ignore[import-not-found]

    wrapped = LeWrapper(model)
    return lambda chosen: torch.cat([wrapped.compute_legrad(chosen, image[None]).detach() for image in x])


def measure(name: str, architecture: str, rounds: int) -> dict[str, Any]:
    """Times `encode_image` and the peer's maps for each of PROMPTS in turn."""
    import open_clip

    from clipfast.bench.timer import paired

    torch.manual_seed(0)
    x = torch.randn(BATCH, 3, PIXELS, PIXELS)
    models = [open_clip.create_model(architecture).eval() for _ in range(2)]
    # The peer changes its model; the reference stays untouched.
    models[1].load_state_dict(models[0].state_dict())
    with torch.no_grad():
        texts = F.normalize(torch.randn(max(PROMPTS), models[0].encode_image(x[:1]).shape[1]), dim=-1)
        embeddings = models[0].encode_image(x)
    maps = globals()[name](models[1], x, texts)
    for prompts in PROMPTS:
        _check(maps(texts[:prompts]), prompts)
    with torch.no_grad():
        difference = (models[1].encode_image(x) - embeddings).abs().max() / embeddings.abs().max()
    if difference > 1e-4:
        raise RuntimeError(f"{name} explains another model: its embeddings differ by {difference:.1e}.")

    def encode() -> Tensor:
        with torch.no_grad():
            return models[0].encode_image(x)

    functions: dict[str, Callable[[], object]] = {"encode": encode}
    for prompts in PROMPTS:
        functions[str(prompts)] = partial(maps, texts[:prompts])
    timings = paired(functions, rounds, warmup=1)
    package = PEERS[name][1]
    return {
        "method": PEERS[name][2],
        "version": importlib.metadata.version(package),
        "open_clip": importlib.metadata.version("open_clip_torch"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": {key: timing.seconds for key, timing in timings.items()},
    }


def _check(maps: Tensor, prompts: int) -> None:
    if tuple(maps.shape[:2]) != (BATCH, prompts) or not maps.isfinite().all():
        raise RuntimeError(f"maps of shape {tuple(maps.shape)}, perhaps not finite, are nothing to time.")
    if (maps.flatten(2).amax(-1) == maps.flatten(2).amin(-1)).any():
        raise RuntimeError("a map is constant: nothing was explained.")


def run(name: str, architecture: str, rounds: int) -> dict[str, Any]:
    """`measure` in the peer's own environment. Raises FileNotFoundError where it has not been installed."""
    interpreter = _interpreter(PEERS[name][0])
    if not interpreter.exists():
        raise FileNotFoundError(f"{PEERS[name][2]} is not installed: python benchmarks/peers.py install")
    command = [str(interpreter), __file__, name, architecture, "--rounds", str(rounds)]
    # The timer is in a package that is not installed there.
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{PEERS[name][2]} failed:\n{done.stderr[-2000:]}")
    # LeGrad prints on its way.
    return json.loads(done.stdout.splitlines()[-1])


def install() -> None:
    """Makes the environments, each with this one's packages behind its own."""
    for name, requirements in ENVIRONMENTS.items():
        venv.create(FOLDER / name, with_pip=True)
        interpreter = _interpreter(name)
        command = [str(interpreter), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        own = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        Path(own, "shared.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        subprocess.run([str(interpreter), "-m", "pip", "install", "--no-deps", *requirements], check=True)


def _interpreter(environment: str) -> Path:
    return FOLDER / environment / "bin" / "python"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["install", *PEERS])
    parser.add_argument("architecture", nargs="?", default="ViT-B-16")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.what == "install":
        install()
    else:
        print(json.dumps(measure(arguments.what, arguments.architecture, arguments.rounds)))
