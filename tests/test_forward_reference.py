"""The oracle of the forward family is examined first: against reverse mode, and against its own means."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import tests.forward_reference as forward
from tests import reference, systems
from tests.compare import add, assert_close, differ
from tests.forward_reference import AffineMap, signs
from tests.reference import Linearised

STEPS = 4


def tiny(length: int = STEPS) -> Linearised:
    """Two tanh units, ten parameters."""
    return reference.linearise(*systems.tanh(length, 2))


def tiny_maps(run: Linearised) -> list[AffineMap]:
    """The one map of `tiny`: h W + x U + b, with θ's leaves in the order U, W, b."""
    inputs = np.asarray(systems.tanh(run.length, 2).inputs)
    states = np.stack(run.states[:-1])
    features = np.concatenate([states, inputs, np.ones((run.length, 1))], axis=1)
    return [AffineMap(np.array([[4, 5], [6, 7], [0, 1], [2, 3], [8, 9]]), features)]


def same(actual: np.ndarray, expected: np.ndarray, rtol: float = 1e-12) -> None:
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("name", sorted(systems.CASES))
def test_forward_and_reverse_mode_agree(name):
    """RTRL equals backpropagation over the whole run, and so do the sums over parts of any length."""
    run = reference.linearise(*systems.CASES[name](6))
    influences, exact = forward.rtrl(run), reference.bptt(run)
    assert_close(forward.gradient(run, influences), exact, rtol=1e-12)
    windows = [reference.piece(run, start, start + 2) for start in (0, 2, 4)]
    carried = [np.zeros_like(influences[0]), influences[1], influences[3]]
    parts = [forward.gradient(w, forward.rtrl(w, start)) for w, start in zip(windows, carried, strict=True)]
    assert_close(add(*parts), exact, rtol=1e-12)
    assert differ(add(*(reference.bptt(window) for window in windows)), exact)


def test_the_influence_is_the_total_derivative():
    """By central differences over the whole forward pass, for one parameter."""
    case, run = systems.tanh(STEPS, 2), tiny()
    theta = np.asarray(reference.to_vector(case.params.recurrent))
    step, ends = 1e-6, []
    for sign in (1, -1):
        moved = reference.from_vector(jnp.asarray(theta + sign * step * np.eye(10)[5]), case.params.recurrent)
        hidden = case.hidden
        for x in reference.steps_of(case.inputs):
            hidden = case.system.transition(moved, hidden, x)
        ends.append(np.asarray(hidden))
    np.testing.assert_allclose(forward.rtrl(run)[-1][:, 5], (ends[0] - ends[1]) / (2 * step), rtol=1e-6)


def covariance(size: int) -> np.ndarray:
    """Some symmetric positive definite matrix, far from the identity."""
    root = np.random.default_rng(8).normal(size=(size, size))
    return root @ root.T + 0.1 * np.eye(size)


RANDOM: dict[str, tuple[Any, Any]] = {
    "nobacktrack": (lambda r, e: forward.nobacktrack(r, e), lambda: signs(3, 1, 2)),
    "rank two": (lambda r, e: forward.nobacktrack(r, e), lambda: signs(3, 2, 2)),
    "kalman": (lambda r, e: forward.nobacktrack(r, e, covariance(10)), lambda: signs(3, 1, 2)),
    "split": (
        lambda r, e: forward.split_nobacktrack(r, e, np.array([0, 1, 1, 0, 1, 0, 0, 1, 0, 1])),
        lambda: signs(3, 2, 2),
    ),
    "uoro": (lambda r, e: forward.uoro(r, e), lambda: signs(3, 2)),
    "kf_rtrl": (lambda r, e: forward.kf_rtrl(r, tiny_maps(r), e), lambda: signs(3, 1, 2)),
    "one term": (
        lambda r, e: forward.optimal_kronecker_sum(r, tiny_maps(r), e, 1),
        lambda: signs(3, 1, 2),
    ),
    "two terms": (
        lambda r, e: forward.optimal_kronecker_sum(r, tiny_maps(r), e, 2),
        lambda: signs(3, 1, 3),
    ),
}


@pytest.mark.parametrize("name", RANDOM)
def test_the_mean_over_all_signs_is_the_influence(name):
    run = tiny(3)
    draw, patterns = RANDOM[name]
    draws = np.stack([draw(run, pattern) for pattern in patterns()])
    same(draws.mean(axis=0), forward.rtrl(run))
    assert np.abs(draws - forward.rtrl(run)).max() > 0.01


def test_the_mean_of_uoro_with_memory_is_the_influence():
    run = tiny(6)
    draws = np.stack([forward.uoro_memory(run, pattern, 2) for pattern in signs(3, 2)])
    same(draws.mean(axis=0), forward.rtrl(run))
    same(draws[5][:2], forward.rtrl(run)[:2])
    assert np.abs(draws - forward.rtrl(run)).max() > 0.01


def test_the_first_two_steps_of_a_chain():
    """Errata 17: G̃(1) = G(1) exactly; at step 2 all that is lost is lost in one rank-one reduction."""
    run = tiny(2)
    draws = np.stack([forward.nobacktrack(run, pattern) for pattern in signs(2, 1, 2)])
    assert np.isfinite(draws).all()
    same(draws[:, 0], np.broadcast_to(run.state_by_theta[0], draws[:, 0].shape))
    spread = np.sum((draws[:, 1] - forward.rtrl(run)[1]) ** 2, axis=(1, 2)).mean()
    D, immediate = run.state_by_state[1], run.state_by_theta[0]
    rescaled = np.sqrt(np.linalg.norm(immediate, axis=1))
    # The reduction is of Σ eᵢ wᵢᵀ; D then acts on the left, so eq. 49 holds of the pairs (ρᵢ D eᵢ, wᵢ/ρᵢ).
    vectors, forms = (D * rescaled).T, immediate / rescaled[:, None]
    variance = forward.second_moment(vectors, forms) - np.sum((D @ immediate) ** 2)
    np.testing.assert_allclose(spread, variance, rtol=1e-12)


def test_equations_49_and_58():
    """Both by enumeration of Proposition 1, for pairs that are neither orthogonal nor of equal norm."""
    generator = np.random.default_rng(9)
    vectors, forms = generator.normal(size=(4, 3)), 5 * generator.normal(size=(4, 6))
    exact = vectors.T @ forms
    plain = np.stack([np.outer(e @ vectors, e @ forms) for e in signs(4)])
    scaled = np.stack([np.outer(*forward.rank_one(vectors, forms, e)) for e in signs(4)])
    for draws in (plain, scaled):
        same(draws.mean(axis=0), exact)
    second = np.sum(plain**2, axis=(1, 2)).mean()
    np.testing.assert_allclose(second, forward.second_moment(vectors, forms), rtol=1e-12)
    variance = np.sum((scaled - exact) ** 2, axis=(1, 2)).mean()
    np.testing.assert_allclose(variance, forward.least_variance(vectors, forms), rtol=1e-12)
    assert variance < 0.99 * (second - np.sum(exact**2))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_least_variance_reduction(rank):
    """Unbiased, of the rank and the variance that it says, and no worse than the rank-one trick (eq. 58)."""
    generator = np.random.default_rng(10)
    matrix = (
        generator.normal(size=(5, rank + 1))
        @ np.diag(3.0 ** np.arange(rank + 1))
        @ generator.normal(size=(rank + 1, 7))
    )
    draws = np.stack([forward.least_variance_rank(matrix, e, rank) for e in signs(rank + 1)])
    same(draws.mean(axis=0), matrix)
    assert {int(np.linalg.matrix_rank(draw, 1e-8 * np.abs(draw).max())) for draw in draws} == {rank}
    variance = np.sum((draws - matrix) ** 2, axis=(1, 2)).mean()
    np.testing.assert_allclose(variance, forward.least_rank_variance(matrix, rank), rtol=1e-10)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values[: rank + 1]
    trick = forward.least_variance(left.T[: rank + 1] * values[:, None], right[: rank + 1])
    assert variance <= trick * (1 + 1e-10) if rank == 1 else variance < 0.9 * trick


def test_the_invariant_norms_are_invariant():
    """Appendix B: after θ = B φ, and C_φ = B⁻¹ C_θ B⁻ᵀ, each draw is that of before: G̃_φ = G̃_θ B."""
    run, metric = tiny(), covariance(10)
    B = np.random.default_rng(11).normal(size=(10, 10))
    inverse = np.linalg.inv(B)
    moved = run._replace(state_by_theta=run.state_by_theta @ B)
    pattern = signs(STEPS, 1, 2)[77]
    draw = forward.nobacktrack(run, pattern, metric) @ B
    same(forward.nobacktrack(moved, pattern, inverse @ metric @ inverse.T), draw, 1e-9)
    assert np.abs(forward.nobacktrack(moved, pattern) - forward.nobacktrack(run, pattern) @ B).max() > 1e-2


def test_a_dead_unit_contributes_nothing():
    run = tiny()
    dead = run._replace(state_by_theta=run.state_by_theta * np.array([1.0, 0.0])[:, None])
    for estimate in (forward.nobacktrack, lambda r, e: forward.uoro(r, e[:, 0])):
        draws = np.stack([estimate(dead, pattern) for pattern in signs(STEPS, 1, 2)])
        same(draws.mean(axis=0), forward.rtrl(dead))


def test_snap_becomes_rtrl():
    run = tiny()
    immediate = np.any(run.state_by_theta != 0, axis=0)
    ring = np.eye(2, dtype=bool) | np.array([[0, 1], [0, 0]], bool)
    run = run._replace(state_by_state=run.state_by_state * ring)
    exact = forward.rtrl(run)
    same(forward.snap(run, immediate, ring, 2), exact)
    assert np.abs(forward.snap(run, immediate, ring, 1) - exact).max() > 1e-2


def test_eprop_is_rtrl_of_units_that_do_not_read_each_other():
    run = tiny()
    own = run.state_by_state * np.eye(2)
    same(forward.eprop(run._replace(state_by_state=own), own), forward.rtrl(run._replace(state_by_state=own)))
    assert np.abs(forward.eprop(run, own) - forward.rtrl(run)).max() > 1e-2


def two_layers(length: int) -> tuple[systems.Case, forward.Rolling]:
    """Two layers of one tanh unit, the upper reading the new state of the lower; plain and rolling."""

    def lower(theta: Any, hidden: Any, x: Any) -> Any:
        return jnp.tanh(theta[0] * hidden[0] + theta[1] * x)

    def upper(theta: Any, hidden: Any, x: Any) -> Any:
        return jnp.tanh(theta[0] * hidden[1] + theta[1] * hidden[0] + theta[2])

    def transition(theta: Any, hidden: Any, x: Any) -> Any:
        first = lower(theta[0], hidden, x)
        return first, upper(theta[1], (first, hidden[1]), x)

    def loss(params: Any, hidden: Any, x: Any) -> Any:
        return 0.5 * (hidden[1] - params.readout * x) ** 2 + 0.1 * hidden[0], ()

    theta = (jnp.array([0.9, 0.5]), jnp.array([0.8, 1.1, 0.2]))
    inputs = jnp.asarray(np.random.default_rng(12).normal(size=length))
    case = systems.Case(
        systems.System(transition, loss),
        systems.Params(theta, jnp.float64(0.3)),
        (jnp.float64(0.1), jnp.float64(-0.2)),
        inputs,
    )
    return case, forward.rolling([lower, upper], loss)


def test_the_rolling_form_of_a_stack():
    """Eq. 43–46: the same states, losses and influences; its rank-one reductions are unbiased."""
    case, form = two_layers(3)
    run = reference.linearise(*case)
    system = systems.System(form.transition, form.loss)
    rolled = reference.linearise(system, case.params, case.hidden, form.inputs(case.inputs))
    np.testing.assert_allclose(form.whole_steps(rolled.losses), run.losses, rtol=1e-14)
    exact = forward.rtrl(run)
    same(form.whole_steps(forward.rtrl(rolled)), exact)
    assert_close(forward.gradient(rolled, forward.rtrl(rolled)), reference.bptt(run), rtol=1e-12)
    draws = np.stack([forward.nobacktrack(rolled, pattern) for pattern in signs(6, 1, 2)])
    same(form.whole_steps(draws.mean(axis=0)), exact)
    assert np.abs(draws - forward.rtrl(rolled)).max() > 1e-2
