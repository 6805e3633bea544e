"""Learning rates that are indexed by the timestep of the data, not by the count of updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def inverse_square_root(rate: float) -> Callable[[jax.Array], jax.Array]:
    """The schedule ηₜ = η₀ / √(1 + t).

    Args:
      rate: η₀.

    Returns:
      ``timestep -> ηₜ``, float32 or wider.

    Example:

      >>> schedule = inverse_square_root(0.1)
      >>> round(float(schedule(jnp.int32(99))), 6)
      0.01

    Source: Tallec & Ollivier (2017), section 6.
    """

    def schedule(timestep: jax.Array) -> jax.Array:
        return rate / jnp.sqrt(1 + jnp.asarray(timestep, jnp.result_type(float)))

    return schedule


def scale_by_timestep_schedule(
    schedule: Callable[[jax.Array], jax.Array],
) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by ``schedule(t)``, t = the last timestep of the window that gave the gradient.

    Estimators whose windows differ in length are compared fairly only if the rate decays with the data
    that was seen, and not with the number of updates (errata 5). `jtrunc.training` passes `timestep` to
    the optimiser at every update; a loop of your own does so by ``tx.update(grads, state, params,
    timestep=t)``. Like `optax.scale_by_schedule` it does not flip the sign: end the chain with
    ``optax.scale(-1.0)``.

    Args:
      schedule: ``timestep -> scalar``; `timestep` is int32, 1 after the first step of the stream.

    Raises:
      TypeError: if `schedule` cannot be called.
      ValueError: at `update`, if no `timestep` is passed.

    Example:

      >>> tx = optax.chain(scale_by_timestep_schedule(inverse_square_root(0.1)), optax.scale(-1.0))
      >>> update, _ = tx.update(jnp.float32(2.0), tx.init(jnp.float32(0.0)), timestep=jnp.int32(99))
      >>> round(float(update), 6)
      -0.02
    """
    if not callable(schedule):
        raise TypeError(
            f"scale_by_timestep_schedule: `schedule` must be a function of the timestep, not {schedule!r}; "
            "for a constant rate use optax.scale"
        )

    def init(params: optax.Params) -> optax.EmptyState:
        return optax.EmptyState()

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        timestep: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if timestep is None:
            raise ValueError(
                "scale_by_timestep_schedule: `timestep` is missing; pass it as "
                "tx.update(grads, state, params, timestep=t), t = the last timestep of the window"
            )
        factor = schedule(timestep)
        return jax.tree.map(lambda leaf: jnp.asarray(factor, leaf.dtype) * leaf, updates), state

    return optax.GradientTransformationExtraArgs(init, update)
