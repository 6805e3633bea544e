"""Many steps of an exact influence at once.

With fixed θ the recursion needs no pass over J at every step. From h₀ to h_T and to the loss L of the window,

    J_T = (∂h_T/∂h₀) J₀ + ∂h_T/∂θ,   g = ∂L/∂θ + (∂L/∂h₀) J₀

where all derivatives are those of the window by itself: S + 1 cotangents pulled back together through its T
steps. J is read and written once a window instead of once a step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jtrunc.backward.unroll import weighted_unroll
from jtrunc.base import Params, PyTree, System
from jtrunc.coordinates import Coordinates
from jtrunc.devices import anchor, vary
from jtrunc.forward.influence import ForwardState, StepEstimate
from jtrunc.linearize import linear_map_with_transpose
from jtrunc.trees import (
    accumulator,
    add_into,
    concatenate,
    num_time_steps,
    partition_inexact,
    read_rows,
    wide_dtype,
)

Chunk = Callable[[Params, Any, PyTree], tuple[StepEstimate, Any]]


def rows_like(theta: PyTree, space: Coordinates) -> PyTree:
    """Zeros for one row like θ for every coordinate of the state: leaves (S, ...), at least float32."""
    return jax.tree.map(
        lambda leaf: jnp.zeros((space.size, *leaf.shape), jnp.promote_types(leaf.dtype, space.dtype)), theta
    )


def basis(space: Coordinates, *trees: PyTree) -> jax.Array:
    """The unit vectors (S, S), varying over a mesh as `trees` do."""
    return vary(jnp.eye(space.size, dtype=space.dtype), anchor(*trees))


def multiply(matrix: jax.Array, rows: PyTree) -> PyTree:
    """``M J`` for a matrix (R, S) and rows with leaves (S, ...); a row of zeros cuts infinities too."""

    cut = ~jnp.any(matrix != 0, axis=1)

    def product(leaf: jax.Array) -> jax.Array:
        result = (matrix @ leaf.reshape(leaf.shape[0], -1)).reshape(len(matrix), *leaf.shape[1:])
        return jnp.where(jnp.expand_dims(cut, tuple(range(1, leaf.ndim))), 0, result)

    return jax.tree.map(product, rows)


def split_last(rows: PyTree) -> tuple[PyTree, PyTree]:
    """All rows but the last, and the last."""
    return jax.tree.map(lambda leaf: leaf[:-1], rows), jax.tree.map(lambda leaf: leaf[-1], rows)


def in_chunks(run: Chunk, params: Params, state: Any, inputs: PyTree, span: int) -> tuple[StepEstimate, Any]:
    """A window of any length in chunks of `span` steps, a shorter one first where they do not divide it.

    Args:
      run: ``(params, state, inputs) -> (StepEstimate, state)`` on one chunk, with the summed loss.
    """
    length = num_time_steps(inputs)
    ragged = length % span
    losses, auxes = [], []
    anchored = anchor(params, state, inputs)
    grads = vary(accumulator(params), anchored)
    if ragged:
        (loss, first, aux), state = run(params, state, read_rows(inputs, 0, ragged))
        grads = add_into(grads, first)
        losses.append(loss[None])
        auxes.append(aux)
    if length >= span:
        # Chunks are read where they lie: slicing off the first steps would copy all of the others.
        starts = jnp.arange(ragged, length, span)

        def body(carry: Any, start: jax.Array) -> tuple[Any, Any]:
            state, total = carry
            (loss, grads, aux), state = run(params, state, read_rows(inputs, start, span))
            return (state, add_into(total, grads)), (loss, aux)

        (state, grads), (loss, aux) = jax.lax.scan(body, (vary(state, anchored), grads), starts)
        losses.append(loss)
        auxes.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), aux))
    return StepEstimate(jnp.sum(jnp.concatenate(losses)), grads, concatenate(auxes)), state


def exact_window(
    system: System, params: Params, state: ForwardState, inputs: PyTree
) -> tuple[StepEstimate, ForwardState]:
    """A window of any length in chunks of about S steps, so that memory stays that of J."""
    span = min(num_time_steps(inputs), max(16, Coordinates.of(state.hidden).size))
    return in_chunks(partial(_chunk, system), params, state, inputs, span)


def _chunk(
    system: System, params: Params, state: ForwardState, inputs: PyTree
) -> tuple[StepEstimate, ForwardState]:
    space = Coordinates.of(state.hidden)
    leaves, restore = partition_inexact(state.hidden)

    def run(params: Params, leaves: list[jax.Array]) -> tuple[Any, Any]:
        hidden, (losses, aux) = weighted_unroll(system, params, restore(leaves), inputs)
        loss = jnp.sum(losses, dtype=wide_dtype(losses))
        return (partition_inexact(hidden)[0], loss), (hidden, loss, aux)

    _, pull, (hidden, loss, aux) = linear_map_with_transpose(run, params, leaves)

    def pull_row(row: jax.Array, loss_bar: jax.Array) -> tuple[Params, jax.Array]:
        params_bar, leaves_bar = pull((space.cotangents(row), loss_bar))
        return params_bar, space.cotangent_vector(leaves_bar)

    rows = basis(space, params, state, inputs)
    inside, jacobian = jax.vmap(lambda row: pull_row(row, jnp.zeros_like(loss)))(rows)
    direct, to_start = pull_row(jnp.zeros_like(rows[0]), jnp.ones_like(loss))
    moved, through = split_last(multiply(jnp.concatenate([jacobian, to_start[None]]), state.influence))
    influence = jax.tree.map(lambda a, b: a + b.astype(a.dtype), moved, inside.recurrent)
    recurrent = jax.tree.map(lambda a, b: a + b.astype(a.dtype), through, direct.recurrent)
    return StepEstimate(loss, Params(recurrent, direct.readout), aux), ForwardState(hidden, influence)
