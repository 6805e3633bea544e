"""The trials of benchmarks/faults in small numbers: kills, flipped bits, full disks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "faults"


def run(name: str, out: Path, *options: str) -> Any:
    """The record of a script that found nothing wrong."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    script = [sys.executable, "-W", "error", str(FOLDER / f"{name}.py"), "--out", str(out), *options]
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags)}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / f"faults_{name}.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_bits(tmp_path: Path) -> None:
    record = run("kill", tmp_path, "--kills", "3")
    assert [row["identical"] for row in record["rows"]] == [True] * 3


@pytest.mark.slow
def test_the_newest_intact_checkpoint_comes_back(tmp_path: Path) -> None:
    record = run("damage", tmp_path, "--flips", "30")
    kinds = ("flips", "cuts", "lengths", "deletions")
    results = {kind: [result for _, result in record[kind]] for kind in kinds}
    assert {result for kind in results.values() for result in kind} == {"right"}
    assert len(results["flips"]) == 30 and len(results["cuts"]) > 50 and len(results["deletions"]) > 10
    assert {result for _, result in record["orbax alone"]} > {"right"}  # it stops, or gives something else


def may_mount(folder: Path) -> bool:
    """Whether this user may mount a file system; it is unmounted again."""
    command = ["mount", "-t", "tmpfs", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
        subprocess.run(["umount", str(folder)], check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    if not may_mount(tmp_path):
        pytest.skip("mounting a small file system takes root")
    record = run("full_disk", tmp_path, "--trials", "2")
    for row in record["rows"]:
        assert row["clear"] and row["intact"] and row["identical"], row
