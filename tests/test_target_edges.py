"""Target propagation where a reader broke it: orders, padding, depth, states of another size."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtrunc
from jtrunc import targets
from tests import systems
from tests.compare import assert_close, differ
from tests.reference import to_vector

METHODS: tuple[Any, ...] = ("admm", "penalty")
CASE = systems.CASES["tanh"](12)


def update_of(estimator, params=CASE.params):
    """``(state, inputs) -> (estimate, state)``, jitted."""
    return jax.jit(lambda state, inputs: estimator.update(params, state, inputs))


def first_state(estimator):
    return estimator.init(CASE.params, CASE.hidden)


@pytest.mark.parametrize("initial", ["forward", "persistent"])
@pytest.mark.parametrize("method", ["admm", "augmented_lagrangian"])
def test_one_step_on_the_states_is_enough_for_multipliers(method, initial):
    estimator = jtrunc.target_propagation(CASE.system, 3, 0.5, method, 1, initial=initial, num_blocks=4)
    update, state = update_of(estimator), first_state(estimator)
    for _ in range(2):  # the joint step from the forward states is seen one visit later
        estimate, state = update(state, CASE.inputs)
    assert np.abs(state.multipliers).max() > 1e-4
    assert estimate.aux.diagnostics["dual_residual"] > 0


def test_without_blocks_that_come_round_again_admm_is_the_penalty_method():
    kinds = {name: jtrunc.target_propagation(CASE.system, 3, 0.5, name, 1) for name in METHODS}
    kept = jtrunc.target_propagation(CASE.system, 3, 0.5, "admm", 1, num_blocks=4)
    grads = {}
    for name, estimator in {**kinds, "kept": kept}.items():
        update, state = update_of(estimator), first_state(estimator)
        for _ in range(2):
            estimate, after = update(state, CASE.inputs)
            state = after._replace(hidden=state.hidden)
        grads[name] = to_vector(estimate.grads)
    assert_close(grads["admm"], grads["penalty"])
    assert differ(grads["kept"], grads["penalty"])


def test_no_dual_step_from_the_rounding_of_forward_states():
    """Adam makes a step of full size of any residual, of rounding too."""
    case = CASE
    estimator = jtrunc.target_propagation(
        case.system, 3, 1.0, hidden_steps=0, dual_optimizer=optax.adam(0.1), num_blocks=4
    )
    update, state = update_of(estimator), first_state(estimator)
    for _ in range(3):
        estimate, state = update(state, case.inputs)
    assert not np.any(state.multipliers)
    cut = jtrunc.truncated_bptt(case.system, 3)
    exact, _ = update_of(cut)(cut.init(case.params, case.hidden), case.inputs)
    assert_close(to_vector(estimate.grads), to_vector(exact.grads))


@pytest.mark.slow
def test_padding_scores_no_state_that_the_recurrence_never_has():
    """The norm has no derivative at 0, where the padding of the first block must not look."""
    system = jtrunc.System(
        lambda theta, h, x: jnp.tanh(theta * h + x),
        lambda params, h, x: (jnp.linalg.norm(params.readout * h), ()),
    )
    params, hidden = jtrunc.Params(jnp.float64(0.5), jnp.float64(2.0)), jnp.zeros(2)
    inputs = jax.random.normal(jax.random.key(0), (11, 2), jnp.float64)
    estimator = jtrunc.target_propagation(system, 11, 1.0, hidden_steps=0)
    ragged = jtrunc.target_propagation(system, 3, 1.0, hidden_steps=0)
    whole, after = estimator.update(params, estimator.init(params, hidden), inputs)
    found, ragged_after = ragged.update(params, ragged.init(params, hidden), inputs)
    assert np.isfinite(to_vector(found.grads)).all()
    assert_close(found.grads.readout, whole.grads.readout)
    assert_close(ragged_after.hidden, after.hidden)


def test_blocks_longer_than_the_data_cost_no_more():
    def temporaries(length):
        estimator = jtrunc.target_propagation(CASE.system, length, 1.0, hidden_steps=0)
        lowered = update_of(estimator).lower(first_state(estimator), CASE.inputs)
        analysis = lowered.compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporaries(12_000) == temporaries(12)


@pytest.mark.parametrize("seeds", [None, 2])
def test_once_visited_no_loop_is_longer_than_a_block(seeds):
    """Trip counts in the compiled program: none of T; the forward pass has a count that is data."""
    estimator = jtrunc.target_propagation(CASE.system, 6, 1.0, initial="predicted", num_blocks=2)
    whole = jtrunc.target_propagation(CASE.system, 12, 1.0, initial="predicted", num_blocks=1)

    def longest(estimator):
        update, state = estimator.update, first_state(estimator)
        if seeds:
            update = jax.vmap(update, in_axes=(None, 0, None))
            state = jax.tree.map(lambda leaf: jnp.stack([leaf] * seeds), state)
        text = jax.jit(update).lower(CASE.params, state, CASE.inputs).compile().as_text() or ""
        assert "conditional(" not in text
        return max(map(int, re.findall(r'known_trip_count":\{"n":"(\d+)"', text)))

    assert longest(estimator) <= 6 < longest(whole)


def test_a_first_state_may_be_donated():
    """No buffer is in it twice."""
    estimator = jtrunc.target_propagation(CASE.system, 3, 1.0, initial="persistent", num_blocks=4)
    state = estimator.init(CASE.params, jnp.copy(CASE.hidden))
    leaves = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(leaves)) == len(leaves)
    expected, _ = update_of(estimator)(state, CASE.inputs)
    donated = jax.jit(partial(estimator.update, CASE.params), donate_argnums=0)
    assert_close(donated(state, CASE.inputs)[0].grads, expected.grads)
    assert jax.tree.leaves(state)[0].is_deleted()


def test_a_state_of_another_size_is_refused():
    made, used = (
        jtrunc.target_propagation(CASE.system, 3, 1.0, initial="predicted", num_blocks=count)
        for count in (4, 8)
    )
    with pytest.raises(ValueError, match=r"`num_blocks` is 8, but the state was made for \[4\]"):
        used.update(CASE.params, first_state(made), CASE.inputs)


def test_partition_specs_split_what_belongs_to_blocks():
    estimator = jtrunc.target_propagation(CASE.system, 3, 1.0, initial="predicted", num_blocks=4)
    specs = targets.partition_specs(first_state(estimator), "time")
    split = jax.sharding.PartitionSpec("time")
    assert specs.free == specs.multipliers == specs.visited == split
    assert specs.hidden == specs.count == specs.position == jax.sharding.PartitionSpec()
