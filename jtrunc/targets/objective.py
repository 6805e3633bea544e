"""The objective of target propagation: the states between blocks are variables, tied to their predictions."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import Params, PyTree, System
from jtrunc.checks import check_alike, check_choice, check_size, check_step, check_system, shown
from jtrunc.targets.blocks import cut_into_blocks, num_blocks_of, run_blocks
from jtrunc.targets.constraints import Constraint, check_constraint, check_penalty, quadratic, residual_of
from jtrunc.trees import inexact_part, inner_product, repeated, strongly_typed

LossOn = Literal["predicted", "free"]


class Terms(NamedTuple):
    """What the objective is made of.

    Attributes:
      loss: Σ ℓₜ, nats.
      constraint: Σ C over the blocks, without λ.
      predicted: ĥ, the ends of the blocks by the recurrence, leaves (N, ...).
      residual: r = h − ĥ of the float leaves, None for others.
      aux: that of the system's loss, leaves (T, ...).
    """

    loss: jax.Array
    constraint: jax.Array
    predicted: PyTree
    residual: PyTree
    aux: PyTree


def objective(
    system: System,
    params: Params,
    start: PyTree,
    free: PyTree,
    inputs: PyTree,
    *,
    block_length: int,
    penalty: Any,
    multipliers: PyTree = None,
    constraint: Constraint = quadratic,
    loss_on: LossOn = "predicted",
) -> tuple[jax.Array, Terms]:
    """The Lagrangian of target propagation over a window or a whole data set.

        L(H, θ, y) = Σₜ ℓₜ + Σ_b Re⟨y_b, h_b − ĥ_b⟩ + λ Σ_b C(ĥ_b, h_b),    ĥ_b = F(… F(h_{b−1}) …), B steps

    h_b, the state at the end of block b, is a variable; h_0 is `start`; states inside a block are implicit.
    y = λu are the multipliers: with C = ½‖h − ĥ‖² this is eq. 7 of Wiseman et al. (2017) less its term
    λ/2 ‖u‖², which is no constant in u (errata 25). Sums over all steps, blocks and entries; nothing is
    divided by B. Where the loss is a mean over S streams, λ/S is the paper's λ.

    Differentiable in `params`, `free` and `multipliers`. All blocks run side by side: B sequential steps.

    Args:
      start: h_0.
      free: H, leaves (N, ...), N = ⌈T/B⌉ (see `forward_states`).
      inputs: leaves (T, ...); if T is no multiple of B, the first block is the shorter one.
      block_length: B ≥ 1, steps.
      penalty: λ.
      multipliers: y, like the float leaves of `free` (None for others); None for 0.
      constraint: C, see `quadratic` and `kullback_leibler`.
      loss_on: the loss of a block's last step reads ĥ_b ("predicted", eq. 6) or h_b ("free", eq. 8).

    Returns:
      ``(value, Terms)``.

    Raises:
      TypeError, ValueError: bad system, params, inputs, block length, λ, `constraint` or `loss_on`; `free`
        without N rows.

    Example: hₜ = θ hₜ₋₁ + 1, ℓₜ = hₜ, blocks of two steps; the free states 1 and 2 against ĥ = 1.5 and 1.75.

      >>> system = System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h, ()))
      >>> params, inputs = Params(jnp.float32(0.5)), jnp.ones(4, jnp.float32)
      >>> value, terms = objective(
      ...     system, params, jnp.float32(0), jnp.float32([1, 2]), inputs, block_length=2, penalty=2.0)
      >>> terms.predicted.tolist(), float(terms.loss), float(value)
      ([1.5, 1.75], 5.75, 6.0625)
    """
    check_system("objective", system)
    check_size("objective", "block_length", block_length)
    check_choice("objective", "loss_on", loss_on, LossOn)
    check_penalty("objective", penalty)
    check_constraint("objective", constraint)
    start, free = strongly_typed((start, free))
    length = check_step(system, params, start, inputs)
    expected = num_blocks_of(length, block_length)
    wanted = f"`start` with {expected} rows ({length} steps in blocks of {block_length})"
    check_alike("objective", "free", free, wanted, jax.eval_shape(partial(repeated, count=expected), start))
    if multipliers is not None:
        check_alike("objective", "multipliers", multipliers, "the float leaves of `free`", inexact_part(free))
    starts = starts_of(start, free)
    terms = block_terms(system, params, starts, free, inputs, block_length, constraint, loss_on)
    return lagrangian(terms, penalty, multipliers), terms


def starts_of(start: PyTree, free: PyTree) -> PyTree:
    """What each block begins with: the state that enters, then the free ends of those before, (N, ...)."""
    return jax.tree.map(lambda first, ends: jnp.concatenate([first[None], ends[:-1]]), start, free)


def block_terms(
    system: System,
    params: Params,
    starts: PyTree,
    free: PyTree,
    inputs: PyTree,
    block_length: int,
    constraint: Constraint,
    loss_on: LossOn,
) -> Terms:
    """The terms of the objective, from the states that the blocks begin with and are asked to end with."""
    start = jax.tree.map(lambda leaf: leaf[0], starts)
    blocks = cut_into_blocks(system, start, inputs, block_length)
    read = free if loss_on == "free" else None
    predicted, (loss, aux) = run_blocks(blocks, params, starts, read)
    costs = jax.vmap(partial(_cost, constraint), in_axes=(None, 0, 0))(params, predicted, free)
    return Terms(loss, jnp.sum(costs), predicted, residual_of(predicted, free), aux)


def _cost(constraint: Constraint, params: Params, predicted: PyTree, free: PyTree) -> jax.Array:
    value = constraint(params, predicted, free)
    scalar = hasattr(value, "dtype") and value.shape == () and jnp.issubdtype(value.dtype, jnp.floating)
    if not scalar:
        raise ValueError(
            "target propagation: `constraint(params, predicted, free)` must return a real scalar, not "
            f"{shown(value)}; sum over the state"
        )
    return value


def lagrangian(terms: Terms, penalty: Any, multipliers: PyTree) -> jax.Array:
    """Σℓ + Σ⟨y, r⟩ + λ ΣC; multipliers None or () are 0."""
    value = terms.loss + penalty * terms.constraint
    if not jax.tree.leaves(multipliers):
        return value
    return value + inner_product(multipliers, terms.residual)
