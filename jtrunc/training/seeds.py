"""Many seeds in one program."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jtrunc.training.step import TrainState
from jtrunc.training.sums import MetricSums

Run = Callable[[TrainState], tuple[TrainState, MetricSums]]


class SeedAxis(enum.Enum):
    """How the seeds of a run are laid out.

    NONE: one run, no seed axis. VMAP: side by side, for estimators whose lengths are known at trace time;
    `cursor`, `update` and `timestep` are shared. MAP: one after another inside one program, for estimators
    whose window lengths are data (a vmapped loop of dynamic length is 8 to 16 times slower).
    """

    NONE = "none"
    VMAP = "vmap"
    MAP = "map"


_AXES: Any = (0, 0, 0, None, None, None, 0)
_SHARED = TrainState(*_AXES)


def over_seeds(run: Run, axis: SeedAxis) -> Run:
    """`run` for a state with a leading axis of seeds; every array of metrics gets that axis too."""
    if axis is SeedAxis.VMAP:
        return jax.vmap(run, in_axes=(_SHARED,), out_axes=(_SHARED, 0))
    if axis is SeedAxis.MAP:
        return partial(jax.lax.map, run)
    return run


def seed_key(key: jax.Array, seed: int) -> jax.Array:
    """The key of one seed: a solo run with ``key=seed_key(key, i)`` is seed i of a run with `seeds`."""
    return jax.random.fold_in(key, seed)


def check_seeds(seeds: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """`seeds` as a tuple of distinct non-negative integers; a count n stands for 0 … n − 1."""
    if seeds is None:
        return None
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        seeds = range(seeds)
    if not isinstance(seeds, Sequence) or isinstance(seeds, str):
        raise TypeError(f"train: `seeds` must be a count or a sequence of integers, not {seeds!r}")
    wrong = [s for s in seeds if isinstance(s, bool) or not isinstance(s, (int, np.integer)) or s < 0]
    if wrong or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"train: `seeds` must be at least one integer ≥ 0, none twice, not {list(seeds)!r}; "
            "seeds=4 stands for 0, 1, 2, 3"
        )
    return tuple(int(seed) for seed in seeds)
