"""How a system takes part in a window of dynamic length: any system, and structured ones faster."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jtrunc.backward.thresholds import num_rows, two_phase_pays
from jtrunc.backward.two_phase import (
    backward_step,
    forward_step,
    fuse,
    layout_of,
    project_inputs,
    weight_cotangents,
)
from jtrunc.backward.window import Chunk, Parts
from jtrunc.base import Params, PyTree, System
from jtrunc.devices import anchor, vary
from jtrunc.structure import Structure
from jtrunc.trees import (
    accumulator,
    add_into,
    cast_like,
    partition_inexact,
    read_row,
    select,
    weighted_cotangent,
    wide_dtype,
    write_row,
)

LIGHT_STEP, LIGHT_CHUNK, CHUNK = 1 << 13, 32, 16
"""Steps in a chunk: longer where a step has so few multiplications that the loops cost more than they."""


def window_parts(system: System, params: Params, hidden: PyTree, inputs: PyTree) -> Parts:
    """The parts of a system, in two phases where its structure allows it and it pays."""
    structure = system.structure
    if isinstance(structure, Structure) and two_phase_pays(structure, params.recurrent, hidden, inputs):
        return structured_parts(system, params, hidden, inputs)
    return generic_parts(system, params, hidden, inputs)


def _loss_shapes(system: System, params: Params, hidden: PyTree, inputs: PyTree) -> tuple[Any, PyTree]:
    def first_loss(hidden: PyTree, inputs: PyTree) -> tuple[jax.Array, PyTree]:
        return system.loss(params, hidden, jax.tree.map(lambda leaf: leaf[0], inputs))

    value, aux = jax.eval_shape(first_loss, hidden, inputs)
    return wide_dtype(value), aux


def generic_parts(system: System, params: Params, hidden: PyTree, inputs: PyTree) -> Parts:
    """Any system: each step is recomputed from hₜ₋₁ and pulled back, its gradient added up step by step."""
    loss_dtype, aux_shapes = _loss_shapes(system, params, hidden, inputs)

    def advance(hidden: PyTree, inputs_t: PyTree, projected: PyTree) -> tuple[PyTree, PyTree]:
        return system.transition(params.recurrent, hidden, inputs_t), ()

    def backward_chunk(bars: PyTree, cotangent: PyTree, chunk: Chunk) -> Any:
        def step(carry: Any) -> Any:
            index, bars, cotangent, loss, aux = carry
            before, inputs_t = read_row((chunk.before, chunk.inputs), index)
            leaves, restore = partition_inexact(before)
            scored = None if chunk.first_scored is None else index >= chunk.first_scored

            def run(params: Params, leaves: list[jax.Array]) -> Any:
                hidden = system.transition(params.recurrent, restore(leaves), inputs_t)
                value, aux_t = _loss_if(scored, system, params, hidden, inputs_t)
                return (value, partition_inexact(hidden)[0]), aux_t

            (value, _), pull, aux_t = jax.vjp(run, params, leaves, has_aux=True)
            params_bar, leaves_bar = pull((jnp.ones_like(value), cotangent))
            cotangent = weighted_cotangent(read_row(chunk.edges, index), leaves_bar)
            aux = write_row(aux, index, aux_t)
            return index - 1, add_into(bars, params_bar), cotangent, loss + value.astype(loss_dtype), aux

        num_rows = chunk.edges.shape[0]
        aux = jax.tree.map(lambda leaf: jnp.zeros((num_rows, *leaf.shape), leaf.dtype), aux_shapes)
        sums = vary((jnp.zeros((), loss_dtype), aux), anchor(chunk))
        carry = (chunk.num_active - 1, bars, cotangent, *sums)
        return jax.lax.while_loop(lambda carry: carry[0] >= 0, step, carry)[1:]

    return Parts(
        chunk=CHUNK,
        project=lambda rows: (),
        advance=advance,
        zero_bars=lambda: accumulator(params),
        backward_chunk=backward_chunk,
        finish=lambda bars: cast_like(bars, params),
        loss_dtype=loss_dtype,
        aux=aux_shapes,
    )


def _loss_if(
    scored: jax.Array | None, system: System, params: Params, hidden: PyTree, inputs: PyTree
) -> tuple[jax.Array, PyTree]:
    """The loss of one step, or zeros where it does not count: a large readout is then not even computed."""
    if scored is None:
        return system.loss(params, hidden, inputs)
    shapes = jax.eval_shape(system.loss, params, hidden, inputs)
    zeros = vary(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), anchor(hidden, inputs))
    return jax.lax.cond(scored, lambda: system.loss(params, hidden, inputs), lambda: zeros)


def _scored_chunk(system: System, params: Params, chunk: Chunk, loss_dtype: Any) -> Any:
    """``((loss, aux), (gradient, cotangents of `after`))`` of the scored steps, all at once."""
    index = jnp.arange(chunk.edges.shape[0])
    active = index < chunk.num_active
    if chunk.first_scored is not None:
        active = active & (index >= chunk.first_scored)
    # Rows that are not active repeat the last real state, so that the loss never meets a stale one.
    last = read_row(chunk.after, chunk.num_active - 1)
    after = jax.vmap(lambda on, row: select(on, row, last))(active, chunk.after)

    def score(params: Params, after: PyTree) -> tuple[jax.Array, PyTree]:
        values, aux = jax.vmap(system.loss, in_axes=(None, 0, 0))(params, after, chunk.inputs)
        aux = jax.vmap(lambda on, row: select(on, row, jax.tree.map(jnp.zeros_like, row)))(active, aux)
        return jnp.sum(jnp.where(active, values, 0), dtype=loss_dtype), aux

    scored = jax.value_and_grad(score, argnums=(0, 1), has_aux=True)
    if chunk.first_scored is None:
        return scored(params, after)
    shapes = jax.eval_shape(scored, params, after)
    zeros = vary(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), anchor(params, chunk))
    return jax.lax.cond(chunk.first_scored < chunk.num_active, lambda: scored(params, after), lambda: zeros)


def structured_parts(system: System, params: Params, hidden: PyTree, inputs: PyTree) -> Parts:
    """A structured system: a loop for δₜ alone, and one product per weight, loss and projection a chunk."""
    structure = system.structure
    loss_dtype, aux_shapes = _loss_shapes(system, params, hidden, inputs)
    first_inputs = jax.eval_shape(lambda tree: jax.tree.map(lambda leaf: leaf[0], tree), inputs)
    layout = layout_of(structure, params.recurrent, hidden, first_inputs)
    weights, pull_fuse = jax.vjp(lambda theta: fuse(structure, layout, theta), params.recurrent)

    def advance(hidden: PyTree, inputs_t: PyTree, projected_t: PyTree) -> tuple[PyTree, PyTree]:
        return forward_step(structure, layout, weights, hidden, inputs_t, projected_t)

    def pull_deltas(chunk: Chunk, after_bar: PyTree, cotangent: PyTree, elementwise_bar: PyTree) -> Any:
        treedef = jax.tree.structure(hidden)
        projected = parts.project(chunk.inputs)
        rows = (chunk.before, chunk.inputs, projected, chunk.saved, after_bar)
        num_outputs = sum(width for _, width in layout.widths)

        def step(carry: Any) -> Any:
            index, cotangent, elementwise_bar, deltas = carry
            before, inputs_t, projected_t, saved, loss_bar = read_row(rows, index)
            total = jax.tree.map(jnp.add, jax.tree.unflatten(treedef, cotangent), loss_bar)
            bars = backward_step(structure, layout, weights, before, inputs_t, projected_t, saved, total)
            cotangent = weighted_cotangent(read_row(chunk.edges, index), jax.tree.leaves(bars.hidden))
            elementwise_bar = add_into(elementwise_bar, bars.elementwise)
            return index - 1, cotangent, elementwise_bar, write_row(deltas, index, bars.delta)

        deltas = jnp.zeros((*chunk.saved.shape[:-1], num_outputs), chunk.saved.dtype)
        carry = (chunk.num_active - 1, cotangent, elementwise_bar, vary(deltas, anchor(chunk)))
        return jax.lax.while_loop(lambda carry: carry[0] >= 0, step, carry)[1:]

    def backward_chunk(bars: Any, cotangent: PyTree, chunk: Chunk) -> Any:
        params_bar, weights_bar = bars
        (loss, aux), (params_step, after_bar) = _scored_chunk(system, params, chunk, loss_dtype)
        cotangent, elementwise_bar, deltas = pull_deltas(chunk, after_bar, cotangent, weights_bar.elementwise)
        step_weights, _ = weight_cotangents(structure, layout, weights, chunk.before, chunk.inputs, deltas)
        weights_bar = add_into(weights_bar, step_weights)._replace(elementwise=elementwise_bar)
        return (add_into(params_bar, params_step), weights_bar), cotangent, loss, aux

    def finish(bars: Any) -> Params:
        params_bar, weights_bar = bars
        (theta_bar,) = pull_fuse(cast_like(weights_bar, weights))
        recurrent = add_into(params_bar.recurrent, theta_bar)
        return cast_like(params_bar._replace(recurrent=recurrent), params)

    work = sum(kernel.size for kernel in weights.hidden) * num_rows(structure, hidden, inputs)[0]
    parts = Parts(
        chunk=LIGHT_CHUNK if work < LIGHT_STEP else CHUNK,
        project=lambda rows: project_inputs(structure, layout, weights, rows),
        advance=advance,
        zero_bars=lambda: (accumulator(params), accumulator(weights)),
        backward_chunk=backward_chunk,
        finish=finish,
        loss_dtype=loss_dtype,
        aux=aux_shapes,
    )
    return parts
