"""What the two adapters share: functional cells, an embedding, a readout and a loss made into one system."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.adapters import known
from jtrunc.base import Params, PyTree, System
from jtrunc.structure import Stack, Structure, transition_of


class Functional(NamedTuple):
    """A module as parameters and a pure function ``apply(params, *args)``."""

    params: PyTree
    apply: Callable[..., Any]


class Flavour(NamedTuple):
    """What linen and nnx do each in their own way.

    Attributes:
      name: "linen" or "nnx".
      module: the base class of its modules.
      functional: ``(module, key, *example_arguments) -> Functional``.
      initial_carry: ``(cell, key, x) -> carry``.
      form: ``(cell, params) -> known.Form`` of one of flax's own cells, None of any other.
    """

    name: str
    module: type
    functional: Callable[..., Functional]
    initial_carry: Callable[[Any, jax.Array, PyTree], PyTree]
    form: Callable[[Any, PyTree], known.Form | None]


class CarryAndOutput(NamedTuple):
    """The hidden state of a cell whose output is not a part of its carry: both."""

    carry: PyTree
    output: PyTree


class Layer(NamedTuple):
    """One cell: parameters, initial hidden state, ``transition(theta, hidden, x)``, ``output(hidden)``."""

    theta: PyTree
    hidden: PyTree
    transition: Callable[[PyTree, PyTree, PyTree], PyTree]
    output: Callable[[PyTree], PyTree]
    structure: Structure | None


def system_of(
    flavour: Flavour,
    cell: Any,
    readout: Any,
    loss: Callable[[Any, Any], Any],
    embed: Any,
    key: jax.Array,
    inputs: PyTree,
) -> tuple[System, Params, PyTree]:
    """Build ``(System, Params, hidden)``; `inputs` is an example of one step's x."""
    stacked = isinstance(cell, list | tuple)
    cells = list(cell) if stacked else [cell]
    check_arguments(flavour, cells, readout, loss, embed, key)
    embed_key, readout_key, *keys = jax.random.split(key, len(cells) + 2)
    x = jax.tree.map(jnp.asarray, inputs)
    embedding = _functional(flavour, embed, embed_key, x)
    x = _zeros(jax.eval_shape(embedding.apply, embedding.params, x))
    layers = []
    for one_cell, one_key in zip(cells, keys, strict=True):
        layer, x = _layer(flavour, one_cell, one_key, x)
        layers.append(layer)
    head = _functional(flavour, readout, readout_key, x)
    jax.eval_shape(head.apply, head.params, x)

    whole = _stack(layers) if stacked else layers[0]
    whole = _with_embedding(whole, embedding)

    def system_loss(params: Params, hidden: PyTree, inputs: PyTree) -> tuple[jax.Array, PyTree]:
        prediction = head.apply(params.readout, whole.output(hidden))
        return _scalar_and_aux(loss(prediction, _pair(inputs)[1]))

    system = System(whole.transition, system_loss, whole.structure)
    return system, Params(whole.theta, head.params), whole.hidden


def _functional(flavour: Flavour, part: Any, key: jax.Array, x: PyTree) -> Functional:
    """A module, a plain function or None (the identity) as a `Functional`."""
    if part is None:
        return Functional((), lambda params, x: x)
    if isinstance(part, flavour.module):
        return flavour.functional(part, key, x)
    return Functional((), lambda params, x: part(x))


def _layer(flavour: Flavour, cell: Any, key: jax.Array, x: PyTree) -> tuple[Layer, PyTree]:
    """One cell as a layer, and an example of its output."""
    params_key, carry_key = jax.random.split(key)
    carry = flavour.initial_carry(cell, carry_key, x)
    module = flavour.functional(cell, params_key, carry, x)
    form = flavour.form(cell, module.params)
    if form is not None and not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        raise TypeError(
            f"inputs: {type(cell).__name__} multiplies features, but x is {x.dtype}{list(x.shape)}; give "
            f"tokens an embedding (embed=a flax Embed, or embed=lambda x: jax.nn.one_hot(x, size)), and cast "
            f"numbers to float"
        )
    carry, output, places = _settle(cell, module, carry, x)
    structure = known.usable(form, module.params, carry, x)
    if structure is not None:
        return Layer(module.params, carry, transition_of(structure), _pick(output, places), structure), output
    if None not in places:

        def transition(theta: PyTree, hidden: PyTree, x: PyTree) -> PyTree:
            return module.apply(theta, hidden, x)[0]

        return Layer(module.params, carry, transition, _pick(output, places), None), output

    def transition_with_output(theta: PyTree, hidden: CarryAndOutput, x: PyTree) -> CarryAndOutput:
        return CarryAndOutput(*module.apply(theta, hidden.carry, x))

    hidden = CarryAndOutput(carry, output)
    return Layer(module.params, hidden, transition_with_output, lambda hidden: hidden.output, None), output


def _settle(
    cell: Any, module: Functional, carry: PyTree, x: PyTree
) -> tuple[PyTree, PyTree, list[int | None]]:
    """The carry in the dtypes that the cell returns, an example output, and where the carry has the output.

    A cell may compute in another dtype than its parameters have (nnx.SimpleCell does so by default): its
    initial carry then takes that dtype once. The output usually is a leaf of the new carry, the same object.
    """
    places: list[int | None] = []

    def step(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        result = module.apply(params, carry, x)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"cell: {type(cell).__name__} must return (carry, output), got {type(result).__name__}"
            )
        leaves, parts = jax.tree.leaves(result[0]), jax.tree.leaves(result[1])
        places[:] = [next((i for i, leaf in enumerate(leaves) if leaf is part), None) for part in parts]
        return result

    new, _ = jax.eval_shape(step, module.params, carry, x)
    if jax.tree.structure(new) == jax.tree.structure(carry):
        carry = jax.tree.map(_astype, carry, new)
    new, output = jax.eval_shape(step, module.params, carry, x)
    given = jax.tree.map(jnp.shape, carry), jax.tree.map(jnp.result_type, carry)
    returned = jax.tree.map(lambda leaf: leaf.shape, new), jax.tree.map(lambda leaf: leaf.dtype, new)
    if given != returned:
        raise TypeError(
            f"cell: {type(cell).__name__} must return a carry of the structure, shapes and dtypes that it "
            f"was given: given {given}, returned {returned}; check initialize_carry, and the dtype of inputs"
        )
    return carry, _zeros(output), places


def _astype(leaf: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    both_inexact = jnp.issubdtype(leaf.dtype, jnp.inexact) and jnp.issubdtype(like.dtype, jnp.inexact)
    return leaf.astype(like.dtype) if both_inexact else leaf


def _pick(output: PyTree, places: Sequence[int | None]) -> Callable[[PyTree], PyTree]:
    """``hidden -> output`` that reads the output's leaves where they are in the hidden state."""
    structure = jax.tree.structure(output)

    def pick(hidden: PyTree) -> PyTree:
        leaves = jax.tree.leaves(hidden)
        return jax.tree.unflatten(structure, [leaves[place] for place in places if place is not None])

    return pick


def _stack(layers: Sequence[Layer]) -> Layer:
    """Layers as one: θ and hidden are tuples; structured if all of them are."""

    def transition(theta: PyTree, hidden: PyTree, x: PyTree) -> PyTree:
        new_hidden = []
        for layer, theta_l, hidden_l in zip(layers, theta, hidden, strict=True):
            new_hidden.append(layer.transition(theta_l, hidden_l, x))
            x = layer.output(new_hidden[-1])
        return tuple(new_hidden)

    structures = [layer.structure for layer in layers if layer.structure is not None]
    structured = len(structures) == len(layers)
    stack: Any = Stack(tuple(structures), tuple(layer.output for layer in layers)) if structured else None
    theta, hidden = tuple(layer.theta for layer in layers), tuple(layer.hidden for layer in layers)
    return Layer(theta, hidden, transition, lambda hidden: layers[-1].output(hidden[-1]), stack)


def _with_embedding(layer: Layer, embedding: Functional) -> Layer:
    """The same layer reading ``inputs = (x, target)`` through the embedding.

    Parameters of an embedding belong to the recurrent ones, since they act through the hidden state. The
    structure is kept where the embedding has none: a product of two parameters is not an affine map of θ.
    """
    if jax.tree.leaves(embedding.params):

        def transition(theta: PyTree, hidden: PyTree, inputs: PyTree) -> PyTree:
            x = embedding.apply(theta["embed"], _pair(inputs)[0])
            return layer.transition(theta["cell"], hidden, x)

        theta = {"embed": embedding.params, "cell": layer.theta}
        return layer._replace(theta=theta, transition=transition, structure=None)

    def read(inputs: PyTree) -> PyTree:
        return embedding.apply(embedding.params, _pair(inputs)[0])

    def plain_transition(theta: PyTree, hidden: PyTree, inputs: PyTree) -> PyTree:
        return layer.transition(theta, hidden, read(inputs))

    return layer._replace(transition=plain_transition, structure=_reading(layer.structure, read))


def _reading(structure: Any, read: Callable[[PyTree], PyTree]) -> Any:
    """The structure whose (bottom) layer reads ``read(inputs)`` as its x."""
    if structure is None:
        return None
    if isinstance(structure, Stack):
        bottom, *above = structure.layers
        return structure._replace(layers=(_reading(bottom, read), *above))
    features = structure.input_features
    return structure._replace(input_features=lambda inputs: features(read(inputs)))


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _pair(inputs: PyTree) -> Sequence[Any]:
    if not (isinstance(inputs, list | tuple) and len(inputs) == 2):
        raise TypeError(
            f"inputs must be a pair (x, target), got {type(inputs).__name__}; without targets: (x, ())"
        )
    return inputs


def _scalar_and_aux(value: Any) -> tuple[jax.Array, PyTree]:
    scalar, aux = value if isinstance(value, tuple) and len(value) == 2 else (value, ())
    scalar = jnp.asarray(scalar)
    if scalar.shape != ():
        raise ValueError(
            f"loss must return a scalar or (scalar, aux), got shape {scalar.shape}; sum or average over the "
            f"batch"
        )
    return scalar, aux


def check_arguments(
    flavour: Flavour, cells: Sequence[Any], readout: Any, loss: Any, embed: Any, key: Any
) -> None:
    """Raise TypeError or ValueError for what is not a cell, readout, loss, embedding or key."""
    if not cells:
        raise ValueError("cell: an empty list; give at least one cell")
    for cell in cells:
        _check_module("cell", cell, flavour)
        if not isinstance(cell, flavour.module) or not callable(getattr(cell, "initialize_carry", None)):
            raise TypeError(
                f"cell must be a flax.{flavour.name} recurrent cell (a module with initialize_carry and "
                f"__call__(carry, x) -> (carry, output)) or a list of them, got {_described(cell)}"
            )
    for name, part in (("readout", readout), ("embed", embed)):
        _check_module(name, part, flavour)
        if part is not None and not callable(part):
            raise TypeError(
                f"{name} must be a flax.{flavour.name} module, a function or None, got {_described(part)}"
            )
    if not callable(loss):
        raise TypeError(
            f"loss must be a function (prediction, target) -> scalar or (scalar, aux), got {loss!r}"
        )
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0):
        raise TypeError(f"key must be one typed key, e.g. jax.random.key(0), got {_described(key)}")


def _check_module(name: str, part: Any, flavour: Flavour) -> None:
    """Refuse a class in place of an instance, and a module of flax's other library."""
    if isinstance(part, type):
        raise TypeError(f"{name} must be an instance, got the class {part.__name__}: call it first")
    other = {"linen": "nnx", "nnx": "linen"}[flavour.name]
    if any(base.__module__ == f"flax.{other}.module" for base in type(part).__mro__):
        raise TypeError(
            f"{name} is a flax.{other} module ({type(part).__name__}); use jtrunc.adapters.{other}, and "
            f"modules of one kind only"
        )


def _described(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
