"""The loop: windows at the wrap, lead-in, equality with a loop in Python, evaluation, bad input."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtrunc
from jtrunc import cells
from jtrunc.base import Params
from jtrunc.training import evaluate, init_state, train, train_step
from jtrunc.training.runner import Runner
from jtrunc.training.stream import circular, lead_in_ends, window_at
from tests.training_cases import assert_same, echo, losses_of, plain, random_length, small

SGD = optax.sgd(0.05)


def run(case: Any, **options: Any) -> Any:
    arguments: dict[str, Any] = {"window": 7, "num_updates": 9} | options
    estimator = arguments.pop("estimator", plain(case.system))
    optimizer = arguments.pop("optimizer", SGD)
    data = arguments.pop("data", case.inputs)
    return train(case.system, case.params, case.hidden, estimator, optimizer, data, **arguments)


@pytest.mark.parametrize("make", [plain, random_length])
def test_equals_a_python_loop_over_the_repeated_data(make: Any) -> None:
    case = small(30)
    estimator, optimizer = make(case.system), optax.adam(1e-2)
    result = run(case, estimator=estimator, optimizer=optimizer, num_updates=20)
    endless = np.concatenate([case.inputs] * 10)
    state = init_state(estimator, optimizer, case.params, case.hidden, jax.random.key(0))
    step, at, losses = jax.jit(train_step, static_argnums=(0, 1)), 0, []
    for _ in range(20):
        state, metrics = step(estimator, optimizer, state, jnp.asarray(endless[at : at + 7]))
        at += int(metrics.num_steps)
        losses.append(float(metrics.loss) / int(metrics.num_steps))
    np.testing.assert_allclose(result.history["loss"], losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert result.history["timestep"][-1] == at and int(result.state.cursor) == at % 30


@pytest.mark.parametrize(("length", "window"), [(5, 3), (5, 5), (4, 7), (1, 3), (6, 4)])
def test_windows_are_read_in_a_circle(length: int, window: int) -> None:
    rows = np.arange(1, length + 1, dtype=np.float32)
    stream = circular(rows, window)
    endless = np.concatenate([rows] * (window + 2))
    for cursor in range(length):
        got = window_at(stream.rows, jnp.int32(cursor), window)
        np.testing.assert_array_equal(got, endless[cursor : cursor + window])
    system = echo()
    result = train(
        system,
        Params(jnp.float32(0)),
        jnp.float32(0),
        plain(system),
        SGD,
        rows,
        window=window,
        num_updates=11,
    )
    expected = np.resize(rows, 11 * window).reshape(11, window).mean(axis=1)
    np.testing.assert_allclose(result.history["loss"], expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "scored"), [(7, 3), (6, 3), (6, 4), (5, 5), (9, 1), (4, 2)])
def test_lead_in_scores_each_loss_once(window: int, scored: int) -> None:
    system = echo()
    rows = 2.0 ** np.arange(20, dtype=np.float32)  # a sum of losses says which rows it holds
    lead_in = len(lead_in_ends(window, scored))
    estimator = plain(system, scored)
    updates = lead_in + 4
    result = train(
        system,
        Params(jnp.float32(0)),
        jnp.float32(0),
        estimator,
        SGD,
        rows,
        window=window,
        num_updates=updates,
    )
    sums = result.history["loss"] * result.history["num_steps"]
    last = result.history["timestep"][-1]
    assert sums.sum() == 2.0**last - 1  # every row below `last`, once
    assert last == window + 3 * scored
    assert int(result.state.cursor) == 4 * scored % 20
    assert float(result.state.estimator_state.hidden) == 4 * scored  # held during the lead-in


def test_without_lead_in_the_first_losses_go_unscored() -> None:
    system = echo()
    rows = 2.0 ** np.arange(20, dtype=np.float32)
    result = train(
        system, Params(jnp.float32(0)), jnp.float32(0), plain(system, 3), SGD, rows,
        window=7, num_updates=1, lead_in=False,
    )  # fmt: skip
    assert result.history["loss"][0] * 3 == 2.0**7 - 2.0**4


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 5])
def test_where_chunks_end_changes_no_bit(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    case = small()
    whole = run(case, estimator=random_length(case.system), num_updates=20)
    monkeypatch.setattr(Runner, "_next_size", lambda self: min(size, 20 - self.update))
    parts = run(case, estimator=random_length(case.system), num_updates=20)
    assert_same(whole.state, parts.state)
    assert_same(whole.history, parts.history)


def test_one_compilation_for_all_chunks() -> None:
    case, traces = small(), []
    inner = plain(case.system)

    def update(*arguments: Any) -> Any:
        traces.append(1)
        return inner.update(*arguments)

    estimator = inner._replace(update=update)
    run(case, estimator=estimator, num_updates=3)
    before = len(traces)
    run(case, estimator=estimator, num_updates=100, log_every=1)
    assert len(traces) == before + 1  # only the look at num_steps


@pytest.mark.slow
def test_log_every_sums_up_whole_lines() -> None:
    case = small()
    fine = run(case, estimator=random_length(case.system), num_updates=10)
    coarse = run(case, estimator=random_length(case.system), num_updates=10, log_every=4)
    assert coarse.history["update"].tolist() == [4, 8, 10]
    loss, steps = fine.history["loss"], fine.history["num_steps"]
    np.testing.assert_allclose(coarse.history["loss"][1], (loss * steps)[4:8].sum() / steps[4:8].sum())
    np.testing.assert_array_equal(coarse.history["timestep"], fine.history["timestep"][[3, 7, 9]])
    np.testing.assert_allclose(coarse.history["grad_norm"][2], fine.history["grad_norm"][8:].mean())
    np.testing.assert_allclose(
        coarse.history["look_ahead_hits"][0], fine.history["look_ahead_hits"][:4].mean()
    )


def test_timesteps_are_counted_in_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small()
    original = Runner.__init__

    def from_far(self: Runner, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        self.timesteps = np.asarray(2**31 - 1)

    monkeypatch.setattr(Runner, "__init__", from_far)
    assert run(case, num_updates=1).history["timestep"][-1] == 2**31 + 6


def test_params_may_be_made_from_the_key() -> None:
    case = small()

    def init(key: jax.Array) -> Params:
        return jax.tree.map(lambda leaf: leaf + jax.random.normal(key, (), leaf.dtype), case.params)

    a, b = (
        train(case.system, init, case.hidden, plain(case.system), SGD, case.inputs,
              window=7, num_updates=2, key=jax.random.key(k)).params.recurrent["W"] for k in (1, 2)
    )  # fmt: skip
    assert not np.allclose(a, b)


def test_evaluation_is_the_mean_loss_whatever_the_chunk() -> None:
    case = small(23)
    losses = losses_of(case.system, case.params, case.hidden, case.inputs)[0]
    for at_once in (1, 5, 23, 1024):
        found = evaluate(case.system, case.params, case.hidden, case.inputs, steps_at_once=at_once)
        np.testing.assert_allclose(found.nats, np.mean(losses, dtype=np.float64), rtol=1e-6)
        np.testing.assert_allclose(found.bits, found.nats / math.log(2))
        assert found.num_steps == 23


def test_evaluation_loses_no_digits_on_a_long_split() -> None:
    system = echo()
    rows = jnp.full(200_000, 0.1, jnp.float32)
    found = evaluate(system, Params(jnp.float32(0)), jnp.float32(0), rows, steps_at_once=50_000)
    assert abs(float(found.nats) - float(np.float32(0.1))) < 1e-12
    assert float(jax.lax.scan(lambda s, x: (s + x, None), jnp.float32(0), rows)[0]) / 200_000 != found.nats


def test_evaluations_come_when_due_and_at_the_end() -> None:
    case = small()
    result = run(
        case, num_updates=10, eval_every=4, eval_data={"valid": case.inputs, "test": case.inputs[:9]}
    )
    assert result.evaluations["valid"]["update"].tolist() == [4, 8, 10]
    last = evaluate(case.system, result.params, case.hidden, case.inputs[:9])
    assert result.evaluations["test"]["nats"][-1] == last.nats


BAD = {
    "window 0": ({"window": 0}, ValueError, "`window`"),
    "window float": ({"window": 2.0}, TypeError, "`window`"),
    "no updates": ({"num_updates": 0}, ValueError, "`num_updates`"),
    "too many updates": ({"num_updates": 2**31}, ValueError, "`num_updates`"),
    "log_every": ({"log_every": -1}, ValueError, "`log_every`"),
    "lines too long": ({"log_every": 2**29}, ValueError, "`log_every`"),
    "eval off the lines": ({"log_every": 4, "eval_every": 6, "eval_data": {}}, ValueError, "multiple"),
    "eval_every alone": ({"eval_every": 6}, ValueError, "no `eval_data`"),
    "eval_data bare": ({"eval_data": np.ones(3)}, TypeError, "map names of splits"),
    "eval_data empty": ({"eval_data": {"valid": np.ones((0, 2))}}, ValueError, "valid"),
    "checkpoints nowhere": ({"checkpoint_every": 5}, ValueError, "needs `out_dir`"),
    "resume nowhere": ({"resume": True}, ValueError, "needs `out_dir`"),
    "legacy key": ({"key": np.zeros(2, np.uint32)}, ValueError, "typed key"),
    "many keys": ({"key": jax.random.split(jax.random.key(0), 2)}, ValueError, "one typed key"),
    "no seeds": ({"seeds": []}, ValueError, "`seeds`"),
    "seed twice": ({"seeds": [1, 1]}, ValueError, "none twice"),
    "seeds text": ({"seeds": "12"}, TypeError, "`seeds`"),
    "seeds zero": ({"seeds": 0}, ValueError, "`seeds`"),
    "data empty": ({"data": np.ones((0, 2))}, ValueError, "`data`"),
    "data scalar": ({"data": np.float32(1)}, ValueError, "`data`"),
    "data unequal": ({"data": (np.ones(3), np.ones(4))}, ValueError, "common time axis"),
    "no leaves": ({"data": ()}, ValueError, "`data`"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        run(small(), **options)


def test_params_of_the_wrong_kind() -> None:
    case = small()._replace(params={"W": 1.0})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`params` must be"):
        run(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["bptt", "truncated_bptt", "windowed_bptt", "artbp", "online_artbp", "per_stream"]
)
def test_the_library_s_estimators_learn(name: str) -> None:
    model = cells.model(cells.tanh(5, 6), 5, cells.softmax_cross_entropy)
    system, law = model.system, jtrunc.truncation.polynomial(5, 4)
    streams = (3,) if name == "per_stream" else ()
    tokens = np.resize(np.arange(5, dtype=np.int32), (60, *streams))
    estimator = {
        "bptt": lambda: jtrunc.bptt(system),
        "truncated_bptt": lambda: jtrunc.truncated_bptt(system, 4),
        "windowed_bptt": lambda: jtrunc.windowed_bptt(system, 7, 4),
        "artbp": lambda: jtrunc.artbp(system, law),
        "online_artbp": lambda: jtrunc.online_artbp(system, law),
        "per_stream": lambda: jtrunc.per_stream(jtrunc.truncated_bptt(system, 4)),
    }[name]()
    result = train(
        system, model.init, model.initial_hidden(streams), estimator, optax.adam(0.05),
        (tokens[:-1], tokens[1:]), window=8, num_updates=60, seeds=2,
    )  # fmt: skip
    assert (result.history["loss"][-1] < 0.25 * result.history["loss"][0]).all()
