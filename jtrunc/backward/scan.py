"""A drop-in for `jax.lax.scan` whose reverse pass follows a truncation law."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jtrunc.backward.artbp import all_boundaries, draw_uniforms, next_boundary, start_walk
from jtrunc.backward.truncation import Truncation, check_law, entering_edges
from jtrunc.backward.unroll import weighted_edge
from jtrunc.base import PyTree
from jtrunc.checks import check_inputs, check_key, check_same_state, check_size
from jtrunc.devices import anchor, vary
from jtrunc.trees import is_key, strongly_typed


def scan(
    f: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    init: PyTree,
    xs: PyTree = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    *,
    truncation: Truncation,
    key: jax.Array | None = None,
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan`, with a backward pass through the carry that follows a truncation law.

        forward:   cₜ, yₜ = f(cₜ₋₁, xₜ)                      exactly as `jax.lax.scan`
        backward:  c̄ₜ₋₁ = wₜ · (∂(cₜ, yₜ)/∂cₜ₋₁)ᵀ (c̄ₜ, ȳₜ)   w on the edge between two steps; 1 into step 0

    For people with a simulator and `jax.grad`: cut exploding gradients with ``truncation.every(L)``
    (biased), or at random and reweighted, e.g. ``truncation.polynomial(L, 6)``: then the gradient with
    respect to everything that `f` closes over, to `init` and to `xs` has the exact gradient as its
    expectation, wherever a scalar function is built from ``ys`` and the last carry.

    Memory and time are those of `jax.lax.scan`: a cut frees no memory. Values are unchanged. Reverse mode
    only: `jax.jvp` through it is an error.

    Args:
      f, init, xs, length, reverse, unroll: as in `jax.lax.scan`. With `reverse`, boundary i lies between
        the i-th and the next step in the order of execution.
      truncation: a law of `jtrunc.truncation`; a law that reads the hidden state is given the carry.
      key: a typed key, for laws that draw.

    Raises:
      TypeError, ValueError: no law, no typed key for a random one, unequal time axes, a carry that changes.

    Example: cₜ = θ cₜ₋₁ + 1 from c₀ = 0; the gradient of c₃ = 1 + θ + θ² is 1 + 2θ, and 1 + θ if it is cut
    after the second step.

      >>> from jtrunc import truncation
      >>> def last(theta, law):
      ...     return scan(lambda c, _: (theta * c + 1, ()), jnp.float32(0), length=3, truncation=law)[0]
      >>> theta = jnp.float32(0.5)
      >>> [float(jax.grad(last)(theta, law)) for law in (truncation.never(), truncation.every(2))]
      [2.0, 1.5]
    """
    law = check_law("scan", truncation)
    check_key("scan", key, law.random)
    bare = not jax.tree.leaves(xs)
    if bare and length is None:
        raise ValueError("scan: `xs` holds no array and `length` is None; give one of them")
    if length == 0 or any(jnp.shape(leaf)[:1] == (0,) for leaf in jax.tree.leaves(xs)):
        return jax.lax.scan(f, init, xs, length, reverse, unroll)  # no step, so no boundary
    num_steps = check_size("scan", "length", length) if bare else check_inputs(xs, "xs")
    if length is not None and length != num_steps:
        raise ValueError(f"scan: `length` is {length}, but `xs` has {num_steps} steps")
    check_law("scan", law, num_steps)
    _, uniforms = draw_uniforms(law, key, num_steps)
    weighted = _cut_on_the_way if law.reads_hidden else _cut_before
    init = _promoted(f, init, xs)
    return weighted(f, init, xs, law, uniforms, dict(length=num_steps, reverse=reverse, unroll=unroll))


def _promoted(f: Any, init: PyTree, xs: PyTree) -> PyTree:
    """`init` with weakly typed leaves (Python numbers) in the dtype that `f` gives them, as in lax.scan."""

    def first(init: PyTree, xs: PyTree) -> PyTree:
        return f(init, jax.tree.map(lambda leaf: leaf[0], xs))[0]

    def promote(leaf: Any, after: Any) -> Any:
        return jnp.asarray(leaf, after.dtype) if jax.typeof(leaf).weak_type else leaf

    init = jax.tree.map(lambda leaf: leaf if is_key(leaf) else jnp.asarray(leaf), init)
    after = jax.eval_shape(first, init, xs)
    if jax.tree.structure(init) == jax.tree.structure(after):
        init = jax.tree.map(promote, init, after)
    return strongly_typed(init)


def _checked(f: Any, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
    new_carry, y = f(carry, x)
    new_carry = strongly_typed(new_carry)
    check_same_state("scan: `f`", carry, new_carry, name="carry")
    return new_carry, y


def _cut_before(
    f: Any, init: PyTree, xs: PyTree, law: Truncation, uniforms: jax.Array, options: dict[str, Any]
) -> tuple[PyTree, PyTree]:
    _, (_, weights) = all_boundaries(law, jnp.int32(0), uniforms)
    edges = entering_edges(weights)

    def step(carry: PyTree, step_xs: Any) -> tuple[PyTree, PyTree]:
        edge, x = step_xs
        return _checked(f, weighted_edge(edge, carry), x)

    return jax.lax.scan(step, init, (edges[::-1] if options["reverse"] else edges, xs), **options)


def _cut_on_the_way(
    f: Any, init: PyTree, xs: PyTree, law: Truncation, uniforms: jax.Array, options: dict[str, Any]
) -> tuple[PyTree, PyTree]:
    def step(carried: Any, step_xs: Any) -> tuple[Any, PyTree]:
        carry, walk, weight = carried
        uniform, x = step_xs
        carry, y = _checked(f, weighted_edge(weight, carry), x)
        walk, (_, weight) = next_boundary(law, walk, jax.lax.stop_gradient(carry), uniform)
        return (carry, walk, jax.lax.stop_gradient(weight)), y

    law_start = (start_walk(jnp.int32(0)), jnp.ones((), dtype=float))
    start = (init, *vary(law_start, anchor(init, xs, uniforms)))
    uniforms = uniforms[::-1] if options["reverse"] else uniforms
    (carry, _, _), ys = jax.lax.scan(step, start, (uniforms, xs), **options)
    return carry, ys
