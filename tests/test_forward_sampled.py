"""The rank-one family is unbiased, by sampling, with estimators that must fail.

The method is that of `test_unbiased`: the mean of N = 2·10⁵ gradients against the exact one, false-alarm
rate 1e-6 for a whole test; every wrong estimator is shown to be detected with probability 1 − 1e-6 before it
is sampled. The mutants pass a wrong `noise`, or change the state between updates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import jtrunc
import tests.forward_reference as forward
from tests import reference, systems
from tests.forward_cases import Given, same, vector
from tests.forward_reference import signs
from tests.systems import Case
from tests.test_unbiased import DRAWS, POWER_MARGIN, largest_z, power, threshold

SAMPLED_STEPS = 4


class Sampled(NamedTuple):
    """An estimator on a case of SAMPLED_STEPS steps, and how its draws go wrong.

    Attributes:
      make: ``(system, noise=...) -> estimator``.
      shape: of the signs of one step.
      skew: ``state -> state``, the carried cotangent scaled by 1/1.05: v by ρ, but w by 1/(1.05 ρ).
      reduced: whether the immediate influence is reduced before it is used.
    """

    make: Callable[..., Any]
    shape: tuple[int, ...]
    skew: Callable[[Any], Any]
    reduced: bool = True


def skew_uoro(state: Any) -> Any:
    cotangent = jax.tree.map(lambda leaf: leaf / 1.05, state.influence.cotangent)
    return state._replace(influence=state.influence._replace(cotangent=cotangent))


def skew_nobacktrack(state: Any) -> Any:
    cotangents = jax.tree.map(lambda leaf: leaf / 1.05, state.chains.cotangents)
    return state._replace(chains=state.chains._replace(cotangents=cotangents))


SAMPLED = {
    "uoro": Sampled(jtrunc.uoro, (2,), skew_uoro),
    "nobacktrack": Sampled(jtrunc.nobacktrack, (1, 2), skew_nobacktrack, reduced=False),
}


@cache
def sampled_case() -> tuple[Case, reference.Linearised, np.ndarray]:
    """The case, its run, and the exact gradient as a vector."""
    case = systems.structured("tanh", SAMPLED_STEPS, 2)
    run = reference.linearise(*case)
    return case, run, np.asarray(vector(reference.bptt(run)))


def total_gradient(
    make: Callable[..., Any], key: jax.Array, between: Callable[[Any], Any] = lambda state: state
) -> jax.Array:
    """The sum of the gradients of one-step updates; `between` changes the state after each."""
    case = sampled_case()[0]
    estimator = make(case.system)
    state = estimator.init(case.params, case.hidden, key)

    def step(state: Any, inputs: Any) -> Any:
        estimate, state = estimator.update(case.params, state, jax.tree.map(lambda x: x[None], inputs))
        return between(state), vector(estimate.grads)

    return jax.lax.scan(step, state, case.inputs)[1].sum(axis=0)


def sample(total: Callable[[jax.Array], jax.Array], seed: int = 1, draws: int = DRAWS) -> np.ndarray:
    """(draws, p + q)."""
    return np.asarray(jax.jit(jax.vmap(total))(jax.random.split(jax.random.key(seed), draws)))


def enumerated_totals(name: str, patterns: np.ndarray, between: Callable[[Any], Any]) -> np.ndarray:
    """(patterns, p + q): what the estimator answers to each pattern (patterns, steps, ...) of signs."""
    case, entry, given = sampled_case()[0], SAMPLED[name], Given()
    estimator = entry.make(case.system, noise=given)
    state = estimator.init(case.params, case.hidden, jax.random.key(0))

    def total(pattern: jax.Array) -> jax.Array:
        def step(state: Any, row: Any) -> Any:
            inputs, draw = row
            given.set([draw])
            estimate, state = estimator.update(case.params, state, jax.tree.map(lambda x: x[None], inputs))
            return between(state), vector(estimate.grads)

        return jax.lax.scan(step, state, (case.inputs, pattern))[1].sum(axis=0)

    return np.asarray(jax.jit(jax.vmap(total))(patterns))


def detectable(values: np.ndarray, exact: np.ndarray) -> bool:
    """Whether N draws, equally likely among these values, show their bias at both error rates."""
    chances = np.full(len(values), 1 / len(values))
    return power(values, chances, exact) > threshold(exact.size) + POWER_MARGIN


def identity(state: Any) -> Any:
    return state


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_estimators_pass(name):
    """The keys of the library: 2·10⁵ streams, one parameter gradient each."""
    exact = sampled_case()[2]
    samples = sample(partial(total_gradient, SAMPLED[name].make))
    assert np.isfinite(samples).all()
    assert largest_z(samples, exact) < threshold(exact.size)
    values = enumerated_totals(name, signs(SAMPLED_STEPS, *SAMPLED[name].shape), identity)
    same(values.mean(axis=0), exact, 1e-12)
    np.testing.assert_allclose(samples.std(axis=0), values.std(axis=0), rtol=0.02, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLED)
def test_a_skewed_scaling_is_rejected(name):
    exact, entry = sampled_case()[2], SAMPLED[name]
    values = enumerated_totals(name, signs(SAMPLED_STEPS, *entry.shape), entry.skew)
    assert detectable(values, exact)
    samples = sample(partial(total_gradient, entry.make, between=entry.skew))
    assert largest_z(samples, exact) > threshold(exact.size)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLED)
def test_a_reused_sign_is_rejected(name):
    """The same ε at every step: each step by itself is unbiased, the products of steps are not."""
    exact, entry = sampled_case()[2], SAMPLED[name]
    once = np.repeat(signs(1, *entry.shape), SAMPLED_STEPS, axis=1)
    assert detectable(enumerated_totals(name, once, identity), exact)

    def total(key: jax.Array) -> jax.Array:
        reused, key = jax.random.split(key)

        def noise(_: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return jtrunc.rademacher(reused, shape, dtype)

        return total_gradient(partial(entry.make, noise=noise), key)

    assert largest_z(sample(total), exact) > threshold(exact.size)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLED)
def test_uniform_noise_is_rejected(name):
    """Uniform on (−1, 1) has variance 1/3: every immediate term that is reduced shrinks to a third.

    The bias is known; the deviation, and with it the power, is taken from a first sample of its own.
    """
    _, run, exact = sampled_case()
    third = forward.rtrl(run._replace(state_by_theta=run.state_by_theta / 3))
    if not SAMPLED[name].reduced:
        third = third + 2 / 3 * run.state_by_theta
    biased = forward.gradients(run, third).sum(axis=0)

    def noise(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -1, 1)

    total = partial(total_gradient, partial(SAMPLED[name].make, noise=noise))
    pilot = sample(total, seed=2, draws=20_000)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.sqrt(DRAWS) * np.abs(biased - exact) / pilot.std(axis=0)
    assert np.nanmax(z[np.isfinite(z)]) > threshold(exact.size) + POWER_MARGIN
    samples = sample(total)
    assert largest_z(samples, exact) > threshold(exact.size)
    assert largest_z(samples, biased) < threshold(exact.size)
