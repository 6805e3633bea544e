"""ARTBP online: one sampled window an update, in the memory of a window."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.backward.artbp import Walk, next_boundary, start_walk
from jtrunc.backward.parts import window_parts
from jtrunc.backward.truncation import (
    Boundary,
    Truncation,
    check_law,
    edge_weight,
    entering_edges,
    probabilities,
    survival,
)
from jtrunc.backward.window import Boundaries, Decide, dynamic_window
from jtrunc.base import Aux, Estimate, GradientEstimator, Params, PyTree, System
from jtrunc.checks import check_key, check_params, check_step, check_system
from jtrunc.devices import anchor, vary
from jtrunc.trees import num_time_steps, strongly_typed


class OnlineArtbpState(NamedTuple):
    """The state between updates.

    Attributes:
      hidden: h after the last window, which ended with a cut.
      key: a typed key, or () for laws that draw nothing.
    """

    hidden: PyTree
    key: Any


def online_artbp(system: System, truncation: Truncation) -> GradientEstimator:
    """ARTBP window by window along a stream (ARTBP paper, section 5).

        L = first boundary that is cut,   λ_L = ∂ℓ_L/∂h_L,
        λₜ = ∂ℓₜ/∂hₜ + 1/(1 − cₜ) · (∂hₜ₊₁/∂hₜ)ᵀ λₜ₊₁  for t < L

    Each update draws one window from its `inputs`, the look-ahead of N steps, runs it forward and backward
    and consumes its L steps; the next update begins behind it. Every boundary of the stream is drawn once,
    with Bernoulli(cₜ), and no draw is repeated.

    Unbiased: at fixed parameters, the sum of the estimates over the windows of a stream has the stream's
    exact gradient as its expectation. A window that is still uncut at the end of the look-ahead ends there
    without compensation, which is a bias where the stream goes on (errata 7); it is counted in
    ``aux.diagnostics["look_ahead_hits"]`` (1 or 0 an update), and `truncation.survival` tells how often it
    happens. Gradients are sums over the window, never divided by its random length.

    Time O(L), not O(N); memory O(N) hidden states / 128 and the residuals of 128 steps. One compilation
    serves every length. Do not `vmap` it for speed: `jax.lax.map` over seeds is the fast way.

    Args:
      truncation: a law of `jtrunc.truncation`; a law that reads hₜ is evaluated on the way.

    Returns:
      A `GradientEstimator`; ``estimate.num_steps`` is L, data; rows of ``aux.loss`` from L on are zero.

    Raises:
      TypeError, ValueError: no law, no typed key for a random one, bad system, params or inputs, or a
        `given` law for another number of steps.

    Example: the window ends with the cut after its second step; the boundary inside it had c = 1/2.

      >>> from jtrunc import truncation
      >>> system = System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h, ()))
      >>> params, inputs = Params(jnp.float32(0.5)), jnp.ones(3, jnp.float32)
      >>> estimator = online_artbp(system, truncation.given(cuts=[0, 1, 0], probabilities=[0.5, 0.5, 0.5]))
      >>> estimate, state = estimator.update(params, estimator.init(params, jnp.float32(0)), inputs)
      >>> int(estimate.num_steps), float(estimate.loss), float(state.hidden)
      (2, 2.5, 1.5)
    """
    check_system("online_artbp", system)
    law = check_law("online_artbp", truncation)

    def init(params: Params, hidden: PyTree, key: jax.Array | None = None) -> OnlineArtbpState:
        check_params(params)
        check_key("online_artbp", key, law.random)
        return OnlineArtbpState(strongly_typed(hidden), key if law.random else ())

    def update(params: Params, state: OnlineArtbpState, inputs: PyTree) -> tuple[Estimate, OnlineArtbpState]:
        check_law("online_artbp", law, check_step(system, params, state.hidden, inputs))
        return sampled_window(system, law, params, state, inputs)

    return GradientEstimator(init, update)


def sampled_window(
    system: System, law: Truncation, params: Params, state: OnlineArtbpState, inputs: PyTree
) -> tuple[Estimate, OnlineArtbpState]:
    """Draws one window from `inputs` by a law, runs and differentiates it: the update of the estimator."""
    look_ahead = num_time_steps(inputs)
    anchored = anchor(params, state, inputs)
    params, pull_vary = jax.vjp(lambda params: vary(params, anchored), params)
    state, inputs = vary((state, inputs), anchored)
    key, draw = jax.random.split(state.key) if law.random else ((), None)
    parts = window_parts(system, params, state.hidden, inputs)
    if law.reads_hidden:
        boundaries, decide = _undecided(law, draw, look_ahead)
    else:
        boundaries, decide = _decided(law, draw, look_ahead), None
    boundaries = vary(boundaries, anchored)
    window = dynamic_window(parts, state.hidden, inputs, boundaries, decide)
    (grads,) = pull_vary(window.grads)
    cut = window.boundaries.state if decide is None else window.boundaries.state[1]
    diagnostics = {"look_ahead_hits": jnp.where(cut, 0, 1).astype(jnp.int32)}
    estimate = Estimate(window.loss, grads, window.boundaries.stop, Aux(window.aux, diagnostics))
    return estimate, OnlineArtbpState(window.hidden, key)


def _decided(law: Truncation, draw: Any, look_ahead: int) -> Boundaries:
    """All boundaries at once: the state is whether the window ends with a cut."""
    with jax.ensure_compile_time_eval():  # constants, unless the law's own parameters are traced
        c = probabilities(law, look_ahead)
        uncut_so_far = survival(law, look_ahead)
        edges = entering_edges(edge_weight(jnp.asarray(False), c))
    if law.random:
        # Written so that a law that went out of [0, 1), a nan, cuts nothing and ends in a nan gradient.
        uncut = ~(_small_uniform(draw) >= uncut_so_far)
    else:
        index = jnp.arange(look_ahead)
        cuts = jax.vmap(lambda i, c: law.cut(Boundary(i, i + 1), c, jnp.zeros(())))(index, c)
        uncut = jnp.cumsum(cuts) == 0
    num_uncut = jnp.sum(uncut, dtype=jnp.int32)
    stop = jnp.minimum(num_uncut + 1, look_ahead)
    return Boundaries(num_uncut < look_ahead, stop, edges)


def _small_uniform(key: jax.Array) -> jax.Array:
    """A uniform draw on [0, 1) from 64 bits: near 0, where long windows live, it keeps its precision."""
    high, low = jax.random.bits(key, (2,), jnp.uint32).astype(jnp.zeros((), dtype=float).dtype)
    below_one = 1.0 - jnp.finfo(high.dtype).epsneg
    return jnp.minimum(high * 2.0**-32 + low * 2.0**-64, below_one)


def _undecided(law: Truncation, draw: Any, look_ahead: int) -> tuple[Boundaries, Decide]:
    """One boundary after the other: the state is the walk, and whether the last boundary was cut."""

    def decide(step: jax.Array, hidden: PyTree, boundaries: Boundaries) -> Boundaries:
        walk, _ = boundaries.state
        uniform = jax.random.uniform(jax.random.fold_in(draw, step))
        walk, (cut, weight) = next_boundary(law, walk, hidden, uniform)
        return Boundaries(
            state=(walk, cut),
            stop=jnp.where(cut, step + 1, boundaries.stop),
            edges=boundaries.edges.at[step + 1].set(weight, mode="drop"),  # the last step has no next
        )

    start: tuple[Walk, jax.Array] = (start_walk(jnp.int32(0)), jnp.asarray(False))
    return Boundaries(start, jnp.int32(look_ahead), jnp.ones(look_ahead, dtype=float)), decide
