"""One table of all estimators, and the properties that every one of them must have."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jtrunc
from jtrunc import training, truncation
from jtrunc.training.placement import place
from tests import reference, systems
from tests.compare import assert_close, differ
from tests.systems import Case


def state_law(elapsed, hidden):
    """c looks at the time since the last cut and at the state, in whatever precision that has."""
    first = jnp.ravel(jax.tree.leaves(hidden)[0])[0]
    return 0.5 * jax.nn.sigmoid(first) / elapsed


DETERMINISTIC = {
    "bptt": jtrunc.bptt,
    "checkpointed": partial(jtrunc.bptt, checkpoint="sqrt"),
    "truncated": partial(jtrunc.truncated_bptt, length=3),
    "windowed": partial(jtrunc.windowed_bptt, backward_steps=6, loss_steps=4),
    "adaptive": partial(jtrunc.adaptive_bptt, tolerance=0.5, num_lags=6, max_length=3),
    "artbp_every": partial(jtrunc.artbp, truncation=truncation.every(3)),
    "rtrl": jtrunc.rtrl,
    "snap": partial(jtrunc.snap, order=2),
    "targets": partial(jtrunc.target_propagation, block_length=3, penalty=0.1, hidden_steps=0),
}
RANDOM = {
    "artbp_constant": partial(jtrunc.artbp, truncation=truncation.constant(0.3)),
    "artbp_polynomial": partial(jtrunc.artbp, truncation=truncation.polynomial(3, 4)),
    "artbp_state": partial(jtrunc.artbp, truncation=truncation.from_probability(state_law)),
    "online_constant": partial(jtrunc.online_artbp, truncation=truncation.constant(0.3)),
    "online_polynomial": partial(jtrunc.online_artbp, truncation=truncation.polynomial(3, 4)),
    "online_state": partial(jtrunc.online_artbp, truncation=truncation.from_probability(state_law)),
    "nobacktrack": partial(jtrunc.nobacktrack, rank=2),
    "uoro": jtrunc.uoro,
}
ALL = DETERMINISTIC | RANDOM
STEPS = 7

every_estimator = pytest.mark.parametrize("name", ALL)
every_case = pytest.mark.parametrize("kind", ["tanh", "nested"])


class Built(NamedTuple):
    """An estimator on a case, its first state and its jitted update."""

    case: Case
    estimator: Any
    state: Any
    update: Any

    def with_key(self, seed: int) -> Any:
        return self.estimator.init(self.case.params, self.case.hidden, jax.random.key(seed))


@cache
def build(make: Any, kind: str, steps: int = STEPS) -> Built:
    """Built once for all tests: most of their time is compilation."""
    case = systems.CASES[kind](steps)
    estimator = make(case.system)
    state = estimator.init(case.params, case.hidden, jax.random.key(0))
    return Built(case, estimator, state, jax.jit(estimator.update))


def types(tree: Any) -> Any:
    return jax.tree.map(jax.typeof, tree)


def keys_of(state: Any) -> list[jax.Array]:
    """Raw data of the key leaves of a state that do not belong to the system's own hidden state."""
    leaves = jax.tree.leaves(state._replace(hidden=()))
    return [jax.random.key_data(k) for k in leaves if jnp.issubdtype(k.dtype, jax.dtypes.prng_key)]


@pytest.mark.slow
@every_case
@every_estimator
def test_types_survive_an_update(name, kind):
    case, _, state, update = build(ALL[name], kind)
    estimate, after = update(case.params, state, case.inputs)
    assert types(after) == types(state)
    assert types(state.hidden) == types(jax.tree.map(jnp.asarray, case.hidden))
    assert types(estimate.grads) == types(case.params)
    assert estimate.loss.shape == () and estimate.num_steps.shape == ()
    assert estimate.num_steps.dtype == jnp.int32
    assert np.isfinite(reference.to_vector((estimate.grads, estimate.loss))).all()


@pytest.mark.slow
@every_case
@every_estimator
def test_aux_is_stacked_over_the_scored_steps(name, kind):
    case, _, state, update = build(ALL[name], kind)
    estimate, _ = update(case.params, state, case.inputs)
    _, (losses, aux) = jtrunc.unroll(case.system, case.params, case.hidden, case.inputs)
    assert jax.tree.structure(estimate.aux.loss) == jax.tree.structure(aux)
    steps = int(estimate.aux.diagnostics.get("num_scored", estimate.num_steps))
    scored = slice(STEPS - steps, None) if name == "windowed" else slice(0, steps)
    for mine, plain in zip(jax.tree.leaves(estimate.aux.loss), jax.tree.leaves(aux), strict=True):
        assert mine.shape[1:] == plain.shape[1:] and mine.dtype == plain.dtype
        assert len(mine) == (steps if name == "windowed" else STEPS)
        np.testing.assert_allclose(mine[:steps], plain[scored], rtol=1e-12)
        assert not np.any(mine[steps:])
    np.testing.assert_allclose(estimate.loss, losses[scored].sum(), rtol=1e-12)
    assert all(isinstance(label, str) and np.shape(v) == () for label, v in estimate.aux.diagnostics.items())


@pytest.mark.slow
@every_estimator
def test_jit_changes_nothing(name):
    case, estimator, state, update = build(ALL[name], "tanh")
    jitted = update(case.params, state, case.inputs)
    plain = estimator.update(case.params, state, case.inputs)
    assert_close(jitted, plain, rtol=1e-12)
    assert [k.tolist() for k in keys_of(jitted[1])] == [k.tolist() for k in keys_of(plain[1])]


@pytest.mark.slow
@every_estimator
def test_updates_run_inside_a_scan(name):
    """Three training steps under lax.scan equal three calls."""
    case, estimator, state, _ = build(ALL[name], "tanh", 3 * STEPS)
    windows = case.inputs.reshape(3, STEPS, -1)

    def step(carry, window):
        params, state = carry
        estimate, state = estimator.update(params, state, window)
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, estimate.grads)
        return (params, state), estimate.loss

    (scanned, scanned_state), losses = jax.jit(partial(jax.lax.scan, step))((case.params, state), windows)
    carry, expected = (case.params, state), []
    for window in windows:
        carry, loss = jax.jit(step)(carry, window)
        expected.append(loss)
    assert_close((scanned, scanned_state), carry, rtol=1e-11)
    np.testing.assert_allclose(losses, expected, rtol=1e-11)
    assert differ(scanned, case.params)


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("name", [name for name in ALL if name != "adaptive"])  # it needs its look-ahead
def test_one_step_at_a_time(name, kind):
    """T = 1: nothing lies behind the step, so that all give the exact gradient of ℓ₁ (UORO on average)."""
    case, _, state, update = build(ALL[name], kind, 2)
    exact = reference.bptt(reference.linearise(*case._replace(inputs=case.window(0, 1))))
    if name == "windowed":
        exact = jax.tree.map(lambda g: g / 4, exact)
    estimate, state = update(case.params, state, case.window(0, 1))
    surely = (lambda grads: grads.readout) if name == "uoro" else (lambda grads: grads)
    assert_close(surely(estimate.grads), surely(exact))
    assert estimate.num_steps == 1
    again, _ = update(case.params, state, case.window(1, 2))
    assert differ(again.grads, estimate.grads)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 0.1)])
@every_estimator
def test_narrower_types_give_the_same_numbers_less_exactly(name, dtype, tolerance):
    """Against the same estimator in float64, from the same (rounded) numbers and the same key.

    The tolerance is some roundings of the type: 7 steps, eps = 1.2e-7 and 7.8e-3.
    """
    narrow, (_, estimator, _, update) = systems.tanh(STEPS, dtype=dtype), build(ALL[name], "tanh")
    widen = partial(jax.tree.map, lambda leaf: leaf.astype(jnp.float64))
    wide = narrow._replace(
        params=widen(narrow.params), hidden=widen(narrow.hidden), inputs=widen(narrow.inputs)
    )
    results = []
    for case in (narrow, wide):
        state = estimator.init(case.params, case.hidden, jax.random.key(0))
        results.append(update(case.params, state, case.inputs)[0])
    assert types(results[0].grads) == types(narrow.params)
    assert results[0].loss.dtype == jnp.float32
    assert results[0].num_steps == results[1].num_steps
    assert_close(widen(results[0].grads), results[1].grads, rtol=tolerance)


@pytest.mark.slow
@every_case
@every_estimator
def test_float32_without_x64(name, kind):
    """The library works where jax is in its default state, and makes no float64 of its own."""
    with jax.enable_x64(False):
        case = systems.CASES[kind](STEPS, dtype=jnp.float32)
        estimator = ALL[name](case.system)
        state = estimator.init(case.params, case.hidden, jax.random.key(0))
        estimate, after = jax.jit(estimator.update)(case.params, state, case.inputs)
        assert types(after) == types(state) and types(estimate.grads) == types(case.params)
        assert estimate.loss.dtype == jnp.float32
        grads = jax.tree.map(np.asarray, estimate.grads)
    if name in DETERMINISTIC and kind == "tanh":
        wide, _, state, update = build(ALL[name], kind)
        assert_close(grads, update(wide.params, state, wide.inputs)[0].grads, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", RANDOM)
def test_two_updates_draw_different_cuts(name):
    case, _, state, update = build(ALL[name], "tanh", 64)
    first, after = update(case.params, state, case.inputs)
    if hasattr(state, "num_draws"):  # the draws of step t have the key fold_in(key, t)
        assert after.num_draws == state.num_draws + 64
    else:
        assert all(np.any(a != b) for a, b in zip(keys_of(after), keys_of(state), strict=True))
    assert len(keys_of(state)) >= 1
    if name.startswith("online"):
        lengths = {int(first.num_steps)}
        for _ in range(8):
            estimate, after = update(case.params, after, case.inputs)
            lengths.add(int(estimate.num_steps))
        assert len(lengths) > 2
    else:
        second, _ = update(case.params, after._replace(hidden=state.hidden), case.inputs)
        assert differ(second.grads, first.grads)
    repeated, _ = update(case.params, state, case.inputs)
    assert_close(repeated, first, rtol=1e-14)


@pytest.mark.parametrize("name", RANDOM)
def test_other_keys_draw_other_cuts(name):
    built = build(ALL[name], "tanh", 64)
    case = built.case
    results = [built.update(case.params, built.with_key(seed), case.inputs)[0].grads for seed in range(6)]
    assert sum(differ(result, results[0]) for result in results[1:]) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["artbp_polynomial", "online_polynomial", "nobacktrack", "uoro"])
def test_streams_of_per_stream_draw_independently(name):
    """Eight equal streams: with one key each their gradients differ, so the mean is none of them."""
    case = systems.tanh(32)
    stacked = jnp.broadcast_to(case.hidden, (8, *case.hidden.shape))
    inputs = jnp.broadcast_to(case.inputs[:, None], (32, 8, 2))
    estimator = jtrunc.per_stream(ALL[name](case.system))
    state = estimator.init(case.params, stacked, jax.random.key(0))
    estimate, after = jax.jit(estimator.update)(case.params, state, inputs)
    assert types(after) == types(state) and types(estimate.grads) == types(case.params)
    drawn = {tuple(k.ravel().tolist()) for keys in keys_of(state) for k in keys}
    assert len(drawn) == 8


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_estimators_ignore_the_key(name):
    built = build(ALL[name], "tanh")
    results = [built.update(built.case.params, built.with_key(seed), built.case.inputs)[0] for seed in (0, 1)]
    assert_close(results[0], results[1], rtol=1e-14)


@every_estimator
def test_whether_the_number_of_steps_is_known_when_tracing(name):
    """Static estimators say so with a concrete int32, which is how many-seed programs choose vmap or map."""
    case, estimator, state, _ = build(ALL[name], "tanh")
    seen = []

    def update(state, inputs):
        estimate, _ = estimator.update(case.params, state, inputs)
        seen.append(not isinstance(estimate.num_steps, np.generic))
        return estimate.loss

    jax.eval_shape(update, state, case.inputs)
    assert seen == [name.startswith(("online", "adaptive"))]


# On eight devices as on one.

STREAMS, FORWARD = 8, ("rtrl", "snap", "nobacktrack", "uoro")


class Streams(NamedTuple):
    """Streams that differ, from states that differ."""

    params: Any
    hidden: jax.Array
    inputs: jax.Array

    @property
    def rolled(self) -> jax.Array:
        """The inputs of the neighbour."""
        return jnp.roll(self.inputs, 1, axis=1)


def streams() -> Streams:
    case, generator = systems.tanh(STEPS, width=4), np.random.default_rng(4)
    inputs = generator.normal(size=(STEPS, STREAMS, 2))
    return Streams(case.params, jnp.asarray(generator.normal(size=(STREAMS, 4))), jnp.asarray(inputs))


def two_updates(estimator: Any, params: Any, state: Any, inputs: Any) -> Any:
    """The gradients of two updates; forward estimators carry an influence from one to the next."""

    @jax.jit
    def run(params: Any, state: Any, inputs: Any) -> Any:
        first, state = estimator.update(params, state, inputs)
        return first.grads, estimator.update(params, state, inputs)[0].grads

    return run(params, state, inputs)


@pytest.mark.slow
@every_estimator
def test_streams_laid_out_over_devices(name):
    """By jit: streams over four devices, rows of the parameters over two, equal to 1e-12."""
    params, hidden, inputs = given = streams()
    system = systems.tanh(STEPS, width=4).system
    make = ALL[name]
    estimator = jtrunc.per_stream(make(system)) if name in FORWARD else make(systems.batched(system))
    state = estimator.init(params, hidden, jax.random.key(0))
    expected = two_updates(estimator, params, state, inputs)
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    rows = NamedSharding(mesh, PartitionSpec("model"))
    split = jax.tree.map(lambda leaf: jax.device_put(leaf, rows) if leaf.shape[0] == 4 else leaf, params)
    layout = place(mesh, None, inputs)
    split, state = layout.params(split), layout.hidden(state)
    actual = two_updates(estimator, split, state, layout.data(inputs))
    assert_close(actual, expected, rtol=1e-12)
    assert len(layout.data(inputs).addressable_shards[0].data[0]) == 2
    assert split.recurrent["W"].addressable_shards[0].data.shape == (2, 4)
    assert differ(two_updates(estimator, split, state, layout.data(given.rolled)), expected)


@pytest.mark.slow
@every_estimator
def test_streams_on_devices_of_their_own(name, mesh):
    """By shard_map: parameters replicated, streams and their states apart."""
    params, hidden, inputs = given = streams()
    make, system = ALL[name], systems.tanh(STEPS, width=4).system
    alone, spread = jtrunc.per_stream(make(system)), jtrunc.per_stream(make(system), mesh=mesh)
    state = alone.init(params, hidden, jax.random.key(0))
    expected = two_updates(alone, params, state, inputs)
    assert_close(two_updates(spread, params, state, inputs), expected, rtol=1e-12)
    assert differ(two_updates(spread, params, state, given.rolled), expected)


@pytest.mark.slow
@every_estimator
def test_seeds_on_devices(name):
    """Nine seeds of two updates, each with its learning rate, on eight devices."""
    case = systems.tanh(2 * STEPS)
    mesh = jax.make_mesh((8,), ("seeds",))

    def init(key: jax.Array) -> Any:
        return jax.tree.map(lambda leaf: leaf * (1 + 0.1 * jax.random.normal(key)), case.params)

    def run(mesh: Any) -> Any:
        found = training.train(
            case.system, init, case.hidden, ALL[name](case.system), lambda h: optax.sgd(h["rate"]),
            case.inputs, window=STEPS, num_updates=2, lead_in=False, seeds=9, mesh=mesh,
            hyperparameters={"rate": np.linspace(0.001, 0.01, 9)},
        )  # fmt: skip
        return found.params, found.history["loss"]

    actual, expected = run(mesh), run(None)
    assert_close(actual, expected, rtol=1e-12)
    assert differ(jax.tree.map(lambda leaf: leaf[::-1], actual[0]), expected[0])


# Where two estimators must coincide, and beside it where they must not.

COINCIDENCES = {
    "bptt with segments": (DETERMINISTIC["checkpointed"], jtrunc.bptt, True),
    "L = T": (partial(jtrunc.truncated_bptt, length=STEPS), jtrunc.bptt, True),
    "L > T": (partial(jtrunc.truncated_bptt, length=STEPS + 5), jtrunc.bptt, True),
    "L < T": (partial(jtrunc.truncated_bptt, length=STEPS - 1), jtrunc.bptt, False),
    "c = 0": (partial(jtrunc.artbp, truncation=truncation.constant(0.0)), jtrunc.bptt, True),
    "c > 0": (partial(jtrunc.artbp, truncation=truncation.constant(0.4)), jtrunc.bptt, False),
    "never": (partial(jtrunc.artbp, truncation=truncation.never()), jtrunc.bptt, True),
    "online, never": (partial(jtrunc.online_artbp, truncation=truncation.never()), jtrunc.bptt, True),
    "every(L)": (
        DETERMINISTIC["artbp_every"],
        DETERMINISTIC["truncated"],
        True,
    ),
    "every(other L)": (
        partial(jtrunc.artbp, truncation=truncation.every(2)),
        DETERMINISTIC["truncated"],
        False,
    ),
    "K1, K2 = T": (
        partial(jtrunc.windowed_bptt, backward_steps=STEPS, loss_steps=STEPS, average=False),
        jtrunc.bptt,
        True,
    ),
    "K2 < T": (
        partial(jtrunc.windowed_bptt, backward_steps=STEPS, loss_steps=STEPS - 1, average=False),
        jtrunc.bptt,
        False,
    ),
    "averaged": (
        partial(jtrunc.windowed_bptt, backward_steps=STEPS, loss_steps=STEPS),
        jtrunc.bptt,
        False,
    ),
    "rtrl": (jtrunc.rtrl, jtrunc.bptt, True),
    "snap of a high order": (partial(jtrunc.snap, order=STEPS), jtrunc.rtrl, True),
    "snap of order 1": (partial(jtrunc.snap, order=1), jtrunc.rtrl, False),
    "B = T": (
        partial(jtrunc.target_propagation, block_length=STEPS, penalty=0.1, hidden_steps=0),
        jtrunc.bptt,
        True,
    ),
    "B < T": (DETERMINISTIC["targets"], jtrunc.bptt, False),
    "w = 1": (
        partial(jtrunc.artbp, truncation=truncation.given(jnp.zeros(STEPS), jnp.zeros(STEPS))),
        jtrunc.bptt,
        True,
    ),
    "w = 2": (
        partial(jtrunc.artbp, truncation=truncation.given(jnp.zeros(STEPS), jnp.full(STEPS, 0.5))),
        jtrunc.bptt,
        False,
    ),
}


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("pair", COINCIDENCES)
def test_estimators_coincide_where_they_must(pair, kind):
    first, second, equal = COINCIDENCES[pair]
    results = []
    for make in (first, second):
        case, _, state, update = build(make, kind)
        results.append(update(case.params, state, case.inputs)[0].grads)
    if equal:
        assert_close(results[0], results[1], rtol=1e-12)
    else:
        assert differ(results[0], results[1])


@pytest.mark.slow
def test_an_online_window_that_every_law_ends_is_a_fixed_window(key):
    case = systems.tanh(12)
    estimator = jtrunc.online_artbp(case.system, truncation.every(4))
    state = estimator.init(case.params, case.hidden, key)
    run = reference.linearise(*case)
    for start_ in (0, 4):
        estimate, state = estimator.update(case.params, state, case.window(start_, start_ + 8))
        assert estimate.num_steps == 4
        window = reference.linearise(
            case.system, case.params, run.states[start_], case.window(start_, start_ + 4)
        )
        assert_close(estimate.grads, reference.bptt(window))


def test_a_reset_cuts_state_and_gradient(key):
    """`with_resets`: two sequences in one stream give the sum of the two sequences' own gradients."""
    case = systems.tanh(9)
    parts = [case._replace(inputs=case.window(0, 5)), case._replace(inputs=case.window(5, 9))]
    exact = [reference.bptt(reference.linearise(*part)) for part in parts]
    system = jtrunc.with_resets(case.system, case.hidden)
    reset = jnp.arange(9) == 5
    run = reference.linearise(*case)
    estimator = jtrunc.bptt(system)
    state = estimator.init(case.params, case.hidden)
    estimate, _ = estimator.update(case.params, state, (reset, case.inputs))
    assert_close(estimate.grads, jax.tree.map(jnp.add, *exact))
    assert differ(estimate.grads, reference.bptt(run))
    unreset, _ = estimator.update(case.params, state, (jnp.zeros(9, bool), case.inputs))
    assert_close(unreset.grads, reference.bptt(run))
