"""Blocks of consecutive steps, side by side: a system with a leading axis of blocks is a system again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.backward.masked import with_mask
from jtrunc.backward.unroll import run_only, weighted_unroll
from jtrunc.base import Params, PyTree, System
from jtrunc.checks import check_size, check_step, check_system
from jtrunc.combinators import with_resets
from jtrunc.structure import Stack, Structure
from jtrunc.trees import concatenate, num_time_steps, strongly_typed, wide_dtype


def over_blocks(system: System) -> System:
    """The system with a leading axis of blocks in hidden state and inputs; its loss is their sum.

    One step advances all blocks at once. A declared structure is kept, so that the blocks are rows of the
    same matrix products, and the gradient of a weight is one product, never one for each block.

    Args:
      system: for one block.

    Returns:
      A `System`: `hidden` with leaves (N, ...), `inputs` of one step with leaves (N, ...), aux (N, ...).

    Raises:
      TypeError: no `System`.

    Example: two counters that start at 0 and at 10.

      >>> system = System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h, ()))
      >>> pair, params = over_blocks(system), Params(jnp.float32(1))
      >>> hidden = pair.transition(params.recurrent, jnp.array([0.0, 10.0]), jnp.array([1.0, 2.0]))
      >>> hidden.tolist(), float(pair.loss(params, hidden, jnp.zeros(2))[0])
      ([1.0, 12.0], 13.0)
    """
    check_system("over_blocks", system)

    def loss(params: Params, hidden: PyTree, inputs: PyTree) -> tuple[jax.Array, PyTree]:
        values, aux = jax.vmap(system.loss, in_axes=(None, 0, 0))(params, hidden, inputs)
        return jnp.sum(values, dtype=wide_dtype(values)), aux

    return System(jax.vmap(system.transition, in_axes=(None, 0, 0)), loss, _structure(system.structure))


def _structure(structure: Structure | Stack | None) -> Structure | Stack | None:
    if structure is None:
        return None
    if isinstance(structure, Stack):
        layers = tuple(_layer(layer) for layer in structure.layers)
        return structure._replace(layers=layers, outputs=tuple(map(jax.vmap, structure.outputs)))
    return _layer(structure)


def _layer(structure: Structure) -> Structure:
    return structure._replace(
        hidden_features=_features(structure.hidden_features),
        input_features=_features(structure.input_features),
        combine=jax.vmap(structure.combine, in_axes=(None, 0, 0, 0)),
    )


def _features(features: Callable[..., dict[str, jax.Array]]) -> Callable[..., dict[str, jax.Array]]:
    """Features of every block; maps that return the very same array still do: they share a product."""

    def of_blocks(*arguments: PyTree) -> dict[str, jax.Array]:
        index_of: dict[str, int] = {}

        def distinct(*arguments: PyTree) -> list[jax.Array]:
            arrays: list[jax.Array] = []
            for name, array in features(*arguments).items():
                if all(array is not other for other in arrays):
                    arrays.append(array)
                index_of[name] = next(i for i, other in enumerate(arrays) if other is array)
            return arrays

        arrays = jax.vmap(distinct)(*arguments)
        return {name: arrays[index] for name, index in index_of.items()}

    return of_blocks


class Blocks(NamedTuple):
    """A window cut into blocks.

    Attributes:
      system: on the inputs of one step, which may come with flags.
      inputs: leaves (N, B, ...).
      padding: static number of steps that pad the first block: repetitions of its first step, unscored.
    """

    system: System
    inputs: PyTree
    padding: int


def num_blocks_of(num_steps: int, block_length: int) -> int:
    """N = ⌈T/B⌉."""
    return -(-num_steps // block_length)


def cut_into_blocks(system: System, start: PyTree, inputs: PyTree, block_length: int) -> Blocks:
    """Blocks of min(B, T) steps; if T is no multiple of B, the first one is padded in front.

    In front, so that the last step of a block is its last row, in this block too. The padding takes the first
    step again and again, each time from `start`: the loss that does not count is that of a real state, and
    has a gradient wherever the real one has.
    """
    num_steps = num_time_steps(inputs)
    block_length = min(block_length, num_steps)
    count = num_blocks_of(num_steps, block_length)
    padding = count * block_length - num_steps
    if padding:
        inputs = jax.tree.map(
            lambda leaf: jnp.concatenate([jnp.broadcast_to(leaf[:1], (padding, *leaf.shape[1:])), leaf]),
            inputs,
        )
        row = jnp.arange(count * block_length)
        system = with_mask(with_resets(system, start), advance=True)
        inputs = (row >= padding, (row <= padding, inputs))
    rows = jax.tree.map(lambda leaf: leaf.reshape(count, block_length, *leaf.shape[1:]), inputs)
    return Blocks(system, rows, padding)


def run_blocks(
    blocks: Blocks, params: Params, starts: PyTree, free: PyTree | None
) -> tuple[PyTree, tuple[jax.Array, PyTree]]:
    """All blocks in parallel, B steps one after the other: their predicted ends, Σ losses and aux by time.

    Args:
      starts: the states that the blocks begin with, leaves (N, ...).
      free: the states that the last loss of each block reads; None for the predicted ends.
    """
    system = over_blocks(blocks.system)
    steps = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), blocks.inputs)
    inner, last = jax.tree.map(lambda leaf: leaf[:-1], steps), jax.tree.map(lambda leaf: leaf[-1], steps)
    scored: list[Any] = []
    if num_time_steps(inner):
        starts, out = weighted_unroll(system, params, starts, inner)
        scored.append(out)
    predicted = system.transition(params.recurrent, starts, last)
    at_ends = system.loss(params, predicted if free is None else free, last)
    scored.append(jax.tree.map(lambda leaf: leaf[None], at_ends))
    losses, aux = concatenate(scored)
    return predicted, (jnp.sum(losses), jax.tree.map(lambda leaf: _in_time(leaf, blocks.padding), aux))


def _in_time(leaf: jax.Array, padding: int) -> jax.Array:
    """(B, N, ...) → (T, ...)."""
    leaf = jnp.swapaxes(leaf, 0, 1)
    return leaf.reshape(-1, *leaf.shape[2:])[padding:]


def forward_states(
    system: System, params: Params, start: PyTree, inputs: PyTree, block_length: int
) -> PyTree:
    """The states at the ends of the blocks as the recurrence itself has them: the constraints hold exactly.

    One pass over all T steps, one after the other; memory O(N).

    Args:
      start: the state that enters.
      inputs: leaves (T, ...), T steps.
      block_length: B, steps; if T is no multiple of it the first block is the shorter one.

    Returns:
      Leaves (N, ...), N = ⌈T/B⌉; the last row is the state after all steps.

    Raises:
      TypeError, ValueError: bad system, params or inputs, or a block length below 1.

    Example: a counter after 1, 3 and 5 steps.

      >>> system = System(lambda theta, h, x: h + x, lambda params, h, x: (h, ()))
      >>> forward_states(system, Params(()), jnp.float32(0), jnp.ones(5, jnp.float32), 2).tolist()
      [1.0, 3.0, 5.0]
    """
    check_system("forward_states", system)
    check_size("forward_states", "block_length", block_length)
    start = strongly_typed(start)
    check_step(system, params, start, inputs)
    blocks = cut_into_blocks(system, start, inputs, block_length)

    def block(hidden: PyTree, inputs_b: PyTree) -> tuple[PyTree, PyTree]:
        hidden = run_only(blocks.system, params, hidden, inputs_b)
        return hidden, hidden

    return jax.lax.scan(block, start, blocks.inputs)[1]
