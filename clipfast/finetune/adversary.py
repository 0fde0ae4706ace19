"""The inner problem of adversarial fine-tuning: a perturbation of each image that moves its embedding the most.

    max_delta  E_z loss(encode(x + z + delta)) - h(delta),  z ~ N(0, sigma^2),  x + delta in [0, 1]

by projected gradient ascent with fresh noise in each step. AFT: Gong et al., Boosting the Visual Interpretability of
CLIP via Adversarial Fine-Tuning, ICLR 2025, section 3. FARE: Schlarmann et al., Robust CLIP, ICML 2024, eq. 3, is the
same without z and h, in the box |delta| <= eps. Pixels are in [0, 1], before the model's own normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from clipfast.errors import InputError, nearest
from clipfast.finetune.penalties import Penalty, penalty
from clipfast.ops.pgd_step import DIRECTIONS, pgd_step

STARTS = ("zero", "uniform")

Encode = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Adversary:
    """Settings of the inner problem; lengths in pixels in [0, 1], so that 1/255 is one grey level.

    penalty    "huber", "elastic_net", "group_norm" or "none" (the box alone), as `recipe` defines them: penalties.py.
    eps, eta, eps2, group   their numbers; group is the side of group_norm's cells.
    steps, step_size        of the ascent.
    sigma      of the noise, drawn afresh in each step.
    momentum   of the directions; 0 for none.
    direction  of a step: "sign", which comes no closer to a maximum than step_size; "normalized", of unit L2 norm over
               each cell for group_norm, over each image else; "gradient" itself, of which, in the linearised problem,
               one step with step_size=eps/eta is exact for "huber". "auto" is "normalized" for group_norm and, as
               released, for elastic_net, where ten steps of it hardly move a pixel; else "sign".
    start      "uniform" in [-eps, eps], or "zero": the gradient is zero there while the model still is the frozen one,
               so that without noise sign steps would never leave.
    recipe     "paper" or "released". As released, x + z is clamped to [0, 1] before delta is added and the start is
               used as drawn; in the paper's form it is projected, x + delta clamped, and x + z + delta is not.

    Raises InputError for names that are not known and numbers that cannot be.
    """

    penalty: str = "huber"
    eps: float = 4 / 255
    eta: float = 1 / 255
    eps2: float = 1 / 255
    steps: int = 10
    step_size: float = 1 / 255
    sigma: float = 1 / 255
    momentum: float = 0.0
    direction: str = "auto"
    start: str = "uniform"
    recipe: str = "paper"
    group: int = 14

    def __post_init__(self) -> None:
        for name, value, known in (("direction", self.direction, ("auto", *DIRECTIONS)), ("start", self.start, STARTS)):
            if value not in known:
                raise InputError(f"{name} {value!r} is not known; {nearest(value, known)}")
        if self.steps < 1:
            raise InputError(f"steps={self.steps!r} must be at least 1.")
        if not 0 < self.step_size < math.inf:
            raise InputError(f"step_size={self.step_size!r} must be above 0 and finite.")
        if not 0 <= self.sigma < math.inf or not 0 <= self.momentum < math.inf:
            raise InputError(f"sigma={self.sigma!r} and momentum={self.momentum!r} must be at least 0 and finite.")
        self.h()

    @classmethod
    def aft(cls, recipe: str = "paper") -> Self:
        """AFT as in the paper; or as its code runs it, with eps 1/255 and a momentum of 0.9."""
        return cls(eps=1 / 255, momentum=0.9, recipe=recipe) if recipe == "released" else cls(recipe=recipe)

    @classmethod
    def fare(cls, eps: float = 4 / 255) -> Self:
        """FARE as its code runs it: the box alone, no noise, ten sign steps of 1/255 with a momentum of 0.9."""
        return cls(penalty="none", eps=eps, sigma=0.0, momentum=0.9, recipe="released")

    @property
    def ascent(self) -> str:
        """The direction that "auto" stands for, or the one that was chosen."""
        if self.direction != "auto":
            return self.direction
        by_norm = self.penalty == "group_norm" or (self.penalty == "elastic_net" and self.recipe == "released")
        return "normalized" if by_norm else "sign"

    def h(self) -> Penalty:
        """The penalty with its numbers."""
        return penalty(self.penalty, self.recipe, eps=self.eps, eta=self.eta, eps2=self.eps2, cell=self.group)

    def distance(self, embeddings: Tensor, frozen: Tensor) -> Tensor:
        """The loss between embeddings (B, E) and the frozen model's: (B,). Half the squared distance; as released, and
        for FARE, the squared distance."""
        squared = (embeddings - frozen).square().sum(-1)
        return squared if self.recipe == "released" else squared / 2


@dataclass(frozen=True)
class Perturbed:
    """What the inner problem found.

    delta (B, 3, H, W), in x's dtype: x + delta is in [0, 1]. objective (B,): loss less penalty where the last gradient
    was taken, one step before delta. nan_gradients: how many gradients of pixels, over all steps, were not finite and
    counted as zero.
    """

    delta: Tensor
    objective: Tensor
    nan_gradients: int


def perturb(encode: Encode, loss: Loss, x: Tensor, adversary: Adversary, generator: torch.Generator) -> Perturbed:
    """The perturbation of each image that the adversary's steps find.

    encode     pixels (B, 3, H, W) in [0, 1], with noise a little beyond, to embeddings (B, E), each from its image.
    loss       embeddings to what is to be large, for each image by itself: (B,).
    x          (B, 3, H, W) float32 or float64 in [0, 1].
    generator  on x's device; all randomness comes from it, so that its state is all there is to resume.

    Only gradients with respect to pixels are computed: no parameter's `grad` or `requires_grad` changes.

    Raises InputError when x or loss do not fit.
    """
    _check(x, generator)
    h = adversary.h()
    slope = list(h.slope(x.shape[-2] * x.shape[-1]))
    x = x.detach()
    delta = _start(x, adversary, generator)
    velocity = torch.zeros_like(delta) if adversary.momentum else None
    count = torch.zeros((), dtype=torch.int64, device=x.device)
    noisy = torch.empty_like(delta)
    for _ in range(adversary.steps):
        if adversary.sigma:
            noisy.normal_(0.0, adversary.sigma, generator=generator).add_(x)
            if adversary.recipe == "released":
                noisy.clamp_(0, 1)
        else:
            noisy.copy_(x)
        with torch.enable_grad():
            point = noisy.add_(delta).requires_grad_()
            found = loss(encode(point))
            if found.shape != x.shape[:1]:
                raise InputError(f"loss must give one number for each of {len(x)} images, not {tuple(found.shape)}.")
            if not found.requires_grad:
                raise InputError("the loss does not depend on the pixels: encode and loss must be differentiable.")
            (gradient,) = torch.autograd.grad(found.sum(), point)
        noisy = noisy.detach()
        objective = found.detach() - h.formula(delta)
        pgd_step(
            delta,
            velocity,
            gradient,
            x,
            count,
            slope,
            h.bound,
            h.eps,
            adversary.step_size,
            adversary.momentum,
            adversary.ascent,
            h.cells,
        )
    return Perturbed(delta, objective, int(count))


def _start(x: Tensor, adversary: Adversary, generator: torch.Generator) -> Tensor:
    """Where the ascent begins, contiguous."""
    delta = torch.zeros_like(x, memory_format=torch.contiguous_format)
    if adversary.start == "uniform":
        delta.uniform_(-adversary.eps, adversary.eps, generator=generator)
        if adversary.recipe == "paper":
            delta = adversary.h().project(delta).clamp_(-x, 1 - x)
    return delta


def _check(x: Tensor, generator: torch.Generator) -> None:
    if x.ndim != 4 or not x.numel() or x.dtype not in (torch.float32, torch.float64):
        raise InputError(f"images must be (B, 3, H, W) of float32 or float64, not {tuple(x.shape)} of {x.dtype}.")
    if generator.device != x.device:
        raise InputError(f"the generator is on {generator.device}, and the images on {x.device}; they must agree.")
    low, high = (float(value) for value in x.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise InputError(
            f"images must be pixels in [0, 1], before the model's normalisation, not from {low:.3g} to {high:.3g}."
        )
