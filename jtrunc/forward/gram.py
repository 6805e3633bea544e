"""Many steps of a rank-one influence at once, exactly: θ is touched once a window instead of at every step.

With fixed θ every w̄ of a window is a combination of the one it began with and of the terms that were added,

    w̄ₜ = b₀ w̄₀ + Σ_{s≤t} b_s P_s,   P_s = f_s ⊗ u_s  (the row combination Σᵢ εᵢ wᵢ/ρᵢ of step s)

so that the recursion needs only the coefficients b and inner products: ‖w̄ₜ‖² = bᵀ Γ b with the Gram matrix Γ
of w̄₀, P₁ … P_T, which are a few matrix products. So are, at the end, w̄_T and the gradient. The scan over the
window moves the state, then v̄; what does not depend on v̄ is done for all steps at once.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import Params, PyTree, System
from jtrunc.coordinates import Coordinates
from jtrunc.forward.rank_one import balance, scaled, squared_norm
from jtrunc.forward.reduction import Chains
from jtrunc.forward.steps import unit_push
from jtrunc.forward.structured import (
    Units,
    UnitStep,
    Weights,
    in_coordinates,
    join_features,
    map_cotangents,
    preactivations_of,
    theta_cotangent,
    unit_step,
)
from jtrunc.trees import num_time_steps, partition_inexact, wide_dtype


class Scored(NamedTuple):
    """The steps of a window without its influence.

    Attributes:
      hidden: h_T.
      before: hₜ₋₁ of every step, leaves (T, ...).
      steps: the linearised steps, leaves (T, ...).
      loss: Σ ℓₜ.
      aux: stacked.
      direct: Σ ∂ℓₜ/∂params at fixed hₜ.
      cotangents: cₜ = ∂ℓₜ/∂hₜ, (T, S).
    """

    hidden: PyTree
    before: PyTree
    steps: UnitStep
    loss: jax.Array
    aux: PyTree
    direct: Params
    cotangents: jax.Array


def score(system: System, units: Units, params: Params, hidden: PyTree, inputs: PyTree) -> Scored:
    """Runs a window; its steps are linearised, and its losses differentiated, all together."""
    theta, structure = params.recurrent, units.structure

    def move(hidden: PyTree, inputs_t: PyTree) -> tuple[PyTree, Any]:
        preactivations = preactivations_of(units, theta, hidden, inputs_t)
        new = structure.combine(structure.elementwise(theta), hidden, inputs_t, preactivations)
        return new, (hidden, new, preactivations)

    last, (before, after, preactivations) = jax.lax.scan(move, hidden, inputs)
    steps = jax.vmap(partial(unit_step, units, theta))(before, inputs, preactivations)
    leaves, restore = partition_inexact(after)

    def total(params: Params, leaves: list[jax.Array]) -> tuple[jax.Array, PyTree]:
        losses, aux = jax.vmap(system.loss, in_axes=(None, 0, 0))(params, restore(leaves), inputs)
        return jnp.sum(losses, dtype=wide_dtype(losses)), aux

    (loss, aux), (direct, bars) = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, leaves)
    cotangents = jax.vmap(Coordinates.of(hidden).cotangent_vector)(bars)
    return Scored(last, before, steps, loss, aux, direct, cotangents)


class Injections(NamedTuple):
    """What every step adds to a pair, balanced already: to v̄ (T, S), and of the rows of I to w̄ (T, S)."""

    tangents: jax.Array
    rows: jax.Array


class Terms(NamedTuple):
    """P₁ … P_T of one chain in the coordinates of the structure: f ⊗ u for each map, and the elementwise."""

    outputs: dict[str, jax.Array]
    elementwise: list[jax.Array]


def terms_of(units: Units, steps: UnitStep, rows: jax.Array) -> Terms:
    """Rows q (T, S) as the factors of qₜᵀ Iₜ."""

    def one(step: UnitStep, row: jax.Array) -> Terms:
        parts = row.reshape(units.parts, units.width)
        return Terms(
            map_cotangents(units, step, row),
            [jnp.sum(parts * by, axis=0) for by in step.by_elementwise],
        )

    return jax.vmap(one)(steps, rows)


def coordinates_of(units: Units, theta: PyTree, tree: PyTree) -> Weights:
    """A cotangent tree like θ in the coordinates of the structure."""
    affine, elementwise = in_coordinates(units, theta, tree)
    space = Coordinates.of(elementwise)
    leaves = jax.tree.leaves(elementwise)
    vector = space.cotangent_vector(leaves) if leaves else jnp.zeros(0, space.dtype)
    rows = [vector[i : i + units.width] for i in range(0, vector.size, units.width)]
    return Weights({name: join_features(weights) for name, weights in affine.items()}, rows)


def gram_matrix(steps: UnitStep, start: Weights, start_square: jax.Array, terms: Terms) -> jax.Array:
    """Γ (T + 1, T + 1) of w̄₀, P₁ … P_T."""
    dtype = start_square.dtype
    cross, inner = jnp.zeros((), dtype), jnp.zeros((), dtype)
    for name, outputs in terms.outputs.items():
        features = steps.features[name]
        cross = cross + jnp.sum((features @ start.maps[name]) * outputs, axis=1)
        inner = inner + (features @ features.T) * (outputs @ outputs.T)
    for rows, first in zip(terms.elementwise, start.elementwise, strict=True):
        cross, inner = cross + rows @ first, inner + rows @ rows.T
    top = jnp.concatenate([start_square[None], cross])
    return jnp.concatenate([top[None], jnp.concatenate([cross[:, None], inner], axis=1)])


class Moved(NamedTuple):
    """After the scan over one chain: v̄_T, the coefficients b of w̄_T, and those of Σ (cₜ · v̄) w̄."""

    tangent: jax.Array
    coefficients: jax.Array
    gradient: jax.Array


def move_chain(
    units: Units,
    theta: PyTree,
    scored: Scored,
    inputs: PyTree,
    tangent: jax.Array,
    injections: Injections,
    gram: jax.Array,
    gradient_first: bool,
) -> Moved:
    """v̄ ← ρ̄ D v̄ + …, b ← b/ρ̄ + eₜ; the gradient is read before the reduction, or after it."""
    length = len(gram) - 1

    def body(carry: Any, xs: Any) -> tuple[Any, None]:
        tangent, coefficients, square, gradient = carry
        step, before, inputs_t, cotangent, injected, row, index = xs
        tangent = unit_push(units, theta, step, before, inputs_t, tangent)
        if gradient_first:
            gradient = gradient + (cotangent @ tangent) * coefficients
        past = balance(jnp.sqrt(squared_norm(tangent)), jnp.sqrt(square))
        tangent = scaled(past.tangent, tangent) + injected.astype(tangent.dtype)
        coefficients = scaled(past.cotangent, coefficients)
        alone = scaled(past.cotangent**2, square) + row[index]
        # Rounding may cancel what is not zero: only a pair that is nothing may count as nothing.
        square = jnp.maximum(alone + 2 * (row @ coefficients), jnp.finfo(row.dtype).eps * alone)
        coefficients = coefficients.at[index].set(1)
        if not gradient_first:
            gradient = gradient + (cotangent @ tangent) * coefficients
        return (tangent, coefficients, square, gradient), None

    first = jnp.zeros_like(gram[0]).at[0].set(1)
    start = (tangent, first, gram[0, 0], jnp.zeros_like(first))
    xs = (
        scored.steps,
        scored.before,
        inputs,
        scored.cotangents,
        injections.tangents,
        gram[1:],
        jnp.arange(1, length + 1),
    )
    (tangent, coefficients, _, gradient), _ = jax.lax.scan(body, start, xs)
    return Moved(tangent, coefficients, gradient)


def combine_terms(steps: UnitStep, terms: Terms, coefficients: jax.Array) -> Weights:
    """Σ_s b_s P_s, one product a map."""
    maps = {
        name: steps.features[name].T @ (coefficients[:, None] * outputs)
        for name, outputs in terms.outputs.items()
    }
    return Weights(maps, [coefficients @ rows for rows in terms.elementwise])


def rank_one_window(
    system: System,
    units: Units,
    params: Params,
    hidden: PyTree,
    inputs: PyTree,
    chains: Chains,
    injections: Any,
    gradient_first: bool,
) -> tuple[PyTree, Chains, Params, jax.Array, PyTree]:
    """A window of NoBackTrack (gradient first: the present's own term is exact) or of UORO (reduction first).

    Args:
      chains: v̄ and w̄ before the window, K of each.
      injections: ``steps -> Injections`` with leaves (K, T, S).

    Returns:
      hidden, chains, gradient like `params`, summed loss, stacked aux.
    """
    theta, count = params.recurrent, len(chains.tangents)
    scored = score(system, units, params, hidden, inputs)
    added: Injections = injections(scored.steps)
    exact = terms_of(units, scored.steps, scored.cotangents) if gradient_first else None
    tangents, cotangents, gradients = [], [], []
    for k in range(count):
        own = jax.tree.map(lambda leaf, k=k: leaf[k], added)
        chain = chains.cotangents[k]
        start = coordinates_of(units, theta, chain)
        terms = terms_of(units, scored.steps, own.rows)
        gram = gram_matrix(scored.steps, start, squared_norm(chain), terms)
        moved = move_chain(units, theta, scored, inputs, chains.tangents[k], own, gram, gradient_first)
        tangents.append(moved.tangent)
        cotangents.append(_combined(units, theta, scored, chain, terms, moved.coefficients))
        terms_and_exact, scale = terms, moved.gradient / count
        if exact is not None and k == 0:
            # The exact term has the same features: one product with both.
            terms_and_exact = jax.tree.map(
                lambda a, b, scale=scale: _scale_rows(scale[1:], a) + b, terms, exact
            )
            scale = scale.at[1:].set(1)
        gradients.append(_combined(units, theta, scored, chain, terms_and_exact, scale))
    through = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *gradients)
    recurrent = jax.tree.map(lambda a, b: a + b.astype(a.dtype), through, scored.direct.recurrent)
    grads = Params(recurrent, scored.direct.readout)
    return scored.hidden, Chains(jnp.stack(tangents), tuple(cotangents)), grads, scored.loss, scored.aux


def _scale_rows(scale: jax.Array, rows: jax.Array) -> jax.Array:
    return scale[:, None] * rows


def _combined(
    units: Units, theta: PyTree, scored: Scored, chain: PyTree, terms: Terms, coefficients: jax.Array
) -> PyTree:
    """b₀ w̄₀ + Σ_s b_s P_s, a tree like θ (at least float32)."""
    added = theta_cotangent(units, theta, combine_terms(scored.steps, terms, coefficients[1:]))
    return jax.tree.map(lambda old, new: scaled(coefficients[0], old) + new.astype(old.dtype), chain, added)


SPAN = 32
"""Steps of a chunk: enough that θ is touched seldom, so few that the Gram matrix stays small."""


def span_of(inputs: PyTree) -> int:
    """The steps of one chunk of a window."""
    return min(num_time_steps(inputs), SPAN)
