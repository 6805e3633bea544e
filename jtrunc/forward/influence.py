"""The one forward recursion: Jₜ ≈ Dₜ Jₜ₋₁ + Iₜ, gₜ = ∂ℓₜ/∂θ + ∂ℓₜ/∂hₜ · Jₜ.

J = ∂h/∂θ is the influence of the parameters on the hidden state, D = ∂F/∂h and I = ∂F/∂θ are those of one
transition. How J is represented is the algorithm: dense, masked, diagonal, pairs of vectors, Kronecker
factors. The engine runs the system, takes the loss's own derivatives exactly, and adds what the influence
contributes; a `Representation` says how it is begun and how one step changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.base import Aux, Estimate, GradientEstimator, Params, PyTree, System
from jtrunc.checks import check_key, check_params, check_step
from jtrunc.coordinates import Coordinates
from jtrunc.devices import anchor, vary
from jtrunc.trees import (
    accumulator,
    add_into,
    cast_like,
    num_time_steps,
    partition_inexact,
    strongly_typed,
    wide_dtype,
)


class ForwardState(NamedTuple):
    """The state of a deterministic estimator: h after the last step, and its influence J."""

    hidden: PyTree
    influence: PyTree


class RandomForwardState(NamedTuple):
    """The state of a random estimator: h after the last step, its influence, the key of draw `num_draws`."""

    hidden: PyTree
    influence: PyTree
    key: jax.Array
    num_draws: jax.Array


def counter_key(key: jax.Array) -> jax.Array:
    """A key whose draws are the same one by one and many at a time, which those of "rbg" keys are not."""
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return key
    words = jax.random.key_data(key).ravel()
    return jax.random.wrap_key_data(words[:2], impl="threefry2x32")


def draw_key(state: Any) -> jax.Array:
    """The key of a state's next draw: keys of many steps are known at once."""
    return jax.random.fold_in(state.key, state.num_draws)


def draw_keys(state: Any, length: int) -> jax.Array:
    """The keys of the next `length` draws."""
    return jax.vmap(partial(jax.random.fold_in, state.key))(
        state.num_draws + jnp.arange(length, dtype=jnp.uint32)
    )


class StepEstimate(NamedTuple):
    """What one step contributes: its loss, its part of the gradient, the aux of its loss."""

    loss: jax.Array
    grads: Params
    aux: PyTree


class Observation(NamedTuple):
    """What the loss says at one step: ℓₜ, aux, its direct gradient, and c = ∂ℓₜ/∂hₜ as a vector (S,)."""

    loss: jax.Array
    aux: PyTree
    direct: Params
    cotangent: jax.Array

    def add(self, through: PyTree) -> StepEstimate:
        """The step's estimate: the direct gradient, and what came through the hidden state."""
        direct = cast_like(self.direct.recurrent, through)
        recurrent = jax.tree.map(jnp.add, through, direct)
        return StepEstimate(self.loss, Params(recurrent, self.direct.readout), self.aux)


class Representation(NamedTuple):
    """A representation of the influence.

    Attributes:
      init: ``(params, hidden, key) -> state``, zero influence; a NamedTuple with a field `hidden`.
      advance: ``(params, state, inputs) -> (StepEstimate, state)``: one step. It makes the new hidden state,
        moves the influence on, and pulls the loss's cotangent back through it, in the order of the algorithm.
      span: steps of `inputs` that one `advance` takes at once.
      window: like `advance`, for several steps at once, where that is faster: the result is the same. Its
        estimate has the summed loss, and aux stacked over time. None where it does not apply.
    """

    init: Callable[[Params, PyTree, jax.Array | None], Any]
    advance: Callable[[Params, Any, PyTree], tuple[StepEstimate, Any]]
    span: int = 1
    window: Callable[[Params, Any, PyTree], tuple[StepEstimate, Any] | None] = lambda *_: None


def observe(system: System, params: Params, hidden: PyTree, inputs: PyTree) -> Observation:
    """The loss of one step with its derivatives at fixed hₜ: always exact."""
    leaves, restore = partition_inexact(hidden)

    def loss(params: Params, leaves: list[jax.Array]) -> tuple[jax.Array, PyTree]:
        return system.loss(params, restore(leaves), inputs)

    (value, aux), (direct, bars) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, leaves)
    return Observation(value, aux, direct, Coordinates.of(hidden).cotangent_vector(bars))


def forward_estimator(
    owner: str, system: System, representation: Representation, *, random: bool = False
) -> GradientEstimator:
    """The estimator that carries the influence in this representation, over windows of any length."""
    span = representation.span

    def init(params: Params, hidden: PyTree, key: jax.Array | None = None) -> Any:
        check_params(params)
        check_key(owner, key, random)
        if not Coordinates.of(hidden).size:
            raise ValueError(f"{owner}: `hidden` has no floating-point entries, which θ could influence")
        key = None if key is None else counter_key(key)
        return strongly_typed(representation.init(strongly_typed(params), hidden, key))

    def update(params: Params, state: Any, inputs: PyTree) -> tuple[Estimate, Any]:
        params = strongly_typed(params)
        length = check_step(system, params, state.hidden, inputs)
        if length % span:
            raise ValueError(
                f"{owner}: `inputs` has {length} steps, which is no multiple of memory={span}; "
                "give whole groups of steps"
            )
        if span > 1:
            inputs = jax.tree.map(lambda leaf: leaf.reshape(-1, span, *leaf.shape[1:]), inputs)
        estimate, state = _window(params, state, inputs, representation)
        aux = estimate.aux
        if span > 1:
            aux = jax.tree.map(lambda leaf: leaf.reshape(length, *leaf.shape[2:]), aux)
        grads = cast_like(estimate.grads, params)
        return Estimate(estimate.loss, grads, np.int32(length), Aux(aux, {})), state  # pyright: ignore

    update.__qualname__ = f"{owner}.{update.__name__}"  # runs and messages name the algorithm by it
    return GradientEstimator(init, update)


def _window(
    params: Params, state: Any, inputs: PyTree, representation: Representation
) -> tuple[StepEstimate, Any]:
    """One step after the other; a window of one step is not wrapped into a loop."""
    if num_time_steps(inputs) == 1:
        first = jax.tree.map(lambda leaf: leaf[0], inputs)
        (loss, grads, aux), state = representation.advance(params, state, first)
        aux = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], aux)
        return StepEstimate(loss.astype(wide_dtype(loss)), grads, aux), state

    together = representation.window(params, state, inputs)
    if together is not None:
        return together

    def body(carry: Any, inputs_t: PyTree) -> tuple[Any, Any]:
        state, total = carry
        estimate, state = representation.advance(params, state, inputs_t)
        return (state, add_into(total, estimate.grads)), (estimate.loss, estimate.aux)

    carry = vary((state, accumulator(params)), anchor(params, state, inputs))
    (state, grads), (losses, aux) = jax.lax.scan(body, carry, inputs)
    return StepEstimate(jnp.sum(losses, dtype=wide_dtype(losses)), grads, aux), state
