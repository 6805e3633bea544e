"""Influence balancing against the paper's matrix, exact fractions and the numbers of errata 5."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtrunc.tasks import influence_balancing as task

SIZES = [(10, 13), (1, 3), (3, 1), (0, 2), (1, 0), (4, 4)]


def paper(num_positive: int, num_negative: int) -> tuple[np.ndarray, np.ndarray]:
    """A and v of equation 15, entry by entry."""
    size = num_positive + num_negative
    matrix, signal = np.zeros((size, size)), np.zeros(size)
    for k in range(size):
        matrix[k, k] = 0.5
        if k + 1 < size:
            matrix[k, k + 1] = 0.5
        signal[k] = 1.0 if k < num_positive else -1.0
    return matrix, signal


def exact_truncated_influence(length: int, num_positive: int, num_negative: int) -> Fraction:
    """Ḡ(L) in fractions: J ← A J + v within the window, s¹'s entry averaged over its steps."""
    signal = [Fraction(1)] * num_positive + [Fraction(-1)] * num_negative
    influence = [Fraction(0)] * len(signal)
    total = Fraction(0)
    for _ in range(length):
        shifted = [*influence[1:], Fraction(0)]
        influence = [(a + b) / 2 + v for a, b, v in zip(influence, shifted, signal, strict=True)]
        total += influence[0]
    return total / length


@pytest.mark.parametrize(("num_positive", "num_negative"), SIZES)
def test_system_is_the_papers(num_positive: int, num_negative: int) -> None:
    matrix, signal = paper(num_positive, num_negative)
    system, params, hidden = task.build(num_positive, num_negative, dtype=jnp.float64)
    expected = np.zeros(num_positive + num_negative)
    for inputs in task.inputs(7):
        hidden = system.transition(params.recurrent, hidden, inputs)
        expected = matrix @ expected - 0.5 * signal
        np.testing.assert_allclose(hidden, expected, rtol=1e-14, atol=1e-14)
        loss, aux = system.loss(params, hidden, inputs)
        np.testing.assert_allclose(loss, 0.5 * (expected[0] - 1.0) ** 2, rtol=1e-14)
        assert aux == ()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_dtypes_are_kept(dtype: jnp.dtype) -> None:
    system, params, hidden = task.build(dtype=dtype)
    inputs = task.inputs(1)[0]
    after = jax.jit(system.transition)(params.recurrent, hidden, inputs)
    assert params.recurrent.dtype == hidden.dtype == after.dtype == dtype
    assert system.loss(params, after, inputs)[0].dtype == dtype
    assert params.recurrent.shape == () and after.shape == hidden.shape == (23,)


def test_defaults() -> None:
    _, params, hidden = task.build()
    assert float(params.recurrent) == -0.5
    assert not np.asarray(hidden).any()
    assert task.inputs(5).shape == (5,)


@pytest.mark.parametrize(("num_positive", "num_negative"), SIZES)
def test_the_stationary_state_stays(num_positive: int, num_negative: int) -> None:
    system, params, _ = task.build(num_positive, num_negative, theta=0.3, dtype=jnp.float64)
    state = task.stationary_state(0.3, num_positive, num_negative)
    after = system.transition(params.recurrent, jnp.asarray(state), 0.0)
    np.testing.assert_allclose(after, state, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(state[0], 2 * (num_positive - num_negative) * 0.3, rtol=1e-14, atol=1e-15)


def settled_loss(theta: jax.Array) -> jax.Array:
    """The loss after 400 steps at fixed θ, when the transient is below rounding."""
    system, params, hidden = task.build(dtype=jnp.float64)
    hidden, _ = jax.lax.scan(lambda h, x: (system.transition(theta, h, x), ()), hidden, task.inputs(400))
    return system.loss(params, hidden, 0.0)[0]


@pytest.mark.parametrize("theta", [-0.5, 0.0, 0.25])
def test_stationary_gradient_is_that_of_the_settled_loss(theta: float) -> None:
    gradient = jax.grad(settled_loss)(jnp.float64(theta))
    np.testing.assert_allclose(task.stationary_gradient(theta), gradient, rtol=1e-10)
    np.testing.assert_allclose(task.stationary_gradient(theta), 6 * (6 * theta + 1), rtol=1e-14)


def test_optimum() -> None:
    assert task.optimum() == -1 / 6
    assert task.optimum(3, 1) == 1 / 4
    np.testing.assert_allclose(settled_loss(jnp.float64(task.optimum())), 0.0, atol=1e-20)
    np.testing.assert_allclose(task.stationary_gradient(task.optimum()), 0.0, atol=1e-14)


@pytest.mark.parametrize(("num_positive", "num_negative"), SIZES)
@pytest.mark.parametrize("length", [1, 2, 10, 57])
def test_truncated_influence_is_exact(length: int, num_positive: int, num_negative: int) -> None:
    expected = exact_truncated_influence(length, num_positive, num_negative)
    actual = task.truncated_influence(length, num_positive, num_negative)
    np.testing.assert_allclose(actual, float(expected), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("length", "digits", "expected"),
    [(10, 12, 5.5), (100, 2, 0.58), (109, 3, 0.037), (110, 3, -0.018), (200, 2, -2.71)],
)
def test_numbers_of_errata_5(length: int, digits: int, expected: float) -> None:
    assert round(task.truncated_influence(length), digits) == expected
    assert np.sign(task.stationary_gradient(-0.5, length=length)) == np.sign(expected)


def test_truncated_influence_tends_to_the_total() -> None:
    np.testing.assert_allclose(task.influence_by_lag(400).sum(), task.total_influence(), rtol=1e-13)
    assert abs(task.truncated_influence(100_000) - task.total_influence()) < 0.02
    assert task.total_influence() == -6.0


def test_truncated_gradient_is_that_of_windows_cut_by_stop_gradient() -> None:
    """One window of ten steps from the settled state: the sum of its losses, differentiated in θ alone."""
    system, params, _ = task.build(dtype=jnp.float64)
    start = jnp.asarray(task.stationary_state(-0.5))

    def window_loss(theta: jax.Array) -> jax.Array:
        hidden, total = start, jnp.float64(0.0)
        for _ in range(10):
            hidden = system.transition(theta, hidden, 0.0)
            total += system.loss(params, hidden, 0.0)[0]
        return total / 10

    gradient = jax.grad(window_loss)(params.recurrent)
    np.testing.assert_allclose(task.stationary_gradient(-0.5, length=10), gradient, rtol=1e-12)
    assert gradient * task.stationary_gradient(-0.5) < 0
