"""The text side: what token ids become, and which tokens see which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.errors import InputError
from clipfast.models.layers import Chain, Norm
from clipfast.models.tower import Tower, rows_at_once

Pooling = Literal["argmax", "eos", "first", "last", "mean"]
POOLINGS: tuple[Pooling, ...] = ("argmax", "eos", "first", "last", "mean")


@dataclass(frozen=True)
class Embedding:
    """Token ids (B, T) as tokens (B, T, D): norm(scale table[id] + positions[place]).

    table (V, D). positions (P, D): None where the blocks tell places apart themselves. uncounted: the id of padding
    that takes no place, so that the first other token is at 0; None: every token takes one.
    """

    table: Tensor
    positions: Tensor | None
    scale: float = 1.0
    norm: Norm | Chain = Chain()  # noqa: RUF009 (frozen)
    uncounted: int | None = None

    def __call__(self, ids: Tensor, blank: Tensor | None = None) -> Tensor:
        """blank (B, T): True for tokens of which no more than the place is left."""
        t = self.table[ids]
        if self.scale != 1:
            t = t * self.scale
        if blank is not None:
            t = t.masked_fill(blank[..., None], 0.0)
        if self.positions is None:
            return self.norm(t)
        if self.uncounted is None:
            return self.norm(t + self.positions[: ids.shape[1]])
        places = (ids != self.uncounted).cumsum(1) - 1
        return self.norm(t + self.positions[places.clamp(min=0)])


@dataclass(frozen=True)
class Sequences:
    """A batch of texts as the blocks run them, without tokens at the end that have no influence.

    h (B, N, D): input of block 0. length: how many of its tokens are the texts' own, the first ones of their ids; what
    the tower adds comes behind them. pooled, mask, visible: as `Tower.run`, `Tower.site` and `Tower.finish` take them.
    """

    h: Tensor
    length: int
    pooled: Tensor
    mask: Tensor | None
    visible: Tensor | None

    @property
    def own(self) -> slice:
        """The texts' own tokens among all."""
        return slice(None, self.length)

    def at(self, inputs: Tensor, h: Tensor) -> Sequences:
        """Other tokens h (R, N, D) in the place of those of the texts `inputs` (R,)."""
        visible = None if self.visible is None else self.visible[inputs]
        return Sequences(h, self.length, self.pooled[inputs], rows_of(self.mask, inputs), visible)


def rows_of(mask: Tensor | None, inputs: Tensor) -> Tensor | None:
    """An additive mask (B, 1 or H, 1 or N, N) for some of the inputs; one that all of them share stays as it is."""
    return mask if mask is None or mask.ndim < 4 or len(mask) == 1 else mask[inputs]


@dataclass(frozen=True, kw_only=True)
class TextTower(Tower):
    """A text transformer.

    pool: the token whose output is the embedding: "argmax" (the one with the largest id, EOT), "eos" (the first
        `eot_id`), "first" or "last"; or the "mean" of all but padding.
    context_length: how many tokens a text may have.
    padding: the id of tokens that none attends to; None where padding is seen as any other token is.
    appended (D,): a token behind the last id whose output is the embedding instead (CoCa). shifted: it counts among
        the tokens as the first one when padding is hidden, so that all are taken for the one before them, as CoCa's
        published weights were trained.
    bias: for so many tokens T, what is added to the products of queries and keys in every block: (1, H, T, T).
    """

    embedding: Embedding
    context_length: int
    pool: Pooling
    eot_id: int = -1
    padding: int | None = None
    appended: Tensor | None = None
    shifted: bool = False
    bias: Callable[[int], Tensor] | None = None

    def read(self, ids: Tensor, *, blank: Tensor | None = None, whole: bool = False) -> Sequences:
        """Token ids (B, T) as the blocks run them.

        blank (B, T): as `Embedding` takes it. whole: with the tokens at the end that have no influence.
        """
        length = ids.shape[1] if whole else self.reach(ids)
        own = ids[:, :length]
        h = self.embedding(own, None if blank is None else blank[:, :length])
        if self.appended is not None:
            assert self.embedding.positions is not None
            last = self.appended + self.embedding.positions[ids.shape[1]]
            h = torch.cat((h, last.to(h.dtype).expand(len(h), 1, -1)), dim=1)
            pooled = torch.full_like(ids[:, 0], length)
        else:
            pooled = self.pooled(own)
        count = h.shape[1]
        seen = self._seen(ids, length)
        visible = seen
        mask = None if seen is None else torch.where(seen, 0.0, -torch.inf).to(self.dtype)[:, None, None]
        if self.causal:
            later = torch.full((count, count), -torch.inf, device=self.device, dtype=self.dtype).triu_(1)
            mask = later if mask is None else mask + later
            before = torch.arange(count, device=ids.device) <= pooled[:, None]
            visible = before if seen is None else before & seen
        if self.bias is not None:
            bias = self.bias(count).to(self.dtype)
            mask = bias if mask is None else mask + bias
        return Sequences(h.to(self.dtype), length, pooled, mask, visible)

    def pooled(self, ids: Tensor) -> Tensor:
        """The pooled position of each row of token ids (B, T): (B,); weights (B, T) of a mean."""
        if self.pool == "argmax":
            return ids.argmax(dim=-1)
        if self.pool == "eos":
            return ids.eq(self.eot_id).int().argmax(dim=-1)
        if self.pool == "mean":
            counted = torch.ones_like(ids) if self.padding is None else (ids != self.padding)
            return counted.to(self.result_dtype) / counted.sum(1, keepdim=True)
        return torch.full_like(ids[:, 0], 0 if self.pool == "first" else ids.shape[1] - 1)

    def lengths(self, ids: Tensor) -> Tensor:
        """How many of its tokens (B, T) decide on each text's embedding, from the first on: (B,)."""
        if self.causal and self.appended is None:
            return self.pooled(ids) + 1
        if self.padding is None or self.pool == "last":
            return torch.full_like(ids[:, 0], ids.shape[1])
        places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        last = (places * (ids != self.padding)).amax(1) + int(self.shifted)
        if self.pool in ("argmax", "eos"):
            last = last.maximum(self.pooled(ids) + 1)
        return last.clamp(1, ids.shape[1])

    def reach(self, ids: Tensor) -> int:
        """How many positions of token ids (B, T) matter for any of the texts."""
        return int(self.lengths(ids).max())

    def encode(self, ids: Tensor) -> Tensor:
        """Unit embeddings (B, E) of token ids (B, T)."""
        texts = self.read(ids)
        return self.finish(texts.h, texts.pooled, mask=texts.mask, visible=texts.visible)

    def _seen(self, ids: Tensor, length: int) -> Tensor | None:
        """Which of the first `length` tokens, and of what is appended, are attended to: (B, N), or None for all."""
        if self.padding is None:
            return None
        seen = ids != self.padding
        if self.appended is not None:
            seen = F.pad(seen, (1, 0) if self.shifted else (0, 1), value=True)
            seen = torch.cat((seen[:, :length], seen[:, -1:]), dim=1)
        else:
            seen = seen[:, :length]
        # A mask costs the attention its fastest form; texts of one length need none.
        return None if bool(seen.all()) else seen


@dataclass(frozen=True)
class OpaqueText:
    """A text encoder whose structure is not known: it gives embeddings of whole texts, and nothing of its tokens.

    encoder: token ids (B, T) -> embeddings (B, E). why: what of its structure is not known. padding: as in `TextTower`.
    """

    encoder: Callable[[Tensor], Tensor]
    context_length: int
    result_dtype: torch.dtype
    device: torch.device
    logit_scale: float
    why: str
    padding: int | None = None

    def read(self, ids: Tensor, *, blank: Tensor | None = None, whole: bool = False) -> NoReturn:
        """Raises InputError: it has no tokens to be read."""
        self._refuse()

    @property
    def depth(self) -> NoReturn:
        """Raises InputError: its blocks are not known."""
        self._refuse()

    trunk = depth

    def _refuse(self) -> NoReturn:
        raise InputError(
            "this model's text encoder gives embeddings alone, so that its words can only be explained by leaving them "
            f"out (leave_one_out, kernel_shap, rise): {self.why}"
        )

    def lengths(self, ids: Tensor) -> Tensor:
        return torch.full_like(ids[:, 0], ids.shape[1])

    def reach(self, ids: Tensor) -> int:
        return ids.shape[1]

    def encode(self, ids: Tensor) -> Tensor:
        """Unit embeddings (B, E) of token ids (B, T)."""
        return F.normalize(self.encoder(ids).to(self.result_dtype), dim=-1)

    def rows_at_once(self, tokens: int, *, gradients: bool = False) -> int:
        return rows_at_once(self.device, tokens, gradients)


AnyTextTower = TextTower | OpaqueText
"""What the text side of a model may be read as."""
