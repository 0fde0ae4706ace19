"""Quadrature rules against captum's own tables, and against what makes Gauss-Legendre what it is."""

from __future__ import annotations

import pytest
import torch
from captum.attr._utils.approximation_methods import SUPPORTED_METHODS, approximation_parameters

from clipfast.errors import InputError
from clipfast.methods.quadrature import RULES, quadrature


def test_there_are_all_of_captums_rules():
    assert sorted(RULES) == sorted(SUPPORTED_METHODS)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [2, 3, 7, 16, 50, 301])
def test_nodes_and_weights_are_captums_to_the_last_bit(rule, steps):
    step_sizes, alphas = approximation_parameters(rule)
    nodes, weights = quadrature(rule, steps)
    assert nodes.dtype == weights.dtype == torch.float64
    assert nodes.tolist() == alphas(steps)
    assert weights.tolist() == step_sizes(steps)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_gauss_legendre_is_exact_up_to_its_degree_and_not_beyond(steps):
    nodes, weights = quadrature("gausslegendre", steps)
    for degree in range(2 * steps):
        assert float(weights @ nodes**degree) == pytest.approx(1 / (degree + 1), abs=1e-14)
    assert abs(float(weights @ nodes ** (2 * steps)) - 1 / (2 * steps + 1)) > 1e-7
    assert nodes.min() > 0 and nodes.max() < 1


@pytest.mark.parametrize(
    ("rule", "node"), [("gausslegendre", 0.5), ("riemann_left", 0), ("riemann_middle", 0.5), ("riemann_right", 1)]
)
def test_one_step(rule, node):
    nodes, weights = quadrature(rule, 1)
    assert nodes.tolist() == [node] and weights.tolist() == [1]


@pytest.mark.parametrize(
    ("rule", "steps", "message"),
    [
        ("gauss_legendre", 3, "did you mean 'gausslegendre'"),
        ("riemann_trapezoid", 1, "at least 2 for riemann_trapezoid"),
        ("riemann_left", 0, "at least 1"),
        ("riemann_left", 2.0, "whole number"),
        ("riemann_left", True, "whole number"),
    ],
)
def test_bad_rules(rule, steps, message):
    with pytest.raises(InputError, match=message):
        quadrature(rule, steps)
