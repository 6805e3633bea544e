"""A window whose length is data: one compiled program for every length.

A loop visits blocks of steps. On the way out it runs each forward, until the law cuts, and keeps the
hidden state in which the next begins; at the last block it turns round, and on the way back it runs each
block once more and pulls the gradient through it, chunk by chunk: a chunk of a few steps is the static
unit of all matrix products. Only windows longer than a block recompute anything. Time is proportional to
the steps processed; memory is that of one block and one hidden state per block of look-ahead.

Never `vmap` this (a batched loop of dynamic length runs every lane to the longest and selects whole
buffers at each step); `jax.lax.map` over seeds is the fast way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import Params, PyTree
from jtrunc.devices import anchor, vary
from jtrunc.trees import num_time_steps, partition_inexact, read_row, read_rows, select, write_row

BLOCK = 128
"""Steps whose residuals are stored; a longer window recomputes its earlier blocks."""


class Chunk(NamedTuple):
    """Consecutive steps as the backward pass reads them, of which the first `num_active` are real.

    Attributes:
      before, after: hₜ₋₁ and hₜ, (chunk, ...); rows that are not active are stale.
      saved: what `Parts.advance` saved.
      inputs: of each step.
      edges: (chunk,), the weight of the edge that enters each step.
      num_active: int32, 1 … chunk.
      first_scored: int32, the losses of the rows before it do not count; None where all do.
    """

    before: PyTree
    after: PyTree
    saved: PyTree
    inputs: PyTree
    edges: jax.Array
    num_active: jax.Array
    first_scored: jax.Array | None


class Parts(NamedTuple):
    """What the loops need to know of a system: see `jtrunc.backward.parts`.

    Attributes:
      chunk: steps in one static product of the way back, a divisor of BLOCK; a window wastes half a chunk.
      project: ``inputs of a chunk -> projected``, what does not depend on the hidden state, (chunk, ...).
      read_ahead: whether a row of `projected` is read one step early (see `thresholds.reading_ahead_pays`).
      advance: ``(hidden, inputs_t, projected_t) -> (hidden, saved)``, one transition.
      zero_bars: ``() -> bars``, accumulators of the gradient.
      backward_chunk: ``(bars, cotangent, Chunk) -> (bars, cotangent, loss, aux)``; `cotangent` is a list,
        one entry for each float leaf of the hidden state; `loss` is the sum over the active steps.
      finish: ``bars -> Params``, the gradient.
      loss_dtype: of the summed loss.
      aux: shapes and dtypes of one step's aux.
    """

    chunk: int
    project: Callable[[PyTree], PyTree]
    read_ahead: bool
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
      first_scored: int32, the losses of the steps before it do not count (v = 0); None: all count.
      mark: int32 in 1 … stop, after how many steps the hidden state is reported; None: at the window's end.
    """

    state: PyTree
    stop: jax.Array
    edges: jax.Array
    first_scored: jax.Array | None = None
    mark: jax.Array | None = None


Decide = Callable[[jax.Array, PyTree, Boundaries], Boundaries]
"""``(step, hₜ, boundaries) -> boundaries`` after each step, for laws that read the hidden state."""


class Block(NamedTuple):
    """The residuals of up to BLOCK steps: h before each and after the last (one row more), and `saved`."""

    hiddens: PyTree
    saved: PyTree


class DynamicWindow(NamedTuple):
    """The differentiated window: h at its mark, Σ losses, gradients, aux (N rows), and its boundaries."""

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
    inputs, boundaries = _whole_chunks(inputs, boundaries, parts.chunk)
    size = min(BLOCK, num_time_steps(inputs))
    num_blocks = -(-look_ahead // size)

    def visit(visited: _Visit) -> _Visit:
        index, back, starts, marked, block, boundaries, sums = visited
        start = index * size
        block, num_steps, hidden, boundaries = _forward_block(
            parts, read_row(starts, index), inputs, start, size, block, boundaries, _unless(back, decide)
        )
        starts = write_row(starts, index + 1, hidden)
        marked = _marked(boundaries.mark, block, start, num_steps, marked)
        back = back | (start + num_steps >= boundaries.stop)
        sums = _backward_block(parts, block, inputs, start, jnp.where(back, num_steps, 0), boundaries, sums)
        return _Visit(jnp.where(back, index - 1, index + 1), back, starts, marked, block, boundaries, sums)

    starts = jax.tree.map(lambda leaf: jnp.zeros((num_blocks + 1, *leaf.shape), leaf.dtype), hidden)
    first = _Visit(
        index=jnp.int32(0),
        back=jnp.asarray(False),
        starts=write_row(starts, 0, hidden),
        marked=None if boundaries.mark is None else hidden,
        block=_empty_block(parts, hidden, inputs, size),
        boundaries=boundaries,
        sums=_zero_sums(parts, hidden, num_time_steps(inputs)),
    )
    first = vary(first, anchor(hidden, inputs, boundaries))
    last = jax.lax.while_loop(lambda visited: visited.index >= 0, visit, first)
    hidden = last.marked
    if boundaries.mark is None:
        hidden = read_row(last.starts, (last.boundaries.stop + size - 1) // size)
    aux = jax.tree.map(lambda leaf: leaf[:look_ahead], last.sums.aux)
    return DynamicWindow(hidden, last.sums.loss, parts.finish(last.sums.bars), aux, last.boundaries)


class _Sums(NamedTuple):
    """What the way back adds up; `cotangent` is that of the state in which the last block visited began."""

    cotangent: list[jax.Array]
    bars: PyTree
    loss: jax.Array
    aux: PyTree


class _Visit(NamedTuple):
    index: jax.Array
    back: jax.Array
    starts: PyTree
    marked: PyTree
    block: Block
    boundaries: Boundaries
    sums: _Sums


def _marked(
    mark: jax.Array | None, block: Block, start: jax.Array, num_steps: jax.Array, marked: PyTree
) -> PyTree:
    """The state after `mark` steps, if it lies in the block that was just run."""
    if mark is None:
        return None
    index = jnp.clip(mark - start, 0, num_steps)
    return select(index == mark - start, read_row(block.hiddens, index), marked)


def _unless(back: jax.Array, decide: Decide | None) -> Decide | None:
    """On the way back every boundary has been decided."""
    if decide is None:
        return None
    return lambda step, hidden, boundaries: select(back, boundaries, decide(step, hidden, boundaries))


def _forward_block(
    parts: Parts,
    hidden: PyTree,
    inputs: PyTree,
    start: jax.Array,
    size: int,
    block: Block,
    boundaries: Boundaries,
    decide: Decide | None,
) -> tuple[Block, jax.Array, PyTree, Boundaries]:
    """From `start` to the end of the block or window: residuals, number of steps, last state, boundaries."""

    def chunk(carry: Any) -> Any:
        first, *_ = carry
        projected = parts.project(read_rows(inputs, start + first, parts.chunk))

        def step(carry: Any) -> Any:
            (index, hidden, block, boundaries), ahead = carry
            inputs_t = read_row(inputs, start + index)
            projected_t = ahead if parts.read_ahead else read_row(projected, index - first)
            new_hidden, saved = parts.advance(hidden, inputs_t, projected_t)
            block = Block(write_row(block.hiddens, index, hidden), write_row(block.saved, index, saved))
            if decide is not None:
                boundaries = decide(start + index, new_hidden, boundaries)
            ahead = read_row(projected, index + 1 - first) if parts.read_ahead else ()
            return (index + 1, new_hidden, block, boundaries), ahead

        def inside(carry: Any) -> jax.Array:
            (index, _, _, boundaries), _ = carry
            return (index < first + parts.chunk) & (start + index < boundaries.stop)

        ahead = read_row(projected, 0) if parts.read_ahead else ()
        return jax.lax.while_loop(inside, step, (carry, ahead))[0]

    def more(carry: Any) -> jax.Array:
        return (carry[0] < size) & (start + carry[0] < carry[3].stop)

    num_steps, hidden, block, boundaries = jax.lax.while_loop(
        more, chunk, (jnp.zeros_like(start), hidden, block, boundaries)
    )
    block = block._replace(hiddens=write_row(block.hiddens, num_steps, hidden))
    return block, num_steps, hidden, boundaries


def _backward_block(
    parts: Parts,
    block: Block,
    inputs: PyTree,
    start: jax.Array,
    num_steps: jax.Array,
    boundaries: Boundaries,
    sums: _Sums,
) -> _Sums:
    """Adds the share of the block's first `num_steps` steps, chunk by chunk from the last to the first."""

    unscored = boundaries.first_scored

    def chunk(carry: Any) -> Any:
        index, (cotangent, bars, loss, aux) = carry
        first = index * parts.chunk
        steps = Chunk(
            before=read_rows(block.hiddens, first, parts.chunk),
            after=read_rows(block.hiddens, first + 1, parts.chunk),
            saved=read_rows(block.saved, first, parts.chunk),
            inputs=read_rows(inputs, start + first, parts.chunk),
            edges=read_rows(boundaries.edges, start + first, parts.chunk),
            num_active=jnp.minimum(num_steps - first, parts.chunk),
            first_scored=None if unscored is None else unscored - start - first,
        )
        bars, cotangent, chunk_loss, chunk_aux = parts.backward_chunk(bars, cotangent, steps)
        aux = jax.tree.map(
            lambda rows, new: jax.lax.dynamic_update_slice_in_dim(rows, new, start + first, 0), aux, chunk_aux
        )
        return index - 1, _Sums(cotangent, bars, loss + chunk_loss, aux)

    last = (num_steps + parts.chunk - 1) // parts.chunk - 1
    return jax.lax.while_loop(lambda carry: carry[0] >= 0, chunk, (last, sums))[1]


def _whole_chunks(inputs: PyTree, boundaries: Boundaries, chunk: int) -> tuple[PyTree, Boundaries]:
    """Repeats the last step up to whole chunks (and blocks), because dynamic slices clamp silently."""
    look_ahead = num_time_steps(inputs)
    missing = -look_ahead % (chunk if look_ahead <= BLOCK else BLOCK)
    if not missing:
        return inputs, boundaries

    def extend(leaf: jax.Array) -> jax.Array:
        return jnp.concatenate([leaf, jnp.broadcast_to(leaf[-1:], (missing, *leaf.shape[1:]))])

    return jax.tree.map(extend, inputs), boundaries._replace(edges=extend(boundaries.edges))


def _empty_block(parts: Parts, hidden: PyTree, inputs: PyTree, size: int) -> Block:
    def saved_by_a_step(hidden: PyTree, inputs: PyTree) -> PyTree:
        projected = parts.project(read_rows(inputs, 0, parts.chunk))
        return parts.advance(hidden, read_row(inputs, 0), read_row(projected, 0))[1]

    saved = jax.eval_shape(saved_by_a_step, hidden, inputs)
    return Block(
        hiddens=jax.tree.map(lambda leaf: jnp.zeros((size + 1, *leaf.shape), leaf.dtype), hidden),
        saved=jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), saved),
    )


def _zero_sums(parts: Parts, hidden: PyTree, num_rows: int) -> _Sums:
    return _Sums(
        cotangent=[jnp.zeros_like(leaf) for leaf in partition_inexact(hidden)[0]],
        bars=parts.zero_bars(),
        loss=jnp.zeros((), parts.loss_dtype),
        aux=jax.tree.map(lambda leaf: jnp.zeros((num_rows, *leaf.shape), leaf.dtype), parts.aux),
    )
