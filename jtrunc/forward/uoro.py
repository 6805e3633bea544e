"""Unbiased online recurrent optimisation."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import GradientEstimator, Params, PyTree, System
from jtrunc.checks import check_size, check_system
from jtrunc.coordinates import Coordinates
from jtrunc.forward.gram import Injections, rank_one_window, span_of
from jtrunc.forward.influence import (
    RandomForwardState,
    Representation,
    StepEstimate,
    draw_key,
    draw_keys,
    forward_estimator,
    observe,
)
from jtrunc.forward.noise import Noise, check_noise, draw_noise, rademacher
from jtrunc.forward.rank_one import balance, norm, scaled
from jtrunc.forward.reduction import Chains
from jtrunc.forward.steps import forward_step
from jtrunc.forward.structured import Units, UnitStep, is_rearrangement, pulled_norm, units_of
from jtrunc.forward.window import in_chunks
from jtrunc.linearize import linear_map_with_transpose
from jtrunc.trees import accumulator, cast_like, num_time_steps, partition_inexact, wide_dtype


class RankOne(NamedTuple):
    """J ≈ tangent ⊗ cotangent: a vector (S,) and a tree like θ (at least float32)."""

    tangent: jax.Array
    cotangent: PyTree


def uoro(system: System, *, noise: Noise = rademacher, memory: int = 1) -> GradientEstimator:
    """Unbiased online recurrent optimisation: one tangent, one vector-Jacobian product a step.

        s̃ ← ρ₀ D s̃ + ρ₁ ν,   θ̃ ← θ̃/ρ₀ + (νᵀ I)/ρ₁,   E[ν νᵀ] = 1
        ρ₀ = √(‖θ̃‖/‖D s̃‖),   ρ₁ = √(‖νᵀ I‖/‖ν‖),   gₜ = ∂ℓₜ/∂θ + (∂ℓₜ/∂hₜ · s̃) θ̃

    Unbiased for the gradient through all of the past at fixed θ: E[s̃ θ̃ᵀ] = ∂hₜ/∂θ; while θ moves, for the
    derivative along the trajectory of parameters (errata 22). A pair with a zero member contributes nothing
    (errata 17), so that the first step is finite and has J = ν νᵀ I. One scalar ρ for the whole state: where
    units differ much in scale, `nobacktrack` has less variance. Memory O(S + |θ|), independent of time.

    Args:
      noise: ``(key, shape, dtype) -> array``, independent, mean 0, variance 1; (S,) a step.
      memory: steps that one noise vector serves. Inside `memory` steps the gradient is exact (they are
        backpropagated through), and the influence carries what lies before them.

    Returns:
      A `GradientEstimator`; its `init` needs a key; `update` consumes all of `inputs`.

    Raises:
      TypeError, ValueError: bad system, noise or memory; at trace time, a window that is no multiple of
        `memory`, bad params or inputs, no key.

    Example: hₜ = θ hₜ₋₁ + xₜ. Up to the second step there is one pair alone, and the estimate is exact.

      >>> system = System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h, ()))
      >>> params, inputs = Params(jnp.float32(0.5)), jnp.ones(2, jnp.float32)
      >>> estimator = uoro(system)
      >>> state = estimator.init(params, jnp.float32(0), jax.random.key(0))
      >>> estimate, state = estimator.update(params, state, inputs)
      >>> float(estimate.loss), round(float(estimate.grads.recurrent), 4)
      (2.5, 1.0)

    Source: Tallec & Ollivier, "Unbiased online recurrent optimization" (2017); the rank-one trick is
    Proposition 1 of the NoBackTrack paper (2015).
    """
    check_system("uoro", system)
    check_noise("uoro", noise)
    check_size("uoro", "memory", memory)
    advance = partial(_advance if memory == 1 else _advance_together, system, noise)
    window = partial(_window, system, noise) if memory == 1 else _no_window
    return forward_estimator("uoro", system, Representation(_init, advance, memory, window), random=True)


def _no_window(params: Params, state: RandomForwardState, inputs: PyTree) -> None:
    return None


def _init(params: Params, hidden: PyTree, key: Any) -> RandomForwardState:
    space = Coordinates.of(hidden)
    zero = RankOne(jnp.zeros(space.size, space.dtype), accumulator(params.recurrent))
    return RandomForwardState(hidden, zero, key, jnp.uint32(0))


def _advance(
    system: System, noise: Noise, params: Params, state: RandomForwardState, inputs: PyTree
) -> tuple[StepEstimate, RandomForwardState]:
    step = forward_step(system, params.recurrent, state.hidden, inputs)
    seen = observe(system, params, step.hidden, inputs)
    old = RankOne(step.push(state.influence.tangent), state.influence.cotangent)
    signs = draw_noise("uoro", noise, draw_key(state), old.tangent.shape, old.tangent.dtype)
    influence = reduce_pairs(old, RankOne(signs, step.pull(signs)), step.pulled_norm(signs))
    through = jax.tree.map(partial(scaled, seen.cotangent @ influence.tangent), influence.cotangent)
    return seen.add(through), _moved(state, step.hidden, influence)


def _moved(state: RandomForwardState, hidden: PyTree, influence: RankOne) -> RandomForwardState:
    return state._replace(hidden=hidden, influence=influence, num_draws=state.num_draws + 1)


def reduce_pairs(old: RankOne, new: RankOne, new_norm: jax.Array) -> RankOne:
    """Two pairs, each balanced, as one: (ρ₀ v + ρ₁ ν) ⊗ (w/ρ₀ + νᵀI/ρ₁)."""
    past = balance(norm(old.tangent), norm(old.cotangent))
    present = balance(norm(new.tangent), new_norm)
    cotangent = jax.tree.map(
        lambda w, i: scaled(past.cotangent, w) + (present.cotangent * i).astype(w.dtype),
        old.cotangent,
        new.cotangent,
    )
    tangent = scaled(past.tangent, old.tangent) + scaled(present.tangent, new.tangent)
    return RankOne(tangent, cotangent)


def _advance_together(
    system: System, noise: Noise, params: Params, state: RandomForwardState, inputs: PyTree
) -> tuple[StepEstimate, RandomForwardState]:
    """Several steps as one transition h → h′: exact inside, and one noise vector for all of them."""
    space = Coordinates.of(state.hidden)
    leaves, restore = partition_inexact(state.hidden)

    def run(params: Params, leaves: list[jax.Array]) -> tuple[Any, Any]:
        def step(hidden: PyTree, inputs_t: PyTree) -> tuple[PyTree, Any]:
            hidden = system.transition(params.recurrent, hidden, inputs_t)
            return hidden, system.loss(params, hidden, inputs_t)

        hidden, (losses, aux) = jax.lax.scan(step, restore(leaves), inputs)
        loss = jnp.sum(losses, dtype=wide_dtype(losses))
        return (partition_inexact(hidden)[0], loss), (hidden, loss, aux)

    push, pull, (hidden, loss, aux) = linear_map_with_transpose(run, params, leaves)
    direct, bars = pull((jax.tree.map(jnp.zeros_like, leaves), jnp.ones_like(loss)))
    tangent, cotangent = state.influence
    through = jax.tree.map(partial(scaled, space.cotangent_vector(bars) @ tangent), cotangent)
    recurrent = jax.tree.map(jnp.add, through, cast_like(direct.recurrent, through))
    moved, _ = push(jax.tree.map(jnp.zeros_like, params), space.tangents(tangent))
    signs = draw_noise("uoro", noise, draw_key(state), tangent.shape, tangent.dtype)
    immediate = pull((space.cotangents(signs), jnp.zeros_like(loss)))[0].recurrent
    old, new = RankOne(space.tangent_vector(moved), cotangent), RankOne(signs, immediate)
    influence = reduce_pairs(old, new, norm(immediate))
    grads = Params(recurrent, direct.readout)
    return StepEstimate(loss, grads, aux), _moved(state, hidden, influence)


def _window(
    system: System, noise: Noise, params: Params, state: RandomForwardState, inputs: PyTree
) -> tuple[StepEstimate, RandomForwardState] | None:
    """A structured system's window, on Gram matrices."""
    units = units_of(system.structure, params.recurrent, state.hidden)
    if units is None or not is_rearrangement(units, params.recurrent):
        return None
    return in_chunks(partial(_chunk, system, noise, units), params, state, inputs, span_of(inputs))


def _chunk(
    system: System, noise: Noise, units: Units, params: Params, state: RandomForwardState, inputs: PyTree
) -> tuple[StepEstimate, RandomForwardState]:
    length = num_time_steps(inputs)
    tangent, cotangent = state.influence
    draw = partial(draw_noise, "uoro", noise, shape=tangent.shape, dtype=tangent.dtype)
    signs = jax.vmap(draw)(draw_keys(state, length))

    def inject(steps: UnitStep) -> Injections:
        norms = jax.vmap(partial(pulled_norm, units))(steps, signs)
        present = balance(jnp.linalg.norm(signs, axis=1), norms)
        return Injections(
            (present.tangent[:, None] * signs)[None], (present.cotangent[:, None] * signs)[None]
        )

    chains = Chains(tangent[None], (cotangent,))
    hidden, chains, grads, loss, aux = rank_one_window(
        system, units, params, state.hidden, inputs, chains, inject, gradient_first=False
    )
    influence = RankOne(chains.tangents[0], chains.cotangents[0])
    state = state._replace(hidden=hidden, influence=influence, num_draws=state.num_draws + length)
    return StepEstimate(loss, grads, aux), state
