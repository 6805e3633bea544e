"""Norms by lag against brute force, and the windows of adaptive BPTT against eq. 15 at every length."""

from __future__ import annotations

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtrunc
from jtrunc import diagnostics
from jtrunc.diagnostics import by_layer, by_leaf, gradient_norms, log_gradient_norms
from tests import adaptive_reference, reference, systems
from tests.compare import assert_close
from tests.systems import Case

NUM_LAGS, NUM_TIMES, TIMES = 5, 3, (5, 6, 8)
"""Three losses spread over steps 5 … 8 of nine, each followed five lags back (6.5 rounds to even)."""


def brute_force(case: Case, weighted: bool = False) -> np.ndarray:
    rows = [adaptive_reference.gradient_norms(*case, time, NUM_LAGS, weighted) for time in TIMES]
    return np.stack(rows)


# Norms by lag.


@pytest.mark.parametrize("make", [systems.tanh, pytest.param(systems.nested, marks=pytest.mark.slow)])
@pytest.mark.parametrize("weighted", [False, True])
def test_norms_equal_the_gradient_of_an_injected_perturbation(make, weighted):
    case = make(9)
    norms = jax.jit(
        partial(gradient_norms, case.system, num_lags=NUM_LAGS, num_times=NUM_TIMES, weighted=weighted)
    )
    found = np.asarray(norms(case.params, case.hidden, case.inputs))
    expected = brute_force(case, weighted)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    shifted = np.abs(found[:, 1:] / expected[:, :-1] - 1)  # one lag off is far off
    assert (shifted.max(axis=1) > 1e-2).all()


@pytest.mark.slow
def test_norms_by_layer_and_by_leaf_add_up_in_squares():
    case = systems.structured("gated_stack", 9)
    norms = jax.jit(partial(gradient_norms, *case, num_lags=NUM_LAGS), static_argnames=("parts", "weighted"))
    whole, layers, leaves = norms(), norms(parts=by_layer), norms(parts=by_leaf)
    assert sorted(layers) == ["[0]", "[1]"] and len(leaves) > 2
    for parts in (layers, leaves):
        np.testing.assert_allclose(sum(part**2 for part in parts.values()), whole**2, rtol=1e-12)
    assert float(layers["[0]"][0, 0]) == 0.0  # the loss reads the upper layer alone
    shares = norms(weighted=True, parts=by_leaf)
    total = sum(part**2 for part in shares.values())
    np.testing.assert_allclose(total, norms(weighted=True) ** 2, rtol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_each_stream_is_a_sample_of_its_own(weighted):
    """Three streams in a batch against each alone; the loss is a mean over them, so norms are a third."""
    model = jtrunc.cells.model(jtrunc.cells.tanh(4, 3), 4, jtrunc.cells.softmax_cross_entropy)
    params, hidden = model.init(jax.random.key(0), jnp.float64), model.initial_hidden((3,), jnp.float64)
    tokens = jax.random.randint(jax.random.key(1), (9, 3), 0, 4)
    inputs = (tokens, jnp.roll(tokens, 1, 0))
    measure = partial(gradient_norms, model.system, params, weighted=weighted, num_lags=4, num_times=2)
    measure = jax.jit(measure, static_argnames="streams")
    batch = measure(hidden, inputs, streams=True)
    alone = [measure(hidden[b], (inputs[0][:, b], inputs[1][:, b])) for b in range(3)]
    expected = np.stack(alone, axis=1).reshape(6, 5) / 3
    np.testing.assert_allclose(batch, expected, rtol=1e-12)
    assert not np.allclose(batch[0], batch[1])
    joint = measure(hidden, inputs)
    assert joint.shape == (2, 5)


def test_norms_far_below_the_range_of_float32():
    system = jtrunc.System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h.sum(), ()))
    theta, inputs = jnp.float32(1e-5), jnp.ones((41, 2), jnp.float32)
    logs = log_gradient_norms(system, jtrunc.Params(theta), jnp.zeros(2, jnp.float32), inputs, 40)
    expected = 0.5 * np.log(2) + np.arange(41) * np.log(np.float64(theta))
    np.testing.assert_allclose(logs[0], expected, rtol=1e-5)
    assert float(jnp.exp(logs[0, -1].astype(jnp.float32))) == 0.0


def test_norms_of_an_exploding_system_grow_in_logarithms():
    case = systems.exploding(6)
    logs = log_gradient_norms(*case, 4)
    np.testing.assert_allclose(logs[0] / np.log(1e200), np.arange(5), atol=1e-12)


# Windows.


def adaptive(case: Case, **options: Any) -> jtrunc.GradientEstimator:
    fixed = {"num_lags": 10, "max_length": 9, "initial_length": 3, "estimate_every": 10**6}
    return jtrunc.adaptive_bptt(case.system, 0.5, **{**fixed, **options})


def with_length(state: Any, length: int) -> Any:
    return state._replace(chosen=state.chosen._replace(length=jnp.int32(length)))


LENGTHS = (3, 3, 7, 7, 2, 2, 5, 9, 1, 1, 1, 4)


@pytest.mark.parametrize(
    "name", ["tanh", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nested", "two phases"))]
)
def test_windows_of_every_length_are_equation_15_and_score_each_loss_once(name):
    """K is set by hand; one compiled update serves all, and the scored losses tile the stream."""
    made = {
        "tanh": lambda: systems.tanh(80),
        "nested": lambda: systems.nested(80),
        "two phases": lambda: systems.structured("gru", 80, width=16),
    }
    case = made[name]()
    run = reference.linearise(*case)
    estimator = adaptive(case)
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(estimator.update, n=1))
    state = estimator.init(case.params, case.hidden)
    start = scored = 0
    for length in LENGTHS:
        estimate, state = update(case.params, with_length(state, length), case.window(start, start + 19))
        num_scored = int(estimate.aux.diagnostics["num_scored"])
        stop = scored + num_scored
        window = reference.piece(run, stop - (2 * length + 1), stop)
        assert_close(estimate.grads, reference.windowed_bptt(window, 2 * length, num_scored))
        assert_close(estimate.loss, run.losses[scored:stop].sum())
        start, scored = start + int(estimate.num_steps), stop
        floats = reference.to_vector(state.hidden)
        assert_close(floats, reference.to_vector(run.states[start]))
        assert int(state.look_back) == scored - start == length + 1
    assert int(estimate.num_steps) == int(estimate.aux.diagnostics["truncation_length"]) == 4


@pytest.mark.slow
def test_sums_and_averages():
    case = systems.tanh(40)
    found = []
    for average in (True, False):
        estimator = adaptive(case, average=average)
        state = estimator.init(case.params, case.hidden)
        found.append(jax.jit(estimator.update)(case.params, state, case.window(0, 19))[0])
    assert_close(jax.tree.map(lambda grad: 7 * grad, found[0].grads), found[1].grads)
    assert_close(found[0].loss, found[1].loss)


@pytest.mark.slow
def test_windows_longer_than_a_block():
    """The mark, the first scored step and the reach of the gradient lie in different blocks of 128 steps."""
    case = systems.tanh(451)
    run = reference.linearise(*case)
    estimator = adaptive(case, max_length=150, initial_length=150)
    state = estimator.init(case.params, case.hidden)
    update = jax.jit(estimator.update)
    first, state = update(case.params, state, case.window(0, 301))
    assert_close(first.grads, reference.windowed_bptt(reference.piece(run, 0, 301), 300, 301))
    assert_close(state.hidden, run.states[150])
    second, state = update(case.params, with_length(state, 20), case.window(150, 451))
    assert int(second.num_steps) == 150
    assert_close(second.grads, reference.windowed_bptt(reference.piece(run, 280, 321), 40, 20))
    assert_close(state.hidden, run.states[300])


# Estimates on the way.


def decaying(length: int, rate: float = 0.8, streams: tuple[int, ...] = ()) -> Case:
    """hₜ = rate · hₜ₋₁ + θ + xₜ, ℓₜ = mean of hₜ: φₖ = rateᵏ."""

    def transition(theta: jax.Array, hidden: jax.Array, inputs: jax.Array) -> jax.Array:
        return rate * hidden + theta + inputs

    def loss(params: jtrunc.Params, hidden: jax.Array, inputs: jax.Array) -> tuple[jax.Array, tuple[()]]:
        return jnp.mean(hidden), ()

    inputs = jax.random.normal(jax.random.key(3), (length, *streams), jnp.float64)
    return Case(jtrunc.System(transition, loss), jtrunc.Params(jnp.float64(0.3)), jnp.zeros(streams), inputs)


def lengths_of(case: Case, num_updates: int, **options: Any) -> list[tuple[int, int, int]]:
    """(K, estimation_steps, num_steps) of successive updates along the stream."""
    estimator = adaptive(case, **options)
    state, start, found = estimator.init(case.params, case.hidden), 0, []
    update = jax.jit(estimator.update)
    for _ in range(num_updates):
        estimate, state = update(case.params, state, case.window(start, start + 19))
        numbers = estimate.aux.diagnostics
        start += int(estimate.num_steps)
        found.append(
            (
                int(numbers["truncation_length"]),
                int(numbers["estimation_steps"]),
                int(estimate.num_steps),
            )
        )
    return found


def test_the_schedule_of_estimates():
    """0.8 to the K + 1 below ½ / 2: K = 6; the first estimate at once, or after the initial length's time."""
    case = decaying(100)
    at_once = lengths_of(case, 4, initial_length=None, estimate_every=2)
    assert at_once == [(6, 11, 6), (6, 0, 6), (6, 11, 6), (6, 0, 6)]
    later = lengths_of(case, 4, initial_length=3, estimate_every=2)
    assert later == [(3, 0, 3), (3, 0, 3), (6, 11, 6), (6, 0, 6)]
    by_steps = lengths_of(case, 5, initial_length=3, estimate_every=8, unit="steps")
    assert by_steps == [(3, 0, 3), (3, 0, 3), (3, 0, 3), (6, 11, 6), (6, 0, 6)]


@pytest.mark.slow
def test_an_update_with_an_estimate_chooses_what_the_diagnostics_choose():
    case = systems.structured("lstm", 60, width=3)
    estimator = adaptive(case, initial_length=None, num_times=4)
    state = estimator.init(case.params, case.hidden)
    estimate, after = jax.jit(estimator.update)(case.params, state, case.window(0, 19))
    norms = log_gradient_norms(*case._replace(inputs=case.window(0, 19)), 10, num_times=4)
    chosen = diagnostics.estimate_length(norms, 0.5, fit_from=9, min_length=1, max_length=9)
    assert [float(leaf) for leaf in chosen] == [float(leaf) for leaf in after.chosen]
    numbers = estimate.aux.diagnostics
    assert float(numbers["decay_rate"]) == float(chosen.decay_rate)
    assert float(numbers["relative_bias"]) == float(chosen.relative_bias) < 0.5
    # The estimate leaves nothing behind in the gradient: with K given, the update is the same.
    fixed = adaptive(case, initial_length=int(chosen.length), num_times=4)
    plain, _ = jax.jit(fixed.update)(case.params, fixed.init(case.params, case.hidden), case.window(0, 19))
    assert_close(estimate.grads, plain.grads, rtol=1e-14)


@pytest.mark.parametrize("streams", [(1,), (7,)])
def test_the_length_does_not_depend_on_the_batch(streams):
    case = decaying(60, streams=streams)
    assert [row[0] for row in lengths_of(case, 2, initial_length=None, streams=True)] == [6, 6]


def test_norms_that_do_not_decay_give_the_longest_window_and_say_so():
    for rate in (1.0, 1.1):
        case = decaying(60, rate)
        estimator = adaptive(case, initial_length=None)
        state = estimator.init(case.params, case.hidden)
        estimate, _ = jax.jit(estimator.update)(case.params, state, case.window(0, 19))
        assert int(estimate.num_steps) == 9
        assert int(estimate.aux.diagnostics["unbounded"]) == 1
        assert float(estimate.aux.diagnostics["relative_bias"]) == np.inf
        assert np.isfinite(float(estimate.grads.recurrent))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_in_use():
    """Compiled once: the plan depends on the look-ahead alone, by its hidden states and not its residuals."""
    case = systems.structured("lstm", 2001, width=16)
    sizes = []
    for look_ahead, longest in ((501, 250), (2001, 1000)):
        estimator = adaptive(case, max_length=longest)
        state = estimator.init(case.params, case.hidden)
        compiled = jax.jit(estimator.update).lower(case.params, state, case.window(0, look_ahead)).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        sizes.append(analysis.temp_size_in_bytes)
    states = 1500 * 2 * 16 * 8  # what storing h of every further step would take
    assert sizes[1] - sizes[0] < states


def test_measurements_are_spread_over_the_look_ahead():
    """A loss at every 16th step alone: consecutive times would meet none of them, and lose K for ever."""
    case = decaying(200)
    system = jtrunc.System(
        lambda theta, hidden, x: (case.system.transition(theta, hidden[0], x), hidden[1] + 1),
        lambda params, hidden, x: (jnp.where(hidden[1] % 16 == 0, hidden[0], 0.0), ()),
    )
    sparse = Case(system, case.params, (case.hidden, jnp.int32(0)), case.inputs)
    options = {"num_lags": 12, "max_length": 9, "initial_length": None}
    for num_times, length, num_read in ((1, 9, 13), (84, 6, 96)):
        estimator = jtrunc.adaptive_bptt(system, 0.5, num_times=num_times, **options)
        state = estimator.init(sparse.params, sparse.hidden)
        estimate, _ = jax.jit(estimator.update)(sparse.params, state, sparse.window(0, 96))
        assert int(estimate.aux.diagnostics["truncation_length"]) == length
        assert int(estimate.aux.diagnostics["estimation_steps"]) == num_read


def test_nothing_is_said_before_the_first_estimate():
    case = decaying(40)
    estimator = adaptive(case)
    state = estimator.init(case.params, case.hidden)
    numbers = jax.jit(estimator.update)(case.params, state, case.window(0, 19))[0].aux.diagnostics
    assert np.isnan(numbers["decay_rate"]) and np.isnan(numbers["relative_bias"])
    assert int(numbers["unbounded"]) == 0 and int(numbers["truncation_length"]) == 3


@pytest.mark.slow
def test_devices_with_lengths_of_their_own_add_up_their_averages(mesh):
    """Eight streams, each with its own decay, so that each device has its own K and number of losses."""
    inputs = jnp.tile(jnp.linspace(0.3, 0.9, 8), (40, 1))

    def transition(theta: jax.Array, hidden: jax.Array, inputs: jax.Array) -> jax.Array:
        return inputs * hidden + theta

    system = jtrunc.System(transition, lambda params, hidden, inputs: (hidden, ()))
    estimator = jtrunc.adaptive_bptt(system, 0.2, num_lags=12, max_length=15)
    params = jtrunc.Params(jnp.float64(1.0))

    def update(params: jtrunc.Params, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        estimate, _ = estimator.update(params, estimator.init(params, jnp.float64(0)), inputs)
        return estimate.grads.recurrent, estimate.num_steps

    alone = [jax.jit(update)(params, inputs[:, b]) for b in range(8)]
    assert len({int(length) for _, length in alone}) > 3
    spread = jax.shard_map(
        lambda params, inputs: update(params, inputs[:, 0])[0],
        mesh=mesh,
        in_specs=(jax.P(), jax.P(None, "data")),
        out_specs=jax.P(),
    )
    np.testing.assert_allclose(
        jax.jit(spread)(params, inputs), sum(float(grad) for grad, _ in alone), rtol=1e-12
    )


def test_layers_without_float_leaves_have_no_norms():
    system = jtrunc.System(
        lambda theta, hidden, x: {"level": theta * hidden["level"] + x, "clock": hidden["clock"] + 1},
        lambda params, hidden, x: (hidden["level"], ()),
    )
    hidden = {"level": jnp.float64(0), "clock": jnp.int32(0)}
    norms = gradient_norms(system, jtrunc.Params(jnp.float64(0.5)), hidden, jnp.ones(3), 1, parts=by_layer)
    assert {name: norm.tolist() for name, norm in norms.items()} == {"['level']": [[1.0, 0.5]]}
