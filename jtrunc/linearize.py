"""The derivatives of one transition as linear maps; the only file that linearises or transposes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import PyTree, Transition
from jtrunc.coordinates import Coordinates
from jtrunc.trees import partition_inexact


class LinearStep(NamedTuple):
    """hₜ = F(xₜ, hₜ₋₁, θ) with its derivatives D = ∂F/∂h and I = ∂F/∂θ as functions.

    States are vectors of S real numbers (`Coordinates`), parameters trees like θ.

    Attributes:
      hidden: hₜ, a tree.
      push: ``v -> D v``, (S,) to (S,).
      pull: ``c -> cᵀ I``, (S,) to a tree like θ.
      pull_both: ``c -> (cᵀ I, cᵀ D)``.
    """

    hidden: PyTree
    push: Callable[[jax.Array], jax.Array]
    pull: Callable[[jax.Array], PyTree]
    pull_both: Callable[[jax.Array], tuple[PyTree, jax.Array]]


def linear_step(transition: Transition, theta: PyTree, hidden: PyTree, inputs: PyTree) -> LinearStep:
    """Linearises one transition of any system; what is not needed of it costs nothing under jit."""
    space = Coordinates.of(hidden)
    leaves, restore = partition_inexact(hidden)

    def run(theta: PyTree, leaves: list[jax.Array]) -> tuple[list[jax.Array], PyTree]:
        new = transition(theta, restore(leaves), inputs)
        return partition_inexact(new)[0], new

    _, push_leaves, new = jax.linearize(run, theta, leaves, has_aux=True)
    zeros = jax.tree.map(jnp.zeros_like, theta)
    pull_leaves = jax.linear_transpose(push_leaves, theta, leaves)

    def push(tangent: jax.Array) -> jax.Array:
        return space.tangent_vector(push_leaves(zeros, space.tangents(tangent)))

    def pull_both(cotangent: jax.Array) -> tuple[PyTree, jax.Array]:
        theta_bar, leaves_bar = pull_leaves(space.cotangents(cotangent))
        return theta_bar, space.cotangent_vector(leaves_bar)

    return LinearStep(new, push, lambda cotangent: pull_both(cotangent)[0], pull_both)


def linear_map(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """``function(*primals)`` and its derivative there as a linear function of tangents."""
    return jax.linearize(function, *primals)


def transposed(function: Callable[[Any], Any], primal: Any) -> Callable[[Any], Any]:
    """The transposed derivative of `function` at `primal`, from cotangents of its value to the argument's."""
    _, push = jax.linearize(function, primal)
    transpose = jax.linear_transpose(push, primal)
    return lambda cotangent: transpose(cotangent)[0]


def linear_map_with_transpose(function: Callable[..., Any], *primals: Any) -> tuple[Any, Any, Any]:
    """Derivative of ``function(*primals) -> (value, aux)``: push, pull to all primals, and aux."""
    _, push, aux = jax.linearize(function, *primals, has_aux=True)
    return push, jax.linear_transpose(push, *primals), aux
