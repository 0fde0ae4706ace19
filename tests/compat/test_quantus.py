"""Quantus' metrics with and without clipfast: the same scores, and no step alone."""

from __future__ import annotations

import numpy as np
import pytest
import quantus as theirs
import torch

import clipfast
from clipfast.compat import quantus as ours
from clipfast.compat.accelerate import accelerate
from clipfast.compat.score import Score
from clipfast.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def score(build_clip) -> Score:
    return Score(build_clip(), torch.randn(4, 24, generator=torch.Generator().manual_seed(0)), scale=10.0).eval()


@pytest.fixture
def batch() -> dict:
    rng = np.random.default_rng(0)
    return {
        "x_batch": rng.standard_normal((3, 3, 64, 64)).astype(np.float32),
        "y_batch": np.array([0, 3, 1]),
        "a_batch": rng.standard_normal((3, 1, 64, 64)).astype(np.float32),
    }


METRICS = {
    "PixelFlipping": {"features_in_step": 1024, "perturb_baseline": "black"},
    "RegionPerturbation": {"patch_size": 16, "regions_evaluation": 6},
    "random RegionPerturbation": {"patch_size": 16, "regions_evaluation": 4, "order": "random"},
}


def run(module, name: str, score: Score, batch: dict) -> np.ndarray:
    kind = getattr(module, name.split()[-1])
    np.random.seed(0)
    metric = kind(**METRICS[name], disable_warnings=True)
    return np.asarray(metric(model=score, softmax=False, device="cpu", channel_first=True, **batch), dtype=float)


@pytest.mark.parametrize("name", METRICS)
def test_scores_are_quantus(score, batch, name):
    expected = run(theirs, name, score, batch)
    np.testing.assert_allclose(run(ours, name, score, batch), expected, rtol=0, atol=1e-5)
    with accelerate("quantus", model=score.model) as (replay,):
        np.testing.assert_allclose(run(theirs, name, score, batch), expected, rtol=0, atol=1e-5)
        assert replay.calls > 1


def test_steps_go_through_the_model_together(score, batch, monkeypatch):
    sizes = []
    forward = Score.forward
    monkeypatch.setattr(Score, "forward", lambda self, x: sizes.append(len(x)) or forward(self, x))
    run(ours, "PixelFlipping", score, batch)
    # 12 steps of 3 images: the first alone, for its shape, and then all others at once.
    assert sizes == [3, 33]
    monkeypatch.setattr(ours, "_PACK", 6)
    sizes.clear()
    run(ours, "PixelFlipping", score, batch)
    assert sizes == [3, 6, 6, 6, 6, 6, 3]


def test_a_metric_that_looks_at_predictions_runs_as_it_always_did():
    class Model:
        calls = 0

        def predict(self, x):
            self.calls += 1
            return np.asarray(x).sum(1, keepdims=True)

    def evaluate(model):
        x = np.random.randn(2, 3)
        for _ in range(3):
            x = x + model.predict(x)
        return x

    np.random.seed(1)
    expected = evaluate(Model())
    np.random.seed(1)
    np.testing.assert_array_equal(ours._packed(evaluate, Model()), expected)


def test_road_works_on_images_of_several_channels(score, batch):
    options = {"model": score, "softmax": False, "device": "cpu", "channel_first": True, **batch}
    with pytest.raises(IndexError):
        theirs.ROAD(percentages=[20, 50], disable_warnings=True)(**options)
    metric = ours.ROAD(percentages=[20, 50], noise=0.0, disable_warnings=True)
    found = metric(**options)
    # One channel's worth of the highest values, in whichever channels: the released rule, on pixels.
    x, order = batch["x_batch"], np.argsort(-np.broadcast_to(batch["a_batch"], (3, 3, 64, 64)).reshape(3, -1), axis=1)
    hits = []
    for share in (0.2, 0.5):
        count = int(64 * 64 * share)
        filled = [ours.noisy_linear_imputation(x[i], order[i, :count], noise=0.0) for i in range(3)]
        with torch.no_grad():
            hits.append(score(torch.from_numpy(np.stack(filled))).argmax(-1).numpy() == batch["y_batch"])
    assert found == {20: pytest.approx(np.mean(hits[0])), 50: pytest.approx(np.mean(hits[1]))}


def test_imputation_is_quantus_own():
    from quantus.functions.perturb_func import noisy_linear_imputation as expected

    rng = np.random.default_rng(0)
    image = rng.standard_normal((3, 12, 10)).astype(np.float32)
    gone = rng.permutation(120)[:50]
    np.random.seed(0)
    wanted = expected(image, gone, noise=0.1)
    np.random.seed(0)
    np.testing.assert_allclose(ours.noisy_linear_imputation(image, gone, noise=0.1), wanted, rtol=0, atol=1e-6)


def test_mprt_randomises_a_copy_that_is_not_the_stand_ins(score, batch):
    found = []
    for module in (theirs, ours):
        torch.manual_seed(0)
        np.random.seed(0)
        metric = module.MPRT(layer_order="top_down", seed=1, disable_warnings=True)
        explain = ours.explain_func("saliency")
        options = {"model": score, "softmax": False, "device": "cpu", "channel_first": True, **batch, "a_batch": None}
        found.append(metric(explain_func=explain, **options))
    assert str(found[0]) == str(found[1])


@pytest.mark.parametrize("method", ["grad_eclip", "mga_clip", "rollout"])
def test_explanations_are_the_explainers(score, batch, method):
    found = ours.explain_func(method)(score, batch["x_batch"], batch["y_batch"], device="cpu")
    assert found.shape == (3, 1, 64, 64)
    explainer = clipfast.Explainer(score.model, method)
    for i, target in enumerate(batch["y_batch"]):
        maps = explainer(torch.from_numpy(batch["x_batch"][i : i + 1]), score.texts[target][None]).maps
        large = torch.nn.functional.interpolate(maps, size=(64, 64), mode="bilinear")[0]
        np.testing.assert_allclose(found[i], large, rtol=0, atol=1e-6 * float(large.abs().max()) + 1e-12)


def test_another_model_is_not_explained(batch):
    with pytest.raises(ModelError, match="Linear"):
        ours.explain_func()(torch.nn.Linear(2, 2), batch["x_batch"], batch["y_batch"])
