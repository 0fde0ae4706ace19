"""torchcam's LeGrad and metrics for CLIP: its numbers, where it can run at all."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torchcam import methods as theirs
from torchcam import metrics as their_metrics

import clipfast
from clipfast.compat import torchcam as ours
from clipfast.compat.score import Score
from clipfast.errors import InputError, ModelError


@pytest.fixture
def score(build_clip) -> Score:
    texts = torch.randn(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Score(build_clip().double(), texts).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_legrad_is_the_methods(score, x):
    blocks = list(score.module.visual.transformer.resblocks)
    raw = clipfast.Explainer(score.model, "legrad", layers=2)(x, score.texts).maps
    with ours.LeGrad(score, blocks[-2:]) as extractor:
        scores = score(x)
        (same,) = extractor(1, scores, normalized=False)
        (own,) = extractor([0, 2], scores)
    torch.testing.assert_close(same, raw[:, 1] / 2)
    chosen = torch.stack([raw[0, 0], raw[1, 2]]) / 2
    low = chosen - chosen.flatten(1).amin(1)[:, None, None]
    torch.testing.assert_close(own, low / (low.flatten(1).amax(1)[:, None, None] + 1e-8))
    assert not score._forward_pre_hooks


def test_what_cannot_be_asked(score, x):
    blocks = list(score.module.visual.transformer.resblocks)
    with pytest.raises(InputError, match="last ones"):
        ours.LeGrad(score, blocks[:2])
    with pytest.raises(ModelError, match="Score"):
        ours.LeGrad(score.module)
    extractor = ours.LeGrad(score)
    with pytest.raises(InputError, match="run the score"):
        extractor(0)
    score(x)
    with pytest.raises(InputError, match="3 came for 2 images"):
        extractor([0, 1, 2])


@pytest.mark.parametrize("kind", ["DeletionInsertionMetric", "ClassificationMetric"])
def test_metrics_are_torchcams(score, x, kind):
    summaries = []
    for module in (their_metrics, ours):
        extractor = ours.LeGrad(score)
        metric = getattr(module, kind)(extractor, partial(torch.softmax, dim=-1))
        metric.update(x, 1)
        metric.update(x, [0, 2])
        summaries.append(metric.summary())
        extractor.remove_hooks()
    assert summaries[0].keys() == summaries[1].keys()
    for name, value in summaries[0].items():
        assert summaries[1][name] == pytest.approx(value, abs=1e-9), name


def test_literal_curves_with_any_model():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1, bias=False)
            nn.init.ones_(self.conv.weight)

        def forward(self, image: Tensor) -> Tensor:
            return self.conv(image).flatten(1).sum(1, keepdim=True)

    model, image = Sum().eval(), torch.tensor([[[[0.4, 0.3], [0.2, 0.1]]]])
    with theirs.GradCAM(model, "conv") as extractor:
        metric = ours.DeletionInsertionMetric(extractor, steps=2)
        metric.update(image, 0)
    found = metric.summary()
    assert found["deletion_auc"] == pytest.approx(0.4, abs=1e-6)
    assert found["insertion_auc"] == pytest.approx(0.6, abs=1e-6)


def test_metrics_ask_for_no_gradients_of_the_models_weights(score, x):
    extractor = ours.LeGrad(score)
    ours.DeletionInsertionMetric(extractor).update(x, 0)
    assert all(p.grad is None for p in score.parameters())
