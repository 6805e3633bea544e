"""Influences that leave something out: exactly what their definition says, and exact where they should be."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtrunc
import tests.forward_reference as forward
from tests import reference, systems
from tests.forward_cases import apart, same, vector, walk, window_sums
from tests.systems import Case
from tests.test_forward_exact import assert_exact_across_updates, case_and_run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear_recurrent", "elementwise"])
def test_diagonal_rtrl_is_bptt_across_updates(name):
    """One influence per unit and parameter: exact where no unit reads another; complex states."""
    assert_exact_across_updates(jtrunc.diagonal_rtrl(case_and_run(name)[0].system), name)


# Patterns.


def patterns(run: reference.Linearised) -> tuple[np.ndarray, np.ndarray]:
    """Where ∂F/∂θ and ∂F/∂h are not zero at some step of a run on generic numbers."""
    return np.any(run.state_by_theta != 0, axis=0), np.any(run.state_by_state != 0, axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tanh", "plain tanh", "lstm", "stack"])
@pytest.mark.parametrize("order", [1, 2])
def test_snap_is_the_masked_recursion(name, order):
    case, run = case_and_run(name)
    masked = forward.snap(run, *patterns(run), order)
    rows, _ = walk(jtrunc.snap(case.system, order), case, 3)
    same(rows, window_sums(forward.gradients(run, masked), 3))


def ring(length: int, width: int = 4) -> Case:
    """Each unit reads one neighbour: in a ring of n units, n steps bring every parameter to every unit."""

    def transition(theta: dict[str, jax.Array], hidden: jax.Array, inputs: jax.Array) -> jax.Array:
        return jnp.tanh(theta["w"] * jnp.roll(hidden, 1) + theta["b"] + inputs)

    def loss(params: Any, hidden: jax.Array, inputs: jax.Array) -> tuple[jax.Array, tuple[()]]:
        return 0.5 * jnp.sum((hidden - inputs) ** 2), ()

    generator = np.random.default_rng(4)
    theta = {name: jnp.asarray(generator.normal(size=width)) for name in ("w", "b")}
    inputs = jnp.asarray(generator.normal(size=(length, width)))
    return Case(systems.System(transition, loss), systems.Params(theta), jnp.zeros(width), inputs)


def test_snap_becomes_rtrl_as_the_order_grows():
    case = ring(12)
    exact = vector(reference.bptt(reference.linearise(*case)))
    totals = [walk(jtrunc.snap(case.system, order), case, 1)[0].sum(axis=0) for order in (1, 2, 3, 4, 9)]
    errors = [float(np.abs(total - exact).max() / np.abs(exact).max()) for total in totals]
    assert errors[0] > errors[1] > errors[2] > 1e-3
    assert errors[3] < 1e-12 and errors[4] < 1e-12


@pytest.mark.parametrize("structured", [True, False])
def test_the_mask_survives_one_hot_inputs_and_dead_units(structured):
    """∂F/∂θ is zero at the first steps where a symbol is absent or a unit silent: the mask must not care.

    A mask that looked at the first step would lose all of what symbol 1 and unit 0 learn later.
    """
    width = 3
    case = systems.relu(8, width)
    system = case.system if structured else case.system._replace(structure=None)
    run = reference.linearise(*case)
    assert not run.state_by_theta[0].any(), "the unit is dead at first"
    immediate = np.any(run.state_by_theta != 0, axis=0)
    expected = forward.snap(run, immediate, np.ones((width, width), bool), 1)
    rows, _ = walk(jtrunc.snap(system, 1), case, 1)
    same(rows, forward.gradients(run, expected))
    empty = forward.snap(run, np.zeros_like(immediate), np.ones((width, width), bool), 1)
    assert apart(forward.gradients(run, empty), forward.gradients(run, expected))
    rows, _ = walk(jtrunc.snap(system, 2), case, 1)
    same(rows, forward.gradients(run, forward.rtrl(run)))


# Local learning rules.


def own_derivatives(name: str, case: Case, run: reference.Linearised) -> np.ndarray:
    """(T, S, S): ∂hₜ/∂hₜ₋₁ within a unit at fixed preactivations, from the cells' equations."""
    width, theta = 3, case.params.recurrent
    if name == "leaky":
        return np.broadcast_to(0.7 * np.eye(width), (run.length, width, width))
    rows = []
    for t, state in enumerate(run.states[:-1]):
        x = case.inputs[0][t]
        if name == "gru":
            gates = theta["gates"]
            p = state @ gates["hidden_kernel"] + x @ gates["input_kernel"] + gates["bias"]
            rows.append(np.diag(1 / (1 + np.exp(-np.asarray(p[width:])))))
            continue
        p = state[1] @ theta["hidden_kernel"] + x @ theta["input_kernel"] + theta["bias"]
        _, forget, _, read = np.split(1 / (1 + np.exp(-np.asarray(p))), 4)
        through = read * (1 - np.tanh(np.asarray(run.states[t + 1][0])) ** 2) * forget
        own = np.zeros((2 * width, 2 * width))
        own[:width, :width], own[width:, :width] = np.diag(forget), np.diag(through)
        rows.append(own)
    return np.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["leaky", "gru", "lstm"])
def test_eprop_keeps_what_a_unit_remembers_by_itself(name):
    case, run = case_and_run(name)
    local = forward.eprop(run, own_derivatives(name, case, run))
    rows, _ = walk(jtrunc.eprop(case.system), case, 3)
    same(rows, window_sums(forward.gradients(run, local), 3))
    assert apart(rows.sum(axis=0), vector(reference.bptt(run)))


def test_rflo_learns_from_the_users_signal():
    """The influence of e-prop in a leaky network, read by a random feedback instead of ∂ℓ/∂h."""
    case, run = case_and_run("leaky")
    feedback = jnp.asarray(np.random.default_rng(6).normal(size=(2, 3)))

    def signal(params: Any, hidden: jax.Array, inputs: Any) -> jax.Array:
        prediction = hidden @ params.readout["kernel"] + params.readout["bias"]
        return (prediction - inputs[1]) @ feedback

    signals = np.stack(
        [
            signal(case.params, state, reference.steps_of(case.inputs)[t])
            for t, state in enumerate(run.states[1:])
        ]
    )
    local = forward.eprop(run, own_derivatives("leaky", case, run))
    rows, _ = walk(jtrunc.rflo(case.system, learning_signal=signal), case, 3)
    same(rows, window_sums(forward.gradients(run, local, signals), 3))
    exact, _ = walk(jtrunc.rflo(case.system), case, 3)
    same(exact, window_sums(forward.gradients(run, local), 3))
    assert apart(rows, exact)
