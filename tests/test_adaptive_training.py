"""Truncation lengths that are data, in the training loop: scored losses, step sizes, infinite diagnostics."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtrunc
from jtrunc import cells
from jtrunc.base import Aux, Estimate, GradientEstimator, Params
from jtrunc.cli import main
from jtrunc.experiments import parts
from jtrunc.experiments.names import choose
from jtrunc.optimizers import scale_by_truncation_length
from jtrunc.tasks import copying
from jtrunc.training import read_metrics, train
from jtrunc.training.runner import Runner
from jtrunc.training.seeds import seed_key
from tests.training_cases import State, assert_same, echo

ROWS = 2.0 ** np.arange(12, dtype=np.float32)  # a sum of losses says which rows it holds


def growing() -> GradientEstimator:
    """Update u = 0, 1, 2, … has K = u + 1: consumes K rows, scores the row behind them too, gradient 1."""

    def init(params: Params, hidden: Any, key: jax.Array | None = None) -> State:
        return State(hidden, key)

    def update(params: Params, state: State, inputs: Any) -> tuple[Estimate, State]:
        length = state.hidden + 1
        scored = jnp.arange(len(inputs)) <= length
        bias = jnp.where(length == 2, jnp.inf, 0.5)
        aux = Aux(diagnostics={"truncation_length": length, "num_scored": length + 1, "relative_bias": bias})
        loss = jnp.where(scored, inputs, 0).sum()
        return Estimate(loss, jax.tree.map(jnp.ones_like, params), length, aux), State(length, state.key)

    return GradientEstimator(init, update)


def run(optimizer: Any = None, num_updates: int = 3, **options: Any) -> Any:
    chain = optax.chain(optax.sgd(1.0), scale_by_truncation_length())
    return train(
        echo(), Params(jnp.float32(0)), jnp.int32(0), growing(), optimizer or chain, ROWS,
        window=6, num_updates=num_updates, **options,
    )  # fmt: skip


@pytest.mark.parametrize("seeds", [None, 2])
def test_losses_are_means_over_the_scored_steps(seeds: int | None) -> None:
    history = run(seeds=seeds).history
    shape = (3,) if seeds is None else (3, 2)
    losses = [(1 + 2) / 2, (2 + 4 + 8) / 3, (8 + 16 + 32 + 64) / 4]
    for name, values in {"loss": losses, "num_steps": [1, 2, 3], "num_scored": [2, 3, 4]}.items():
        np.testing.assert_array_equal(history[name].T, np.broadcast_to(values, shape[::-1]), name)
    one_line = run(log_every=3, seeds=seeds).history
    np.testing.assert_allclose(one_line["loss"], (3 + 14 + 120) / 9, rtol=1e-12)
    assert (one_line["num_scored"] == 9).all() and (one_line["num_steps"] == 6).all()


def test_the_optimiser_sees_the_length_of_the_window() -> None:
    np.testing.assert_allclose(run().params.recurrent, -(1 + 2**0.5 + 3**0.5), rtol=1e-6)
    np.testing.assert_allclose(run(optax.sgd(1.0)).params.recurrent, -3, rtol=1e-6)


def no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def test_an_infinite_diagnostic_is_no_damage_and_is_written_as_json(tmp_path: Path, monkeypatch: Any) -> None:
    options = {"num_updates": 4, "log_every": 2, "checkpoint_every": 2}
    whole = run(out_dir=tmp_path / "whole", **options)
    np.testing.assert_array_equal(whole.history["relative_bias"], [np.inf, 0.5])
    text = (tmp_path / "whole" / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]
    assert [line["relative_bias"] for line in lines] == [np.inf, 0.5] and "1e999" in text
    assert read_metrics(tmp_path / "whole" / "metrics.jsonl") == lines

    original = Runner._compute

    def killed(self: Runner, size: int) -> Any:
        if self.update >= 2:
            raise KeyboardInterrupt
        return original(self, size)

    with monkeypatch.context() as patched:
        patched.setattr(Runner, "_compute", killed)
        with pytest.raises(KeyboardInterrupt):
            run(out_dir=tmp_path / "cut", **options)
    resumed = run(out_dir=tmp_path / "cut", resume=True, **options)
    assert_same(resumed.state, whole.state)
    assert_same(resumed.history, whole.history)
    assert (tmp_path / "cut" / "metrics.jsonl").read_text() == text


MODEL = cells.model(cells.lstm(copying.num_classes(), 6), copying.num_classes(), cells.softmax_cross_entropy)
HIDDEN = MODEL.initial_hidden((4,))
WINDOW = 17
TRACES: list[int] = []


def counted(estimator: GradientEstimator) -> GradientEstimator:
    def update(*arguments: Any) -> Any:
        TRACES.append(1)
        return estimator.update(*arguments)

    return estimator._replace(update=update)


@cache
def data() -> Any:
    return copying.sequences(jax.random.key(1), 97, 4, length=3)


ADAPTIVE = counted(
    jtrunc.adaptive_bptt(
        MODEL.system, 0.5, num_lags=12, max_length=8, initial_length=4, estimate_every=3, streams=True
    )
)
OPTIMIZER = optax.chain(optax.sgd(0.5), scale_by_truncation_length())


def adaptive(num_updates: int = 30, **options: Any) -> Any:
    return train(
        MODEL.system, MODEL.init, HIDDEN, ADAPTIVE, OPTIMIZER, data(),
        window=WINDOW, num_updates=num_updates, **options,
    )  # fmt: skip


@pytest.mark.slow
def test_one_compilation_for_every_length_and_every_chunk() -> None:
    adaptive(2)
    before = len(TRACES)
    result = adaptive()
    assert len(TRACES) == before + 1  # only the look at num_steps
    history = result.history
    assert len(set(history["truncation_length"])) >= 3
    chosen = result.state.estimator_state.chosen
    assert int(chosen.length) == history["truncation_length"][-1]
    np.testing.assert_array_equal(history["relative_bias"][-1], chosen.relative_bias)
    assert np.isnan(history["relative_bias"][0]) and np.isfinite(history["relative_bias"][-1])
    assert history["num_scored"].sum() == history["timestep"][-1] + result.state.estimator_state.look_back
    assert (np.flatnonzero(history["estimation_steps"]) == np.arange(3, 30, 3)).all()


@pytest.mark.slow
def test_seeds_have_lengths_of_their_own_and_resume_bit_for_bit(tmp_path: Path, monkeypatch: Any) -> None:
    options = {"seeds": 2, "log_every": 2, "checkpoint_every": 10}
    whole = adaptive(out_dir=tmp_path / "whole", **options)
    lengths = whole.history["truncation_length"]
    assert lengths.shape == (15, 2) and (lengths[:, 0] != lengths[:, 1]).any()
    solo = adaptive(key=seed_key(jax.random.key(0), 1)).history
    np.testing.assert_array_equal(solo["truncation_length"].reshape(15, 2).mean(axis=1), lengths[:, 1])
    sums = (solo["loss"] * solo["num_scored"]).reshape(15, 2).sum(axis=1)
    np.testing.assert_allclose(sums, (whole.history["loss"] * whole.history["num_scored"])[:, 1], rtol=1e-4)

    monkeypatch.setattr(Runner, "_next_size", lambda self: min(10, 30 - self.update))
    adaptive(20, out_dir=tmp_path / "cut", **options)
    resumed = adaptive(out_dir=tmp_path / "cut", resume=True, **options)
    assert_same(resumed.state, whole.state)
    assert_same(resumed.history, whole.history)
    texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("cut", "whole")]
    assert texts[0] == texts[1] and "null" in texts[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adaptive-bptt:num-times=30", "adaptive-artbp:look-ahead=108"])
def test_the_command_line_gives_a_look_ahead_that_suffices_and_no_more(name: str) -> None:
    """Shapes alone: one step less is refused."""
    chosen = choose(name + ",max-length=60" * ("bptt" in name), parts.ESTIMATORS, "estimator")
    estimator, window, _ = chosen.make(MODEL.system, **chosen.options)
    params = jax.eval_shape(MODEL.init, jax.random.key(0))
    state = jax.eval_shape(estimator.init, params, HIDDEN, jax.random.key(0))
    for missing in (0, 1):
        inputs = tuple(jnp.zeros((window - missing, 4), leaf.dtype) for leaf in data())
        if missing:
            with pytest.raises(ValueError, match="look-ahead"):
                jax.eval_shape(estimator.update, params, state, inputs)
        else:
            estimate, _ = jax.eval_shape(estimator.update, params, state, inputs)
            assert {"estimation_steps"} < set(estimate.aux.diagnostics)


@pytest.mark.slow
def test_the_command_line_trains_it(tmp_path: Path) -> None:
    estimator = "adaptive-bptt:tolerance=0.9,num-lags=12,max-length=8,initial-length=4,estimate-every=20"
    command = ["train", "--task", "copy:shortest=3,longest=3,steps=2000", "--cell", "tanh:width=4"]
    command += ["--estimator", estimator, "--optimizer", "sgd:length-power=0.5", "--learning-rate", "0.5"]
    command += ["--streams", "4", "--steps", "400", "--seeds", "2", "--output", str(tmp_path / "run")]
    with jax.enable_x64(False):
        assert main(command) == 0
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "split" not in line]
    for name in ("truncation_length", "relative_bias", "decay_rate", "unbounded", "estimation_steps"):
        assert np.shape(lines[-1][name]) == (2,), name
    assert (np.sum([line["estimation_steps"] for line in lines], axis=0) > 0).all()
