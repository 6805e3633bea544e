"""How a system takes part in a window of dynamic length: any system, and structured ones faster."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jtrunc.backward.layers import backward_layers, forward_layers, fuse_layers, project_bottom
from jtrunc.backward.thresholds import num_rows, reading_ahead_pays, two_phase_pays
from jtrunc.backward.window import Chunk, Parts
from jtrunc.base import Params, PyTree, System
from jtrunc.devices import anchor, vary
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
    if two_phase_pays(system.structure, params.recurrent, hidden, inputs):
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
        read_ahead=False,
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


def _repeat_last(active: jax.Array, rows: PyTree, num_active: jax.Array) -> PyTree:
    """Rows that are not active as copies of the last real one, so that no product meets a stale one."""
    last = read_row(rows, num_active - 1)
    return jax.vmap(lambda on, row: select(on, row, last))(active, rows)


def _scored_chunk(system: System, params: Params, chunk: Chunk, loss_dtype: Any) -> Any:
    """``((loss, aux), (gradient, cotangents of `after`))`` of the scored steps, all at once."""
    index = jnp.arange(chunk.edges.shape[0])
    active = index < chunk.num_active
    after, inputs = chunk.after, chunk.inputs
    if chunk.first_scored is not None:
        active = active & (index >= chunk.first_scored)
        after, inputs = _repeat_last(active, (after, inputs), chunk.num_active)

    def score(params: Params, after: PyTree) -> tuple[jax.Array, PyTree]:
        values, aux = jax.vmap(system.loss, in_axes=(None, 0, 0))(params, after, inputs)
        aux = jax.vmap(lambda on, row: select(on, row, jax.tree.map(jnp.zeros_like, row)))(active, aux)
        return jnp.sum(jnp.where(active, values, 0), dtype=loss_dtype), aux

    scored = jax.value_and_grad(score, argnums=(0, 1), has_aux=True)
    if chunk.first_scored is None:
        return scored(params, after)
    shapes = jax.eval_shape(scored, params, after)
    zeros = vary(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), anchor(params, chunk))
    return jax.lax.cond(chunk.first_scored < chunk.num_active, lambda: scored(params, after), lambda: zeros)


def structured_parts(system: System, params: Params, hidden: PyTree, inputs: PyTree) -> Parts:
    """A structured system: loops for δₜ alone, and one product per weight, loss and projection a chunk."""
    loss_dtype, aux_shapes = _loss_shapes(system, params, hidden, inputs)
    layers = fuse_layers(system.structure, params.recurrent, hidden, inputs)
    weights = layers.weights
    bottom, bottom_hidden = layers.each[0], layers.split(hidden)[0]
    num_numbers = sum(kernel.size for layer in weights for kernel in layer.hidden)
    work = num_numbers * num_rows(bottom.structure, bottom_hidden, inputs)[0]

    def backward_chunk(bars: Any, cotangent: PyTree, chunk: Chunk) -> Any:
        params_bar, weights_bar = bars
        active = jnp.arange(chunk.edges.shape[0]) < chunk.num_active
        before, after, inputs = _repeat_last(
            active, (chunk.before, chunk.after, chunk.inputs), chunk.num_active
        )
        chunk = chunk._replace(before=before, after=after, inputs=inputs)
        (loss, aux), (params_step, after_bar) = _scored_chunk(system, params, chunk, loss_dtype)
        weights_bar, cotangent = backward_layers(layers, weights_bar, chunk, after_bar, cotangent)
        return (add_into(params_bar, params_step), weights_bar), cotangent, loss, aux

    def finish(bars: Any) -> Params:
        params_bar, weights_bar = bars
        theta_bar = layers.pull(cast_like(weights_bar, weights))
        recurrent = add_into(params_bar.recurrent, theta_bar)
        return cast_like(params_bar._replace(recurrent=recurrent), params)

    return Parts(
        chunk=LIGHT_CHUNK if work < LIGHT_STEP else CHUNK,
        project=partial(project_bottom, layers),
        read_ahead=bottom.layout.project_first
        and reading_ahead_pays(bottom.structure, bottom.weights.hidden, bottom_hidden, inputs),
        advance=partial(forward_layers, layers),
        zero_bars=lambda: (accumulator(params), accumulator(weights)),
        backward_chunk=backward_chunk,
        finish=finish,
        loss_dtype=loss_dtype,
        aux=aux_shapes,
    )
