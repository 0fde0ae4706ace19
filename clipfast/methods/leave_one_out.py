"""Leave one out: what the score loses without a word, S(text) - S(text without the word)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clipfast.methods.base import LinearExplained, Method, MethodInfo
from clipfast.methods.masking import Coalitions, explain_words
from clipfast.models.text import TextTower


@dataclass(frozen=True)
class LeaveOneOut(Method):
    """Leave one out, for texts; signed. The word left out leaves the sequence and the tokens behind it move up."""

    signed = True
    info: ClassVar = MethodInfo(
        source="Li, Monroe and Jurafsky, 2016 (erasure)",
        forwards="words + 1",
        backwards="0",
        prompt_free=True,
        agrees="each text encoded anew by the model itself: 1e-10 in float64",
        our_reading="a word that is left out leaves the sequence and the tokens behind it move up",
    )

    @torch.no_grad()
    def text(self, tower: TextTower, ids: Tensor, words: Tensor) -> LinearExplained:
        """Prepare token ids (B, T)."""
        return explain_words(tower, ids, words, _coalitions)


def _coalitions(words: int) -> Coalitions:
    one = torch.eye(words)
    members = torch.cat((torch.ones(1, words), 1 - one)) > 0
    return Coalitions(members, torch.cat((torch.ones(words, 1), -one), dim=1).double())
