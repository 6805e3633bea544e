"""Flipped bits, cut and lost files: is it always the newest intact checkpoint that comes back?

python benchmarks/faults/damage.py flips 150 bits, at places that come from --seed, in the newest of three
checkpoints and half the time in the one before it too; then it cuts and deletes each file, and each folder.
A cut to each single length of each file must break the seal; to some of them, the step before is restored.
Beside it: what orbax makes of the same flips by itself.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint
from job import train
from report import write

from jtrunc import sealed
from jtrunc.training import checkpoint
from jtrunc.training.configuration import hash_tree

UPDATES = 50
LENGTHS = 8
"""To how many lengths each file is cut for a restoration."""


class Saved(NamedTuple):
    """Intact checkpoints.

    Attributes:
      folder: of the steps.
      template: a state of their structure.
      hashes: of the state of each step, by update.
    """

    folder: Path
    template: Any
    hashes: dict[int, str]

    @property
    def newest(self) -> list[int]:
        """The updates, newest first."""
        return sorted(self.hashes, reverse=True)


def save(folder: Path) -> Saved:
    """Train a little and keep the last three checkpoints."""
    template = train(folder, UPDATES, every=10).state
    steps, hashes = folder / "checkpoints", {}
    for update in checkpoint.list_steps(steps):
        alone = folder / f"only-{update}"
        shutil.copytree(steps / f"{update:08d}", alone / f"{update:08d}")
        hashes[update] = hash_tree(checkpoint.restore(alone, template).state)
    assert len(set(hashes.values())) == 3
    return Saved(steps, template, hashes)


def attempt(saved: Saved, scratch: Path, damage: Callable[[Path], None], damaged: int) -> str:
    """What `restore` makes of a copy in which the `damaged` newest steps are; one word or two."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(saved.folder, scratch)
    damage(scratch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            restored = checkpoint.restore(scratch, saved.template)
        except checkpoint.CheckpointError:
            return "refused"
    if hash_tree(restored.state) != saved.hashes.get(restored.update):
        return "wrong"
    if restored.update != saved.newest[damaged]:
        return "another step"
    there = [update for update in saved.newest[:damaged] if (scratch / f"{update:08d}").exists()]
    return "right" if len(caught) == bool(there) else f"{len(caught)} warnings"


class Flip(NamedTuple):
    """A bit of a file, its path relative to the folder of the steps."""

    path: Path
    byte: int
    bit: int

    def apply(self, folder: Path) -> None:
        content = bytearray((folder / self.path).read_bytes())
        content[self.byte] ^= 1 << self.bit
        (folder / self.path).write_bytes(content)


def flips(saved: Saved, generator: np.random.Generator, count: int) -> Iterator[list[Flip]]:
    """A bit of the newest step, and every other time (on average) one of the step before."""
    for _ in range(count):
        steps = saved.newest[: 1 + int(generator.integers(2))]
        yield [_random_flip(saved, generator, update) for update in steps]


def _random_flip(saved: Saved, generator: np.random.Generator, update: int) -> Flip:
    files = [path for path in _inside(saved, update) if path.is_file() and path.stat().st_size]
    path = files[generator.integers(len(files))]
    byte = int(generator.integers(path.stat().st_size))
    return Flip(path.relative_to(saved.folder), byte, int(generator.integers(8)))


def _inside(saved: Saved, update: int) -> list[Path]:
    return sorted((saved.folder / f"{update:08d}").rglob("*"))


def cuts(saved: Saved, generator: np.random.Generator) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Every file of the newest step, cut to nothing, to one byte less and to lengths between."""
    for path in _inside(saved, saved.newest[0]):
        size = path.stat().st_size if path.is_file() else 0
        if size:
            between = generator.choice(size, min(size, LENGTHS - 2), replace=False).tolist()
            for length in sorted({0, size - 1, *between}):
                relative = path.relative_to(saved.folder)
                yield f"{relative} to {length}", _cut(relative, length)


def every_length(saved: Saved, scratch: Path) -> Iterator[list[str]]:
    """Every file of the newest step, cut to every length: is the seal broken?"""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(saved.folder, scratch)
    step = f"{saved.newest[0]:08d}"
    for path in filter(Path.is_file, _inside(saved, saved.newest[0])):
        victim = scratch / path.relative_to(saved.folder)
        for length in reversed(range(path.stat().st_size)):
            os.truncate(victim, length)
            try:
                sealed.read_seal(scratch / step)
                result = "wrong"
            except sealed.Damaged:
                result = "right"
            yield [f"{path.name} to {length}", result]
        shutil.copy(path, victim)
    sealed.read_seal(scratch / step)


def _cut(path: Path, length: int) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        (folder / path).write_bytes((folder / path).read_bytes()[:length])

    return cut


def deletions(saved: Saved) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Every file and folder of the newest step, and the step."""
    step = saved.folder / f"{saved.newest[0]:08d}"
    for path in [*_inside(saved, saved.newest[0]), step]:
        relative = path.relative_to(saved.folder)
        yield str(relative), _delete(relative)


def _delete(path: Path) -> Callable[[Path], None]:
    def delete(folder: Path) -> None:
        victim = folder / path
        shutil.rmtree(victim) if victim.is_dir() else victim.unlink()

    return delete


def orbax_alone(saved: Saved, scratch: Path, flip: Flip) -> str:
    """What orbax makes of the newest step with one flipped bit."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(saved.folder, scratch)
    arrays = scratch / f"{saved.newest[0]:08d}" / "arrays"
    intact = orbax.checkpoint.PyTreeCheckpointer().restore(arrays)
    flip.apply(scratch)
    try:
        with checkpoint._without_log():
            found = orbax.checkpoint.PyTreeCheckpointer().restore(arrays)
    except Exception:
        return "refused"
    same = jax.tree.structure(found) == jax.tree.structure(intact) and hash_tree(found) == hash_tree(intact)
    return "right" if same else "wrong"


def measure(num_flips: int, seed: int, folder: Path) -> dict[str, list[list[str]]]:
    """Every trial and what came of it, by kind."""
    saved, scratch = save(folder / "run"), folder / "scratch"
    generator = np.random.default_rng(seed)
    chosen = list(flips(saved, generator, num_flips))
    kinds = ("flips", "cuts", "lengths", "deletions", "orbax alone")
    found: dict[str, list[list[str]]] = {kind: [] for kind in kinds}
    for trial in chosen:
        shown = ", ".join(f"{flip.path} byte {flip.byte} bit {flip.bit}" for flip in trial)
        result = attempt(saved, scratch, lambda copy, trial=trial: _apply(trial, copy), len(trial))
        found["flips"].append([shown, result])
    for kind, trials in (("cuts", cuts(saved, generator)), ("deletions", deletions(saved))):
        found[kind] += [[shown, attempt(saved, scratch, damage, 1)] for shown, damage in trials]
    found["lengths"] = list(every_length(saved, scratch))
    for first in (trial[0] for trial in chosen if trial[0].path.name != "manifest.json"):
        found["orbax alone"].append([str(first.path), orbax_alone(saved, scratch, first)])
    return found


def _apply(trial: list[Flip], folder: Path) -> None:
    for flip in trial:
        flip.apply(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.flips, options.seed, Path(folder))
    counts = {}
    for kind, trials in found.items():
        results = [result for _, result in trials]
        counts |= {kind: len(trials)}
        counts |= {f"{kind}: {word}": results.count(word) for word in sorted(set(results))}
    write("damage", options, found, counts)
    ours = [result for kind in ("flips", "cuts", "lengths", "deletions") for _, result in found[kind]]
    return 0 if set(ours) == {"right"} else 1


if __name__ == "__main__":
    sys.exit(main())
