"""What every attribution method is: a description of itself, and a way from a tower's inputs to maps.

A method is a frozen dataclass whose fields are its parameters. It prepares a batch of inputs once (`image`, `text`) and
hands out something that gives the maps of any prompts (`Explained.maps`); all that does not depend on the prompts
belongs into the first step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from torch import Tensor

from clipfast.errors import InputError
from clipfast.models.image import ImageTower
from clipfast.ops.spatial_attribution import gradient_weighted

Needs = Literal["pixels", "features", "tokens", "query", "blocks"]
"""What a method needs of an image tower. "pixels": only what comes out for pixels. "features": convolutional feature
maps. "tokens": patches of which an attention or a mean makes the embedding. "query": a single token or latent whose
attention does. "blocks": blocks in which the patches attend to each other."""

Relu = Literal["each", "sum", "none"]
"""Where the negative goes from maps of several layers: in each before the sum, after it, or nowhere."""


@dataclass(frozen=True)
class MethodInfo:
    """What `clipfast methods` says of a method.

    source: the paper. forwards and backwards: passes of the whole tower an image, as a number or a formula in the
    method's own parameters and P, the number of prompts ("1", "steps", "P", "masks + 1", "2 of 12 blocks, P times").
    prompt_free: whether everything but a product of matrices is shared by all prompts. agrees: the published code
    its numbers were compared with, and how closely; where there is none, what was checked instead.
    our_reading: what the paper leaves open and is decided here, in one sentence; empty where nothing is.
    """

    source: str
    forwards: str
    backwards: str
    prompt_free: bool
    agrees: str
    our_reading: str = ""


class Explained:
    """A batch of B inputs that a method has prepared.

    z (B, E): unit embeddings, the model's own.
    """

    z: Tensor

    def maps(self, texts: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Maps (B, P, n) for unit embeddings of the other side, (P, E), or (B, P, E) with prompts of its own an input.

        n: the places of the method's grid row by row, or the positions of a text. out: where to write them.
        """
        raise NotImplementedError

    relu: Relu

    def prompt_free(self) -> tuple[Tensor, Tensor]:
        """All that later texts need where the method has features: values (B, n, E), weights (B, n), used with `relu`.

        (B, L, n, E) and (B, L, n) where L layers go through ReLU before their sum.
        """
        raise NotImplementedError

    def extras(self) -> dict[str, Tensor]:
        """What the method says beside the maps of its last call, (B, P) each: such as the `delta` of an integral."""
        return {}


@dataclass(frozen=True)
class LinearExplained(Explained):
    """Maps that are one product with the text: weight_i (value_i . t), with or without ReLU.

    values (B, n, E), weights (B, n).
    """

    z: Tensor
    values: Tensor
    weights: Tensor
    relu: Relu = "each"

    def maps(self, texts: Tensor, *, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = self.z.new_empty(*self.values.shape[:1], texts.shape[-2], self.values.shape[1])
        return combine([self.weights], [self.values], texts, self.relu, out)

    def prompt_free(self) -> tuple[Tensor, Tensor]:
        return self.values, self.weights


class Method:
    """The base of all methods. A subclass overrides `image`, `text` or both, and says the rest in class variables."""

    info: ClassVar[MethodInfo]
    # What of an image tower `image` works on, see `why_not`.
    needs: ClassVar[Needs] = "query"
    # Whether activations of many blocks are kept for the way back down: batches are made smaller for it.
    keeps_activations: ClassVar[bool] = False
    # Whether the sign of a map says for or against. Of plain cosines only the order says anything.
    signs: ClassVar[bool] = True
    # Whether a word's value says for or against, too; a parameter where the user may choose.
    signed: bool = False
    # Whether `maps` takes the state of a single word in place of a text's embedding.
    maps_words: ClassVar[bool] = False

    def image(self, tower: Any, x: Tensor) -> Explained:
        """Prepare normalised images (B, 3, H, W) with a tower of a kind in `reads`."""
        raise NotImplementedError

    def text(self, tower: Any, ids: Tensor, words: Tensor) -> Explained:
        """Prepare token ids (B, T) with a `TextTower`.

        words (B, T) is k on the tokens of the k-th word, 0 where a token is in none. Booleans stand for words of one
        token each. Positions outside words get zero; a word's value is the sum over its tokens. The maps have T places,
        or fewer where padding at the end can have no influence.
        """
        raise NotImplementedError

    def grid(self, tower: Any, size: tuple[int, int]) -> tuple[int, int]:
        """The grid (h, w) of the maps for inputs of `size` (H, W) pixels: the tower's patches, if not overridden."""
        height, width = tower.patch_size
        return size[0] // height, size[1] // width

    def companions(self, prompts: int) -> tuple[str, ...]:
        """Texts that the method needs beside the user's, of which there are `prompts`; see `clip_surgery`."""
        return ()

    @property
    def has_features(self) -> bool:
        """Whether maps are products of attribution features with text embeddings (`Explained.prompt_free`)."""
        return False

    @property
    def reads_words(self) -> bool:
        """Whether `maps` takes the states of the texts' words (`TokenStates`) in place of their embeddings."""
        return False

    @classmethod
    def why_not(cls, tower: Any) -> str | None:
        """What an image tower lacks for `image`, to follow "whose image tower ..."; None where it lacks nothing."""
        if cls.needs == "pixels" or (cls.needs == "features" and hasattr(tower, "from_features")):
            return None
        if cls.needs == "features":
            return f"is a {tower.kind}, without convolutional feature maps"
        if not isinstance(tower, ImageTower):
            return f"is a {tower.kind}, without an attention that pools its places"
        if cls.needs == "query" and tower.mean:
            return "pools the mean of its patches, without a query of its own"
        if cls.needs == "blocks" and not tower.trunk:
            return f"is a {tower.kind}, whose places do not attend to each other"
        return None

    @classmethod
    def sides(cls) -> tuple[str, ...]:
        """What the method explains: "image", "text" or both."""
        return tuple(side for side in ("image", "text") if getattr(cls, side) is not getattr(Method, side))

    @classmethod
    def parameters(cls) -> dict[str, Any]:
        """The method's parameters and their defaults."""
        return {field.name: field.default for field in fields(cls)}  # type: ignore[arg-type]


def combine(
    weights: Sequence[Tensor],
    values: Sequence[Tensor],
    directions: Tensor | Sequence[Tensor],
    relu: Relu,
    out: Tensor,
) -> Tensor:
    """Maps out of each layer's products: ReLU in each layer and then the sum, the sum and then ReLU, or no ReLU.

    weights (B, n) and values (B, n, C) a layer; directions (P, C) or (B, P, C), one for all layers or one a layer.
    """
    for layer, (weight, value) in enumerate(zip(weights, values, strict=True)):
        direction = directions if isinstance(directions, Tensor) else directions[layer]
        each = relu == "each"
        if layer == 0:
            gradient_weighted(weight, value, direction, relu=each, out=out)
        else:
            out.add_(gradient_weighted(weight, value, direction, relu=each))
    return out.relu_() if relu == "sum" else out


def feature_maps(values: Tensor, weights: Tensor, texts: Tensor, relu: Relu) -> Tensor:
    """Maps (B, P, n) out of attribution features: values (B, n, E) and weights (B, n), or (B, L, n, E) and (B, L, n).

    texts (P, E), or (B, P, E) with prompts of its own an image.
    """
    if values.ndim == 3:
        values, weights = values[:, None], weights[:, None]
    out = values.new_empty(len(values), texts.shape[-2], values.shape[2])
    return combine(weights.unbind(1), values.unbind(1), texts, relu, out)


def exact(t: Tensor) -> Tensor:
    """t in float64, on the CPU where its own device (MPS) has none."""
    return t.cpu().double() if t.device.type == "mps" else t.double()


def choice(method: Any, name: str, *allowed: Any) -> None:
    """Raises InputError unless the parameter `name` is one of `allowed`.

    Written none, as on a command line, arrives as None: it becomes "none" where that is a choice and None is not.
    """
    if getattr(method, name) is None and "none" in allowed and None not in allowed:
        object.__setattr__(method, name, "none")
    if getattr(method, name) not in allowed:
        choices = ", ".join(repr(a) for a in allowed if a is not None)
        raise InputError(
            f"{name}={getattr(method, name)!r} is not a choice of {_called(method)}: give one of {choices}."
        )


def at_least(method: Any, name: str, low: float, *, whole: bool = False) -> None:
    """Raises InputError unless the parameter `name` is finite and not below `low`; a whole number with `whole`."""
    value = getattr(method, name)
    fits = isinstance(value, int) if whole else isinstance(value, int | float)
    if not fits or isinstance(value, bool) or not low <= value < math.inf:
        raise InputError(
            f"{name}={value!r} of {_called(method)} must be a {'whole ' if whole else ''}number, at least {low:g}."
        )


def _called(method: Any) -> str:
    return type(method).__name__
