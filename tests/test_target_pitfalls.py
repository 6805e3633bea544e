"""Mistakes of published target propagation, each pinned, and blocks split over devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jtrunc
from jtrunc import targets
from jtrunc.base import Aux, Estimate
from tests import reference, systems
from tests.compare import assert_close, differ
from tests.target_cases import row, windows_of
from tests.target_reference import Settings, TargetPropagation

CASE = systems.tanh(10)
WINDOWS = windows_of(CASE, 2, 4)  # two windows of 1 + 2 + 2 steps, visited twice


def zeroed(state: Any) -> Any:
    return state._replace(multipliers=jax.tree.map(jnp.zeros_like, state.multipliers))


@pytest.mark.slow
def test_multipliers_persist_across_minibatches():
    """Minibatch mode: H begins anew at every visit, y does not. Zeroed for each minibatch they are others."""
    options: dict[str, Any] = dict(num_blocks=6, hidden_optimizer=optax.sgd(0.5))
    estimator = jtrunc.target_propagation(CASE.system, 2, 0.8, **options)
    update = jax.jit(estimator.update)
    settings = Settings(2, lambda count: 0.8, **options)
    for forget in (False, True):
        learner = TargetPropagation(CASE.system, settings._replace(forget=forget), CASE.hidden)
        state, right = estimator.init(CASE.params, CASE.hidden), []
        for visit in range(4):
            expected = learner.update(CASE.params, row(WINDOWS, visit)).grads
            estimate, state = update(CASE.params, zeroed(state) if forget else state, row(WINDOWS, visit))
            assert_close(estimate.grads, expected, rtol=1e-11)
            right.append(estimate.grads)
        # At fixed parameters only the multipliers tell the second visit from the first.
        assert differ(right[2], right[0]) is not forget
        assert differ(right[3], right[1]) is not forget


@pytest.mark.slow
def test_no_dual_step_is_taken_away_from_real_states():
    """On the first visit r = 0 and y stays 0; not so if the zeros that stand there before are taken for H."""
    estimator = jtrunc.target_propagation(
        CASE.system, 2, 0.8, hidden_steps=0, initial="persistent", num_blocks=6
    )
    update = jax.jit(estimator.update)
    first = estimator.init(CASE.params, CASE.hidden)
    assert not first.visited.any() and not first.free.any() and not first.multipliers.any()
    estimate, state = update(CASE.params, first, row(WINDOWS, 0))
    assert estimate.aux.diagnostics["primal_residual"] < 1e-14
    np.testing.assert_allclose(state.multipliers, 0.0, atol=1e-14)
    assert state.visited.tolist() == [True] * 3 + [False] * 3
    run = reference.linearise(*CASE._replace(inputs=row(WINDOWS, 0)))
    assert_close(estimate.grads, reference.artbp(run, [1, 0, 1, 0], np.zeros(4)), rtol=1e-12)
    wrong, state = update(CASE.params, first._replace(visited=jnp.ones(6, bool)), row(WINDOWS, 0))
    assert np.abs(state.multipliers[:3]).max() > 0.1
    assert differ(wrong.grads, estimate.grads)


@pytest.mark.slow
@pytest.mark.parametrize("initial", ["forward", "persistent", "predicted"])
def test_what_lambda_does_without_steps_on_h(initial):
    """Nothing, from true forward states (errata 26); H of an earlier visit lags behind θ, and it does."""

    @jax.jit
    def two_visits(penalty: jax.Array) -> Any:
        estimator = jtrunc.target_propagation(
            CASE.system, 2, penalty, "penalty", 0, initial=initial, num_blocks=3
        )
        state = estimator.init(CASE.params, CASE.hidden)
        first, state = estimator.update(CASE.params, state, row(WINDOWS, 0))
        moved = jax.tree.map(lambda leaf: 0.9 * leaf, CASE.params)
        second, _ = estimator.update(moved, state, row(WINDOWS, 0))
        return first.grads, second.grads

    (first, second), (first_without, second_without) = (two_visits(jnp.float64(p)) for p in (1.0, 0.0))
    assert_close(first, first_without, rtol=1e-13)
    if initial == "forward":
        assert_close(second, second_without, rtol=1e-13)
    else:
        assert differ(second, second_without)


# Blocks split over the devices of a mesh, in the order of time.

SPLIT = {
    "admm": systems.tanh(32),
    "penalty": systems.nested(32),
    "augmented_lagrangian": systems.structured("gru", 32, 8),  # two rows a device: in two phases
}
OPTIONS: dict[str, dict[str, Any]] = {
    "admm": dict(initial="persistent", hidden_steps=2, hidden_optimizer=optax.adagrad(0.1)),
    "penalty": dict(initial="predicted"),
    "augmented_lagrangian": dict(initial="persistent", loss_on="free"),
}


def on_one_device(method: Any) -> tuple[Any, Any]:
    """The estimator on sixteen blocks, and a state that takes `hidden` for H everywhere."""
    case, options = SPLIT[method], OPTIONS[method]
    estimator = jtrunc.target_propagation(case.system, 2, 0.8, method, num_blocks=16, **options)
    state = estimator.init(case.params, case.hidden)
    return estimator, state._replace(visited=jnp.ones(16, bool))


@pytest.mark.slow
@pytest.mark.parametrize("method", OPTIONS)
def test_blocks_on_devices_equal_blocks_on_one(method, mesh):
    """Under shard_map with its checks: gradients, H and y of two updates; only block ends and sums travel."""
    (system, params, hidden, inputs), options = SPLIT[method], OPTIONS[method]
    split = jtrunc.target_propagation(system, 2, 0.8, method, num_blocks=16, axis_name="data", **options)
    estimator, expected = on_one_device(method)
    state = split.init(params, hidden)
    assert_close(state, expected, rtol=1e-15)
    specs, whole, parts = targets.partition_specs(state, "data"), PartitionSpec(), PartitionSpec("data")
    of_estimate = Estimate(whole, whole, whole, Aux(parts, whole))  # pyright: ignore[reportArgumentType]
    sharded = jax.jit(
        jax.shard_map(
            split.update, mesh=mesh, in_specs=(whole, specs, parts), out_specs=(of_estimate, specs)
        )
    ).lower(params, state, inputs).compile()  # fmt: skip
    text = sharded.as_text()
    assert text is not None and "collective-permute" in text and "all-reduce" in text
    assert "all-gather" not in text and "all-to-all" not in text
    update = jax.jit(estimator.update)
    for _ in range(2):
        actual, state = sharded(params, state, inputs)
        wanted, expected = update(params, expected, inputs)
        assert_close(actual, wanted, rtol=1e-12)
        assert_close(state, expected, rtol=1e-12)
    assert actual.num_steps == wanted.num_steps == 32
    # What a device sends is not what the others have.
    assert differ(jax.tree.leaves(state.free)[0][1:], jax.tree.leaves(state.free)[0][:-1])


@pytest.mark.slow
def test_plain_jit_follows_the_sharding_of_the_blocks(mesh):
    """Without shard_map, the state and the time axis laid out over the devices: the same numbers."""
    (estimator, state), (_, params, _, inputs) = on_one_device("admm"), SPLIT["admm"]
    update = jax.jit(estimator.update)
    put = jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)),
        (state, inputs),
        (targets.partition_specs(state, "data"), PartitionSpec("data")),
    )
    actual = update(params, *put)
    assert_close(actual, update(params, state, inputs), rtol=1e-12)
    assert len(actual[1].free.sharding.device_set) == 8
