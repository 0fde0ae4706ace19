"""What all methods that watch the score of masked inputs share: the passes, packed, and the players of a game.

The score is linear in the embedding, so a pass serves every prompt: what is kept of it is one unit embedding, and
whatever is a weighted sum of scores is the same sum of embeddings times the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from clipfast.methods.base import LinearExplained, exact
from clipfast.models.families import AnyImageTower
from clipfast.models.text import AnyTextTower


@dataclass(frozen=True)
class Coalitions:
    """Which of M players are present, K times, and what each player's value takes from the score of each.

    members (K, M) bool. shares (M, K) float64: values = shares @ scores.
    """

    members: Tensor
    shares: Tensor


def every_pair(batch: int, masks: int) -> tuple[Tensor, Tensor]:
    """All pairs of B inputs and M masks, mask by mask: their inputs and their masks, (M * B,) each."""
    pairs = torch.arange(masks * batch)
    return pairs % batch, pairs // batch


def encode_pairs(
    tower: AnyImageTower | AnyTextTower,
    tokens: int,
    inputs: Tensor,
    masks: Tensor,
    encode: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Unit embeddings (R, E) of R pairs of an input and a mask, as many in one pass as the tower takes at once.

    tokens: how many an input has. inputs and masks (R,): indices, on the CPU. encode: some of them -> embeddings.
    """
    rows = tower.rows_at_once(tokens)
    return torch.cat([encode(*some) for some in zip(inputs.split(rows), masks.split(rows), strict=True)])


def encode_images(
    tower: AnyImageTower, x: Tensor, inputs: Tensor, masks: Tensor, masked: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`encode_pairs` of images x (B, 3, H, W); masked: inputs (r,), masks (r,) -> the changed images (r, 3, H, W)."""
    return encode_pairs(
        tower, math.prod(tower.grid_of(x)), inputs, masks, lambda some, under: tower.encode(masked(some, under))
    )


def whole_patches(tower: AnyImageTower, x: Tensor) -> Tensor:
    """Images x (B, 3, H, W) without the pixels beyond the last whole patch, which the tower does not see."""
    (rows, columns), (height, width) = tower.grid_of(x), tower.patch_size
    return x[..., : rows * height, : columns * width]


def every_subset(players: int) -> Tensor:
    """All 2^M sets of M players, from none to all: (2^M, M) bool."""
    return (torch.arange(2**players)[:, None] >> torch.arange(players)) % 2 > 0


def merge_repeated(members: Tensor) -> tuple[Tensor, Tensor]:
    """Sets (K, M) bool, each but once, and how often each came, float64: no set needs to be encoded twice."""
    found, counts = members.unique(dim=0, return_counts=True)
    return found, counts.double()


def explain_words(
    tower: AnyTextTower, ids: Tensor, words: Tensor, coalitions: Callable[[int], Coalitions]
) -> LinearExplained:
    """Texts (B, T) whose words are players: a token of a word that is not present is taken out of the sequence.

    The tokens behind it move up; what becomes free at the end is padding, or where that is seen as any other token is
    the text's last id: padding or the end of text. The pieces of a word fall together and share its value equally.
    words (B, T): as `Method.text` gets them. coalitions: of so many players.
    """
    if words.dtype == torch.bool:
        words = words.cumsum(-1) * words
    seen = tower.reach(ids)
    words = words.long()
    words[:, seen:] = 0
    counts = words.amax(-1).tolist()
    plans = {count: coalitions(count) for count in set(counts)}
    kept = [positions_kept(plans[count].members.to(ids.device), row) for count, row in zip(counts, words, strict=True)]
    sizes = [len(rows) for rows in kept]
    keep = torch.cat(kept)
    texts = torch.arange(len(ids)).repeat_interleave(torch.tensor(sizes))
    z = encode_pairs(
        tower,
        seen,
        texts,
        torch.arange(len(texts)),
        lambda text, row: tower.encode(without(ids[text.to(ids.device)], keep[row.to(ids.device)], tower.padding)),
    )
    values = z.new_zeros(len(ids), seen, z.shape[1])
    words = words[:, :seen]
    for count, row, embeddings, value in zip(counts, words, z.split(sizes), values, strict=True):
        wide = exact(embeddings)
        of_words = (plans[count].shares.to(wide.device) @ wide).to(z)  # (W, E)
        pieces = row.bincount(minlength=count + 1)[1:]
        inside = row > 0
        value[inside] = (of_words / pieces[:, None])[row[inside] - 1]
    return LinearExplained(tower.encode(ids), values, (words > 0).to(z.dtype), "none")


def positions_kept(members: Tensor, words: Tensor) -> Tensor:
    """Which positions of texts with words (K, T), or (T,) where all have the same, stay for sets (K, W): (K, T)."""
    return torch.cat((torch.ones_like(members[:, :1]), members), dim=1).gather(1, words.expand(len(members), -1))


def without(ids: Tensor, keep: Tensor, padding: int | None = None) -> Tensor:
    """Token ids (R, T) with only those to keep (R, T), moved together; the rest is padding, or repeats the last id."""
    order = (~keep).int().argsort(dim=-1, stable=True)
    places = torch.arange(ids.shape[1], device=ids.device)
    rest = ids[:, -1:] if padding is None else padding
    return torch.where(places < keep.sum(-1, keepdim=True), ids.gather(1, order), rest)
