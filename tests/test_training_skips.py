"""Updates that are not finite: skipped and counted up to a limit, then a stop before the damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtrunc
from jtrunc.base import Aux, Estimate, GradientEstimator
from jtrunc.training import NonFiniteError, checkpoint, init_state, read_metrics, runner, train, train_step
from jtrunc.training.seeds import seed_key
from tests.training_cases import State, assert_same, plain, random_length, small

ADAM = optax.adam(1e-2)
CASE = small(400)
STREAM = np.array(CASE.inputs)


def flaky(system: Any, rate: float = 0.2) -> GradientEstimator:
    """`plain`, whose gradient is NaN now and then, by its key; a diagnostic counts its updates."""
    inner = plain(system)

    def update(params: Any, state: State, inputs: Any) -> tuple[Estimate, State]:
        estimate, new = inner.update(params, state, inputs)
        key, draw = jax.random.split(state.key)
        factor = jnp.where(jax.random.uniform(draw) < rate, jnp.nan, 1.0).astype(jnp.float32)
        grads = jax.tree.map(lambda leaf: leaf * factor, estimate.grads)
        aux = Aux(diagnostics={"spoilt": factor})
        return estimate._replace(grads=grads, aux=aux), State(new.hidden, key)

    return GradientEstimator(inner.init, update)


ESTIMATORS = {
    "plain": plain(CASE.system),
    "flaky": flaky(CASE.system),
    "random": random_length(CASE.system),
}


def poisoned(*updates: int) -> Any:
    """A row of NaN in these windows of 7, counted from 1."""
    rows = STREAM.copy()
    for update in updates:
        rows[7 * (update - 1) + 3] = np.nan
    return rows


def run(out_dir: Path | None = None, **options: Any) -> Any:
    arguments: dict[str, Any] = {"window": 7, "num_updates": 40, "log_every": 4} | options
    if out_dir is not None:
        arguments = {"checkpoint_every": 8} | arguments
    estimator = ESTIMATORS[arguments.pop("estimator", "plain")]
    optimizer, data = arguments.pop("optimizer", ADAM), arguments.pop("data", CASE.inputs)
    return train(
        CASE.system, CASE.params, CASE.hidden, estimator, optimizer, data, out_dir=out_dir, **arguments
    )


def by_hand(data: Any, skipped: set[int], num_updates: int = 40) -> tuple[Any, Any, list[float]]:
    """Parameters, hidden state and finite losses of a loop that leaves out these updates altogether."""
    estimator = ESTIMATORS["plain"]
    params, opt_state = CASE.params, ADAM.init(CASE.params)
    state, losses = estimator.init(params, CASE.hidden, None), []
    for update in range(1, num_updates + 1):
        if update in skipped:
            continue
        window = jnp.asarray(data[7 * (update - 1) : 7 * update])
        estimate, state = jax.jit(estimator.update)(params, state, window)
        updates, opt_state = ADAM.update(estimate.grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(estimate.loss))
    return params, state.hidden, losses


@pytest.mark.slow
def test_skipped_updates_leave_parameters_optimiser_and_hidden_state_as_they_were() -> None:
    data = poisoned(3, 20, 21)
    result = run(data=data, max_non_finite=3)
    params, hidden, losses = by_hand(data, {3, 20, 21})
    assert int(result.state.skips_left) == 0 and int(result.state.update) == 40
    pairs = zip(jax.tree.leaves(result.params), jax.tree.leaves(params), strict=True)
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(result.state.estimator_state.hidden, hidden, rtol=1e-5, atol=1e-7)
    untouched = by_hand(STREAM, set())[0]
    assert not np.allclose(result.params.recurrent["W"], untouched.recurrent["W"], rtol=1e-5)
    history = result.history
    assert history["num_skipped"].tolist() == [1, 0, 0, 0, 1, 1, 0, 0, 0, 0]
    assert history["num_steps"].tolist() == [28] * 10
    assert history["num_scored"].tolist() == [21, 28, 28, 28, 21, 21, 28, 28, 28, 28]
    np.testing.assert_allclose((history["loss"] * history["num_scored"]).sum(), sum(losses), rtol=1e-5)
    assert np.isfinite(history["grad_norm"]).all()


@pytest.mark.slow
def test_the_update_behind_the_last_skip_stops_the_run_before_its_damage(tmp_path: Path) -> None:
    bad = (9, 10, 11)
    with pytest.raises(
        NonFiniteError, match=r"at update 11, timestep 77.*`max_non_finite` were skipped"
    ) as caught:
        run(tmp_path, data=poisoned(*bad), max_non_finite=2)
    state: Any = caught.value.result.state
    assert int(state.update) == 10 and int(state.skips_left) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert_same(checkpoint.restore(tmp_path / "checkpoints", state).state, state)
    assert sum(line["num_skipped"] for line in read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert run(data=poisoned(*bad), max_non_finite=3).history["num_skipped"].sum() == 3
    lenient = optax.apply_if_finite(ADAM, max_consecutive_errors=2)  # lets the third through
    params, opt_state = CASE.params, lenient.init(CASE.params)
    nans = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    for number in (1, 2, 3):
        updates, opt_state = lenient.update(nans, opt_state, params)
        params = optax.apply_updates(params, updates)
        finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
        assert finite == (number <= 2)


@pytest.mark.slow
@pytest.mark.parametrize("max_non_finite", [0, 1])
def test_a_checkpoint_lies_before_the_damage(tmp_path: Path, max_non_finite: int) -> None:
    """The run stops again when it is resumed, at the same update."""
    options: dict[str, Any] = {"data": poisoned(5, 18), "max_non_finite": max_non_finite}
    for resume in (False, True):
        with pytest.raises(NonFiniteError, match=f"at update {(5, 18)[max_non_finite]},"):
            run(tmp_path, resume=resume, **options)
    assert ("num_skipped" in read_metrics(tmp_path / "metrics.jsonl")[0]) == bool(max_non_finite)


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "seeds"), [("flaky", None), ("flaky", 3), ("random", 3)])
def test_resumed_and_cut_into_other_chunks_it_is_the_same_run(
    tmp_path: Path, monkeypatch: Any, estimator: str, seeds: int | None
) -> None:
    options: dict[str, Any] = {"estimator": estimator, "seeds": seeds, "max_non_finite": 30}
    options["data"] = poisoned(2, 3, 17, 18, 19, 30)
    whole = run(tmp_path / "whole", **options)
    skipped = whole.history["num_skipped"].sum(axis=0)
    assert np.all(skipped > 0) and (seeds is None or len(set(skipped.tolist())) > 1)
    original = runner.Runner._compute

    def compute(self: Any, size: int) -> Any:
        if self.update >= 20:
            raise Killed
        return original(self, size)

    with monkeypatch.context() as patched:
        patched.setattr(runner.Runner, "_compute", compute)
        with pytest.raises(Killed):
            run(tmp_path / "killed", **options)
    monkeypatch.setattr(runner.Runner, "_adapt_chunk_size", lambda self, size, seconds: None)
    resumed = run(tmp_path / "killed", resume=True, **options)
    assert_same(resumed.state, whole.state)
    assert_same(resumed.history, whole.history)
    lines = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed")]
    assert lines[0] == lines[1]


def test_each_seed_skips_its_own_and_one_beyond_its_limit_stops_all() -> None:
    options: dict[str, Any] = {"estimator": "flaky", "num_updates": 20, "max_non_finite": 12}
    together = run(seeds=3, **options)
    for seed in range(3):
        alone = run(key=seed_key(jax.random.key(0), seed), **options)
        np.testing.assert_array_equal(together.history["num_skipped"][:, seed], alone.history["num_skipped"])
        np.testing.assert_allclose(together.history["loss"][:, seed], alone.history["loss"], rtol=1e-5)
    counts = together.history["num_skipped"].sum(axis=0)
    most = int(counts.max())
    assert counts.min() < most
    options["max_non_finite"] = most - 1
    with pytest.raises(NonFiniteError, match=f"seed {int(np.argmax(counts))}") as caught:
        run(seeds=3, **options)
    state: Any = caught.value.result.state
    assert int(state.skips_left.min()) == 0


@pytest.mark.slow
def test_a_line_of_nothing_but_skipped_updates_has_no_loss(tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": poisoned(3), "max_non_finite": 1, "log_every": 1, "num_updates": 5}
    history = run(tmp_path, **options).history
    assert np.isnan(history["loss"]).tolist() == [False, False, True, False, False]
    assert np.isnan(history["grad_norm"]).tolist() == np.isnan(history["loss"]).tolist()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert '"loss": null' in lines[2] and lines[2].endswith('"num_skipped": 1}')


@pytest.mark.slow
def test_the_estimator_goes_on_where_its_state_is_finite() -> None:
    """A gradient that overflows has left no trace in the hidden state; NaN inputs have."""
    estimator = ESTIMATORS["flaky"]
    state: Any = init_state(estimator, ADAM, CASE.params, CASE.hidden, jax.random.key(0))
    state = state._replace(skips_left=jnp.int32(9))
    metrics: Any
    new: Any
    bad: Any
    always = flaky(CASE.system, rate=2.0)
    good = jnp.asarray(STREAM[:7])
    new, metrics = train_step(always, ADAM, state, good)
    expected = always.update(state.params, state.estimator_state, good)[1]
    assert_same(new.estimator_state, expected)
    assert_same((new.params, new.opt_state), (state.params, state.opt_state))
    assert (int(new.skips_left), int(new.cursor), int(metrics.num_skipped)) == (8, 7, 1)
    bad, _ = train_step(always, ADAM, state, good.at[3].set(jnp.nan))
    assert_same(bad.estimator_state, state.estimator_state)
    assert (int(bad.skips_left), int(bad.cursor)) == (8, 7)
    damaged, metrics = train_step(always, ADAM, state._replace(skips_left=jnp.int32(0)), good)
    assert int(metrics.non_finite) and not np.isfinite(damaged.params.recurrent["W"]).any()


@pytest.mark.slow
def test_blocks_of_target_propagation_stay_with_their_data() -> None:
    case = small(40)
    estimator = jtrunc.target_propagation(case.system, 5, 0.1, "admm", num_blocks=8)
    data = np.array(case.inputs)
    data[12] = np.nan
    state: Any = init_state(estimator, ADAM, case.params, case.hidden, jax.random.key(0))
    state = state._replace(skips_left=jnp.int32(1))
    step: Any = jax.jit(train_step, static_argnums=(0, 1))
    positions = []
    for update in range(4):
        state, metrics = step(estimator, ADAM, state, jnp.asarray(data[10 * update : 10 * update + 10]))
        positions.append(int(state.estimator_state.position))
    assert positions == [2, 4, 6, 0] and int(state.skips_left) == 0 and int(metrics.non_finite) == 0
    multipliers = np.abs(np.asarray(state.estimator_state.multipliers)).reshape(8, -1).sum(axis=1)
    assert (multipliers > 0).tolist() == [True, True, False, False, True, True, True, True]


def test_a_limit_that_no_run_reaches() -> None:
    history = run(data=poisoned(3), max_non_finite=2**31, num_updates=8).history
    assert history["num_skipped"].tolist() == [1, 0]


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_limit_that_is_no_count(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`max_non_finite`"):
        run(max_non_finite=value)


def test_another_limit_is_another_run(tmp_path: Path) -> None:
    run(tmp_path, num_updates=8, max_non_finite=2)
    for other in (0, 3):
        with pytest.raises(jtrunc.training.ConfigurationError, match="max_non_finite"):
            run(tmp_path, max_non_finite=other, resume=True)
