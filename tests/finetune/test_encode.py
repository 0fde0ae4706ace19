from __future__ import annotations

from collections.abc import Callable

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.errors import ModelError
from clipfast.finetune.encode import pixel_encoder
from clipfast.finetune.parallel import recompute

MEAN, STD = torch.full((3, 1, 1), 0.45, dtype=torch.float64), torch.full((3, 1, 1), 0.27, dtype=torch.float64)


def small(kind: str) -> nn.Module:
    """An image side with random weights in float64."""
    torch.manual_seed(0)
    vision = {"image_size": 64, "width": 64, "layers": 3, "head_width": 32, "patch_size": 16}
    if kind == "resnet":
        vision = {"image_size": 64, "width": 16, "layers": [1, 1, 1, 1]}
    if kind == "attention pool":
        vision |= {"attentional_pool": True, "attn_pooler_heads": 2}
    if kind == "mean":
        vision |= {"pool_type": "avg"}
    model = open_clip.CLIP(32, vision, {"layers": 1, "width": 32, "heads": 2, "vocab_size": 64}, quick_gelu=True)
    visual: nn.Module = model.visual
    for module in visual.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return visual.double().eval()


def gradient(encode: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad((encode(x) - target).square().sum(), x)[0]


@pytest.mark.parametrize("kind", ["class token", "mean", "resnet"])
@pytest.mark.parametrize("normalize", [True, False])
def test_embeddings_and_gradients_are_the_modules(kind: str, normalize: bool) -> None:
    visual, x = small(kind), torch.rand(2, 3, 64, 64, dtype=torch.float64)
    encode = pixel_encoder(visual, MEAN, STD, normalize=normalize)

    def itself(pixels: Tensor) -> Tensor:
        found = visual((pixels - MEAN) / STD)
        return F.normalize(found, dim=-1) if normalize else found

    with torch.no_grad():
        torch.testing.assert_close(encode(x), itself(x), rtol=1e-9, atol=1e-11)
    target = torch.randn(2, 32, dtype=torch.float64)
    torch.testing.assert_close(gradient(encode, x, target), gradient(itself, x, target), rtol=1e-7, atol=1e-11)
    assert all(p.requires_grad and p.grad is None for p in visual.parameters())


def test_no_weight_is_in_the_graph_and_none_is_copied() -> None:
    visual = small("class token")
    encode = pixel_encoder(visual, MEAN, STD, normalize=False)
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    assert not encode(x).requires_grad
    before = encode(x)
    with torch.no_grad():
        for p in visual.parameters():
            p.mul_(1.1)
        assert not torch.equal(encode(x), before)
        torch.testing.assert_close(encode(x), visual((x - MEAN) / STD), rtol=1e-9, atol=1e-11)


def test_under_autocast_it_is_as_close_to_float64_as_the_module_is() -> None:
    visual, x = small("class token"), torch.rand(4, 3, 64, 64)
    target = torch.randn(4, 32)
    wide = pixel_encoder(visual, MEAN, STD, normalize=True)
    exact = gradient(wide, x.double(), target.double())
    visual, mean, std = visual.float(), MEAN.float(), STD.float()
    with torch.autocast("cpu", torch.bfloat16):
        encode = pixel_encoder(visual, mean, std, normalize=True)
        found = gradient(encode, x, target)
        module = gradient(lambda p: F.normalize(visual((p - mean) / std).float(), dim=-1), x, target)
    assert found.dtype == torch.float32
    error, allowed = ((g.double() - exact).norm() / exact.norm() for g in (found, module))
    assert error < max(2e-2, 1.5 * float(allowed))


def test_what_is_no_tower_is_refused() -> None:
    with pytest.raises(ModelError, match="is no model that clipfast knows"):
        pixel_encoder(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), MEAN, STD, normalize=False)


def test_a_module_that_was_told_how_to_run_runs_as_itself() -> None:
    for told in (recompute, nn.Module.compile, lambda v: v.conv1.register_forward_hook(lambda *given: None)):
        visual = small("class token")
        told(visual)
        with pytest.raises(ModelError, match="compiled, sharded, hooked or recomputed in parts"):
            pixel_encoder(visual, MEAN, STD, normalize=False)
