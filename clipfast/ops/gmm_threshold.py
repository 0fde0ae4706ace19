"""A two-component Gaussian mixture over the scores of one map, and the map with the lower component taken away.

    z = (s - mean s) / deviation s                                  population deviation, over the n scores of a map
    start: means at z's 25 % and 75 % quantiles, or at its minimum and maximum where those differ by less than 1e-3;
           variances 1, weights 1/2
    E: r_ki = w_k N(z_i | m_k, v_k) / sum_j w_j N(z_i | m_j, v_j)
    M: w_k = mean_i r_ki,  m_k = sum_i r_ki z_i / sum_i r_ki,  v_k = sum_i r_ki (z_i - m_k)^2 / sum_i r_ki + 1e-6
    stop: when the mean log-likelihood of E differs by less than 1e-3 from that of the E before, or after 100 M
    soft: (s - low mean)+ r_high        hard: (s - low mean)+ where r_high >= 1/2

r_high is the posterior, from a last E, of the component whose mean is higher after the fit. TCLIP names the mixture and
publishes nothing more: start, stop, regularisation and the lower mean as the zero of the result are our reading. So
started, scikit-learn's GaussianMixture (spherical, reg_covar 1e-6, tol 1e-3) does the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clipfast import native
from clipfast.errors import InputError, nearest
from clipfast.ops.dispatch import Backend, Op, Triton, registered

THRESHOLDS = ("soft", "hard", "none")
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32})
QUANTILES = (0.25, 0.75)
NARROW = 1e-3
REGULARISATION = 1e-6
TOLERANCE = 1e-3
ITERATIONS = 100
# Added to the mass of a component, so that an empty one keeps finite parameters; scikit-learn adds as much.
EMPTY = 10 * torch.finfo(torch.float64).eps


class Mixture(NamedTuple):
    """The mixture fitted to each map (..., n): first the component with the lower mean, then the one with the higher.

    Means and variances are in the units of the scores, and so is the regularisation: 1e-6 of the map's own variance.
    """

    means: Tensor  # (..., 2)
    variances: Tensor  # (..., 2)
    weights: Tensor  # (..., 2)
    posterior: Tensor  # (..., n), of the component with the higher mean
    iterations: Tensor  # (...) int32, how many M steps were taken


@dataclass(frozen=True)
class Inputs:
    """What every backend gets, and where it writes; `out` is float64 for float64 scores, else float32."""

    scores: Tensor  # (M, n), any strides
    hard: bool
    out: Tensor  # (M, n), contiguous
    parameters: Tensor | None = None  # (M, 7): two means, two variances, two weights, iterations
    posterior: Tensor | None = None  # (M, n)


def define(x: Inputs) -> Tensor:
    """The op in plain PyTorch: what it means, and what runs where nothing faster can."""
    z, centre, deviation = standardise(x.scores.to(x.out.dtype))  # (M, n), (M, 1), (M, 1)
    means, variances, weights, iterations = fit(z)  # (M, 2), ... and (M,)
    by_mean = means.argsort(dim=-1, stable=True)
    means, variances, weights = (each.gather(-1, by_mean) for each in (means, variances, weights))
    posterior = expect(z, means, variances, weights)[1][:, 1]
    keep = (posterior >= 0.5) if x.hard else posterior
    # Not `scores - mean`, in which a large common offset would drown the digits. NaN times False stays NaN.
    torch.mul(deviation * (z - means[:, :1]).clamp(min=0), keep, out=x.out)
    if x.parameters is not None:
        in_scores = (means * deviation + centre, variances * deviation**2, weights, iterations[:, None])
        torch.cat(in_scores, dim=-1, out=x.parameters)
    if x.posterior is not None:
        x.posterior.copy_(posterior)
    return x.out


def standardise(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (M, n) less their mean (M, 1), over their deviation (M, 1); zeros where they are constant.

    A map with a value that is not finite is NaN all over.
    """
    low, high = scores.aminmax(dim=-1, keepdim=True)
    span = high - low
    unit = (scores - low) / torch.where(span == 0, 1, span)  # neither offset nor scale costs precision from here on
    mean = unit.mean(-1, keepdim=True)
    deviation = (unit - mean).square().mean(-1, keepdim=True).sqrt()
    return (unit - mean) / torch.where(span == 0, 1, deviation), low + span * mean, span * deviation


def fit(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means, variances and weights (M, 2) of the mixture of each standardised map z (M, n), and iterations (M,)."""
    means = _start(z)
    variances, weights = torch.ones_like(means), torch.full_like(means, 0.5)
    iterations = torch.zeros(len(z), dtype=means.dtype, device=z.device)
    previous = torch.full_like(iterations, -math.inf)
    active = torch.arange(len(z), device=z.device)  # each map stops on its own
    for _ in range(ITERATIONS):
        if not len(active):
            break
        rows = z[active]
        likelihood, posteriors = expect(rows, means[active], variances[active], weights[active])
        means[active], variances[active], weights[active] = maximise(rows, posteriors)
        iterations[active] += 1
        # Written so that NaN stops.
        going = (likelihood - previous[active]).abs() >= TOLERANCE
        previous[active] = likelihood
        active = active[going]
    return means, variances, weights, iterations


def expect(z: Tensor, means: Tensor, variances: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean log-likelihood (M,) and posteriors (M, 2, n) of z (M, n) under mixtures of parameters (M, 2)."""
    m, v, w = means[..., None], variances[..., None], weights[..., None]
    joint = w.log() - 0.5 * ((2 * math.pi * v).log() + (z[:, None] - m).square() / v)  # (M, 2, n)
    return joint.logsumexp(1).mean(-1), joint.softmax(1)


def maximise(z: Tensor, posteriors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means, variances and weights (M, 2) of z (M, n) shared out by posteriors (M, 2, n)."""
    mass = posteriors.sum(-1) + EMPTY
    means = (posteriors * z[:, None]).sum(-1) / mass
    variances = (posteriors * (z[:, None] - means[..., None]).square()).sum(-1) / mass + REGULARISATION
    return means, variances, mass / mass.sum(-1, keepdim=True)


def _start(z: Tensor) -> Tensor:
    ordered = z.sort(-1).values
    quartiles = torch.stack([_quantile(ordered, fraction) for fraction in QUANTILES], dim=-1)  # (M, 2)
    narrow = quartiles.diff(dim=-1) < NARROW
    return torch.where(narrow, ordered[:, [0, -1]], quartiles)


def _quantile(ordered: Tensor, fraction: float) -> Tensor:
    position = fraction * (ordered.shape[-1] - 1)
    below, above = ordered[:, math.floor(position)], ordered[:, math.ceil(position)]
    return below.lerp(above, position - math.floor(position))


class Torch(Backend[Inputs]):
    name = "torch"

    def run(self, inputs: Inputs) -> Tensor:
        return define(inputs)


class Native(Backend[Inputs]):
    """csrc/cpu/gmm_threshold.cpp."""

    name = "native"
    devices = frozenset({"cpu"})
    dtypes = {"scores": FLOATS | {torch.float64}}  # noqa: RUF012

    def missing(self) -> list[str]:
        reason = native.problem("_native")
        return [] if reason is None else [reason]

    def version(self) -> str:
        return str(native.module("_native").build)

    def run(self, inputs: Inputs) -> Tensor:
        scores = inputs.scores.to(inputs.out.dtype)
        native.module("_native").gmm_threshold(
            scores=scores.data_ptr(),
            wide=scores.dtype == torch.float64,
            strides=scores.stride(),
            maps=scores.shape[0],
            size=scores.shape[1],
            hard=inputs.hard,
            out=inputs.out.data_ptr(),
            parameters=0 if inputs.parameters is None else inputs.parameters.data_ptr(),
            posterior=0 if inputs.posterior is None else inputs.posterior.data_ptr(),
            threads=torch.get_num_threads(),
        )
        return inputs.out


class TritonKernel(Triton[Inputs]):
    """kernels/gmm_threshold.py."""

    dtypes = {"scores": FLOATS}  # noqa: RUF012
    largest = 8192

    def why_not(self, inputs: Inputs) -> list[str]:
        reasons = super().why_not(inputs)
        if inputs.scores.shape[1] > self.largest:
            reasons.append(f"maps of {inputs.scores.shape[1]} scores are larger than {self.largest}")
        return reasons

    def launch(self, inputs: Inputs) -> Tensor:
        from clipfast.kernels import gmm_threshold as kernels

        kernels.gmm_threshold(inputs.scores, inputs.hard, inputs.out, inputs.parameters, inputs.posterior)
        return inputs.out


_op = Op("gmm_threshold", TritonKernel(), Native(), Torch())


def _fake(scores: Tensor, threshold: str = "soft") -> Tensor:
    return torch.empty(scores.shape, dtype=_precision(scores), device=scores.device)


@registered(_fake)
def gmm_threshold(scores: Tensor, threshold: str = "soft") -> Tensor:
    """The maps (..., n) of scores (..., n) with what a mixture of two Gaussians takes for background set to zero.

    Each map is fitted by itself, by expectation-maximisation with its own early stop, as this module's text says.

    scores      (..., n) floating, any strides: one map in the last dimension, its order of no consequence.
    threshold   "soft": the height above the lower mean, times the posterior of the component with the higher mean.
                "hard": that height where the posterior is at least 1/2, else 0. "none": the scores as they are; nothing
                is fitted.

    Returns a new tensor of the same shape, float64 for float64 scores, else float32, in which the arithmetic is done
    too. "soft" and "hard" do not change when a constant is added to a map, and scale with it; a constant map gives
    zeros, and nothing is ever below zero. A map with a NaN or an infinity is NaN all over, and no other map with it:
    telling of it would make a GPU wait. No gradient flows through.

    Source: TCLIP, which thresholds token-patch similarity by a Gaussian mixture; what it leaves open is our reading.

    Raises InputError for scores that are not floating or have no dimension or no score in the last, and for an unknown
    threshold.
    """
    check_threshold(threshold)
    maps, out = _maps(scores), _fake(scores)
    if threshold == "none":
        return out.copy_(scores.detach())
    if out.numel():
        _op(Inputs(maps, threshold == "hard", out.view(maps.shape)))
    return out


def fit_mixture(scores: Tensor) -> Mixture:
    """The mixture that `gmm_threshold` fits to each map of scores (..., n), floating; raises InputError as it does."""
    maps = _maps(scores)
    out, posterior = _fake(maps), _fake(maps)
    parameters = out.new_empty(len(maps), 7)
    if len(maps):
        _op(Inputs(maps, False, out, parameters, posterior))
    batch = scores.shape[:-1]
    means, variances, weights, iterations = parameters.split([2, 2, 2, 1], dim=-1)
    return Mixture(
        means.reshape(*batch, 2),
        variances.reshape(*batch, 2),
        weights.reshape(*batch, 2),
        posterior.view(scores.shape),
        iterations.reshape(batch).nan_to_num().int(),
    )


def check_threshold(threshold: str) -> None:
    """Raises InputError unless this is the name of a threshold."""
    if threshold not in THRESHOLDS:
        raise InputError(f"threshold {threshold!r} is unknown; {nearest(str(threshold), THRESHOLDS)}")


def _maps(scores: Tensor) -> Tensor:
    if not scores.is_floating_point() or scores.ndim == 0 or not scores.shape[-1]:
        raise InputError(
            f"scores must be floating maps (..., n) with n at least 1, not {tuple(scores.shape)} "
            f"{str(scores.dtype).removeprefix('torch.')}."
        )
    # The product and not -1, which an empty batch leaves open.
    return scores.detach().reshape(math.prod(scores.shape[:-1]), scores.shape[-1])


def _precision(scores: Tensor) -> torch.dtype:
    return torch.promote_types(scores.dtype, torch.float32)
