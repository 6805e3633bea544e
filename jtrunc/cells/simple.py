"""Tanh and leaky cells."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jtrunc.base import PyTree
from jtrunc.cells.cell import Cell, check_sizes, orthogonal, plain_input, variance_scaled, zeros_hidden
from jtrunc.structure import Affine, Structure


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


def _simple(input_size: int, width: int, combine: Any) -> Cell:
    def init(key: jax.Array, dtype: Any = jnp.float32) -> PyTree:
        hidden_key, input_key = jax.random.split(key)
        return {
            "hidden_kernel": orthogonal(hidden_key, width, 1, dtype),
            "input_kernel": variance_scaled(input_key, (input_size, width), dtype),
            "bias": jnp.zeros(width, dtype),
        }

    structure = Structure(
        affine=lambda theta: {"units": Affine(theta["hidden_kernel"], theta["input_kernel"], theta["bias"])},
        hidden_features=lambda hidden, inputs: {"units": hidden},
        input_features=lambda inputs: {"units": plain_input(inputs)},
        combine=combine,
    )
    return Cell(init, zeros_hidden(width), lambda hidden: hidden, structure, width)
