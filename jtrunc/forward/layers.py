"""A structured system as layers, bottom first: one `Structure` is a stack of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import PyTree
from jtrunc.coordinates import Coordinates
from jtrunc.devices import anchor, vary
from jtrunc.forward.structured import (
    Units,
    UnitStep,
    pull_weights,
    state_jacobian,
    theta_cotangent,
    unit_step,
    units_of,
)
from jtrunc.linearize import linear_map, transposed
from jtrunc.structure import Stack, Structure, transition_of
from jtrunc.trees import partition_inexact


class Layers(NamedTuple):
    """The layers of a structured system.

    Attributes:
      units: one `Units` a layer.
      stack: the `Stack`, or None where there is one layer and θ and hidden are not tuples.
    """

    units: tuple[Units, ...]
    stack: Stack | None

    def split(self, tree: PyTree) -> tuple[PyTree, ...]:
        """θ or hidden, layer by layer."""
        return (tree,) if self.stack is None else tuple(tree)

    def join(self, trees: list[PyTree] | tuple[PyTree, ...]) -> PyTree:
        """The inverse of `split`."""
        return trees[0] if self.stack is None else tuple(trees)

    @property
    def sizes(self) -> tuple[int, ...]:
        """S of each layer."""
        return tuple(units.parts * units.width for units in self.units)

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each layer begins in the vector of the whole state."""
        return tuple(sum(self.sizes[:depth]) for depth in range(len(self.units)))


def layers_of(structure: Any, theta: PyTree, hidden: PyTree) -> Layers | None:
    """The layers of a structure on one row of state, or None where the forward shortcuts do not apply."""
    if isinstance(structure, Structure):
        units = units_of(structure, theta, hidden)
        return None if units is None else Layers((units,), None)
    if not isinstance(structure, Stack):
        return None
    found = [units_of(*layer) for layer in zip(structure.layers, theta, hidden, strict=True)]
    known = tuple(units for units in found if units is not None)
    return Layers(known, structure) if len(known) == len(found) else None


class LayerStep(NamedTuple):
    """One layer's part of a step.

    Attributes:
      units: the layer.
      theta: its parameters.
      hidden: its state before the step.
      inputs: what it read: the outputs of the layer below, or the inputs of the system.
      step: its linearised step.
      by_below: (S, S₀ + S₁ + …): its new state by the new states of all layers below, or None.
      push_below: the same as a function of tangents of those states, (S₀ + S₁ + …) to (S,), or None.
    """

    units: Units
    theta: PyTree
    hidden: PyTree
    inputs: PyTree
    step: UnitStep
    by_below: Callable[[], jax.Array] | None = None
    push_below: Callable[[jax.Array], jax.Array] | None = None


def layer_steps(layers: Layers, theta: PyTree, hidden: PyTree, inputs: PyTree) -> list[LayerStep]:
    """Runs and linearises one step, layer by layer."""
    steps: list[LayerStep] = []
    thetas, hiddens = layers.split(theta), layers.split(hidden)
    for depth, units in enumerate(layers.units):
        below = tuple(step.step.hidden for step in steps)
        inputs_here = _inputs_of(layers, depth, below, inputs)
        step = unit_step(units, thetas[depth], hiddens[depth], inputs_here)
        here = LayerStep(units, thetas[depth], hiddens[depth], inputs_here, step)
        if depth:
            by_below, push_below = _from_below(layers, depth, here, below, inputs)
            here = here._replace(by_below=by_below, push_below=push_below)
        steps.append(here)
    return steps


def _inputs_of(layers: Layers, depth: int, below: tuple[PyTree, ...], inputs: PyTree) -> PyTree:
    """What a layer reads, from the new states of those below."""
    if layers.stack is not None:
        for layer, hidden in enumerate(below[:depth]):
            inputs = layers.stack.rise(layer, inputs, hidden)
    return inputs


def _from_below(
    layers: Layers, depth: int, here: LayerStep, below: tuple[PyTree, ...], inputs: PyTree
) -> tuple[Callable[[], jax.Array], Callable[[jax.Array], jax.Array]]:
    """What the layers below do to this one, as a matrix and as a function."""
    transition = transition_of(layers.units[depth].structure)
    space, below_space = Coordinates.of(here.hidden), Coordinates.of(below)
    leaves, restore = partition_inexact(below)

    def run(leaves: list[jax.Array]) -> list[jax.Array]:
        inputs_here = _inputs_of(layers, depth, restore(leaves), inputs)
        return partition_inexact(transition(here.theta, here.hidden, inputs_here))[0]

    def by_below() -> jax.Array:
        pull = transposed(run, leaves)
        rows = vary(jnp.eye(space.size, dtype=space.dtype), anchor(here.theta, here.hidden, below, inputs))
        return jax.vmap(lambda row: below_space.cotangent_vector(pull(space.cotangents(row))))(rows)

    def push_below(tangent: jax.Array) -> jax.Array:
        return space.tangent_vector(linear_map(run, leaves)[1](below_space.tangents(tangent)))

    return by_below, push_below


def layer_jacobians(layers: Layers, steps: list[LayerStep]) -> tuple[jax.Array, jax.Array]:
    """L and diag(D₁, D₂, …), both (S, S).

    L is unit lower triangular by blocks: the total derivative of the new states by what each layer adds to
    its own, Lₗₘ = Σ_k (∂hₗ/∂h_k) L_km over the layers k below l.
    """
    dtype = jnp.result_type(*[step.step.by_hidden for step in steps])
    total, starts = sum(layers.sizes), layers.starts
    upward, own = jnp.eye(total, dtype=dtype), jnp.zeros((total, total), dtype)
    for step, start, size in zip(steps, starts, layers.sizes, strict=True):
        jacobian = state_jacobian(step.units, step.theta, step.step, step.hidden, step.inputs)
        if len(steps) == 1:
            return upward, jacobian
        own = own.at[start : start + size, start : start + size].set(jacobian)
        if step.by_below is not None:
            below = step.by_below() @ upward[:start]
            upward = upward.at[start : start + size].add(below)
    return upward, own


def pull_layers(layers: Layers, steps: list[LayerStep], cotangent: jax.Array) -> PyTree:
    """``c -> cᵀ I_local``, a tree like θ: each layer's own parameters by its own new state."""
    parts = []
    for step, start, size in zip(steps, layers.starts, layers.sizes, strict=True):
        weights = pull_weights(step.units, step.step, cotangent[start : start + size])
        parts.append(theta_cotangent(step.units, step.theta, weights))
    return layers.join(parts)
