"""The objective of target propagation against plain loops, finite differences and closed forms."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtrunc
from jtrunc import targets
from jtrunc.backward.thresholds import two_phase_pays
from tests import reference, systems, target_reference
from tests.compare import assert_close, differ
from tests.reference import from_vector, to_vector
from tests.target_cases import CASES, Point, floats_only, forward_point, moved, point, row, slopes, stacked

PENALTY = 0.7


def readout_of(params: Any, hidden: jax.Array) -> jax.Array:
    return hidden @ params.readout


def own(params: Any, predicted: jax.Array, free: jax.Array) -> jax.Array:
    """A user's constraint function: neither symmetric in its states nor without parameters."""
    apart = free - predicted
    return jnp.sum(jnp.cosh(apart) - 1 + 0.1 * params.recurrent["b"] * predicted * apart)


CONSTRAINTS = {
    "quadratic": (targets.quadratic, target_reference.quadratic),
    "divergence": (targets.kullback_leibler(readout_of), target_reference.kullback_leibler(readout_of)),
    "own": (own, own),
}
GRID = [
    ("tanh", 5, 2, "predicted", "quadratic"),
    ("tanh", 3, 1, "free", "divergence"),
    ("tanh", 4, 3, "free", "quadratic"),
    ("tanh", 3, 3, "predicted", "own"),
    ("nested", 3, 2, "free", "quadratic"),
    ("stack", 3, 2, "predicted", "quadratic"),
    ("plain stack", 4, 2, "free", "quadratic"),
]
every_problem = pytest.mark.parametrize(("kind", "length", "block_length", "loss_on", "constraint"), GRID)


def plain_slopes(at: Point, penalty: float, loss_on: str, constraint: Any) -> target_reference.Gradients:
    system, params, hidden, inputs = at.case
    return target_reference.gradients(
        system, params, hidden, at.states, inputs, block_length=at.block_length, penalty=penalty,
        multipliers=at.multipliers, constraint=constraint, loss_on=loss_on,
    )  # fmt: skip


@pytest.mark.slow
@every_problem
def test_value_and_gradients_equal_the_loops(kind, length, block_length, loss_on, constraint):
    at = point(kind, length, block_length)
    mine, plain = CONSTRAINTS[constraint]
    actual = slopes(at, PENALTY, loss_on, mine)
    expected = plain_slopes(at, PENALTY, loss_on, plain)
    residual = np.asarray(expected.at.residual)
    parts = [expected.at.value, expected.at.loss, expected.at.constraint]
    terms = actual.terms
    np.testing.assert_allclose([actual.value, terms.loss, terms.constraint], parts, rtol=1e-12)
    assert_close(actual.params, expected.params, rtol=1e-12)
    assert_close(actual.free, expected.free, rtol=1e-12)
    assert_close(actual.multipliers, residual, rtol=1e-12)
    for changed in (moved(at, 0.01 * at.multipliers), at._replace(multipliers=1.01 * at.multipliers)):
        assert differ(slopes(changed, PENALTY, loss_on, mine).params, expected.params, by=1e-5)


def test_the_loss_is_on_the_state_that_was_asked_for():
    """Eq. 6 against eq. 8 (errata 23)."""
    at = point("tanh", 5, 2)
    wrong = plain_slopes(at, PENALTY, "free", target_reference.quadratic)
    assert differ(slopes(at, PENALTY).free, wrong.free)


@pytest.mark.parametrize(("kind", "blocks", "expected"), [
    ("stack", 2, True), ("stack", 300, False), ("plain stack", 2, False),
])  # fmt: skip
def test_a_structure_is_kept_over_blocks(kind, blocks, expected):
    """Few blocks of a stack go back in two phases, many as plain steps; the grid above has either."""
    case = CASES[kind](4)
    system = targets.over_blocks(case.system)
    hidden = stacked([case.hidden] * blocks)
    inputs = jax.tree.map(lambda leaf: jnp.stack([leaf[:2]] * blocks, axis=1), case.inputs)
    assert two_phase_pays(system.structure, case.params.recurrent, hidden, inputs) is expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tanh", "nested"])
def test_gradients_equal_central_differences(kind):
    """Along a random direction of one argument at a time; the error of central differences is O(ε²)."""
    step = 1e-5
    at, loss_on = (point("tanh", 5, 2), "predicted") if kind == "tanh" else (point("nested", 3, 2), "free")
    slope = slopes(at, PENALTY, loss_on)
    num_recurrent = to_vector(at.case.params.recurrent).size
    generator = np.random.default_rng(0)

    def along(name: str, direction: np.ndarray) -> Point:
        if name == "free":
            return moved(at, direction)
        if name == "multipliers":
            return at._replace(multipliers=at.multipliers + direction)
        vector = np.asarray(to_vector(at.case.params)) + direction
        return at._replace(case=at.case._replace(params=from_vector(jnp.asarray(vector), at.case.params)))

    for name in ("recurrent", "readout", "free", "multipliers"):
        gradient = slope.params if name in ("recurrent", "readout") else getattr(slope, name)
        direction = generator.normal(size=gradient.shape)
        if name in ("recurrent", "readout"):
            direction *= (np.arange(len(direction)) < num_recurrent) == (name == "recurrent")
        up, down = (slopes(along(name, sign * step * direction), PENALTY, loss_on).value for sign in (1, -1))
        np.testing.assert_allclose((up - down) / (2 * step), np.sum(gradient * direction), rtol=1e-7)
        assert abs(np.sum(gradient * direction)) > 1e-2


@pytest.mark.slow
def test_terms_of_a_nested_state():
    """ĥ, r and the loss's aux in the order of time, integers and keys too, with a ragged first block."""
    at = point("nested", 3, 2)
    terms = slopes(at, PENALTY, "free").terms
    plain = plain_slopes(at, PENALTY, "free", target_reference.quadratic).at
    assert_close(terms.predicted, stacked(plain.predicted), rtol=1e-12)
    assert_close(terms.aux, stacked(plain.aux), rtol=1e-12)
    assert terms.aux["clock"].tolist() == [1, 2, 3]
    assert terms.predicted.clock.tolist() == [1, 3]
    keys = [jax.random.key_data(state.key).tolist() for state in plain.predicted]
    assert jax.random.key_data(terms.predicted.key).tolist() == keys
    assert jax.tree.structure(terms.residual) == jax.tree.structure(floats_only(stacked(at.states)))
    for b, residual in enumerate(plain.residual):
        np.testing.assert_allclose(to_vector(row(terms.residual, b)), residual, rtol=1e-11)


@pytest.mark.slow
@every_problem
def test_at_the_forward_states_the_objective_is_the_loss(kind, length, block_length, loss_on, constraint):
    """Whatever B, λ and y, and whichever state the loss reads: nothing is scaled by B (pitfalls)."""
    at = forward_point(kind, length, block_length)
    if constraint == "own":  # it has a term linear in r, which is 0 too
        assert at.case.params.recurrent["b"].any()
    actual = slopes(at, 3.0, loss_on, CONSTRAINTS[constraint][0])
    losses = sum(plain_slopes(at, 3.0, loss_on, CONSTRAINTS[constraint][1]).at.losses)
    np.testing.assert_allclose([actual.value, actual.terms.loss], losses, rtol=1e-13)
    np.testing.assert_allclose(actual.multipliers, 0.0, atol=1e-14)
    # Two blocks or more: off the forward states it is not.
    off = slopes(point(kind, length, block_length), 3.0, loss_on, CONSTRAINTS[constraint][0])
    assert differ(off.value, losses)


def test_forward_states_are_those_of_the_recurrence():
    case = systems.tanh(5)
    run = reference.linearise(*case)
    for block_length, ends in [(1, [1, 2, 3, 4, 5]), (2, [1, 3, 5]), (8, [5])]:
        actual = targets.forward_states(*case, block_length)
        assert_close(actual, jnp.stack([run.states[t] for t in ends]), rtol=1e-13)


def test_the_penalty_counts_once_a_block_and_is_divided_by_nothing():
    """λ ½ ‖δ‖² N at ĥ + δ, N = 6 and 2 blocks over the same steps; the system forgets where it begins."""
    system = jtrunc.System(lambda theta, h, x: theta * x, lambda params, h, x: (jnp.sum(h), ()))
    params, inputs = jtrunc.Params(jnp.float64(0.5)), jnp.arange(18.0).reshape(6, 3)
    move = np.array([[0.1, -0.2, 0.2]])
    for block_length, count in ((1, 6), (3, 2)):
        ends = inputs[block_length - 1 :: block_length] * 0.5
        value, terms = targets.objective(
            system, params, jnp.zeros(3), ends + move, inputs, block_length=block_length, penalty=2.0
        )
        np.testing.assert_allclose(value - terms.loss, 2.0 * 0.5 * 0.09 * count, rtol=1e-12)
        np.testing.assert_allclose(terms.loss, 0.5 * inputs.sum(), rtol=1e-12)


def test_divergence_by_hand_and_blind_directions():
    """KL(softmax(ĥ) ‖ softmax(h)), that way around; zero where the readout sees no difference."""
    constraint = targets.kullback_leibler(lambda params, hidden: hidden)
    p, q = np.array([[0.75, 0.25], [0.1, 0.9]]), np.array([[0.5, 0.5], [0.3, 0.7]])
    value = constraint(jtrunc.Params(()), jnp.log(p), jnp.log(q) + 5.0)
    np.testing.assert_allclose(value, np.sum(p * np.log(p / q)), rtol=1e-12)
    assert differ(value, np.sum(q * np.log(q / p)), by=1e-2)
    zero = constraint(jtrunc.Params(()), jnp.log(p), jnp.log(p) + 1.0)
    np.testing.assert_allclose(zero, 0.0, atol=1e-15)


def test_over_blocks_advances_every_block():
    """One step of all blocks equals a step of each; the loss is the sum."""
    case, _, states, _ = point("tanh", 5, 1)
    blocks = targets.over_blocks(case.system)
    new = blocks.transition(case.params.recurrent, stacked(states), case.inputs)
    value, aux = blocks.loss(case.params, new, case.inputs)
    losses = []
    for b, (state, x) in enumerate(zip(states, case.inputs, strict=True)):
        after = case.system.transition(case.params.recurrent, state, x)
        loss, extra = case.system.loss(case.params, after, x)
        assert_close((new[b], aux[b]), (after, extra), rtol=1e-13)
        losses.append(loss)
    np.testing.assert_allclose(value, sum(losses), rtol=1e-13)


# Identity (9) of the appendix, as errata 23 and 24 state it: B = 1 and the loss on the free state.


def pulled(run: reference.Linearised, signals: np.ndarray) -> np.ndarray:
    """Σₜ signalₜ ∂g/∂θ (xₜ, hₜ₋₁), hₜ₋₁ the forward states."""
    return np.einsum("ti,tip->p", signals, run.state_by_theta)


def test_identity_9_with_the_old_states_inside_g():
    """hₜ − η qₜ as target, the old hₜ₋₁ inside g: exactly ηλ times the one-step truncated gradients."""
    case, rate = systems.tanh(4), 0.05
    run = reference.linearise(*case)
    num_recurrent = to_vector(case.params.recurrent).size
    total = 0.0
    for t in range(4):  # windows of one step, so that what enters g is the old state
        one = Point(
            case._replace(hidden=run.states[t], inputs=case.window(t, t + 1)), 1, [run.states[t + 1]],
            np.zeros((1, 3)),
        )  # fmt: skip
        target = moved(one, -rate * slopes(one, PENALTY, "free").free)
        total = total + slopes(target, PENALTY, "free").params[:num_recurrent]
    assert_close(total, rate * PENALTY * pulled(run, run.loss_by_state), rtol=1e-12)
    full = reference.bptt(run)._replace(readout=())
    assert differ(total, rate * PENALTY * np.asarray(to_vector(full)))


def test_identity_9_fails_where_all_states_move_at_once():
    """Then it is ηλ Σ (qₜ − Jₜ qₜ₋₁) ∂gₜ + O(η²): with a tenth of the rate, a hundredth of the error."""
    case = systems.tanh(4)
    run = reference.linearise(*case)
    q = run.loss_by_state
    carried = np.concatenate([np.zeros((1, 3)), np.einsum("tij,tj->ti", run.state_by_state[1:], q[:-1])])
    formula, truncated = pulled(run, q - carried), pulled(run, q)
    errors, from_truncated = [], []
    for rate in (1e-3, 1e-4):
        estimator = jtrunc.target_propagation(
            case.system, 1, PENALTY, "penalty", 1, hidden_optimizer=optax.sgd(rate), loss_on="free"
        )
        state = estimator.init(case.params, case.hidden)
        grads = jax.jit(estimator.update)(case.params, state, case.inputs)[0].grads
        actual = np.asarray(to_vector(grads.recurrent)) / PENALTY
        errors.append(np.abs(actual - rate * formula).max())
        from_truncated.append(np.abs(actual / rate - truncated).max())
    np.testing.assert_allclose(errors[0] / errors[1], 100.0, rtol=0.05)
    assert min(from_truncated) > 0.1 * np.abs(truncated).max()
