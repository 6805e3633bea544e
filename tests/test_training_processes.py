"""Two processes make one run, are killed, and go on: equal to one process that was left alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtrunc.cli import main
from jtrunc.training import checkpoint, processes, read_metrics
from jtrunc.training.metrics import split_columns, train_columns
from jtrunc.training.processes import each, from_first, gather, largest, put, start_processes
from tests import process_run

ROOT = Path(__file__).parents[1]


def start(command: list[str], *arguments: str) -> list[subprocess.Popen[str]]:
    """Two processes on loopback, of one device each; where they meet comes behind the command."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": " ".join(flags)}
    return [
        subprocess.Popen(
            [sys.executable, *command, f"localhost:{port},2,{index}", *arguments],
            env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for index in range(2)
    ]  # fmt: skip


def start_runs(out_dir: Path, how: str) -> list[subprocess.Popen[str]]:
    return start(["-W", "error", "-m", "tests.process_run"], str(out_dir), how)


def kill(processes: list[subprocess.Popen[str]]) -> str:
    """What they had to say."""
    for process in processes:
        process.kill()
    return "\n".join(process.communicate()[0] for process in processes)


def wait_for(update: int, out_dir: Path, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 180
    while max(checkpoint.list_steps(out_dir / "checkpoints"), default=0) < update:
        if any(process.poll() is not None for process in processes) or time.monotonic() > deadline:
            pytest.fail(kill(processes))
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_killed_and_resumed_equal_one(tmp_path: Path) -> None:
    processes = start_runs(tmp_path, "begin")
    wait_for(40, tmp_path, processes)
    kill(processes)
    processes = start_runs(tmp_path, "resume")
    wait_for(120, tmp_path, processes)
    processes[1].send_signal(signal.SIGTERM)  # to the one that does not write
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode and "resume=True to go on" in output, output
    assert 120 <= max(checkpoint.list_steps(tmp_path / "checkpoints")) < process_run.NUM_UPDATES
    for process in (processes := start_runs(tmp_path, "resume")):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output

    alone = process_run.run_streams()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert_equal_rows(train_columns(lines), alone.history)
    assert_equal_rows(split_columns(lines)["valid"], alone.evaluations["valid"])
    restored = checkpoint.restore(tmp_path / "checkpoints", alone.state)
    assert restored.update == process_run.NUM_UPDATES
    assert_close_leaves(restored.state, alone.state)
    seeds = process_run.run_seeds()
    expected = jax.tree.leaves((seeds.params, seeds.history, seeds.evaluations))
    for index in range(2):
        with np.load(tmp_path / f"seeds-{index}.npz") as arrays:
            assert_close_leaves(list(arrays.values()), expected)
    assert np.ptp(seeds.history["loss"][-1]) > 1e-3  # and the seeds differ
    assert seeds.history["num_skipped"].sum(axis=0).tolist() == [1, 1, 1]


@pytest.mark.slow
def test_the_command_line_with_two_processes(tmp_path: Path) -> None:
    """`--distributed`: each reads its two of the four streams; one writes and reports."""
    options = ["--task", "brackets:steps=2000", "--cell", "tanh:width=6", "--streams", "4", "--steps", "200"]
    train = ["train", *options, "--estimator", "truncated-bptt:length=10", "--output"]
    command = ["-m", "jtrunc.cli", *train, str(tmp_path / "two"), "--distributed"]
    processes = start(command)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "Bits per token" in outputs[0] and "Bits per token" not in outputs[1]
    with jax.enable_x64(False):
        assert main([*train, str(tmp_path / "one")]) == 0
    files = [tmp_path / name / "metrics.jsonl" for name in ("two", "one")]
    two, one = (train_columns(read_metrics(path)) for path in files)
    assert (two["update"] == one["update"]).all()
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-5)


def assert_equal_rows(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Counts to the number, the rest to rounding."""
    assert actual.keys() == expected.keys()
    for name, column in expected.items():
        np.testing.assert_allclose(actual[name], column, rtol=0 if column.dtype.kind == "i" else 1e-11)


def assert_close_leaves(actual: Any, expected: Any) -> None:
    def raw(leaf: Any) -> np.ndarray:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(raw(a), raw(b), rtol=1e-11, atol=1e-12)


def test_one_process_is_the_first() -> None:
    arrays = {"a": np.ones(2)}
    assert from_first(lambda: arrays) is arrays and gather(arrays)["a"] is arrays["a"]
    assert largest(2.5) == 2.5 and each("ab") == ["ab"]
    with pytest.raises(OSError, match="full"):
        from_first(fail)


def test_what_no_axis_splits_must_be_the_same_in_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    sharding = jax.sharding.NamedSharding(jax.make_mesh((2,), ("seeds",)), jax.sharding.PartitionSpec())
    array = np.array([np.nan, 1.0])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "each", lambda own: [own, own])
    np.testing.assert_array_equal(put(array, sharding), array)
    monkeypatch.setattr(processes, "each", lambda own: [own, "another"])
    with pytest.raises(ValueError, match=r"different values for an array of shape \(2,\) and dtype float64"):
        put(array, sharding)


def fail() -> None:
    raise OSError("full")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("here", "address:port,processes,index"),
        ("localhost:1,2,2", "process 2 of 2"),
        ("localhost,2,0", "'localhost,2,0'"),
        ("localhost:1:2,2,1", "'localhost:1:2,2,1'"),
        (":1,2,1", "':1,2,1'"),
    ],
)
def test_where_is_read_strictly(where: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start_processes(where)


def test_no_cluster_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def initialize(*_: Any, **__: Any) -> None:  # what jax says, unless it has been used already
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match=r"'auto' \(coordinator_address.*'address:port,processes,index'"):
        start_processes()
