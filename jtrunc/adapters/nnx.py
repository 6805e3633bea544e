"""flax.nnx cells as systems."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.nnx
import jax
import jax.numpy as jnp
from flax.nnx.nn import dtypes as nnx_dtypes

from jtrunc.adapters import known
from jtrunc.adapters.assemble import Flavour, Functional, system_of
from jtrunc.base import Params, PyTree, System
from jtrunc.structure import Affine


def nnx(
    cell: Any,
    readout: Any,
    loss: Callable[[Any, Any], Any],
    *,
    inputs: PyTree = None,
    embed: Any = None,
    key: jax.Array | None = None,
) -> tuple[System, Params, PyTree]:
    """Make a system of a flax.nnx cell (or a stack of cells), a readout and a loss.

        hₜ, yₜ = cell(hₜ₋₁, embed(xₜ))        ℓₜ = loss(readout(yₜ), targetₜ)        inputs = (x, target)

    The modules' parameters (`nnx.Param`) are copied out; the modules themselves are never written. flax's
    own SimpleCell, LSTMCell, OptimizedLSTMCell and GRUCell get a declared `structure` and with it the fast
    engines, unless an option stands against it (mixed dtypes, a custom dot_general, precision or sublayer, a
    gate or activation function that is not elementwise, an `embed` with parameters). Any other cell runs as
    it is.

    Args:
      cell: an `nnx.RNNCellBase`, or any module with ``initialize_carry(x_shape, rngs)`` and
        ``(carry, x) -> (carry, output)``; a list or tuple is a stack, each reading the output below it.
      readout: module or function ``output -> prediction``; None: the output is the prediction.
      loss: ``(prediction, target) -> scalar`` or ``(scalar, aux)``; the batch is averaged or summed here.
      inputs: an example of one time step's x, with its batch axes; None: one x of `cell.in_features`.
      embed: module or function applied to x first, for tokens: ``nnx.Embed(size, features, rngs=rngs)``, or
        a function, ``lambda x: jax.nn.one_hot(x, size)``, which has no parameters and keeps the structure.
      key: typed key, read only by a cell whose initial carry is random; None: ``jax.random.key(0)``.

    Returns:
      system: its `inputs` are ``(x, target)``.
      params: plain dicts with nnx's own names; ``nnx.update(cell, params.recurrent)`` and
        ``nnx.update(readout, params.readout)`` write them back. `recurrent` is a tuple for a stack, one dict
        a cell, and ``{"embed": ..., "cell": ...}`` where `embed` has parameters.
      hidden: the initial carry with the batch axes of `inputs`, (c, h) for an LSTM; a tuple for a stack. A
        cell whose output is not part of its carry has ``CarryAndOutput(carry, output)``.

    Raises:
      TypeError: an argument is not what is said here.
      ValueError: `inputs` is missing where it is needed; two modules share a parameter; or a module changes
        its own state (dropout's count, running statistics) in a step: a transition is a pure function. Call
        ``cell.eval()``, or keep the key in the carry of a cell of your own (it may have key leaves) or in x.

    Example:

      >>> import jax, jax.numpy as jnp, jtrunc
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> system, params, hidden = jtrunc.adapters.nnx(
      ...     nnx.GRUCell(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs),
      ...     lambda y, target: jnp.sum((y - target) ** 2), inputs=jnp.zeros((4, 3)))
      >>> hidden.shape, params.recurrent["dense_h"]["kernel"].shape
      ((4, 8), (8, 24))
    """
    cells = list(cell) if isinstance(cell, list | tuple) else [cell]
    if inputs is None:
        inputs = _example_input(cells, embed)
    _check_nothing_shared([*cells, embed, readout])
    key = jax.random.key(0) if key is None else key
    return system_of(_NNX, cell, readout, loss, embed, key, inputs)


def _example_input(cells: Sequence[Any], embed: Any) -> jax.Array:
    features = getattr(cells[0], "in_features", None) if cells and embed is None else None
    if not isinstance(features, int):
        raise ValueError(
            "inputs is missing, and the cell has no in_features to tell x: give an example of one time "
            "step's x with its batch axes, e.g. inputs=jnp.zeros((batch, features))"
        )
    return jnp.zeros((features,), getattr(cells[0], "param_dtype", jnp.float32))


def _check_nothing_shared(modules: Sequence[Any]) -> None:
    """Refuse one parameter in two modules: each gets a copy of its own, so the tie would be lost."""
    seen: dict[int, str] = {}
    for module in modules:
        if not isinstance(module, flax.nnx.Module):
            continue
        state = flax.nnx.to_flat_state(flax.nnx.state(module, flax.nnx.Param))
        name = type(module).__name__
        own = {id(variable): f"{name}.{'.'.join(map(str, path))}" for path, variable in state}
        for identity in own.keys() & seen.keys():
            raise ValueError(
                f"{seen[identity]} and {own[identity]} are the same parameter; give each cell, the embedding "
                f"and the readout parameters of their own, or write the System's loss yourself: it sees all "
                f"of Params"
            )
        seen |= own


def _functional(module: flax.nnx.Module, key: jax.Array, *args: Any) -> Functional:
    """Split a module into parameters and a pure function; its other state is a constant.

    Pure dicts are merged into new variables at every call; a `State` would share them with the module.
    """
    graph, params, rest = flax.nnx.split(module, flax.nnx.Param, ...)
    params, rest = flax.nnx.to_pure_dict(params), flax.nnx.to_pure_dict(rest)

    def apply(params: PyTree, *args: Any) -> Any:
        merged = flax.nnx.merge(graph, params, rest)
        result = merged(*args)
        _check_unchanged(module, (params, rest), merged)
        return result

    return Functional(jax.tree.map(jnp.copy, params), apply)


def _check_unchanged(module: flax.nnx.Module, before: PyTree, merged: flax.nnx.Module) -> None:
    """Refuse a call that wrote to a variable: what it wrote would be lost."""
    after = jax.tree_util.tree_leaves_with_path(flax.nnx.to_pure_dict(flax.nnx.state(merged)))
    after = {jax.tree_util.keystr(path): leaf for path, leaf in after}
    for tree in before:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path)
            if after.get(name) is not leaf:
                raise ValueError(
                    f"{type(module).__name__} changes its own state {name} in a step, but a system is made "
                    f"of pure functions; call .eval() on the module (no dropout, fixed statistics), or keep "
                    f"the key or the statistic in the carry of your own cell, or the key in x"
                )


def _initial_carry(cell: Any, key: jax.Array, x: PyTree) -> PyTree:
    return cell.initialize_carry(jax.tree.map(jnp.shape, x), flax.nnx.Rngs(key))


def _form(cell: Any, params: PyTree) -> known.Form | None:
    """The structure of one of flax's own cells; a subclass may do anything, so the type must be exact."""
    if type(cell) is flax.nnx.SimpleCell:
        structure = known.simple(_simple_affine, cell.activation_fn, cell.residual)
        names, functions = {"dense_i", "dense_h"}, (cell.activation_fn,)
    elif type(cell) is flax.nnx.LSTMCell:
        structure = known.lstm(_lstm_affine, cell.gate_fn, cell.activation_fn)
        names, functions = {*_HIDDEN_GATES, *_INPUT_GATES}, (cell.gate_fn, cell.activation_fn)
    elif type(cell) is flax.nnx.OptimizedLSTMCell:
        structure = known.lstm(_optimized_lstm_affine, cell.gate_fn, cell.activation_fn)
        names, functions = {"dense_i", "dense_h"}, (cell.gate_fn, cell.activation_fn)
    elif type(cell) is flax.nnx.GRUCell:
        structure = known.gru(_gru_affine, cell.gate_fn, cell.activation_fn)
        names, functions = {"dense_i", "dense_h"}, (cell.gate_fn, cell.activation_fn)
    else:
        return None
    # An activation with parameters of its own shows as another name.
    plain = set(params) == names and all(_is_plain_linear(getattr(cell, name), cell.dtype) for name in names)
    return known.Form(structure, functions, cell.dtype) if plain else None


def _is_plain_linear(layer: Any, dtype: Any) -> bool:
    """Whether a sublayer is x W + b and nothing else."""
    return (
        type(layer) is flax.nnx.Linear
        and layer.dtype == dtype
        and layer.precision is None
        and layer.preferred_element_type is None
        and layer.dot_general is jax.lax.dot_general
        and layer.promote_dtype is nnx_dtypes.promote_dtype
    )


_HIDDEN_GATES = ("hi", "hf", "hg", "ho")
_INPUT_GATES = ("ii", "if_", "ig", "io")


def _simple_affine(theta: Mapping[str, Any]) -> dict[str, Affine]:
    return {"units": Affine(theta["dense_h"]["kernel"], theta["dense_i"]["kernel"], theta["dense_i"]["bias"])}


def _lstm_affine(theta: Mapping[str, Any]) -> dict[str, Affine]:
    """The gates' kernels side by side, for one matrix product."""
    hidden = jnp.concatenate([theta[name]["kernel"] for name in _HIDDEN_GATES], axis=-1)
    inputs = jnp.concatenate([theta[name]["kernel"] for name in _INPUT_GATES], axis=-1)
    bias = jnp.concatenate([theta[name]["bias"] for name in _HIDDEN_GATES], axis=-1)
    return {"gates": Affine(hidden, inputs, bias)}


def _optimized_lstm_affine(theta: Mapping[str, Any]) -> dict[str, Affine]:
    return {"gates": Affine(theta["dense_h"]["kernel"], theta["dense_i"]["kernel"], theta["dense_h"]["bias"])}


def _gru_affine(theta: Mapping[str, Any]) -> dict[str, Affine]:
    """nnx keeps r, z and n in one kernel, and all biases on the input side."""
    units = theta["dense_h"]["kernel"].shape[0]
    hidden, inputs, bias = theta["dense_h"]["kernel"], theta["dense_i"]["kernel"], theta["dense_i"]["bias"]
    gates, candidate = slice(None, 2 * units), slice(2 * units, None)
    return {
        "gates": Affine(hidden[:, gates], inputs[:, gates], bias[gates]),
        "candidate_hidden": Affine(hidden_kernel=hidden[:, candidate]),
        "candidate_input": Affine(input_kernel=inputs[:, candidate], bias=bias[candidate]),
    }


_NNX = Flavour("nnx", flax.nnx.Module, _functional, _initial_carry, _form)
