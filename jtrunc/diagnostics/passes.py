"""One pass of an estimator over a whole stream at fixed parameters, and what the exact gradient of it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.backward.masked import with_mask
from jtrunc.backward.unroll import window_gradient
from jtrunc.base import GradientEstimator, Params, PyTree, System
from jtrunc.probe import static_num_steps
from jtrunc.trees import accumulator, add_into, inner_product, num_time_steps, read_rows

_DRAWS_AT_ONCE = 32
"""Passes that run side by side where the lengths of their windows are known."""


class Pass(NamedTuple):
    """How an estimator walks along a stream.

    Attributes:
      estimator: of a system that takes `Marked` inputs.
      window: steps that each update is given.
      num_steps: steps that each consumes, or None where that is data.
    """

    estimator: GradientEstimator
    window: int
    num_steps: int | None


def scoring(system: System) -> System:
    """The system on inputs ``(scored, x)``, whose loss counts where `scored` holds.

    `scored` is a boolean a step, or one for each of the streams that share it.
    """
    marked = with_mask(system, advance=True)
    return marked._replace(loss=lambda params, hidden, x: marked.loss(params, hidden, (_one(x[0]), x[1])))


def scoring_one_lag(system: System) -> System:
    """The system on inputs ``((read, scored), x)``: θ has a gradient only in the steps that are to be `read`.

    With one step read and one scored, k steps later, the gradient of θ is what lag k adds to that loss. It
    has no structure, because its weights change their meaning from step to step.
    """

    def transition(theta: PyTree, hidden: PyTree, inputs: PyTree) -> PyTree:
        read = _one(inputs[0][0])
        theta = jax.tree.map(lambda leaf: jnp.where(read, leaf, jax.lax.stop_gradient(leaf)), theta)
        return system.transition(theta, hidden, inputs[1])

    def loss(params: Params, hidden: PyTree, inputs: PyTree) -> tuple[jax.Array, PyTree]:
        # Neither the readout's gradient nor that of a loss that reads θ is a matter of lags.
        fixed = jax.lax.stop_gradient(params)
        value, aux = system.loss(fixed, hidden, inputs[1])
        return jnp.where(_one(inputs[0][1]), value, jnp.zeros_like(value)), aux

    return System(transition, loss)


def flags(of_steps: jax.Array, streams: int | None) -> jax.Array:
    """(T,) as it is, or (T, B): the same for all streams."""
    return of_steps if streams is None else jnp.repeat(of_steps[:, None], streams, axis=1)


def _one(flags: jax.Array) -> jax.Array:
    """The flag that all streams share."""
    return jnp.ravel(flags)[0]


def make_pass(
    estimator: GradientEstimator, window: int, params: Params, hidden: PyTree, inputs: PyTree
) -> Pass:
    """An estimator with the steps that it consumes of each window of these inputs."""
    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((window, *leaf.shape[1:]), leaf.dtype), inputs)
    num_steps = static_num_steps(estimator, params, hidden, first, owner="audit")
    return Pass(estimator, window, num_steps)


def exact_gradient(
    system: System, params: Params, hidden: PyTree, inputs: PyTree, streams: int | None = None
) -> Params:
    """Backpropagation through all of `inputs`; with `streams`, of a system of one: the mean over them."""
    if streams is None:
        return window_gradient(system, params, hidden, inputs).grads
    grads = jax.vmap(lambda *one: exact_gradient(system, params, *one), in_axes=(0, 1))(hidden, inputs)
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), grads)


def pass_gradient(along: Pass, params: Params, hidden: PyTree, inputs: PyTree, key: jax.Array) -> Params:
    """The sum of the estimates of all updates that a pass over `inputs` takes, at the same `params`.

    The last windows read beyond the end: first steps again, which score nothing.
    """
    estimator, window, num_steps = along
    length = num_time_steps(inputs)
    marks, x = inputs
    beyond = jax.tree.map(lambda leaf: jnp.zeros((window, *leaf.shape[1:]), leaf.dtype), marks)
    again = jax.tree.map(lambda leaf: leaf[jnp.arange(window) % length], x)
    rows = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), inputs, (beyond, again))

    def update(cursor: Any, state: Any, total: Params) -> tuple[Any, Any, Params]:
        estimate, state = estimator.update(params, state, read_rows(rows, cursor, window))
        return cursor + estimate.num_steps, state, add_into(total, estimate.grads)

    first = (jnp.int32(0), estimator.init(params, hidden, key), accumulator(params))
    if num_steps is None:
        return jax.lax.while_loop(lambda carry: carry[0] < length, lambda carry: update(*carry), first)[2]
    # Windows that overlap score their last steps, so that the last one ends where the stream does.
    num_updates = 1 + max(0, -(-(length - window) // num_steps))
    return jax.lax.fori_loop(0, num_updates, lambda _, carry: update(*carry), first)[2]


def over_draws(along: Pass, run: Callable[[Any], PyTree], draws: PyTree) -> PyTree:
    """``run`` for every row of `draws`; side by side only where no window's length is data."""
    if along.num_steps is None:
        return jax.lax.map(run, draws)
    # In batches `lax.map` cannot put leaves of no size together again: they get a number for the while.
    padded = partial(jax.tree.map, lambda leaf: leaf if leaf.size else jnp.zeros((), leaf.dtype))
    found = jax.lax.map(lambda draw: padded(run(draw)), draws, batch_size=_DRAWS_AT_ONCE)
    shapes = jax.eval_shape(jax.vmap(run), draws)
    return jax.tree.map(lambda leaf, of: leaf if of.size else jnp.zeros(of.shape, of.dtype), found, shapes)


@partial(jax.jit, static_argnums=0)
def gradients(along: Pass, params: Params, hidden: PyTree, inputs: PyTree, keys: jax.Array) -> Params:
    """`pass_gradient` for each of the keys, in a leading axis."""
    return over_draws(along, lambda key: pass_gradient(along, params, hidden, inputs, key), keys)


class LagMoments(NamedTuple):
    """Of an estimate ĝ of what one lag adds to one loss, and the exact g: ⟨ĝ, g⟩, ‖g‖² and ‖ĝ − g‖²."""

    along: jax.Array
    exact: jax.Array
    error: jax.Array


@partial(jax.jit, static_argnums=(0, 1, 2))
def lag_moments(
    along: Pass,
    system: System,
    streams: int | None,
    params: Params,
    hidden: PyTree,
    x: PyTree,
    lag: jax.Array,
    draws: tuple[jax.Array, jax.Array],
) -> LagMoments:
    """`LagMoments` for each draw ``(time, key)``: the loss of step `time`, and θ as of `lag` steps before."""
    steps = jnp.arange(num_time_steps(x))

    def run(draw: tuple[jax.Array, jax.Array]) -> LagMoments:
        time, key = draw
        marked = ((flags(steps == time - lag, streams), flags(steps == time, streams)), x)
        exact = exact_gradient(system, params, hidden, marked, streams).recurrent
        found = pass_gradient(along, params, hidden, marked, key).recurrent
        error = jax.tree.map(jnp.subtract, found, exact)
        return LagMoments(*(inner_product(a, b) for a, b in ((found, exact), (exact, exact), (error, error))))

    return over_draws(along, run, draws)
