"""The law of truncation of least variance at a given mean window length.

Steps of a window are numbered 1, 2, …; G(i) = Π_{m<i} (1 − cₘ) is the probability that a window reaches its
i-th step, ΣG its mean length, and G(i)/ΣG the share of the steps of a stream that are the i-th of their
window. Let v_{t,j} be what loss j adds to the gradient through hₜ, λᵀ∂F/∂θ. ARTBP multiplies it by W = 0, or
by W = G(i)/G(i + j − t) with the inverse of that as probability, where i is the position of t. So E[W] = 1,
E[W²] = G(i)/G(i + j − t), and with φ_k² = E‖v_{t,t+k}‖² and no correlations the variance a step, over the
cuts, is

    V = Σ_k φ_k² (Σᵢ G(i)² / G(i + k) / ΣG − 1)        (Σ_k φ_k² ((1 − c)⁻ᵏ − 1) for constant c)

Two contributions t, j and t + d, j' share the cuts after t + d. If both losses lie there, the first at a
distance e, E[W W'] = G(i + d) / G(i + d + e), and 1 if j < t + d, because then E[W' | W] = 1. With Q(d, e)
the mean over t of Σ ⟨v_{t,j}, v_{t+d,j'}⟩ over the pairs with min(j, j') = t + d + e, twice for d > 0,

    V = Σ_{d,e} Q(d, e) (Σᵢ G(i) G(i + d) / G(i + d + e) / ΣG − 1)

The first form is the second with the one row Q(0, k) = φ_k², and convex in G. It is minimised over the
hazards −log(1 − cᵢ) = yᵢ², i ≤ N, constant beyond, which keeps c in [0, 1) and lets it reach 0, where it
often belongs; a scale of y keeps the mean length. In units of what ARTBP draws: nothing here is estimated
from the window that the law is used on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

EVALUATIONS, MEMORY, HALVINGS = 250, 10, 20
"""Of the quasi-Newton method: calls of the function, pairs remembered, halvings of one step."""


class LagProducts(NamedTuple):
    """Q(d, e) as ``exp(log_scale[e]) · rows[d, e]``, |rows| ≤ 1, so that small lags do not underflow.

    Attributes:
      log_scale: (E,), −inf where a column is zero.
      rows: (D, E).
    """

    log_scale: jax.Array
    rows: jax.Array


def uncorrelated(log_squares: jax.Array) -> LagProducts:
    """The one row Q(0, k) = φ_k², given as logs (R + 1,)."""
    return LagProducts(log_squares, jnp.ones_like(log_squares)[None])


def correlated(products: jax.Array) -> LagProducts:
    """Q (D, E) itself."""
    largest = jnp.abs(products).max(axis=0)
    scale = jnp.where(largest > 0, largest, 1.0)
    return LagProducts(jnp.log(largest), products / scale[None])


@jax.jit
def variance_rate(hazards: jax.Array, products: LagProducts) -> jax.Array:
    """V of the module's docstring for −log(1 − cᵢ), i = 1 … N, the last one ever after.

    Time O(N D E). From position M = N + D − 1 on every term of the sums falls off as G does, so that the row
    of M stands for all that follow, 1/c_N times; both sums are multiplied by c_N.
    """
    (num_lags,), (num_delays, _) = products.log_scale.shape, products.rows.shape
    last, most = hazards[-1], hazards.shape[0] + num_delays - 1
    beyond = jnp.broadcast_to(last, (num_delays + num_lags - 2,))
    cumulative = jnp.concatenate(
        [jnp.zeros_like(hazards[:1]), jnp.cumsum(jnp.concatenate([hazards, beyond]))]
    )
    position = jnp.arange(most)[:, None]
    started = position - jnp.arange(num_delays)[None]
    reach = jnp.where(started >= 0, jnp.exp(-cumulative[jnp.maximum(started, 0)]), 0.0)
    reach = jnp.concatenate([-jnp.expm1(-last) * reach[:-1], reach[-1:]])
    exponent = cumulative[position + jnp.arange(num_lags)[None]] - cumulative[position]
    excess = jnp.exp(products.log_scale[None] + exponent) * -jnp.expm1(-exponent)
    return jnp.sum((reach @ products.rows) * excess) / _scaled_length(hazards)


def mean_length(hazards: jax.Array) -> jax.Array:
    """ΣG for −log(1 − cᵢ), i = 1 … N, the last one ever after."""
    return _scaled_length(hazards) / -jnp.expm1(-hazards[-1])


def _scaled_length(hazards: jax.Array) -> jax.Array:
    """c_N ΣG, which is finite where c_N = 0."""
    reached = jnp.exp(-jnp.concatenate([jnp.zeros_like(hazards[:1]), jnp.cumsum(hazards[:-1])]))
    return -jnp.expm1(-hazards[-1]) * jnp.sum(reached[:-1]) + reached[-1]


def table_size(num_lags: int) -> int:
    """N for E lags: farther apart than thrice the longest memory, hazards hardly differ."""
    return max(3 * num_lags, 32)


@jax.jit
def optimal_probabilities(products: LagProducts, length: jax.Array) -> jax.Array:
    """c₁ … c_N of the least V at mean length `length` > 1, N = max(3E, 32), the last one ever after.

    A fixed number of evaluations; within 1e-4 of the minimum for one row (measured: 1e-6 and less, except
    where a single lag carries everything). Where no lag carries anything the law is constant.
    """
    length = jnp.asarray(length, products.rows.dtype)
    log_scale = products.log_scale.at[0].set(-jnp.inf)  # no cut lies at lag 0: it adds nothing but rounding
    largest = jnp.max(log_scale)
    products = products._replace(log_scale=log_scale - jnp.where(largest > -jnp.inf, largest, 0.0))
    start, scale = _best_of_two_rates(products, length)

    def relative_rate(y: jax.Array) -> jax.Array:
        return variance_rate(_at_length(y, length), products) / jnp.where(scale > 0, scale, 1.0)

    hazards = _at_length(minimise(relative_rate, jnp.sqrt(start)), length)
    return jnp.minimum(-jnp.expm1(-hazards), 1.0 - jnp.finfo(hazards.dtype).epsneg)


def _best_of_two_rates(products: LagProducts, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The best hazards and V among c₁ = 1 − s (1 − 1/L₀), cᵢ = s/L₀ for i > 1; constant c is s = 1."""
    first = jnp.arange(table_size(products.log_scale.shape[0])) == 0
    share = 2.0 ** (-jnp.arange(16, dtype=length.dtype) / 2)[:, None]
    uncut = jnp.where(first[None], share * (1.0 - 1.0 / length), 1.0 - share / length)
    hazards = -jnp.log(uncut)
    rates = jax.lax.map(lambda hazards: variance_rate(hazards, products), hazards)
    best = jnp.argmin(jnp.where(jnp.isfinite(rates), rates, jnp.inf))
    return hazards[best], rates[best]


def _at_length(y: jax.Array, length: jax.Array) -> jax.Array:
    """Hazards (s y)² of mean length `length`; a Newton step after the bisection carries the derivative."""

    def log_excess(log_scale: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.log(mean_length((jnp.exp(log_scale) * y) ** 2) / length)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) / 2
        longer = log_excess(middle, jax.lax.stop_gradient(y)) > 0
        return jnp.where(longer, middle, low), jnp.where(longer, high, middle)

    bound = 0 * y[0] + 20.0
    low, high = jax.lax.stop_gradient(jax.lax.fori_loop(0, 30, halve, (-bound, bound)))
    middle = (low + high) / 2
    slope = jax.lax.stop_gradient(jax.grad(log_excess)(middle, y))
    return (jnp.exp(middle - log_excess(middle, y) / slope) * y) ** 2


class _Descent(NamedTuple):
    """Where the minimisation stands; the newest pair of the memory comes first."""

    evaluations: jax.Array
    failures: jax.Array
    point: jax.Array
    value: jax.Array
    grad: jax.Array
    direction: jax.Array
    size: jax.Array
    moves: jax.Array
    turns: jax.Array


def minimise(function: Callable[[jax.Array], jax.Array], start: jax.Array) -> jax.Array:
    """L-BFGS with steps halved until they descend (Nocedal & Wright 2006, algorithms 7.5 and 3.1).

    Each turn of the loop is one evaluation, so that the function is compiled once.
    """

    def evaluate(descent: _Descent) -> _Descent:
        trial = descent.point + descent.size * descent.direction
        value, grad = jax.value_and_grad(function)(trial)
        demanded = 1e-4 * descent.size * (descent.direction @ descent.grad)
        descends = value < jnp.where(jnp.isinf(descent.value), jnp.inf, descent.value + demanded)
        descent = descent._replace(evaluations=descent.evaluations + 1)
        return jax.lax.cond(descends, _accept, _refuse, descent, (trial, value, grad))

    zero, memory = 0 * start, jnp.zeros((MEMORY, *start.shape), start.dtype) + 0 * start[None]
    count, one = (0 * start[0]).astype(jnp.int32), 0 * start[0] + 1
    first = _Descent(count, count, start, one * jnp.inf, zero, zero, one, memory, memory)

    def unfinished(descent: _Descent) -> jax.Array:
        return (descent.evaluations < EVALUATIONS) & (descent.failures < 2)

    return jax.lax.while_loop(unfinished, evaluate, first).point


def _accept(descent: _Descent, found: tuple[jax.Array, jax.Array, jax.Array]) -> _Descent:
    """Moves on, remembers the step where the curvature along it is positive, and looks a new way."""
    point, value, grad = found
    move, turn = point - descent.point, grad - descent.grad
    curved = move @ turn > 0
    moves = jnp.where(curved, jnp.concatenate([move[None], descent.moves[:-1]]), descent.moves)
    turns = jnp.where(curved, jnp.concatenate([turn[None], descent.turns[:-1]]), descent.turns)
    direction = -_inverse_hessian(moves, turns, grad)
    size = jnp.ones_like(descent.size)
    return _Descent(
        descent.evaluations, 0 * descent.failures, point, value, grad, direction, size, moves, turns
    )


def _refuse(descent: _Descent, found: tuple[jax.Array, jax.Array, jax.Array]) -> _Descent:
    """Halves the step; after HALVINGS of them forgets what the direction was based on."""
    del found
    failed = descent.size < 0.5**HALVINGS
    moves, turns = (jnp.where(failed, 0.0, pairs) for pairs in (descent.moves, descent.turns))
    steepest = -_inverse_hessian(moves, turns, descent.grad)
    return descent._replace(
        failures=descent.failures + failed,
        direction=jnp.where(failed, steepest, descent.direction),
        size=jnp.where(failed, 1.0, descent.size / 2),
        moves=moves,
        turns=turns,
    )


def _inverse_hessian(moves: jax.Array, turns: jax.Array, grad: jax.Array) -> jax.Array:
    """The two loops over the remembered pairs; without any, a step of a tenth along the gradient."""
    curvature = jnp.sum(moves * turns, axis=1)
    rho = jnp.where(curvature > 0, 1.0 / jnp.where(curvature > 0, curvature, 1.0), 0.0)

    def down(vector: jax.Array, pair: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        move, turn, rho = pair
        alpha = rho * (move @ vector)
        return vector - alpha * turn, alpha

    def up(vector: jax.Array, pair: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        move, turn, rho, alpha = pair
        return vector + (alpha - rho * (turn @ vector)) * move, None

    vector, alpha = jax.lax.scan(down, grad, (moves, turns, rho))
    size = jnp.sqrt(grad @ grad)
    unknown = 0.1 / jnp.where(size > 0, size, 1.0)
    length = jnp.where(rho[0] > 0, curvature[0] / jnp.maximum(turns[0] @ turns[0], 1e-30), unknown)
    return jax.lax.scan(up, length * vector, (moves, turns, rho, alpha), reverse=True)[0]
