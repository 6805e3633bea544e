"""The oracle of adaptive truncation: norms by brute force, estimates in decimals, bias in closed form.

It shares no code with jtrunc. The estimates are computed from the norms themselves, not from their
logarithms: `decimal` has 28 digits and exponents to ±999,999, so that exp(−2000) is a number like any other.

Source: "Adaptively truncating backpropagation through time to control gradient bias" (2019), eq. 3, 18–25,
with errata 8 (exp for log), 10 (eq. 23 as printed), 11 (where the maximum stands) and 12 (β̂ ≥ 1, strict <).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

INFINITY = Decimal("Infinity")


# φ by brute force.


class Pulled(NamedTuple):
    """Gradients of one loss, lag by lag; leaves that carry none are None.

    Attributes:
      states: per lag k a tree like hidden, ∂ℓ_s/∂h_{s−k}.
      shares: per lag k a tree like θ, (∂ℓ_s/∂h_{s−k})ᵀ ∂F/∂θ of step s − k.
    """

    states: list[Any]
    shares: list[Any]


def gradients_by_lag(system: Any, params: Any, hidden: Any, inputs: Any, time: int, num_lags: int) -> Pulled:
    """`jax.grad` of ℓ_s, s = `time`, with respect to what is added to h_{s−k} and to θ at step s − k alone.

    Step t reads row t of `inputs`; h_t is the state after it, so that lag 0 is what the loss reads and
    `num_lags` ≤ `time`. A plain loop over the steps, without jit.
    """
    steps = [jax.tree.map(lambda leaf, t=t: leaf[t], inputs) for t in range(time + 1)]
    state_zeros, theta_zeros = _zeros(hidden), _zeros(params.recurrent)

    def loss(added_states: list[Any], added_thetas: list[Any]) -> jax.Array:
        state = hidden
        for t, inputs_t in enumerate(steps):
            theta, lag = params.recurrent, time - t
            if lag <= num_lags:
                theta = _plus(theta, added_thetas[lag])
            state = system.transition(theta, state, inputs_t)
            if lag <= num_lags:
                state = _plus(state, added_states[lag])
        return system.loss(params, state, steps[-1])[0]

    count = num_lags + 1
    return Pulled(*jax.grad(loss, argnums=(0, 1))([state_zeros] * count, [theta_zeros] * count))


def tree_norm(tree: Any) -> float:
    """Euclidean norm over all float leaves; a complex number counts as two real ones."""
    return math.sqrt(sum(float(np.sum(np.abs(np.asarray(leaf)) ** 2)) for leaf in jax.tree.leaves(tree)))


def gradient_norms(
    system: Any, params: Any, hidden: Any, inputs: Any, time: int, num_lags: int, weighted: bool = False
) -> np.ndarray:
    """Eq. 18: φ_k for k = 0 … num_lags of the loss at `time`, (num_lags + 1,); weighted: of the shares."""
    pulled = gradients_by_lag(system, params, hidden, inputs, time, num_lags)
    return np.array([tree_norm(tree) for tree in (pulled.shares if weighted else pulled.states)])


def _zeros(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jnp.zeros_like(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else None, tree
    )


def _plus(tree: Any, added: Any) -> Any:
    return jax.tree.map(
        lambda leaf, more: leaf if more is None else leaf + more, tree, added, is_leaf=lambda x: x is None
    )


# Estimates in decimals.


def mean_norms(log_norms: np.ndarray) -> list[Decimal]:
    """Eq. 20: P̂[φ_k] of log norms (N, R + 1)."""
    rows = [[_exp(value) for value in row] for row in np.asarray(log_norms, np.float64).tolist()]
    return [sum(column, Decimal(0)) / len(rows) for column in zip(*rows, strict=True)]


def decay_rate(
    norms: Sequence[Decimal], fit_from: int, method: str = "least_squares", quantile: float = 0.9
) -> Decimal:
    """Eq. 21 and 22 with errata 8: β̂ of P̂[φ_τ] … P̂[φ_R], over the pairs of norms that are not zero."""
    if not all(norm.is_finite() for norm in norms):
        return INFINITY
    window = norms[fit_from:]
    points = [(Decimal(k), norm.ln()) for k, norm in enumerate(window) if norm > 0]
    if len(points) < 2:
        return Decimal(1) if len(points) == len(window) else Decimal(0)
    pairs = [(a, b) for i, a in enumerate(points) for b in points[i + 1 :]]
    slopes = sorted((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs)
    if method == "least_squares":
        products = [(b[1] - a[1]) * (b[0] - a[0]) for a, b in pairs]
        slope = sum(products) / sum((b[0] - a[0]) ** 2 for a, b in pairs)
    elif method == "maximum":
        slope = slopes[-1]
    else:
        position = Decimal(quantile) * (len(slopes) - 1)
        below = int(position)
        above = min(below + 1, len(slopes) - 1)
        slope = slopes[below] + (position - below) * (slopes[above] - slopes[below])
    return Decimal(slope).exp()


def absolute_bias(norms: Sequence[Decimal], decay: Decimal, fit_from: int, max_length: int) -> list[Decimal]:
    """Eq. 23 as printed: Ê(K)/M̂ for K = 0 … max_length.

    No bound where β̂ ≥ 1 (errata 12), nor where φ_τ is zero and a later norm is not.
    """
    if decay >= 1 or (norms[fit_from] == 0 and any(norm > 0 for norm in norms[fit_from:])):
        return [INFINITY] * (max_length + 1)
    tail = norms[fit_from] / (1 - decay)
    bias = [sum(norms[K + 1 : fit_from], Decimal(0)) + tail for K in range(fit_from)] + [tail]
    while len(bias) <= max_length:
        bias.append(bias[-1] * decay)
    return bias[: max_length + 1]


def relative_bias(norms: Sequence[Decimal], bias: Sequence[Decimal], over: str = "prefix") -> list[Decimal]:
    """Eq. 24 with errata 11; over "window" needs `bias` up to the last lag of `norms`."""
    if not (bias[0].is_finite() and all(norm.is_finite() for norm in norms)):
        return [INFINITY] * len(bias)
    last = min(len(norms), len(bias)) - 1
    floors = [sum(norms[: k + 1], Decimal(0)) - bias[k] for k in range(last + 1)]
    relative = []
    for K in range(len(bias)):
        floor = max(floors[: K + 1] if over == "prefix" else floors)
        relative.append(bias[K] / floor if floor > 0 else INFINITY)
    return relative


def shortest(
    relative: Sequence[Decimal], tolerance: float, min_length: int, max_length: int
) -> tuple[int, bool]:
    """Eq. 25: κ̂, the first K in [K_min, K_max] with Δ̂(K) < δ, and whether there is one; else K_max."""
    lengths = range(min_length, max_length + 1)
    good = [K for K in lengths if relative[K] < Decimal(tolerance)]
    return (good[0], True) if good else (max_length, False)


class Length(NamedTuple):
    length: int
    bounded: bool
    decay_rate: Decimal
    relative_bias: Decimal


def estimate_length(
    log_norms: np.ndarray,
    tolerance: float,
    fit_from: int,
    min_length: int,
    max_length: int,
    method: str = "least_squares",
    quantile: float = 0.9,
    over: str = "prefix",
) -> Length:
    """All of it, from log norms (N, R + 1)."""
    norms = mean_norms(log_norms)
    decay = decay_rate(norms, fit_from, method, quantile)
    bias = absolute_bias(norms, decay, fit_from, max(max_length, len(norms) - 1))
    relative = relative_bias(norms, bias, over)
    length, bounded = shortest(relative, tolerance, min_length, max_length)
    return Length(length, bounded, decay, relative[length])


def _exp(value: float) -> Decimal:
    if math.isnan(value) or value == math.inf:
        return Decimal(value)
    return Decimal(0) if value == -math.inf else Decimal(value).exp()


# The bias itself, of linear systems.


class Linear(NamedTuple):
    """hₜ = A hₜ₋₁ + B θ, ℓₜ = c · hₜ, run for ever: everything about it is a geometric series.

    Attributes:
      transition: A (n, n), all of its eigenvalues inside the unit circle.
      loss: c (n,).
      drive: B (n, p).
    """

    transition: np.ndarray
    loss: np.ndarray
    drive: np.ndarray

    def cotangents(self, count: int) -> np.ndarray:
        """cᵀ Aᵏ for k = 0 … count − 1, (count, n)."""
        rows = [self.loss]
        for _ in range(count - 1):
            rows.append(rows[-1] @ self.transition)
        return np.stack(rows)

    def log_norms(self, num_lags: int) -> np.ndarray:
        """log φ_k = log ‖cᵀ Aᵏ‖, (1, num_lags + 1)."""
        return np.log(np.linalg.norm(self.cotangents(num_lags + 1), axis=1))[None]

    def relative_bias(self, max_length: int) -> np.ndarray:
        """‖E ĝ_K − g‖/‖g‖ for K = 0 … max_length.

        ĝ_K has the lags 0 … K (eq. 3), so that g − ĝ_K = cᵀ A^(K+1) (I − A)⁻¹ B.
        """
        solved = np.linalg.solve(np.eye(len(self.loss)) - self.transition, self.drive)
        missing = np.linalg.norm(self.cotangents(max_length + 2) @ solved, axis=1)
        return missing[1:] / missing[0]
