"""A transition as sub-steps whose immediate influence is sparse: one, or one a layer (eq. 43 to 46).

"Rolling": a layer's sub-step changes its own state alone, from its own past and from the new states below
it, and touches its own parameters alone. The composition of all sub-steps is the transition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import PyTree, System
from jtrunc.forward.layers import Layers, LayerStep, layer_steps, layers_of
from jtrunc.forward.sparsity import SparseRows
from jtrunc.forward.steps import ForwardStep, forward_step, structured_forward_step


class Substep(NamedTuple):
    """One sparse sub-step; S coordinates in all, of which it changes `size` from `start` on.

    Attributes:
      hidden: hₜ once all sub-steps are done.
      start: the first coordinate that it changes.
      size: how many it changes.
      push: ``v -> D v``, (S,) to (S,).
      pull: ``c -> cᵀ I`` for c on its own coordinates, (size,) to a tree like θ.
      row_norms: ``() -> ‖wᵢ‖``, (size,).
      rows: ``() -> SparseRows``, with trees like θ and rows (size,).
    """

    hidden: PyTree
    start: int
    size: int
    push: Callable[[jax.Array], jax.Array]
    pull: Callable[[jax.Array], PyTree]
    row_norms: Callable[[], jax.Array]
    rows: Callable[[], SparseRows]

    def own(self, vector: jax.Array) -> jax.Array:
        """The coordinates that the sub-step changes, along the last axis."""
        return vector[..., self.start : self.start + self.size]

    def add_to_own(self, vector: jax.Array, own: jax.Array) -> jax.Array:
        """``vector`` with `own` added to those coordinates."""
        if self.size == vector.shape[-1]:
            return vector + own
        return vector.at[..., self.start : self.start + self.size].add(own)


def substeps_of(system: System, theta: PyTree, hidden: PyTree, inputs: PyTree) -> list[Substep]:
    """The sub-steps of one transition, linearised."""
    layers = layers_of(system.structure, theta, hidden)
    if layers is None or layers.stack is None:
        step = forward_step(system, theta, hidden, inputs)
        size = jax.eval_shape(step.row_norms).size
        return [Substep(step.hidden, 0, size, step.push, step.pull, step.row_norms, step.rows)]
    steps = layer_steps(layers, theta, hidden, inputs)
    new = layers.join([step.step.hidden for step in steps])
    return [_layer_substep(layers, depth, step, theta, new) for depth, step in enumerate(steps)]


def _layer_substep(layers: Layers, depth: int, layer: LayerStep, theta: PyTree, new: PyTree) -> Substep:
    start, size = layers.starts[depth], layers.sizes[depth]
    step: ForwardStep = structured_forward_step(
        layer.units, layer.theta, layer.hidden, layer.inputs, layer.step
    )
    push_below = layer.push_below

    def push(tangent: jax.Array) -> jax.Array:
        own = step.push(tangent[start : start + size])
        if push_below is not None:
            own = own + push_below(tangent[:start])
        return tangent.at[start : start + size].set(own)

    def widen(tree: PyTree) -> PyTree:
        zeros = [jax.tree.map(jnp.zeros_like, theta_k) for theta_k in theta]
        return tuple(tree if k == depth else zero for k, zero in enumerate(zeros))

    def pull(cotangent: jax.Array) -> PyTree:
        return widen(step.pull(cotangent))

    def rows() -> SparseRows:
        narrow = step.rows()
        return SparseRows(
            [widen(tree) for tree in narrow.trees],
            lambda colour, tree: narrow.sum_by_row(colour, tree[depth]),
            pull,
        )

    return Substep(new, start, size, push, pull, step.row_norms, rows)
