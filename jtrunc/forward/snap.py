"""Sparse n-step approximation of the influence."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.base import GradientEstimator, Params, PyTree, System
from jtrunc.checks import check_size, check_system
from jtrunc.coordinates import Coordinates
from jtrunc.forward.influence import ForwardState, Representation, StepEstimate, forward_estimator, observe
from jtrunc.forward.local import UnitMask, local_representation, own_propagator
from jtrunc.forward.sparsity import immediate_rows, pattern_of, unit_pattern
from jtrunc.forward.structured import Units, units_of
from jtrunc.forward.window import basis, multiply, rows_like
from jtrunc.linearize import linear_step


def snap(system: System, order: int) -> GradientEstimator:
    """SnAp-n: the influence on the entries that n steps can fill, all others dropped.

        Jₜ = Mₙ ∘ (Dₜ Jₜ₋₁ + Iₜ),   M₁ = pattern(I),   Mₙ = pattern(D) Mₙ₋₁ ∪ M₁

    Biased: an influence that takes more than n steps to reach a unit is dropped, for ever. With n growing Mₙ
    fills up and SnAp-n becomes `rtrl`; in a densely connected network n = 2 is enough. Patterns are those of
    the program: one-hot inputs and dead units erase nothing. With n = 1 and a `Structure`, memory s |θ| and
    cost O(s² |θ|) for s numbers of state a unit; else the memory and cost of `rtrl`. Read off a program, a
    lookup ``E[x]`` counts as touching all of E: write ``one_hot(x) @ E``, or declare a structure.

    Args:
      order: n ≥ 1.

    Returns:
      A `GradientEstimator` for one stream; `update` consumes all of `inputs`.

    Raises:
      TypeError, ValueError: bad system or order; at trace time, bad params or inputs.
      ImportError: the patterns cannot be read (jtrunc[sparsity] is missing).

    Example: two units that only read each other have nothing on the diagonal to keep.

      >>> transition = lambda theta, h, x: jnp.array([theta[0] * h[1], theta[1] * h[0]]) + x
      >>> system = System(transition, lambda params, h, x: (h.sum(), ()))
      >>> params, inputs = Params(jnp.ones(2)), jnp.ones(4)
      >>> for n in (1, 2):
      ...     estimator = snap(system, n)
      ...     estimate, _ = estimator.update(params, estimator.init(params, jnp.zeros(2)), inputs)
      ...     print(estimate.grads.recurrent.tolist())
      [6.0, 6.0]
      [10.0, 10.0]

    Source: Menick et al., "Practical real time recurrent learning with a sparse approximation" (2021).
    """
    check_system("snap", system)
    check_size("snap", "order", order)
    local = local_representation("snap", system, own_propagator, mask_of=partial(_unit_mask, system))

    def is_local(params: Params, hidden: PyTree) -> bool:
        return order == 1 and units_of(system.structure, params.recurrent, hidden) is not None

    def init(params: Params, hidden: PyTree, key: jax.Array | None) -> ForwardState:
        if is_local(params, hidden):
            return local.init(params, hidden, key)
        return ForwardState(hidden, rows_like(params.recurrent, Coordinates.of(hidden)))

    def advance(params: Params, state: ForwardState, inputs: PyTree) -> tuple[StepEstimate, ForwardState]:
        if is_local(params, state.hidden):
            return local.advance(params, state, inputs)
        return _advance(system, order, params, state, inputs)

    return forward_estimator("snap", system, Representation(init, advance))


def _unit_mask(system: System, units: Units, theta: PyTree, hidden: PyTree, inputs: PyTree) -> UnitMask:
    maps, elementwise = unit_pattern(units, theta, hidden, inputs)
    return UnitMask(maps, elementwise)


def _advance(
    system: System, order: int, params: Params, state: ForwardState, inputs: PyTree
) -> tuple[StepEstimate, ForwardState]:
    theta, hidden = params.recurrent, state.hidden
    step = linear_step(system.transition, theta, hidden, inputs)
    seen = observe(system, params, step.hidden, inputs)
    space = Coordinates.of(hidden)
    rows = basis(space, theta, hidden, inputs)
    jacobian = jax.vmap(lambda row: step.pull_both(row)[1])(rows)
    immediate = immediate_rows(system.transition, theta, hidden, inputs, step.pull)
    moved = multiply(jacobian, state.influence)
    masks = _masks(system, order, theta, hidden, inputs)
    influence = jax.tree.map(
        lambda old, new, mask: jnp.where(mask, old + new.astype(old.dtype), 0), moved, immediate, masks
    )
    through = jax.tree.map(lambda leaf: leaf[0], multiply(seen.cotangent[None], influence))
    return seen.add(through), ForwardState(step.hidden, influence)


def _masks(system: System, order: int, theta: PyTree, hidden: PyTree, inputs: PyTree) -> PyTree:
    """Mₙ, a tree like θ with leaves (S, ...)."""
    pattern = pattern_of(system.transition, theta, hidden, inputs)
    mask = pattern.by_theta
    for _ in range(order - 1):
        mask = (pattern.by_hidden.astype(np.float32) @ mask.astype(np.float32) > 0) | pattern.by_theta
    leaves, treedef = jax.tree.flatten(theta)
    stops = np.cumsum([np.size(leaf) for leaf in leaves])[:-1]
    parts = np.split(mask, stops, axis=1)
    return jax.tree.unflatten(
        treedef, [part.reshape(len(mask), *np.shape(leaf)) for part, leaf in zip(parts, leaves, strict=True)]
    )
