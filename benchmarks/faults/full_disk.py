"""A full disk: is the error clear, are the older checkpoints intact, does the run go on once there is room?

python benchmarks/faults/full_disk.py (as root, for it mounts a tmpfs of two megabytes) resumes a run --trials
times on a disk with less room than a checkpoint takes; how much comes from --seed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from job import hashes, train
from report import write

from jtrunc import training
from jtrunc.training import CheckpointError, checkpoint

BEGUN, UPDATES, EVERY = 100, 200, 10


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of two megabytes; subprocess.CalledProcessError where mounting is refused."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def outcome(folder: Path, result: training.TrainResult) -> tuple[dict[str, str], bytes]:
    """Hashes of what a run gave back, and its metrics."""
    return hashes(result), (folder / "metrics.jsonl").read_bytes()


def attempt(disk: Path, begun: Path, free: int, template: Any, expected: Any) -> dict[str, Any]:
    """Resume a copy of a run with `free` bytes left: what it said, what was left, how it went on."""
    run, ballast = disk / "run", disk / "ballast"
    shutil.copytree(begun, run)
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - free))
    message = "none"
    try:
        train(run, UPDATES, EVERY, resume=True)
    except (CheckpointError, OSError) as error:
        message = str(error)
    steps = checkpoint.list_steps(run / "checkpoints")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restored = checkpoint.restore(run / "checkpoints", template)
    ballast.unlink()
    found = outcome(run, train(run, UPDATES, EVERY, resume=True))
    shutil.rmtree(run)
    return {
        "free": free,
        "message": message,
        "clear": "No space left on device" in message and "intact: make room" in message,
        "intact": len(steps) == 3 and restored.update == steps[-1] >= BEGUN,
        "identical": found == expected,
    }


def measure(trials: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    whole, begun = folder / "whole", folder / "begun"
    result = train(whole, UPDATES, EVERY)
    expected = outcome(whole, result)
    train(begun, BEGUN, EVERY)
    generator, rows = np.random.default_rng(seed), []
    with small_disk(folder / "disk") as disk:
        before = shutil.disk_usage(disk).free
        shutil.copytree(begun / "checkpoints", disk / "checkpoints")
        size = (before - shutil.disk_usage(disk).free) // 3
        shutil.rmtree(disk / "checkpoints")
        for _ in range(trials):
            rows.append(attempt(disk, begun, int(generator.integers(size)), result.state, expected))
            print(f"{len(rows)}: {rows[-1]}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the space that is left")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options.trials, options.seed, Path(folder))
    counts = {"trials": len(rows)}
    counts |= {name: sum(row[name] for row in rows) for name in ("clear", "intact", "identical")}
    write("full_disk", options, {"rows": rows}, counts)
    return 0 if set(counts.values()) == {len(rows)} else 1


if __name__ == "__main__":
    sys.exit(main())
