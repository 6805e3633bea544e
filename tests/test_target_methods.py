"""Target propagation as an estimator: every method against the loops, update by update."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtrunc
from tests import reference, systems, target_reference
from tests.compare import assert_close, differ
from tests.target_cases import descend, row, rows_of, stacked, walk, windows_of
from tests.target_reference import Settings, TargetPropagation
from tests.test_target_exact import own

RATE = 0.05


class Plan(NamedTuple):
    """One way to run: windows of `length` steps, `num_windows` of them in the data set."""

    options: dict[str, Any]
    kind: str = "tanh"
    length: int = 5
    block_length: int = 2
    num_windows: int = 2
    updates: int = 5


@cache
def case_of(kind: str, length: int) -> systems.Case:
    """One system for all plans, so that the loops are compiled once."""
    return systems.CASES[kind](length)


def schedule(count: Any) -> Any:
    return 0.4 / (1 + count)


ADAGRAD = optax.adagrad(0.1)
KEPT = dict(num_blocks=6)
PLANS = {
    "new data": Plan(dict(penalty=0.5, hidden_steps=2, hidden_optimizer=ADAGRAD)),
    "new data, penalty": Plan(dict(penalty=0.5, method="penalty", loss_on="free")),
    "forward": Plan(dict(penalty=0.5, **KEPT)),
    "forward, joint": Plan(dict(penalty=0.5, method="augmented_lagrangian", hidden_steps=2, **KEPT)),
    "persistent, Adagrad, schedule": Plan(
        dict(penalty=schedule, hidden_steps=2, hidden_optimizer=ADAGRAD, initial="persistent", **KEPT)
    ),
    "persistent, no step": Plan(dict(penalty=0.5, hidden_steps=0, initial="persistent", **KEPT)),
    "persistent, penalty": Plan(dict(penalty=0.5, method="penalty", initial="persistent", **KEPT)),
    "persistent, joint": Plan(
        dict(penalty=0.5, method="augmented_lagrangian", initial="persistent", loss_on="free", **KEPT)
    ),
    "predicted, Adam": Plan(
        dict(penalty=0.5, hidden_optimizer=optax.adam(0.05), initial="predicted", constraint=own, **KEPT)
    ),
    "predicted, dual Adam": Plan(
        dict(penalty=0.5, dual_optimizer=optax.adam(0.1), initial="predicted", loss_on="free", **KEPT)
    ),
    "predicted, joint": Plan(dict(penalty=0.5, method="augmented_lagrangian", initial="predicted", **KEPT)),
    "predicted, no step, joint": Plan(
        dict(penalty=0.5, method="augmented_lagrangian", hidden_steps=0, initial="predicted", **KEPT)
    ),
    "nested, predicted": Plan(
        dict(penalty=0.5, initial="predicted", num_blocks=4), "nested", length=2, block_length=1, updates=4
    ),
}


def settings_of(plan: Plan) -> Settings:
    penalty = plan.options["penalty"]
    options: dict[str, Any] = plan.options | {
        "penalty": penalty if callable(penalty) else lambda count: penalty
    }
    return Settings(plan.block_length, **options)


def expected(plan: Plan, **changes: Any) -> tuple[list[Any], TargetPropagation, Any]:
    """The loops: the results of all updates, the learner and the last parameters."""
    case = case_of(plan.kind, plan.length * plan.num_windows)
    learner = TargetPropagation(case.system, settings_of(plan)._replace(**changes), case.hidden)
    params, results = case.params, []
    windows = windows_of(case, plan.num_windows, plan.updates)
    for update in range(plan.updates):
        results.append(learner.update(params, row(windows, update)))
        params = descend(params, results[-1].grads, RATE)
    return results, learner, params


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_updates_equal_the_loops(name):
    """Gradients, loss, diagnostics, H, y and optimiser states over several updates while θ moves."""
    plan = PLANS[name]
    case = case_of(plan.kind, plan.length * plan.num_windows)
    estimator = jtrunc.target_propagation(case.system, plan.block_length, **plan.options)
    actual = walk(estimator, case, windows_of(case, plan.num_windows, plan.updates), RATE)
    results, learner, params = expected(plan)
    for update, wanted in enumerate(results):
        assert_close(row(actual.grads, update), wanted.grads, rtol=1e-11)
        np.testing.assert_allclose(actual.loss[update], wanted.loss, rtol=1e-12)
        for label, values in actual.diagnostics.items():
            np.testing.assert_allclose(values[update], getattr(wanted, label), rtol=1e-10, atol=1e-13)
    assert set(actual.diagnostics) == {"primal_residual", "dual_residual", "constraint", "penalty"}
    assert_close(actual.params, params, rtol=1e-11)
    assert_close(actual.state.hidden, learner.hidden, rtol=1e-11)
    assert (actual.state.count, actual.state.position) == (learner.count, learner.position)
    if learner.blocks:
        assert_blocks_close(actual.state, learner.blocks)


def assert_blocks_close(state: Any, blocks: list[target_reference.Block]) -> None:
    """What is kept of each block: H, y, and the states of the two optimisers."""
    count = len(blocks)
    for kept, plain in [
        (state.free, [reference.to_vector(block.free) for block in blocks]),
        (state.multipliers, [block.multiplier for block in blocks]),
        (state.hidden_optimizer, [reference.to_vector(block.hidden_optimizer) for block in blocks]),
        (state.dual_optimizer, [reference.to_vector(block.dual_optimizer) for block in blocks]),
    ]:
        if jax.tree.leaves(kept):
            assert_close(rows_of(kept, count), np.stack(plain), rtol=1e-11)


def test_the_plans_tell_the_methods_apart():
    """The loops of one plan are not those of its neighbours: what the test above compares does differ."""
    plan = PLANS["persistent, joint"]._replace(updates=3)  # the last one comes back to the first window
    results, *_ = expected(plan)
    for changes in [
        dict(method="admm"),
        dict(method="penalty"),
        dict(initial="forward"),
        dict(initial="predicted"),
        dict(loss_on="predicted"),
        dict(hidden_steps=2),
        dict(hidden_optimizer=optax.sgd(0.2)),
        dict(dual_optimizer=optax.sgd(0.5)),
    ]:
        others, *_ = expected(plan, **changes)
        assert differ(others[-1].grads, results[-1].grads), changes


@pytest.mark.slow
def test_seeds_under_vmap_are_seeds_alone():
    """On the second visit to a window; without jit: tests/test_generic.py."""
    plan = PLANS["persistent, joint"]
    case = case_of("tanh", 10)
    estimator = jtrunc.target_propagation(case.system, 2, **plan.options)
    window, start = row(windows_of(case, 2, 1), 0), estimator.init(case.params, case.hidden)
    seeds = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.1 * leaf, 0.9 * leaf]), case.params)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), start)
    update, several = jax.jit(estimator.update), jax.jit(jax.vmap(estimator.update, in_axes=(0, 0, None)))
    alone = [start] * 3
    for _ in range(3):
        estimates, states = several(seeds, states, window)
        for seed in range(3):
            estimate, alone[seed] = update(row(seeds, seed), alone[seed], window)
            assert_close(row(estimates.grads, seed), estimate.grads, rtol=1e-12)
    assert_close(states, stacked(alone), rtol=1e-12)
    assert differ(row(states.multipliers, 1), row(states.multipliers, 0))


def one_update(case: Any, block_length: int, **options: Any) -> Any:
    estimator = jtrunc.target_propagation(case.system, block_length, 0.7, **options)
    state = estimator.init(case.params, case.hidden)
    return jax.jit(estimator.update)(case.params, state, case.inputs)


@pytest.mark.slow
@pytest.mark.parametrize("block_length", [4, 2, 1])
def test_without_steps_on_h_it_is_bptt_cut_at_the_blocks(block_length):
    """B = T is BPTT; B < T is truncated BPTT of length B; B = 1 is cut at every step; at any λ."""
    case = case_of("tanh", 4)
    run = reference.linearise(*case)
    estimate, state = one_update(case, block_length, hidden_steps=0)
    assert_close(estimate.grads, reference.truncated_bptt(run, block_length), rtol=1e-12)
    assert differ(estimate.grads, reference.bptt(run)) == (block_length < 4)
    assert_close(state.hidden, run.states[-1], rtol=1e-12)
    np.testing.assert_allclose(estimate.loss, run.losses.sum(), rtol=1e-12)
    assert estimate.aux.diagnostics["primal_residual"] < 1e-14


@pytest.mark.slow
def test_a_ragged_window_is_cut_from_its_end():
    """Five steps in blocks of two are 1 + 2 + 2, so the cuts lie after steps 1 and 3."""
    case = case_of("tanh", 5)
    run = reference.linearise(*case)
    estimate, _ = one_update(case, 2, hidden_steps=0)
    assert_close(estimate.grads, reference.artbp(run, [1, 0, 1, 0], np.zeros(4)), rtol=1e-12)
    assert differ(estimate.grads, reference.truncated_bptt(run, 2))
