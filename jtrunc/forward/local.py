"""Influences that stay within a unit: every parameter is remembered by the state of its own unit alone.

    Jᵢ ← M ∘ (Bᵢ Jᵢ + Iᵢ),   Bᵢ (s, s) for unit i with s real numbers of state

With B = ∂h/∂hₜ₋₁ within the unit this is SnAp-1; with the part of it that goes through no affine map it is
e-prop; and where there is no other path, as in elementwise recurrences, both are the exact influence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import Params, PyTree, System
from jtrunc.coordinates import Coordinates
from jtrunc.forward.influence import ForwardState, Observation, Representation, StepEstimate, observe
from jtrunc.forward.rank_one import scaled
from jtrunc.forward.structured import (
    Units,
    UnitStep,
    Weights,
    num_features,
    preactivation_jacobian,
    read_theta,
    required_units,
    theta_cotangent,
    unit_step,
)


class UnitInfluence(NamedTuple):
    """∂(state of a unit)/∂(its own parameters), in the coordinates of the structure.

    Attributes:
      maps: ``{map: (s, F, outputs)}``.
      elementwise: (s, n) for each real coordinate of the elementwise parameters.
    """

    maps: dict[str, jax.Array]
    elementwise: list[jax.Array]


class UnitMask(NamedTuple):
    """Which parts of a unit's state remember which of its parameters.

    Attributes:
      maps: ``{map: (s, G)}`` booleans.
      elementwise: (s,) booleans for each real coordinate of the elementwise parameters.
    """

    maps: dict[str, Any]
    elementwise: list[Any]


Propagator = Callable[[Units, PyTree, UnitStep, PyTree, PyTree], jax.Array]
"""``(units, theta, step, hidden, inputs) -> B``, (s, s, n)."""

MaskOf = Callable[[Units, PyTree, PyTree, PyTree], UnitMask]
"""``(units, theta, hidden, inputs) -> UnitMask``."""

Signal = Callable[[Params, PyTree, PyTree], PyTree]
"""``(params, hidden, inputs) -> cotangent of hidden``."""


def direct_propagator(
    units: Units, theta: PyTree, step: UnitStep, hidden: PyTree, inputs: PyTree
) -> jax.Array:
    """E: what a unit keeps of its own state, at fixed preactivations."""
    return step.by_hidden


def own_propagator(units: Units, theta: PyTree, step: UnitStep, hidden: PyTree, inputs: PyTree) -> jax.Array:
    """The blocks of D on its diagonal: E, and what a unit does to itself through the affine maps."""
    block = step.by_hidden
    for name, rows in preactivation_jacobian(units, theta, hidden, inputs).items():
        rows = rows.reshape(units.slots[name], units.width, units.parts, units.width)
        own = jnp.diagonal(rows, axis1=1, axis2=3)
        block = block + jnp.sum(step.by_map[name][:, :, None] * own[None], axis=1)
    return block


def local_representation(
    owner: str,
    system: System,
    propagator: Propagator,
    *,
    mask_of: MaskOf | None = None,
    learning_signal: Signal | None = None,
    check: Callable[[Units, PyTree], None] = lambda units, theta: None,
) -> Representation:
    """The representation of unit-local influences of a system with a `Structure`.

    Args:
      check: ``(units, theta)``, called by `init`: raises where the system does not fit the algorithm.
    """

    def units_at(params: Params, hidden: PyTree) -> Units:
        return required_units(owner, system.structure, params.recurrent, hidden)

    def init(params: Params, hidden: PyTree, key: jax.Array | None) -> ForwardState:
        units = units_at(params, hidden)
        check(units, params.recurrent)
        return ForwardState(hidden, _zeros(units, params.recurrent, Coordinates.of(hidden).dtype))

    def advance(params: Params, state: ForwardState, inputs: PyTree) -> tuple[StepEstimate, ForwardState]:
        theta, units = params.recurrent, units_at(params, state.hidden)
        step = unit_step(units, theta, state.hidden, inputs)
        seen = observe(system, params, step.hidden, inputs)
        block = propagator(units, theta, step, state.hidden, inputs)
        influence = _propagate(units, step, block, state.influence)
        if mask_of is not None:
            influence = _masked(units, mask_of(units, theta, state.hidden, inputs), influence)
        cotangent = _signal(seen, learning_signal, params, step.hidden, inputs)
        through = _pull_back(units, theta, influence, cotangent)
        return seen.add(through), ForwardState(step.hidden, influence)

    return Representation(init, advance)


def _signal(
    seen: Observation, learning_signal: Signal | None, params: Params, hidden: PyTree, inputs: PyTree
) -> jax.Array:
    if learning_signal is None:
        return seen.cotangent
    signal = learning_signal(params, hidden, inputs)
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (signal, hidden)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`learning_signal` returned shapes {shapes[0]} instead of those of the hidden state, "
            f"{shapes[1]}; return a tree like `hidden`"
        )
    return Coordinates.of(hidden).cotangent_vector(jax.tree.leaves(signal))


def _zeros(units: Units, theta: PyTree, dtype: Any) -> UnitInfluence:
    affine, elementwise = jax.eval_shape(partial(read_theta, units.structure), theta)
    maps = {
        name: jnp.zeros((units.parts, num_features(weights), units.slots[name] * units.width), dtype)
        for name, weights in affine.items()
    }
    count = Coordinates.of(elementwise).size // units.width
    return UnitInfluence(maps, [jnp.zeros((units.parts, units.width), dtype) for _ in range(count)])


def _propagate(units: Units, step: UnitStep, block: jax.Array, influence: UnitInfluence) -> UnitInfluence:
    """B J + I."""
    maps = {}
    for name, old in influence.maps.items():
        old = old.reshape(units.parts, -1, units.slots[name], units.width)
        immediate = step.features[name][None, :, None, None] * step.by_map[name][:, None]
        moved = [
            sum(
                (scaled(block[new, part][None, None], old[part]) for part in range(units.parts)),
                start=immediate[new],
            )
            for new in range(units.parts)
        ]
        maps[name] = jnp.stack(moved).reshape(influence.maps[name].shape)
    elementwise = [
        jnp.sum(scaled(block, old[None]), axis=1) + by
        for old, by in zip(influence.elementwise, step.by_elementwise, strict=True)
    ]
    return UnitInfluence(maps, elementwise)


def _masked(units: Units, mask: UnitMask, influence: UnitInfluence) -> UnitInfluence:
    maps = {}
    for name, value in influence.maps.items():
        split = value.reshape(units.parts, -1, units.slots[name], units.width)
        maps[name] = jnp.where(mask.maps[name][:, None, :, None], split, 0).reshape(value.shape)
    elementwise = [
        jnp.where(keep[:, None], value, 0)
        for keep, value in zip(mask.elementwise, influence.elementwise, strict=True)
    ]
    return UnitInfluence(maps, elementwise)


def _pull_back(units: Units, theta: PyTree, influence: UnitInfluence, cotangent: jax.Array) -> PyTree:
    """c J, a tree like θ."""
    parts = cotangent.reshape(units.parts, units.width)
    maps = {}
    for name, value in influence.maps.items():
        split = value.reshape(units.parts, -1, units.slots[name], units.width)
        terms = [parts[part][None, None] * split[part] for part in range(units.parts)]
        maps[name] = sum(terms[1:], terms[0]).reshape(value.shape[1:])
    elementwise = [jnp.sum(parts * value, axis=0) for value in influence.elementwise]
    return theta_cotangent(units, theta, Weights(maps, elementwise))
