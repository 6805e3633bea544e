"""Many updates in one compiled program, for one run or for many seeds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jtrunc.base import GradientEstimator, Params, PyTree
from jtrunc.training.seeds import SeedAxis, over_seeds
from jtrunc.training.step import StepMetrics, TrainState, init_state, train_step
from jtrunc.training.stream import Stream, window_at


class Program(NamedTuple):
    """What is fixed when a run is compiled; hashable.

    Attributes:
      estimator: the gradient estimator.
      optimizer: any optax optimiser.
      window: steps of data that each update is given.
      capacity: the most updates of one call of `run_chunk`.
      seed_axis: how seeds are laid out.
    """

    estimator: GradientEstimator
    optimizer: optax.GradientTransformation
    window: int
    capacity: int
    seed_axis: SeedAxis = SeedAxis.NONE


@partial(jax.jit, static_argnums=(0, 1))
def init_chunk(
    program: Program,
    init_params: Callable[[jax.Array], Params] | None,
    params: Params | None,
    hidden: PyTree,
    key: jax.Array,
) -> TrainState:
    """The state before the first update; with seeds, `key` has a leading axis and so has the state."""

    def init(key: jax.Array) -> TrainState:
        chosen: Any = init_params or params
        return init_state(program.estimator, program.optimizer, chosen, hidden, key)

    if program.seed_axis is SeedAxis.NONE:
        return init(key)
    state = jax.lax.map(init, key)
    if program.seed_axis is SeedAxis.VMAP:
        return state._replace(cursor=state.cursor[0], update=state.update[0], timestep=state.timestep[0])
    return state


@partial(jax.jit, static_argnums=0)
def run_chunk(
    program: Program, state: TrainState, stream: Stream, num_updates: jax.Array
) -> tuple[TrainState, StepMetrics]:
    """`num_updates` ≤ `program.capacity` updates over the stream.

    The number of updates is data: one compilation serves every chunk, and where a run is cut into chunks
    never changes a bit of it.

    Returns:
      The new state, and the metrics with a leading axis of `capacity` updates (behind the seeds), of which
      the first `num_updates` hold.
    """

    def run(state: TrainState) -> tuple[TrainState, StepMetrics]:
        def update(state: TrainState) -> tuple[TrainState, StepMetrics]:
            inputs = window_at(stream.rows, state.cursor, program.window)
            state, metrics = train_step(program.estimator, program.optimizer, state, inputs)
            return state._replace(cursor=state.cursor % stream.length), metrics

        def body(i: jax.Array, carry: tuple[TrainState, StepMetrics]) -> tuple[TrainState, StepMetrics]:
            state, metrics = update(carry[0])
            put = partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
            return state, jax.tree.map(put, carry[1], metrics)

        empty = jax.tree.map(
            lambda row: jnp.zeros((program.capacity, *row.shape), row.dtype), jax.eval_shape(update, state)[1]
        )
        return jax.lax.fori_loop(0, num_updates, body, (state, empty))

    return over_seeds(run, program.seed_axis)(state)


@partial(jax.jit, static_argnums=(0, 1))
def lead_in_update(
    program: Program, size: int, state: TrainState, stream: Stream
) -> tuple[TrainState, StepMetrics]:
    """One update from a shorter window; the hidden state and the cursor stay where the stream begins."""

    def run(state: TrainState) -> tuple[TrainState, StepMetrics]:
        inputs = window_at(stream.rows, state.cursor, size)
        new, metrics = train_step(program.estimator, program.optimizer, state, inputs)
        held = new.estimator_state._replace(hidden=state.estimator_state.hidden)
        row = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], metrics)
        return new._replace(estimator_state=held, cursor=state.cursor), row

    return over_seeds(run, program.seed_axis)(state)
