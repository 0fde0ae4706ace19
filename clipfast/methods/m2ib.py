"""M2IB: visual explanations of image-text representations via multi-modal information bottleneck attribution (Wang,
Rudner and Wilson, NeurIPS 2023), section 3.

A bottleneck mixes noise into the tokens x that leave a block, as much as the score allows:

    lambda = sigmoid(alpha);   t = lambda x + (1 - lambda) eps,  eps ~ N(0, 1)
    KL     = -1/2 (1 + log (1 - lambda)^2 - (lambda x)^2 - (1 - lambda)^2)     what t still says of x, by element
    min_alpha  beta mean(KL) - mean_copies cos(z(t), other side)               Adam from alpha = 5

H_i = sum_c KL_ic, the information of place i, for the alpha of the last forward pass: after steps - 1 updates.

KL and its slope are closed forms that no noise enters, so the last forward pass needs no model at all. The blocks below
the bottleneck and the other side do not move and run once. Every pair of an image and a prompt is a problem of its own:
Adam treats each element by itself, and many pairs side by side are as if each were alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.errors import InputError
from clipfast.methods.base import Explained, Method, MethodInfo, at_least
from clipfast.models.image import ImageTower
from clipfast.models.text import TextTower, rows_of
from clipfast.models.tower import Tower

# Theirs: sigmoid(5) = 0.993 lets nearly everything through.
START = 5.0


@dataclass(frozen=True)
class BottleneckExplained(Explained):
    """A batch of B inputs as their tokens leave the bottleneck's block. `maps` optimises a bottleneck for each prompt.

    z (B, E): unit embeddings. h (B, N, D): the tokens. keep: the places of a map among them. words (B, N): which places
    of a text get a value, None for all. length: how many tokens noise is drawn for, N or more.
    pooled, mask and visible: as `Tower.finish` takes them.
    """

    z: Tensor
    method: M2IB
    tower: Tower
    start: int
    h: Tensor
    keep: slice
    length: int
    pooled: Tensor
    words: Tensor | None = None
    mask: Tensor | None = None
    visible: Tensor | None = None

    @torch.no_grad()
    def maps(self, texts: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Maps (B, P, n) for unit embeddings of the other side, (P, E) or (B, P, E), in nats, not below zero."""
        batch, prompts, tokens = len(self.z), texts.shape[-2], self.h.shape[1]
        texts = texts.to(self.z.dtype).expand(batch, *texts.shape[-2:])
        if out is None:
            out = self.z.new_empty(batch, prompts, len(range(tokens)[self.keep]))
        rows = self.tower.rows_at_once(tokens, gradients=True)
        for pairs in torch.arange(batch * prompts, device=self.h.device).split(max(1, rows // self.method.samples)):
            inputs, asked = pairs // prompts, pairs % prompts
            found = self._information(inputs, texts[inputs, asked], rows)
            kept = found[:, self.keep]
            out[inputs, asked] = kept if self.words is None else kept * self.words[inputs]
        return out

    def _information(self, inputs: Tensor, texts: Tensor, rows: int) -> Tensor:
        """The information of each token, (Q, N), for Q pairs: `inputs` (Q,) of the batch and their texts (Q, E)."""
        method = self.method
        x = self.h[inputs].to(texts.dtype)
        alpha = torch.full_like(x, START)
        first, second = torch.zeros_like(x), torch.zeros_like(x)
        # A text's loss is a mean over its own tokens, whatever it is padded to.
        seen = x.shape[1] if self.visible is None else self.visible[inputs].sum(-1)[:, None, None]
        generator = torch.Generator(x.device).manual_seed(method.seed)
        for step in range(1, method.steps):
            # In float32 for every precision, and the same for all pairs: their place in a batch changes nothing.
            noise = torch.randn(method.samples, self.length, x.shape[2], generator=generator, device=x.device)
            through = alpha.sigmoid()
            fit = self._fit_slope(x, through, noise[:, : x.shape[1]].to(x.dtype), inputs, texts, rows)
            blocked = torch.sigmoid(-alpha)
            # d KL / d alpha, and the mean cosine's slope through lambda.
            rise = through * (1 + blocked * (through * x.square() - blocked))
            slope = rise * (method.beta / x.shape[2]) / seen - fit * through * blocked
            # Adam (Kingma and Ba, 2015) with its usual constants.
            first.lerp_(slope, 0.1)
            second.lerp_(slope.square(), 0.001)
            size = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
            alpha.addcdiv_(first, size, value=-method.lr / (1 - 0.9**step))
        # log (1 - lambda)^2 as it is for any alpha; 1 - sigmoid(alpha) would round to zero from 17 on in float32.
        capacity = 1 + 2 * F.logsigmoid(-alpha) - (alpha.sigmoid() * x).square() - torch.sigmoid(-alpha).square()
        return -0.5 * capacity.sum(-1)

    def _fit_slope(self, x: Tensor, through: Tensor, noise: Tensor, inputs: Tensor, texts: Tensor, rows: int) -> Tensor:
        """d/d lambda of the mean cosine over the noisy copies, (Q, N, D); at most `rows` copies in one pass."""
        total = torch.zeros_like(x)
        for eps in noise.split(max(1, rows // len(x))):
            # t = eps + lambda (x - eps): (Q, copies, N, D), then copies of all pairs as one batch.
            away = x[:, None] - eps
            t = (eps + through[:, None] * away).flatten(0, 1).requires_grad_()
            where = inputs.repeat_interleave(len(eps))
            with torch.enable_grad():
                z = self.tower.finish(
                    t.to(self.tower.dtype),
                    self.pooled[where],
                    self.start,
                    mask=rows_of(self.mask, where),
                    visible=None if self.visible is None else self.visible[where],
                )
            (slope,) = torch.autograd.grad(z, t, texts.repeat_interleave(len(eps), 0))
            total += (slope.unflatten(0, away.shape[:2]) * away).sum(1)
        return total / len(noise)


@dataclass(frozen=True)
class M2IB(Method):
    """M2IB of images or texts, as parameters of the class.

    layer: the block, counted from 0, whose output goes through the bottleneck. None: three quarters up, which is the
        authors' 9 of 12 blocks, with at least one block above it.
    beta: weight of the information against the cosine. samples: noisy copies in each step. steps and lr: of Adam.
    seed: of the noise. Every pair gets the same noise, so a map does not depend on the batch it was made in; devices
        of other kinds draw other numbers.

    Raises InputError, when inputs are prepared, for a layer that the tower has not or that is its last.
    """

    layer: int | None = None
    beta: float = 0.1
    samples: int = 10
    steps: int = 10
    lr: float = 1.0
    seed: int = 0

    needs: ClassVar = "blocks"
    info: ClassVar = MethodInfo(
        source="Wang et al., NeurIPS 2023",
        forwards="1 (and samples x (steps - 1) x P through the blocks above the bottleneck)",
        backwards="samples x P (a step, through the blocks above the bottleneck)",
        prompt_free=False,
        agrees="the published loop on the model itself with torch's Adam and the same noise, to 1e-9 in float64",
        our_reading="in a tower of other than 12 blocks the bottleneck is three quarters up",
    )
    keeps_activations: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.layer is not None:
            at_least(self, "layer", 0, whole=True)
        at_least(self, "beta", 0)
        at_least(self, "samples", 1, whole=True)
        at_least(self, "steps", 1, whole=True)
        at_least(self, "lr", 0)
        at_least(self, "seed", 0, whole=True)

    @torch.no_grad()
    def image(self, tower: ImageTower, x: Tensor) -> BottleneckExplained:
        """Prepare normalised images (B, 3, H, W); n is the number of patches, row by row."""
        start = self._start(tower)
        h = tower.run(tower.embed(x), stop=start)
        pooled = tower.pooled(h)
        z = tower.finish(h, pooled, start)
        return BottleneckExplained(z, self, tower, start, h, slice(tower.prefix, None), h.shape[1], pooled)

    @torch.no_grad()
    def text(self, tower: TextTower, ids: Tensor, words: Tensor) -> BottleneckExplained:
        """Prepare token ids (B, T); positions outside `words` (B, T) get zero.

        n is T, or less where padding at the end can have no influence.
        """
        texts = tower.read(ids)
        start, own, pooled = self._start(tower), texts.own, texts.pooled
        mask, visible = texts.mask, texts.visible
        h = tower.run(texts.h, stop=start, mask=mask)
        z = tower.finish(h, pooled, start, mask=mask, visible=visible)
        inside = words[:, own] > 0
        # Noise for the longest text there can be: a text's own does not depend on how long its neighbours are.
        length = max(tower.context_length, ids.shape[1]) + h.shape[1] - texts.length
        return BottleneckExplained(z, self, tower, start, h, own, length, pooled, inside, mask, visible)

    def _start(self, tower: Tower) -> int:
        """The first block above the bottleneck."""
        layer = min(tower.depth * 3 // 4, tower.depth - 2) if self.layer is None else self.layer
        if not 0 <= layer < tower.depth - 1:
            raise InputError(
                f"a bottleneck after block {layer} needs a block above it: this tower has {tower.depth} blocks."
            )
        return layer + 1
