"""flax.linen cells as systems."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp

from jtrunc.adapters import known
from jtrunc.adapters.assemble import Flavour, Functional, system_of
from jtrunc.base import Params, PyTree, System
from jtrunc.structure import Affine


def linen(
    cell: Any,
    readout: Any,
    loss: Callable[[Any, Any], Any],
    *,
    key: jax.Array | None = None,
    inputs: PyTree = None,
    embed: Any = None,
) -> tuple[System, Params, PyTree]:
    """Make a system of a flax.linen cell (or a stack of cells), a readout and a loss.

        hₜ, yₜ = cell(hₜ₋₁, embed(xₜ))        ℓₜ = loss(readout(yₜ), targetₜ)        inputs = (x, target)

    flax's own SimpleCell, LSTMCell, OptimizedLSTMCell and GRUCell get a declared `structure` and with it the
    fast engines, unless an option stands against it (mixed dtypes, a gate or activation function that is not
    elementwise, boxed parameters, an `embed` with parameters). Any other cell runs as it is.

    Args:
      cell: an `RNNCellBase`, or any module with ``initialize_carry(key, x_shape)`` and
        ``(carry, x) -> (carry, output)``; a list or tuple is a stack, each reading the output below it.
      readout: module or function ``output -> prediction``; None: the output is the prediction.
      loss: ``(prediction, target) -> scalar`` or ``(scalar, aux)``; the batch is averaged or summed here.
      key: typed key for the initial parameters (and the carry, where its initialiser is random).
      inputs: an example of one time step's x, with its batch axes, e.g. ``jnp.zeros((batch, features))``.
      embed: module or function applied to x first, for tokens: ``nn.Embed(size, features)``, or a function,
        ``lambda x: jax.nn.one_hot(x, size)``, which has no parameters and keeps the structure.

    Returns:
      system: its `inputs` are ``(x, target)``.
      params: flax's own trees: ``cell.apply({"params": params.recurrent}, carry, x)`` and
        ``readout.apply({"params": params.readout}, output)``. `recurrent` is a tuple for a stack, one tree a
        cell, and ``{"embed": ..., "cell": ...}`` where `embed` has parameters.
      hidden: the initial carry with the batch axes of `inputs`, (c, h) for an LSTM; a tuple for a stack. A
        cell whose output is not part of its carry has ``CarryAndOutput(carry, output)``.

    Raises:
      TypeError: an argument is not what is said here.
      ValueError: `key` or `inputs` is missing, or a module draws random numbers or writes variables: a
        transition is a pure function. Make dropout deterministic, or keep its key in the carry of a cell of
        your own (it may have key leaves) or in x.

    Example:

      >>> import flax.linen as nn, jax, jax.numpy as jnp, jtrunc
      >>> system, params, hidden = jtrunc.adapters.linen(
      ...     nn.LSTMCell(8), nn.Dense(2), lambda y, target: jnp.sum((y - target) ** 2),
      ...     key=jax.random.key(0), inputs=jnp.zeros((4, 3)))
      >>> jax.tree.map(jnp.shape, hidden)
      ((4, 8), (4, 8))
      >>> sorted(params.recurrent), params.readout["kernel"].shape
      (['hf', 'hg', 'hi', 'ho', 'if', 'ig', 'ii', 'io'], (8, 2))
    """
    if key is None:
        raise ValueError("key is missing: linen draws the parameters here; give e.g. key=jax.random.key(0)")
    if inputs is None:
        raise ValueError(
            "inputs is missing: give an example of one time step's x with its batch axes, e.g. "
            "inputs=jnp.zeros((batch, features))"
        )
    return system_of(_LINEN, cell, readout, loss, embed, key, inputs)


def _functional(module: nn.Module, key: jax.Array, *args: Any) -> Functional:
    """Initialise a module; what it keeps beside its parameters (fixed statistics) stays as it is."""
    variables = dict(module.init(key, *args))
    params = variables.pop("params", {})

    def apply(params: PyTree, *args: Any) -> Any:
        try:
            return module.apply({**variables, "params": params}, *args)
        except (flax.errors.InvalidRngError, flax.errors.ModifyScopeVariableError) as error:
            raise ValueError(
                f"{type(module).__name__} is not a pure function of its arguments: {error} Make dropout "
                f"deterministic and fix running statistics, or keep the key in the carry of your own cell or "
                f"in x."
            ) from error

    return Functional(params, apply)


def _initial_carry(cell: Any, key: jax.Array, x: PyTree) -> PyTree:
    return cell.initialize_carry(key, jax.tree.map(jnp.shape, x))


def _form(cell: Any, params: PyTree) -> known.Form | None:
    """The structure of one of flax's own cells; a subclass may do anything, so the type must be exact."""
    if type(cell) is nn.SimpleCell:
        weights, names = known.simple(_simple_affine, cell.activation_fn, cell.residual), {"i", "h"}
        functions = (cell.activation_fn,)
    elif type(cell) in (nn.LSTMCell, nn.OptimizedLSTMCell):
        weights, names = known.lstm(_lstm_affine, cell.gate_fn, cell.activation_fn), _names("ifgo")
        functions = (cell.gate_fn, cell.activation_fn)
    elif type(cell) is nn.GRUCell:
        weights, names = known.gru(_gru_affine, cell.gate_fn, cell.activation_fn), _names("rzn")
        functions = (cell.gate_fn, cell.activation_fn)
    else:
        return None
    # Boxed parameters, and activations with parameters of their own, show as other names or leaves.
    plain = all(isinstance(leaf, jax.Array) for layer in params.values() for leaf in layer.values())
    return known.Form(weights, functions, cell.dtype) if set(params) == names and plain else None


def _names(gates: str) -> set[str]:
    return {source + gate for source in "ih" for gate in gates}


def _simple_affine(theta: Mapping[str, Any]) -> dict[str, Affine]:
    return {"units": Affine(theta["h"]["kernel"], theta["i"]["kernel"], theta["i"]["bias"])}


def _lstm_affine(theta: Mapping[str, Any]) -> dict[str, Affine]:
    hidden, inputs = ["hi", "hf", "hg", "ho"], ["ii", "if", "ig", "io"]
    return {"gates": Affine(_joined(theta, hidden), _joined(theta, inputs), _joined(theta, hidden, "bias"))}


def _gru_affine(theta: Mapping[str, Any]) -> dict[str, Affine]:
    hidden, inputs = ["hr", "hz"], ["ir", "iz"]
    return {
        "gates": Affine(_joined(theta, hidden), _joined(theta, inputs), _joined(theta, inputs, "bias")),
        "candidate_hidden": Affine(hidden_kernel=theta["hn"]["kernel"], bias=theta["hn"]["bias"]),
        "candidate_input": Affine(input_kernel=theta["in"]["kernel"], bias=theta["in"]["bias"]),
    }


def _joined(theta: Mapping[str, Any], names: Sequence[str], leaf: str = "kernel") -> jax.Array:
    """The gates' kernels (or biases) side by side, for one matrix product."""
    return jnp.concatenate([theta[name][leaf] for name in names], axis=-1)


_LINEN = Flavour("linen", nn.Module, _functional, _initial_carry, _form)
