"""Truncation lengths that are data, in the training loop: scored losses, step sizes, infinite diagnostics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtrunc.base import Aux, Estimate, GradientEstimator, Params
from jtrunc.optimizers import scale_by_truncation_length
from jtrunc.training import read_metrics, train
from jtrunc.training.runner import Runner
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
