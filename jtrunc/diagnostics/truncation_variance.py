"""How much variance random truncation adds to a gradient: predicted from norms, or exactly from products."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jtrunc.backward.optimal import correlated, uncorrelated, variance_rate
from jtrunc.backward.truncation import (
    Truncation,
    check_law,
    check_norms,
    check_products,
    log_mean_square,
    probabilities,
    survival,
)
from jtrunc.base import Params, PyTree, System
from jtrunc.checks import check_size, check_step, check_system
from jtrunc.trees import is_concrete, partition_inexact

NUM_POSITIONS = 8192
"""Steps of a window over which a law is tabulated; it is taken as constant beyond."""

MOST_LEFT_OUT = 1e-2
"""Of the windows of a law, the largest share that may be longer than that."""


def truncation_variance(
    law: Truncation, gradient_norms: Any, *, products: Any = None, num_positions: int = NUM_POSITIONS
) -> jax.Array:
    """The variance that the cuts of ARTBP add to the gradient, a step of the stream, predicted from φ_k.

        V = Σ_k φ_k² (Σᵢ G(i)² / G(i + k) / ΣG − 1)

    G(i) is the probability that a window reaches its i-th step (derived in `jtrunc.backward.optimal`). V is
    the trace of the covariance over the cuts, at fixed parameters, of the summed gradient of a long stream,
    divided by its steps: both `artbp` and `online_artbp`. It holds where the contributions of different
    losses and of different steps are uncorrelated; `products` makes it exact, but for losses more than R
    lags away. For constant c it is Σ_k φ_k² ((1 − c)⁻ᵏ − 1).

    Args:
      law: any that does not read the hidden state; 0 for one that draws nothing.
      gradient_norms: ‖λᵀ ∂F/∂θ‖ by lag, (R + 1,), or (samples, R + 1), as in `truncation.optimal`. In those
        units, V is in those of the squared gradient; from ‖λ‖ only ratios between laws mean something.
      products: Q (D, R + 1) of `lag_products`, which then takes the place of φ_k², or None.
      num_positions: steps of a window over which the law is tabulated.

    Returns:
      V, scalar; inf or 0 where the dtype cannot hold it.

    Raises:
      TypeError, ValueError: no law, a law that reads the hidden state or is given for some boundaries, or
        whose windows often outlast `num_positions`; bad norms or products, as in `truncation.optimal`.

    Example: c = 1/4 and two lags.

      >>> from jtrunc import truncation
      >>> round(float(truncation_variance(truncation.constant(0.25), [1.0, 1.0, 2.0])), 4)
      3.4444
    """
    law = check_law("truncation_variance", law)
    check_size("truncation_variance", "num_positions", num_positions)
    if law.length is not None:
        raise ValueError("truncation_variance: `law` is given for the boundaries of one stream; use a law")
    norms = check_norms("truncation_variance", gradient_norms)
    if products is None:
        moments = uncorrelated(log_mean_square(norms))
    else:
        moments = correlated(check_products("truncation_variance", products, norms.shape[1]))
    if not law.random:
        return jnp.zeros((), norms.dtype)
    left_out = survival(law, num_positions)[-1]
    # A constant law is tabulated exactly by any number of positions.
    table = probabilities(law, num_positions)
    if is_concrete(left_out) and left_out > MOST_LEFT_OUT and bool((table != table[-1]).any()):
        raise ValueError(
            f"truncation_variance: {float(left_out):.1g} of the windows outlast `num_positions` = "
            f"{num_positions} steps, behind which the law counts as constant; give more positions"
        )
    return variance_rate(-jnp.log1p(-table), moments)


def lag_products(system: System, params: Params, hidden: PyTree, inputs: PyTree, num_lags: int) -> jax.Array:
    """Q(d, e), how the contributions of losses and steps to a gradient correlate, by distance.

        Q(d, e) = mean over t of Σ ⟨v_{t,j}, v_{t+d,j'}⟩ over the pairs with min(j, j') = t + d + e,
        twice for d > 0;   v_{t,j} = (∂ℓⱼ/∂hₜ)ᵀ ∂F/∂θ(xₜ, hₜ₋₁, θ), j − t ≤ R

    Two contributions share the cuts between t + d and the first of their losses, hence the order of the pairs
    (`jtrunc.backward.optimal`). Q(0, k) holds φ_k² = E‖v_{t,t+k}‖² and the products among losses of a step.

    For small systems: memory O(T R p) for p recurrent parameters, time O(T R² p).

    Args:
      hidden: the state before `inputs`.
      inputs: T ≥ 2R + 1 steps; the mean is over the first T − 2R.
      num_lags: R ≥ 1; contributions of losses farther away are left out.

    Returns:
      (R + 1, R + 1), the square of the gradient's unit; 0 where d + e > R.

    Raises:
      TypeError, ValueError: bad system, params or inputs, or a window too short for R.

    Example: hₜ = ½ hₜ₋₁ + θ, ℓₜ = hₜ: v_{t,t+k} = 2⁻ᵏ, so ⟨v, v'⟩ is 1, and 2 · ½ with one lag, at d = 0.

      >>> system = System(lambda theta, h, x: 0.5 * h + theta, lambda params, h, x: (h, ()))
      >>> lag_products(system, Params(jnp.float32(1)), jnp.float32(0), jnp.ones(3, jnp.float32), 1).tolist()
      [[2.0, 0.25], [1.5, 0.0]]
    """
    check_system("lag_products", system)
    length = check_step(system, params, hidden, inputs)
    check_size("lag_products", "num_lags", num_lags)
    num_times = length - 2 * num_lags
    if num_times < 1:
        raise ValueError(
            f"lag_products: `inputs` has {length} steps, too few for {num_lags} lags; give at least "
            f"2 num_lags + 1 = {2 * num_lags + 1}"
        )
    contributions = _contributions(system, params, hidden, inputs, num_lags)
    later = jnp.cumsum(contributions[:, ::-1], axis=1)[:, ::-1]  # Σ over the lags from k on
    missing = ((0, 0), (0, num_lags + 1), (0, 0))
    from_first, later_from_first = (jnp.pad(leaf[:num_times], missing) for leaf in (contributions, later))

    def delayed(delay: jax.Array) -> jax.Array:
        def by_lag(leaf: jax.Array, lag: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(leaf, lag, num_lags + 1, axis=1)

        own, own_later = by_lag(from_first, delay), by_lag(later_from_first, delay + 1)
        other, other_later = (
            jax.lax.dynamic_slice_in_dim(leaf, delay, num_times) for leaf in (contributions, later)
        )
        both = jnp.einsum("tkp,tkp->k", own, other_later) + jnp.einsum("tkp,tkp->k", own_later, other)
        return jnp.where(delay > 0, 2.0, 1.0) * both / num_times

    return jax.lax.map(delayed, jnp.arange(num_lags + 1))


def _contributions(
    system: System, params: Params, hidden: PyTree, inputs: PyTree, num_lags: int
) -> jax.Array:
    """v_{t,t+k} as real vectors, (T, R + 1, p); zero where t + k is beyond the inputs."""

    def run(hidden: PyTree, inputs_t: PyTree) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        new = system.transition(params.recurrent, hidden, inputs_t)
        return new, (hidden, new)

    def step(rows: list[jax.Array], xs: Any) -> tuple[list[jax.Array], jax.Array]:
        before_t, after_t, inputs_t = xs
        leaves, restore = partition_inexact(after_t)
        own = jax.grad(lambda leaves: system.loss(params, restore(leaves), inputs_t)[0])(leaves)
        rows = [jnp.concatenate([new[None], row]) for new, row in zip(own, rows, strict=True)]
        leaves, restore = partition_inexact(before_t)

        def move(theta: PyTree, leaves: list[jax.Array]) -> list[jax.Array]:
            return partition_inexact(system.transition(theta, restore(leaves), inputs_t))[0]

        _, pull = jax.vjp(move, params.recurrent, leaves)
        by_theta, rows = jax.vmap(pull)(rows)
        return [row[:-1] for row in rows], jax.vmap(_real_vector)(by_theta)

    _, (before, after) = jax.lax.scan(run, hidden, inputs)
    leaves, _ = partition_inexact(hidden)
    zeros = [jnp.zeros((num_lags, *jnp.shape(leaf)), jnp.result_type(leaf)) for leaf in leaves]
    return jax.lax.scan(step, zeros, (before, after, inputs), reverse=True)[1]


def _real_vector(tree: PyTree) -> jax.Array:
    """All entries in one axis; a complex one counts as two."""
    leaves = [leaf.ravel() for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate([part for leaf in leaves for part in _real_parts(leaf)])


def _real_parts(leaf: jax.Array) -> list[jax.Array]:
    return [leaf.real, leaf.imag] if jnp.iscomplexobj(leaf) else [leaf]
