"""Kronecker influences: KF-RTRL and the optimal Kronecker sum.

The weights of an affine map p = f W move the state by I = f ⊗ C, C = ∂h/∂p (S, outputs): a Kronecker product.
Its influence is carried as a sum of few of them, J ≈ Σᵣ uᵣ ⊗ Aᵣ, uᵣ (F,) and Aᵣ (S, outputs). A step makes
one term more, D J + I = Σᵣ uᵣ ⊗ D Aᵣ + f ⊗ C, and a random reduction with the same expectation takes it away.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import GradientEstimator, Params, PyTree, System
from jtrunc.checks import check_size, check_system
from jtrunc.coordinates import Coordinates
from jtrunc.forward.influence import (
    RandomForwardState,
    Representation,
    StepEstimate,
    draw_key,
    forward_estimator,
    observe,
)
from jtrunc.forward.noise import Noise, check_noise, draw_noise, rademacher
from jtrunc.forward.rank_one import balance
from jtrunc.forward.structured import (
    Units,
    UnitStep,
    Weights,
    num_features,
    read_theta,
    required_units,
    state_jacobian,
    theta_cotangent,
    unit_step,
)


class Kronecker(NamedTuple):
    """Σᵣ uᵣ ⊗ Aᵣ of one map.

    Attributes:
      features: u, (terms, F).
      states: A, (terms, S, outputs).
    """

    features: jax.Array
    states: jax.Array


class KroneckerInfluence(NamedTuple):
    """The influence of all parameters.

    Attributes:
      maps: ``{map: Kronecker}``.
      elementwise: (S, n), exact, for each real coordinate of the elementwise parameters.
    """

    maps: dict[str, Kronecker]
    elementwise: list[jax.Array]


def kf_rtrl(system: System, *, noise: Noise = rademacher) -> GradientEstimator:
    """Kronecker-factored RTRL: one Kronecker product a map, two random signs a step.

        J ≈ u ⊗ A,   u ← ε₁ p₁ u + ε₂ p₂ f,   A ← ε₁ D A / p₁ + ε₂ C / p₂
        p₁ = √(‖D A‖/‖u‖),   p₂ = √(‖C‖/‖f‖),   gₜ = ∂ℓₜ/∂θ + ∂ℓₜ/∂hₜ · (u ⊗ A)

    Unbiased for the gradient through all of the past at fixed θ; while θ moves, for the derivative along the
    trajectory of parameters (errata 22). Far less variance than rank-one estimators, for the price of a
    product of D with A at every step: memory O(S · outputs), cost O(S² · outputs), for a network of n units
    n² and n³. A pair with a zero member contributes nothing (errata 17).

    Args:
      system: with a `Structure` (one layer), on one stream.
      noise: ``(key, shape, dtype) -> array`` with mean 0 and variance 1; (maps, 2) a step, maps by name.

    Returns:
      A `GradientEstimator`; its `init` needs a key; `update` consumes all of `inputs`.

    Raises:
      TypeError, ValueError: bad system or noise; at trace time, a system without a `Structure` on one row of
        state, bad params or inputs, no key.

    Example:

      >>> from jtrunc import cells
      >>> net = cells.model(cells.tanh(2, 3), 2, cells.softmax_cross_entropy)
      >>> estimator = kf_rtrl(net.system)
      >>> state = estimator.init(net.init(jax.random.key(0)), net.initial_hidden(), jax.random.key(1))
      >>> state.influence.maps["units"].features.shape, state.influence.maps["units"].states.shape
      ((1, 6), (1, 3, 3))

    Source: Mujika, Meier & Steger, "Approximating real-time recurrent learning with random Kronecker
    factors" (2018), Algorithm 1.
    """
    check_system("kf_rtrl", system)
    check_noise("kf_rtrl", noise)
    return _estimator("kf_rtrl", system, noise, terms=1, reduce=_balanced_sum)


def optimal_kronecker_sum(system: System, terms: int = 1, *, noise: Noise = rademacher) -> GradientEstimator:
    """Optimal Kronecker sum: r products a map, and of all unbiased reductions the one of least variance.

        Σᵣ uᵣ ⊗ D Aᵣ + f ⊗ C  (r + 1 terms)  =  Σₖ σₖ aₖ ⊗ bₖ,   orthonormal aₖ and bₖ
        ≈ Σ_{k<m} σₖ aₖ ⊗ bₖ  +  a random mixture of the others in r − m terms

    The singular values that stand out are kept; the q others, with sum Σ, are mixed by
    L = √(Σ/(q−1)) diag(ε) X, where the columns of X are orthonormal and orthogonal to z,
    zₖ² = 1 − (q−1) σₖ/Σ, so that E[L Lᵀ] = diag(σ). Unbiased as `kf_rtrl`, with less variance already
    for r = 1. Memory O(r S · outputs), cost that of `kf_rtrl` times r, and two QR factorisations of r + 1
    columns.

    Args:
      system: with a `Structure` (one layer), on one stream.
      terms: r ≥ 1.
      noise: ``(key, shape, dtype) -> array`` with mean 0 and variance 1; (maps, r + 1) a step, maps by name.

    Returns:
      A `GradientEstimator`; its `init` needs a key; `update` consumes all of `inputs`.

    Raises:
      TypeError, ValueError: as `kf_rtrl`; terms below 1.

    Source: Benzing, Gauy, Mujika, Martinsson & Steger, "Optimal Kronecker-sum approximation of real time
    recurrent learning" (2019).
    """
    check_system("optimal_kronecker_sum", system)
    check_size("optimal_kronecker_sum", "terms", terms)
    check_noise("optimal_kronecker_sum", noise)
    return _estimator("optimal_kronecker_sum", system, noise, terms=terms, reduce=_optimal_sum)


def _estimator(owner: str, system: System, noise: Noise, *, terms: int, reduce: Any) -> GradientEstimator:
    def init(params: Params, hidden: PyTree, key: Any) -> RandomForwardState:
        units = required_units(owner, system.structure, params.recurrent, hidden)
        return RandomForwardState(hidden, _zeros(units, params.recurrent, hidden, terms), key, jnp.uint32(0))

    advance = partial(_advance, owner, system, noise, terms, reduce)
    return forward_estimator(owner, system, Representation(init, advance), random=True)


def _zeros(units: Units, theta: PyTree, hidden: PyTree, terms: int) -> KroneckerInfluence:
    dtype, size = Coordinates.of(hidden).dtype, units.parts * units.width
    affine, elementwise = jax.eval_shape(partial(read_theta, units.structure), theta)
    maps = {}
    for name, weights in affine.items():
        outputs = units.slots[name] * units.width
        features = jnp.zeros((terms, num_features(weights)), dtype)
        maps[name] = Kronecker(features, jnp.zeros((terms, size, outputs), dtype))
    count = Coordinates.of(elementwise).size // units.width
    return KroneckerInfluence(maps, [jnp.zeros((size, units.width), dtype) for _ in range(count)])


def _advance(
    owner: str,
    system: System,
    noise: Noise,
    terms: int,
    reduce: Any,
    params: Params,
    state: RandomForwardState,
    inputs: PyTree,
) -> tuple[StepEstimate, RandomForwardState]:
    theta, hidden = params.recurrent, state.hidden
    units = required_units(owner, system.structure, theta, hidden)
    step = unit_step(units, theta, hidden, inputs)
    seen = observe(system, params, step.hidden, inputs)
    jacobian = state_jacobian(units, theta, step, hidden, inputs)
    signs = draw_noise(owner, noise, draw_key(state), (len(units.slots), terms + 1), jacobian.dtype)
    maps, gradients = {}, {}
    for sign, name in zip(signs, sorted(units.slots), strict=True):
        old = state.influence.maps[name]
        pushed = Kronecker(old.features, jnp.einsum("ab,rbo->rao", jacobian, old.states))
        maps[name] = reduce(pushed, step.features[name], _dense_map(units, step, name), sign)
        by_state = jnp.einsum("a,rao->ro", seen.cotangent, maps[name].states)
        gradients[name] = jnp.einsum("rf,ro->fo", maps[name].features, by_state)
    elementwise = [
        jacobian @ old + _own_units(units, by)
        for old, by in zip(state.influence.elementwise, step.by_elementwise, strict=True)
    ]
    through = theta_cotangent(
        units, theta, Weights(gradients, [seen.cotangent @ rows for rows in elementwise])
    )
    return seen.add(through), state._replace(
        hidden=step.hidden, influence=KroneckerInfluence(maps, elementwise), num_draws=state.num_draws + 1
    )


def _own_units(units: Units, values: jax.Array) -> jax.Array:
    """(s, n) numbers a unit as a matrix (S, n)."""
    own = jnp.eye(units.width, dtype=values.dtype)
    return (values[:, :, None] * own[None]).reshape(-1, units.width)


def _dense_map(units: Units, step: UnitStep, name: str) -> jax.Array:
    """C, (S, outputs)."""
    own = jnp.eye(units.width, dtype=step.by_map[name].dtype)
    # (part, unit, slot, unit): a slot moves its own unit alone.
    dense = jnp.swapaxes(step.by_map[name], 1, 2)[..., None] * own[None, :, None]
    return dense.reshape(units.parts * units.width, -1)


def _balanced_sum(old: Kronecker, features: jax.Array, states: jax.Array, signs: jax.Array) -> Kronecker:
    past = balance(jnp.linalg.norm(old.features[0]), jnp.linalg.norm(old.states[0]))
    present = balance(jnp.linalg.norm(features), jnp.linalg.norm(states))
    u = signs[0] * past.tangent * old.features[0] + signs[1] * present.tangent * features
    a = signs[0] * past.cotangent * old.states[0] + signs[1] * present.cotangent * states
    return Kronecker(u[None], a[None])


def _optimal_sum(old: Kronecker, features: jax.Array, states: jax.Array, signs: jax.Array) -> Kronecker:
    left = jnp.concatenate([old.features, features[None]])
    right = jnp.concatenate([old.states, states[None]]).reshape(len(left), -1)
    left_basis, left_triangle = _factor(left)
    right_basis, right_triangle = _factor(right)
    p, singular, q = jnp.linalg.svd(left_triangle @ right_triangle.T)
    # A value of rounding alone would come back as its square root: a term that is not there.
    rounding = jnp.finfo(singular.dtype).eps * 8 * len(singular) * singular[0]
    mixture = mix(jnp.where(singular > rounding, singular, 0), signs)
    u = (left_basis @ p @ mixture).T
    a = (right_basis @ q.T @ mixture).T
    return Kronecker(u, a.reshape(-1, *states.shape))


def _factor(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``rowsᵀ = Q R`` with as many columns as rows, also where the rows are shorter than they are many."""
    count = len(rows)
    padding = max(0, count - rows.shape[1])
    basis, triangle = jnp.linalg.qr(jnp.pad(rows, ((0, 0), (0, padding))).T)
    return basis[: rows.shape[1]], triangle


def mix(singular: jax.Array, signs: jax.Array) -> jax.Array:
    """L (r + 1, r) with E[L Lᵀ] = diag(σ) for r + 1 descending singular values: the least variance.

    Example: two values become one by the rank-one trick.

      >>> mix(jnp.array([4.0, 1.0]), jnp.array([1.0, -1.0])).round(3).tolist()
      [[2.0], [1.0]]
    """
    count = len(singular) - 1
    chosen = None
    # From keeping most to keeping least: the last that is possible is the best.
    for kept in range(count - 1, -1, -1):
        candidate = _mix_keeping(kept, singular, signs)
        rest = singular[kept:]
        possible = rest[0] * (len(rest) - 1) <= jnp.sum(rest)
        chosen = candidate if chosen is None else jnp.where(possible, candidate, chosen)
    assert chosen is not None
    return chosen


def _mix_keeping(kept: int, singular: jax.Array, signs: jax.Array) -> jax.Array:
    rest = singular[kept:]
    mixed = len(rest) - 1
    total = jnp.sum(rest)
    # zₖ² Σ = Σ − (q−1) σₖ, written so that it is exactly 0 where the others are.
    others = jnp.sum(jnp.where(jnp.eye(len(rest), dtype=bool), 0, rest[None]), axis=1)
    z = jnp.sqrt(jnp.maximum(0, others - (mixed - 1) * rest))
    first = jnp.zeros_like(z).at[0].set(1)
    z = jnp.where(total > 0, z / jnp.where(total > 0, jnp.linalg.norm(z), 1), first)
    # A reflection that takes the first axis to z: its other columns are orthonormal, and orthogonal to z.
    w = first - z
    square = jnp.sum(jnp.square(w))
    reflection = jnp.eye(len(rest), dtype=z.dtype) - jnp.where(
        square > 0, 2 / jnp.where(square > 0, square, 1), 0
    ) * jnp.outer(w, w)
    block = jnp.sqrt(total / mixed) * signs[kept:, None] * reflection[:, 1:]
    mixture = jnp.zeros((len(singular), len(singular) - 1), z.dtype)
    mixture = mixture.at[:kept, :kept].set(jnp.diag(jnp.sqrt(singular[:kept])))
    return mixture.at[kept:, kept:].set(block)
