"""Real-time recurrent learning: the influence itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import GradientEstimator, Params, PyTree, System
from jtrunc.checks import check_size, check_system
from jtrunc.coordinates import Coordinates
from jtrunc.forward.influence import ForwardState, Representation, StepEstimate, forward_estimator, observe
from jtrunc.forward.layers import Layers, layer_jacobians, layer_steps, layers_of, pull_layers
from jtrunc.forward.sparsity import UnreadableError, immediate_rows
from jtrunc.forward.window import basis, exact_window, multiply, rows_like, split_last
from jtrunc.linearize import linear_step


def rtrl(system: System, *, memory_limit: int | None = None) -> GradientEstimator:
    """Real-time recurrent learning: the exact influence J = ∂h/∂θ, carried forward.

        Jₜ = Dₜ Jₜ₋₁ + Iₜ,   gₜ = ∂ℓₜ/∂θ + ∂ℓₜ/∂hₜ · Jₜ,   D = ∂F/∂h, I = ∂F/∂θ

    Unbiased: exact for the gradient of the losses of `inputs` through all of the past, at fixed θ; while θ
    moves, the derivative along the trajectory of parameters (errata 22). Memory S · |θ| numbers, whatever
    the length; cost S² · |θ| a step: one matrix product. I costs no more than a few vector-Jacobian products,
    because each parameter touches few units: a declared structure says which, else the program is read.
    For many streams use `per_stream`: a batch axis inside the system is one large state here.

    Args:
      memory_limit: the most bytes that J may take, or None.

    Returns:
      A `GradientEstimator`; `update` consumes all of `inputs`.

    Raises:
      TypeError, ValueError: bad system; at trace time, J beyond `memory_limit`, bad params or inputs.

    Example: the gradient of each step, with h₃ = 1 + θ + θ² and so ∂h₃/∂θ = 1 + 2θ.

      >>> system = System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h, ()))
      >>> params, one = Params(jnp.float32(0.5)), jnp.ones(1, jnp.float32)
      >>> estimator = rtrl(system)
      >>> state = estimator.init(params, jnp.float32(0))
      >>> for step in range(3):
      ...     estimate, state = estimator.update(params, state, one)
      ...     print(float(estimate.grads.recurrent))
      0.0
      1.0
      2.0

    Source: Williams & Zipser (1989); NoBackTrack paper (2015), eq. 3 to 6.
    """
    check_system("rtrl", system)
    if memory_limit is not None:
        check_size("rtrl", "memory_limit", memory_limit)

    def init(params: Params, hidden: PyTree, key: jax.Array | None) -> ForwardState:
        make = partial(rows_like, params.recurrent, Coordinates.of(hidden))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(make)))
        if memory_limit is not None and size > memory_limit:
            raise ValueError(
                f"rtrl: the influence takes {size:,} bytes, more than `memory_limit` = {memory_limit:,}; "
                "take `uoro` or `nobacktrack` (memory of θ), `snap`, or a higher limit"
            )
        return ForwardState(hidden, make())

    advance = partial(_advance, system)
    window = partial(exact_window, system)
    return forward_estimator("rtrl", system, Representation(init, advance, window=window))


def _advance(
    system: System, params: Params, state: ForwardState, inputs: PyTree
) -> tuple[StepEstimate, ForwardState]:
    """One step: one product with D, and with c D as one row more, so that c J costs no pass of its own."""
    layers = layers_of(system.structure, params.recurrent, state.hidden)
    linearise = _dense_step if layers is None else partial(_structured_step, layers)
    step = linearise(system, params.recurrent, state.hidden, inputs)
    seen = observe(system, params, step.hidden, inputs)
    jacobian = jnp.concatenate([step.jacobian, (seen.cotangent @ step.jacobian)[None]])
    moved, through = split_last(multiply(jacobian, state.influence))
    influence = jax.tree.map(lambda a, b: a + b.astype(a.dtype), moved, step.immediate)
    through = jax.tree.map(lambda a, b: a + b.astype(a.dtype), through, step.pull(seen.cotangent))
    return seen.add(through), ForwardState(step.hidden, influence)


class DenseStep(NamedTuple):
    """hₜ, D (S, S), I with leaves (S, ...), and ``c -> cᵀ I``."""

    hidden: PyTree
    jacobian: jax.Array
    immediate: PyTree
    pull: Callable[[jax.Array], PyTree]


def _dense_step(system: System, theta: PyTree, hidden: PyTree, inputs: PyTree) -> DenseStep:
    """Any transition: D from S vector-Jacobian products, I from one a colour where its sparsity is known."""
    step = linear_step(system.transition, theta, hidden, inputs)
    space = Coordinates.of(hidden)
    rows = basis(space, theta, hidden, inputs)
    jacobian = jax.vmap(lambda row: step.pull_both(row)[1])(rows)
    try:
        immediate = immediate_rows(system.transition, theta, hidden, inputs, step.pull)
    except (ImportError, UnreadableError):
        immediate = jax.vmap(step.pull)(rows)
    return DenseStep(step.hidden, jacobian, immediate, step.pull)


def _structured_step(
    layers: Layers, system: System, theta: PyTree, hidden: PyTree, inputs: PyTree
) -> DenseStep:
    """D = L diag(D₁, D₂, …), I = L I_local: L carries a layer's new state into the layers above it."""
    steps = layer_steps(layers, theta, hidden, inputs)
    upward, own = layer_jacobians(layers, steps)

    def pull(cotangent: jax.Array) -> PyTree:
        return pull_layers(layers, steps, cotangent @ upward)

    immediate = jax.vmap(partial(pull_layers, layers, steps))(upward)
    return DenseStep(layers.join([step.step.hidden for step in steps]), upward @ own, immediate, pull)
