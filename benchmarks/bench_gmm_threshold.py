"""gmm_threshold: the native module against scikit-learn's GaussianMixture and against the definition.

scikit-learn fits and predicts one map after the other, with the same start, tolerance and regularisation, on one map in
64 of those that the others do: its times in the file are those of that sample, and `scikit-learn, per map` is the ratio
of times a map. It has one thread, which for maps of this size is its fastest; the others have as many as the case says.

make bench, or: pytest benchmarks/bench_gmm_threshold.py --benchmark-enable --benchmark-json=out.json
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from paired import report
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits
from torch import Tensor

import clipfast.native
from clipfast.ops.dispatch import backend
from clipfast.ops.gmm_threshold import fit_mixture, gmm_threshold

SAMPLE = 64


def similarities(count: int, size: int) -> Tensor:
    """Maps (count, size): a background, and on some patches something above it, as much as it may be."""
    g = torch.Generator().manual_seed(0)
    background = 0.2 + 0.02 * torch.randn(count, size, generator=g)
    objects = torch.rand(count, size, generator=g) < 0.5 * torch.rand(count, 1, generator=g)
    return background + objects * 0.2 * torch.rand(count, 1, generator=g)


def scikit_learn(maps: np.ndarray[Any, np.dtype[np.float64]]) -> list[Any]:
    """The posteriors of each map's higher component."""
    found = []
    with warnings.catch_warnings(), threadpool_limits(1, user_api="blas"):
        warnings.simplefilter("ignore", ConvergenceWarning)
        for scores in maps:
            z = ((scores - scores.mean()) / scores.std())[:, None]
            mixture = GaussianMixture(
                2,
                covariance_type="spherical",
                tol=1e-3,
                reg_covar=1e-6,
                means_init=np.quantile(z, [0.25, 0.75])[:, None],
                weights_init=[0.5, 0.5],
                precisions_init=[1.0, 1.0],
            ).fit(z)
            found.append(mixture.predict_proba(z)[:, mixture.means_[:, 0].argmax()])
    return found


@pytest.mark.benchmark(group="gmm_threshold")
@pytest.mark.skipif(clipfast.native.problem("_native") is not None, reason="the native module is not built here")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("count", "size"), [(4096, 196), (4096, 49), (1024, 576)])
def test_native_beats_scikit_learn(benchmark: Any, count: int, size: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    maps = similarities(count, size)
    sample = maps[::SAMPLE].double().numpy()

    def run(name: str) -> Tensor:
        with backend(name):
            return gmm_threshold(maps)

    fitted = fit_mixture(maps[::SAMPLE])
    assert np.allclose(fitted.posterior, scikit_learn(sample), atol=1e-4), "no speed is reported of a wrong result"
    functions = {
        "native": lambda: run("native"),
        "torch": lambda: run("torch"),
        f"scikit-learn, {len(sample)} maps": lambda: scikit_learn(sample),
    }
    try:
        timings = report(benchmark, functions, repeats=9)
    finally:
        torch.set_num_threads(before)
    ratio = timings[f"scikit-learn, {len(sample)} maps"].ratio * SAMPLE
    benchmark.extra_info |= {
        "maps": count,
        "scores a map": size,
        "threads": threads,
        "mean iterations": float(fitted.iterations.float().mean()),
        "native microseconds a map": timings["native"].median / count * 1e6,
        "scikit-learn, per map": ratio,
    }
    print(
        f"\n{count} maps of {size}, {threads} threads: native {timings['native'].median / count * 1e6:.2f} us a map, "
        f"torch {timings['torch'].ratio:.1f} times that, scikit-learn {ratio:.0f} times"
    )
    assert timings["torch"].ratio > 1
    if size == 196:
        assert ratio > 300
