"""kill -9 at random moments: does every resumed run equal the uninterrupted one in every bit?

python benchmarks/faults/kill.py kills fifty runs (`job.py`), each at a moment that is uniform over the time
from its first file to its end, saves included, and resumes them. The moments come from --seed; one that finds
its run ended is counted and drawn again. All runs load the programs that the first compiled.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from report import write

from jtrunc.training.checkpoint import list_steps

JOB = Path(__file__).parent / "job.py"


def measure(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """The moments, where each kill landed, and whether the resumed run was the uninterrupted one."""
    whole = folder / "whole"
    run(folder / "first")  # compiles
    seconds = run(whole)
    moments = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    ended_before = 0
    while len(rows) < kills:
        killed, moment = folder / f"{len(rows)}", float(moments.uniform(0, seconds))
        if not kill(killed, moment):
            ended_before += 1
            killed.rename(folder / f"ended-{ended_before}")
            continue
        row = {"moment": moment, **state_of(killed)}
        run(killed)
        row["identical"] = outcome(killed) == outcome(whole)
        rows.append(row)
        print(f"{len(rows)}: {row}", flush=True)
    return {"seconds": seconds, "ended before their moment": ended_before, "rows": rows}


def run(folder: Path) -> float:
    """Run the job to its end; seconds from its first file (config.json, for a new run) to its end."""
    process = start(folder)
    while not (folder / "run" / "config.json").exists() and process.poll() is None:
        time.sleep(0.001)
    begin = time.monotonic()
    if process.wait() != 0:
        raise RuntimeError(f"the job in {folder} failed; its message is above")
    return time.monotonic() - begin


def kill(folder: Path, moment: float) -> bool:
    """Start the job, kill it `moment` seconds after its first file; False if it had ended by then."""
    process = start(folder)
    while not (folder / "run" / "config.json").exists():
        if process.poll() is not None:
            raise RuntimeError(f"the job in {folder} failed; its message is above")
        time.sleep(0.001)
    try:
        process.wait(moment)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True


def start(folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return subprocess.Popen([sys.executable, "-W", "error", str(JOB), str(folder)], env=os.environ | cache)


def state_of(folder: Path) -> dict[str, Any]:
    """What a kill left: the steps, whether a save had begun, whether a line of metrics is torn."""
    checkpoints, metrics = folder / "run" / "checkpoints", folder / "run" / "metrics.jsonl"
    steps = list_steps(checkpoints)
    return {
        "newest step": steps[-1] if steps else 0,
        "in a save": any(checkpoints.glob(".unfinished-*")),
        "torn line": metrics.exists() and not metrics.read_bytes().endswith(b"\n"),
    }


def outcome(folder: Path) -> tuple[bytes, bytes, list[int]]:
    """Hashes of state, history and evaluations; the metrics; the steps that are left."""
    return (
        (folder / "outcome.json").read_bytes(),
        (folder / "run" / "metrics.jsonl").read_bytes(),
        list_steps(folder / "run" / "checkpoints"),
    )


def summary(found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    rows = found["rows"]
    yield "kills", len(rows)
    yield "of them before the first checkpoint", sum(row["newest step"] == 0 for row in rows)
    yield "of them in a save", sum(row["in a save"] for row in rows)
    yield "of them in a line of metrics", sum(row["torn line"] for row in rows)
    yield "resumed runs equal to the uninterrupted one", sum(row["identical"] for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.kills, options.seed, Path(folder))
    write("kill", options, found, dict(summary(found)))
    return 0 if all(row["identical"] for row in found["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
