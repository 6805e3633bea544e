"""Online training: one update a time step, many to a line, all inside one compiled loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtrunc
from jtrunc import cells
from jtrunc.base import Params
from jtrunc.experiments import parts
from jtrunc.experiments.names import choose
from jtrunc.optimizers import feed_metric, qdop
from jtrunc.training import NonFiniteError, StepMetrics, checkpoint, init_state, read_metrics, train
from jtrunc.training.chunk import Program, run_chunk
from jtrunc.training.runner import Runner
from jtrunc.training.stream import circular
from jtrunc.training.sums import add_update, no_sums
from tests.systems import scalar
from tests.training_cases import assert_same, echo, plain

MODEL = cells.model(cells.tanh(3, 4), 3, cells.softmax_cross_entropy)
TOKENS = np.random.default_rng(0).integers(3, size=38).astype(np.int32)
DATA = (TOKENS[:-1], TOKENS[1:])
PARAMS = MODEL.init(jax.random.key(1), jnp.float64)
HIDDEN = MODEL.initial_hidden((), jnp.float64)
ESTIMATORS = {
    "bptt": (jtrunc.bptt(MODEL.system), optax.sgd(0.1)),
    "uoro": (jtrunc.uoro(MODEL.system), optax.sgd(0.03)),
    "kalman": (jtrunc.nobacktrack(MODEL.system, norms="kalman"), qdop(4.0)),
}


def online(name: str, **options: Any) -> Any:
    estimator, optimizer = ESTIMATORS[name]
    arguments: dict[str, Any] = {"window": 1, "num_updates": 43, "log_every": 5} | options
    data = arguments.pop("data", DATA)
    return train(MODEL.system, PARAMS, HIDDEN, estimator, optimizer, data, **arguments)


def by_hand(name: str, *, feed: Any = feed_metric) -> tuple[Params, np.ndarray]:
    """43 updates as a plain loop in Python, on the same data and the same key: parameters and losses."""
    estimator, optimizer = ESTIMATORS[name]
    params, tx, update = PARAMS, optax.with_extra_args_support(optimizer), jax.jit(estimator.update)
    opt_state = tx.init(params)
    state = feed(estimator.init(params, HIDDEN, jax.random.split(jax.random.key(0))[1]), opt_state)
    losses = []
    for t in range(43):
        inputs = tuple(jnp.asarray(leaf[t % 37 : t % 37 + 1]) for leaf in DATA)
        estimate, state = update(params, state, inputs)
        updates, opt_state = tx.update(estimate.grads, opt_state, params, timestep=jnp.int32(t + 1))
        params: Any = optax.apply_updates(params, updates)
        state = feed(state, opt_state)
        losses.append(float(estimate.loss))
    return params, np.array(losses)


def differences(a: Any, b: Any) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


@pytest.mark.parametrize("name", ["bptt", "uoro", pytest.param("kalman", marks=pytest.mark.slow)])
def test_online_equals_a_python_loop(name: str) -> None:
    result = online(name)
    params, losses = by_hand(name)
    assert differences(result.params, params) < 1e-12
    assert differences(result.params, PARAMS) > 1e-2
    assert result.history["update"].tolist() == result.history["timestep"].tolist() == [*range(5, 41, 5), 43]
    assert result.history["num_steps"].tolist() == [5] * 8 + [3]
    means = [losses[start : start + 5].mean() for start in range(0, 43, 5)]
    np.testing.assert_allclose(result.history["loss"], means, rtol=1e-12)


@pytest.mark.slow
def test_the_kalman_metric_is_fed_back_at_every_update() -> None:
    metrics = []

    def once(state: Any, opt_state: Any) -> Any:
        metrics.append(1)
        return feed_metric(state, opt_state) if len(metrics) == 1 else state

    assert differences(online("kalman").params, by_hand("kalman", feed=once)[0]) > 1e-6


def test_lines_sum_up_what_updates_report() -> None:
    fine, coarse = online("uoro", log_every=1), online("uoro")
    assert differences(fine.params, coarse.params) < 1e-12
    starts = range(0, 43, 5)
    counts = np.diff([*starts, 43])
    for name in ("loss", "grad_norm"):
        means = np.add.reduceat(fine.history[name], starts) / counts
        np.testing.assert_allclose(coarse.history[name], means, rtol=1e-12)
    assert np.ptp(coarse.history["loss"]) > 1e-3


def test_a_line_of_100_000_updates_loses_no_digits() -> None:
    losses = np.random.default_rng(0).gamma(1.0, size=100_000).astype(np.float32)

    def step(sums: Any, loss: jax.Array) -> Any:
        metrics = StepMetrics(loss, one, one, loss, jnp.int32(0), {"hits": jnp.int32(2**24 - 1)})
        return add_update(sums, metrics), None

    zero, one = jnp.float32(0), jnp.int32(1)
    first = no_sums(StepMetrics(zero, one, one, zero, jnp.int32(0), {"hits": jnp.int32(0)}))
    sums = jax.jit(lambda first, losses: jax.lax.scan(step, first, losses)[0])(first, losses)
    exact = losses.astype(np.float64).sum()
    assert abs(float(sums.loss.total) + float(sums.loss.rest) - exact) < 1e-11 * exact
    assert abs(np.cumsum(losses)[-1] - exact) > 1e-7 * exact  # one float32 alone is not enough
    hits = sums.diagnostics["hits"]
    assert float(hits.total) + float(hits.rest) == 100_000 * (2**24 - 1)  # beyond an int32
    assert int(sums.good) == int(sums.num_updates) == 100_000


def test_an_infinite_norm_of_a_finite_gradient_stays_infinite() -> None:
    """1e30 squared overflows float32: the gradient itself is finite, and the run goes on."""

    def loss(params: Params, hidden: Any, inputs: Any) -> tuple[jax.Array, tuple[()]]:
        return 1e30 * (params.recurrent - jax.lax.stop_gradient(params.recurrent)).sum(), ()

    system = echo()._replace(loss=loss)
    result = train(
        system, Params(jnp.zeros(2, jnp.float32)), jnp.float32(0), plain(system), optax.sgd(1e-30),
        np.ones(9, np.float32), window=1, num_updates=4, log_every=2,
    )  # fmt: skip
    assert np.isposinf(result.history["grad_norm"]).all() and (result.history["loss"] == 0).all()
    np.testing.assert_allclose(result.params.recurrent, -4.0, rtol=1e-6)


class Killed(BaseException):
    pass


def test_a_resumed_online_run_equals_the_uninterrupted_one(tmp_path: Path, monkeypatch: Any) -> None:
    options = {"checkpoint_every": 10, "log_every": 5}
    whole = online("uoro", out_dir=tmp_path / "whole", **options)
    original = Runner._compute

    def compute(self: Runner, size: int) -> Any:
        if self.update >= 25:
            raise Killed
        return original(self, size)

    with monkeypatch.context() as patched:
        patched.setattr(Runner, "_compute", compute)
        with pytest.raises(Killed):
            online("uoro", out_dir=tmp_path / "killed", **options)
    resumed = online("uoro", out_dir=tmp_path / "killed", resume=True, **options)
    assert_same(resumed.state, whole.state)
    assert_same(resumed.history, whole.history)
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("killed", "whole")]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 9


def test_where_chunks_of_lines_end_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = online("uoro")
    monkeypatch.setattr(Runner, "_next_size", lambda self: min(10, 43 - self.update))
    pieces = online("uoro")
    assert_same(whole.state, pieces.state)
    assert_same(whole.history, pieces.history)


@pytest.mark.parametrize("seeds", [None, 2])
def test_a_nan_in_the_middle_of_a_line_is_found_and_nothing_is_lost(
    tmp_path: Path, seeds: int | None
) -> None:
    case = scalar(60)
    estimator, optimizer = jtrunc.bptt(case.system), optax.sgd(0.01)
    poisoned = np.asarray(case.inputs).copy()
    poisoned[37] = np.nan

    def run(data: Any, num_updates: int, **options: Any) -> Any:
        return train(case.system, case.params, case.hidden, estimator, optimizer, data,
                     window=1, num_updates=num_updates, log_every=8, seeds=seeds, **options)  # fmt: skip

    with pytest.raises(NonFiniteError, match="loss, gradient, parameters, hidden state") as caught:
        run(poisoned, 60, out_dir=tmp_path)
    named = "" if seeds is None else ", seed 0, 1"
    assert f"not finite at update 38, timestep 38{named}, estimator" in str(caught.value)
    clean = run(case.inputs, 37)
    assert_same(caught.value.result.state, clean.state)
    assert_same(caught.value.result.history, clean.history)
    restored = checkpoint.restore(tmp_path / "checkpoints", clean.state)
    assert restored.update == 37
    assert_same(restored.state, clean.state)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["update"] for line in lines] == [8, 16, 24, 32, 37]


def compiled_chunk(log_every: int, capacity: int) -> tuple[Any, Any, Any]:
    case = scalar(50, jnp.float32)
    program = Program(jtrunc.bptt(case.system), optax.sgd(0.01), 1, capacity, log_every)
    state = init_state(*program.parts(None), case.params, case.hidden, jax.random.key(0))
    stream = circular(case.inputs, 1)
    return run_chunk.lower(program, state, stream, jnp.int32(1)).compile(), state, stream


def bytes_of(program: Any) -> int:
    analysis = program.memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def test_memory_depends_on_the_lines_and_not_on_the_updates() -> None:
    short, state, stream = compiled_chunk(100, 16)
    long, *_ = compiled_chunk(100_000, 16)
    each, *_ = compiled_chunk(1, 100_000)
    assert bytes_of(long) == bytes_of(short) < 10_000
    assert bytes_of(each) > 100_000 * 4 * 4  # a row for each update: four numbers at least
    state, rows = long(state, stream, jnp.int32(100_000))  # in one call
    assert int(state.update) == int(rows.num_updates[0]) == int(rows.good[0]) == 100_000
    assert rows.num_updates[1:].tolist() == [0] * 15 and np.isfinite(rows.loss.total[0])


def test_one_compilation_for_all_chunks_of_lines() -> None:
    inner, traces = ESTIMATORS["bptt"][0], []

    def update(*arguments: Any) -> Any:
        traces.append(1)
        return inner.update(*arguments)

    def run(num_updates: int) -> None:
        train(MODEL.system, PARAMS, HIDDEN, counted, optimizer, DATA,
              window=1, num_updates=num_updates, log_every=5)  # fmt: skip

    counted, optimizer = inner._replace(update=update), optax.sgd(0.1)
    run(3)
    before = len(traces)
    run(500)
    assert len(traces) == before + 1  # only the look at num_steps


@pytest.mark.parametrize("every", [2, 3])
def test_lead_in_updates_share_lines(every: int) -> None:
    system = echo()
    rows = 2.0 ** np.arange(20, dtype=np.float32)  # a sum of losses says which rows it holds
    result = train(
        system, Params(jnp.float32(0)), jnp.float32(0), plain(system, 3), optax.sgd(0.05), rows,
        window=7, num_updates=6, log_every=every,
    )  # fmt: skip
    assert result.history["update"].tolist() == [*range(every, 7, every)]
    sums = result.history["loss"] * result.history["num_steps"]
    np.testing.assert_array_equal(np.cumsum(sums), 2.0 ** result.history["timestep"] - 1)


FORWARD = ["rtrl", "nobacktrack", "nobacktrack:rank=2,norms=kalman", "uoro", "uoro:memory=3"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FORWARD)
def test_forward_estimators_of_the_command_line_learn(name: str) -> None:
    chosen = choose(name, parts.ESTIMATORS, "estimator")
    made, window, consumed = chosen.make(MODEL.system, **chosen.options)
    tokens = np.resize(np.arange(3, dtype=np.int32), 61)[:, None] + np.zeros(2, np.int32)
    optimizer = parts.qdop(1.0, prior=4.0) if "kalman" in name else parts.sgd(0.1)
    result = train(
        MODEL.system, lambda key: MODEL.init(key, jnp.float64), MODEL.initial_hidden((2,), jnp.float64),
        made, optimizer, (tokens[:-1], tokens[1:]),
        window=window, num_updates=900 // consumed, log_every=30, seeds=2,
    )  # fmt: skip
    assert (result.history["loss"][-1] < 0.25 * result.history["loss"][0]).all()
