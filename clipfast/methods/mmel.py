"""MMEL: multi-scale multi-modal explanation learning on top of Grad-ECLIP (arXiv 2509.15243).

    E       = E_base * [beta + alpha * sigmoid(sum_s level_s)],   s in 1, 3/4, 1/2
    level_s = sum_l softplus(theta_l) * importance(A^(l,s))
    A^(l,s) = the similarity of layer l's queries with each other at scale s

E_base is Grad-ECLIP with the spatial weight "combined". The factor does not depend on the prompt, so MMEL has all that
Grad-ECLIP has: both sides, both forms, attribution features. The queries come from the one pass that the base makes;
each layer's are reduced to one number a place as they appear. Two modes say what a scale is:

    paper    to the letter: queries times s, through T(x) = LayerNorm(W2 ReLU(W1 x)), D -> 2D -> D, one for all layers
             and scales; A = cos / sqrt(D); a place's importance is its mean over j. Nobody trained T: its weights are
             torch.nn.Linear's initial ones, with which the scales agree and the factor is nearly constant.
    pooled   our reading of "multi-scale": queries average-pooled to the grid (a text's words: to the length) scaled by
             s, rounded (halves to even), at least 1; a place's importance is the mean attention paid to it in the
             softmax over j of cos(q_i, q_j) / temperature; layers are averaged, not summed, each level is brought back
             bilinearly, and their sum is standardised over the map: 0 where its deviation is at most a millionth of its
             mean, and so rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.errors import InputError
from clipfast.methods.base import Explained, Method, MethodInfo, at_least, choice
from clipfast.methods.grad_eclip import GradEclip, SiteExplained
from clipfast.models.image import ImageTower
from clipfast.models.text import TextTower
from clipfast.models.tower import Tower
from clipfast.ops.minmax import minmax
from clipfast.ops.spatial_attribution import SHORTEST

SCALES = (1.0, 0.75, 0.5)
# A sum of levels whose deviation is at most this share of its mean is constant.
FLAT = 1e-6


@dataclass(frozen=True)
class Mmel(Method):
    """MMEL with the parameters of its paper.

    mode: "pooled" or "paper", as above.
    alpha: how much the levels raise a place; 0 is the base itself.
    temperature: of the softmax; mode "pooled" only.
    beta: what the factor starts from; the paper's equation 9 has 1.
    theta: one number for each layer of the tower, lowest first, or one for all; a layer counts softplus(theta).
    contrast: the exponent of minmax(E) ** contrast; 1 leaves maps as they are, everything else costs the features.
    signed: keep the sign instead of the base's final ReLU.
    seed: of T's weights; mode "paper" only.

    On the text side places are the positions of `words`: only they are pooled, attended to, and standardised over.
    The base takes the layers there that Grad-ECLIP does. Raises InputError for parameters out of range, and for a
    theta that does not fit the tower.
    """

    mode: Literal["pooled", "paper"] = "pooled"
    alpha: float = 2.0
    temperature: float = 0.1
    beta: float = 1.0
    theta: float | Sequence[float] = 1.0
    contrast: float = 1.0
    signed: bool = False
    seed: int = 0

    needs: ClassVar = "blocks"
    info: ClassVar = MethodInfo(
        source="arXiv 2509.15243",
        forwards="1",
        backwards="0",
        prompt_free=True,
        agrees="no code is published; both modes with a naive float64 implementation on open_clip's modules, to 1e-10",
        our_reading="multi-scale as average-pooled queries in a softmax at the listed temperature, since the paper's "
        "scaled queries give one map three times; the base's spatial weight as the mean of the pooled query's cosine "
        "and all queries' mean cosine; contrast as a power of the min-maxed map.",
    )

    def __post_init__(self) -> None:
        choice(self, "mode", "pooled", "paper")
        at_least(self, "alpha", 0)
        at_least(self, "beta", 0)
        at_least(self, "seed", 0, whole=True)
        for name in ("temperature", "contrast"):
            at_least(self, name, 0)
            if getattr(self, name) == 0:
                raise InputError(f"{name}={getattr(self, name)!r} of Mmel must be above 0.")
        thetas = self._thetas()
        if not isinstance(thetas, Sequence) or not all(isinstance(t, int | float) for t in thetas):
            raise InputError(f"theta={self.theta!r} of Mmel must be a number, or a number for each layer.")

    @classmethod
    def why_not(cls, tower: Any) -> str | None:
        return super().why_not(tower) or ("pools the mean of its patches" if tower.mean else None)

    @property
    def has_features(self) -> bool:
        return self.contrast == 1

    @torch.no_grad()
    def image(self, tower: ImageTower, x: Tensor) -> Explained:
        """Prepare normalised images (B, 3, H, W); n is the number of patches, row by row."""
        levels = self._levels(tower, partial(_image_scales, tower.grid_of(x)), None)
        # An attention pool has no query of a place to combine its own with.
        spatial: Any = "combined" if tower.has_class_token else "raw"
        base = GradEclip(spatial=spatial, signed=self.signed).image(tower, x, watch=levels.add)
        return self._raised(base, levels, None)

    @torch.no_grad()
    def text(self, tower: TextTower, ids: Tensor, words: Tensor) -> Explained:
        """Prepare token ids (B, T); positions outside `words` (B, T) get zero.

        n is T, or less where padding at the end can have no influence.
        """
        words = words[:, : tower.reach(ids)] > 0
        levels = self._levels(tower, partial(_text_scales, words), words)
        base = GradEclip(spatial="combined", signed=self.signed).text(tower, ids, words, watch=levels.add)
        return self._raised(base, levels, words)

    def _thetas(self) -> Sequence[float]:
        return [self.theta] if isinstance(self.theta, int | float) else self.theta

    def _levels(self, tower: Tower, scales: Callable[[Tensor], list[Scale]], words: Tensor | None) -> Levels:
        dtype, device = tower.result_dtype, tower.device
        given = list(self._thetas())
        layers = len(tower.trunk)
        if len(given) not in (1, layers):
            raise InputError(f"theta has {len(given)} numbers, but this tower has {layers} layers.")
        weights = F.softplus(torch.tensor(given, dtype=dtype, device=device)).expand(layers)
        if self.mode == "paper":
            return PaperLevels(weights, words, Network.seeded(tower.width, self.seed, dtype, device))
        return PooledLevels(weights, words, scales(weights), self.temperature)

    def _raised(self, base: SiteExplained, levels: Levels, words: Tensor | None) -> Explained:
        factor = self.beta + self.alpha * torch.sigmoid(levels.total())
        raised = replace(base, weights=[weight * factor.to(weight.dtype) for weight in base.weights])
        return raised if self.contrast == 1 else Contrasted(base.z, raised, self.contrast, words)


@dataclass(frozen=True)
class Contrasted(Explained):
    """minmax(E) ** contrast of the maps E of `raised`; words (B, n): the places of a text that take part."""

    z: Tensor
    raised: SiteExplained
    contrast: float
    words: Tensor | None

    def maps(self, texts: Tensor, *, out: Tensor | None = None) -> Tensor:
        out = self.raised.maps(texts, out=out)
        where = None if self.words is None else self.words[:, None]
        raised = minmax(out, constant=0.0, where=where)
        if where is not None:
            raised = raised.masked_fill_(~where, 0.0)
        return out.copy_(raised.pow_(self.contrast))


class Levels:
    """Takes in each layer's queries, the lowest first, and keeps of them only what the sum over layers needs.

    weights (L,): what each layer counts. words (B, n): the places of a text that take part, None for all of an image.
    """

    def __init__(self, weights: Tensor, words: Tensor | None):
        self.remaining = iter(weights)
        self.words = words

    def add(self, queries: Tensor) -> None:
        """Take in the queries (B, n, D) of the next layer."""
        raise NotImplementedError

    def total(self) -> Tensor:
        """The sum of all levels (B, n), once every layer has been added."""
        raise NotImplementedError


class PooledLevels(Levels):
    """level_s = the weighted mean over layers of the mean attention that is paid to a place among the pooled queries.

    Averaging is linear, so the products of pooled queries follow from those of the queries themselves, the only ones
    that are as long as the tower is wide.
    """

    def __init__(self, weights: Tensor, words: Tensor | None, scales: Sequence[Scale], temperature: float):
        super().__init__(weights / weights.sum(), words)
        self.scales = scales
        self.temperature = temperature
        self.levels: list[Tensor | None] = [None] * len(scales)

    def add(self, queries: Tensor) -> None:
        weight = next(self.remaining)
        queries = queries.to(weight.dtype)
        products = queries @ queries.mT
        for i, scale in enumerate(self.scales):
            level = self._importance(scale.pooled(products), scale.there).mul_(weight)
            before = self.levels[i]
            self.levels[i] = level if before is None else before.add_(level)

    def _importance(self, products: Tensor, there: Tensor | None) -> Tensor:
        """The mean over i of softmax_j(cos_ij / temperature), (B, m), from the products (B, m, m) of queries."""
        inverse = products.diagonal(dim1=1, dim2=2).clamp(min=SHORTEST**2).rsqrt()
        logits = (products * (inverse / self.temperature)[:, :, None]).mul_(inverse[:, None])
        if there is not None:
            logits.masked_fill_(~there[:, None], torch.finfo(logits.dtype).min)
        shares = logits.softmax(-1)
        # Summed in float64: places may differ by parts in a thousand, and standardising magnifies rounding as much.
        # MPS has no float64.
        wide = torch.float32 if shares.device.type == "mps" else torch.float64
        return shares.mean(1, dtype=wide) if there is None else _mean(shares.to(wide), there)

    def total(self) -> Tensor:
        """Standardised over the places by the population's deviation; zeros where it is constant."""
        levels = [
            scale.spread(level) for scale, level in zip(self.scales, self.levels, strict=True) if level is not None
        ]
        level = torch.stack(levels, -1).sum(-1, keepdim=True)
        mean = _mean(level, self.words)
        centred = (level - mean[:, None])[..., 0]
        deviation = _mean(centred.square()[..., None], self.words).sqrt()
        flat = deviation <= FLAT * mean
        return torch.where(flat, 0, centred / torch.where(flat, 1, deviation))


class PaperLevels(Levels):
    """level_s = the weighted sum over layers of the mean over j of F_i . F_j / sqrt(D), F = T(s q) / |T(s q)|.

    The mean over j is a product with the mean of F: no place meets every other.
    """

    def __init__(self, weights: Tensor, words: Tensor | None, network: Network):
        super().__init__(weights, words)
        self.network = network
        self.level: Tensor | float = 0.0

    def add(self, queries: Tensor) -> None:
        weight = next(self.remaining)
        for states in self.network(queries.to(weight.dtype), SCALES):
            f = F.normalize(states, dim=-1)
            mean = _mean(f, self.words)[:, :, None]
            self.level = self.level + (f @ mean)[..., 0] * (weight / f.shape[-1] ** 0.5)

    def total(self) -> Tensor:
        assert isinstance(self.level, Tensor)
        return self.level


@dataclass(frozen=True)
class Network:
    """The paper's T: LayerNorm(W2 ReLU(W1 x + b1) + b2), D -> 2D -> D, the LayerNorm without gain and bias."""

    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor

    @classmethod
    def seeded(cls, width: int, seed: int, dtype: torch.dtype, device: torch.device) -> Network:
        """The weights that two torch.nn.Linear have after torch.manual_seed(seed), whatever the model's dtype."""
        generator = torch.Generator().manual_seed(seed)
        weights = []
        for rows, columns in ((2 * width, width), (width, 2 * width)):
            weights.append(nn.init.kaiming_uniform_(torch.empty(rows, columns), 5**0.5, generator=generator))
            weights.append(nn.init.uniform_(torch.empty(rows), -(columns**-0.5), columns**-0.5, generator=generator))
        return cls(*(weight.to(device, dtype) for weight in weights))

    def __call__(self, x: Tensor, scales: Sequence[float]) -> Iterator[Tensor]:
        """T(s x) for each s: the first product is one for all."""
        product = F.linear(x, self.weight1)
        for s in scales:
            hidden = torch.add(self.bias1, product, alpha=s).relu_()
            yield F.layer_norm(F.linear(hidden, self.weight2, self.bias2), x.shape[-1:])


@dataclass(frozen=True)
class Scale:
    """Places at one scale: `down` (m, n) averages them into pooled ones, `up` (n, m) brings those' values back.

    None for both leaves places as they are. Texts have their own, (B, m, n) and (B, n, m), with `there` (B, m) True
    for the pooled places that a text has.
    """

    down: Tensor | None
    up: Tensor | None
    there: Tensor | None = None

    def pooled(self, products: Tensor) -> Tensor:
        """Products (B, m, m) of pooled queries from the products (B, n, n) of queries."""
        return products if self.down is None else self.down @ (products @ self.down.mT)

    def spread(self, level: Tensor) -> Tensor:
        """Values (B, m) of pooled places, brought back to all places (B, n)."""
        return level if self.up is None else (self.up.to(level.dtype) @ level[..., None])[..., 0]


def _image_scales(grid: tuple[int, int], like: Tensor) -> list[Scale]:
    return [Scale(None, None) if s == 1 else Scale(*_resampling(grid, s, like)) for s in SCALES]


def _text_scales(words: Tensor, like: Tensor) -> list[Scale]:
    """words (B, n): each text's words are a row of their own length, wherever they stand."""
    positions = [row.nonzero()[:, 0] for row in words]
    scales = []
    for s in SCALES:
        of_length = {k: _resampling((1, k), s, like) for k in {len(p) for p in positions} - {0}}
        most = max((len(down) for down, _ in of_length.values()), default=1)
        down = like.new_zeros(len(words), most, words.shape[1])
        up = like.new_zeros(len(words), words.shape[1], most)
        there = torch.zeros(len(words), most, dtype=torch.bool, device=words.device)
        for i, place in enumerate(positions):
            if len(place):
                to, back = of_length[len(place)]
                down[i, : len(to)][:, place] = to
                up[i][place, : len(to)] = back
                there[i, : len(to)] = True
        scales.append(Scale(down, up, there))
    return scales


def _resampling(grid: tuple[int, int], scale: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """(average pooling to the scaled grid (m, n), bilinear interpolation back (n, m)) of a grid (h, w)."""
    size = max(1, round(grid[0] * scale)), max(1, round(grid[1] * scale))
    n, m = math.prod(grid), math.prod(size)
    places, pooled = (torch.eye(k, dtype=like.dtype, device=like.device) for k in (n, m))
    down = F.adaptive_avg_pool2d(places.view(n, 1, *grid), size).flatten(1).T
    up = F.interpolate(pooled.view(m, 1, *size), size=grid, mode="bilinear", align_corners=False).flatten(1).T
    return down.contiguous(), up.contiguous()


def _mean(rows: Tensor, where: Tensor | None) -> Tensor:
    """The mean (B, C) of rows (B, n, C) over n, or over those where `where` (B, n) is True; zero where none is."""
    if where is None:
        return rows.mean(1)
    shares = where.to(rows.dtype) / where.sum(1, keepdim=True).clamp(min=1)
    return (shares[:, None] @ rows)[:, 0]
