"""The oracle: every backward algorithm as a plain loop over time, written from the papers' equations.

It shares no code with jtrunc. `linearise` walks along the trajectory once and keeps, for every step, the
four derivatives that the equations name, as dense float64 matrices; every algorithm is then a NumPy loop
over them. Time is counted as in the papers, t = 1…T, and row t − 1 of an array belongs to step t.

Sources: ARTBP = "Unbiasing truncated backpropagation through time" (2017), eq. 7–12 and 14; adaptive =
"Adaptively truncating backpropagation through time to control gradient bias" (2019), eq. 3, 15 and 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Law = Callable[[int, Any], float]
"""``(elapsed, state) -> c``: elapsed = δt of eq. 14, 1 on the first step after a cut."""


Weights = Sequence[float] | np.ndarray
"""One number for each boundary between two steps."""


# Pytrees as real vectors. A complex leaf counts as its real and its imaginary parts; integer and key
# leaves carry no derivative and are left out. What is not traced is NumPy's: it compiles nothing.


def to_vector(tree: Any) -> Any:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    xp: Any = jnp if any(isinstance(leaf, Tracer) for leaf in leaves) else np
    parts = [xp.zeros(0)]
    for leaf in map(xp.asarray, leaves):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            parts += [leaf.real.ravel(), leaf.imag.ravel()]
        else:
            parts.append(leaf.ravel())
    return xp.concatenate([part.astype(np.float64) for part in parts])


def from_vector(vector: Any, template: Any, conjugate: bool = False) -> Any:
    """The tree that `to_vector` came from. `conjugate`: jax's gradient of a complex leaf is ∂x − i∂y."""
    leaves, position = [], 0
    for leaf in jax.tree.leaves(template):
        dtype, shape = jnp.result_type(leaf), np.shape(leaf)
        if jnp.issubdtype(dtype, jnp.inexact):
            size = math.prod(shape)
            real = vector[position : position + size].reshape(shape)
            position += size
            if jnp.issubdtype(dtype, jnp.complexfloating):
                imaginary = vector[position : position + size].reshape(shape)
                position += size
                real = real + (-1j if conjugate else 1j) * imaginary
            leaf = real.astype(dtype)
        leaves.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def steps_of(inputs: Any) -> list[Any]:
    """Time-major inputs as a list of the inputs of each step."""
    inputs = window(inputs, 0, None)
    length = len(jax.tree.leaves(inputs)[0])
    return [jax.tree.map(lambda leaf, t=t: leaf[t], inputs) for t in range(length)]


def window(inputs: Any, start: int, stop: int | None) -> Any:
    """The steps start … stop − 1 of time-major inputs; slices of NumPy arrays compile nothing."""

    def cut(leaf: Any) -> Any:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return leaf[start:stop] if is_key or isinstance(leaf, Tracer) else np.asarray(leaf)[start:stop]

    return jax.tree.map(cut, inputs)


class Linearised(NamedTuple):
    """All derivatives along one trajectory; n state, p recurrent and q readout parameters.

    Attributes:
      params: the parameters it was taken at.
      states: s₀ … s_T as pytrees (T + 1 of them).
      losses: (T,) ℓₜ.
      state_by_state: (T, n, n) ∂F/∂s (xₜ, sₜ₋₁, θ).
      state_by_theta: (T, n, p) ∂F/∂θ (xₜ, sₜ₋₁, θ).
      loss_by_state: (T, n) ∂ℓ/∂s (sₜ).
      loss_by_params: (T, p + q) ∂ℓ/∂(θ, readout) at fixed sₜ.
    """

    params: Any
    states: list[Any]
    losses: np.ndarray
    state_by_state: np.ndarray
    state_by_theta: np.ndarray
    loss_by_state: np.ndarray
    loss_by_params: np.ndarray

    @property
    def length(self) -> int:
        return len(self.losses)


def linearise(system: Any, params: Any, hidden: Any, inputs: Any) -> Linearised:
    """Runs the system forward, one step at a time, with the Jacobians of each step."""
    transition_jacobians, loss_gradients = _derivatives(system)
    theta, vector = to_vector(params.recurrent), to_vector(params)
    states, rows = [hidden], []
    for x in steps_of(inputs):
        (by_theta, by_state), hidden = transition_jacobians(theta, to_vector(hidden), params, hidden, x)
        value, (loss_by_params, loss_by_state) = loss_gradients(vector, to_vector(hidden), params, hidden, x)
        states.append(hidden)
        rows.append((value, by_state, by_theta, loss_by_state, loss_by_params))
    return Linearised(params, states, *(np.stack(column) for column in zip(*rows, strict=True)))


@cache
def _derivatives(system: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Of a step and of its loss, by vectors; compiled once a system."""

    def transition(theta: Any, state: Any, params: Any, hidden: Any, x: Any) -> tuple[jax.Array, Any]:
        new = system.transition(from_vector(theta, params.recurrent), from_vector(state, hidden), x)
        return to_vector(new), new

    def loss(vector: Any, state: Any, params: Any, hidden: Any, x: Any) -> jax.Array:
        return system.loss(from_vector(vector, params), from_vector(state, hidden), x)[0].astype(jnp.float64)

    jacobians = jax.jacrev(transition, argnums=(0, 1), has_aux=True)
    return jax.jit(jacobians), jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def piece(run: Linearised, start: int, stop: int) -> Linearised:
    """The steps start + 1 … stop of a run, as a run of their own."""
    return Linearised(run.params, run.states[start : stop + 1], *(rows[start:stop] for rows in run[2:]))


def gradient(run: Linearised, deltas: np.ndarray, scored: np.ndarray | None = None) -> Any:
    """Eq. 7, 12: g = Σₜ δℓₜ ∂F/∂θ(xₜ, sₜ₋₁, θ), and the immediate terms of the scored losses (errata 4)."""
    total = np.zeros(run.loss_by_params.shape[1])
    for t in range(run.length):
        total[: run.state_by_theta.shape[2]] += deltas[t] @ run.state_by_theta[t]
        if scored is None or scored[t]:
            total += run.loss_by_params[t]
    return from_vector(total, run.params, conjugate=True)


# The algorithms.


def bptt(run: Linearised) -> Any:
    """Eq. 8: δℓ_T = ∂ℓ/∂s_T;  δℓₜ = δℓₜ₊₁ ∂F/∂s(xₜ₊₁, sₜ, θ) + ∂ℓ/∂sₜ."""
    deltas = run.loss_by_state.copy()
    for t in reversed(range(1, run.length)):
        deltas[t - 1] += deltas[t] @ run.state_by_state[t]
    return gradient(run, deltas)


def truncated_bptt(run: Linearised, length: int, phase: int = 0) -> Any:
    """Eq. 9 with errata 1: the recurrent term is dropped where t is a multiple of L, and at t = T.

    `phase`: how many steps of the stream came before this run; t counts from the start of the stream.
    """
    deltas = run.loss_by_state.copy()
    for t in reversed(range(1, run.length)):
        if (phase + t) % length != 0:
            deltas[t - 1] += deltas[t] @ run.state_by_state[t]
    return gradient(run, deltas)


def windowed_bptt(run: Linearised, backward_steps: int, loss_steps: int, average: bool = True) -> Any:
    """Adaptive, eq. 15–16: b_k for lags k = 0 … K₁ (errata 9); the losses of the last K₂ steps; over K₂."""
    last = run.length - 1
    deltas, scored = np.zeros_like(run.loss_by_state), np.zeros(run.length, bool)
    for k in range(min(backward_steps, last) + 1):
        if k > 0:
            deltas[last - k] = deltas[last - k + 1] @ run.state_by_state[last - k + 1]
        if k < loss_steps:
            deltas[last - k] += run.loss_by_state[last - k]
            scored[last - k] = True
    total = gradient(run, deltas, scored)
    return jax.tree.map(lambda g: g / loss_steps, total) if average else total


def artbp(run: Linearised, cuts: Weights, probabilities: Weights) -> Any:
    """Eq. 11: δ̃ℓₜ = ∂ℓ/∂sₜ if Xₜ = 1 or t = T, else δ̃ℓₜ₊₁ ∂F/∂s(xₜ₊₁, sₜ, θ) / (1 − cₜ) + ∂ℓ/∂sₜ.

    cuts[t − 1] = Xₜ and probabilities[t − 1] = cₜ for t = 1 … T − 1.
    """
    deltas = run.loss_by_state.copy()
    for t in reversed(range(1, run.length)):
        if not cuts[t - 1]:
            deltas[t - 1] += deltas[t] @ run.state_by_state[t] / (1 - probabilities[t - 1])
    return gradient(run, deltas)


def artbp_factor_dropped(run: Linearised, cuts: Weights, probabilities: Weights) -> Any:
    """A wrong ARTBP: random windows without the compensation factor."""
    return artbp(run, cuts, np.zeros(len(probabilities)))


def artbp_factor_on_local_term(run: Linearised, cuts: Weights, probabilities: Weights) -> Any:
    """A wrong ARTBP: the factor multiplies ∂ℓ/∂sₜ as well."""
    deltas = run.loss_by_state.copy()
    for t in reversed(range(1, run.length)):
        if not cuts[t - 1]:
            both = deltas[t] @ run.state_by_state[t] + run.loss_by_state[t - 1]
            deltas[t - 1] = both / (1 - probabilities[t - 1])
    return gradient(run, deltas)


def online_artbp(run: Linearised, start: int, length: int, law: Law) -> Any:
    """Section 5: the gradient of the one window start + 1 … start + length, a local start at its end."""
    window = piece(run, start, start + length)
    probabilities = [law(k, window.states[k]) for k in range(1, length)]
    return artbp(window, np.zeros(length - 1), probabilities)


# Laws of the cuts, and sums over everything that a law can draw.


def never() -> Law:
    return lambda elapsed, state: 0.0


def every(length: int) -> Law:
    return lambda elapsed, state: float(elapsed >= length)


def constant(probability: float) -> Law:
    return lambda elapsed, state: probability


def polynomial(mean_length: float, alpha: float) -> Law:
    """Eq. 14: c = (α − 1) / ((α − 2) L₀ + δt)."""
    return lambda elapsed, state: (alpha - 1) / ((alpha - 2) * mean_length + elapsed)


class Pattern(NamedTuple):
    """One sequence of cuts X₁ … X_{T−1}, the c₁ … c_{T−1} that it met, and how probable it is."""

    cuts: list[int]
    probabilities: list[float]
    probability: float


def cut_patterns(law: Law, run: Linearised, elapsed: int = 1) -> Iterator[Pattern]:
    """All 2^(T−1) sequences of cuts. `elapsed`: δt at t = 1; 1 at the start of a stream (errata 2)."""

    def extend(pattern: Pattern, elapsed: int) -> Iterator[Pattern]:
        t = len(pattern.cuts) + 1
        if t == run.length:
            yield pattern
            return
        c = float(law(elapsed, run.states[t]))
        for cut, chance in ((0, 1 - c), (1, c)):
            longer = Pattern([*pattern.cuts, cut], [*pattern.probabilities, c], pattern.probability * chance)
            if chance > 0:
                yield from extend(longer, 1 if cut else elapsed + 1)

    yield from extend(Pattern([], [], 1.0), elapsed)


def window_sequences(length: int) -> Iterator[tuple[int, ...]]:
    """All ways to walk through `length` steps in consecutive windows: (2,), (1, 1) for length 2."""
    if length == 0:
        yield ()
    for first in range(1, length + 1):
        for rest in window_sequences(length - first):
            yield (first, *rest)


def window_probability(law: Law, run: Linearised, start: int, length: int) -> float:
    """P(the window that starts after step `start` has `length` steps); the end of the run ends it too."""
    chance = 1.0
    for k in range(1, length):
        chance *= 1 - law(k, run.states[start + k])
    ends_with_run = start + length == run.length
    return chance if ends_with_run else chance * law(length, run.states[start + length])


def sequence_probability(law: Law, run: Linearised, windows: Sequence[int]) -> float:
    """The probability that an online pass over the run falls into these windows."""
    starts = np.cumsum([0, *windows[:-1]])
    chances = [window_probability(law, run, int(s), w) for s, w in zip(starts, windows, strict=True)]
    return float(np.prod(chances))


def expectation(pairs: Iterator[tuple[float, Any]]) -> Any:
    """Σ probability · tree, and the probabilities must sum to one."""
    mass, total = 0.0, None
    for probability, tree in pairs:
        mass += probability
        term = jax.tree.map(lambda leaf, p=probability: p * np.asarray(leaf), tree)
        total = term if total is None else jax.tree.map(np.add, total, term)
    np.testing.assert_allclose(mass, 1.0, rtol=1e-12)
    return total


def survival(law: Law, steps: int) -> np.ndarray:
    """(steps + 1,): the probability that a window is longer than k = 0 … steps, Π_{j ≤ k} (1 − c_j)."""
    factors = [1 - law(elapsed, None) for elapsed in range(1, steps + 1)]
    return np.concatenate([[1.0], np.cumprod(factors)])


def mean_length(law: Law, steps: int) -> float:
    """E[L] = Σ_{k ≥ 0} P(L > k), summed up to `steps`."""
    return float(survival(law, steps).sum())


def length_deviation(law: Law, steps: int) -> float:
    """The standard deviation of L: E[L²] = Σ_{k ≥ 0} (2k + 1) P(L > k)."""
    longer = survival(law, steps)
    second = np.sum((2 * np.arange(len(longer)) + 1) * longer)
    return float(np.sqrt(second - longer.sum() ** 2))


# A second, unlike oracle: reverse mode by jax.grad over an unrolled Python loop whose edges are scaled.


def unrolled_loss(system: Any, params: Any, hidden: Any, inputs: Any, weights: Weights | None = None) -> Any:
    """Σₜ ℓₜ; the derivative through the edge between steps t and t + 1 is multiplied by weights[t − 1]."""

    def scale(leaf: jax.Array, weight: float) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        stopped = jax.lax.stop_gradient(leaf)
        return stopped if weight == 0 else stopped + weight * (leaf - stopped)

    total = jnp.float64(0)
    for t, x in enumerate(steps_of(inputs)):
        if t > 0 and weights is not None:
            hidden = jax.tree.map(lambda leaf, w=weights[t - 1]: scale(leaf, w), hidden)
        hidden = system.transition(params.recurrent, hidden, x)
        total += system.loss(params, hidden, x)[0]
    return total
