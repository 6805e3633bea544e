"""One train step: what reaches the optimiser, and what counts as not finite."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtrunc.base import Params
from jtrunc.optimizers import inverse_square_root, scale_by_timestep_schedule
from jtrunc.training.step import MAX_TIMESTEP, describe_non_finite, init_state, train_step
from tests.training_cases import echo, plain, small


def begin(optimizer: Any, case: Any = None) -> tuple[Any, Any, Any]:
    case = case or small()
    estimator = plain(case.system)
    return case, estimator, init_state(estimator, optimizer, case.params, case.hidden, jax.random.key(0))


def test_a_step_is_the_estimate_into_the_optimiser() -> None:
    optimizer = optax.adam(1e-2)
    case, estimator, state = begin(optimizer)
    inputs = case.window(0, 7)
    estimate, _ = estimator.update(case.params, estimator.init(case.params, case.hidden), inputs)
    updates, _ = optimizer.update(estimate.grads, optimizer.init(case.params), case.params)
    expected = optax.apply_updates(case.params, updates)
    new, metrics = train_step(estimator, optimizer, state, inputs)
    for a, b in zip(jax.tree.leaves(new.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(estimate.grads), rtol=1e-6)
    assert (int(new.cursor), int(new.update), int(new.timestep)) == (7, 1, 7)
    assert int(metrics.non_finite) == 0


def test_the_optimiser_sees_the_last_timestep_of_the_window() -> None:
    optimizer = optax.chain(scale_by_timestep_schedule(lambda t: jnp.float32(t)), optax.scale(-1.0))
    system = echo()
    estimator = plain(system)
    state = init_state(estimator, optimizer, Params(jnp.float32(0.0)), jnp.float32(0.0), jax.random.key(0))
    state, _ = train_step(estimator, optimizer, state, jnp.zeros(3, jnp.float32))
    assert float(state.params.recurrent) == -3 * 3  # a gradient of 1 a step, at timestep 3
    state, _ = train_step(estimator, optimizer, state, jnp.zeros(2, jnp.float32))
    assert float(state.params.recurrent) == -9 - 2 * 5


def test_timestep_stops_at_its_largest_value_instead_of_wrapping() -> None:
    case, estimator, state = begin(optax.sgd(0.1))
    state = state._replace(timestep=jnp.int32(MAX_TIMESTEP - 3))
    new, _ = train_step(estimator, optax.sgd(0.1), state, case.window(0, 7))
    assert int(new.timestep) == MAX_TIMESTEP


def test_state_keeps_its_types() -> None:
    case, estimator, state = begin(optax.adam(1e-2))
    new, _ = jax.jit(train_step, static_argnums=(0, 1))(estimator, optax.adam(1e-2), state, case.window(0, 7))
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, new)


@pytest.mark.parametrize("size", [3, 1000, 1_000_000])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_entry_among_many_is_found(size: int, bad: float) -> None:
    system = echo()
    estimator = plain(system)

    def transition(theta: Any, hidden: Any, inputs: Any) -> Any:
        return hidden

    def loss(params: Params, hidden: Any, inputs: Any) -> Any:
        return (params.recurrent * inputs).sum(), ()

    estimator = plain(system._replace(transition=transition, loss=loss))
    optimizer = optax.sgd(1.0)
    params = Params(jnp.zeros(size, jnp.float32))
    state = init_state(estimator, optimizer, params, jnp.float32(0), jax.random.key(0))
    inputs = np.zeros((1, size), np.float32)
    step = jax.jit(train_step, static_argnums=(0, 1))
    assert int(step(estimator, optimizer, state, jnp.asarray(inputs))[1].non_finite) == 0
    inputs[0, size // 2] = bad
    bits = int(step(estimator, optimizer, state, jnp.asarray(inputs))[1].non_finite)
    assert "gradient" in describe_non_finite(bits) and "parameters" in describe_non_finite(bits)


def test_names_of_what_is_not_finite() -> None:
    assert describe_non_finite(0) == ""
    assert describe_non_finite(0b1001) == "loss, hidden state"


def test_schedule_scales_every_leaf_in_its_dtype() -> None:
    tx = scale_by_timestep_schedule(inverse_square_root(2.0))
    grads = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones((), jnp.float32)}
    updates: Any = tx.update(grads, tx.init(grads), timestep=jnp.int32(3))[0]
    assert updates["a"].dtype == jnp.bfloat16 and updates["b"].dtype == jnp.float32
    np.testing.assert_array_equal(updates["b"], 1.0)


def test_schedule_without_timestep_and_without_function_are_errors() -> None:
    tx = scale_by_timestep_schedule(inverse_square_root(2.0))
    with pytest.raises(ValueError, match="`timestep` is missing"):
        tx.update(jnp.float32(1.0), tx.init(jnp.float32(1.0)))
    with pytest.raises(TypeError, match="`schedule` must be a function"):
        scale_by_timestep_schedule(0.1)  # type: ignore[arg-type]
