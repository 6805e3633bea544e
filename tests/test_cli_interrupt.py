"""Ctrl-C and SIGTERM leave a run that goes on exactly where it stopped."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TRAIN = ["train", "--task", "brackets:steps=20000", "--cell", "tanh:width=8", "--streams", "4"]
TRAIN += ["--estimator", "truncated-bptt:length=5", "--steps", "200000", "--evaluate-every", "100000"]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_FLAGS", "JAX_"))}
    command = [sys.executable, "-m", "jtrunc.cli", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def wait_for(path: Path, process: subprocess.Popen[str], size: int = 0) -> None:
    """Until the file is longer."""
    deadline = time.monotonic() + 120
    while not (path.exists() and path.stat().st_size > size):
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_interrupted_run_resumes_to_the_same_metrics(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    straight = start([*TRAIN, "--output", str(whole)])
    _, errors = straight.communicate(timeout=240)
    assert straight.returncode == 0, errors
    complete = (whole / "metrics.jsonl").read_bytes()
    command, size = [*TRAIN, "--output", str(broken)], 0
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(command)
        wait_for(broken / "metrics.jsonl", process, size)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
        before, size = size, (broken / "metrics.jsonl").stat().st_size
        assert before < size < len(complete)
        remedy = shlex.split(errors.strip().splitlines()[-1])
        assert remedy == ["jtrunc", *TRAIN, "--output", str(broken), "--resume"]
        command = remedy[1:]
    again = start(command)
    _, errors = again.communicate(timeout=240)
    assert again.returncode == 0, errors
    assert (broken / "metrics.jsonl").read_bytes() == complete
