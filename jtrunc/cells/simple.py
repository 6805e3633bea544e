"""Cells with one affine map: tanh, leaky, and the pre-activation network of the NoBackTrack paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.base import PyTree
from jtrunc.cells.cell import Cell, check_sizes, orthogonal, plain_input, variance_scaled, zeros_hidden
from jtrunc.structure import Affine, Structure

Activation = Callable[[jax.Array], jax.Array]

ACTIVATIONS: dict[str, Activation] = {"tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid}


def tanh(input_size: int, width: int) -> Cell:
    """hₜ = tanh(hₜ₋₁ W + xₜ U + b): the standard recurrent network (ARTBP paper, eq. 3).

    θ = {"hidden_kernel": (width, width), "input_kernel": (input_size, width), "bias": (width,)}; the
    hidden kernel starts orthogonal, the bias at zero.

    Raises:
      TypeError, ValueError: a size that is not a positive integer.

    Example:

      >>> cell = tanh(input_size=2, width=3)
      >>> theta = cell.init(jax.random.key(0))
      >>> cell.transition(theta, cell.initial_hidden(), jnp.zeros(2)).tolist()
      [0.0, 0.0, 0.0]
    """
    check_sizes("tanh", input_size, width)

    def combine(elementwise: PyTree, hidden: PyTree, inputs: PyTree, p: dict[str, jax.Array]) -> PyTree:
        return jnp.tanh(p["units"])

    return _simple(input_size, width, combine)


def leaky(input_size: int, width: int, rate: float) -> Cell:
    """hₜ = (1 − a) hₜ₋₁ + a · tanh(hₜ₋₁ W + xₜ U + b): units that keep 1 − a of their state.

    Args:
      rate: a in (0, 1]; the time constant is 1/a steps, and a = 1 is `tanh`.

    Raises:
      TypeError, ValueError: a size that is not a positive integer, or a rate outside (0, 1].
    """
    check_sizes("leaky", input_size, width)
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"leaky: `rate` must lie in (0, 1], not {rate}; it is the share renewed each step")

    def combine(elementwise: PyTree, hidden: PyTree, inputs: PyTree, p: dict[str, jax.Array]) -> PyTree:
        return (1.0 - rate) * hidden + rate * jnp.tanh(p["units"])

    return _simple(input_size, width, combine)


def preactivation(
    input_size: int, width: int, *, activation: str | Activation = "tanh", feedback: Any = 0.0
) -> Cell:
    """hₜ = α hₜ₋₁ + σ(hₜ₋₁) W + xₜ U + b: the state is the pre-activation, a = σ(h) the output.

    The networks of the NoBackTrack paper (Ollivier, Tallec & Charpiat 2015): eq. 31 (α = 0) and the leaky
    eq. 37, where a unit keeps α of itself, about 1/(1 − α) steps of memory. α is fixed, not a parameter; the
    paper draws it at random, one a unit. θ and its initial values are those of `tanh`; h starts at 0.

    Args:
      activation: σ, "tanh", "sigmoid" or an elementwise function that keeps shape and dtype.
      feedback: α in [0, 1], one number or one a unit (width,).

    Raises:
      TypeError, ValueError: a size that is not a positive integer, an unknown activation, or a feedback
        outside [0, 1] or of another shape.

    Example: a unit of feedback ½ without weights forgets by halves.

      >>> cell = preactivation(input_size=1, width=2, feedback=[0.5, 1.0])
      >>> theta = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0)))
      >>> hidden = cell.transition(theta, jnp.ones(2), jnp.zeros(1))
      >>> hidden.tolist(), [round(a, 4) for a in cell.output(hidden).tolist()]
      ([0.5, 1.0], [0.4621, 0.7616])
    """
    check_sizes("preactivation", input_size, width)
    activity, alpha = _checked_activation(activation), _checked_feedback(feedback, width)

    def combine(elementwise: PyTree, hidden: PyTree, inputs: PyTree, p: dict[str, jax.Array]) -> PyTree:
        if not alpha.any():
            return p["units"]
        return jnp.broadcast_to(jnp.asarray(alpha, hidden.dtype), hidden.shape) * hidden + p["units"]

    return _simple(input_size, width, combine, activity)


def _checked_activation(activation: str | Activation) -> Activation:
    chosen = ACTIVATIONS.get(activation) if isinstance(activation, str) else activation
    if chosen is None or not callable(chosen):
        raise ValueError(
            f"preactivation: `activation` must be one of {sorted(ACTIVATIONS)} or a function, "
            f"not {activation!r}"
        )
    return chosen


def _checked_feedback(feedback: Any, width: int) -> np.ndarray:
    try:
        alpha = np.asarray(feedback, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"preactivation: `feedback` must be known numbers, fixed before tracing, not {feedback!r}"
        ) from error
    if alpha.shape not in ((), (width,)):
        raise ValueError(
            f"preactivation: `feedback` has shape {alpha.shape}; give one number, or one a unit ({width},)"
        )
    outside = alpha[~((alpha >= 0.0) & (alpha <= 1.0))]
    if outside.size:
        raise ValueError(
            f"preactivation: `feedback` must lie in [0, 1], not {outside[0]}; it is the share of h that stays"
        )
    return alpha


def _simple(input_size: int, width: int, combine: Any, output: Activation = lambda hidden: hidden) -> Cell:
    """One map of output(hₜ₋₁) and xₜ, which is also what a readout sees."""

    def init(key: jax.Array, dtype: Any = jnp.float32) -> PyTree:
        hidden_key, input_key = jax.random.split(key)
        return {
            "hidden_kernel": orthogonal(hidden_key, width, 1, dtype),
            "input_kernel": variance_scaled(input_key, (input_size, width), dtype),
            "bias": jnp.zeros(width, dtype),
        }

    structure = Structure(
        affine=lambda theta: {"units": Affine(theta["hidden_kernel"], theta["input_kernel"], theta["bias"])},
        hidden_features=lambda hidden, inputs: {"units": output(hidden)},
        input_features=lambda inputs: {"units": plain_input(inputs)},
        combine=combine,
    )
    return Cell(init, zeros_hidden(width), output, structure, width)
