"""ARTBP whose law of truncation follows the measured decay of the gradient, unbiased throughout."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.backward.online_artbp import OnlineArtbpState, sampled_window
from jtrunc.backward.optimal import optimal_probabilities, table_size, uncorrelated
from jtrunc.backward.truncation import (
    Truncation,
    check_law,
    check_optimal_length,
    polynomial,
    probabilities,
    tabulated,
)
from jtrunc.base import Estimate, GradientEstimator, Params, PyTree, System
from jtrunc.checks import check_key, check_params, check_size, check_step, check_system
from jtrunc.devices import anchor, vary
from jtrunc.diagnostics.gradient_norms import log_gradient_norms
from jtrunc.trees import split_at, strongly_typed


class AdaptiveArtbpState(NamedTuple):
    """The state between updates.

    Attributes:
      hidden: h after the last window, which ended with a cut.
      key: a typed key.
      probabilities: (N,) c by steps since the last cut, the last one ever after: the law of the next window.
      pending: (N,) the law that follows, fitted to steps that the stream has not passed yet.
      wait: int32, steps of the stream until `pending` is adopted; 0 where it has been.
      countdown: int32, updates or steps until the next measurement is due.
    """

    hidden: PyTree
    key: jax.Array
    probabilities: jax.Array
    pending: jax.Array
    wait: jax.Array
    countdown: jax.Array


class _Schedule(NamedTuple):
    """How often norms are measured, and how far back."""

    every: int
    unit: Literal["updates", "steps"]
    num_lags: int
    num_times: int
    weighted: bool


def adaptive_artbp(
    system: System,
    mean_length: float,
    *,
    num_lags: int = 100,
    estimate_every: int = 1000,
    unit: Literal["updates", "steps"] = "updates",
    initial: Truncation | None = None,
    num_times: int = 8,
    weighted: bool = False,
) -> GradientEstimator:
    """`online_artbp` with `truncation.optimal`, fitted anew to measured gradient norms while training.

        φ_k² = mean over losses of ‖∂ℓₛ/∂hₛ₋ₖ‖²,   c = argmin Σ_k φ_k² Σᵢ G(i)² / G(i + k)  at ΣG = L₀

    Every `estimate_every` updates (or steps of the stream) the norms are measured on the R + num_times steps
    of the look-ahead and the law of least variance at mean window length L₀ is found, inside the compiled
    program. The law is adopted once the stream has moved past those steps: the c of a window depend on
    earlier windows, never on its own data or draws. A measurement with norms that are not finite, or zero at
    every lag, changes nothing.

    Unbiased throughout, as `online_artbp` is: whatever was measured, each boundary is cut with the
    probability that its factor 1/(1 − c) compensates; the norms only decide on the variance. Lags beyond R
    count as nothing, so let R exceed the memory that is to be learned.

    Each update reads a look-ahead of N ≥ num_lags + num_times steps and consumes the L steps of its window.
    Optimal laws have many windows of a single step, and some that outlast R: a window still uncut at the end
    of the look-ahead is a bias, and counted (errata 7). Cost of a measurement: R steps forward, R · num_times
    back, and the fit of the law (0.03 s at R = 100 in float32, on one core).

    Args:
      mean_length: L₀ > 1, steps.
      num_lags: R, how far back norms are measured, steps.
      estimate_every: how long a law rests, in `unit`; no measurement is made while a law waits.
      initial: the law until the first measured one, which is then due after `estimate_every`: any that draws
        and reads no state. None: ``truncation.polynomial(mean_length, 4)``, and a measurement at once.
      num_times: losses that a measurement follows back.
      weighted: norms ‖λᵀ ∂F/∂θ‖, which make the variance up, instead of ‖λ‖, which cost less.

    Returns:
      A `GradientEstimator`; ``estimate.num_steps`` is L, data. Diagnostics: `look_ahead_hits`, 1 or 0;
      `first_cut`, c₁ of this update's law, the share of windows of one step; `estimation_steps`, the steps
      that a measurement has read in this update (0 in most).

    Raises:
      TypeError, ValueError: L₀ ≤ 1, sizes that are no positive integers, an unknown unit, an initial law that
        is none, reads the state, is given for some boundaries or draws nothing, a look-ahead that is too
        short, no typed key, or bad system, params or inputs.

    Example: hₜ = ½ hₜ₋₁ + xₜ forgets half at every step. Its law, once the stream has passed the 12 steps
    on which it was measured, cuts four windows in ten after their first step.

      >>> system = System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h, ()))
      >>> params, inputs = Params(jnp.float32(0.5)), jnp.ones(64, jnp.float32)
      >>> estimator = adaptive_artbp(system, mean_length=4, num_lags=8, num_times=4)
      >>> state, update = estimator.init(params, jnp.float32(0), jax.random.key(0)), jax.jit(estimator.update)
      >>> for _ in range(12):
      ...     estimate, state = update(params, state, inputs)
      >>> [round(c, 2) for c in state.probabilities[:3].tolist()]
      [0.38, 0.21, 0.21]
    """
    check_system("adaptive_artbp", system)
    check_optimal_length("adaptive_artbp", mean_length)
    sizes = {"num_lags": num_lags, "estimate_every": estimate_every, "num_times": num_times}
    for name, value in sizes.items():
        check_size("adaptive_artbp", name, value)
    if unit not in ("updates", "steps"):
        raise ValueError(f'adaptive_artbp: `unit` must be "updates" or "steps", not {unit!r}')
    schedule = _Schedule(estimate_every, unit, num_lags, num_times, weighted)
    first_law = _checked_initial(polynomial(mean_length, 4) if initial is None else initial)

    def init(params: Params, hidden: PyTree, key: jax.Array | None = None) -> AdaptiveArtbpState:
        check_params(params)
        check_key("adaptive_artbp", key, random=True)
        assert key is not None
        table = probabilities(first_law, table_size(num_lags + 1))
        countdown = jnp.int32(0 if initial is None else estimate_every)
        return AdaptiveArtbpState(strongly_typed(hidden), key, table, table, jnp.int32(0), countdown)

    def update(params: Params, state: AdaptiveArtbpState, inputs: PyTree) -> tuple[Estimate, Any]:
        look_ahead = check_step(system, params, state.hidden, inputs)
        if look_ahead < num_lags + num_times:
            raise ValueError(
                f"adaptive_artbp: `inputs` has {look_ahead} steps; a measurement reads a look-ahead of "
                f"num_lags + num_times = {num_lags + num_times}, whatever the windows are"
            )
        law = tabulated(state.probabilities)
        estimate, window = sampled_window(
            system, law, params, OnlineArtbpState(state.hidden, state.key), inputs
        )
        pending, estimation_steps = _measured(system, mean_length, schedule, params, state, inputs)
        measured = estimation_steps > 0
        wait = jnp.maximum(jnp.where(measured, estimation_steps, state.wait) - estimate.num_steps, 0)
        passed = estimate.num_steps if unit == "steps" else 1
        new_state = AdaptiveArtbpState(
            hidden=window.hidden,
            key=window.key,
            probabilities=jnp.where(wait == 0, pending, state.probabilities),
            pending=pending,
            wait=wait,
            countdown=jnp.where(measured, estimate_every, state.countdown) - passed,
        )
        diagnostics = estimate.aux.diagnostics | {
            "first_cut": state.probabilities[0],
            "estimation_steps": estimation_steps,
        }
        return estimate._replace(aux=estimate.aux._replace(diagnostics=diagnostics)), new_state

    return GradientEstimator(init, update)


def _checked_initial(initial: Any) -> Truncation:
    law = check_law("adaptive_artbp", initial)
    if law.reads_hidden or law.length is not None or not law.random:
        raise ValueError(
            "adaptive_artbp: `initial` must be a random law of the steps since the last cut alone, such as "
            "jtrunc.truncation.polynomial(16, 4)"
        )
    return law


def _measured(
    system: System,
    mean_length: float,
    schedule: _Schedule,
    params: Params,
    state: AdaptiveArtbpState,
    inputs: PyTree,
) -> tuple[jax.Array, jax.Array]:
    """The law that is to follow, from new norms where they are due, and how many steps were read for it."""
    num_steps = schedule.num_lags + schedule.num_times

    def measure() -> tuple[jax.Array, jax.Array]:
        window, _ = split_at(inputs, num_steps)
        log_norms = log_gradient_norms(
            system,
            params,
            state.hidden,
            window,
            schedule.num_lags,
            num_times=schedule.num_times,
            weighted=schedule.weighted,
        )
        log_squares = jax.nn.logsumexp(2 * log_norms, axis=0) - math.log(log_norms.shape[0])
        known = jnp.all(log_squares < jnp.inf) & jnp.any(log_squares[1:] > -jnp.inf)  # a nan is not known
        safe = jnp.where(known, log_squares, 0.0).astype(state.pending.dtype)
        found = optimal_probabilities(uncorrelated(safe), mean_length)
        return jnp.where(known, found, state.pending), jnp.int32(num_steps)

    anchored = anchor(params, state, inputs)
    return jax.lax.cond(
        (state.countdown <= 0) & (state.wait == 0),
        lambda: vary(measure(), anchored),
        lambda: vary((state.pending, jnp.int32(0)), anchored),
    )
