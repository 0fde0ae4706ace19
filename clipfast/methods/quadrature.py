"""Nodes and weights on [0, 1] for the integral along a path: captum's rules, number for number."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from clipfast.errors import InputError, nearest

Rule = Literal["gausslegendre", "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid"]
RULES: tuple[str, ...] = get_args(Rule)


def quadrature(rule: str, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes (S,) and weights (S,), float64 on the CPU, so that the integral of f is about sum_s weights_s f(nodes_s).

    Gauss-Legendre integrates polynomials of degree 2 S - 1 exactly, and has no node at either end. As in captum the
    Riemann rules' nodes are float32 numbers, and the trapezoid's weights add up to 1 - 1/S: its end nodes count half.

    Raises InputError for an unknown rule and for fewer steps than the rule needs: 1, or 2 for the trapezoid.
    """
    if rule not in RULES:
        raise InputError(f"there is no rule {rule!r}: {nearest(str(rule), RULES)}")
    least = 2 if rule == "riemann_trapezoid" else 1
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < least:
        raise InputError(f"steps={steps!r} must be a whole number, at least {least} for {rule}.")
    if rule == "gausslegendre":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return torch.from_numpy(0.5 * (1 + nodes)), torch.from_numpy(0.5 * weights)
    first, last = {
        "riemann_left": (0.0, 1 - 1 / steps),
        "riemann_right": (1 / steps, 1.0),
        "riemann_middle": (1 / (2 * steps), 1 - 1 / (2 * steps)),
        "riemann_trapezoid": (0.0, 1.0),
    }[rule]
    even = torch.full((steps,), 1 / steps, dtype=torch.float64)
    if rule == "riemann_trapezoid":
        even[[0, -1]] /= 2
    return torch.linspace(first, last, steps, dtype=torch.float32).double(), even
