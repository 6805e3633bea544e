"""NoBackTrack in continuous time (section 1.4): its noise is that of a Wiener process, √δt a step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtrunc
from jtrunc import Params, System
from tests.reference import to_vector

UNITS = 3


def decay(theta: dict[str, jax.Array], hidden: jax.Array, inputs: jax.Array) -> jax.Array:
    """dh/dt = −h + tanh(W h + x) + b."""
    return -hidden + jnp.tanh(hidden @ theta["W"] + inputs) + theta["b"]


def at(time_step: float, steps: int) -> tuple[System, Params, jax.Array]:
    rate = System(decay, lambda params, hidden, inputs: (jnp.sum(hidden), ()))
    generator = np.random.default_rng(4)
    theta = {"W": jnp.asarray(generator.normal(size=(UNITS, UNITS))), "b": jnp.ones(UNITS)}
    return jtrunc.continuous_time(rate, time_step), Params(theta), jnp.ones((steps, UNITS))


def increments(time_step: float) -> np.ndarray:
    """Root mean square of the random part of one step's change of v̄ and of w̄, at the same h, v̄ and w̄."""
    system, params, inputs = at(time_step, 1)
    estimator = jtrunc.nobacktrack(system)
    state = estimator.init(params, 0.3 * jnp.ones(UNITS), jax.random.key(0))
    ones = jax.tree.map(jnp.ones_like, state.chains)
    state = state._replace(chains=ones)

    def after(key: jax.Array) -> Any:
        return to_vector_pair(estimator.update(params, state._replace(key=key), inputs)[1].chains)

    pair = jax.jit(jax.vmap(after))(jax.random.split(jax.random.key(1), 64))
    return np.array([np.std(vectors, axis=0).mean() for vectors in pair])


def unscaling(time_step: float) -> np.ndarray:
    """What the paper warns of: v̄ changes by ε, w̄ by ε wᵢ.

    ρᵢ = √‖wᵢ‖ taken out again: of v̄ by division, of w̄ by multiplication.
    """
    system, params, _ = at(time_step, 1)
    rho = np.sqrt(np.sqrt(np.sum(inputs_row(system, params) ** 2, axis=1)).mean())
    return np.array([1 / rho, rho])


def to_vector_pair(chains: Any) -> tuple[jax.Array, jax.Array]:
    return to_vector(chains.tangents), to_vector(chains.cotangents)


def inputs_row(system: System, params: Params) -> np.ndarray:
    """∂F/∂θ at the state of `increments`, (UNITS, |θ|)."""
    hidden, x = 0.3 * jnp.ones(UNITS), jnp.ones(UNITS)
    jacobian = jax.jit(jax.jacrev(lambda theta: system.transition(theta, hidden, x)))(params.recurrent)
    return np.concatenate([leaf.reshape(UNITS, -1) for leaf in jax.tree.leaves(jacobian)], axis=1)


def test_increments_scale_with_the_root_of_the_time_step():
    """A hundredth of the step: a tenth of the noise, in v̄ and in w̄; unscaled, 1 and a hundredth."""
    coarse, fine = increments(1e-3), increments(1e-5)
    np.testing.assert_allclose(fine / coarse, [0.1, 0.1], rtol=0.02)
    unscaled = fine * unscaling(1e-5) / (coarse * unscaling(1e-3))
    np.testing.assert_allclose(unscaled, [1.0, 0.01], rtol=0.02)


@pytest.mark.slow
def test_the_variance_has_a_limit():
    """Var J at a fixed time settles as δt → 0: 4000 draws know it to 4 %, and a factor of 4 is no limit."""

    def variance(time_step: float) -> float:
        steps = round(1 / time_step)
        system, params, inputs = at(time_step, steps)
        estimator = jtrunc.nobacktrack(system)

        def draw(key: jax.Array) -> jax.Array:
            state = estimator.init(params, jnp.zeros(UNITS), key)
            _, state = estimator.update(params, state, inputs[:-1])
            return to_vector(estimator.update(params, state, inputs[:1])[0].grads)

        draws = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(2), 4000))
        return float(np.var(draws, axis=0).sum())

    coarse, fine = variance(1 / 16), variance(1 / 64)
    assert 0.7 < fine / coarse < 1.4
