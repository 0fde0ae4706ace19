"""Small CLIP models with random weights: real structure and numerics, built in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.timm_model import TimmModel
from safetensors.torch import load_file
from torch import Tensor, nn

BuildClip = Callable[..., CLIP]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny products gain nothing from threads, and runs side by side lose by them."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def goldens() -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "goldens" / "grad_eclip_official.safetensors")


@pytest.fixture(scope="session")
def official(goldens: dict[str, Tensor]) -> CLIP:
    """The model that the Grad-ECLIP authors' code was run on."""
    model = CLIP(
        embed_dim=48,
        vision_cfg=CLIPVisionCfg(image_size=64, layers=4, width=64, head_width=16, patch_size=16),
        text_cfg=CLIPTextCfg(context_length=20, vocab_size=300, width=64, heads=4, layers=4),
    ).double()
    model.load_state_dict({k.removeprefix("model."): v for k, v in goldens.items() if k.startswith("model.")})
    return model.eval()


@pytest.fixture
def build_clip() -> BuildClip:
    """A factory of small CLIPs: image_size, patch_size, layers, ls_init_value, quick_gelu, seed ..."""

    def build(
        *,
        image_size: Any = 64,
        patch_size: int = 16,
        layers: int = 3,
        quick_gelu: bool = False,
        seed: int = 0,
        vocab_size: int = 300,
        embed_dim: int = 24,
        context_length: int = 20,
        text: dict[str, Any] | None = None,
        **vision: Any,
    ) -> CLIP:
        torch.manual_seed(seed)
        model = CLIP(
            embed_dim=embed_dim,
            vision_cfg=CLIPVisionCfg(
                image_size=image_size, patch_size=patch_size, layers=layers, width=32, head_width=8, **vision
            ),
            text_cfg=CLIPTextCfg(
                context_length=context_length, vocab_size=vocab_size, width=32, heads=4, layers=layers, **(text or {})
            ),
            quick_gelu=quick_gelu,
        )
        # Biases and norms start at zero and one, where mistakes about them cannot show.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.2)
        return model.eval()

    return build


@pytest.fixture
def build_resnet() -> BuildClip:
    """A factory of small ResNet CLIPs: image_size, layers, width, seed ..."""

    def build(*, seed: int = 0, embed_dim: int = 24, **vision: Any) -> CLIP:
        torch.manual_seed(seed)
        model = CLIP(
            embed_dim=embed_dim,
            vision_cfg=CLIPVisionCfg(**{"image_size": 96, "layers": (1, 2, 1, 2), "width": 16, **vision}),
            text_cfg=CLIPTextCfg(context_length=20, vocab_size=300, width=32, heads=4, layers=2),
        )
        # As for transformers; open_clip also starts the last norm of each block at zero, which is no block at all.
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
        return settle(model)

    return build


NARROW: dict[str, tuple[str, dict[str, Any]]] = {
    "convnext": ("test_convnext", {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 64)}),
    "fastvit": ("fastvit_mci0", {"layers": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 32)}),
    "fastvit5": ("fastvit_mci3", {"layers": (1, 1, 1, 1, 1), "embed_dims": (8, 8, 16, 32, 32)}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 2, "depths": (1, 2, 1, 1), "embed_dim": 8, "num_heads": (1, 2, 2, 2)},
    ),
}
"""Trunks of timm's, flat and narrow, for 64 x 64 pixels."""


@pytest.fixture
def build_stages() -> BuildClip:
    """A factory of small CLIPs whose image side is open_clip's around a trunk of timm: one of NARROW, or a module.

    proj: "linear" or "mlp" above a ConvNeXt; other trunks end in a classifier that is the projection.
    """

    def build(trunk: str | nn.Module = "convnext", *, seed: int = 0, embed_dim: int = 24, proj: str = "linear") -> CLIP:
        torch.manual_seed(seed)
        model = CLIP(
            embed_dim=embed_dim,
            vision_cfg=CLIPVisionCfg(image_size=32, patch_size=32, layers=1, width=32, head_width=8),
            text_cfg=CLIPTextCfg(context_length=20, vocab_size=300, width=32, heads=4, layers=2),
        )
        model.visual = TimmModel("test_convnext", embed_dim, image_size=64, pool="", proj=proj)
        if trunk != "convnext":
            model.visual.head = nn.Sequential()
        if isinstance(trunk, str):
            name, narrow = NARROW[trunk]
            trunk = timm.create_model(name, num_classes=0 if trunk == "convnext" else embed_dim, **narrow)
        model.visual.trunk = trunk
        for name, parameter in model.visual.named_parameters():
            if parameter.ndim == 1 or name.endswith("gamma"):
                nn.init.normal_(parameter, mean=float(not name.endswith("bias")), std=0.2)
            elif "bias" not in name:
                nn.init.kaiming_normal_(parameter, nonlinearity="linear")
        return settle(model)

    return build


@torch.no_grad()
def settle(model: CLIP) -> CLIP:
    """Statistics of blotches, as a training would leave them: at their start an image fades from block to block."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    blotches = nn.functional.interpolate(torch.randn(8, 3, 5, 5), size=model.visual.image_size, mode="bilinear")
    model.train().visual(blotches)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


class WordTokenizer:
    """One token a word, for models with a vocabulary of a few hundred ids; the end of text is the largest id."""

    def __init__(self, vocab_size: int = 300, context_length: int = 20):
        self.context_length = context_length
        self.sot_token_id, self.eot_token_id = vocab_size - 2, vocab_size - 1
        self.decoder: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in text.lower().split():
            number = 1 + sum(ord(c) * (i + 7) for i, c in enumerate(word)) % (self.sot_token_id - 1)
            self.decoder[number] = word + "</w>"
            ids.append(number)
        return ids

    def __call__(self, texts: str | list[str]) -> torch.Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            tokens = [self.sot_token_id, *self.encode(text)[: self.context_length - 2], self.eot_token_id]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer()
