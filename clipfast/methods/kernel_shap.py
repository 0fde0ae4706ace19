"""Kernel SHAP: Shapley values by weighted regression (Lundberg and Lee, NeurIPS 2017, theorem 2).

    min_phi  sum_S w(S) ( S(x_S) - S(x_none) - sum_{i in S} phi_i )^2     so that  sum_i phi_i = S(x) - S(x_none)
    w(S) = (M - 1) / ( C(M, |S|) |S| (M - |S|) )

x_S keeps the players in S of M. The regression's matrix depends on the coalitions alone: one matrix turns every
image's and every prompt's scores into values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clipfast.errors import InputError
from clipfast.methods.base import LinearExplained, Method, MethodInfo, at_least, exact
from clipfast.methods.masking import (
    Coalitions,
    encode_images,
    every_pair,
    every_subset,
    explain_words,
    merge_repeated,
    whole_patches,
)
from clipfast.models.families import AnyImageTower
from clipfast.models.text import TextTower


@dataclass(frozen=True)
class KernelShap(Method):
    """Kernel SHAP, signed. Every image gets the same coalitions, on any device and in a batch of any size.

    samples: how many coalitions are drawn, none and all included: their sizes with the probability (M - 1) / (k (M -
        k)) that the kernel gives them, and then any as likely, so that the regression needs no further weights. Where
        there are no more than `samples` coalitions, each is evaluated once: exact Shapley values.
    players: along each side of an image; a player is a rectangle of patches. An absent player's pixels are zero, the
        mean colour; its patches share its value equally, so that a map adds up to S(x) - S(x_none).
    seed: of the coalitions.

    The constraint is kept exactly, by elimination, where captum gives none and all a large weight. Words: each is a
    player; an absent one leaves the sequence.

    Raises InputError for numbers out of range, and where there are fewer samples than players.
    """

    samples: int = 1000
    players: int = 7
    seed: int = 0

    signed = True
    info: ClassVar = MethodInfo(
        source="Lundberg and Lee, NeurIPS 2017",
        forwards="samples + 1",
        backwards="0",
        prompt_free=True,
        agrees="captum's KernelShap with the same coalitions to 1e-5; exact Shapley values by enumeration to 1e-10",
        our_reading="players are rectangles of patches whose value is shared equally by their patches; absent words "
        "leave the sequence and the tokens behind them move up",
    )

    needs: ClassVar = "pixels"

    def __post_init__(self) -> None:
        at_least(self, "samples", 2, whole=True)
        at_least(self, "players", 1, whole=True)
        at_least(self, "seed", 0, whole=True)

    @property
    def has_features(self) -> bool:
        return True

    @torch.no_grad()
    def image(self, tower: AnyImageTower, x: Tensor) -> LinearExplained:
        """Prepare normalised images (B, 3, H, W); n is the number of patches, row by row."""
        seen, grid, (height, width) = whole_patches(tower, x), tower.grid_of(x), tower.patch_size
        player = self.players_of(grid).to(x.device)
        sizes = player.bincount()
        coalitions = self.coalitions(len(sizes))
        members = coalitions.members.to(x.device)

        def masked(images: Tensor, sets: Tensor) -> Tensor:
            patches = members[sets.to(x.device)][:, player].unflatten(1, grid)
            return seen[images] * patches.repeat_interleave(height, 1).repeat_interleave(width, 2)[:, None]

        z = encode_images(tower, x, *every_pair(len(x), len(members)), masked)
        scores = exact(z.unflatten(0, (len(members), len(x))).transpose(0, 1))  # (B, K, E)
        shares = coalitions.shares.to(scores.device) / sizes.to(scores.device)[:, None]
        values = (shares @ scores).to(z)[:, player]
        return LinearExplained(tower.encode(x), values, values.new_ones(values.shape[:2]), "none")

    @torch.no_grad()
    def text(self, tower: TextTower, ids: Tensor, words: Tensor) -> LinearExplained:
        """Prepare token ids (B, T)."""
        return explain_words(tower, ids, words, self.coalitions)

    def players_of(self, grid: tuple[int, int]) -> Tensor:
        """Which player each patch of a grid (h, w) belongs to: (h * w,)."""
        rows, columns = (torch.arange(side) * min(self.players, side) // side for side in grid)
        return (rows[:, None] * min(self.players, grid[1]) + columns).flatten()

    def coalitions(self, players: int) -> Coalitions:
        """The coalitions of so many players, and what turns their scores into values."""
        if 2**players <= self.samples:
            members = every_subset(players)
            sizes = members.sum(-1).tolist()
            weights = torch.tensor([_kernel(players, size) for size in sizes], dtype=torch.float64)
        else:
            if self.samples <= players:
                raise InputError(
                    f"samples={self.samples} cannot tell {players} players apart: give at least {players + 1}."
                )
            members, weights = merge_repeated(self._draw(players))
        return Coalitions(members, _regression(members.double(), weights))

    def _draw(self, players: int) -> Tensor:
        """`samples` coalitions (K, M): none, all, and random ones."""
        generator = torch.Generator().manual_seed(self.seed)
        count = self.samples - 2
        sizes = torch.arange(1, players, dtype=torch.float64)
        likely = 1 / (sizes * (players - sizes))
        size = torch.multinomial(likely, max(count, 1), replacement=True, generator=generator)[:count] + 1
        order = torch.rand(count, players, generator=generator, dtype=torch.float64).argsort(-1).argsort(-1)
        ends = torch.tensor([[False], [True]]).expand(2, players)
        return torch.cat((ends, order < size[:, None]))


def _kernel(players: int, size: int) -> float:
    """The kernel's weight of one coalition; none and all are held by the constraint."""
    if size in (0, players):
        return 0.0
    return (players - 1) / (math.comb(players, size) * size * (players - size))


def _regression(members: Tensor, weights: Tensor) -> Tensor:
    """The matrix (M, K) that turns scores of coalitions (K, M), one of them none and one all, into Shapley values.

    With phi = (S(x) - S(x_none)) / M + psi the constraint says that psi adds up to zero. Its regression has the
    coalitions less each one's mean for its matrix, and no constraint left.
    """
    players = members.shape[1]
    size = members.sum(-1)
    none, every = (size == 0).double(), (size == players).double()
    share = (every - none) / players
    centred = members - size[:, None] / players
    weighted = (centred * (weights * (1 - none - every))[:, None]).mT  # (M, K)
    solve = torch.linalg.pinv(weighted @ centred, hermitian=True, rtol=1e-10) @ weighted
    # psi explains what is left of the scores once S(x_none) and the mean shares are taken off them.
    return share + solve - solve.sum(-1, keepdim=True) * none - (solve @ size)[:, None] * share
