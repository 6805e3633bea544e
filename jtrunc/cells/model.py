"""A cell with a linear readout and a loss: the system that most experiments train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import Params, PyTree, System
from jtrunc.cells.cell import Cell, variance_scaled
from jtrunc.checks import check_size
from jtrunc.structure import Stack, Structure, add_bias, transition_of


class Model(NamedTuple):
    """A system with its initial parameters and state.

    Attributes:
      system: `inputs` are pairs ``(x, target)``.
      init: ``(key, dtype=float32) -> Params``.
      initial_hidden: ``(batch_shape=(), dtype=float32) -> hidden``.
      predict: ``(params, hidden) -> prediction``, the readout.
    """

    system: System
    init: Callable[..., Params]
    initial_hidden: Callable[..., PyTree]
    predict: Callable[[Params, PyTree], jax.Array]


def model(cell: Cell, output_size: int, loss: Callable[[jax.Array, Any], Any]) -> Model:
    """A cell with a linear readout: prediction = output(hₜ) W + b, ℓₜ = loss(prediction, targetₜ).

    Args:
      cell: from `jtrunc.cells`.
      output_size: columns of the readout's kernel.
      loss: ``(prediction, target) -> scalar`` or ``(scalar, aux)``.

    Returns:
      A `Model`, whose ``system.loss`` has the aux of `loss`, or () where it has none.

    Raises:
      TypeError, ValueError: an output size that is not a positive integer.

    Example:

      >>> from jtrunc import cells
      >>> net = cells.model(cells.tanh(4, 8), 4, cells.softmax_cross_entropy)
      >>> params = net.init(jax.random.key(0))
      >>> net.predict(params, net.initial_hidden()).shape
      (4,)
    """
    check_size("model", "output_size", output_size)

    def init(key: jax.Array, dtype: Any = jnp.float32) -> Params:
        cell_key, readout_key = jax.random.split(key)
        kernel = variance_scaled(readout_key, (cell.width, output_size), dtype)
        readout = {"kernel": kernel, "bias": jnp.zeros(output_size, dtype)}
        return Params(cell.init(cell_key, dtype), readout)

    def predict(params: Params, hidden: PyTree) -> jax.Array:
        return add_bias(cell.output(hidden) @ params.readout["kernel"], params.readout["bias"])

    def system_loss(params: Params, hidden: PyTree, inputs: PyTree) -> tuple[jax.Array, PyTree]:
        value = loss(predict(params, hidden), inputs[1])
        return value if isinstance(value, tuple) else (value, ())

    structure = reading_first(cell.structure)
    system = System(transition_of(structure), system_loss, structure)
    return Model(system, init, cell.initial_hidden, predict)


def reading_first(structure: Structure | Stack) -> Structure | Stack:
    """The same structure on inputs ``(x, target)``: it reads x."""
    if isinstance(structure, Stack):
        bottom, *above = structure.layers
        return structure._replace(layers=(_reading_first(bottom), *above))
    return _reading_first(structure)


def _reading_first(structure: Structure) -> Structure:
    return structure._replace(
        hidden_features=lambda hidden, inputs: structure.hidden_features(hidden, inputs[0]),
        input_features=lambda inputs: structure.input_features(inputs[0]),
        combine=lambda elementwise, hidden, inputs, p: structure.combine(elementwise, hidden, inputs[0], p),
    )


def softmax_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """−log softmax(logits)[target], averaged over the batch; nats.

    Args:
      logits: (..., classes).
      targets: integers (...), each in [0, classes).

    Example:

      >>> round(float(softmax_cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3]))), 4)
      1.3863
    """
    log_normaliser = jax.scipy.special.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.mean(log_normaliser - chosen)
