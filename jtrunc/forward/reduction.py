"""The reduction step of NoBackTrack: K pairs (v̄, w̄) and a row wᵢ for every unit become K pairs again.

What differs between its variants is which norms scale the pairs, and which parameters a chain carries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import PyTree
from jtrunc.forward.rank_one import balance, norm, scaled, squared_norm
from jtrunc.forward.sparsity import sum_over_colours
from jtrunc.forward.substeps import Substep
from jtrunc.optimizers import quasi_diagonal
from jtrunc.optimizers.quasi_diagonal import QuasiDiagonal


class Chains(NamedTuple):
    """v̄ (K, S), and w̄: K trees like θ, or one in all where θ is split.

    Trees apart, and not one with an axis K: under `vmap` over streams such an axis is laid out anew all the
    time, at the cost of a copy each.
    """

    tangents: jax.Array
    cotangents: tuple[PyTree, ...]


class Reduction(NamedTuple):
    """A variant of the reduction.

    Attributes:
      pull_back: ``(chains, c) -> cᵀ J`` of what the chains carry, a tree like θ.
      reduce: ``(chains, substep, signs) -> chains``; signs (K, size).
    """

    pull_back: Callable[[Chains, jax.Array], PyTree]
    reduce: Callable[[Chains, Substep, jax.Array], Chains]


def reduction_of(metric: QuasiDiagonal | None, blocks: PyTree) -> Reduction:
    """The variant that goes with a state of NoBackTrack."""
    if blocks is not None:
        return Reduction(partial(_pull_back_split, blocks), partial(_reduce_split, blocks))
    if metric is not None:
        return Reduction(_pull_back, partial(_reduce_kalman, metric))
    return Reduction(_pull_back, _reduce)


def _pull_back(chains: Chains, cotangent: jax.Array) -> PyTree:
    """1/K Σₖ (c · v̄ₖ) w̄ₖ."""
    scales = chains.tangents @ cotangent / len(chains.tangents)
    return jax.tree.map(lambda *leaves: _weighted_sum(scales, leaves), *chains.cotangents)


def _weighted_sum(scales: jax.Array, leaves: tuple[jax.Array, ...]) -> jax.Array:
    terms = [scaled(scale, leaf) for scale, leaf in zip(scales, leaves, strict=True)]
    return jnp.asarray(sum(terms[1:], terms[0]), leaves[0].dtype)


def _reduce(chains: Chains, substep: Substep, signs: jax.Array) -> Chains:
    tangent_norms = jnp.sqrt(jnp.sum(jnp.square(chains.tangents), axis=1))
    cotangent_norms = jnp.stack([norm(chain) for chain in chains.cotangents])
    return _sum_pairs(
        chains,
        substep,
        signs,
        tangent_norms,
        cotangent_norms,
        jnp.ones((), chains.tangents.dtype),
        substep.row_norms(),
    )


def _sum_pairs(
    chains: Chains,
    substep: Substep,
    signs: jax.Array,
    tangent_norms: jax.Array,
    cotangent_norms: jax.Array,
    basis_norms: jax.Array,
    row_norms: jax.Array,
) -> Chains:
    """Balances all pairs by their norms and sums them: (K,), (K,), ‖eᵢ‖ (size,) or (), ‖wᵢ‖ (size,)."""
    past = balance(tangent_norms, cotangent_norms)
    present = balance(jnp.broadcast_to(basis_norms, row_norms.shape), row_norms)
    tangents = scaled(past.tangent[:, None], chains.tangents)
    tangents = substep.add_to_own(tangents, (signs * present.tangent[None]).astype(tangents.dtype))
    rows = [substep.pull(sign * present.cotangent) for sign in signs]
    cotangents = tuple(
        jax.tree.map(lambda w, i, scale=scale: scaled(scale, w) + i.astype(w.dtype), chain, row)
        for scale, chain, row in zip(past.cotangent, chains.cotangents, rows, strict=True)
    )
    return Chains(tangents, cotangents)


def _reduce_kalman(metric: QuasiDiagonal, chains: Chains, substep: Substep, signs: jax.Array) -> Chains:
    """Norms of Appendix B: ‖w‖² = wᵀ C_θ w, ‖v‖² = Σᵢ vᵢ²/C_h,ii with C_h = J C_θ Jᵀ (eq. 59 to 64)."""
    count = len(chains.tangents)
    rows = substep.rows()
    each = [quasi_diagonal.reduce(metric, chain) for chain in chains.cotangents]
    own = [quasi_diagonal.reduce(metric, tree) for tree in rows.trees]
    gram = jnp.stack([jnp.stack([_inner(metric, a, b) for b in each]) for a in each])
    row_squares = sum_over_colours(rows, own, own, metric.scales)
    with_chains = jnp.stack(
        [sum_over_colours(rows, own, [chain] * len(own), metric.scales) for chain in each]
    )
    tangents = chains.tangents / count
    covariance = jnp.sum(tangents * (gram @ tangents), axis=0)
    cross = 2 * jnp.sum(substep.own(tangents) * with_chains, axis=0) + row_squares
    covariance = substep.add_to_own(covariance, cross)
    covariance = jnp.maximum(covariance, LEAST_VARIANCE * jnp.max(covariance))
    known = covariance > 0
    inverse = jnp.where(known, 1 / jnp.where(known, covariance, 1), 0)
    tangent_norms = jnp.sqrt(jnp.sum(jnp.square(chains.tangents) * inverse[None], axis=1))
    cotangent_norms = jnp.sqrt(jnp.diagonal(gram))
    return _sum_pairs(
        chains,
        substep,
        signs,
        tangent_norms,
        cotangent_norms,
        jnp.sqrt(substep.own(inverse)),
        jnp.sqrt(row_squares),
    )


LEAST_VARIANCE = 1e-2
"""The variance of a unit counts as at least this part of the largest: the paper's "small regularization terms
in the denominator" (Appendix B) in units of their own. Without it a unit that forgets fast has a norm without
bound beside one that hardly forgets, its noise is charged to w̄, and so to the rows of the slow units, whose
own norms then hide it: in a leaky network v̄ grows until it is infinite."""


def _inner(metric: QuasiDiagonal, left: PyTree, right: PyTree) -> jax.Array:
    """⟨left, right⟩ of two reduced trees."""
    terms = jax.tree.map(
        lambda scale, a, b: jnp.sum(scale * (a * jnp.conj(b)).real), metric.scales, left, right
    )
    return jnp.asarray(sum(jax.tree.leaves(terms), jnp.float32(0)))


def _pull_back_split(blocks: PyTree, chains: Chains, cotangent: jax.Array) -> PyTree:
    """Σₖ (c · v̄ₖ) w̄ restricted to block k."""
    scales = chains.tangents @ cotangent
    return jax.tree.map(lambda block, leaf: scaled(scales[block], leaf), blocks, chains.cotangents[0])


def _reduce_split(blocks: PyTree, chains: Chains, substep: Substep, signs: jax.Array) -> Chains:
    count = len(chains.tangents)
    rows = substep.rows()
    masks = [jax.tree.map(lambda block, k=k: block == k, blocks) for k in range(count)]
    restricted = [jax.tree.map(jnp.multiply, chains.cotangents[0], mask) for mask in masks]
    tangent_norms = jnp.sqrt(jnp.sum(jnp.square(chains.tangents), axis=1))
    past = balance(tangent_norms, jnp.sqrt(jnp.stack([squared_norm(tree) for tree in restricted])))
    row_norms = jnp.sqrt(jnp.stack([rows.squared_norms(mask) for mask in masks]))
    present = balance(jnp.ones_like(row_norms), row_norms)
    tangents = scaled(past.tangent[:, None], chains.tangents)
    tangents = substep.add_to_own(tangents, (signs * present.tangent).astype(tangents.dtype))
    pulled = [rows.pull(sign * scale) for sign, scale in zip(signs, present.cotangent, strict=True)]
    cotangents = jax.tree.map(
        lambda block, w, *rows: (
            scaled(past.cotangent[block], w) + jnp.choose(block, list(rows), mode="clip")
        ).astype(w.dtype),
        blocks,
        chains.cotangents[0],
        *pulled,
    )
    return Chains(tangents, (cotangents,))
