"""Clipping to what gradients have been so far."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jtrunc.checks import check_positive
from jtrunc.trees import clip_to_norm, norm_in_parts


class RunningNormState(NamedTuple):
    """What has been seen.

    Attributes:
      mean: float32, the weighted mean of the norms so far, the latest weighing most.
      weight: float32, 1 − βⁿ after n gradients; 0 before the first.
    """

    mean: jax.Array
    weight: jax.Array


def clip_by_running_norm(factor: float = 3.0, *, decay: float = 0.99) -> optax.GradientTransformation:
    """Scale a gradient down to a multiple of the mean norm of those before it.

        g ← g · min(1, f · m / ‖g‖),   m = Σ_{s<t} βᵗ⁻¹⁻ˢ n_s / Σ_{s<t} βᵗ⁻¹⁻ˢ,   n_s = min(‖g_s‖, f · m_s)

    A limit that needs no knowledge of the gradient's scale, which for sums over windows grows with the
    window and with the reweighting of random ones. The limit of a gradient does not depend on that gradient;
    the norms that make it are the clipped ones, so that one burst cannot lift it far. The first gradient is
    never clipped.

    Biased wherever it clips, as all clipping: large estimates are where an unbiased estimator makes up for
    its many small ones. `optax.clip_by_global_norm` has a fixed limit, `clip_by_truncation_length` one that
    follows K; `jtrunc.clipped` clips inside an estimator, where `jtrunc.audit` can measure the bias.

    Args:
      factor: f > 0.
      decay: β in (0, 1): 0.99 remembers about a hundred updates.

    Returns:
      An optax transformation; put it in front of the optimiser. NaN and infinities pass, and leave the mean
      as it is. Memory: two numbers.

    Raises:
      TypeError, ValueError: a `factor` that is no positive finite number, a `decay` outside (0, 1).

    Example: after gradients of norm 1, one of 100 is clipped to 3.

      >>> tx = clip_by_running_norm()
      >>> state = tx.init(jnp.float32(0))
      >>> for gradient in (1.0, 1.0, 100.0):
      ...     update, state = tx.update(jnp.float32(gradient), state)
      >>> round(float(update), 4)
      3.0
    """
    owner = "clip_by_running_norm"
    factor, decay = check_positive(owner, "factor", factor), check_positive(owner, "decay", decay)
    if decay >= 1:
        raise ValueError(
            f"{owner}: `decay` must lie in (0, 1), not {decay}; 0.99 remembers about 100 updates"
        )

    def init(params: optax.Params) -> RunningNormState:
        return RunningNormState(jnp.float32(0), jnp.float32(0))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, RunningNormState]:
        limit = jnp.where(state.weight > 0, factor * state.mean, jnp.inf)
        clipped, _ = clip_to_norm(updates, limit)
        largest, relative = norm_in_parts(updates)
        norm = jnp.minimum(jnp.float32(largest) * jnp.float32(relative), limit)
        weight = 1 - decay * (1 - state.weight)
        mean = state.mean + (norm - state.mean) * (1 - decay) / weight
        seen = RunningNormState(mean, weight)
        kept = jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(relative), new, old), seen, state)
        return clipped, kept

    return optax.GradientTransformation(init, update)
