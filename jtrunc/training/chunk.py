"""Many updates in one compiled program, for one run or for many seeds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jtrunc.base import GradientEstimator, Params, PyTree
from jtrunc.probe import built
from jtrunc.training.seeds import SEEDS, Hyperparameters, SeedAxis, over_seeds, split_by_seed
from jtrunc.training.step import StepMetrics, TrainState, init_state, train_step
from jtrunc.training.stream import Stream, window_at
from jtrunc.training.sums import MetricSums, add_update, empty_rows, no_sums
from jtrunc.trees import write_row


class Program(NamedTuple):
    """What is fixed when a run is compiled; hashable.

    Attributes:
      estimator: the gradient estimator, or a function of one run's hyperparameters that makes it.
      optimizer: any optax optimiser, or such a function.
      window: steps of data that each update is given.
      capacity: the most lines of metrics of one call of `run_chunk`.
      log_every: updates that a line sums up.
      seed_axis: how seeds are laid out.
      mesh: the devices that the seeds are split over, or None.
    """

    estimator: GradientEstimator | Callable[[Any], GradientEstimator]
    optimizer: optax.GradientTransformation | Callable[[Any], optax.GradientTransformation]
    window: int
    capacity: int
    log_every: int = 1
    seed_axis: SeedAxis = SeedAxis.NONE
    mesh: Mesh | None = None

    def parts(
        self, hyperparameters: Hyperparameters
    ) -> tuple[GradientEstimator, optax.GradientTransformation]:
        """Estimator and optimiser of one run."""
        return built(self.estimator, hyperparameters), built(self.optimizer, hyperparameters)

    def step(
        self, state: TrainState, inputs: PyTree, hyperparameters: Hyperparameters
    ) -> tuple[TrainState, StepMetrics]:
        """`train_step` of one run."""
        return train_step(*self.parts(hyperparameters), state, inputs)


@partial(jax.jit, static_argnums=(0, 1))
def init_chunk(
    program: Program,
    init_params: Callable[[jax.Array], Params] | None,
    params: Params | None,
    hidden: PyTree,
    key: jax.Array,
    hyperparameters: Hyperparameters = None,
) -> TrainState:
    """The state before the first update; with seeds, `key` has a leading axis and so has the state."""

    def init(key: jax.Array, hyperparameters: Hyperparameters, params: Any, hidden: PyTree) -> TrainState:
        return init_state(*program.parts(hyperparameters), init_params or params, hidden, key)

    if program.seed_axis is SeedAxis.NONE:
        return init(key, hyperparameters, params, hidden)

    def every(key: jax.Array, hyperparameters: Hyperparameters, *shared: Any) -> TrainState:
        return jax.lax.map(lambda one: init(*one, *shared), (key, hyperparameters))

    by_seed = split_by_seed(every, program.mesh, (P(SEEDS), P(SEEDS)), P(SEEDS))
    state = by_seed(key, hyperparameters, params, hidden)
    if program.seed_axis is SeedAxis.VMAP:
        return state._replace(cursor=state.cursor[0], update=state.update[0], timestep=state.timestep[0])
    return state


@partial(jax.jit, static_argnums=0)
def run_chunk(
    program: Program,
    state: TrainState,
    stream: Stream,
    num_updates: Any,
    hyperparameters: Hyperparameters = None,
) -> tuple[TrainState, MetricSums]:
    """`num_updates` updates over the stream, in at most `program.capacity` lines.

    A line ends after each update whose number is a multiple of `program.log_every`, and with the chunk. Its
    metrics are summed inside the loop: memory and what goes to the host depend on the lines, not on the
    updates. The number of updates is data: one compilation serves every chunk, and where a run is cut into
    chunks of whole lines never changes a bit of it.

    Returns:
      The new state, and the sums of each line with a leading axis of `capacity` (behind the seeds), of which
      as many hold as there are lines.
    """

    def run(
        state: TrainState, hyperparameters: Hyperparameters, stream: Stream, num_updates: jax.Array
    ) -> tuple[TrainState, MetricSums]:
        end = state.update + num_updates

        def update(state: TrainState) -> tuple[TrainState, StepMetrics]:
            inputs = window_at(stream.rows, state.cursor, program.window)
            state, metrics = program.step(state, inputs, hyperparameters)
            return state._replace(cursor=state.cursor % stream.length), metrics

        def sum_up(_: jax.Array, carry: tuple[TrainState, MetricSums]) -> tuple[TrainState, MetricSums]:
            state, metrics = update(carry[0])
            return state, add_update(carry[1], metrics)

        def line(state: TrainState) -> tuple[TrainState, Any]:
            if program.log_every == 1:  # summed behind the loop: inside it would cost half a microsecond
                return update(state)
            size = jnp.minimum(program.log_every - state.update % program.log_every, end - state.update)
            return jax.lax.fori_loop(0, size, sum_up, (state, empty))

        def body(carry: tuple[TrainState, Any, jax.Array]) -> Any:
            state, row = line(carry[0])
            return state, write_row(carry[1], carry[2], row), carry[2] + 1

        empty = no_sums(jax.eval_shape(update, state)[1])
        rows = empty_rows(jax.eval_shape(line, state)[1], program.capacity)
        first = (state, rows, jnp.int32(0))
        state, rows, _ = jax.lax.while_loop(lambda carry: carry[0].update < end, body, first)
        return state, rows if program.log_every > 1 else jax.vmap(partial(add_update, empty))(rows)

    every = over_seeds(run, program.seed_axis, program.mesh)
    return every(state, hyperparameters, stream, num_updates)


@partial(jax.jit, static_argnums=(0, 1))
def lead_in_update(
    program: Program,
    size: int,
    state: TrainState,
    stream: Stream,
    hyperparameters: Hyperparameters = None,
) -> tuple[TrainState, MetricSums]:
    """One update from a shorter window; the hidden state and the cursor stay where the stream begins."""

    def run(
        state: TrainState, hyperparameters: Hyperparameters, stream: Stream
    ) -> tuple[TrainState, MetricSums]:
        inputs = window_at(stream.rows, state.cursor, size)
        new, metrics = program.step(state, inputs, hyperparameters)
        held = new.estimator_state._replace(hidden=state.estimator_state.hidden)
        row = jax.tree.map(lambda leaf: leaf[None], add_update(no_sums(metrics), metrics))
        return new._replace(estimator_state=held, cursor=state.cursor), row

    return over_seeds(run, program.seed_axis, program.mesh)(state, hyperparameters, stream)
