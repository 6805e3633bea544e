"""Influence balancing: a parameter that helps at first and harms later.

A row of p + n agents, each passing half of its state on to its left neighbour; the p leftmost receive
+θ at every step, the n rightmost −θ, and the leftmost must reach 1:

    sₜ₊₁ = A sₜ + θ v,   Aₖₖ = Aₖ,ₖ₊₁ = 1/2,   v = (+1 p times, −1 n times),   ℓₜ = ½ (s¹ₜ − 1)².

With n > p the short-term influence of θ on s¹ is positive and the total one negative: a gradient that is
truncated too early has the wrong sign.

Source: "Unbiasing truncated backpropagation through time" (2017), section 6.1, equations 15-16. θ₀ and s₀
are not given there; θ₀ = −0.5 and s₀ = 0 are used (errata 5).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jtrunc.base import Params, System
from jtrunc.tasks.arguments import require_count

INITIAL_THETA = -0.5


class InfluenceBalancing(NamedTuple):
    """The system and where a run of it begins.

    Attributes:
      system: `jtrunc.System`; its aux is ``()``, its inputs are a bare time axis (see `inputs`).
      params: ``Params(recurrent=θ)``, θ a scalar.
      hidden: s₀ = 0, shape (p + n,), the dtype of θ.
    """

    system: System
    params: Params
    hidden: jax.Array


def build(
    num_positive: int = 10,
    num_negative: int = 13,
    theta: ArrayLike = INITIAL_THETA,
    dtype: DTypeLike = jnp.float32,
) -> InfluenceBalancing:
    """The task with p = `num_positive` and n = `num_negative` agents.

      sₜ₊₁ = A sₜ + θ v,   ℓₜ = ½ (s¹ₜ − 1)²      (equations 15-16)

    Args:
      num_positive: p ≥ 0, the leftmost agents, which receive +θ.
      num_negative: n ≥ 0, the rightmost agents, which receive −θ; p + n ≥ 1.
      theta: initial θ, a scalar.
      dtype: of θ and of the state; float64 needs x64.

    Raises:
      TypeError: if p or n is not a whole number, or `dtype` is not floating.
      ValueError: if p or n is negative, both are 0, or θ is not a finite scalar.

    Example: while the state is empty the leftmost agent only feels its own signal.

      >>> from jtrunc.tasks import influence_balancing
      >>> task = influence_balancing.build(num_positive=1, num_negative=3, theta=0.5)
      >>> hidden = task.system.transition(task.params.recurrent, task.hidden, 0.0)
      >>> hidden.tolist()
      [0.5, -0.5, -0.5, -0.5]
      >>> float(task.system.loss(task.params, hidden, 0.0)[0])
      0.125
    """
    signal = _signal(num_positive, num_negative)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating type, got {dtype}; pass e.g. jnp.float32")
    initial = np.asarray(theta)
    if initial.shape != () or not np.isfinite(initial):
        raise ValueError(f"theta must be one finite number, got {theta!r}; the default is {INITIAL_THETA}")

    def transition(theta: jax.Array, hidden: jax.Array, inputs: object) -> jax.Array:
        from_the_right = jnp.pad(hidden[1:], (0, 1))
        return 0.5 * hidden + 0.5 * from_the_right + theta * signal.astype(hidden.dtype)

    def loss(params: Params, hidden: jax.Array, inputs: object) -> tuple[jax.Array, tuple[()]]:
        return 0.5 * (hidden[0] - 1.0) ** 2, ()

    params = Params(recurrent=jnp.asarray(initial, dtype))
    hidden = jnp.zeros(signal.shape, params.recurrent.dtype)
    return InfluenceBalancing(System(transition, loss), params, hidden)


def inputs(num_steps: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """A bare time axis, zeros of shape (num_steps,): the system has no inputs and reads nothing of it."""
    return jnp.zeros(require_count("num_steps", num_steps), dtype)


def stationary_state(theta: float, num_positive: int = 10, num_negative: int = 13) -> np.ndarray:
    """The state that the system settles in at fixed θ: sᵏ = 2θ Σ_{j ≥ k} vⱼ, so s¹ = 2(p − n)θ.

    Returns:
      float64, shape (p + n,).

    Example:

      >>> from jtrunc.tasks import influence_balancing
      >>> influence_balancing.stationary_state(0.5, num_positive=1, num_negative=3).tolist()
      [-2.0, -3.0, -2.0, -1.0]
    """
    signal = _signal(num_positive, num_negative)
    return 2.0 * theta * np.cumsum(signal[::-1])[::-1]


def optimum(num_positive: int = 10, num_negative: int = 13) -> float:
    """θ* = 1 / (2(p − n)), where the stationary s¹ is 1 and the loss 0; −1/6 for p = 10, n = 13.

    Raises:
      ValueError: if p = n, where the stationary s¹ is 0 whatever θ is.
    """
    return 1.0 / total_influence(num_positive, num_negative)


def total_influence(num_positive: int = 10, num_negative: int = 13) -> float:
    """∂s¹/∂θ of the stationary state, 2(p − n): the limit of `truncated_influence`.

    Raises:
      ValueError: if p = n, where it is 0 and the task has no optimum.
    """
    _signal(num_positive, num_negative)
    if num_positive == num_negative:
        raise ValueError(f"num_positive = num_negative = {num_positive} has no optimum; make them differ")
    return 2.0 * (num_positive - num_negative)


def influence_by_lag(num_lags: int, num_positive: int = 10, num_negative: int = 13) -> np.ndarray:
    """∂s¹ₜ/∂θ through the signal of i steps ago, (Aⁱ v)₁, for i = 0 … num_lags − 1.

    Returns:
      float64, shape (num_lags,); its sum over all lags is `total_influence`.

    Example:

      >>> from jtrunc.tasks import influence_balancing
      >>> influence_balancing.influence_by_lag(4, num_positive=1, num_negative=1).tolist()
      [1.0, 0.0, -0.25, -0.25]
    """
    signal = _signal(num_positive, num_negative)
    influence = np.zeros(require_count("num_lags", num_lags))
    for lag in range(len(influence)):
        influence[lag] = signal[0]
        signal = 0.5 * (signal + np.append(signal[1:], 0.0))
    return influence


def truncated_influence(length: int, num_positive: int = 10, num_negative: int = 13) -> float:
    """Ḡ(L): what a gradient cut every L = `length` steps believes ∂s¹/∂θ to be, averaged over the window.

      Ḡ(L) = 1/L Σ_{j=1}^{L} Σ_{i<j} (Aⁱ v)₁

    It is exact up to rounding in float64. For p = 10, n = 13 (errata 5): +5.50 at L = 10, +0.58 at 100,
    −2.71 at 200, −6 in the limit; the sign changes between L = 109 and 110.

    Example:

      >>> from jtrunc.tasks import influence_balancing
      >>> [round(influence_balancing.truncated_influence(length), 2) for length in (10, 100, 200)]
      [5.5, 0.58, -2.71]
    """
    lags = np.arange(require_count("length", length))
    return float(np.sum((1.0 - lags / length) * influence_by_lag(length, num_positive, num_negative)))


def stationary_gradient(
    theta: float, num_positive: int = 10, num_negative: int = 13, length: int | None = None
) -> float:
    """The gradient per step at fixed θ once the state has settled: (s¹ − 1) ∂s¹/∂θ.

    Args:
      theta: θ.
      num_positive: p.
      num_negative: n.
      length: None for the exact gradient, 2(p − n)(2(p − n)θ − 1), which is 6(6θ + 1) for p = 10, n = 13;
        L for that of truncated BPTT with windows of L steps, (s¹ − 1) Ḡ(L).

    Example: truncation at 100 steps reverses the sign.

      >>> from jtrunc.tasks import influence_balancing
      >>> influence_balancing.stationary_gradient(-0.5)
      -12.0
      >>> round(influence_balancing.stationary_gradient(-0.5, length=100), 2)
      1.16
    """
    leftmost = stationary_state(theta, num_positive, num_negative)[0]
    if length is None:
        influence = 2.0 * (num_positive - num_negative)
    else:
        influence = truncated_influence(length, num_positive, num_negative)
    return float((leftmost - 1.0) * influence)


def _signal(num_positive: int, num_negative: int) -> np.ndarray:
    """v: +1 for the p leftmost agents, −1 for the n rightmost, float64."""
    num_positive = require_count("num_positive", num_positive, minimum=0)
    num_negative = require_count("num_negative", num_negative, minimum=0)
    if num_positive + num_negative == 0:
        raise ValueError("num_positive and num_negative are both 0; at least one agent is needed")
    return np.concatenate([np.ones(num_positive), -np.ones(num_negative)])
