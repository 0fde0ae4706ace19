"""What single neurons of an image tower stand for: the word whose presence in pictures they follow.

    q_k   (N,)     neuron k at the pooled token of N probing pictures
    P     (N, M)   cosines of those pictures with M words
    soft_wpmi      sum over k's strongest pictures i of ln(1 + w_i (p_i - 1)),  p_i = softmax over words of scale * P_i
                   less prior x the log of its mean over neurons; w_i falls from `first` to `last`
    cosine         q_k . P_m / |q_k| |P_m|
    cosine_cubed   the same of both less their means, to the third power

Oikarinen and Weng, CLIP-Dissect: Automatic Description of Neuron Representations in Deep Vision Networks, ICLR 2023,
section 3.2 and their code, whose constants these are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from clipfast.data.datasets import Dataset
from clipfast.errors import InputError, nearest
from clipfast.metrics.base import Columns, Protocol
from clipfast.metrics.samples import OnError, Pictures, batches
from clipfast.metrics.zero_shot import Templates, class_embeddings
from clipfast.models.block import Block
from clipfast.models.image import ImageTower
from clipfast.models.layers import Affine, Chain, Residual
from clipfast.models.model import Model, Precision

_LAYERS, _SIMILARITIES = ("mlp", "residual"), ("soft_wpmi", "cosine", "cosine_cubed")
# Values of an intermediate that are in memory at once.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Neurons:
    """Which numbers of a vision transformer count as neurons.

    block: negative ones count from the top. layer: "mlp", its MLP's hidden units behind the activation, or "residual",
    the channels of the stream that leaves it.
    """

    block: int = -1
    layer: str = "mlp"

    def __post_init__(self) -> None:
        if self.layer not in _LAYERS:
            raise InputError(f"there are no neurons {self.layer!r}: {nearest(self.layer, _LAYERS)}")

    def count(self, tower: Any) -> int:
        """How many there are. Raises InputError for a ResNet, which has no tokens, and for a block that is not."""
        if not isinstance(tower, ImageTower) or not tower.trunk:
            raise InputError(f"neurons are read at the tokens of a vision transformer, and this is a {tower.kind}.")
        block = tower.blocks[tower.block_index(self.block, "block")]
        return _mlp(block)[1].weight.shape[1] if self.layer == "mlp" else block.width

    @torch.no_grad()
    def read(self, tower: ImageTower, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of normalised images (b, 3, H, W): the neurons at every token, (b, T, D), and the unit embeddings (b, E).

        Tokens come as in the tower: the pooled one first, then other prefix tokens, then patches.
        """
        index = tower.block_index(self.block, "block")
        block = tower.trunk[index]
        h = tower.run(tower.embed(x), 0, index)
        pooled = tower.pooled(h)
        y = h + block.branch(block.attend(*block.query_key_value(h)))
        neurons = _mlp(block)[0](y) if self.layer == "mlp" else block.rest(y)
        out = block.rest(y) if self.layer == "mlp" else neurons
        return neurons, tower.finish(out, pooled, index + 1) if index + 1 < tower.depth else tower.top(out, pooled)


def _mlp(block: Any) -> tuple[Chain, Affine]:
    """What makes a block's hidden units of its residual stream, and the projection behind them.

    Raises InputError for a block without an MLP beside a residual connection.
    """
    mlp = next((stage for stage in getattr(block, "rest", ()) if isinstance(stage, Residual)), None)
    if mlp is None or not isinstance(block, Block):
        raise InputError("neurons are read in the MLP of a transformer's block, and this one has none.")
    front, back = mlp.inner.split()
    return front, next(stage for stage in back if isinstance(stage, Affine))


@dataclass(frozen=True)
class Dissection:
    """How well each of D neurons fits each of M concepts: scores (D, M)."""

    scores: Tensor
    concepts: list[str]

    def best(self, count: int = 1) -> list[list[tuple[str, float]]]:
        """For each neuron its best concepts with their scores, best first; of equal ones the earlier."""
        values, order = self.scores.sort(dim=1, descending=True, stable=True)
        return [
            [(self.concepts[i], value) for i, value in zip(row[:count], own[:count], strict=True)]
            for row, own in zip(order.tolist(), values.tolist(), strict=True)
        ]

    def columns(self) -> Columns:
        """One row a neuron: the best "score", and the number of its "concept"."""
        values, order = self.scores.double().sort(dim=1, descending=True, stable=True)
        return {"score": values[:, 0].cpu(), "concept": order[:, 0].double().cpu()}


@dataclass(frozen=True)
class ClipDissect(Protocol):
    """`dissection/clip`: how well the best word describes each neuron; its rows are neurons.

    block, layer: see `Neurons`. similarity: see above. top: how many pictures stand for a neuron; scale, prior, first,
    last: see above, all of soft_wpmi alone.
    """

    block: int = -1
    layer: str = "mlp"
    similarity: str = "soft_wpmi"
    top: int = 100
    scale: float = 10.0
    prior: float = 1.0
    first: float = 0.998
    last: float = 0.97

    name: ClassVar[str] = "dissection/clip"
    source: ClassVar[str] = "Oikarinen and Weng, CLIP-Dissect, ICLR 2023"
    figures: ClassVar[Mapping[str, str]] = {"score": "higher"}

    def __post_init__(self) -> None:
        Neurons(self.block, self.layer)
        if self.similarity not in _SIMILARITIES:
            raise InputError(f"there is no similarity {self.similarity!r}: {nearest(self.similarity, _SIMILARITIES)}")
        if self.top < 1 or not 0 <= self.last <= self.first <= 1:
            raise InputError("top must be at least 1, and first and last shares with 0 <= last <= first <= 1.")

    def measure(self, model: Model, images: Any, words: Sequence[str], **options: Any) -> Columns:
        """Columns of the D neurons: the best word's "score" and its number as "concept"; arguments as for `dissect`."""
        return self.dissect(model, images, words, **options).columns()

    @torch.inference_mode(False)
    @torch.no_grad()
    def dissect(
        self,
        model: Model,
        images: Any,
        words: Sequence[str],
        *,
        judge: Model | None = None,
        templates: Templates = "bare",
        precision: Precision = None,
        on_error: OnError = "raise",
        progress: Callable[[int], None] | None = None,
    ) -> Dissection:
        """Every neuron with every word.

        images: the probing pictures: a folder, a pattern, files, PIL images, or a data set. words: the M concepts.
        judge: the CLIP that says how much of a word is in a picture; by default the model itself. N x D and N x M
        numbers are in memory. progress: called with the number of pictures done since the last call.

        Raises InputError for fewer pictures than `top`, a tower without tokens, and as `class_embeddings` and
        `samples.batches` do.
        """
        neurons = Neurons(self.block, self.layer)
        dataset = images if isinstance(images, Dataset) else Pictures(images)
        tower, _ = model.towers(precision)
        neurons.count(tower)
        assert isinstance(tower, ImageTower)
        concepts = class_embeddings(judge or model, words, templates, precision)
        activations, embeddings = [], []
        for batch in batches(model, dataset, precision=precision, on_error=on_error, progress=progress):
            values, z = neurons.read(tower, batch.inputs(model, precision))
            activations.append(values[:, 0].float().cpu())
            if judge is None:
                embeddings.append(z.cpu())
        if judge is not None:
            other, _ = judge.towers(precision)
            for batch in batches(judge, dataset, precision=precision, on_error=on_error):
                embeddings.append(other.encode(batch.inputs(judge, precision)).cpu())
        if not activations:
            raise InputError(f"{dataset.name} has no picture that can be read, and neurons are told by pictures.")
        found = self.scores(torch.cat(embeddings) @ concepts.cpu().T, torch.cat(activations))
        return Dissection(found, list(words))

    def scores(self, cosines: Tensor, activations: Tensor) -> Tensor:
        """(D, M) for cosines of pictures with words (N, M) and neurons (N, D).

        Raises InputError where the two do not have the same pictures, or soft_wpmi has fewer than `top`.
        """
        if cosines.ndim != 2 or activations.ndim != 2 or len(cosines) != len(activations):
            raise InputError(
                "cosines and activations must be (N, M) and (N, D), of the same pictures, "
                f"not {tuple(cosines.shape)} and {tuple(activations.shape)}."
            )
        if self.similarity == "soft_wpmi":
            return self._soft_wpmi(cosines, activations)
        p, q = cosines.double(), activations.double()
        least = 0.0
        if self.similarity == "cosine_cubed":
            # As published: shorter vectors are noise, and stay short.
            p, q, least = (p - p.mean(0)) ** 3, (q - q.mean(0)) ** 3, 1e-3
        return (_unit(q, least).T @ _unit(p, least)).to(activations.dtype)

    def _soft_wpmi(self, cosines: Tensor, activations: Tensor) -> Tensor:
        (pictures, neurons), words = activations.shape, cosines.shape[1]
        if pictures < self.top:
            raise InputError(f"soft_wpmi describes a neuron by its top={self.top} pictures, and there are {pictures}.")
        p = (self.scale * cosines).softmax(1)
        order = activations.sort(dim=0, descending=True, stable=True).indices[: self.top]
        falling = torch.arange(self.top, dtype=p.dtype) / self.top * (self.first - self.last)
        weights = (self.first - falling)[:, None, None]
        once = max(1, _CHUNK // (self.top * words))
        parts = [(1 + weights * (p[some] - 1) + 1e-7).log().sum(0) for some in order.split(once, dim=1)]
        given = torch.cat(parts)
        return given - self.prior * (given.logsumexp(0) - math.log(neurons))


def _unit(columns: Tensor, least: float) -> Tensor:
    """Columns (N, K) at unit length; those shorter than `least` divided by that, and empty ones left as they are."""
    lengths = columns.norm(dim=0).clamp(min=least)
    return columns / torch.where(lengths > 0, lengths, 1)
