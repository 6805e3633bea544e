"""The rank-one trick (NoBackTrack paper, Proposition 1): Σᵢ vᵢ wᵢᵀ = E[(Σᵢ εᵢ vᵢ)(Σⱼ εⱼ wⱼ)ᵀ].

Before they are summed, vᵢ and wᵢ may be scaled by ρᵢ and 1/ρᵢ; ρᵢ = √(‖wᵢ‖/‖vᵢ‖) has the least variance.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import PyTree


class Scaling(NamedTuple):
    """ρ for a tangent and 1/ρ for its cotangent; both 0 for a pair with a zero member (errata 17)."""

    tangent: jax.Array
    cotangent: jax.Array


def balance(tangent_norm: jax.Array, cotangent_norm: jax.Array) -> Scaling:
    """ρ = √(‖w‖/‖v‖), elementwise; a pair with a zero member is nothing and contributes nothing.

    Example:

      >>> [part.tolist() for part in balance(jnp.array([1.0, 2.0]), jnp.array([4.0, 0.0]))]
      [[2.0, 0.0], [0.5, 0.0]]
    """
    alive = (tangent_norm > 0) & (cotangent_norm > 0)
    ratio = jnp.where(alive, cotangent_norm, 1) / jnp.where(alive, tangent_norm, 1)
    # A NaN norm is no zero, and must show; but beside a zero it is cut off, as by a reset.
    broken = jnp.isnan(tangent_norm + cotangent_norm) & (tangent_norm != 0) & (cotangent_norm != 0)
    alive = alive | broken
    rho = jnp.sqrt(jnp.where(broken, jnp.nan, ratio))
    return Scaling(jnp.where(alive, rho, 0), jnp.where(alive, 1 / rho, 0))


def scaled(scale: jax.Array, leaf: jax.Array) -> jax.Array:
    """``scale · leaf`` in the dtype of `leaf`; exactly 0 where the scale is: a reset stops infinities too."""
    return jnp.where(scale == 0, 0, scale * leaf).astype(leaf.dtype)


def squared_norm(tree: PyTree) -> jax.Array:
    """Σ |x|² over all leaves, in float32 or wider."""
    total = jnp.float32(0)
    for leaf in jax.tree.leaves(tree):
        square = jnp.square(leaf.real) + jnp.square(leaf.imag) if jnp.iscomplexobj(leaf) else jnp.square(leaf)
        total = total + jnp.sum(square, dtype=jnp.promote_types(square.dtype, jnp.float32))
    return total


def norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm of all leaves together."""
    return jnp.sqrt(squared_norm(tree))
