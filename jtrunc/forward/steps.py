"""One linearised step as the rank-one algorithms need it, structured or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import PyTree, System
from jtrunc.coordinates import Coordinates
from jtrunc.forward import structured
from jtrunc.forward.rank_one import norm
from jtrunc.forward.sparsity import SparseRows, sparse_rows
from jtrunc.forward.structured import Units, UnitStep
from jtrunc.linearize import linear_map, linear_step
from jtrunc.structure import project
from jtrunc.trees import partition_inexact


class ForwardStep(NamedTuple):
    """hₜ with D and I of its transition as functions; what is not called costs nothing under jit.

    Attributes:
      hidden: hₜ.
      push: ``v -> D v``, (S,) to (S,).
      pull: ``c -> cᵀ I``, (S,) to a tree like θ.
      pulled_norm: ``c -> ‖cᵀ I‖``.
      row_norms: ``() -> ‖wᵢ‖`` of the rows of I, (S,).
      rows: ``() -> SparseRows``: the rows of I, compressed.
    """

    hidden: PyTree
    push: Callable[[jax.Array], jax.Array]
    pull: Callable[[jax.Array], PyTree]
    pulled_norm: Callable[[jax.Array], jax.Array]
    row_norms: Callable[[], jax.Array]
    rows: Callable[[], SparseRows]


def forward_step(system: System, theta: PyTree, hidden: PyTree, inputs: PyTree) -> ForwardStep:
    """Linearises one step: by its structure where it declares one, else by automatic differentiation."""
    units = structured.units_of(system.structure, theta, hidden)
    if units is not None:
        step = structured.unit_step(units, theta, hidden, inputs)
        return structured_forward_step(units, theta, hidden, inputs, step)
    step = linear_step(system.transition, theta, hidden, inputs)

    def rows() -> SparseRows:
        return sparse_rows(system.transition, theta, hidden, inputs, step.pull)

    def row_norms() -> jax.Array:
        return jnp.sqrt(rows().squared_norms())

    return ForwardStep(
        step.hidden, step.push, step.pull, lambda cotangent: norm(step.pull(cotangent)), row_norms, rows
    )


def structured_forward_step(
    units: Units, theta: PyTree, hidden: PyTree, inputs: PyTree, step: UnitStep
) -> ForwardStep:
    """The same from a step that is linearised already."""

    def pull(cotangent: jax.Array) -> PyTree:
        return structured.theta_cotangent(units, theta, structured.pull_weights(units, step, cotangent))

    return ForwardStep(
        step.hidden,
        lambda tangent: unit_push(units, theta, step, hidden, inputs, tangent),
        pull,
        lambda cotangent: structured.pulled_norm(units, step, cotangent),
        lambda: structured.row_norms(step),
        lambda: _structured_rows(units, step, theta, pull),
    )


def unit_push(
    units: Units, theta: PyTree, step: UnitStep, hidden: PyTree, inputs: PyTree, tangent: jax.Array
) -> jax.Array:
    """D v = C Wᵀ ȧ + E v, ȧ = ∂a/∂h · v."""
    space = Coordinates.of(hidden)
    leaves, restore = partition_inexact(hidden)
    _, push_features = linear_map(
        lambda leaves: units.structure.hidden_features(restore(leaves), inputs), leaves
    )
    moved = push_features(space.tangents(tangent))
    parts = tangent.reshape(1, units.parts, units.width)
    result = jnp.sum(step.by_hidden * parts, axis=1)
    for name, weights in units.structure.affine(theta).items():
        if weights.hidden_kernel is not None:
            slots = project(moved[name], weights.hidden_kernel).astype(space.dtype)
            slots = slots.reshape(1, units.slots[name], units.width)
            result = result + jnp.sum(step.by_map[name] * slots, axis=1)
    return result.reshape(-1)


def _structured_rows(
    units: Units, step: UnitStep, theta: PyTree, pull: Callable[[jax.Array], PyTree]
) -> SparseRows:
    """Units touch no parameter in common, so that one colour for each part of the state will do."""
    size = units.parts * units.width
    colour_of_row = jnp.arange(size) // units.width
    trees = [
        pull(jnp.where(colour_of_row == part, 1.0, 0.0).astype(step.by_hidden.dtype))
        for part in range(units.parts)
    ]

    def sum_by_row(colour: int, tree: PyTree) -> jax.Array:
        sums = structured.unit_sums(units, theta, tree)
        return jnp.zeros((units.parts, units.width), sums.dtype).at[colour].set(sums).reshape(-1)

    return SparseRows(trees, sum_by_row, pull)
