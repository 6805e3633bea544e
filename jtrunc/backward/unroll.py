"""The one backward recursion: λₜ = vₜ ∂ℓₜ/∂hₜ + wₜ₊₁ · (∂hₜ₊₁/∂hₜ)ᵀ λₜ₊₁.

The forward pass is an ordinary scan; the weights w sit on its edges as identities whose transpose scales
the cotangent. An algorithm of the backward family is a choice of w, of the scored steps (v), and of what
is recomputed instead of stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.backward.thresholds import two_phase_pays
from jtrunc.backward.two_phase import structured_hiddens
from jtrunc.base import Params, PyTree, System
from jtrunc.checks import check_step
from jtrunc.trees import (
    concatenate,
    no_cotangent,
    num_time_steps,
    partition_inexact,
    split_at,
    weighted_cotangent,
    wide_dtype,
)


def unroll(
    system: System, params: Params, hidden: PyTree, inputs: PyTree
) -> tuple[PyTree, tuple[jax.Array, PyTree]]:
    """Runs a system over a window: hₜ = F(xₜ, hₜ₋₁, θ), ℓₜ = loss(params, hₜ, inputsₜ).

    A plain `jax.lax.scan`, differentiable in both modes: what every estimator estimates is the gradient of
    the sum of these losses.

    Args:
      inputs: pytree of arrays (T, ...), leading axis = time, T ≥ 1.

    Returns:
      ``(hidden, (losses, aux))``: h_T, losses (T,), aux stacked over time.

    Raises:
      TypeError, ValueError: unequal time axes, no step, a transition that changes structure, shape or dtype
        of the hidden state, or a loss that is no real scalar.

    Example:

      >>> system = System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h ** 2, ()))
      >>> params, inputs = Params(jnp.float32(0.5)), jnp.ones(3, jnp.float32)
      >>> hidden, (losses, _) = unroll(system, params, jnp.float32(0), inputs)
      >>> float(hidden), losses.tolist()
      (1.75, [1.0, 2.25, 3.0625])
    """
    check_step(system, params, hidden, inputs)

    def step(hidden: PyTree, inputs_t: PyTree) -> tuple[PyTree, Any]:
        hidden = system.transition(params.recurrent, hidden, inputs_t)
        return hidden, system.loss(params, hidden, inputs_t)

    return jax.lax.scan(step, hidden, inputs)


@jax.custom_vjp
def _edge(weight: jax.Array, leaves: list[jax.Array]) -> list[jax.Array]:
    return leaves


_edge.defvjp(
    lambda weight, leaves: (leaves, weight),
    lambda weight, bars: (no_cotangent(weight), weighted_cotangent(weight, bars)),
)


def weighted_edge(weight: jax.Array, hidden: PyTree) -> PyTree:
    """The hidden state unchanged, its cotangent times `weight`; integer and key leaves pass by."""
    leaves, restore = partition_inexact(hidden)
    return restore(_edge(weight, leaves))


class Window(NamedTuple):
    """How a window is to be differentiated; every field has the value of plain BPTT.

    Attributes:
      edges: (T,) weights w of the edge that enters each step, or None for 1.
      num_scored: static number of last steps whose losses count (v = 1), or None for all.
      unreached: static number of first steps that the gradient does not reach.
      segment: static number of steps between stored hidden states; None stores every step's residuals.
      mark: static number of steps after which the hidden state is reported, or None for all.
    """

    edges: jax.Array | None = None
    num_scored: int | None = None
    unreached: int = 0
    segment: int | None = None
    mark: int | None = None


PLAIN = Window()


def weighted_unroll(
    system: System, params: Params, hidden: PyTree, inputs: PyTree, window: Window = PLAIN
) -> tuple[PyTree, tuple[jax.Array, PyTree]]:
    """`unroll` with the reverse pass that `window` describes: marked hidden state, scored losses, aux.

    Structured systems take the two-phase backward pass where it pays.
    """
    length = num_time_steps(inputs)
    first_scored = 0 if window.num_scored is None else length - window.num_scored
    mark = length if window.mark is None else window.mark
    stops = sorted({stop for stop in (window.unreached, first_scored, mark, length) if stop > 0})
    marked, scored, start = hidden, [], 0
    for stop in stops:
        steps, edges = jax.tree.map(lambda leaf, i=start, j=stop: leaf[i:j], (inputs, window.edges))
        runs = system if start >= first_scored else _without_loss(system)
        if start < window.unreached:
            hidden = run_only(system, jax.lax.stop_gradient(params), hidden, steps)
        else:
            hidden, out = _segmented(runs, params, hidden, steps, edges, window.segment)
            scored += [out] if start >= first_scored else []
        marked = hidden if stop == mark else marked
        start = stop
    return marked, concatenate(scored)


def run_only(system: System, params: Params, hidden: PyTree, inputs: PyTree) -> PyTree:
    """The hidden state after all steps of `inputs`; no loss is computed."""

    def step(hidden: PyTree, inputs_t: PyTree) -> tuple[PyTree, None]:
        return system.transition(params.recurrent, hidden, inputs_t), None

    return jax.lax.scan(step, hidden, inputs)[0]


def _without_loss(system: System) -> System:
    return system._replace(loss=lambda params, hidden, inputs: (jnp.zeros(()), ()))


def _segmented(
    system: System,
    params: Params,
    hidden: PyTree,
    inputs: PyTree,
    edges: jax.Array | None,
    segment: int | None,
) -> tuple[PyTree, tuple[jax.Array, PyTree]]:
    length = num_time_steps(inputs)
    if segment is None or segment >= length:
        return _differentiable_scan(system, params, hidden, inputs, edges)
    # A ragged first segment, then whole ones: all are recomputed on the way back.
    whole = length // segment
    ragged = length - whole * segment
    first, rest = split_at((inputs, edges), ragged)
    rest = jax.tree.map(lambda leaf: leaf.reshape(whole, segment, *leaf.shape[1:]), rest)

    def run(params: Params, hidden: PyTree, xs: PyTree) -> tuple[PyTree, Any]:
        return _differentiable_scan(system, params, hidden, *xs)

    scored = []
    if ragged:
        hidden, out = jax.checkpoint(run)(params, hidden, first)
        scored.append(out)
    recomputed = jax.checkpoint(run, prevent_cse=False)  # a scan already keeps the two passes apart
    hidden, out = jax.lax.scan(lambda hidden, xs: recomputed(params, hidden, xs), hidden, rest)
    scored.append(jax.tree.map(lambda leaf: leaf.reshape(whole * segment, *leaf.shape[2:]), out))
    return hidden, concatenate(scored)


def _differentiable_scan(
    system: System, params: Params, hidden: PyTree, inputs: PyTree, edges: jax.Array | None
) -> tuple[PyTree, tuple[jax.Array, PyTree]]:
    if two_phase_pays(system.structure, params.recurrent, hidden, inputs):
        hiddens = structured_hiddens(system.structure, params.recurrent, hidden, inputs, edges)
        scored = jax.vmap(system.loss, in_axes=(None, 0, 0))(params, hiddens, inputs)
        return jax.tree.map(lambda leaf: leaf[-1], hiddens), scored

    def step(hidden: PyTree, xs: Any) -> tuple[PyTree, Any]:
        inputs_t, edge = xs
        if edge is not None:
            hidden = weighted_edge(edge, hidden)
        hidden = system.transition(params.recurrent, hidden, inputs_t)
        return hidden, system.loss(params, hidden, inputs_t)

    return jax.lax.scan(step, hidden, (inputs, edges))


class WindowGradient(NamedTuple):
    """The differentiated window: h_T, Σ losses (at least float32), gradients like `params`, losses, aux."""

    hidden: PyTree
    loss: jax.Array
    grads: Params
    losses: jax.Array
    aux: PyTree


def window_gradient(
    system: System, params: Params, hidden: PyTree, inputs: PyTree, window: Window = PLAIN
) -> WindowGradient:
    """Loss and weighted gradient of one window; the hidden state that enters is a constant."""

    def total_loss(params: Params) -> tuple[jax.Array, Any]:
        new_hidden, (losses, aux) = weighted_unroll(system, params, hidden, inputs, window)
        return jnp.sum(losses, dtype=wide_dtype(losses)), (new_hidden, losses, aux)

    (loss, (hidden, losses, aux)), grads = jax.value_and_grad(total_loss, has_aux=True)(params)
    return WindowGradient(hidden, loss, grads, losses, aux)
