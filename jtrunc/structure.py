"""The declared structure of a transition: affine maps of features, then elementwise.

    pⱼ = aⱼ(hₜ₋₁, xₜ) Wⱼ + a′ⱼ(xₜ) W′ⱼ + bⱼ        hₜ = combine(e, hₜ₋₁, xₜ, p)

`combine` acts unit by unit and may have elementwise parameters e of its own. Tanh, leaky, LSTM, GRU and
linear recurrent cells have this form. The plain transition is derived from the declaration, so the
engines that use the structure always have the generic path as their oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import PyTree, Transition


class Affine(NamedTuple):
    """The weights of one affine map; absent parts are None.

    Attributes:
      hidden_kernel: (features of hₜ₋₁, outputs).
      input_kernel: (features of xₜ, outputs).
      bias: (outputs,).
    """

    hidden_kernel: jax.Array | None = None
    input_kernel: jax.Array | None = None
    bias: jax.Array | None = None


def _no_parameters(theta: PyTree) -> PyTree:
    return ()


def _output_alone(inputs: PyTree, output: Any) -> PyTree:
    return output


class Structure(NamedTuple):
    """A transition as affine maps of features, then elementwise.

    Attributes:
      affine: ``theta -> {name: Affine}``, a differentiable rearrangement of θ (select, concatenate).
      hidden_features: ``(hidden, inputs) -> {name: (..., features)}`` for each map with a hidden kernel.
        Maps that return the very same array share one matrix product.
      input_features: ``inputs -> {name: features}`` for each map with an input kernel; an integer array
        (...) stands for its one-hot vector and is looked up, not multiplied.
      combine: ``(elementwise, hidden, inputs, {name: (..., outputs)}) -> hidden``, unit by unit.
      elementwise: ``theta -> elementwise``, parameters that `combine` reads, one per unit.
    """

    affine: Callable[[PyTree], dict[str, Affine]]
    hidden_features: Callable[[PyTree, PyTree], dict[str, jax.Array]]
    input_features: Callable[[PyTree], dict[str, jax.Array]]
    combine: Callable[[PyTree, PyTree, PyTree, dict[str, jax.Array]], PyTree]
    elementwise: Callable[[PyTree], PyTree] = _no_parameters


class Stack(NamedTuple):
    """Layers, each reading the new output of the one below; θ and hidden are tuples, one per layer.

    Attributes:
      layers: one `Structure` a layer.
      outputs: one ``hidden -> array`` a layer: what the layer above reads.
      pass_up: ``(inputs, output) -> inputs`` of the layer above, from those of the layer below and its
        output; the output alone unless a wrapper needs more (a reset flag, say, that every layer sees).
    """

    layers: tuple[Structure, ...]
    outputs: tuple[Callable[[PyTree], Any], ...]
    pass_up: Callable[[PyTree, Any], PyTree] = _output_alone

    def rise(self, depth: int, inputs: PyTree, hidden: PyTree) -> PyTree:
        """The inputs of the layer above `depth`, at one step, from its own and its new state."""
        return self.pass_up(inputs, self.outputs[depth](hidden))


def project(features: jax.Array, kernel: jax.Array) -> jax.Array:
    """The product a W of features (..., in) or of one-hot indices (...) with a kernel (in, out)."""
    if jnp.issubdtype(features.dtype, jnp.integer):
        return kernel[features]
    # One product of two matrices: on a CPU the transpose of one with more axes takes 1.4 times as long.
    rows = features.reshape(-1, features.shape[-1]) if features.ndim > 2 else features
    return (rows @ kernel).reshape(*features.shape[:-1], kernel.shape[-1])


def add_bias(values: jax.Array, bias: jax.Array | None) -> jax.Array:
    """``values + bias`` for values (..., outputs), with the ranks made equal explicitly."""
    return values if bias is None else values + jnp.expand_dims(bias, tuple(range(values.ndim - 1)))


def transition_of(structure: Structure | Stack) -> Transition:
    """The plain transition ``(theta, hidden, inputs) -> hidden`` that a declaration stands for."""
    if isinstance(structure, Stack):
        return _stack_transition(structure)

    def transition(theta: PyTree, hidden: PyTree, inputs: PyTree) -> PyTree:
        from_hidden = structure.hidden_features(hidden, inputs)
        from_inputs = structure.input_features(inputs)
        preactivations = {}
        for name, (hidden_kernel, input_kernel, bias) in structure.affine(theta).items():
            terms = []
            if hidden_kernel is not None:
                terms.append(project(from_hidden[name], hidden_kernel))
            if input_kernel is not None:
                terms.append(project(from_inputs[name], input_kernel))
            preactivations[name] = add_bias(sum(terms[1:], terms[0]), bias)
        return structure.combine(structure.elementwise(theta), hidden, inputs, preactivations)

    return transition


def _stack_transition(stack: Stack) -> Transition:
    transitions = [transition_of(layer) for layer in stack.layers]

    def transition(theta: PyTree, hidden: PyTree, inputs: PyTree) -> PyTree:
        new_hidden = []
        for depth, (layer, theta_l, hidden_l) in enumerate(zip(transitions, theta, hidden, strict=True)):
            new_hidden.append(layer(theta_l, hidden_l, inputs))
            inputs = stack.rise(depth, inputs, new_hidden[-1])
        return tuple(new_hidden)

    return transition


class Wrapper(NamedTuple):
    """An elementwise change around a transition on inputs ``(flag, x)``.

    Attributes:
      before: ``(flag, hidden) -> hidden``: what the transition sees instead of hₜ₋₁.
      after: ``(flag, hidden, new_hidden) -> hidden``: what becomes of its result.
    """

    before: Callable[[Any, PyTree], PyTree] = lambda flag, hidden: hidden
    after: Callable[[Any, PyTree, PyTree], PyTree] = lambda flag, hidden, new_hidden: new_hidden


def wrap_transition(transition: Transition, wrapper: Wrapper) -> Transition:
    """A transition on ``(flag, x)``."""

    def wrapped(theta: PyTree, hidden: PyTree, inputs: PyTree) -> PyTree:
        flag, x = inputs
        return wrapper.after(flag, hidden, transition(theta, wrapper.before(flag, hidden), x))

    return wrapped


def wrap_structure(
    structure: Structure | Stack | None, wrapper_of: Callable[[int | None], Wrapper]
) -> Structure | Stack | None:
    """The structure of the wrapped transition; `wrapper_of` is asked for each layer of a `Stack`, or None."""
    if structure is None:
        return None
    if isinstance(structure, Stack):
        return Stack(
            tuple(_wrap_layer(layer, wrapper_of(depth)) for depth, layer in enumerate(structure.layers)),
            structure.outputs,
            lambda inputs, output: (inputs[0], structure.pass_up(inputs[1], output)),
        )
    return _wrap_layer(structure, wrapper_of(None))


def _wrap_layer(structure: Structure, wrapper: Wrapper) -> Structure:
    def hidden_features(hidden: PyTree, inputs: PyTree) -> dict[str, jax.Array]:
        flag, x = inputs
        return structure.hidden_features(wrapper.before(flag, hidden), x)

    def combine(elementwise: PyTree, hidden: PyTree, inputs: PyTree, p: dict[str, jax.Array]) -> PyTree:
        flag, x = inputs
        return wrapper.after(flag, hidden, structure.combine(elementwise, wrapper.before(flag, hidden), x, p))

    return structure._replace(
        hidden_features=hidden_features,
        input_features=lambda inputs: structure.input_features(inputs[1]),
        combine=combine,
    )
