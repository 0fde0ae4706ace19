"""Leave one out against the model encoding each shortened text."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from clipfast.methods.leave_one_out import LeaveOneOut
from clipfast.models.openclip import text_tower


def test_words_are_worth_what_the_score_loses_without_them(build_clip):
    model = build_clip(quick_gelu=True).double()
    images = F.normalize(torch.randn(3, 24, dtype=torch.float64), dim=-1)
    ids = torch.tensor([[298, 5, 7, 9, 33, 299, 0], [298, 50, 12, 299, 0, 0, 0]])
    words = torch.tensor([[0, 1, 2, 2, 3, 0, 0], [0, 1, 2, 0, 0, 0, 0]])

    def scores(kept):
        text = torch.tensor([kept + [0] * (20 - len(kept))])
        return F.normalize(model.encode_text(text), dim=-1)[0].detach() @ images.T

    explained = LeaveOneOut().text(text_tower(model), ids, words)
    maps = explained.maps(images)
    for row, word, found in zip(ids.tolist(), words, maps, strict=True):
        whole = [i for i in row if i > 0]
        for k in range(1, int(word.max()) + 1):
            without = [i for i, w in zip(row, word.tolist(), strict=True) if i > 0 and w != k]
            at = (word == k).nonzero()[:, 0]
            torch.testing.assert_close(found[:, at].sum(-1), scores(whole) - scores(without), rtol=0, atol=1e-10)
    # Only one of a word's two pieces carries no more than the other.
    assert torch.equal(maps[0, :, 2], maps[0, :, 3])
