"""NoBackTrack: the influence as pairs of vectors, one sign for every unit."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import GradientEstimator, Params, PyTree, System
from jtrunc.checks import check_size, check_system
from jtrunc.coordinates import Coordinates
from jtrunc.forward.influence import Representation, StepEstimate, forward_estimator, observe
from jtrunc.forward.noise import Noise, check_noise, draw_noise, rademacher
from jtrunc.forward.reduction import Chains, Reduction, reduction_of
from jtrunc.forward.substeps import substeps_of
from jtrunc.optimizers.quasi_diagonal import QuasiDiagonal, identity
from jtrunc.trees import add_into, wide_dtype


class NoBackTrackState(NamedTuple):
    """The state between updates.

    Attributes:
      hidden: h after the last step.
      chains: v̄ and w̄: J ≈ the mean over K of v̄ₖ ⊗ w̄ₖ.
      key: of the next signs.
      metric: the norms of θ that the training loop feeds back (Kalman), or None.
      blocks: which of the K chains carries each entry of θ (split), or None.
    """

    hidden: PyTree
    chains: Chains
    key: jax.Array
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
    K (S + |θ|), independent of time; cost of a step about that of the network itself.

    Layers (a `Stack` structure) are taken in turn, each with its own signs ("rolling", eq. 43 to 46).

    Args:
      rank: K, independent chains, averaged: the variance of the past's part falls as 1/K.
      noise: ``(key, shape, dtype) -> array`` with mean 0 and variance 1; (K, S) a step, or a layer.
      split: each entry of θ belongs to one of K blocks, drawn by `init`, and chain k carries block k alone
        (section 1.4): one w̄ in all. J = Σₖ v̄ₖ ⊗ w̄ restricted to block k.
      norms: "euclidean", or "kalman" (Appendix B): norms of θ from the `metric` in the state, which the
        training loop feeds back from `optimizers.qdop` after every update (`optimizers.feed_metric`), and
        norms of h from the covariance that J gives it. Any norms leave the estimate unbiased.

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
    advance = partial(_advance, system, noise, rank)
    return forward_estimator("nobacktrack", system, Representation(init, advance), random=True)


def _init(rank: int, split: bool, norms: str, params: Params, hidden: PyTree, key: Any) -> NoBackTrackState:
    theta, space = params.recurrent, Coordinates.of(hidden)
    blocks = None
    if split:
        key, draw = jax.random.split(key)
        leaves, treedef = jax.tree.flatten(theta)
        keys = jax.random.split(draw, max(1, len(leaves)))
        drawn = [jax.random.randint(k, leaf.shape, 0, rank) for k, leaf in zip(keys, leaves, strict=False)]
        blocks = jax.tree.unflatten(treedef, drawn)
    copies = () if split else (rank,)
    cotangents = jax.tree.map(lambda leaf: jnp.zeros((*copies, *leaf.shape), wide_dtype(leaf)), theta)
    chains = Chains(jnp.zeros((rank, space.size), space.dtype), cotangents)
    metric = identity(theta) if norms == "kalman" else None
    return NoBackTrackState(hidden, chains, key, metric, blocks)


def _advance(
    system: System, noise: Noise, rank: int, params: Params, state: NoBackTrackState, inputs: PyTree
) -> tuple[StepEstimate, NoBackTrackState]:
    key, draw = jax.random.split(state.key)
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
    return seen.add(through), state._replace(hidden=hidden, chains=chains, key=key)
