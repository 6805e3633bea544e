"""Exact backpropagation through time."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jtrunc.backward.unroll import Window, window_gradient
from jtrunc.base import Aux, Estimate, GradientEstimator, Params, PyTree, System
from jtrunc.checks import check_key, check_params, check_size, check_step, check_system
from jtrunc.trees import strongly_typed


class BpttState(NamedTuple):
    """The state between updates: `hidden`, h after the last step."""

    hidden: PyTree


def bptt(system: System, *, checkpoint: Literal["sqrt"] | int | None = None) -> GradientEstimator:
    """Backpropagation through time over all of `inputs` (Werbos 1990; ARTBP paper, eq. 7 and 8).

        λₜ = ∂ℓₜ/∂hₜ + (∂hₜ₊₁/∂hₜ)ᵀ λₜ₊₁,   g = Σₜ λₜᵀ ∂F/∂θ(xₜ, hₜ₋₁, θ)

    Unbiased: it is the exact gradient of the sum of the losses of `inputs`, given the hidden state that
    enters as a constant. Memory O(T), or O(√T) with ``checkpoint="sqrt"`` at one more forward pass.

    Args:
      system: a `System`.
      checkpoint: None stores every step's residuals; an integer S stores the hidden state every S steps
        and recomputes one segment at a time; "sqrt" takes S = ⌈√T⌉. The gradient is the same.

    Returns:
      A `GradientEstimator`; `update` consumes all T steps of `inputs`.

    Raises:
      TypeError, ValueError: bad system, params, inputs (see `unroll`) or checkpoint; at trace time.

    Example: hₜ = θ hₜ₋₁ + 1, ℓₜ = hₜ, so that d(h₁ + h₂ + h₃)/dθ = 0 + 1 + (1 + 2θ).

      >>> import jax.numpy as jnp
      >>> system = System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h, ()))
      >>> params, inputs = Params(jnp.float32(0.5)), jnp.ones(3, jnp.float32)
      >>> estimator = bptt(system)
      >>> estimate, state = estimator.update(params, estimator.init(params, jnp.float32(0)), inputs)
      >>> float(estimate.loss), float(estimate.grads.recurrent), int(estimate.num_steps)
      (4.25, 3.0, 3)
    """
    check_system("bptt", system)
    if checkpoint is not None and checkpoint != "sqrt":
        if isinstance(checkpoint, str):
            raise ValueError(
                f'bptt: `checkpoint` must be None, "sqrt" or a number of steps, not {checkpoint!r}'
            )
        check_size("bptt", "checkpoint", checkpoint)

    def init(params: Params, hidden: PyTree, key: jax.Array | None = None) -> BpttState:
        check_params(params)
        check_key("bptt", key, random=False)
        return BpttState(strongly_typed(hidden))

    def update(params: Params, state: BpttState, inputs: PyTree) -> tuple[Estimate, BpttState]:
        length = check_step(system, params, state.hidden, inputs)
        segment: Any = math.isqrt(length - 1) + 1 if checkpoint == "sqrt" else checkpoint
        result = window_gradient(system, params, state.hidden, inputs, Window(segment=segment))
        estimate = Estimate(result.loss, result.grads, np.int32(length), Aux(result.aux, {}))  # pyright: ignore
        return estimate, BpttState(result.hidden)

    return GradientEstimator(init, update)
