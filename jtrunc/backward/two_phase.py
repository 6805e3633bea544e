"""Two-phase backward pass for structured transitions.

Phase one is a reverse scan for the cotangents δₜ of the preactivations alone; phase two is one matrix
product per weight over all steps, dW = Σₜ aₜᵀ δₜ. The plain transposed scan instead reads and writes every
dW once a step, which dominates wherever the batch is small beside the width. What depends on the inputs
alone is projected for all steps at once before the scan.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jtrunc.backward.fused import (
    Layout,
    Named,
    Weights,
    backward_step,
    forward_step,
    fuse,
    layout_of,
    project_inputs,
    weight_cotangents,
)
from jtrunc.backward.thresholds import (
    ROWS_TO_PROJECT_INSIDE,
    first_step,
    num_rows,
    reading_ahead_pays,
    turning_pays,
)
from jtrunc.base import PyTree
from jtrunc.devices import anchor, vary
from jtrunc.structure import Stack, Structure
from jtrunc.trees import cotangent_tree, no_cotangent, num_time_steps, read_row, weighted_cotangent, write_row

Step = Callable[[PyTree, PyTree, Named], tuple[PyTree, Any]]
"""``(hidden, inputs, projected inputs) -> (hidden, outputs)``."""


def structured_hiddens(
    structure: Structure | Stack, theta: PyTree, hidden: PyTree, inputs: PyTree, edges: jax.Array | None
) -> PyTree:
    """All hidden states h₁ … h_T, leaves (T, ...), of a structured transition; differentiable.

    Args:
      edges: (T,) or None: the weight of the edge that enters each step, on the backward pass alone.
    """
    if isinstance(structure, Structure):
        return _layer_hiddens(structure, False, theta, hidden, inputs, edges)
    stacked: list[PyTree] = []
    for depth, layer in enumerate(structure.layers):
        stacked.append(_layer_hiddens(layer, depth > 0, theta[depth], hidden[depth], inputs, edges))
        inputs = jax.vmap(partial(structure.rise, depth))(inputs, stacked[-1])
    return tuple(stacked)


def _layer_hiddens(
    structure: Structure,
    inputs_flow: bool,
    theta: PyTree,
    hidden: PyTree,
    inputs: PyTree,
    edges: jax.Array | None,
) -> PyTree:
    layout = layout_of(structure, theta, hidden, first_step(inputs))
    # A layer without hidden kernels has no preactivation to save unless its inputs are projected inside.
    if not layout.hidden_groups or num_rows(structure, hidden, inputs)[0] >= ROWS_TO_PROJECT_INSIDE:
        layout = layout._replace(project_first=False)
    weights = fuse(structure, layout, theta)
    # Here, where the transpose sums over devices: inside, the cotangents vary as hidden state and inputs do.
    weights, hidden = vary((weights, hidden), anchor(weights, hidden, inputs))
    return _scan_hiddens(structure, layout, inputs_flow, weights, hidden, inputs, edges)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scan_hiddens(
    structure: Structure,
    layout: Layout,
    inputs_flow: bool,
    weights: Weights,
    hidden: PyTree,
    inputs: PyTree,
    edges: jax.Array | None,
) -> PyTree:
    return _scan_forward(structure, layout, inputs_flow, weights, hidden, inputs, edges)[0]


def _scan_forward(
    structure: Structure,
    layout: Layout,
    inputs_flow: bool,
    weights: Weights,
    hidden: PyTree,
    inputs: PyTree,
    edges: jax.Array | None,
) -> tuple[PyTree, Any]:
    projected = project_inputs(structure, layout, weights, inputs) if layout.project_first else {}
    if turning_pays(structure, weights.hidden, hidden, inputs):
        turned = jax.lax.optimization_barrier(tuple(kernel.T for kernel in weights.hidden))
        weights = weights._replace(turned=turned)

    def step(before: PyTree, inputs_t: PyTree, projected_t: Named) -> tuple[PyTree, Any]:
        hidden, saved = forward_step(structure, layout, weights, before, inputs_t, projected_t)
        return hidden, (before, saved)

    ahead = layout.project_first and reading_ahead_pays(structure, weights.hidden, hidden, inputs)
    scan = _scan_ahead if ahead else _scan
    last, (before, saved) = scan(step, hidden, inputs, projected)
    # hₜ₋₁ is what the way back reads; of hₜ only the leaves that the loss reads are ever copied together.
    hiddens = jax.tree.map(lambda rows, row: jnp.concatenate([rows[1:], row[None]]), before, last)
    input_only = {name: projected[name] for name in layout.names if name not in layout.saved}
    return hiddens, (weights._replace(turned=()), inputs, edges, before, saved, input_only)


def _scan(step: Step, hidden: PyTree, inputs: PyTree, projected: Named) -> tuple[PyTree, Any]:
    return jax.lax.scan(lambda hidden, xs: step(hidden, *xs), hidden, (inputs, projected))


def _scan_ahead(step: Step, hidden: PyTree, inputs: PyTree, projected: Named) -> tuple[PyTree, Any]:
    """The same, with each row of `projected` read one step early.

    XLA on a CPU fuses the reading of a row with all that reads it, and where that is split into gates it then
    computes them number by number. A row that lies in the carry is an array like any other, and the gates are
    computed in vectors.
    """

    def ahead(carry: Any, xs: Any) -> tuple[Any, Any]:
        hidden, projected_t = carry
        index, inputs_t = xs
        hidden, outputs = step(hidden, inputs_t, projected_t)
        return (hidden, read_row(projected, index + 1)), outputs

    steps = jnp.arange(num_time_steps(inputs))
    (last, _), outputs = jax.lax.scan(ahead, (hidden, read_row(projected, 0)), (steps, inputs))
    return last, outputs


def _scan_backward(
    structure: Structure, layout: Layout, inputs_flow: bool, residuals: Any, hiddens_bar: PyTree
) -> tuple[Weights, PyTree, PyTree, Any]:
    weights, inputs, edges, before, saved, projected = residuals
    first = jax.tree.map(lambda rows: rows[0], before)
    start = jax.tree.map(jnp.zeros_like, (first, weights.elementwise))
    rows = (hiddens_bar, before, inputs, projected, edges)
    (hidden_bar, elementwise_bar), deltas, (others, direct) = _pull_steps(
        structure, layout, inputs_flow, weights, start, saved, rows
    )
    deltas = layout.split(deltas, layout.saved)
    if layout.input_only:
        deltas |= layout.split(others, layout.input_only)
    weights_bar, inputs_bar = weight_cotangents(structure, layout, weights, before, inputs, deltas)
    if inputs_flow:
        inputs_bar = jax.tree.map(jnp.add, inputs_bar, direct)
    edges_bar = None if edges is None else no_cotangent(edges)
    return (
        weights_bar._replace(elementwise=elementwise_bar),
        hidden_bar,
        cotangent_tree(inputs, inputs_bar),
        edges_bar,
    )


def _pull_step(
    structure: Structure,
    layout: Layout,
    inputs_flow: bool,
    weights: Weights,
    carry: tuple[PyTree, PyTree],
    saved_t: jax.Array,
    rows_t: Any,
) -> tuple[tuple[PyTree, PyTree], jax.Array, Any]:
    """One step back: the carry, δₜ in the place of what was saved, what else is stacked."""
    from_future, elementwise_bar = carry
    hidden_bar, hidden_t, inputs_t, projected_t, edge = rows_t
    cotangent = jax.tree.map(jnp.add, hidden_bar, from_future)
    bars = backward_step(structure, layout, weights, hidden_t, inputs_t, projected_t, saved_t, cotangent)
    elementwise_bar = jax.tree.map(jnp.add, elementwise_bar, bars.elementwise)
    to_past = bars.hidden if edge is None else weighted_cotangent(edge, bars.hidden)
    others = layout.join(bars.deltas, layout.input_only) if layout.input_only else ()
    stacked = (others, bars.inputs if inputs_flow else ())
    return (to_past, elementwise_bar), layout.join(bars.deltas, layout.saved), stacked


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _pull_steps(
    structure: Structure,
    layout: Layout,
    inputs_flow: bool,
    weights: Weights,
    start: Any,
    saved: jax.Array,
    rows: Any,
) -> tuple[Any, jax.Array, Any]:
    """All steps back: the last carry, δ of all saved maps, what else is stacked.

    δₜ is written over the preactivations that it was computed from: no array of its own to fill. Derivatives
    of that loop would touch the whole array at every step: they are those of the same loop with two arrays.
    """
    pull = partial(_pull_step, structure, layout, inputs_flow, weights)

    def step(carry: Any, xs: Any) -> tuple[Any, Any]:
        carry, array = carry
        index, rows_t = xs
        carry, delta, stacked = pull(carry, read_row(array, index), rows_t)
        return (carry, write_row(array, index, delta)), stacked

    steps = jnp.arange(saved.shape[0])
    (carry, deltas), stacked = jax.lax.scan(step, (start, saved), (steps, rows), reverse=True)
    return carry, deltas, stacked


@_pull_steps.defjvp
def _push_steps(
    structure: Structure, layout: Layout, inputs_flow: bool, primals: Any, tangents: Any
) -> tuple[Any, Any]:
    def two_arrays(weights: Weights, start: Any, saved: jax.Array, rows: Any) -> tuple[Any, jax.Array, Any]:
        def step(carry: Any, xs: Any) -> tuple[Any, Any]:
            carry, delta, stacked = _pull_step(structure, layout, inputs_flow, weights, carry, *xs)
            return carry, (delta, stacked)

        carry, (deltas, stacked) = jax.lax.scan(step, start, (saved, rows), reverse=True)
        return carry, deltas, stacked

    return jax.jvp(two_arrays, primals, tangents)


_scan_hiddens.defvjp(_scan_forward, _scan_backward)
