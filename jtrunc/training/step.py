"""One train step: the estimator's gradient into the optimiser, and the numbers that a run reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jtrunc.base import GradientEstimator, Params, PyTree
from jtrunc.optimizers import feed_metric
from jtrunc.targets.state import TargetState
from jtrunc.trees import is_inexact, select, strongly_typed

MAX_TIMESTEP = np.iinfo(np.int32).max
"""`TrainState.timestep` stops here and never wraps to a negative number."""

NON_FINITE = ("loss", "gradient", "parameters", "hidden state")
"""What `StepMetrics.non_finite` reports, bit by bit, lowest first."""


class TrainState(NamedTuple):
    """Everything that a run needs in order to go on.

    Attributes:
      params: `Params`.
      opt_state: state of the optimiser.
      estimator_state: state of the estimator, with `hidden`, key and phase.
      cursor: int32, where the next window begins in the data's time axis, modulo its length.
      update: int32, how many updates were made.
      timestep: int32, how many steps were consumed; it stops at 2³¹ − 1 (a schedule such as 1/√t is flat
        by then), the metrics of a run count on in 64 bits.
      skips_left: int32, how many more updates may be skipped because they are not finite; None where none
        is, which costs nothing.
    """

    params: Params
    opt_state: optax.OptState
    estimator_state: Any
    cursor: jax.Array
    update: jax.Array
    timestep: jax.Array
    skips_left: jax.Array | None = None


class StepMetrics(NamedTuple):
    """The numbers of one update.

    Attributes:
      loss: sum over the scored steps (nats).
      num_steps: int32, steps consumed.
      num_scored: int32, steps whose losses `loss` sums up: the estimator's diagnostic of that name, else
        `num_steps`.
      grad_norm: Euclidean norm of the gradient estimate over all parameters.
      non_finite: int32 bits, 0 if all is well; bit i is set where `NON_FINITE[i]` is not finite.
      diagnostics: the estimator's other named scalars; they may be infinite.
      num_skipped: int32, 1 if the update was skipped: every number but `num_steps` is then 0. None where
        none is skipped.
    """

    loss: jax.Array
    num_steps: jax.Array
    num_scored: jax.Array
    grad_norm: jax.Array
    non_finite: jax.Array
    diagnostics: dict[str, jax.Array]
    num_skipped: jax.Array | None = None


def init_state(
    estimator: GradientEstimator,
    optimizer: optax.GradientTransformation,
    params: Params | Callable[[jax.Array], Params],
    hidden: PyTree,
    key: jax.Array,
) -> TrainState:
    """The state before the first update.

    Args:
      estimator: the gradient estimator.
      optimizer: any optax optimiser.
      params: `Params`, or a function ``key -> Params`` such as a model's `init`.
      hidden: the initial hidden state.
      key: a typed key; one half goes to `params` (if it is a function), one to the estimator.

    Returns:
      A `TrainState` without weak types, so that a restored state runs the very same program.
    """
    params_key, estimator_key = jax.random.split(key)
    chosen = params(params_key) if callable(params) else params
    opt_state, zero = optimizer.init(chosen), jnp.int32(0)
    estimator_state = feed_metric(estimator.init(chosen, hidden, estimator_key), opt_state)
    return strongly_typed(TrainState(chosen, opt_state, estimator_state, zero, zero, zero))


def train_step(
    estimator: GradientEstimator,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    inputs: PyTree,
) -> tuple[TrainState, StepMetrics]:
    """One update: ``estimate = estimator.update(...)``, then the optimiser on ``estimate.grads``.

    The optimiser gets ``timestep``, the last timestep of this window, as an extra argument (errata 5), and
    ``truncation_length`` where the estimator's diagnostics have it; optimisers that do not know them ignore
    them. An estimator that scales by the optimiser's Kalman metric gets the new one
    (`jtrunc.optimizers.feed_metric`). Pure: jit it with ``static_argnums=(0, 1)``.

    Where the state has `skips_left`, an update that is not finite changes neither parameters nor optimiser as
    long as skips are left. The run goes on behind its data, and the estimator's state goes with it if it is
    finite itself; else it stays as it was, but for the `position` of a `TargetState`, whose blocks follow
    the data. That needs room for both states.

    Args:
      estimator: the gradient estimator.
      optimizer: any optax optimiser.
      state: from `init_state` or an earlier step.
      inputs: one window, leading axis = time.

    Returns:
      The new state and the `StepMetrics`. `cursor` moves on by ``num_steps``; whoever slices the data takes
      it modulo its length.
    """
    estimate, estimator_state = estimator.update(state.params, state.estimator_state, inputs)
    num_steps = estimate.num_steps
    timestep = state.timestep + jnp.minimum(num_steps, MAX_TIMESTEP - state.timestep)
    diagnostics = {name: jnp.asarray(value) for name, value in estimate.aux.diagnostics.items()}
    extra = {name: diagnostics[name] for name in ("truncation_length",) if name in diagnostics}
    with_extra = optax.with_extra_args_support(optimizer)
    updates, opt_state = with_extra.update(
        estimate.grads, state.opt_state, state.params, timestep=timestep, **extra
    )
    params: Any = optax.apply_updates(state.params, updates)
    estimator_state = feed_metric(estimator_state, opt_state)
    new_state = TrainState(
        params,
        opt_state,
        estimator_state,
        state.cursor + num_steps,
        state.update + 1,
        timestep,
        state.skips_left,
    )
    metrics = StepMetrics(
        jnp.asarray(estimate.loss),
        jnp.asarray(num_steps, jnp.int32),
        jnp.asarray(diagnostics.pop("num_scored", num_steps), jnp.int32),
        global_norm(estimate.grads),
        _non_finite(estimate.loss, estimate.grads, params, estimator_state.hidden),
        diagnostics,
    )
    return (new_state, metrics) if state.skips_left is None else _skip_non_finite(state, new_state, metrics)


def _skip_non_finite(
    before: TrainState, after: TrainState, metrics: StepMetrics
) -> tuple[TrainState, StepMetrics]:
    """The update, or what is left of it if it is not finite and may be skipped."""
    assert before.skips_left is not None
    skip = (metrics.non_finite != 0) & (before.skips_left > 0)
    moved = feed_metric(after.estimator_state, before.opt_state)
    kept = select(_non_finite(moved) == 0, moved, _at_next_blocks(before.estimator_state, moved))
    num_skipped = skip.astype(jnp.int32)
    state = after._replace(
        params=select(skip, before.params, after.params),
        opt_state=select(skip, before.opt_state, after.opt_state),
        estimator_state=select(skip, kept, after.estimator_state),
        skips_left=before.skips_left - num_skipped,
    )
    nothing = jax.tree.map(jnp.zeros_like, metrics)._replace(num_steps=metrics.num_steps)
    return state, select(skip, nothing, metrics)._replace(num_skipped=num_skipped)


def _at_next_blocks(before: Any, after: Any) -> Any:
    """An estimator's state before an update, but for the place of target propagation's blocks in the data."""

    def of_blocks(state: Any) -> bool:
        return isinstance(state, TargetState)

    def place(old: Any, new: Any) -> Any:
        return old._replace(position=new.position) if of_blocks(old) else old

    return jax.tree.map(place, before, after, is_leaf=of_blocks)


def global_norm(tree: PyTree) -> jax.Array:
    """√ Σ |x|² over all float leaves, in float32 or wider."""
    total = jnp.float32(0)
    for leaf in _inexact_leaves(tree):
        total = total + jnp.sum(
            jnp.square(jnp.abs(leaf).astype(jnp.promote_types(leaf.real.dtype, "float32")))
        )
    return jnp.sqrt(total)


def describe_non_finite(bits: int) -> str:
    """The names of the bits that are set: ``3 -> "loss, gradient"``."""
    return ", ".join(name for i, name in enumerate(NON_FINITE) if bits >> i & 1)


def _non_finite(*trees: PyTree) -> jax.Array:
    bits = jnp.int32(0)
    for i, tree in enumerate(trees):
        for leaf in _inexact_leaves(tree):
            bits = bits | _any_non_finite(leaf) << i
    return bits


def _any_non_finite(leaf: jax.Array) -> jax.Array:
    """int32, 1 if any entry is NaN or infinite, else 0.

    Integers, because XLA on CPU reduces booleans an entry at a time, and the greatest of them, because it
    cannot `or` them over devices; but no `max` of the floats themselves, which drops NaN there.
    """
    return jnp.max((~jnp.isfinite(leaf)).astype(jnp.int32), initial=0)


def _inexact_leaves(tree: PyTree) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]
