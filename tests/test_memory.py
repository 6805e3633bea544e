"""Memory by the compiled program's own analysis, compilations, leaks and key reuse."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtrunc
from jtrunc import cells, truncation
from tests import systems
from tests.systems import Case

WIDTH = 32


def case_of(length: int, structured: bool) -> Case:
    if not structured:
        return systems.tanh(length, WIDTH, jnp.float32)
    model = cells.model(cells.tanh(2, WIDTH), 2, lambda y, target: jnp.sum((y - target) ** 2))
    inputs = (jnp.ones((length, 2), jnp.float32), jnp.zeros((length, 2), jnp.float32))
    return Case(model.system, model.init(jax.random.key(0)), model.initial_hidden(), inputs)


@cache
def temporary_bytes(make: Any, length: int, structured: bool = False) -> int:
    case = case_of(length, structured)
    estimator = make(case.system)
    state = estimator.init(case.params, case.hidden, jax.random.key(0))

    def grads_only(params, state, inputs):
        estimate, state = estimator.update(params, state, inputs)
        return estimate.loss, estimate.grads, state

    compiled = jax.jit(grads_only).lower(case.params, state, case.inputs).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


STRUCTURED = pytest.mark.parametrize("structured", [False, True], ids=["plain", "structured"])


@STRUCTURED
def test_bptt_needs_memory_in_proportion_to_time(structured):
    short, long = (temporary_bytes(jtrunc.bptt, t, structured) for t in (500, 2000))
    assert short > 500 * WIDTH * 4
    assert 3.0 < long / short < 4.5


@pytest.mark.slow
def test_a_step_of_an_lstm_keeps_its_state_and_one_array_of_gates():
    """(c, h) and four gates a unit and row: δ takes the place of the preactivations, not a second array."""
    rows, numbers = 32, []
    model = cells.model(cells.lstm(2, WIDTH), 2, lambda y, target: jnp.sum((y - target) ** 2))
    params, hidden = model.init(jax.random.key(0)), model.initial_hidden((rows,))
    estimator = jtrunc.bptt(model.system)
    for steps in (200, 400):
        inputs = (jnp.ones((steps, rows, 2), jnp.float32), jnp.zeros((steps, rows, 2), jnp.float32))
        state = estimator.init(params, hidden)
        gradient = jax.jit(lambda *args: estimator.update(*args)[0].grads)
        analysis = gradient.lower(params, state, inputs).compile().memory_analysis()
        assert analysis is not None
        numbers.append(analysis.temp_size_in_bytes // 4)
    assert 6 <= (numbers[1] - numbers[0]) / (200 * rows * WIDTH) < 8


@pytest.mark.slow
@STRUCTURED
def test_truncated_bptt_needs_memory_in_proportion_to_its_window(structured):
    """Between T = 500 and 2000 only per-step scalars may grow (8 bytes a step), never the residuals."""
    make = partial(jtrunc.truncated_bptt, length=50)
    short, long = (temporary_bytes(make, t, structured) for t in (500, 2000))
    assert long - short <= 1500 * 8
    assert long < 0.25 * temporary_bytes(jtrunc.bptt, 2000, structured)
    wide = temporary_bytes(partial(jtrunc.truncated_bptt, length=500), 2000, structured)
    assert wide - long > 0.5 * 450 * WIDTH * 4


@pytest.mark.slow
@STRUCTURED
def test_checkpointed_bptt_needs_the_square_root(structured):
    """Four times the steps, twice the memory (three times would already be out)."""
    make = partial(jtrunc.bptt, checkpoint="sqrt")
    short, long = (temporary_bytes(make, t, structured) for t in (2500, 10_000))
    assert long / short < 3.0
    assert long < 0.1 * temporary_bytes(jtrunc.bptt, 10_000, structured)


@STRUCTURED
def test_a_weight_of_zero_saves_no_memory(structured):
    """What artbp cuts inside one update still lies in memory (pitfalls); only shorter windows save it."""
    offline = partial(jtrunc.artbp, truncation=truncation.every(50))
    window = partial(jtrunc.truncated_bptt, length=50)
    assert temporary_bytes(offline, 2000, structured) > 4 * temporary_bytes(window, 2000, structured)


@pytest.mark.slow
@STRUCTURED
def test_the_online_window_needs_memory_for_its_look_ahead(structured):
    """It grows with the look-ahead, and is never more than full backpropagation over it would need."""
    make = partial(jtrunc.online_artbp, truncation=truncation.polynomial(16, 6))
    short, long = (temporary_bytes(make, t, structured) for t in (1000, 4000))
    assert 1.5 < long / short < 4.5
    assert long <= 1.1 * temporary_bytes(jtrunc.bptt, 4000, structured)


@pytest.mark.slow
def test_target_propagation_needs_memory_in_proportion_to_time():
    """All blocks at once hold what BPTT holds, whatever B; every further step on H needs no more."""
    make = partial(jtrunc.target_propagation, block_length=50, penalty=0.1)
    short, long = (temporary_bytes(make, t) for t in (500, 2000))
    assert 3.0 < long / short < 4.5
    assert long < 2 * temporary_bytes(jtrunc.bptt, 2000)
    few, many = (temporary_bytes(partial(make, hidden_steps=steps), 2000) for steps in (2, 5))
    assert few == many


def test_200_window_lengths_need_one_compilation(key):
    case = systems.scalar(200)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def update(state, cuts):
        estimator = jtrunc.online_artbp(case.system, truncation.given(cuts, jnp.full(200, 0.01)))
        return estimator.update(case.params, state, case.inputs)

    state = jtrunc.online_artbp(case.system, truncation.constant(0.01)).init(case.params, case.hidden, key)
    seen = []
    for length in range(1, 201):
        cuts = jnp.zeros(200, jnp.int32).at[length - 1].set(1)
        seen.append(int(update(state, cuts)[0].num_steps))
    assert seen == list(range(1, 201))


def test_the_lengths_that_a_law_draws_need_one_compilation(key):
    case = systems.scalar(100)
    estimator = jtrunc.online_artbp(case.system, truncation.polynomial(16, 6))
    update = jax.jit(chex.assert_max_traces(estimator.update, n=1))
    state, seen = estimator.init(case.params, case.hidden, key), set()
    for _ in range(60):
        estimate, state = update(case.params, state, case.inputs)
        seen.add(int(estimate.num_steps))
    assert len(seen) > 15


MAKERS = {
    "bptt": jtrunc.bptt,
    "checkpointed": partial(jtrunc.bptt, checkpoint="sqrt"),
    "truncated": partial(jtrunc.truncated_bptt, length=3),
    "windowed": partial(jtrunc.windowed_bptt, backward_steps=6, loss_steps=2),
    "artbp": partial(jtrunc.artbp, truncation=truncation.polynomial(3, 4)),
    "online_artbp": partial(jtrunc.online_artbp, truncation=truncation.constant(0.3)),
    "targets": partial(jtrunc.target_propagation, block_length=3, penalty=0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_no_tracer_leaks(name, key):
    case = systems.tanh(7)
    with jax.checking_leaks():
        estimator = MAKERS[name](case.system)
        state = estimator.init(case.params, case.hidden, key)
        estimate, state = jax.jit(estimator.update)(case.params, state, case.inputs)
        jax.jit(estimator.update)(case.params, state, case.inputs)
    assert np.isfinite(estimate.loss)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["artbp", "online_artbp"])
def test_no_key_is_used_twice(name, key):
    """jax's checker follows every key through init and two updates, and does object to a reused key."""
    case = systems.tanh(7)
    estimator = MAKERS[name](case.system)

    def two_updates(key):
        state = estimator.init(case.params, case.hidden, key)
        first, state = estimator.update(case.params, state, case.inputs)
        second, state = estimator.update(case.params, state, case.inputs)
        return first.grads, second.grads

    with jax.debug_key_reuse(True):
        jax.jit(two_updates)(jax.random.clone(key))
        with pytest.raises(jax.errors.KeyReuseError):
            jax.jit(lambda k: jax.random.uniform(k) + jax.random.normal(k))(jax.random.clone(key))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [16, 161])
@pytest.mark.parametrize("name", MAKERS)
def test_finite_at_several_sizes(name, steps, key):
    """Batched products with arrays made inside jit have returned garbage at some sizes (pitfalls, XLA)."""
    case = systems.tanh(7 if name == "windowed" else steps, 17, jnp.float32)
    estimator = MAKERS[name](case.system)
    state = estimator.init(case.params, case.hidden, key)
    estimate, _ = jax.jit(estimator.update)(case.params, state, case.inputs)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((estimate.loss, estimate.grads)))
