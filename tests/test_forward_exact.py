"""Real-time recurrent learning is exact, across updates, for every kind of cell.

Inside one window every estimator could hide behind reverse mode; what is tested is therefore the sum over
consecutive windows, which must be the gradient through the whole run and not that of the windows.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtrunc
import tests.forward_reference as forward
from tests import flax_cases, reference, systems
from tests.compare import assert_close, differ
from tests.forward_cases import apart, same, vector, walk, window_sums
from tests.systems import Case

STEPS = 18


def with_flax(name: str, length: int) -> Case:
    """A flax cell as a case: one stream, no batch axis."""
    case = flax_cases.CASES[name](())
    return Case(case.system, case.params, case.hidden, flax_cases.data(length, ()))


def plain(name: str, length: int) -> Case:
    """A structured case whose structure is forgotten."""
    case = systems.elementwise(length) if name == "elementwise" else systems.structured(name, length)
    return case._replace(system=case.system._replace(structure=None))


STRUCTURED = {name: partial(systems.structured, name) for name in systems.CELLS} | {
    "symbols": systems.symbols,
    "tied": systems.tied,
    "elementwise": systems.elementwise,
}
GENERIC = {
    "plain tanh": partial(plain, "tanh"),
    "plain lstm": partial(plain, "lstm"),
    "plain elementwise": partial(plain, "elementwise"),
    "nested": systems.nested,
}
FLAX = {name: partial(with_flax, name) for name in ("linen_lstm", "nnx_gru", "linen_mgu", "nnx_own_cell")}
ALL = STRUCTURED | GENERIC | FLAX
VARIANTS = ("symbols", "tied", "preactivation", "stack", "plain lstm", "plain elementwise", "linen_mgu")
"""Close to another case; one length of window will do."""


@cache
def case_and_run(name: str) -> tuple[Case, reference.Linearised]:
    case = ALL[name](STEPS)
    return case, reference.linearise(*case)


def assert_exact_across_updates(estimator: Any, name: str, windows: tuple[int, ...] = (1, 3, 17)) -> None:
    """In windows of every length: each gradient is the oracle's, and their sum is that of the whole run."""
    case, run = case_and_run(name)
    each = forward.gradients(run, forward.rtrl(run))
    whole = np.asarray(vector(reference.bptt(run)))
    for window in windows:
        rows, state = walk(estimator, case, window)
        same(rows, window_sums(each, window))
        same(rows.sum(axis=0), whole)
        assert_close(state.hidden, run.states[-1])
    parts = [reference.piece(run, start, start + 3) for start in range(0, STEPS, 3)]
    assert apart(np.sum([vector(reference.bptt(part)) for part in parts], axis=0), whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_rtrl_is_bptt_across_updates(name):
    """With the structure and without it, both equal to the same oracle."""
    windows = (3,) if name in VARIANTS else (1, 3, 17)
    assert_exact_across_updates(jtrunc.rtrl(case_and_run(name)[0].system), name, windows)


def test_a_long_window_of_rtrl_goes_in_chunks():
    """T = 40 in windows of 37 and 3, for three units: 37 steps are several chunks and a ragged one."""
    case = systems.tanh(40)
    run = reference.linearise(*case)
    rows, _ = walk(jtrunc.rtrl(case.system), case, 37)
    same(rows, window_sums(forward.gradients(run, forward.rtrl(run)), 37))
    assert apart(rows.sum(axis=0), vector(reference.truncated_bptt(run, 37)), 1e-9)


# Resets, and parameters that move.


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 9])
def test_a_reset_cuts_the_influence(window):
    """Two sequences in one stream: the sum of their own gradients, though the influence was carried."""
    case = systems.tanh(9)
    parts = [case._replace(inputs=case.window(0, 5)), case._replace(inputs=case.window(5, 9))]
    exact = sum(np.asarray(vector(reference.bptt(reference.linearise(*part)))) for part in parts)
    system = jtrunc.with_resets(case.system, case.hidden)
    stream = Case(system, case.params, case.hidden, (jnp.arange(9) == 5, case.inputs))
    rows, _ = walk(jtrunc.rtrl(system), stream, window)
    same(rows.sum(axis=0), exact)
    never = stream._replace(inputs=(jnp.zeros(9, bool), case.inputs))
    rows, _ = walk(jtrunc.rtrl(system), never, window)
    same(rows.sum(axis=0), vector(reference.bptt(reference.linearise(*case))))
    assert apart(rows.sum(axis=0), exact)


def moving(case: Case) -> list[Any]:
    """θ₁ … θ_T: parameters that drift by a step of 0.05 each time."""
    generator = np.random.default_rng(13)
    params, path = case.params, []
    for _ in range(len(case.inputs)):
        path.append(params)
        params = jax.tree.map(lambda p: p + 0.05 * generator.normal(size=p.shape), params)
    return path


@pytest.mark.slow
def test_while_the_parameters_move_the_influence_is_taken_along_their_path():
    """Errata 22: ∂hₜ/∂ε of the run at θ₁ + ε, …, θₜ + ε, and not the derivative at the last θ alone."""
    case = systems.tanh(6)
    path = moving(case)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *path)

    @jax.jit
    def online(state: Any, stacked: Any, inputs: Any) -> Any:
        def step(state: Any, row: Any) -> Any:
            params, x = row
            estimate, state = jtrunc.rtrl(case.system).update(params, state, x[None])
            return state, estimate.grads

        return jax.lax.scan(step, state, (stacked, inputs))[1]

    state = jtrunc.rtrl(case.system).init(case.params, case.hidden)
    grads = online(state, stacked, case.inputs)
    last = jax.tree.map(lambda leaf: leaf[-1], grads)

    def last_loss(shift: Any, trajectory: list[Any]) -> jax.Array:
        hidden, loss = case.hidden, jnp.float64(0)
        for params, x in zip(trajectory, case.inputs, strict=True):
            moved = jax.tree.map(jnp.add, params, shift)
            hidden = case.system.transition(moved.recurrent, hidden, x)
            loss = case.system.loss(moved, hidden, x)[0]
        return loss

    zero = jax.tree.map(jnp.zeros_like, case.params)
    along, at_the_end = jax.grad(last_loss)(zero, path), jax.grad(last_loss)(zero, [path[-1]] * 6)
    # The readout has no past: only its last value is read.
    assert_close(last, along)
    assert differ(last.recurrent, at_the_end.recurrent)
