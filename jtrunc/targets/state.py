"""What target propagation keeps from update to update, block by block, and how a window reads it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from jtrunc.base import PyTree
from jtrunc.trees import read_rows


class TargetState(NamedTuple):
    """The state between updates; leaves of the last five fields are (num_blocks, ...), or absent: ().

    Attributes:
      hidden: the state that the next window begins with.
      count: int32, updates made.
      position: int32, first block of the next window.
      initial: the state that the data set begins with; () without `num_blocks`.
      free: H as the last visit left it; () where every window starts from the forward states.
      multipliers: y, like the float leaves of H (None for others); () for the penalty method.
      hidden_optimizer: one state of `hidden_optimizer` for each block.
      dual_optimizer: one state of `dual_optimizer` for each block.
      visited: bool, whether `free` holds anything yet.
    """

    hidden: PyTree
    count: jax.Array
    position: jax.Array
    initial: PyTree = ()
    free: PyTree = ()
    multipliers: PyTree = ()
    hidden_optimizer: Any = ()
    dual_optimizer: Any = ()
    visited: Any = ()


class OfBlocks(NamedTuple):
    """The per-block part of a `TargetState`, for all blocks or for those of a window."""

    free: PyTree = ()
    multipliers: PyTree = ()
    hidden_optimizer: Any = ()
    dual_optimizer: Any = ()
    visited: Any = ()


def partition_specs(state: TargetState, axis_name: str) -> TargetState:
    """How a state is split over a mesh axis block by block, for `jax.shard_map` or `NamedSharding`.

    Args:
      state: of an estimator with `num_blocks`.
      axis_name: of the mesh axis; its size must divide `num_blocks`.

    Returns:
      A `TargetState` of `PartitionSpec`: per-block leaves are split, all others replicated.

    Example:

      >>> import jax.numpy as jnp
      >>> state = TargetState(jnp.zeros(3), jnp.int32(0), jnp.int32(0), free=jnp.zeros((8, 3)))
      >>> specs = partition_specs(state, "time")
      >>> specs.hidden == PartitionSpec(), specs.free == PartitionSpec("time")
      (True, True)
    """
    specs = jax.tree.map(lambda leaf: PartitionSpec(), state)
    split = jax.tree.map(lambda leaf: PartitionSpec(axis_name), blocks_of(state))
    return specs._replace(**split._asdict())


def blocks_of(state: TargetState) -> OfBlocks:
    """The per-block part."""
    return OfBlocks(*(getattr(state, name) for name in OfBlocks._fields))


def read_window(state: TargetState, count: int) -> OfBlocks:
    """The per-block part of the next `count` blocks."""
    stored = blocks_of(state)
    return stored if _num_rows(stored) in (0, count) else read_rows(stored, state.position, count)


def write_window(state: TargetState, window: OfBlocks) -> TargetState:
    """The state with the per-block part of the window in its place; where nothing is kept, as it was."""
    stored = blocks_of(state)
    if not _num_rows(stored):
        return state
    pairs = zip(stored, window, strict=True)
    kept = OfBlocks(*(new if jax.tree.leaves(old) else old for old, new in pairs))
    if _num_rows(stored) != _num_rows(kept):

        def write(all_rows: jax.Array, rows: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(all_rows, rows, state.position, 0)

        kept = jax.tree.map(write, stored, kept)
    return state._replace(**kept._asdict())


def _num_rows(blocks: OfBlocks) -> int:
    leaves = jax.tree.leaves(blocks)
    return leaves[0].shape[0] if leaves else 0
