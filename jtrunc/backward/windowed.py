"""BPTT(K₁, K₂): overlapping windows that look K₁ steps back from K₂ losses."""

from __future__ import annotations

import jax
import numpy as np

from jtrunc.backward.bptt import BpttState
from jtrunc.backward.unroll import Window, window_gradient
from jtrunc.base import Aux, Estimate, GradientEstimator, Params, PyTree, System
from jtrunc.checks import check_key, check_params, check_size, check_step, check_system
from jtrunc.trees import strongly_typed


def windowed_bptt(
    system: System, backward_steps: int, loss_steps: int, *, average: bool = True
) -> GradientEstimator:
    """BPTT(K₁, K₂): the last K₂ losses of a window, propagated back over lags 0 … K₁.

        bₖ = ∂ℓ_{s−k}/∂h_{s−k} [k < K₂] + (∂h_{s−k+1}/∂h_{s−k})ᵀ bₖ₋₁,   g = 1/K₂ · Σ_{k=0}^{K₁} bₖᵀ ∂F/∂θ

    Adaptive truncation paper (Aicher et al. 2019), eq. 15 and 16; the sum runs over K₁ + 1 states and is
    always divided by K₂ (errata 9), also where a window scores fewer losses. Biased: lags beyond the window
    are missing; every loss reaches back at least K₁ − K₂ + 1 lags.

    Each `update` is given look-back and losses in one window: it scores the last K₂ of its `inputs`,
    consumes K₂ steps, and `hidden` moves on by as many, so that windows of K₁ + 1 steps overlap. Longer
    inputs are run but not reached by the gradient; shorter ones, at the start of a stream, look back as far
    as they go. Memory O(K₁); time O(K₁) for K₂ losses.

    To begin a stream so that no loss goes unscored, run windows of K₁ + 1 − j K₂ steps from its first step,
    longest j first, and keep ``state.hidden`` at the start until the windows are full; `training.train` does
    so by itself. A shorter window scores the losses it has, so do not overlap the last with the one before.

    Args:
      backward_steps: K₁ ≥ K₂, steps.
      loss_steps: K₂ ≥ 1, steps.
      average: divide the gradient by K₂ as the paper does; False leaves the sum. `Estimate.loss` is the sum
        of the scored losses in both cases.

    Raises:
      TypeError, ValueError: sizes that are no positive integers, K₂ > K₁, or bad system, params or inputs.

    Example: hₜ = θ hₜ₋₁ + 1, ℓₜ = hₜ: the last loss of three alone, over all of its lags.

      >>> import jax.numpy as jnp
      >>> system = System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h, ()))
      >>> params, inputs = Params(jnp.float32(0.5)), jnp.ones(3, jnp.float32)
      >>> estimator = windowed_bptt(system, backward_steps=2, loss_steps=1)
      >>> estimate, state = estimator.update(params, estimator.init(params, jnp.float32(0)), inputs)
      >>> float(estimate.loss), float(estimate.grads.recurrent), float(state.hidden)
      (1.75, 2.0, 1.0)
    """
    check_system("windowed_bptt", system)
    check_size("windowed_bptt", "backward_steps", backward_steps)
    check_size("windowed_bptt", "loss_steps", loss_steps)
    if loss_steps > backward_steps:
        raise ValueError(
            f"windowed_bptt: `loss_steps` {loss_steps} exceeds `backward_steps` {backward_steps}; "
            "a loss before the look-back would get no gradient: raise `backward_steps`"
        )

    def init(params: Params, hidden: PyTree, key: jax.Array | None = None) -> BpttState:
        check_params(params)
        check_key("windowed_bptt", key, random=False)
        return BpttState(strongly_typed(hidden))

    def update(params: Params, state: BpttState, inputs: PyTree) -> tuple[Estimate, BpttState]:
        length = check_step(system, params, state.hidden, inputs)
        num_scored = min(loss_steps, length)
        unreached = max(0, length - (backward_steps + 1))
        window = Window(num_scored=num_scored, unreached=unreached, mark=num_scored)
        result = window_gradient(system, params, state.hidden, inputs, window)
        grads = result.grads
        if average:
            grads = jax.tree.map(lambda grad: grad / loss_steps, grads)
        estimate = Estimate(result.loss, grads, np.int32(num_scored), Aux(result.aux, {}))  # pyright: ignore
        return estimate, BpttState(result.hidden)

    return GradientEstimator(init, update)
