"""Systems from systems and estimators from estimators: resets, and batches of independent streams."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jtrunc.base import Estimate, GradientEstimator, Params, PyTree, System
from jtrunc.checks import check_key, check_same_state, check_system
from jtrunc.structure import Wrapper, wrap_structure, wrap_transition
from jtrunc.trees import is_concrete, strongly_typed


def with_resets(system: System, initial_hidden: PyTree) -> System:
    """The system on inputs ``(reset, x)``: a reset starts a new sequence before its step.

        h̃ₜ₋₁ = initial_hidden where resetₜ else hₜ₋₁,   hₜ = F(xₜ, h̃ₜ₋₁, θ)

    A reset cuts state, gradient and influence alike: nothing flows back across it. The loss sees x.

    Args:
      initial_hidden: a constant state like `hidden` (no gradient flows into it).

    Returns:
      A `System` whose `inputs` are pairs: `reset`, a boolean per step () or per stream (B,), which is
      matched with the leading axes of every leaf of the state, and the former inputs.

    Raises:
      TypeError, ValueError: no `System`; at trace time, a state unlike `initial_hidden`.

    Example: a counter that starts anew at its third step.

      >>> system = System(lambda theta, h, x: h + x, lambda params, h, x: (h, ()))
      >>> counter = with_resets(system, jnp.float32(0))
      >>> inputs = (jnp.array([False, False, True]), jnp.ones(3, jnp.float32))
      >>> from jtrunc import unroll
      >>> unroll(counter, Params(()), jnp.float32(0), inputs)[1][0].tolist()
      [1.0, 2.0, 1.0]
    """
    check_system("with_resets", system)
    initial_hidden = jax.lax.stop_gradient(strongly_typed(initial_hidden))

    def starting_at(initial: PyTree) -> Wrapper:
        def before(reset: jax.Array, hidden: PyTree) -> PyTree:
            check_same_state("with_resets: `initial_hidden`, against `hidden`,", hidden, initial)
            return jax.tree.map(lambda new, old: _where_rows(reset, new, old), initial, hidden)

        return Wrapper(before=before)

    def starting_layer(depth: int | None) -> Wrapper:
        return starting_at(initial_hidden if depth is None else initial_hidden[depth])

    return System(
        transition=wrap_transition(system.transition, starting_at(initial_hidden)),
        loss=lambda params, hidden, inputs: system.loss(params, hidden, inputs[1]),
        structure=wrap_structure(system.structure, starting_layer),
    )


def _where_rows(condition: jax.Array, on_true: Any, on_false: Any) -> Any:
    condition = jnp.asarray(condition, dtype=bool)
    condition = jnp.expand_dims(condition, tuple(range(condition.ndim, on_false.ndim)))
    return jnp.where(condition, on_true, on_false)


def per_stream(estimator: GradientEstimator) -> GradientEstimator:
    """B independent streams: `estimator` for each, with a key of its own; loss and gradient averaged.

        g = 1/B · Σ_b g^b,   loss = 1/B · Σ_b loss^b

    Unbiased for the mean loss wherever `estimator` is unbiased for one stream's. For the backward family a
    batch axis inside the system is about twice as fast; take this one where the streams must be cut apart.

    Args:
      estimator: on one stream, without a batch axis.

    Returns:
      A `GradientEstimator`: `init` takes `hidden` with leading axis B and one key; `update` takes `inputs`
      with axes (T, B, ...). The state has leading axis B; `num_steps` is one number where every stream
      consumes the same, else (B,); `aux` has axis B in front.

    Raises:
      ValueError: leaves of `hidden` without a common leading axis, or inputs without a second one.
    """

    def init(params: Params, hidden: PyTree, key: jax.Array | None = None) -> Any:
        sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(hidden)}
        if len(sizes) != 1 or sizes == {()}:
            raise ValueError(
                f"per_stream: leaves of `hidden` have leading axes {sorted(sizes)}; "
                "all need the same axis of streams"
            )
        if key is None:
            return jax.vmap(lambda hidden: estimator.init(params, hidden))(hidden)
        check_key("per_stream", key, random=True)
        keys = jax.random.split(key, next(iter(sizes))[0])
        return jax.vmap(lambda hidden, key: estimator.init(params, hidden, key))(hidden, keys)

    def update(params: Params, state: Any, inputs: PyTree) -> tuple[Estimate, Any]:
        known_steps = []

        def one_stream(state: Any, inputs: PyTree) -> tuple[Estimate, Any]:
            estimate, state = estimator.update(params, state, inputs)
            known_steps.append(is_concrete(estimate.num_steps))
            return estimate, state

        for leaf in jax.tree.leaves(inputs):
            if jnp.ndim(leaf) < 2:
                raise ValueError(
                    "per_stream: every leaf of `inputs` needs axes (time, streams, ...), "
                    f"not shape {jnp.shape(leaf)}"
                )
        estimates, states = jax.vmap(one_stream, in_axes=(0, 1))(state, inputs)
        mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), (estimates.loss, estimates.grads))
        steps = estimates.num_steps[0] if all(known_steps) else estimates.num_steps
        return Estimate(mean[0], mean[1], steps, estimates.aux), states

    return GradientEstimator(init, update)
