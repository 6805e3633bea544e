"""Stand-in estimators for the tests of the training loop: plain `jax.grad`, and nothing else."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.base import Aux, Estimate, GradientEstimator, Params, System
from tests.systems import Case, tanh


class State(NamedTuple):
    hidden: Any
    key: Any


def losses_of(system: System, params: Params, hidden: Any, inputs: Any) -> tuple[jax.Array, Any]:
    """The losses of all steps, and the states after each."""

    def step(hidden: Any, inputs: Any) -> tuple[Any, Any]:
        hidden = system.transition(params.recurrent, hidden, inputs)
        return hidden, (system.loss(params, hidden, inputs)[0], hidden)

    return jax.lax.scan(step, hidden, inputs)[1]


def plain(system: System, scored: int | None = None) -> GradientEstimator:
    """Reverse mode over the window; its last `scored` losses count, and the state moves on by as many."""

    def init(params: Params, hidden: Any, key: jax.Array | None = None) -> State:
        return State(hidden, key)

    def update(params: Params, state: State, inputs: Any) -> tuple[Estimate, State]:
        total = jax.tree.leaves(inputs)[0].shape[0]
        count = min(scored or total, total)

        def loss(params: Params) -> tuple[jax.Array, Any]:
            losses, hiddens = losses_of(system, params, state.hidden, inputs)
            return losses[-count:].sum(), hiddens

        (value, hiddens), grads = jax.value_and_grad(loss, has_aux=True)(params)
        hidden = jax.tree.map(lambda leaf: leaf[count - 1], hiddens)
        return Estimate(value, grads, np.int32(count)), State(hidden, state.key)  # type: ignore[arg-type]

    return GradientEstimator(init, update)


def random_length(system: System) -> GradientEstimator:
    """Reverse mode over a random number of steps of the window: the number is data."""

    def init(params: Params, hidden: Any, key: jax.Array | None = None) -> State:
        return State(hidden, key)

    def update(params: Params, state: State, inputs: Any) -> tuple[Estimate, State]:
        total = jax.tree.leaves(inputs)[0].shape[0]
        key, draw = jax.random.split(state.key)
        count = jax.random.randint(draw, (), 1, total + 1, jnp.int32)

        def loss(params: Params) -> tuple[jax.Array, Any]:
            losses, hiddens = losses_of(system, params, state.hidden, inputs)
            return jnp.where(jnp.arange(total) < count, losses, 0).sum(), hiddens

        (value, hiddens), grads = jax.value_and_grad(loss, has_aux=True)(params)
        hidden = jax.tree.map(lambda leaf: leaf[count - 1], hiddens)
        aux = Aux(diagnostics={"look_ahead_hits": (count == total).astype(jnp.int32)})
        return Estimate(value, grads, count, aux), State(hidden, key)

    return GradientEstimator(init, update)


def echo() -> System:
    """ℓₜ = xₜ and a gradient of 1 a step: the loss says which rows a window held."""
    return System(
        transition=lambda theta, hidden, inputs: hidden + 1,
        loss=lambda params, hidden, inputs: (
            inputs + params.recurrent - jax.lax.stop_gradient(params.recurrent),
            (),
        ),
    )


def small(length: int = 30) -> Case:
    return tanh(length, dtype=jnp.float32)


def assert_same(a: Any, b: Any) -> None:
    """Equal in every bit, keys included."""

    def raw(leaf: Any) -> np.ndarray:
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert raw(x).dtype == raw(y).dtype
        np.testing.assert_array_equal(raw(x), raw(y))
