"""Target propagation as a gradient estimator: penalty, ADMM and augmented Lagrangian methods."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jtrunc.backward.unroll import run_only
from jtrunc.base import Aux, Estimate, GradientEstimator, Params, PyTree, System
from jtrunc.checks import check_key, check_params, check_step
from jtrunc.devices import anchor, vary
from jtrunc.targets.blocks import cut_into_blocks, forward_states
from jtrunc.targets.constraints import Constraint, quadratic
from jtrunc.targets.objective import LossOn, Terms, block_terms, lagrangian, starts_of
from jtrunc.targets.options import (
    Initial,
    Method,
    Options,
    Penalty,
    check_hidden,
    check_options,
    check_state,
    check_window,
    penalty_at,
)
from jtrunc.targets.state import OfBlocks, TargetState, read_window, write_window
from jtrunc.trees import (
    inexact_part,
    inner_product,
    is_key,
    read_row,
    repeated,
    strongly_typed,
    with_inexact_part,
    write_row,
)


def target_propagation(
    system: System,
    block_length: int,
    penalty: Penalty,
    method: Method = "admm",
    hidden_steps: int = 1,
    *,
    hidden_optimizer: optax.GradientTransformation | None = None,
    dual_optimizer: optax.GradientTransformation | None = None,
    constraint: Constraint = quadratic,
    loss_on: LossOn = "predicted",
    initial: Initial = "forward",
    num_blocks: int | None = None,
    axis_name: str | None = None,
) -> GradientEstimator:
    """Target propagation: states between blocks of B steps are variables, and the blocks run in parallel.

        L(H, θ, y) = Σₜ ℓₜ + Σ_b Re⟨y_b, r_b⟩ + λ Σ_b C(ĥ_b, h_b),  r_b = h_b − ĥ_b,  ĥ_b = F(… F(h_{b−1}) …)
        admm:                  H ← H − η ∇_H L, `hidden_steps` times;  g = ∇_θ L;  y ← y + λ r
        penalty:               the same without y
        augmented_lagrangian:  as admm, but the last step on H is taken with g, from the same point

    (Wiseman et al. 2017, eq. 6 to 8 and section 3; for the sums see `jtrunc.targets.objective`.) y = λu are
    the multipliers, moved by the residual (errata 25). The step on θ is the caller's, one an update. Where H
    is kept, y moves before g, so that θ, H and y each step from the newest of the other two.

    Biased for the gradient of Σ ℓ at finite λ, and wherever H is not yet optimal: it is the gradient of
    another function. Exact where r = 0 and −y are the costates, which is where ADMM and the augmented
    Lagrangian settle at fixed θ. From the forward states with no step on H it is BPTT cut at the ends of the
    blocks, for every λ (errata 26): B = T is BPTT, B = 1 with steps on H the algorithm of section 2. Of an
    update with fewer blocks than the data set, h_N is a constant for the next, which sends nothing back.

    Sequential depth: B steps for each step on H and for g (augmented_lagrangian: `hidden_steps` · B in all
    if H persists, B more if not), and T more for ``initial="forward"`` and for a first visit; BPTT has T.
    Memory O(T), and one state, multiplier and optimiser state for each block of the data set with
    `num_blocks`.

    Args:
      system: a `System`.
      block_length: B ≥ 1, steps. If the T steps of an update are no multiple, its first block is shorter.
      penalty: λ ≥ 0, or a schedule ``count of updates -> λ`` such as those of optax.
      method: see above. `hidden_steps` = 0 leaves H where it starts.
      hidden_steps: gradient steps on H in an update.
      hidden_optimizer: an optax optimiser of H; ``optax.sgd(0.1)`` by default. Each block has its own: a
        clipped norm, say, is that of one block, streams included. With "forward" it starts anew like H.
      dual_optimizer: an optax optimiser that ascends along λ r; ``optax.sgd(1.0)`` by default, u ← u + r.
      constraint: C ≥ 0, ``(params, predicted, free) -> scalar`` for one block's state.
      loss_on: the loss of a block's last step reads ĥ_b ("predicted", eq. 6) or h_b ("free", eq. 8).
      initial: where H starts in every update: "forward", at the true states of the present θ (the paper's
        minibatch mode; one pass over all T steps); "persistent", where the last visit to these blocks left it
        (batch mode); "predicted", at the ĥ of the last visit: parallel too, and it follows θ. Blocks never
        visited start at the forward states. Integer and key leaves are no variables: "persistent" keeps
        those of the first visit.
      num_blocks: blocks of the whole data set, a multiple of those of an update. What belongs to a block is
        then kept until the data come round again, every round beginning with the state given to `init`.
        Every update must then have the same number of steps. None: every update brings new data, no
        multipliers are kept, and ADMM is the penalty method.
      axis_name: under `jax.shard_map`, the mesh axis over which the time axis of `inputs` and the per-block
        state are split, in order (see `jtrunc.targets.partition_specs`); each update is the whole data set.
        Only the states between devices and sums of gradients travel. H begins as `hidden` in every block.

    Returns:
      A `GradientEstimator`; `update` consumes all T steps. The loss is Σ ℓ at (H, θ), without the penalty;
      `hidden` moves on to the true state at the end ("forward"), to h_N or to ĥ_N. Diagnostics:
      `primal_residual` ‖r‖ and `dual_residual` ‖∇_H L‖ where g is taken, `constraint` Σ C, `penalty` λ.

    Raises:
      TypeError, ValueError: for arguments that do not fit, by name; bad system, params or inputs.

    Example: hₜ = θ hₜ₋₁ + 1, ℓₜ = hₜ, cut after two of four steps; ∂h₃/∂h₂ · ∂h₂/∂θ = 0.5 is missing, and so
    is ∂h₄/∂h₂ · ∂h₂/∂θ = 0.25.

      >>> system = System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h, ()))
      >>> params, inputs = Params(jnp.float32(0.5)), jnp.ones(4, jnp.float32)
      >>> estimator = target_propagation(system, block_length=2, penalty=1.0, hidden_steps=0)
      >>> estimate, state = estimator.update(params, estimator.init(params, jnp.float32(0)), inputs)
      >>> float(estimate.grads.recurrent), float(state.hidden)
      (5.0, 1.875)
    """
    options = Options(
        system, block_length, penalty, method, hidden_steps,
        optax.sgd(0.1) if hidden_optimizer is None else hidden_optimizer,
        optax.sgd(1.0) if dual_optimizer is None else dual_optimizer,
        constraint, loss_on, initial, num_blocks, axis_name,
    )  # fmt: skip
    check_options(options)

    def init(params: Params, hidden: PyTree, key: jax.Array | None = None) -> TargetState:
        check_params(params)
        check_key("target_propagation", key, random=False)
        check_hidden(hidden)
        return _first_state(options, strongly_typed(hidden))

    def update(params: Params, state: TargetState, inputs: PyTree) -> tuple[Estimate, TargetState]:
        length = check_step(system, params, state.hidden, inputs)
        check_state(state, jax.eval_shape(partial(_first_state, options), state.hidden))
        return _update(options, params, state, inputs, length)

    return GradientEstimator(init, update)


class _Problem(NamedTuple):
    """The objective of one window at one λ, as a function of θ and of the float leaves of H."""

    options: Options
    start: PyTree
    template: PyTree
    inputs: PyTree
    penalty: Any

    def terms(self, params: Params, floats: PyTree) -> Terms:
        free = with_inexact_part(self.template, floats)
        starts = starts_of(_from_the_left(self.start, free, self.options.axis_name), free)
        return block_terms(
            self.options.system, params, starts, free, self.inputs,
            self.options.block_length, self.options.constraint, self.options.loss_on,
        )  # fmt: skip

    def hidden_gradient(self, params: Params, floats: PyTree, multipliers: PyTree) -> PyTree:
        def value(floats: PyTree) -> jax.Array:
            return lagrangian(self.terms(params, floats), self.penalty, multipliers)

        return jax.grad(value)(floats)


def _update(
    options: Options, params: Params, state: TargetState, inputs: PyTree, length: int
) -> tuple[Estimate, TargetState]:
    stored = read_window(state, check_window(options, state, length))
    template, end = _enter(options, params, state, stored, inputs)
    penalty = penalty_at(options, state.count)
    problem = _Problem(options, state.hidden, template, inputs, penalty)
    floats = inexact_part(template)
    window = stored._replace(free=floats, visited=jax.tree.map(jnp.ones_like, stored.visited))
    if options.initial == "forward":  # H is new, and so is what its optimiser knows
        new = jax.vmap(options.hidden_optimizer.init)(floats)
        window = window._replace(hidden_optimizer=vary(new, anchor(floats)))

    def hidden_step(window: OfBlocks, gradient: PyTree) -> OfBlocks:
        descent = jax.tree.map(jnp.conj, gradient)  # JAX's gradient of complex leaves is ∂x − i ∂y
        of_hidden = options.hidden_optimizer, descent
        floats, optimizer_state = _descend(*of_hidden, window.hidden_optimizer, window.free)
        return window._replace(free=floats, hidden_optimizer=optimizer_state)

    def iteration(_: Any, window: OfBlocks) -> OfBlocks:
        return hidden_step(window, problem.hidden_gradient(params, window.free, window.multipliers))

    joint = options.method == "augmented_lagrangian" and options.hidden_steps > 0
    steps_alone = options.hidden_steps - 1 if joint else options.hidden_steps
    if steps_alone:
        window = jax.lax.fori_loop(0, steps_alone, iteration, window)
    terms, window, grads, hidden_gradient = _pass(problem, params, window)
    window = hidden_step(window, hidden_gradient) if joint else window
    read_last = joint and (options.duals_last or options.initial == "predicted")
    at_end = problem.terms(params, window.free) if read_last else terms
    window = _dual_step(problem, window, at_end.residual) if options.duals_last else window
    diagnostics = {
        "primal_residual": _norm(terms.residual, options.axis_name),
        "dual_residual": _norm(hidden_gradient, options.axis_name),
        "constraint": _sum(terms.constraint, options.axis_name),
        "penalty": jnp.asarray(penalty, terms.constraint.dtype),
    }
    free = at_end.predicted if options.initial == "predicted" else with_inexact_part(template, window.free)
    state = _leave(options, state, window._replace(free=free), end)
    devices = 1 if options.axis_name is None else jax.lax.axis_size(options.axis_name)
    loss, grads = _sum((terms.loss, grads), options.axis_name)
    return Estimate(loss, grads, np.int32(length * devices), Aux(terms.aux, diagnostics)), state  # pyright: ignore


def _pass(problem: _Problem, params: Params, window: OfBlocks) -> tuple[Terms, OfBlocks, Params, PyTree]:
    """The gradients with respect to θ and H in one pass; where H is kept, y moves first."""
    options = problem.options

    def value(params: Params, floats: PyTree) -> tuple[jax.Array, Any]:
        terms = problem.terms(params, floats)
        moved = _dual_step(problem, window, terms.residual) if options.duals_first else window
        return lagrangian(terms, problem.penalty, moved.multipliers), (terms, moved)

    differentiate = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
    local = params if options.axis_name is None else vary(params, anchor(window, problem.inputs))
    (_, (terms, moved)), (grads, hidden_gradient) = differentiate(local, window.free)
    return terms, moved, grads, hidden_gradient


def _dual_step(problem: _Problem, window: OfBlocks, residual: PyTree) -> OfBlocks:
    """y ← y + dual step of λ r (errata 25): an optimiser descends, so it is given −λ r."""
    descent = jax.tree.map(lambda r: (-problem.penalty * r).astype(r.dtype), jax.lax.stop_gradient(residual))
    of_duals = problem.options.dual_optimizer, descent
    multipliers, optimizer_state = _descend(*of_duals, window.dual_optimizer, window.multipliers)
    return window._replace(multipliers=multipliers, dual_optimizer=optimizer_state)


def _descend(
    optimizer: optax.GradientTransformation, gradient: PyTree, state: Any, variables: PyTree
) -> tuple[PyTree, Any]:
    """One step of every block's own optimiser."""
    updates, state = jax.vmap(optimizer.update)(gradient, state, variables)
    return optax.apply_updates(variables, updates), state


def _first_state(options: Options, hidden: PyTree) -> TargetState:
    state = TargetState(hidden, jnp.int32(0), jnp.int32(0))
    if options.num_blocks is None:
        return state
    rows = repeated(hidden, options.num_blocks)
    floats = inexact_part(rows)
    kept = options.initial != "forward"
    multipliers = jax.tree.map(jnp.zeros_like, floats) if options.has_duals else ()
    return state._replace(
        initial=jax.tree.map(jnp.copy, hidden),  # its own buffer, so that a state may be donated
        free=rows if kept else (),
        multipliers=multipliers,
        hidden_optimizer=jax.vmap(options.hidden_optimizer.init)(floats) if kept else (),
        dual_optimizer=jax.vmap(options.dual_optimizer.init)(multipliers) if options.has_duals else (),
        visited=jnp.full(options.num_blocks, options.axis_name is not None) if kept else (),
    )


def _enter(
    options: Options, params: Params, state: TargetState, stored: OfBlocks, inputs: PyTree
) -> tuple[PyTree, PyTree]:
    """Where H of the window starts, and the state at its end."""
    if options.axis_name is not None:
        free = stored.free
    elif options.initial == "forward":
        free = forward_states(options.system, params, state.hidden, inputs, options.block_length)
    else:
        free = _forward_unless_visited(options, params, state, stored, inputs)
    return free, jax.tree.map(lambda leaf: leaf[-1], free)


def _forward_unless_visited(
    options: Options, params: Params, state: TargetState, stored: OfBlocks, inputs: PyTree
) -> PyTree:
    """The forward states at the first visit, later what is stored.

    A loop of no trips, rather than a condition: of that `vmap` would run both branches at every visit.
    """
    blocks = cut_into_blocks(options.system, state.hidden, inputs, options.block_length)

    def block(index: jax.Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        hidden, free = carry
        hidden = run_only(blocks.system, params, hidden, read_row(blocks.inputs, index))
        return hidden, write_row(free, index, hidden)

    trips = jnp.where(jnp.all(stored.visited), 0, stored.visited.shape[0])
    first = vary((state.hidden, stored.free), anchor(params, state, inputs))
    return jax.lax.fori_loop(0, trips, block, first)[1]


def _leave(options: Options, state: TargetState, window: OfBlocks, end: PyTree) -> TargetState:
    """The state after the window; at the end of the data set the next one begins where the first did."""
    if options.initial != "forward":
        end = jax.tree.map(lambda leaf: leaf[-1], window.free)
    count = jax.tree.leaves(window.free)[0].shape[0]
    position, hidden = state.position, end
    if options.axis_name is not None:
        hidden = state.initial
    elif options.num_blocks is not None:
        position = (position + count) % options.num_blocks
        hidden = jax.tree.map(lambda first, last: jnp.where(position == 0, first, last), state.initial, end)
    state = write_window(state, window)
    return state._replace(hidden=hidden, count=state.count + 1, position=position)


def _from_the_left(start: PyTree, free: PyTree, axis_name: str | None) -> PyTree:
    """The state that the first block of this device begins with: the last one of the device before it."""
    if axis_name is None:
        return start
    devices = jax.lax.axis_size(axis_name)
    to_the_right = [(device, device + 1) for device in range(devices - 1)]
    is_first = jax.lax.axis_index(axis_name) == 0

    def receive(first: jax.Array, ends: jax.Array) -> jax.Array:
        if is_key(first):
            raw = receive(jax.random.key_data(first), jax.random.key_data(ends))
            return jax.random.wrap_key_data(raw, impl=jax.random.key_impl(first))
        return jnp.where(is_first, first, jax.lax.ppermute(ends[-1], axis_name, to_the_right))

    return jax.tree.map(receive, start, free)


def _sum(tree: PyTree, axis_name: str | None) -> PyTree:
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _norm(tree: PyTree, axis_name: str | None) -> jax.Array:
    return jnp.sqrt(_sum(inner_product(tree, tree), axis_name))
