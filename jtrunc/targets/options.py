"""The options of target propagation, and the errors for those that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jtrunc.base import PyTree, System
from jtrunc.checks import check_choice, check_count, check_size, check_system, shown
from jtrunc.targets.blocks import num_blocks_of
from jtrunc.targets.constraints import NUMBERS, Constraint, check_constraint, check_penalty
from jtrunc.targets.objective import LossOn
from jtrunc.targets.state import TargetState, blocks_of
from jtrunc.trees import inexact_part

Method = Literal["admm", "penalty", "augmented_lagrangian"]
Initial = Literal["forward", "persistent", "predicted"]
Penalty = float | jax.Array | Callable[[jax.Array], Any]


class Options(NamedTuple):
    """The arguments of `target_propagation`, all static but λ."""

    system: System
    block_length: int
    penalty: Any
    method: Method
    hidden_steps: int
    hidden_optimizer: optax.GradientTransformation
    dual_optimizer: optax.GradientTransformation
    constraint: Constraint
    loss_on: LossOn
    initial: Initial
    num_blocks: int | None
    axis_name: str | None

    @property
    def has_duals(self) -> bool:
        """Whether there are multipliers: kept for blocks that come round again, or not at all."""
        return self.method != "penalty" and self.num_blocks is not None

    @property
    def duals_first(self) -> bool:
        """y moves before g where H is kept: r is then that of the steps on H and θ since the last update."""
        return self.has_duals and self.initial != "forward"

    @property
    def duals_last(self) -> bool:
        """y moves after g where H starts at the forward states, unless it stays there: r = 0."""
        return self.has_duals and self.initial == "forward" and self.hidden_steps > 0


def check_options(options: Options) -> None:
    """Every option by itself, and those that exclude each other."""
    owner = "target_propagation"
    check_system(owner, options.system)
    check_size(owner, "block_length", options.block_length)
    check_choice(owner, "method", options.method, Method)
    check_choice(owner, "loss_on", options.loss_on, LossOn)
    check_choice(owner, "initial", options.initial, Initial)
    if not callable(options.penalty):
        check_penalty(owner, options.penalty, "a number λ or a schedule count -> λ")
    check_count(owner, "hidden_steps", options.hidden_steps)
    for name in ("hidden_optimizer", "dual_optimizer"):
        if not isinstance(getattr(options, name), optax.GradientTransformation):
            raise TypeError(f"{owner}: `{name}` must be an optax optimiser, not {getattr(options, name)!r}")
    check_constraint(owner, options.constraint)
    if options.num_blocks is not None:
        check_size(owner, "num_blocks", options.num_blocks)
    elif options.initial != "forward":
        raise ValueError(
            f"{owner}: initial={options.initial!r} keeps a state for every block: give `num_blocks`, the "
            "blocks of the whole data set"
        )
    if options.axis_name is not None and not isinstance(options.axis_name, str):
        raise TypeError(f"{owner}: `axis_name` must name a mesh axis, not {options.axis_name!r}")
    if options.axis_name is not None and options.initial == "forward":
        raise ValueError(
            f"{owner}: `axis_name` splits time over devices, but initial='forward' runs through all of it, "
            "one step after the other; take initial='predicted' or 'persistent'"
        )


def check_hidden(hidden: PyTree) -> None:
    """A state with something to optimise."""
    if not jax.tree.leaves(inexact_part(hidden)):
        raise TypeError(
            "target_propagation: `hidden` has no floating point leaves, so there is nothing to optimise; "
            "take jtrunc.bptt"
        )


def check_state(state: TargetState, expected: TargetState) -> None:
    """A state of this estimator, or of one with the same options but another `num_blocks`."""
    for name in TargetState._fields:
        given, wanted = (jax.tree.structure(getattr(tree, name)) for tree in (state, expected))
        if given != wanted:
            raise ValueError(
                f"target_propagation: `state.{name}` has the structure {given}, not {wanted}: it was made "
                "with another `method`, `initial`, `num_blocks` or optimiser; make it by the `init` of this "
                "estimator"
            )


def check_window(options: Options, state: TargetState, length: int) -> int:
    """How many blocks the steps of an update are, if they fit those that the state keeps."""
    count, total = num_blocks_of(length, options.block_length), options.num_blocks
    if total is None:
        return count
    if options.axis_name is not None:
        total = jax.tree.leaves(state.free)[0].shape[0]
        if count != total or length % options.block_length:
            raise ValueError(
                f"target_propagation: {length} steps on a device must be {total} blocks of "
                f"{options.block_length}; with `axis_name` every update is the whole data set, `num_blocks` "
                "counts all its blocks, and all are of equal length"
            )
    elif total % count:
        raise ValueError(
            f"target_propagation: `num_blocks` ({total}) must be a multiple of the {count} blocks of an "
            f"update ({length} steps in blocks of {options.block_length}); cut the data to whole updates"
        )
    rows = {leaf.shape[0] for leaf in jax.tree.leaves(blocks_of(state))}
    if rows - {total}:
        raise ValueError(
            f"target_propagation: `num_blocks` is {total}, but the state was made for {sorted(rows)}; make "
            "it by the `init` of this estimator"
        )
    return count


def penalty_at(options: Options, count: jax.Array) -> Any:
    """λ after `count` updates."""
    if not callable(options.penalty):
        return options.penalty
    value: Any = options.penalty(count)
    if not isinstance(value, NUMBERS) or jnp.shape(value) != ():
        raise ValueError(
            f"target_propagation: the schedule `penalty(count)` must return a scalar λ, not {shown(value)}"
        )
    return value
