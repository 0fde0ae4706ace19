"""The words of texts in the joint space: what a method reads that maps single words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenStates:
    """P texts and their W words, counted through text by text, as `Model.token_states` finds them.

    texts (P, E): unit embeddings, the model's own. names: the words of each text, in reading order.
    words (W, E): each word's state, the mean of its tokens' unit states. It is left shorter than one: its product
        with a unit vector is then the mean of the tokens' cosines.
    """

    texts: Tensor
    names: list[list[str]]
    words: Tensor

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def by_text(self) -> tuple[Tensor, ...]:
        """The states of each text's words, P tensors (W_p, E)."""
        return self.words.split([len(names) for names in self.names])

    @cached_property
    def means(self) -> Tensor:
        """For each text the mean of its words' states: (P, E)."""
        return torch.stack([words.mean(0) for words in self.by_text])

    def select(self, *indices: int) -> TokenStates:
        """Some of the texts, in this order."""
        chosen = list(indices)
        words = torch.cat([self.by_text[i] for i in chosen])
        return TokenStates(self.texts[chosen], [self.names[i] for i in chosen], words)

    def phrase(self, index: int, words: Sequence[str]) -> Tensor | None:
        """The mean state (E,) of the first run of these words in text `index`; None where they do not follow so."""
        names, wanted = [[w.casefold() for w in run] for run in (self.names[index], words)]
        for start in range(len(names) - len(wanted) + 1):
            if names[start : start + len(wanted)] == wanted:
                return self.by_text[index][start : start + len(wanted)].mean(0)
        return None


def word_states(states: Tensor, spans: Sequence[Sequence[Sequence[int]]]) -> tuple[Tensor, ...]:
    """The mean over each word's positions, for B texts: B tensors (W_b, E).

    states (B, T, E): of every token. spans: for each text, for each word, its positions.
    """
    rows = [row for row, words in enumerate(spans) for positions in words for _ in positions]
    places = [place for words in spans for positions in words for place in positions]
    sizes = torch.tensor([len(positions) for words in spans for positions in words], device=states.device)
    means = torch.segment_reduce(states[rows, places], "mean", lengths=sizes, axis=0)
    return means.split([len(words) for words in spans])
