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
      outputs: one ``hidden -> array`` a layer: what the layer above reads as its inputs.
    """

    layers: tuple[Structure, ...]
    outputs: tuple[Callable[[PyTree], Any], ...]


def project(features: jax.Array, kernel: jax.Array) -> jax.Array:
    """The product a W of features (..., in) or of one-hot indices (...) with a kernel (in, out)."""
    if jnp.issubdtype(features.dtype, jnp.integer):
        return kernel[features]
    return features @ kernel


def transition_of(structure: Structure | Stack) -> Transition:
    """The plain transition ``(theta, hidden, inputs) -> hidden`` that a declaration stands for."""
    if isinstance(structure, Stack):
        return _stack_transition(structure)

    def transition(theta: PyTree, hidden: PyTree, inputs: PyTree) -> PyTree:
        from_hidden = structure.hidden_features(hidden, inputs)
        from_inputs = structure.input_features(inputs)
        preactivations = {}
        for name, (hidden_kernel, input_kernel, bias) in structure.affine(theta).items():
            terms: list[Any] = [] if bias is None else [bias]
            if input_kernel is not None:
                terms.append(project(from_inputs[name], input_kernel))
            if hidden_kernel is not None:
                terms.append(project(from_hidden[name], hidden_kernel))
            preactivations[name] = sum(terms[1:], terms[0])
        return structure.combine(structure.elementwise(theta), hidden, inputs, preactivations)

    return transition


def _stack_transition(stack: Stack) -> Transition:
    transitions = [transition_of(layer) for layer in stack.layers]

    def transition(theta: PyTree, hidden: PyTree, inputs: PyTree) -> PyTree:
        new_hidden = []
        for layer, output, theta_l, hidden_l in zip(transitions, stack.outputs, theta, hidden, strict=True):
            new_hidden.append(layer(theta_l, hidden_l, inputs))
            inputs = output(new_hidden[-1])
        return tuple(new_hidden)

    return transition
