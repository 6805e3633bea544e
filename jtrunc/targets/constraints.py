"""Constraint functions C(ĥ, h): what it costs that a free state differs from the predicted one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.base import Params, PyTree
from jtrunc.trees import inexact_part, inner_product, is_concrete

Constraint = Callable[[Params, PyTree, PyTree], jax.Array]
"""``(params, predicted, free) -> scalar``, for the state at the end of one block; 0 where both agree."""
NUMBERS = (int, float, np.generic, np.ndarray, jax.Array)
"""What may stand for λ."""


def check_constraint(owner: str, constraint: Any) -> None:
    """A function, or a clear error."""
    if not callable(constraint):
        raise TypeError(
            f"{owner}: `constraint` must be a function (params, predicted, free) -> scalar, such as "
            f"jtrunc.targets.quadratic, not {constraint!r}"
        )


def check_penalty(owner: str, penalty: Any, wanted: str = "a number λ") -> None:
    """A scalar λ ≥ 0, or a clear error."""
    if isinstance(penalty, bool) or not isinstance(penalty, NUMBERS):
        raise TypeError(
            f"{owner}: `penalty` must be {wanted}, not {penalty!r}; a constraint function goes to "
            "`constraint`"
        )
    if np.shape(penalty) != ():
        raise ValueError(f"{owner}: `penalty` must be a scalar λ, not of shape {np.shape(penalty)}")
    if is_concrete(penalty) and not 0 <= float(penalty) < float("inf"):
        raise ValueError(f"{owner}: `penalty` must be finite and at least 0, not {penalty}")


def residual_of(predicted: PyTree, free: PyTree) -> PyTree:
    """r = h − ĥ of the float leaves; None in the place of the others."""
    return jax.tree.map(jnp.subtract, inexact_part(free), inexact_part(predicted))


def quadratic(params: Params, predicted: PyTree, free: PyTree) -> jax.Array:
    """C = ½ ‖h − ĥ‖², over all float leaves of the state, streams included (Wiseman et al. 2017, eq. 7).

    Example:

      >>> float(quadratic(Params(()), jnp.array([1.0, 2.0]), jnp.array([1.0, 5.0])))
      4.5
    """
    residual = residual_of(predicted, free)
    return 0.5 * inner_product(residual, residual)


def kullback_leibler(logits: Callable[[Params, PyTree], jax.Array]) -> Constraint:
    """C = KL(softmax(o(ĥ)) ‖ softmax(o(h))): the two states may differ where the readout o does not see it.

    What section 4.3 of Wiseman et al. (2017) leaves to future work. Its gradient reaches the readout too. It
    is flat in the directions of h that o does not read, so that multipliers, which ask for h = ĥ, converge
    slowly in these, if at all.

    Args:
      logits: ``(params, hidden) -> (..., classes)``, such as the `predict` of a `jtrunc.cells` model.

    Returns:
      ``(params, predicted, free) -> scalar`` in nats, summed over the leading axes.

    Raises:
      TypeError: `logits` is no function.

    Example: (¾, ¼) against (½, ½) is ¾ ln 3 − ln 2.

      >>> constraint = kullback_leibler(lambda params, hidden: hidden)
      >>> round(float(constraint(Params(()), jnp.log(jnp.array([3.0, 1.0])), jnp.zeros(2))), 4)
      0.1308
    """
    if not callable(logits):
        raise TypeError(
            f"kullback_leibler: `logits` must be a function (params, hidden) -> logits, not {logits!r}"
        )

    def constraint(params: Params, predicted: PyTree, free: PyTree) -> jax.Array:
        of_predicted = jax.nn.log_softmax(logits(params, predicted))
        of_free = jax.nn.log_softmax(logits(params, free))
        return jnp.sum(jnp.exp(of_predicted) * (of_predicted - of_free))

    return constraint
