from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

import clipfast.native
from clipfast.errors import BackendError, InputError
from clipfast.ops.dispatch import backend
from clipfast.ops.gmm_threshold import Mixture, fit_mixture, gmm_threshold

needs_native = pytest.mark.skipif(
    clipfast.native.problem("_native") is not None, reason="the native module is not built here"
)
BACKENDS = pytest.mark.parametrize("name", ["torch", pytest.param("native", marks=needs_native)])


def maps(count: int, size: int, seed: int = 0) -> Tensor:
    """float64 maps (count, size) as similarities are: a background, and on some patches something above it."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g, dtype=torch.float64)

    background = 0.2 + 0.02 * torch.randn(count, size, generator=g, dtype=torch.float64)
    return background + (uniform(count, size) < 0.5 * uniform(count, 1)) * 0.2 * uniform(count, 1)


def by_hand(scores: list[float]) -> tuple[list[float], list[float], list[float], list[float], int, float, float]:
    """Means, variances, weights, posteriors of the higher, iterations, centre and deviation: one score at a time."""
    n = len(scores)
    centre = math.fsum(scores) / n
    deviation = math.sqrt(math.fsum((s - centre) ** 2 for s in scores) / n)
    if max(scores) == min(scores):
        centre, deviation = scores[0], 0.0
    z = [(s - centre) / (deviation or 1.0) for s in scores]

    def quantile(fraction: float) -> float:
        position = fraction * (n - 1)
        k = math.floor(position)
        below, above = sorted(z)[k], sorted(z)[min(k + 1, n - 1)]
        return below + (position - k) * (above - below)

    m = [quantile(0.25), quantile(0.75)]
    if m[1] - m[0] < 1e-3:
        m = [min(z), max(z)]
    v, w = [1.0, 1.0], [0.5, 0.5]

    def expect() -> tuple[float, list[list[float]]]:
        total, posteriors = 0.0, []
        for x in z:
            logs = [
                math.log(w[k]) - 0.5 * math.log(2 * math.pi * v[k]) - (x - m[k]) ** 2 / (2 * v[k]) for k in range(2)
            ]
            both = max(logs) + math.log(sum(math.exp(one - max(logs)) for one in logs))
            total += both
            posteriors.append([math.exp(one - both) for one in logs])
        return total / n, posteriors

    previous, iterations = -math.inf, 0
    while iterations < 100:
        likelihood, r = expect()
        mass = [math.fsum(one[k] for one in r) + 10 * 2.0**-52 for k in range(2)]
        m = [math.fsum(one[k] * x for one, x in zip(r, z, strict=True)) / mass[k] for k in range(2)]
        v = [
            math.fsum(one[k] * (x - m[k]) ** 2 for one, x in zip(r, z, strict=True)) / mass[k] + 1e-6 for k in range(2)
        ]
        w = [mass[k] / sum(mass) for k in range(2)]
        iterations += 1
        if abs(likelihood - previous) < 1e-3:
            break
        previous = likelihood
    low, high = (0, 1) if m[0] <= m[1] else (1, 0)
    m, v, w = [m[low], m[high]], [v[low], v[high]], [w[low], w[high]]
    return m, v, w, [one[1] for one in expect()[1]], iterations, centre, deviation


def check_by_hand(name: str, scores: list[float], tolerance: float) -> None:
    m, v, w, posterior, iterations, centre, deviation = by_hand(scores)
    tensor = torch.tensor(scores, dtype=torch.float64)
    with backend(name):
        fitted = fit_mixture(tensor)
        soft, hard = gmm_threshold(tensor), gmm_threshold(tensor, "hard")
    close: dict[str, Any] = {"rtol": tolerance, "atol": tolerance}
    assert fitted.means.tolist() == pytest.approx([centre + deviation * one for one in m], rel=tolerance, abs=tolerance)
    assert fitted.variances.tolist() == pytest.approx([deviation**2 * one for one in v], rel=tolerance, abs=tolerance)
    assert fitted.weights.tolist() == pytest.approx(w, rel=tolerance, abs=tolerance)
    assert int(fitted.iterations) == iterations
    expected = torch.tensor(posterior, dtype=torch.float64)
    torch.testing.assert_close(fitted.posterior, expected, **close)
    height = (tensor - (centre + deviation * m[0])).clamp(min=0)
    torch.testing.assert_close(soft, height * expected, **close)
    torch.testing.assert_close(hard, height * (fitted.posterior >= 0.5), **close)


@BACKENDS
@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 70), seed=st.integers(0, 10_000))
def test_agrees_with_a_loop_over_scores(name: str, size: int, seed: int) -> None:
    check_by_hand(name, maps(1, size, seed)[0].tolist(), 1e-9)


@BACKENDS
@settings(max_examples=40, deadline=None)
@given(scores=st.lists(st.sampled_from([-0.5, 0.0, 0.1, 0.125, 0.3, 1.0]), min_size=1, max_size=40))
def test_agrees_with_a_loop_where_scores_are_alike(name: str, scores: list[float]) -> None:
    check_by_hand(name, scores, 1e-9)


@pytest.fixture(scope="module")
def thousand() -> tuple[Tensor, list[tuple[Any, ...]]]:
    """Maps, constants and two-value maps among them, and what scikit-learn, started as we start, fits to each."""
    scores = maps(1000, 196)
    scores[:3] = torch.tensor([0.3, 0.0, -1.0], dtype=torch.float64)[:, None]
    for row, share in enumerate((1, 20, 98, 150, 195), start=3):
        scores[row] = torch.where(torch.arange(196) < share, 0.1, 0.7)
    fits = []
    for x in scores.numpy():
        centre, deviation = (x.mean(), x.std()) if x.max() > x.min() else (x[0], 0.0)
        z = (x - centre) / (deviation or 1.0)
        start = np.quantile(z, [0.25, 0.75])
        if start[1] - start[0] < 1e-3:
            start = np.array([z.min(), z.max()])
        model = GaussianMixture(
            2,
            covariance_type="spherical",
            tol=1e-3,
            reg_covar=1e-6,
            max_iter=100,
            means_init=start[:, None],
            weights_init=[0.5, 0.5],
            precisions_init=[1.0, 1.0],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(z[:, None])
        order = np.argsort(model.means_[:, 0], kind="stable")
        means, variances = model.means_[order, 0] * deviation + centre, model.covariances_[order] * deviation**2
        posterior = model.predict_proba(z[:, None])[:, order[1]]
        fits.append((means, variances, model.weights_[order], posterior, model.n_iter_))
    return scores, fits


@BACKENDS
def test_agrees_with_scikit_learn_on_a_thousand_maps(name: str, thousand: tuple[Tensor, list[tuple[Any, ...]]]) -> None:
    scores, theirs = thousand
    with backend(name):
        ours = fit_mixture(scores)
    for field, values in zip(ours, zip(*theirs, strict=True), strict=True):
        np.testing.assert_allclose(field.numpy(), np.stack(values), rtol=1e-7, atol=1e-9)


def assert_close(ours: Mixture, exact: Mixture) -> None:
    """To 1e-5, relative, but for the few maps whose likelihood changes by so nearly 1e-3 that rounding decides when
    they stop."""
    alike = ours.iterations == exact.iterations
    assert (~alike).sum() <= max(1, len(alike) // 500)
    for name in ("means", "variances", "weights", "posterior"):
        a, b = getattr(ours, name)[alike].double(), getattr(exact, name)[alike].double()
        assert (a - b).norm() <= 1e-5 * b.norm(), name


@BACKENDS
@pytest.mark.parametrize("size", [2, 3, 7, 8, 9, 49, 196, 577, 1024, 5000])
def test_float32_agrees_with_the_definition_in_float64(name: str, size: int) -> None:
    scores = maps(1000 if size < 577 else 40, size).float()
    with backend("torch"):
        exact, expected = fit_mixture(scores.double()), gmm_threshold(scores.double())
    with backend(name):
        ours, soft = fit_mixture(scores), gmm_threshold(scores)
    assert ours.means.dtype == ours.posterior.dtype == soft.dtype == torch.float32
    assert_close(ours, exact)
    alike = ours.iterations == exact.iterations
    assert (soft.double() - expected)[alike].norm() <= 1e-5 * expected[alike].norm()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_native_gives_the_same_bits_on_every_processor_and_number_of_threads(dtype: torch.dtype) -> None:
    scores = maps(500, 201).to(dtype)
    results = []
    for threads, portable in ((1, False), (1, True), (3, False)):
        out, parameters = torch.full_like(scores, torch.nan), torch.full((500, 7), torch.nan, dtype=dtype)
        clipfast.native.module("_native").gmm_threshold(
            scores=scores.data_ptr(),
            wide=dtype == torch.float64,
            strides=scores.stride(),
            maps=500,
            size=201,
            hard=False,
            out=out.data_ptr(),
            parameters=parameters.data_ptr(),
            posterior=0,
            threads=threads,
            portable=portable,
        )
        results.append(torch.cat([out, parameters], dim=1))
    assert not results[0].isnan().any()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@BACKENDS
class TestResult:
    def test_two_values(self, name: str) -> None:
        scores = torch.tensor([0.1, 0.1, 0.1, 0.6, 0.1, 0.1, 0.1, 0.1])
        with backend(name):
            for threshold in ("soft", "hard"):
                expected = torch.tensor([0, 0, 0, 0.5, 0, 0, 0, 0])
                torch.testing.assert_close(gmm_threshold(scores, threshold), expected, rtol=1e-5, atol=1e-6)

    def test_constant_maps_are_zeros(self, name: str) -> None:
        scores = torch.tensor([0.0, -0.0, 0.3, -7e20, 1e-40])[:, None].expand(5, 23)
        with backend(name):
            assert not gmm_threshold(scores).any()
            assert not gmm_threshold(scores, "hard").any()
            assert not gmm_threshold(torch.tensor([[5.0]])).any()

    def test_none_returns_a_copy_of_the_scores(self, name: str) -> None:
        scores = maps(4, 9).float().T
        with backend(name):
            kept = gmm_threshold(scores, "none")
        assert torch.equal(kept, scores)
        assert kept.data_ptr() != scores.data_ptr()

    def test_never_below_zero_and_zero_below_the_lower_mean(self, name: str) -> None:
        scores = maps(300, 196)
        with backend(name):
            soft, hard, fitted = gmm_threshold(scores), gmm_threshold(scores, "hard"), fit_mixture(scores)
        below = scores < fitted.means[:, :1] - 1e-12
        assert below.any()
        for result in (soft, hard):
            assert (result >= 0).all()
            assert not result[below].any()
        assert torch.equal(hard > 0, (fitted.posterior >= 0.5) & (scores > fitted.means[:, :1]))

    def test_the_order_of_the_scores_does_not_matter(self, name: str) -> None:
        scores = maps(100, 196)
        shuffled = torch.randperm(196, generator=torch.Generator().manual_seed(1))
        with backend(name):
            torch.testing.assert_close(gmm_threshold(scores[:, shuffled]), gmm_threshold(scores)[:, shuffled])

    def test_a_shift_does_not_matter(self, name: str) -> None:
        scores = (maps(200, 196) * 2**16).round() / 2**16  # so that adding 100 is exact
        with backend(name):
            assert torch.equal(gmm_threshold(scores + 100), gmm_threshold(scores))

    def test_it_scales_with_the_scores(self, name: str) -> None:
        scores = maps(200, 196).float()
        with backend(name):
            large = gmm_threshold(scores * 2**60) / 2**60
            torch.testing.assert_close(large, gmm_threshold(scores), rtol=0, atol=1e-30)  # there is underflow in these
            torch.testing.assert_close(gmm_threshold(scores.double() * 3), gmm_threshold(scores.double()) * 3)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_spoils_its_own_map_alone(self, name: str, bad: float) -> None:
        scores = maps(3, 50).float()
        spoiled = scores.clone()
        spoiled[1, 17] = bad
        with backend(name):
            for threshold in ("soft", "hard"):
                result = gmm_threshold(spoiled, threshold)
                assert result[1].isnan().all()
                assert torch.equal(result[::2], gmm_threshold(scores, threshold)[::2])
            fitted = fit_mixture(spoiled)
        assert fitted.means[1].isnan().all()
        assert fitted.posterior[1].isnan().all()
        assert int(fitted.iterations[1]) == 1

    def test_any_strides_and_dimensions(self, name: str) -> None:
        scores = maps(12, 50).float()
        with backend(name):
            expected = gmm_threshold(scores)
            padded = torch.full((12, 2, 101), torch.nan)
            padded[:, 0, 1::2] = scores
            folded = gmm_threshold(scores.view(3, 4, 50).transpose(0, 1)).transpose(0, 1)
            torch.testing.assert_close(gmm_threshold(padded[:, 0, 1::2]), expected)
            torch.testing.assert_close(gmm_threshold(scores.T.contiguous().T), expected)
            torch.testing.assert_close(folded.reshape(12, 50), expected)
            torch.testing.assert_close(gmm_threshold(scores[5]), expected[5])
            torch.testing.assert_close(gmm_threshold(scores[:1].expand(4, 50)), expected[:1].expand(4, 50))
            assert gmm_threshold(scores[:0]).shape == (0, 50)
            fitted = fit_mixture(scores.view(3, 4, 50))
            assert [t.shape for t in fitted] == [(3, 4, 2)] * 3 + [(3, 4, 50), (3, 4)]
            assert [t.shape for t in fit_mixture(scores[:0])] == [(0, 2)] * 3 + [(0, 50), (0,)]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_precision_is_computed_in_float32(self, name: str, dtype: torch.dtype) -> None:
        scores = maps(20, 196).to(dtype)
        with backend(name):
            assert torch.equal(gmm_threshold(scores), gmm_threshold(scores.float()))

    def test_the_input_is_left_alone(self, name: str) -> None:
        scores = maps(5, 50).float().requires_grad_()
        before = scores.detach().clone()
        with backend(name):
            result = gmm_threshold(scores)
        assert not result.requires_grad
        assert torch.equal(scores, before)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"threshold 'sof' is unknown; did you mean 'soft'\?"):
        gmm_threshold(torch.ones(2, 3), "sof")
    for scores in (torch.ones(2, 3, dtype=torch.int64), torch.tensor(1.0), torch.ones(2, 0)):
        with pytest.raises(InputError, match=r"scores must be floating maps \(..., n\) with n at least 1, not"):
            gmm_threshold(scores)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here Triton may run")
def test_triton_says_why_it_cannot() -> None:
    reasons = "scores is on cpu, not on cuda; scores is float64, not .*; maps of 9000 scores are larger than 8192"
    with backend("triton"), pytest.raises(BackendError, match=reasons):
        gmm_threshold(torch.ones(2, 9000, dtype=torch.float64))


def test_torch_library_knows_it() -> None:
    torch.library.opcheck(torch.ops.clipfast.gmm_threshold.default, (maps(4, 9).T, "hard"))
    torch.library.opcheck(torch.ops.clipfast.gmm_threshold.default, (maps(4, 9).half(), "none"))


def test_it_compiles_whole() -> None:
    scores = maps(4, 49).float()

    def double(x: Tensor) -> Tensor:
        return gmm_threshold(x * 2, "soft") + 1

    assert torch.equal(torch.compile(double, fullgraph=True, backend="aot_eager")(scores), double(scores))
