"""What people use for a method today, by each library's public interface, as far as it is installed here.

None takes several prompts at once. Each works on a copy of the model, whose weights are frozen as far as it works with
frozen weights, and says which maps of ours its own must equal.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.compat.score import Score
from clipfast.metrics.registry import parse, spelled
from clipfast.models.families import AnyImageTower
from clipfast.models.image import PatchTower

Maps = Callable[[], Tensor]


@dataclass(frozen=True)
class Peer:
    """A library's form of a method.

    distribution: what is installed, None for plain PyTorch. method: ours. same: the parameters with which ours gives
    the same maps. build: (score of a copy of the model, images (B, 3, H, W), our parameters) -> the call to time.
    class_token: whether it needs a VisionTransformer with a class token.
    shown: what it makes of our maps (B, P, h, w), for inputs of so many pixels.
    """

    name: str
    distribution: str | None
    method: str
    build: Callable[[Any, Tensor, dict[str, Any]], Maps]
    same: dict[str, Any] = field(default_factory=dict)
    class_token: bool = True
    shown: Callable[[Tensor, tuple[int, int]], Tensor] = lambda maps, size: maps

    @property
    def version(self) -> str | None:
        """The installed version, "" for plain PyTorch, None where it is not installed."""
        if self.distribution is None:
            return ""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None

    @property
    def label(self) -> str:
        library, _, rest = self.name.partition(" ")
        return self.name if self.distribution is None else f"{library} {self.version} {rest}"

    def ours(self, method: str) -> str:
        """Our method, as `parse` reads it, whose maps the peer's must equal."""
        name, parameters = parse(method)
        return name + spelled(parameters | self.same)

    def call(self, module: nn.Module, x: Tensor, texts: Tensor, method: str) -> Maps:
        """The call to time: maps of images (B, 3, H, W) for unit text embeddings (P, E)."""
        score = Score(copy.deepcopy(module).requires_grad_(self.distribution is None), texts)
        return self.build(score, x, parse(self.ours(method))[1])


def peers_of(method: str, tower: AnyImageTower) -> list[Peer]:
    """Those installed that do what the method does, where its parameters are theirs, too."""
    name, parameters = parse(method)
    return [
        peer
        for peer in PEERS
        if peer.method == name
        and peer.version is not None
        and (not peer.class_token or (isinstance(tower, PatchTower) and tower.has_class_token))
        and set(parameters) <= ({"steps"} if name == "integrated_gradients" else set())
    ]


class Spatial(nn.Module):
    """Shows patch tokens as an image (B, D, h, w) in passing: captum and torchcam explain such layers alone."""

    def __init__(self, grid: tuple[int, int], prefix: int):
        super().__init__()
        self.grid, self.prefix = grid, prefix
        self.image = nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        image = self.image(self.shown(h))
        return torch.cat((h[:, : self.prefix], image.flatten(2).mT), dim=1)

    def shown(self, h: Tensor) -> Tensor:
        return h[:, self.prefix :].mT.unflatten(2, self.grid)


def _last_input(score: Any) -> tuple[Any, Spatial]:
    """The block whose output is the last one's input, and that output as an image."""
    tower, _ = score.model.towers()
    spatial = Spatial(tower.grid, tower.prefix)
    return score.module.visual.transformer.resblocks[-2], spatial


def _shown(score: Any) -> Spatial:
    block, score.spatial = _last_input(score)
    block.register_forward_hook(lambda module, given, out: score.spatial(out))
    return score.spatial


def _graph_from(block: nn.Module) -> None:
    """Frozen entirely, the activations have no gradient; one vector of the block that makes them is enough."""
    list(block.parameters())[-1].requires_grad_(True)


def captum_saliency(score: Any, x: Tensor, parameters: dict[str, Any]) -> Maps:
    from captum.attr import Saliency

    method, prompts = Saliency(score), range(len(score.texts))
    # captum warns where it has to switch gradients on itself.
    x = x.clone().requires_grad_()
    return lambda: torch.stack([method.attribute(x, target=p).sum(1) for p in prompts], dim=1)


def captum_integrated_gradients(score: Any, x: Tensor, parameters: dict[str, Any]) -> Maps:
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(score)
    # On a CPU one point of the path at a time is the fastest.
    at_once = len(x) if x.device.type == "cpu" else None

    def call() -> Tensor:
        found = [
            method.attribute(x, target=p, n_steps=parameters.get("steps", 32), internal_batch_size=at_once)
            for p in range(len(score.texts))
        ]
        return torch.stack([maps.sum(1) for maps in found], dim=1).detach()

    return call


def captum_layer_grad_cam(score: Any, x: Tensor, parameters: dict[str, Any]) -> Maps:
    from captum.attr import LayerGradCam

    method = LayerGradCam(score, _shown(score).image)
    return lambda: torch.cat(
        [method.attribute(x, target=p, relu_attributions=True).detach() for p in range(len(score.texts))], dim=1
    )


def torchcam_grad_cam(score: Any, x: Tensor, parameters: dict[str, Any]) -> Maps:
    from torchcam.methods import GradCAM

    block, _ = _last_input(score)
    _graph_from(block)
    method = GradCAM(score, _shown(score).image)

    def call() -> Tensor:
        # Its one forward serves all prompts.
        scores, prompts = score(x), range(len(score.texts))
        return torch.stack([method(p, scores, normalized=False, retain_graph=True)[0] for p in prompts], dim=1)

    return call


def library_grad_cam(score: Any, x: Tensor, parameters: dict[str, Any]) -> Maps:
    from pytorch_grad_cam import GradCAM

    block, spatial = _last_input(score)
    _graph_from(block)
    method = GradCAM(score, [block], reshape_transform=spatial.shown)

    def call() -> Tensor:
        found = [method(x, [lambda row, p=p: row[p] for _ in range(len(x))]) for p in range(len(score.texts))]
        return torch.stack([torch.from_numpy(maps) for maps in found], dim=1)

    return call


def library_scaled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """As pytorch-grad-cam returns them: from 0 to 1 on the grid, enlarged, and from 0 to 1 once more."""

    def unit(t: Tensor) -> Tensor:
        t = t - t.amin((-2, -1), keepdim=True)
        return t / (t.amax((-2, -1), keepdim=True) + 1e-7)

    return unit(F.interpolate(unit(maps), size=size, mode="bilinear", align_corners=False))


def autograd_for_each_prompt(score: Any, x: Tensor, parameters: dict[str, Any]) -> Maps:
    return lambda: autograd_maps(score.module, x, score.texts).unflatten(-1, score.model.towers()[0].grid)


def autograd_maps(model: Any, x: Tensor, texts: Tensor) -> Tensor:
    """Grad-ECLIP as published: a forward pass that keeps its graph, the last block taken apart, and for each prompt one
    gradient towards that block's attention output. Same maps as clipfast's: (B, P, n)."""
    visual = model.visual
    *below, block = visual.transformer.resblocks
    h = visual._embeds(x)
    for layer in below:
        h = layer(h)
    heads = block.attn.num_heads
    q, k, v = F.linear(block.ln_1(h), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
    split = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
    o = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    y = h + block.attn.out_proj(o)
    y = y + block.mlp(block.ln_2(y))
    z = F.normalize(visual.ln_post(y[:, 0]) @ visual.proj, dim=-1)
    cosine = F.cosine_similarity(q[:, :1], k[:, 1:], dim=-1).detach()
    low, high = cosine.amin(-1, keepdim=True), cosine.amax(-1, keepdim=True)
    weighted = (v[:, 1:] * ((cosine - low) / (high - low))[..., None]).detach()
    maps = []
    for t in texts:
        g = torch.autograd.grad((z @ t).sum(), o, retain_graph=True)[0][:, :1]
        maps.append((weighted * g).sum(-1).relu())
    return torch.stack(maps, dim=1)


_PATCHES = {"mean_over": "patches"}

PEERS = (
    Peer("autograd for each prompt", None, "grad_eclip", autograd_for_each_prompt),
    Peer("captum LayerGradCam", "captum", "grad_cam", captum_layer_grad_cam, _PATCHES),
    Peer("pytorch-grad-cam GradCAM", "grad-cam", "grad_cam", library_grad_cam, _PATCHES, shown=library_scaled),
    Peer("torchcam GradCAM", "torchcam", "grad_cam", torchcam_grad_cam, _PATCHES),
    Peer("captum Saliency", "captum", "saliency", captum_saliency, class_token=False),
    Peer(
        "captum IntegratedGradients",
        *("captum", "integrated_gradients", captum_integrated_gradients, {"baseline": "mean"}, False),
    ),
)
