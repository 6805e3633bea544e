"""Anticipated reweighted truncated backpropagation, offline: cuts sampled inside a whole sequence."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.backward.truncation import Boundary, Truncation, check_law, edge_weight, entering_edges
from jtrunc.backward.unroll import Window, weighted_edge, window_gradient
from jtrunc.base import Aux, Estimate, GradientEstimator, Params, PyTree, System
from jtrunc.checks import check_key, check_params, check_step, check_system
from jtrunc.devices import anchor, vary
from jtrunc.trees import strongly_typed


class ArtbpState(NamedTuple):
    """The state between updates.

    Attributes:
      hidden: h after the last step.
      elapsed: int32, steps since the last cut.
      key: a typed key, or () for laws that draw nothing.
    """

    hidden: PyTree
    elapsed: jax.Array
    key: Any


def artbp(system: System, truncation: Truncation) -> GradientEstimator:
    """ARTBP over a whole sequence: random cuts, reweighted so that the gradient is unbiased.

        λₜ = ∂ℓₜ/∂hₜ + wₜ₊₁ (∂hₜ₊₁/∂hₜ)ᵀ λₜ₊₁,   wₜ₊₁ = 0 with probability cₜ, else 1/(1 − cₜ)

    ARTBP paper (Tallec & Ollivier 2017), eq. 10 to 12, with the local start at t = T that eq. 9 omits
    (errata 1): no factor there. The factor multiplies what comes from the future, never the local term, and
    never the readout's gradient (errata 4).

    Unbiased, over the cuts, for the exact gradient of the sum of the losses of `inputs` given the hidden
    state that enters as a constant, for any law that is random with the probabilities that it states
    (`truncation.every` is not: it gives truncated BPTT). Cuts follow one process along the stream: the
    position of the last is carried from update to update, and each boundary is drawn once.

    Memory O(T), time O(T): a weight of 0 frees no memory. `online_artbp` has the memory of a window.

    Args:
      truncation: a law of `jtrunc.truncation`.

    Returns:
      A `GradientEstimator`; `update` consumes all T steps of `inputs`. Diagnostics: `num_cuts`.

    Raises:
      TypeError, ValueError: no law, no typed key for a random one, bad system, params or inputs, or a
        `given` law for another number of steps.

    Example: hₜ = θ hₜ₋₁ + 1, ℓₜ = hₜ, T = 3. The boundary after the second step is left uncut at c = 1/2, so
    what flows back across it, dh₃/dh₂ · dh₂/dθ = θ · 1, counts twice: 1 + (1 + θ) + … = 1 + 1.5 + 2 θ.

      >>> from jtrunc import truncation
      >>> system = System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h, ()))
      >>> params, inputs = Params(jnp.float32(0.5)), jnp.ones(3, jnp.float32)
      >>> estimator = artbp(system, truncation.given(cuts=[0, 0, 0], probabilities=[0.0, 0.5, 0.0]))
      >>> estimate, _ = estimator.update(params, estimator.init(params, jnp.float32(0)), inputs)
      >>> float(estimate.grads.recurrent)
      3.5
    """
    check_system("artbp", system)
    law = check_law("artbp", truncation)

    def init(params: Params, hidden: PyTree, key: jax.Array | None = None) -> ArtbpState:
        check_params(params)
        check_key("artbp", key, law.random)
        return ArtbpState(strongly_typed(hidden), jnp.int32(0), key if law.random else ())

    def update(params: Params, state: ArtbpState, inputs: PyTree) -> tuple[Estimate, ArtbpState]:
        num_steps = check_step(system, params, state.hidden, inputs)
        check_law("artbp", law, num_steps)
        key, uniforms = draw_uniforms(law, state.key, num_steps)
        if law.reads_hidden:
            result, walk, cuts = _cut_on_the_way(system, law, params, state, inputs, uniforms)
            hidden, aux = result.hidden[0], result.aux[0]
        else:
            walk, (cuts, weights) = all_boundaries(law, state.elapsed, uniforms)
            hidden = vary(state.hidden, anchor(weights))  # as the cotangents will
            result = window_gradient(system, params, hidden, inputs, Window(entering_edges(weights)))
            hidden, aux = result.hidden, result.aux
        diagnostics = {"num_cuts": jnp.sum(cuts, dtype=jnp.int32)}
        estimate = Estimate(result.loss, result.grads, np.int32(num_steps), Aux(aux, diagnostics))  # pyright: ignore
        return estimate, ArtbpState(hidden, walk.elapsed, key)

    return GradientEstimator(init, update)


class Walk(NamedTuple):
    """Where a law stands between two boundaries: the next step's index, and the steps since the last cut."""

    index: jax.Array
    elapsed: jax.Array


def start_walk(elapsed: jax.Array) -> Walk:
    """Before step 0, `elapsed` steps after the last cut."""
    return Walk(jnp.int32(0), elapsed)


def next_boundary(
    law: Truncation, walk: Walk, hidden: PyTree, uniform: jax.Array
) -> tuple[Walk, tuple[jax.Array, jax.Array]]:
    """Decides the boundary after the present step: ``(walk, (cut, weight))``."""
    boundary = Boundary(walk.index, walk.elapsed + 1, hidden)
    c = law.probability(boundary)
    cut = law.cut(boundary, c, uniform)
    elapsed = jnp.where(cut, 0, boundary.elapsed)
    return Walk(walk.index + 1, elapsed), (cut, edge_weight(cut, c))


def all_boundaries(
    law: Truncation, elapsed: jax.Array, uniforms: jax.Array
) -> tuple[Walk, tuple[jax.Array, jax.Array]]:
    """Every boundary of a law that does not read the hidden state: ``(walk, (cuts, weights))``, (T,) each."""

    def step(walk: Walk, uniform: jax.Array) -> tuple[Walk, tuple[jax.Array, jax.Array]]:
        return next_boundary(law, walk, None, uniform)

    return jax.lax.scan(step, vary(start_walk(elapsed), anchor(elapsed, uniforms)), uniforms)


def draw_uniforms(law: Truncation, key: Any, num_steps: int) -> tuple[Any, jax.Array]:
    """The next key and one uniform draw a boundary; laws that draw nothing get zeros and keep no key."""
    if not law.random:
        return key, jnp.zeros(num_steps)
    key, draw = jax.random.split(key)
    return key, jax.random.uniform(draw, (num_steps,))


def _cut_on_the_way(
    system: System, law: Truncation, params: Params, state: ArtbpState, inputs: PyTree, uniforms: jax.Array
) -> tuple[Any, Walk, jax.Array]:
    """A law that reads hₜ decides inside the scan: the system carries its walk and the next edge's weight."""

    def transition(theta: PyTree, carried: Any, xs: Any) -> Any:
        hidden, walk, weight = carried
        inputs_t, uniform = xs
        hidden = system.transition(theta, weighted_edge(weight, hidden), inputs_t)
        walk, (_, weight) = next_boundary(law, walk, jax.lax.stop_gradient(hidden), uniform)
        return hidden, walk, jax.lax.stop_gradient(weight)

    def loss(params: Params, carried: Any, xs: Any) -> tuple[jax.Array, Any]:
        hidden, walk, _ = carried
        value, aux = system.loss(params, hidden, xs[0])
        return value, (aux, walk.elapsed == 0)

    anchored = anchor(state, uniforms)
    carried = vary((state.hidden, start_walk(state.elapsed), jnp.ones((), dtype=float)), anchored)
    result = window_gradient(System(transition, loss), params, carried, (inputs, uniforms))
    return result, result.hidden[1], result.aux[1]
