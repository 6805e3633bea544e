"""Runs that die: killed, interrupted, not finite, on a full disk, resumed as something else."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jtrunc import cells
from jtrunc.sealed import read_seal, seal
from jtrunc.tasks import corpora, text
from jtrunc.tasks.memory_map import memory_mapped
from jtrunc.training import (
    CheckpointError,
    ConfigurationError,
    NonFiniteError,
    TrainingInterrupted,
    checkpoint,
    configuration,
    read_metrics,
    train,
)
from jtrunc.training.runner import Runner
from tests.training_cases import assert_same, plain, random_length, small

ADAM = optax.adam(1e-2)
CASE = small()
ESTIMATORS = {"static": plain(CASE.system), "random": random_length(CASE.system)}  # made and compiled once
LEAD_IN = plain(CASE.system, 2)
STREAM = np.array(small(400).inputs)


def run(out_dir: Path | None, **options: Any) -> Any:
    case = CASE
    arguments: dict[str, Any] = {"window": 7, "num_updates": 40, "log_every": 2} | options
    if out_dir is not None:
        arguments = {"checkpoint_every": 10} | arguments
    estimator = arguments.pop("estimator", ESTIMATORS["random"])
    optimizer = arguments.pop("optimizer", ADAM)
    data = arguments.pop("data", case.inputs)
    return train(
        case.system, case.params, case.hidden, estimator, optimizer, data, out_dir=out_dir, **arguments
    )


def raise_at(monkeypatch: Any, update: int, error: BaseException) -> None:
    """Raise in the middle of the chunk that follows `update`."""
    original = Runner._compute

    def compute(self: Runner, size: int) -> Any:
        if self.update >= update:
            raise error
        return original(self, size)

    monkeypatch.setattr(Runner, "_compute", compute)


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [None, 2])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("killed_after", [0, 4, 10, 26])
def test_a_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: Any, killed_after: int, estimator: str, seeds: int | None
) -> None:
    options: dict[str, Any] = {"eval_data": {"valid": CASE.inputs}, "eval_every": 4, "seeds": seeds}
    options["estimator"] = ESTIMATORS[estimator]
    whole = run(tmp_path / "whole", **options)
    with monkeypatch.context() as patched:
        raise_at(patched, killed_after, Killed())
        with pytest.raises(Killed):
            run(tmp_path / "killed", **options)
    resumed = run(tmp_path / "killed", resume=True, **options)
    assert_same(resumed.state, whole.state)
    assert_same(resumed.history, whole.history)
    assert_same(resumed.evaluations, whole.evaluations)
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text()
    assert lines == (tmp_path / "whole" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_lead_in_survives_a_kill(tmp_path: Path, monkeypatch: Any) -> None:
    options = {"estimator": LEAD_IN, "window": 7, "log_every": 1, "checkpoint_every": 2, "num_updates": 8}
    whole = run(tmp_path / "whole", **options)
    with monkeypatch.context() as patched:
        raise_at(patched, 2, Killed())
        with pytest.raises(Killed):
            run(tmp_path / "killed", **options)
    assert_same(run(tmp_path / "killed", resume=True, **options).state, whole.state)


@pytest.mark.slow
def test_the_place_in_a_text_that_is_mapped_from_the_disk_is_restored(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("to be or not to be, that is the question.\n" * 30)
    model = cells.model(cells.tanh(20, 4), 20, cells.softmax_cross_entropy)
    estimator = plain(model.system)

    def learn(out_dir: Path, num_updates: int, **options: Any) -> Any:
        tokens = memory_mapped(corpora.characters, book, tmp_path / "tokens").train
        hidden = model.initial_hidden((3,))
        arguments: dict[str, Any] = {"window": 7, "num_updates": num_updates, "out_dir": out_dir} | options
        return train(
            model.system, model.init, hidden, estimator, ADAM, tuple(text.lanes(tokens, 3)), **arguments
        )

    whole = learn(tmp_path / "whole", 80)
    assert int(learn(tmp_path / "halves", 30).state.cursor) == 210
    second = learn(tmp_path / "halves", 80, resume=True)
    assert_same(second.state, whole.state)
    assert_same(second.history, whole.history)
    assert int(second.state.cursor) == 560 % ((1134 - 1) // 3)


def test_a_run_can_be_prolonged(tmp_path: Path) -> None:
    whole = run(None)
    run(tmp_path, num_updates=20)
    prolonged = run(tmp_path, resume=True)
    assert_same(prolonged.state, whole.state)
    assert_same(prolonged.history, whole.history)


def test_a_finished_run_is_given_back(tmp_path: Path) -> None:
    whole = run(tmp_path)
    again = run(tmp_path, resume=True)
    assert_same(again.state, whole.state)
    assert_same(again.history, whole.history)
    with pytest.raises(ValueError, match="40 updates already"):
        run(tmp_path, resume=True, num_updates=30)


def test_torn_last_line_and_damaged_last_checkpoint(tmp_path: Path) -> None:
    whole = run(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    content = metrics.read_text()
    metrics.write_text(content + '{"update": 42, "lo')
    manifest = tmp_path / "checkpoints" / "00000040" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    with pytest.warns(RuntimeWarning, match="newest intact one, update 30"):
        resumed = run(tmp_path, resume=True)
    assert_same(resumed.state, whole.state)
    assert metrics.read_text() == content


def test_metrics_that_lack_lines_are_an_error(tmp_path: Path) -> None:
    run(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(CheckpointError, match="lacks lines"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize("damage", ["gap", "duplicate", "digit"])
def test_metrics_that_have_changed_are_an_error(tmp_path: Path, damage: str) -> None:
    run(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    place = lines[7].index('"loss": ') + 12
    digit = str((int(lines[7][place]) + 1) % 10)
    changed = {
        "gap": [],
        "duplicate": lines[7:8] * 2,
        "digit": [lines[7][:place] + digit + lines[7][place + 1 :]],
    }
    metrics.write_text("".join(lines[:7] + changed[damage] + lines[8:]))
    with pytest.raises(CheckpointError, match="or they are not those that were there"):
        run(tmp_path, resume=True)
    metrics.write_text("".join(lines))
    assert int(run(tmp_path, resume=True).state.update) == 40


OTHERS: dict[str, dict[str, Any]] = {
    "window": {"window": 6},
    "seeds": {"seeds": 2},
    "data": {"data": np.ones((30, 2), np.float32)},
    "note": {"config": {"note": "another"}},
    "program": {"optimizer": optax.adam(2e-2)},
    "log_every": {"log_every": 1},
    "estimator": {"estimator": ESTIMATORS["static"]},
    "key": {"key": __import__("jax").random.key(1)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_resuming_as_another_run_is_refused_and_nothing_is_touched(tmp_path: Path, name: str) -> None:
    run(tmp_path, num_updates=10)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigurationError, match=name):
        run(tmp_path, resume=True, **OTHERS[name])
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_evaluation_data_that_have_changed_are_refused(tmp_path: Path) -> None:
    run(tmp_path, num_updates=10, eval_data={"valid": CASE.inputs})
    other = CASE.inputs.at[3, 0].add(1e-6)
    with pytest.raises(ConfigurationError, match="evaluation data, valid: "):
        run(tmp_path, resume=True, eval_data={"valid": other})
    assert int(run(tmp_path, resume=True, eval_data={"valid": CASE.inputs}).state.update) == 40


@pytest.mark.parametrize("changed", ["data", "evaluation data"])
def test_data_of_another_process_that_have_changed_are_refused(
    tmp_path: Path, monkeypatch: Any, changed: str
) -> None:
    """What the second process says of its data; two real ones are in `test_training_processes`."""
    data = {"data": CASE.inputs, "evaluation data": CASE.inputs[:9]}
    theirs = {configuration.hash_tree(rows): configuration.hash_tree(rows + 1) for rows in data.values()}
    options: dict[str, Any] = {"eval_data": {"valid": data["evaluation data"]}, "num_updates": 10}
    monkeypatch.setattr(configuration, "each", lambda own: [own, theirs[own]])
    run(tmp_path, **options)
    run(tmp_path, resume=True, **options)
    theirs[configuration.hash_tree(data[changed])] = "0" * 64
    with pytest.raises(
        ConfigurationError, match=rf"\({changed}, .*process 1: [0-9a-f]{{12}}… there, 0{{12}}… here"
    ):
        run(tmp_path, resume=True, **options)


def test_a_folder_with_a_run_is_not_begun_again(tmp_path: Path) -> None:
    run(tmp_path, num_updates=10)
    with pytest.raises(ConfigurationError, match="holds a run already"):
        run(tmp_path, num_updates=10)
    with pytest.raises(ConfigurationError, match="no run to resume"):
        run(tmp_path / "elsewhere", resume=True)
    assert not (tmp_path / "elsewhere").exists()


def test_another_release_of_jax_is_a_warning(tmp_path: Path) -> None:
    run(tmp_path, num_updates=10)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text()) | {"backend": "jax 0.0.1 cpu", "program": "0"}
    path.write_text(json.dumps(saved))
    for step in (tmp_path / "checkpoints").iterdir():  # those of that run carry its hash
        checkpoint_hash(step, saved)
    with pytest.warns(RuntimeWarning, match=r"written under jax 0\.0\.1 cpu"):
        assert int(run(tmp_path, resume=True).state.update) == 40


def checkpoint_hash(step: Path, saved: dict[str, Any]) -> None:
    from jtrunc.training.configuration import hash_configuration

    seal(step, read_seal(step) | {"config_hash": hash_configuration(saved)})


def poisoned(update: int) -> Any:
    """Data whose row in window `update` (counted from 1) is NaN, for windows of 7 of a long stream."""
    rows = STREAM.copy()
    rows[7 * (update - 1) + 3] = np.nan
    return rows


@pytest.mark.parametrize("update", [1, 2, 17, 40])
def test_a_nan_stops_the_run_before_the_damage(tmp_path: Path, update: int) -> None:
    estimator = ESTIMATORS["static"]
    with pytest.raises(NonFiniteError) as caught:
        run(tmp_path, estimator=estimator, data=poisoned(update))
    assert f"at update {update}, timestep {7 * update}, estimator plain" in str(caught.value)
    result = caught.value.result
    assert int(result.state.update) == update - 1
    if update > 1:
        clean = run(None, estimator=estimator, data=STREAM, num_updates=update - 1)
        assert_same(result.state, clean.state)
        assert_same(result.history, clean.history)
    restored = checkpoint.restore(tmp_path / "checkpoints", result.state)
    assert restored.update == update - 1
    assert_same(restored.state, result.state)
    assert all(np.isfinite(line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl"))


def test_a_learning_rate_that_overflows_is_caught_in_the_parameters() -> None:
    with pytest.raises(NonFiniteError, match="parameters not finite at update 1"):
        run(None, estimator=ESTIMATORS["static"], optimizer=optax.sgd(3e38))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path, monkeypatch: Any, number: int) -> None:
    whole = run(None)
    original = Runner._compute

    def compute(self: Runner, size: int) -> Any:
        if self.update >= 12:
            os.kill(os.getpid(), number)
        return original(self, size)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(Runner, "_compute", compute)
        with pytest.raises(TrainingInterrupted, match="resume=True") as caught:
            run(tmp_path)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    update = int(caught.value.result.state.update)
    assert 12 < update < 40 and update in checkpoint.list_steps(tmp_path / "checkpoints")
    resumed = run(tmp_path, resume=True)
    assert_same(resumed.state, whole.state)
    assert_same(resumed.history, whole.history)


def test_ctrl_c_without_a_folder_gives_the_run_so_far(monkeypatch: Any) -> None:
    original = Runner._compute

    def compute(self: Runner, size: int) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, size)

    monkeypatch.setattr(Runner, "_compute", compute)
    with pytest.raises(KeyboardInterrupt, match="nothing was saved") as caught:
        run(None)
    assert int(caught.value.result.state.update) > 0  # type: ignore[attr-defined]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_metrics_on_a_full_disk(tmp_path: Path) -> None:
    run(tmp_path, num_updates=10)
    metrics = tmp_path / "metrics.jsonl"
    kept = metrics.read_text()
    original = Runner.go_on

    def go_on(self: Runner, restored: Any) -> None:
        original(self, restored)
        metrics.rename(tmp_path / "kept.jsonl")
        metrics.symlink_to("/dev/full")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Runner, "go_on", go_on)
        with pytest.raises(OSError, match=r"No space left.*checkpoints written so far are intact"):
            run(tmp_path, resume=True)
    metrics.unlink()
    (tmp_path / "kept.jsonl").rename(metrics)
    assert metrics.read_text() == kept
    assert_same(run(tmp_path, resume=True).state, run(None).state)


def test_nothing_is_written_without_a_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    run(None)
    assert list(tmp_path.iterdir()) == []
    assert jnp.isfinite(run(None).history["loss"]).all()
