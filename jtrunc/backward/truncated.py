"""Truncated backpropagation through time, with a phase that survives from update to update."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.backward.masked import with_mask
from jtrunc.backward.unroll import Window, window_gradient
from jtrunc.base import Aux, Estimate, GradientEstimator, Params, PyTree, System
from jtrunc.checks import check_key, check_params, check_size, check_step, check_system
from jtrunc.devices import anchor, vary
from jtrunc.trees import accumulator, add_into, cast_like, strongly_typed


class TruncatedState(NamedTuple):
    """The state between updates.

    Attributes:
      hidden: h after the last step.
      phase: int32 in [0, L): steps since the last cut.
    """

    hidden: PyTree
    phase: jax.Array


def truncated_bptt(system: System, length: int) -> GradientEstimator:
    """Truncated BPTT: the backward pass is cut every L steps of the stream (ARTBP paper, eq. 9).

        λₜ = ∂ℓₜ/∂hₜ + wₜ₊₁ (∂hₜ₊₁/∂hₜ)ᵀ λₜ₊₁,   w = 0 where t is a multiple of L, or t = T; else 1

    Biased: dependencies longer than the window are missing, and their sign can matter more than their size.
    The last, possibly shorter, window starts at T with its local term (errata 1). Cuts are counted along
    the stream: an update may be given any number of steps, and the position in the window is carried to
    the next. Only the present `inputs` are reached, so an update of fewer than L steps sees at most these.
    Ragged tails count in full.

    Memory O(L), for any T; time O(T).

    Args:
      system: a `System`.
      length: L ≥ 1, steps.

    Returns:
      A `GradientEstimator`; `update` consumes all T steps of `inputs`.

    Raises:
      TypeError, ValueError: `length` is no positive integer, or bad system, params or inputs.

    Example: hₜ = θ hₜ₋₁ + 1, ℓₜ = hₜ; the cut after two steps drops dh₃/dh₂ · dh₂/dθ = 0.5.

      >>> system = System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h, ()))
      >>> params, inputs = Params(jnp.float32(0.5)), jnp.ones(3, jnp.float32)
      >>> estimator = truncated_bptt(system, length=2)
      >>> estimate, state = estimator.update(params, estimator.init(params, jnp.float32(0)), inputs)
      >>> float(estimate.grads.recurrent), int(state.phase)
      (2.5, 1)
    """
    check_system("truncated_bptt", system)
    check_size("truncated_bptt", "length", length)

    def init(params: Params, hidden: PyTree, key: jax.Array | None = None) -> TruncatedState:
        check_params(params)
        check_key("truncated_bptt", key, random=False)
        return TruncatedState(strongly_typed(hidden), jnp.int32(0))

    def update(params: Params, state: TruncatedState, inputs: PyTree) -> tuple[Estimate, TruncatedState]:
        num_steps = check_step(system, params, state.hidden, inputs)
        if num_steps <= length:
            # At most one cut lies inside: one window, whose edge there has the weight 0.
            position = (state.phase + jnp.arange(num_steps)) % length
            result = window_gradient(system, params, state.hidden, inputs, Window(position != 0))
            hidden, loss, grads, aux = result.hidden, result.loss, result.grads, result.aux
        else:
            hidden, loss, grads, aux = _many_windows(system, length, params, state, inputs, num_steps)
        phase = (state.phase + num_steps) % length
        estimate = Estimate(loss, grads, np.int32(num_steps), Aux(aux, {}))  # pyright: ignore
        return estimate, TruncatedState(hidden, phase)

    return GradientEstimator(init, update)


def _many_windows(
    system: System, length: int, params: Params, state: TruncatedState, inputs: PyTree, num_steps: int
) -> tuple[PyTree, jax.Array, Params, PyTree]:
    """Window after window in a loop whose memory is that of one; the first and last may be partial."""
    inputs = strongly_typed(inputs)
    anchored = anchor(params, state, inputs)
    params, pull_vary = jax.vjp(lambda params: vary(params, anchored), params)
    state = vary(state, anchored)
    masked = with_mask(system)
    most_windows = (num_steps + length - 2) // length + 1
    num_windows = (state.phase + num_steps + length - 1) // length

    def inputs_of(index: Any) -> tuple[jax.Array, PyTree]:
        start = jnp.maximum(index * length - state.phase, 0)
        stop = jnp.minimum((index + 1) * length - state.phase, num_steps)
        rows = start + jnp.arange(length)
        window = jax.tree.map(lambda leaf: leaf[jnp.minimum(rows, num_steps - 1)], inputs)
        return rows < stop, window

    def window(index: Any, carry: Any) -> Any:
        hidden, loss, grads, aux = carry
        result = window_gradient(masked, params, hidden, inputs_of(index))
        aux = jax.tree.map(lambda all_rows, rows: all_rows.at[index].set(rows), aux, result.aux)
        return result.hidden, loss + result.loss, add_into(grads, result.grads), aux

    shapes = jax.eval_shape(lambda: window_gradient(masked, params, state.hidden, inputs_of(0)))
    aux = jax.tree.map(lambda leaf: jnp.zeros((most_windows, *leaf.shape), leaf.dtype), shapes.aux)
    carry = vary((state.hidden, jnp.zeros((), shapes.loss.dtype), accumulator(params), aux), anchored)
    hidden, loss, grads, aux = jax.lax.fori_loop(0, num_windows, window, carry)

    # Step t lies in window (t + phase) // L; the first window begins at step 0, not at −phase.
    steps = state.phase + jnp.arange(num_steps)
    offsets = jnp.where(steps < length, jnp.arange(num_steps), steps % length)
    aux = jax.tree.map(lambda leaf: leaf[steps // length, offsets], aux)
    (grads,) = pull_vary(cast_like(grads, params))
    return hidden, loss, grads, aux
