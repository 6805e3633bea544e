"""The loss over a whole split, in fixed memory."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.base import Loss, Params, PyTree, System, Transition
from jtrunc.training.processes import gather
from jtrunc.training.stream import num_rows


class Evaluation(NamedTuple):
    """The loss of a system on a split.

    Attributes:
      nats: mean loss per step, float64; () or (seeds,).
      bits: the same divided by ln 2.
      num_steps: how many steps it is the mean of.
      hidden: the hidden state after the last step.
    """

    nats: np.ndarray
    bits: np.ndarray
    num_steps: int
    hidden: PyTree


def evaluate(
    system: System,
    params: Params,
    hidden: PyTree,
    data: PyTree,
    *,
    steps_at_once: int = 1024,
    seed_axis: bool = False,
) -> Evaluation:
    """Mean loss per step, (1/T) Σₜ ℓₜ, from `hidden` over all of `data`.

    The forward pass alone; on the device no more than `steps_at_once` losses are kept, and they are summed in
    float64 on the host, so that a long split loses no digits.

    Args:
      system: the system; its aux is dropped.
      params: `Params`; with a leading axis of seeds if `seed_axis`.
      hidden: the initial hidden state, without an axis of seeds; its batch shape must fit `data`.
      data: leaves (T, ...).
      steps_at_once: steps of one compiled call.
      seed_axis: evaluate every seed.

    Raises:
      ValueError: if `data` is empty, or its leaves differ in length.

    Example: the mean of 0, 1, 2, 3.

      >>> system = System(lambda theta, hidden, x: hidden, lambda params, hidden, x: (x, ()))
      >>> result = evaluate(system, Params(()), (), jnp.arange(4.0), steps_at_once=3)
      >>> float(result.nats), round(float(result.bits), 4)
      (1.5, 2.164)
    """
    length = num_rows(data, "data")
    functions = (system.transition, system.loss)
    if seed_axis:
        seeds = jax.tree.leaves(params)[0].shape[0]
        hidden = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (seeds, *jnp.shape(leaf))), hidden)
    total: np.ndarray = np.float64(0.0)  # type: ignore[assignment]
    for start in range(0, length, steps_at_once):
        inputs = jax.tree.map(lambda leaf, start=start: leaf[start : start + steps_at_once], data)
        hidden, losses = _losses(functions, seed_axis, params, hidden, inputs)
        total = total + np.asarray(gather(losses), np.float64).sum(axis=-1)
    nats = total / length
    return Evaluation(nats, nats / np.log(2), length, hidden)


@partial(jax.jit, static_argnums=(0, 1))
def _losses(
    functions: tuple[Transition, Loss], seed_axis: bool, params: Params, hidden: PyTree, inputs: PyTree
) -> tuple[PyTree, jax.Array]:
    transition, loss = functions

    def run(params: Params, hidden: PyTree) -> tuple[PyTree, jax.Array]:
        def step(hidden: PyTree, inputs: PyTree) -> tuple[PyTree, jax.Array]:
            hidden = transition(params.recurrent, hidden, inputs)
            return hidden, loss(params, hidden, inputs)[0]

        return jax.lax.scan(step, hidden, inputs)

    return jax.vmap(run)(params, hidden) if seed_axis else run(params, hidden)
