"""Bad input to target propagation: the message names the argument, the value and what fits."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtrunc
from jtrunc import targets
from tests.test_bad_input import CASE, Bad, build, update

make = partial(jtrunc.target_propagation, block_length=2, penalty=0.1)


def with_options(**options: Any) -> Any:
    return build(make, **options)


def updating(**options: Any) -> Any:
    return update(partial(make, **options))


def objective(**changes: Any) -> Any:
    """A call of `targets.objective` at the forward states, six steps in three blocks."""
    free = targets.forward_states(*CASE, block_length=2)
    arguments: dict[str, Any] = dict(
        system=CASE.system, params=CASE.params, start=CASE.hidden, free=free, inputs=CASE.inputs,
        block_length=2, penalty=1.0,
    )  # fmt: skip
    return lambda: targets.objective(**arguments | changes)


OPTIONS = {
    "block_length 0": Bad(with_options(block_length=0), ValueError, ("block_length", "0")),
    "block_length -1": Bad(with_options(block_length=-1), ValueError, ("block_length", "-1")),
    "block_length 1.5": Bad(with_options(block_length=1.5), TypeError, ("block_length", "1.5")),
    "block_length True": Bad(with_options(block_length=True), TypeError, ("block_length", "True")),
    "penalty -0.1": Bad(with_options(penalty=-0.1), ValueError, ("penalty", "-0.1")),
    "penalty nan": Bad(with_options(penalty=float("nan")), ValueError, ("penalty", "nan")),
    "penalty inf": Bad(with_options(penalty=float("inf")), ValueError, ("penalty", "inf")),
    "penalty word": Bad(with_options(penalty="strong"), TypeError, ("penalty", "strong")),
    "penalty None": Bad(with_options(penalty=None), TypeError, ("penalty", "None")),
    "penalty True": Bad(with_options(penalty=True), TypeError, ("penalty", "True")),
    "method": Bad(with_options(method="alm"), ValueError, ("method", "alm", "augmented_lagrangian")),
    "initial": Bad(with_options(initial="zero"), ValueError, ("initial", "zero", "persistent")),
    "loss_on": Bad(with_options(loss_on="both"), ValueError, ("loss_on", "both", "predicted")),
    "hidden_steps -1": Bad(with_options(hidden_steps=-1), ValueError, ("hidden_steps", "-1")),
    "hidden_steps 0.5": Bad(with_options(hidden_steps=0.5), TypeError, ("hidden_steps", "0.5")),
    "hidden_steps False": Bad(with_options(hidden_steps=False), TypeError, ("hidden_steps", "False")),
    "num_blocks 0": Bad(with_options(num_blocks=0), ValueError, ("num_blocks", "0")),
    "num_blocks 2.0": Bad(with_options(num_blocks=2.0), TypeError, ("num_blocks", "2.0")),
    "persistent alone": Bad(with_options(initial="persistent"), ValueError, ("persistent", "num_blocks")),
    "predicted alone": Bad(with_options(initial="predicted"), ValueError, ("predicted", "num_blocks")),
    "axis_name, forward": Bad(
        with_options(axis_name="data", num_blocks=3), ValueError, ("axis_name", "forward", "persistent")
    ),
    "hidden_optimizer": Bad(with_options(hidden_optimizer=0.1), TypeError, ("hidden_optimizer", "0.1")),
    "dual_optimizer": Bad(with_options(dual_optimizer=optax.sgd), TypeError, ("dual_optimizer", "sgd")),
    "constraint": Bad(with_options(constraint=0.1), TypeError, ("constraint", "0.1")),
    "system": Bad(lambda: make(CASE), TypeError, ("system", "Case")),  # pyright: ignore[reportArgumentType]
}


def update_of_another(other: dict[str, Any], **options: Any) -> Any:
    """An update from a state that an estimator with other options made."""
    state = make(CASE.system, **other).init(CASE.params, CASE.hidden)
    return lambda: make(CASE.system, **options).update(CASE.params, state, CASE.inputs)


UPDATES = {
    "a state of another method": Bad(
        update_of_another(dict(num_blocks=3), num_blocks=3, method="penalty"),
        ValueError,
        ("state.multipliers", "method", "init"),
    ),
    "a state of another initial": Bad(
        update_of_another(dict(num_blocks=3), num_blocks=3, initial="persistent"),
        ValueError,
        ("state.free", "initial", "init"),
    ),
    "a state of another optimiser": Bad(
        update_of_another(dict(num_blocks=3), num_blocks=3, dual_optimizer=optax.adam(0.1)),
        ValueError,
        ("state.dual_optimizer", "optimiser", "init"),
    ),
    "a state without blocks": Bad(
        update_of_another(dict(), num_blocks=3), ValueError, ("state.initial", "num_blocks", "init")
    ),
    "num_blocks": Bad(updating(num_blocks=4), ValueError, ("num_blocks", "4", "3")),
    "num_blocks below": Bad(
        updating(num_blocks=2, initial="persistent"), ValueError, ("num_blocks", "2", "3")
    ),
    "constraint: a vector": Bad(
        updating(constraint=lambda params, predicted, free: free), ValueError, ("constraint", "[3]")
    ),
    "constraint: an integer": Bad(
        updating(constraint=lambda params, predicted, free: 1), ValueError, ("constraint", "int")
    ),
    "constraint: a pair": Bad(
        updating(constraint=lambda params, predicted, free: (jnp.sum(free), ())),
        (ValueError, TypeError),  # pyright: ignore[reportArgumentType]
        ("constraint", "tuple"),
    ),
    "schedule: a vector": Bad(
        updating(penalty=lambda count: jnp.ones(2)),
        (ValueError, TypeError),  # pyright: ignore[reportArgumentType]
        ("penalty", "2"),
    ),
    "a legacy key": Bad(update(make, jax.random.PRNGKey(0)), TypeError, ("key", "uint32")),
}
OBJECTIVES = {
    "free: too few": Bad(objective(free=jnp.zeros((2, 3))), ValueError, ("free", "[3, 3]", "[2, 3]")),
    "free: other width": Bad(objective(free=jnp.zeros((3, 4))), ValueError, ("free", "[3, 3]", "[3, 4]")),
    "free: other dtype": Bad(objective(free=jnp.zeros((3, 3), jnp.float32)), TypeError, ("free", "float32")),
    "objective: block_length 0": Bad(objective(block_length=0), ValueError, ("block_length", "0")),
    "objective: penalty x": Bad(objective(penalty="x"), TypeError, ("penalty", "x")),
    "objective: penalty None": Bad(objective(penalty=None), TypeError, ("penalty", "None")),
    "objective: penalty -1": Bad(objective(penalty=-1.0), ValueError, ("penalty", "-1")),
    "objective: two penalties": Bad(objective(penalty=jnp.ones(2)), ValueError, ("penalty", "(2,)")),
    "objective: constraint": Bad(objective(constraint=3), TypeError, ("constraint", "3")),
    "objective: loss_on": Bad(objective(loss_on="h"), ValueError, ("loss_on", "'h'")),
    "multipliers: other shape": Bad(
        objective(multipliers=jnp.zeros((2, 3))),
        (ValueError, TypeError),  # pyright: ignore[reportArgumentType]
        ("multipliers", "[2, 3]"),
    ),
    "forward_states: block_length": Bad(
        lambda: targets.forward_states(*CASE, block_length=0), ValueError, ("block_length", "0")
    ),
    "over_blocks: no system": Bad(lambda: targets.over_blocks(3), TypeError, ("system", "int")),  # pyright: ignore[reportArgumentType]
}
TABLE = OPTIONS | UPDATES | OBJECTIVES


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_refused(name):
    bad = TABLE[name]
    with pytest.raises(bad.error) as caught:
        bad.call()
    for word in bad.words:
        assert re.search(re.escape(word), str(caught.value)), f"{word!r} is missing in: {caught.value}"


@pytest.mark.parametrize("penalty", [0, 0.5, jnp.float32(0.5), optax.exponential_decay(1.0, 10, 0.5)])
def test_what_may_stand_for_lambda(penalty):
    """Integers, floats, arrays and schedules; 0 steps on H and constraint functions of one's own too."""
    estimator = jtrunc.target_propagation(CASE.system, 2, penalty, hidden_steps=0)
    state = jax.eval_shape(estimator.init, CASE.params, CASE.hidden)
    estimate, after = jax.eval_shape(estimator.update, CASE.params, state, CASE.inputs)
    assert after == state
    assert estimate.aux.diagnostics["penalty"].dtype == jnp.float64


@pytest.mark.slow
def test_a_nan_of_a_schedule_is_seen():
    """At run time nothing can raise: a λ that is nan shows in every gradient, not as a silent 0."""
    estimator = jtrunc.target_propagation(CASE.system, 2, lambda count: jnp.nan)
    state = estimator.init(CASE.params, CASE.hidden)
    estimate, _ = jax.jit(estimator.update)(CASE.params, state, CASE.inputs)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(estimate.grads))
    assert np.isnan(estimate.aux.diagnostics["penalty"])
