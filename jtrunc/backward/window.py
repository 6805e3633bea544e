"""A window whose length is data: one compiled program for every length.

Forward, a loop of dynamic trip count runs until the law cuts, and stores what the way back needs of one
block of steps, and of every earlier block the hidden state in which it began. Backward, blocks are taken
from the last to the first, recomputed where they are not the last; inside a block, chunks of a few steps
are the static unit of all matrix products. Time is proportional to the steps processed, memory is that of
one block and one hidden state per block of look-ahead.

Never `vmap` this (a batched loop of dynamic length runs every lane to the longest and selects whole
buffers at each step); `jax.lax.map` over seeds is the fast way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import Params, PyTree
from jtrunc.trees import num_time_steps, partition_inexact

CHUNK = 16
"""Steps in one static matrix product of the backward pass; a window wastes half a chunk on average."""

BLOCK = 128
"""Steps whose residuals are stored; a longer window recomputes its earlier blocks. A multiple of CHUNK."""


class Chunk(NamedTuple):
    """CHUNK consecutive steps as the backward pass reads them, of which the first `num_active` are real.

    Attributes:
      before, after: hₜ₋₁ and hₜ, (CHUNK, ...); rows that are not active are stale.
      saved: what `Parts.advance` saved.
      inputs: of each step.
      edges: (CHUNK,), the weight of the edge that enters each step.
      num_active: int32, 1 … CHUNK.
    """

    before: PyTree
    after: PyTree
    saved: PyTree
    inputs: PyTree
    edges: jax.Array
    num_active: jax.Array


class Parts(NamedTuple):
    """What the loops need to know of a system: see `jtrunc.backward.parts`.

    Attributes:
      project: ``inputs of a chunk -> projected``, what does not depend on the hidden state, (CHUNK, ...).
      advance: ``(hidden, inputs_t, projected_t) -> (hidden, saved)``, one transition.
      zero_bars: ``() -> bars``, accumulators of the gradient.
      backward_chunk: ``(bars, cotangent, Chunk) -> (bars, cotangent, loss, aux)``; `cotangent` is a list,
        one entry for each float leaf of the hidden state; `loss` is the sum over the active steps.
      finish: ``bars -> Params``, the gradient.
      loss_dtype: of the summed loss.
      aux: shapes and dtypes of one step's aux.
    """

    project: Callable[[PyTree], PyTree]
    advance: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
    zero_bars: Callable[[], PyTree]
    backward_chunk: Callable[[PyTree, PyTree, Chunk], tuple[PyTree, PyTree, jax.Array, PyTree]]
    finish: Callable[[PyTree], Params]
    loss_dtype: Any
    aux: PyTree


class Boundaries(NamedTuple):
    """The law's side of the forward loop.

    Attributes:
      state: whatever `decide` carries.
      stop: int32, the window ends before this step unless `decide` lowers it.
      edges: (N,) weights of the edge that enters each step.
    """

    state: PyTree
    stop: jax.Array
    edges: jax.Array


Decide = Callable[[jax.Array, PyTree, Boundaries], Boundaries]
"""``(step, hₜ, boundaries) -> boundaries`` after each step, for laws that read the hidden state."""


class Block(NamedTuple):
    """The residuals of up to BLOCK steps: h before each and after the last (one row more), and `saved`."""

    hiddens: PyTree
    saved: PyTree


class DynamicWindow(NamedTuple):
    """The differentiated window: h at its end, Σ losses, gradients, aux (N rows), and its boundaries."""

    hidden: PyTree
    loss: jax.Array
    grads: Params
    aux: PyTree
    boundaries: Boundaries


def dynamic_window(
    parts: Parts, hidden: PyTree, inputs: PyTree, boundaries: Boundaries, decide: Decide | None = None
) -> DynamicWindow:
    """Runs and differentiates the steps of `inputs`, leaves (N, ...), up to ``boundaries.stop``."""
    look_ahead = num_time_steps(inputs)
    inputs, boundaries = _whole_chunks(inputs, boundaries)
    size = min(BLOCK, num_time_steps(inputs))
    num_blocks = -(-look_ahead // size)
    starts = jax.tree.map(lambda leaf: jnp.zeros((num_blocks, *leaf.shape), leaf.dtype), hidden)

    def run_block(carry: Any) -> Any:
        index, hidden, block, starts, boundaries = carry
        starts = _write(starts, index, hidden)
        block, num_steps, boundaries = _forward_block(
            parts, hidden, inputs, index * size, block, boundaries, decide
        )
        return index + 1, _row(block.hiddens, num_steps), block, starts, boundaries

    carry = (jnp.int32(0), hidden, _empty_block(parts, hidden, inputs, size), starts, boundaries)
    num_run, hidden, block, starts, boundaries = jax.lax.while_loop(
        lambda carry: carry[0] * size < carry[4].stop, run_block, carry
    )

    def differentiate_block(carry: Any) -> Any:
        index, block, *sums = carry
        sums = _backward_block(parts, block, inputs, index * size, size, boundaries, *sums)
        earlier = jnp.maximum(index - 1, 0)
        recompute = boundaries._replace(stop=index * size)  # nothing, for the first block
        block, _, _ = _forward_block(parts, _row(starts, earlier), inputs, earlier * size, block, recompute)
        return index - 1, block, *sums

    cotangent = [jnp.zeros_like(leaf) for leaf in partition_inexact(hidden)[0]]
    aux = jax.tree.map(lambda leaf: jnp.zeros((num_time_steps(inputs), *leaf.shape), leaf.dtype), parts.aux)
    carry = (num_run - 1, block, cotangent, parts.zero_bars(), jnp.zeros((), parts.loss_dtype), aux)
    _, _, _, bars, loss, aux = jax.lax.while_loop(lambda carry: carry[0] >= 0, differentiate_block, carry)
    aux = jax.tree.map(lambda leaf: leaf[:look_ahead], aux)
    return DynamicWindow(hidden, loss, parts.finish(bars), aux, boundaries)


def _forward_block(
    parts: Parts,
    hidden: PyTree,
    inputs: PyTree,
    start: jax.Array,
    block: Block,
    boundaries: Boundaries,
    decide: Decide | None = None,
) -> tuple[Block, jax.Array, Boundaries]:
    """Steps from `start` to the end of the block or window: the residuals, how many steps, the boundaries."""
    size = num_time_steps(block.hiddens) - 1

    def chunk(carry: Any) -> Any:
        first, *_ = carry
        projected = parts.project(_rows(inputs, start + first))

        def step(carry: Any) -> Any:
            index, hidden, block, boundaries = carry
            inputs_t, projected_t = _row(inputs, start + index), _row(projected, index - first)
            new_hidden, saved = parts.advance(hidden, inputs_t, projected_t)
            block = Block(_write(block.hiddens, index, hidden), _write(block.saved, index, saved))
            if decide is not None:
                boundaries = decide(start + index, new_hidden, boundaries)
            return index + 1, new_hidden, block, boundaries

        def inside(carry: Any) -> jax.Array:
            return (carry[0] < first + CHUNK) & (start + carry[0] < carry[3].stop)

        return jax.lax.while_loop(inside, step, carry)

    def more(carry: Any) -> jax.Array:
        return (carry[0] < size) & (start + carry[0] < carry[3].stop)

    num_steps, hidden, block, boundaries = jax.lax.while_loop(
        more, chunk, (jnp.int32(0), hidden, block, boundaries)
    )
    return block._replace(hiddens=_write(block.hiddens, num_steps, hidden)), num_steps, boundaries


def _backward_block(
    parts: Parts,
    block: Block,
    inputs: PyTree,
    start: jax.Array,
    size: int,
    boundaries: Boundaries,
    cotangent: PyTree,
    bars: PyTree,
    loss: jax.Array,
    aux: PyTree,
) -> tuple[PyTree, PyTree, jax.Array, PyTree]:
    """The block's share of gradient, loss and aux, chunk by chunk from the last to the first."""
    num_steps = jnp.minimum(boundaries.stop - start, size)

    def chunk(carry: Any) -> Any:
        index, cotangent, bars, loss, aux = carry
        first = index * CHUNK
        steps = Chunk(
            before=_rows(block.hiddens, first),
            after=_rows(block.hiddens, first + 1),
            saved=_rows(block.saved, first),
            inputs=_rows(inputs, start + first),
            edges=_rows(boundaries.edges, start + first),
            num_active=jnp.minimum(num_steps - first, CHUNK),
        )
        bars, cotangent, chunk_loss, chunk_aux = parts.backward_chunk(bars, cotangent, steps)
        aux = jax.tree.map(
            lambda rows, new: jax.lax.dynamic_update_slice_in_dim(rows, new, start + first, 0), aux, chunk_aux
        )
        return index - 1, cotangent, bars, loss + chunk_loss, aux

    last = (num_steps + CHUNK - 1) // CHUNK - 1
    carry = (last, cotangent, bars, loss, aux)
    return jax.lax.while_loop(lambda carry: carry[0] >= 0, chunk, carry)[1:]


def _whole_chunks(inputs: PyTree, boundaries: Boundaries) -> tuple[PyTree, Boundaries]:
    """Repeats the last step up to whole chunks (and blocks), because dynamic slices clamp silently."""
    look_ahead = num_time_steps(inputs)
    unit = CHUNK if look_ahead <= BLOCK else BLOCK
    missing = -look_ahead % unit
    if not missing:
        return inputs, boundaries

    def extend(leaf: jax.Array) -> jax.Array:
        return jnp.concatenate([leaf, jnp.broadcast_to(leaf[-1:], (missing, *leaf.shape[1:]))])

    return jax.tree.map(extend, inputs), boundaries._replace(edges=extend(boundaries.edges))


def _empty_block(parts: Parts, hidden: PyTree, inputs: PyTree, size: int) -> Block:
    def saved_by_a_step(hidden: PyTree, inputs: PyTree) -> PyTree:
        projected = parts.project(_rows(inputs, jnp.int32(0)))
        return parts.advance(hidden, _row(inputs, 0), _row(projected, 0))[1]

    saved = jax.eval_shape(saved_by_a_step, hidden, inputs)
    return Block(
        hiddens=jax.tree.map(lambda leaf: jnp.zeros((size + 1, *leaf.shape), leaf.dtype), hidden),
        saved=jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), saved),
    )


def _row(tree: PyTree, index: Any) -> PyTree:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), tree)


def _rows(tree: PyTree, first: Any) -> PyTree:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, CHUNK, 0), tree)


def _write(tree: PyTree, index: Any, row: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, index, 0), tree, row
    )
