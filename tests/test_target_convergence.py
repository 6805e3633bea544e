"""Where target propagation settles: on a convex quadratic problem, at BPTT's own stationary point.

hₜ = A hₜ₋₁ + Gₜ θ with a fixed A, ℓₜ = ½‖hₜ − targetₜ‖² + ρ/2 ‖θ‖²: everything is linear, so that θ*, the
states and the costates there are solutions of linear equations, which NumPy finds without any of jtrunc.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtrunc
from jtrunc import targets
from tests.compare import assert_close, differ, relative_distance
from tests.systems import Case
from tests.target_cases import walk

STEPS, BLOCK, RIDGE = 6, 2, 0.1
ENDS = np.arange(BLOCK - 1, STEPS, BLOCK)  # the rows at which the blocks end
A = 0.9 * np.array([[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]])


def problem() -> Case:
    generator = np.random.default_rng(4)
    gains, target = generator.normal(size=(STEPS, 2, 2)), generator.normal(size=(STEPS, 2))

    def loss(params: Any, hidden: jax.Array, inputs: Any) -> Any:
        cost = jnp.sum((hidden - inputs["target"]) ** 2) + RIDGE * jnp.sum(params.recurrent**2)
        return 0.5 * cost, ()

    system = jtrunc.System(lambda theta, h, x: A @ h + x["gain"] @ theta, loss)
    params = jtrunc.Params(jnp.array([1.0, -1.0]))
    inputs = {"gain": jnp.asarray(gains), "target": jnp.asarray(target)}
    return Case(system, params, jnp.array([0.5, -0.2]), inputs)


CASE = problem()


class Solution(NamedTuple):
    """BPTT's view of one θ: states and costates pₜ = dΣℓ/dhₜ (T, 2), and the gradient (2,)."""

    theta: np.ndarray
    states: np.ndarray
    costates: np.ndarray
    gradient: np.ndarray


def at(theta: np.ndarray) -> Solution:
    gains, target = np.asarray(CASE.inputs["gain"]), np.asarray(CASE.inputs["target"])
    states, hidden = [], np.asarray(CASE.hidden)
    for gain in gains:
        hidden = A @ hidden + gain @ theta
        states.append(hidden)
    costates, costate = [], np.zeros(2)
    for hidden, wanted in zip(reversed(states), reversed(target), strict=True):
        costate = hidden - wanted + A.T @ costate
        costates.insert(0, costate)
    gradient = np.einsum("tij,ti->j", gains, costates) + STEPS * RIDGE * theta
    return Solution(theta, np.stack(states), np.stack(costates), gradient)


def stationary() -> Solution:
    """The gradient is affine in θ: g(θ) = K θ + g(0)."""
    constant = at(np.zeros(2)).gradient
    curvature = np.stack([at(unit).gradient - constant for unit in np.eye(2)], axis=1)
    return at(np.linalg.solve(curvature, -constant))


def costates_of_blocks(solution: Solution, loss_on: str) -> np.ndarray:
    """(N, 2): what the losses after the end of a block owe to the state there, and its own if it reads h.

    y_b is minus this: ∂L/∂h_b = y_b + (what the later blocks owe to h_b) = 0.
    """
    later = np.concatenate([solution.costates[1:] @ A, np.zeros((1, 2))])
    return (solution.costates if loss_on == "free" else later)[ENDS]


def learner(method: Any, loss_on: Any, penalty: float = 1.0, rate: float = 0.2, **options: Any) -> Any:
    return jtrunc.target_propagation(
        CASE.system, BLOCK, penalty, method, hidden_optimizer=optax.sgd(rate), loss_on=loss_on,
        initial="persistent", num_blocks=len(ENDS), **options,
    )  # fmt: skip


def settled(estimator: Any, updates: int, rate: float) -> Any:
    windows = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (updates, *leaf.shape)), CASE.inputs)
    return walk(estimator, CASE, windows, rate)


def test_the_solution_is_bptt_s():
    """The equations that the tests below rely on, against jtrunc.bptt and against a step away from θ*."""
    solution = stationary()
    np.testing.assert_allclose(solution.gradient, 0.0, atol=1e-13)
    for theta in (solution.theta, np.array([1.0, -1.0])):
        estimator = jtrunc.bptt(CASE.system)
        state = estimator.init(CASE.params, CASE.hidden)
        estimate, state = estimator.update(jtrunc.Params(jnp.asarray(theta)), state, CASE.inputs)
        np.testing.assert_allclose(estimate.grads.recurrent, at(theta).gradient, atol=1e-12)
        np.testing.assert_allclose(state.hidden, at(theta).states[-1], rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "loss_on"), [("admm", "predicted"), ("augmented_lagrangian", "free")])
def test_multipliers_lead_to_the_kkt_point(method, loss_on):
    """θ = θ*, H = the true states there, y = minus the costates; both residuals ≤ 1e-8."""
    solution = stationary()
    walked = settled(learner(method, loss_on), updates=4000, rate=0.02)
    last = {name: float(values[-1]) for name, values in walked.diagnostics.items()}
    assert last["primal_residual"] <= 1e-8 and last["dual_residual"] <= 1e-8, last
    assert walked.diagnostics["primal_residual"][10] > 1e-3
    np.testing.assert_allclose(walked.params.recurrent, solution.theta, atol=1e-8)
    np.testing.assert_allclose(walked.state.free, solution.states[ENDS], atol=1e-8)
    np.testing.assert_allclose(walked.state.multipliers, -costates_of_blocks(solution, loss_on), atol=1e-8)
    assert np.abs(costates_of_blocks(solution, loss_on)).max() > 0.1
    assert differ(walked.params.recurrent, CASE.params.recurrent)


def minimum_of_penalty(penalty: float) -> np.ndarray:
    """θ(λ), where the penalty method settles: the objective is quadratic, so one Newton step finds it."""
    gradient, curvature = penalty_derivatives(jnp.zeros(2 + 2 * len(ENDS)), penalty)
    return np.linalg.solve(curvature, -gradient)[:2]


@jax.jit
def penalty_derivatives(vector: jax.Array, penalty: float) -> tuple[jax.Array, jax.Array]:
    def value(vector: jax.Array) -> jax.Array:
        params, free = jtrunc.Params(vector[:2]), vector[2:].reshape(-1, 2)
        return targets.objective(
            CASE.system, params, CASE.hidden, free, CASE.inputs, block_length=BLOCK, penalty=penalty
        )[0]

    return jax.grad(value)(vector), jax.hessian(value)(vector)


@pytest.mark.slow
def test_the_penalty_method_approaches_it_as_one_over_lambda():
    solution = stationary()
    errors = [np.abs(minimum_of_penalty(penalty) - solution.theta).max() for penalty in (1.0, 1e3, 1e4)]
    assert errors[0] > 0.01
    np.testing.assert_allclose(errors[1] / errors[2], 10.0, rtol=0.02)
    assert errors[2] < 1e-3
    walked = settled(learner("penalty", "predicted"), updates=4000, rate=0.02)
    np.testing.assert_allclose(walked.params.recurrent, minimum_of_penalty(1.0), atol=1e-8)
    assert walked.diagnostics["dual_residual"][-1] <= 1e-8 < 1e-3 < walked.diagnostics["primal_residual"][-1]


@pytest.mark.slow
def test_at_fixed_parameters_the_gradient_becomes_that_of_bptt():
    """Rounds of steps on H and y alone; the first rounds are far from it."""
    walked = settled(learner("admm", "predicted"), updates=1000, rate=0.0)
    solution = at(np.asarray(CASE.params.recurrent))
    assert_close(walked.grads.recurrent[-1], jnp.asarray(solution.gradient), rtol=1e-9)
    np.testing.assert_allclose(walked.state.free, solution.states[ENDS], atol=1e-9)
    assert relative_distance(walked.grads.recurrent[0], solution.gradient) > 0.05


@pytest.mark.slow
def test_dual_ascent_of_the_printed_objective_runs_away():
    """λ (r + u) is the derivative of eq. 7 as printed, whose −λ/2 ‖u‖² is no constant (errata 25)."""

    def printed(updates: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda g, y: -0.1 * g + 0.1 * y, updates, params), state

    wrong = optax.GradientTransformation(lambda params: optax.EmptyState(), printed)
    norms = []
    for dual_optimizer in (optax.sgd(0.1), wrong):
        walked = settled(learner("admm", "predicted", dual_optimizer=dual_optimizer), 500, rate=0.0)
        norms.append(float(jnp.linalg.norm(walked.state.multipliers)))
    wanted = np.linalg.norm(costates_of_blocks(at(np.asarray(CASE.params.recurrent)), "predicted"))
    np.testing.assert_allclose(norms[0], wanted, rtol=1e-2)
    assert not norms[1] < 1e3 * wanted  # or it is infinite
