"""The options of target propagation, and the errors for those that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jtrunc.base import System
from jtrunc.checks import check_choice, check_count, check_size, check_system
from jtrunc.targets.blocks import num_blocks_of
from jtrunc.targets.constraints import Constraint
from jtrunc.targets.objective import LossOn
from jtrunc.targets.state import TargetState

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
        """Whether there are multipliers."""
        return self.method != "penalty"


def check_options(options: Options) -> None:
    """Every option by itself, and those that exclude each other."""
    owner = "target_propagation"
    check_system(owner, options.system)
    check_size(owner, "block_length", options.block_length)
    check_choice(owner, "method", options.method, Method)
    check_choice(owner, "loss_on", options.loss_on, LossOn)
    check_choice(owner, "initial", options.initial, Initial)
    _check_penalty(options.penalty)
    check_count(owner, "hidden_steps", options.hidden_steps)
    for name in ("hidden_optimizer", "dual_optimizer"):
        if not isinstance(getattr(options, name), optax.GradientTransformation):
            raise TypeError(f"{owner}: `{name}` must be an optax optimiser, not {getattr(options, name)!r}")
    if not callable(options.constraint):
        raise TypeError(
            f"{owner}: `constraint` must be a function (params, predicted, free) -> scalar, such as "
            f"jtrunc.targets.quadratic, not {options.constraint!r}"
        )
    if options.num_blocks is not None:
        check_size(owner, "num_blocks", options.num_blocks)
    elif options.initial != "forward":
        raise ValueError(
            f"{owner}: initial={options.initial!r} keeps a state for every block: give `num_blocks`, the "
            "blocks of the whole data set"
        )
    if options.axis_name is not None and options.initial == "forward":
        raise ValueError(
            f"{owner}: `axis_name` splits time over devices, but initial='forward' runs through all of it, "
            "one step after the other; take initial='predicted' or 'persistent'"
        )


def _check_penalty(penalty: Any) -> None:
    if callable(penalty) or isinstance(penalty, jax.Array):
        return
    if isinstance(penalty, bool) or not isinstance(penalty, Real):
        raise TypeError(
            "target_propagation: `penalty` must be a number λ or a schedule count -> λ, not "
            f"{penalty!r}; a constraint function goes to `constraint`"
        )
    if not 0 <= float(penalty) < float("inf"):
        raise ValueError(f"target_propagation: `penalty` must be finite and at least 0, not {penalty}")


def check_window(options: Options, state: TargetState, length: int) -> int:
    """How many blocks the steps of an update are, if they fit those that the state keeps."""
    count = num_blocks_of(length, options.block_length)
    total = options.num_blocks
    if total is None:
        return count
    if options.axis_name is not None:
        local = jax.tree.leaves(state.free)[0].shape[0]
        if count != local:
            raise ValueError(
                f"target_propagation: {length} steps on a device are {count} blocks, but it keeps {local}; "
                "with `axis_name` every update is the whole data set, and `num_blocks` counts all its blocks"
            )
    elif total % count:
        raise ValueError(
            f"target_propagation: `num_blocks` ({total}) must be a multiple of the {count} blocks of an "
            f"update ({length} steps in blocks of {options.block_length}); cut the data to whole updates"
        )
    return count


def penalty_at(options: Options, count: jax.Array) -> Any:
    """λ after `count` updates."""
    if not callable(options.penalty):
        return options.penalty
    value: Any = options.penalty(count)
    if jnp.shape(value) != ():
        raise ValueError(
            "target_propagation: the schedule `penalty(count)` must return a scalar λ, not an array of shape "
            f"{jnp.shape(value)}"
        )
    return value
