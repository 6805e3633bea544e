"""Deterministic estimators are exact in float64: against the plain loop of the papers, and jax.grad."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jtrunc
from jtrunc import cells
from jtrunc.backward import fused, thresholds
from tests import reference, systems
from tests.compare import add, assert_close, differ
from tests.systems import Case

CELLS = {
    "tanh": lambda: cells.tanh(2, 3),
    "leaky": lambda: cells.leaky(2, 3, 0.3),
    "gru": lambda: cells.gru(2, 3),
    "lstm": lambda: cells.lstm(2, 3, forget_bias=2.0),
    "stack": lambda: cells.stack([cells.lstm(2, 3), cells.gru(3, 2)]),
}
LENGTHS = (1, 2, 17, 200)


def every_cell_and_length(lengths: tuple[int, ...], usual: int) -> Any:
    """All pairs; those of the LSTM and those of the usual length are in the fast tier."""
    pairs = [
        pytest.param(cell, length, marks=() if cell == "lstm" or length == usual else pytest.mark.slow)
        for cell in CELLS
        for length in lengths
    ]
    return pytest.mark.parametrize(("cell", "length"), pairs)


def squared_error(prediction: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    return 0.5 * jnp.sum((prediction - target) ** 2), prediction


@cache
def cell_case(cell: str, batch: tuple[int, ...] = ()) -> Case:
    """200 steps of a cell with a readout, all parameters away from their special initial values."""
    model = cells.model(CELLS[cell](), 2, squared_error)
    generator = np.random.default_rng(7)
    shift = lambda leaf: leaf + jnp.asarray(0.2 * generator.normal(size=leaf.shape))  # noqa: E731
    params = jax.tree.map(shift, model.init(jax.random.key(0), jnp.float64))
    hidden = jax.tree.map(shift, model.initial_hidden(batch, jnp.float64))
    inputs = tuple(jnp.asarray(generator.normal(size=(max(LENGTHS), *batch, 2))) for _ in range(2))
    return Case(model.system, params, hidden, inputs)


@cache
def run_of(cell: str, batch: tuple[int, ...] = ()) -> reference.Linearised:
    return reference.linearise(*cell_case(cell, batch))


def prefix(run: reference.Linearised, stop: int, start: int = 0) -> reference.Linearised:
    return reference.piece(run, start, stop)


def first(case: Case, length: int) -> Case:
    return case._replace(inputs=case.window(0, length))


@partial(jax.jit, static_argnums=0)
def scan_gradient(system: Any, params: Any, hidden: Any, inputs: Any) -> Any:
    """jax.grad through an ordinary lax.scan: what a user without this library would write."""

    def total(params):
        def step(hidden, x):
            hidden = system.transition(params.recurrent, hidden, x)
            return hidden, system.loss(params, hidden, x)[0]

        return jax.lax.scan(step, hidden, inputs)[1].sum()

    return jax.grad(total)(params)


def estimate(estimator: Any, case: Case, jit: bool = True) -> tuple[Any, Any]:
    update = jax.jit(estimator.update) if jit else estimator.update
    return update(case.params, estimator.init(case.params, case.hidden), case.inputs)


def walk(estimator: Any, case: Case, chunks: list[int]) -> tuple[list[Any], Any]:
    """Updates at fixed parameters over consecutive chunks."""
    state, estimates, start = estimator.init(case.params, case.hidden), [], 0
    for chunk in chunks:
        part, state = jax.jit(estimator.update)(case.params, state, case.window(start, start + chunk))
        estimates.append(part)
        start += chunk
    return estimates, state


@every_cell_and_length(LENGTHS, 17)
def test_bptt_is_the_plain_loop_and_jax_grad(cell, length):
    case, run = first(cell_case(cell), length), prefix(run_of(cell), length)
    result, state = estimate(jtrunc.bptt(case.system), case)
    assert_close(result.grads, reference.bptt(run))
    assert_close(result.grads, scan_gradient(*case))
    np.testing.assert_allclose(result.loss, run.losses.sum(), rtol=1e-12)
    assert result.num_steps == length and result.num_steps.dtype == jnp.int32
    assert_close(state.hidden, run.states[-1])


@pytest.mark.parametrize(
    "checkpoint", ["sqrt", 5, *(pytest.param(length, marks=pytest.mark.slow) for length in (1, 17, 100))]
)
def test_checkpointing_changes_no_gradient(checkpoint):
    case, run = first(cell_case("lstm"), 17), prefix(run_of("lstm"), 17)
    result, state = estimate(jtrunc.bptt(case.system, checkpoint=checkpoint), case)
    assert_close(result.grads, reference.bptt(run))
    assert_close(state.hidden, run.states[-1])
    assert result.aux.loss.shape == (17, 2) and result.num_steps == 17


@every_cell_and_length(LENGTHS, 17)
def test_truncated_bptt_is_equation_9(cell, length):
    case, run = first(cell_case(cell), length), prefix(run_of(cell), length)
    result, state = estimate(jtrunc.truncated_bptt(case.system, 5), case)
    assert_close(result.grads, reference.truncated_bptt(run, 5))
    if length > 5:
        assert differ(result.grads, reference.bptt(run))
    np.testing.assert_allclose(result.loss, run.losses.sum(), rtol=1e-12)
    assert result.num_steps == length
    assert_close(state.hidden, run.states[-1])


@every_cell_and_length((1, 2, 7), 7)
def test_windowed_bptt_is_equation_15(cell, length):
    """The window is full (K₁ + 1 = 7 inputs) or, at the start of a stream, shorter."""
    case, run = first(cell_case(cell), length), prefix(run_of(cell), length)
    result, state = estimate(jtrunc.windowed_bptt(case.system, 6, 3), case)
    assert_close(result.grads, reference.windowed_bptt(run, 6, 3))
    scored = min(3, length)
    np.testing.assert_allclose(result.loss, run.losses[-scored:].sum(), rtol=1e-12)
    assert result.num_steps == scored
    assert_close(state.hidden, run.states[scored])
    if length > 3:
        assert differ(result.grads, jax.tree.map(lambda g: g / 3, reference.bptt(run)))


@pytest.mark.slow
@pytest.mark.parametrize("length", [17, 200])
@pytest.mark.parametrize("cell", CELLS)
def test_windowed_bptt_over_long_windows(cell, length):
    case, run = first(cell_case(cell), length), prefix(run_of(cell), length)
    estimator = jtrunc.windowed_bptt(case.system, length - 1, length // 2, average=False)
    result, _ = estimate(estimator, case)
    assert_close(result.grads, reference.windowed_bptt(run, length - 1, length // 2, average=False))


@pytest.mark.slow
@pytest.mark.parametrize("make", ["bptt", "truncated"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_batch_inside_the_system(cell, make):
    case, run = first(cell_case(cell, (2,)), 17), prefix(run_of(cell, (2,)), 17)
    if make == "bptt":
        assert_close(estimate(jtrunc.bptt(case.system), case)[0].grads, reference.bptt(run))
    else:
        result, _ = estimate(jtrunc.truncated_bptt(case.system, 4), case)
        assert_close(result.grads, reference.truncated_bptt(run, 4))


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["tanh", "stack"])
def test_without_the_declared_structure_nothing_changes(cell):
    case = first(cell_case(cell), 17)
    plain = case._replace(system=case.system._replace(structure=None))
    for make in (jtrunc.bptt, partial(jtrunc.truncated_bptt, length=4)):
        declared, generic = estimate(make(case.system), case), estimate(make(plain.system), plain)
        assert_close(declared, generic, rtol=1e-12)


@pytest.mark.parametrize("cell", ["tanh", "lstm", "gru"])
def test_kernels_on_the_left_change_nothing(cell, monkeypatch):
    """As for wide layers and some tens of rows, both ways; they are there, or the test proves nothing."""
    case = first(cell_case(cell, batch=(3,)), 9)
    expected = estimate(jtrunc.bptt(case.system), case)
    monkeypatch.setattr(thresholds, "ROWS_TO_TURN", range(2, 9))
    monkeypatch.setattr(thresholds, "SIZE_TO_TURN", 1)
    monkeypatch.setattr(thresholds, "STEPS_TO_TURN", 2)
    monkeypatch.setattr(thresholds, "SIZE_ON_THE_LEFT", 1)
    turned: list[int] = []
    product = fused.project_hidden
    left: list[int] = []
    on_the_left = fused.matrix_on_the_left

    def count(matrix: jax.Array, vectors: jax.Array) -> jax.Array:
        left.append(matrix.shape[0])
        return on_the_left(matrix, vectors)

    monkeypatch.setattr(fused, "matrix_on_the_left", count)

    def spy(structure: Any, layout: Any, weights: Any, *rest: Any) -> Any:
        turned.append(len(weights.turned))
        return product(structure, layout, weights, *rest)

    monkeypatch.setattr(fused, "project_hidden", spy)
    assert_close(estimate(jtrunc.bptt(case.system), case), expected, rtol=1e-12)
    assert max(turned) > 0
    assert len(left) > sum(turned)  # those of the way out, and more on the way back


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(systems.CASES))
def test_any_two_functions_will_do(name):
    case = systems.CASES[name](11)
    run = reference.linearise(*case)
    assert_close(estimate(jtrunc.bptt(case.system), case)[0].grads, reference.bptt(run))
    truncated, _ = estimate(jtrunc.truncated_bptt(case.system, 4), case)
    assert_close(truncated.grads, reference.truncated_bptt(run, 4))
    assert differ(truncated.grads, reference.bptt(run))
    window = first(case, 5)
    windowed, _ = estimate(jtrunc.windowed_bptt(case.system, 4, 2), window)
    assert_close(windowed.grads, reference.windowed_bptt(prefix(run, 5), 4, 2))


@pytest.mark.slow
@pytest.mark.parametrize("make", ["bptt", "checkpointed", "truncated", "windowed"])
def test_without_jit(make):
    case, run = first(cell_case("gru"), 7), prefix(run_of("gru"), 7)
    estimator, expected = {
        "bptt": (jtrunc.bptt(case.system), reference.bptt(run)),
        "checkpointed": (jtrunc.bptt(case.system, checkpoint="sqrt"), reference.bptt(run)),
        "truncated": (jtrunc.truncated_bptt(case.system, 3), reference.truncated_bptt(run, 3)),
        "windowed": (jtrunc.windowed_bptt(case.system, 6, 2), reference.windowed_bptt(run, 6, 2)),
    }[make]
    assert_close(estimate(estimator, case, jit=False)[0].grads, expected)


@pytest.mark.parametrize("chunks", [[17], [5, 5, 5, 2], [1] * 17, [2, 3, 7, 5]])
def test_chunked_updates_carry_the_phase(chunks):
    """A gradient cannot cross an update; inside, the cuts lie where the stream's clock puts them."""
    case, run = first(cell_case("lstm"), 17), prefix(run_of("lstm"), 17)
    estimates, state = walk(jtrunc.truncated_bptt(case.system, 5), case, chunks)
    starts = np.cumsum([0, *chunks])
    for part, start, stop in zip(estimates, starts, starts[1:], strict=False):
        expected = reference.truncated_bptt(prefix(run, stop, start), 5, phase=int(start))
        assert_close(part.grads, expected)
    np.testing.assert_allclose(sum(part.loss for part in estimates), run.losses.sum(), rtol=1e-12)
    assert sum(part.num_steps for part in estimates) == 17
    assert_close(state.hidden, run.states[-1])
    _, (_, aux) = jtrunc.unroll(*case)
    np.testing.assert_allclose(np.concatenate([part.aux.loss for part in estimates]), aux, rtol=1e-12)
    total = add(*(part.grads for part in estimates))
    aligned = chunks in ([17], [5, 5, 5, 2])
    whole = reference.truncated_bptt(run, 5)
    if aligned:
        assert_close(total, whole)
    else:
        assert differ(total, whole)


def test_chunks_of_bptt_are_bptt_of_chunks():
    case, run = first(cell_case("lstm"), 17), prefix(run_of("lstm"), 17)
    estimates, _ = walk(jtrunc.bptt(case.system), case, [10, 7])
    assert_close(estimates[0].grads, reference.bptt(prefix(run, 10)))
    assert_close(estimates[1].grads, reference.bptt(prefix(run, 17, 10)))
    assert differ(add(*(part.grads for part in estimates)), reference.bptt(run))


def test_overlapping_windows_score_every_loss_once():
    """K₁ = 4, K₂ = 2 on 11 steps: a full window has 5 inputs and moves on by two; before it come windows of
    1 and 3 steps from the stream's first state, which see all that there is to see."""
    case, run = first(cell_case("tanh"), 11), prefix(run_of("tanh"), 11)
    estimator = jtrunc.windowed_bptt(case.system, 4, 2, average=False)
    update = jax.jit(estimator.update)
    state, start, scored = estimator.init(case.params, case.hidden), 0, []
    for stop in (1, 3, 5, 7, 9, 11):
        early = stop < 5
        part, after = update(case.params, state, case.window(start, stop))
        window = prefix(run, stop, start)
        assert_close(part.grads, reference.windowed_bptt(window, 4, 2, average=False))
        np.testing.assert_allclose(part.loss, window.losses[-int(part.num_steps) :].sum(), rtol=1e-12)
        scored += range(stop - int(part.num_steps), stop)
        if not early:
            state, start = after, start + int(part.num_steps)
            assert_close(state.hidden, run.states[start])
    assert scored == list(range(11))


def streams(count: int, length: int) -> Case:
    """`count` streams of the tanh system on a leading axis of hidden and on axis 1 of inputs."""
    case = systems.tanh(length)
    generator = np.random.default_rng(11)
    hidden = jnp.asarray(generator.normal(size=(count, *case.hidden.shape)))
    inputs = jnp.asarray(generator.normal(size=(length, count, 2)))
    return case._replace(hidden=hidden, inputs=inputs)


def stream_runs(case: Case) -> list[reference.Linearised]:
    return [
        reference.linearise(case.system, case.params, case.hidden[i], case.inputs[:, i])
        for i in range(len(case.hidden))
    ]


ESTIMATORS = {
    "bptt": (jtrunc.bptt, reference.bptt),
    "checkpointed": (partial(jtrunc.bptt, checkpoint=4), reference.bptt),
    "truncated": (partial(jtrunc.truncated_bptt, length=3), partial(reference.truncated_bptt, length=3)),
    "windowed": (
        partial(jtrunc.windowed_bptt, backward_steps=9, loss_steps=4),
        partial(reference.windowed_bptt, backward_steps=9, loss_steps=4),
    ),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_under_vmap(name):
    case = streams(3, 10)
    estimator, oracle = ESTIMATORS[name][0](case.system), ESTIMATORS[name][1]
    states = jax.vmap(lambda hidden: estimator.init(case.params, hidden))(case.hidden)
    update = jax.jit(jax.vmap(lambda state, inputs: estimator.update(case.params, state, inputs)[0], (0, 1)))
    grads = update(states, case.inputs).grads
    for i, run in enumerate(stream_runs(case)):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], grads), oracle(run))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_per_stream_averages_the_gradients(name):
    case = streams(3, 10)
    estimator, oracle = jtrunc.per_stream(ESTIMATORS[name][0](case.system)), ESTIMATORS[name][1]
    result, _ = estimate(estimator, case)
    total = add(*map(oracle, stream_runs(case)))
    assert_close(result.grads, jax.tree.map(lambda g: g / 3, total))
    assert differ(result.grads, total)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_under_shard_map_on_eight_devices(name, check_vma, mesh):
    """One stream a device. With the checks on, the parameters are cast to varying first (pitfalls, JAX)."""
    case = streams(8, 10)
    estimator, oracle = ESTIMATORS[name][0](case.system), ESTIMATORS[name][1]

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("data"), P(None, "data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    def mean_gradient(params, hidden, inputs):
        if check_vma:
            params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "data", to="varying"), params)
        state = estimator.init(params, hidden[0])
        result, state = estimator.update(params, state, inputs[:, 0])
        return jax.tree.map(lambda leaf: jax.lax.pmean(leaf, "data"), result.grads)

    total = add(*map(oracle, stream_runs(case)))
    grads = jax.jit(mean_gradient)(case.params, case.hidden, case.inputs)
    assert len(jax.tree.leaves(grads)[0].sharding.device_set) == 8
    assert_close(grads, jax.tree.map(lambda g: g / 8, total))
    assert differ(grads, total)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_structured_cell_under_shard_map(check_vma, mesh):
    """The same for the engine that declared cells use: eight streams, one a device, summed."""
    case = first(cell_case("lstm", (2,)), 17)
    inputs = jax.tree.map(lambda leaf: jnp.stack([leaf * (1 + i / 8) for i in range(8)]), case.inputs)
    estimator = jtrunc.truncated_bptt(case.system, 5)

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=check_vma)
    def gradients(params, inputs):
        if check_vma:
            params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "data", to="varying"), params)
        hidden = jax.tree.map(lambda leaf: leaf + 0 * inputs[0][0, 0, 0, 0], case.hidden)
        state = estimator.init(params, hidden)
        result, _ = estimator.update(params, state, jax.tree.map(lambda leaf: leaf[0], inputs))
        return jax.tree.map(lambda leaf: leaf[None], result.grads)

    together = jax.jit(gradients)(case.params, inputs)
    for i in (0, 3, 7):
        alone, _ = estimate(estimator, case._replace(inputs=jax.tree.map(lambda leaf, i=i: leaf[i], inputs)))
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), alone.grads)


@pytest.mark.slow
@pytest.mark.parametrize("structured", [False, True])
def test_cuts_that_differ_between_devices_alone(structured, mesh):
    """Parameters, state and inputs are the same on all: it is the keys that make the gradients vary."""
    case = first(cell_case("lstm", (2,)), 12)
    system = case.system if structured else case.system._replace(structure=None)
    estimator = jtrunc.artbp(system, jtrunc.truncation.constant(0.3))
    keys = jax.random.split(jax.random.key(1), 8)

    def gradient(key):
        state = estimator.init(case.params, case.hidden, key)
        return estimator.update(case.params, state, case.inputs)[0].grads

    @partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P())
    def summed(keys):
        return gradient(keys[0])  # of parameters that do not vary: jax sums over the devices by itself

    each = [gradient(key) for key in keys]
    assert differ(each[0], each[1])
    assert_close(jax.jit(summed)(keys), add(*each))


def test_a_sharded_batch_under_jit(mesh):
    """The batch axis of the inputs is sharded, the parameters replicated: jit sums over devices by itself."""
    model = cells.model(cells.lstm(2, 3), 2, squared_error)
    params = model.init(jax.random.key(0), jnp.float64)
    generator = np.random.default_rng(5)
    inputs = tuple(jnp.asarray(generator.normal(size=(12, 16, 2))) for _ in range(2))
    case = Case(model.system, params, model.initial_hidden((16,), jnp.float64), inputs)
    expected, _ = estimate(jtrunc.truncated_bptt(case.system, 5), case)
    sharding = jax.sharding.NamedSharding(mesh, P(None, "data"))
    sharded, _ = estimate(
        jtrunc.truncated_bptt(case.system, 5), case._replace(inputs=jax.device_put(inputs, sharding))
    )
    assert_close(sharded.grads, expected.grads)


def test_unroll_is_the_forward_pass():
    case, run = first(cell_case("lstm"), 17), prefix(run_of("lstm"), 17)
    hidden, (losses, aux) = jax.jit(partial(jtrunc.unroll, case.system))(*case[1:])
    assert_close(hidden, run.states[-1])
    np.testing.assert_allclose(losses, run.losses, rtol=1e-12)
    assert aux.shape == (17, 2)
