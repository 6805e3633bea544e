"""NoBackTrack: the influence as pairs of vectors, one sign for every unit."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import GradientEstimator, Params, PyTree, System
from jtrunc.checks import check_size, check_system
from jtrunc.coordinates import Coordinates
from jtrunc.forward.gram import Injections, rank_one_window, span_of
from jtrunc.forward.influence import (
    Representation,
    StepEstimate,
    draw_key,
    draw_keys,
    forward_estimator,
    observe,
)
from jtrunc.forward.noise import Noise, check_noise, draw_noise, rademacher
from jtrunc.forward.rank_one import balance
from jtrunc.forward.reduction import Chains, Reduction, reduction_of
from jtrunc.forward.structured import Units, UnitStep, is_rearrangement, row_norms, units_of
from jtrunc.forward.substeps import substeps_of
from jtrunc.forward.window import in_chunks
from jtrunc.optimizers.quasi_diagonal import QuasiDiagonal, identity
from jtrunc.trees import accumulator, add_into, num_time_steps


class NoBackTrackState(NamedTuple):
    """The state between updates.

    Attributes:
      hidden: h after the last step.
      chains: v̄ and w̄: J ≈ the mean over K of v̄ₖ ⊗ w̄ₖ.
      key: of all signs.
      num_draws: uint32, steps so far: the signs of step t have the key ``fold_in(key, t)``.
      metric: the norms of θ that the training loop feeds back (Kalman), or None.
      blocks: which of the K chains carries each entry of θ (split), or None.
    """

    hidden: PyTree
    chains: Chains
    key: jax.Array
    num_draws: jax.Array
    metric: QuasiDiagonal | None = None
    blocks: PyTree = None


def nobacktrack(
    system: System,
    rank: int = 1,
    *,
    noise: Noise = rademacher,
    split: bool = False,
    norms: Literal["euclidean", "kalman"] = "euclidean",
) -> GradientEstimator:
    """NoBackTrack: an unbiased rank-K influence, with a sign and a scale for every unit.

        v̄ ← D v̄,   wᵢ ← ∂Fᵢ/∂θ,   gₜ = ∂ℓₜ/∂θ + (∂ℓₜ/∂h · v̄) w̄ + Σᵢ ∂ℓₜ/∂hᵢ wᵢ
        v̄ ← ρ̄ v̄ + Σᵢ εᵢ ρᵢ eᵢ,   w̄ ← w̄/ρ̄ + Σᵢ εᵢ wᵢ/ρᵢ,   ρ̄ = √(‖w̄‖/‖v̄‖), ρᵢ = √(‖wᵢ‖/‖eᵢ‖)

    Unbiased for the gradient through all of the past at fixed θ; while θ moves, for the derivative along the
    trajectory of parameters (errata 22). The present step's own term is exact. A pair with a zero member
    contributes nothing (errata 17), so that the first step is exact and nothing is ever 0/0. Memory
    K (S + |θ|), independent of time; cost of a step about that of the network itself. Where no structure is
    declared, write a lookup ``E[x]`` as ``one_hot(x) @ E``: read off a program, a lookup may touch all of E.

    Layers (a `Stack` structure) are taken in turn, each with its own signs ("rolling", eq. 43 to 46); the
    exact term is then that of the top layer.

    Args:
      rank: K, independent chains, averaged: the variance of the past's part falls as 1/K.
      noise: ``(key, shape, dtype) -> array`` with mean 0 and variance 1; (K, S) a step, or a layer.
      split: each entry of θ belongs to one of K blocks, drawn by `init`, and chain k carries block k alone
        (section 1.4): one w̄ in all. J = Σₖ v̄ₖ ⊗ w̄ restricted to block k.
      norms: "euclidean", or "kalman" (Appendix B): norms of θ from the `metric` in the state, which the
        training loop feeds back from `optimizers.qdop` after every update (`optimizers.feed_metric`), and
        norms of h from the covariance that J gives it, each variance counted as at least a hundredth of the
        largest (the regularisation that the paper mentions). Any norms leave the estimate unbiased.

    Returns:
      A `GradientEstimator`; its `init` needs a key; `update` consumes all of `inputs`.

    Raises:
      TypeError, ValueError: bad system, rank, noise or norms; split with Kalman norms; at trace time, bad
        params or inputs, no key.
      ImportError: the transition declares no structure and its sparsity cannot be read (jtrunc[sparsity]).

    Example: two integrators, h = (h₁, h₂), that add θ: after one step J = 1, and it is exact.

      >>> system = System(lambda theta, h, x: h + theta + x, lambda params, h, x: (h[0] + 2 * h[1], ()))
      >>> params, inputs = Params(jnp.zeros(2)), jnp.zeros((1, 2))
      >>> estimator = nobacktrack(system)
      >>> state = estimator.init(params, jnp.zeros(2), jax.random.key(0))
      >>> estimate, state = estimator.update(params, state, inputs)
      >>> estimate.grads.recurrent.tolist()
      [1.0, 2.0]

    Source: Ollivier, Tallec & Charpiat, "Training recurrent networks online without backtracking" (2015),
    Algorithm 1, sections 1.1 to 1.4 and Appendix B; both gradients at the same parameters (errata 18). The
    reduction comes at the end of a step, with the norms fed back after the step before.
    """
    check_system("nobacktrack", system)
    check_size("nobacktrack", "rank", rank)
    check_noise("nobacktrack", noise)
    if norms not in ("euclidean", "kalman"):
        raise ValueError(f'nobacktrack: `norms` must be "euclidean" or "kalman", not {norms!r}')
    if split and norms == "kalman":
        raise ValueError(
            'nobacktrack: `split` and norms="kalman" exclude each other: a quasi-diagonal metric ties each '
            "weight to its bias, which may lie in another block; leave one of them out"
        )
    init = partial(_init, rank, split, norms)
    advance, window = partial(_advance, system, noise, rank), partial(_window, system, noise, rank)
    representation = Representation(init, advance, window=window)
    return forward_estimator("nobacktrack", system, representation, random=True)


def _init(rank: int, split: bool, norms: str, params: Params, hidden: PyTree, key: Any) -> NoBackTrackState:
    theta, space = params.recurrent, Coordinates.of(hidden)
    blocks = None
    if split:
        key, draw = jax.random.split(key)
        leaves, treedef = jax.tree.flatten(theta)
        keys = jax.random.split(draw, max(1, len(leaves)))
        drawn = [jax.random.randint(k, leaf.shape, 0, rank) for k, leaf in zip(keys, leaves, strict=False)]
        blocks = jax.tree.unflatten(treedef, drawn)
    cotangents = tuple(accumulator(theta) for _ in range(1 if split else rank))
    chains = Chains(jnp.zeros((rank, space.size), space.dtype), cotangents)
    metric = identity(theta) if norms == "kalman" else None
    return NoBackTrackState(hidden, chains, key, jnp.uint32(0), metric, blocks)


def _advance(
    system: System, noise: Noise, rank: int, params: Params, state: NoBackTrackState, inputs: PyTree
) -> tuple[StepEstimate, NoBackTrackState]:
    draw = draw_key(state)
    substeps = substeps_of(system, params.recurrent, state.hidden, inputs)
    draws = [draw] if len(substeps) == 1 else list(jax.random.split(draw, len(substeps)))
    hidden = substeps[-1].hidden
    seen = observe(system, params, hidden, inputs)
    reduction: Reduction = reduction_of(state.metric, state.blocks)
    chains = state.chains
    through = None
    for draw, substep in zip(draws, substeps, strict=True):
        chains = chains._replace(tangents=jax.vmap(substep.push)(chains.tangents))
        if substep is substeps[-1]:
            past = reduction.pull_back(chains, seen.cotangent)
            through = add_into(past, substep.pull(substep.own(seen.cotangent)))
        shape = (rank, substep.size)
        signs = draw_noise("nobacktrack", noise, draw, shape, chains.tangents.dtype)
        chains = reduction.reduce(chains, substep, signs)
    return seen.add(through), state._replace(hidden=hidden, chains=chains, num_draws=state.num_draws + 1)


def _window(
    system: System, noise: Noise, rank: int, params: Params, state: NoBackTrackState, inputs: PyTree
) -> tuple[StepEstimate, NoBackTrackState] | None:
    """A structured layer's window with Euclidean norms, on Gram matrices."""
    units = units_of(system.structure, params.recurrent, state.hidden)
    if units is None or state.metric is not None or state.blocks is not None:
        return None
    if not is_rearrangement(units, params.recurrent):
        return None
    return in_chunks(partial(_chunk, system, noise, rank, units), params, state, inputs, span_of(inputs))


def _chunk(
    system: System,
    noise: Noise,
    rank: int,
    units: Units,
    params: Params,
    state: NoBackTrackState,
    inputs: PyTree,
) -> tuple[StepEstimate, NoBackTrackState]:
    length = num_time_steps(inputs)
    tangents = state.chains.tangents
    draw = partial(draw_noise, "nobacktrack", noise, shape=tangents.shape, dtype=tangents.dtype)
    signs = jnp.swapaxes(jax.vmap(draw)(draw_keys(state, length)), 0, 1)

    def inject(steps: UnitStep) -> Injections:
        norms = jax.vmap(row_norms)(steps)
        present = balance(jnp.ones_like(norms), norms)
        return Injections(signs * present.tangent[None], signs * present.cotangent[None])

    hidden, chains, grads, loss, aux = rank_one_window(
        system, units, params, state.hidden, inputs, state.chains, inject, gradient_first=True
    )
    state = state._replace(hidden=hidden, chains=chains, num_draws=state.num_draws + length)
    return StepEstimate(loss, grads, aux), state
