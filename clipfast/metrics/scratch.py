"""A ResNet-18 trained from nothing on pictures in memory: ROAR's other classifier.

He et al., Deep Residual Learning for Image Recognition, CVPR 2016, as torchvision builds it. Training follows its
section 3.4 in small: SGD with momentum, weight decay, mirrored pictures; the rate falls along a cosine to zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Training:
    """How a network is trained: passes over the pictures, pictures a step, highest learning rate, momentum, decay."""

    epochs: int = 30
    batch: int = 64
    rate: float = 0.05
    momentum: float = 0.9
    decay: float = 5e-4


@torch.inference_mode(False)
@torch.enable_grad()
def train_resnet18(
    pixels: Tensor, labels: Tensor, classes: int, training: Training, *, seed: int, device: torch.device | str = "cpu"
) -> nn.Module:
    """A ResNet-18 of `classes` outputs, in evaluation mode, for pixels (N, 3, H, W) uint8 and labels (N,).

    Each channel is centred and scaled by its mean and deviation over all pictures, which the network keeps. The seed
    decides weights, order and mirroring; the generators of the caller stay as they are.
    """
    from torchvision.models import resnet18

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(_Scaled(pixels), resnet18(weights=None, num_classes=classes)).to(device).train()
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=training.rate,
        momentum=training.momentum,
        weight_decay=training.decay,
        nesterov=training.momentum > 0,
    )
    # A batch of one picture has no statistics, so a lone last one is left out.
    steps = training.epochs * max(1, (len(pixels) + training.batch - 2) // training.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(training.epochs):
        for rows in torch.randperm(len(pixels), generator=generator).split(training.batch):
            if len(rows) == 1:
                continue
            mirrored = torch.rand(len(rows), generator=generator) < 0.5
            x = torch.where(mirrored[:, None, None, None], pixels[rows].flip(-1), pixels[rows]).to(device)
            loss = F.cross_entropy(network(x), labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.no_grad()
def predictions(network: nn.Module, pixels: Tensor, *, device: torch.device | str = "cpu", batch: int = 64) -> Tensor:
    """The class of each picture (N, 3, H, W) uint8: (N,), on the CPU."""
    return torch.cat([network(part.to(device)).argmax(-1).cpu() for part in pixels.split(batch)])


class _Scaled(nn.Module):
    """uint8 pixels -> floats of zero mean and unit deviation in each channel of the training pictures."""

    mean: Tensor
    std: Tensor

    def __init__(self, pixels: Tensor):
        super().__init__()
        count = pixels.numel() / 3
        # Sums of part after part: all pictures as floats would take four times their room.
        total = torch.stack([part.double().sum((0, 2, 3)) for part in pixels.split(64)]).sum(0)
        squares = torch.stack([part.double().square().sum((0, 2, 3)) for part in pixels.split(64)]).sum(0)
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=1).sqrt()
        self.register_buffer("mean", mean.float()[:, None, None])
        self.register_buffer("std", std.float()[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.std
