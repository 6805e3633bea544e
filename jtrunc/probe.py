"""What an estimator says of itself while it is traced, on shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jtrunc.base import GradientEstimator, Params, PyTree


def estimator_name(estimator: GradientEstimator) -> str:
    """The name of the function that made the estimator: ``artbp``."""
    return getattr(estimator.update, "__qualname__", type(estimator.update).__name__).split(".")[0]


def built(part: Any, hyperparameters: PyTree) -> Any:
    """An estimator or an optimiser, or what a function of one run's hyperparameters makes of them."""
    return part(hyperparameters) if callable(part) else part


def static_num_steps(
    estimator: GradientEstimator | Callable[[Any], GradientEstimator],
    params: Params,
    hidden: PyTree,
    inputs: PyTree,
    *,
    hyperparameters: PyTree = None,
    owner: str = "train",
) -> int | None:
    """Steps that one update consumes, or None where that is data.

    Found by tracing: an estimator that knows the number returns it as a plain integer.

    Args:
      estimator: one, or a function ``hyperparameters -> estimator``, which gets them as tracers.

    Raises:
      ValueError: each of several streams consumes another number; the message begins with `owner`.
    """
    found: list[int | None] = []

    def probe(hyperparameters: PyTree, params: Params, hidden: PyTree, inputs: PyTree) -> jax.Array:
        chosen = built(estimator, hyperparameters)
        state = chosen.init(params, hidden, jax.random.key(0))
        estimate, _ = chosen.update(params, state, inputs)
        found.append(_known(owner, estimate.num_steps))
        return jnp.asarray(estimate.loss)

    jax.eval_shape(probe, hyperparameters, params, hidden, inputs)
    return found[0]


def _known(owner: str, num_steps: jax.Array) -> int | None:
    """The number, or None for a tracer."""
    if getattr(num_steps, "shape", ()) != ():
        raise ValueError(
            f"{owner}: the estimator consumes another number of steps in each of {num_steps.shape[0]} "
            "streams (`per_stream` of windows of random length), which one cursor cannot follow; put the "
            "batch axis inside the system, so that the streams share their windows, or run them as `seeds`"
        )
    try:
        return int(num_steps)
    except jax.errors.ConcretizationTypeError:
        return None
