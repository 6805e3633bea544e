"""Many seeds in one program."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jtrunc.training.step import TrainState
from jtrunc.training.sums import MetricSums

SEEDS = "seeds"
"""The mesh axis that splits the seeds."""

Hyperparameters = dict[str, jax.Array] | None
"""Numbers by name: of one run scalars, of many with a leading axis of seeds; None where there are none."""

Run = Callable[..., tuple[TrainState, MetricSums]]
"""``(state, hyperparameters, *shared)``: one run."""


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


def over_seeds(run: Run, axis: SeedAxis, mesh: Mesh | None = None) -> Run:
    """`run` for states and hyperparameters with a leading axis of seeds; the metrics get that axis too.

    What seeds share comes behind. A mesh axis `SEEDS` splits the seeds: each device runs its own, and
    nothing travels.
    """
    if axis is SeedAxis.NONE:
        return run

    def one_by_one(state: TrainState, hyperparameters: Hyperparameters, *shared: Any) -> Any:
        return jax.lax.map(lambda one: run(*one, *shared), (state, hyperparameters))

    def side_by_side(state: TrainState, hyperparameters: Hyperparameters, *shared: Any) -> Any:
        alone = jax.vmap(lambda *one: run(*one, *shared), in_axes=(_SHARED, 0), out_axes=(_SHARED, 0))
        return alone(state, hyperparameters)

    specs = state_spec(axis), P(SEEDS)
    return split_by_seed(side_by_side if axis is SeedAxis.VMAP else one_by_one, mesh, specs, specs)


def split_by_seed(function: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Any:
    """`function` on every device of the mesh axis `SEEDS` with its share; as it is without such an axis.

    Arguments behind those of `in_specs` are whole on each. Seeds never meet, so that there is nothing for
    shard_map's checks of replication to find.
    """
    if mesh is None or SEEDS not in mesh.axis_names:
        return function

    def spread(*arguments: Any) -> Any:
        specs = (*in_specs, *[P()] * (len(arguments) - len(in_specs)))
        return jax.shard_map(
            function, mesh=mesh, axis_names={SEEDS}, in_specs=specs, out_specs=out_specs, check_vma=False
        )(*arguments)

    return spread


def state_spec(axis: SeedAxis) -> Any:
    """How a state is split by seed: `cursor`, `update` and `timestep` only where each seed has its own."""
    own, counts = P(SEEDS), P(SEEDS) if axis is SeedAxis.MAP else P()
    return TrainState(own, own, own, counts, counts, counts, own)  # type: ignore[arg-type]


def seed_key(key: jax.Array, seed: int) -> jax.Array:
    """The key of one seed: a solo run with ``key=seed_key(key, i)`` is seed i of a run with `seeds`."""
    return jax.random.fold_in(key, seed)


def check_seeds(seeds: int | Sequence[int] | None, *, distinct: bool = True) -> tuple[int, ...] | None:
    """`seeds` as a tuple of non-negative integers, none twice if `distinct`; n stands for 0 … n − 1."""
    if seeds is None:
        return None
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        seeds = range(seeds)
    if not isinstance(seeds, Sequence) or isinstance(seeds, str):
        raise TypeError(f"train: `seeds` must be a count or a sequence of integers, not {seeds!r}")
    wrong = [s for s in seeds if isinstance(s, bool) or not isinstance(s, (int, np.integer)) or s < 0]
    if wrong or not seeds or (distinct and len(set(seeds)) < len(seeds)):
        raise ValueError(
            f"train: `seeds` must be at least one integer ≥ 0, none twice without `hyperparameters`, not "
            f"{list(seeds)!r}; seeds=4 stands for 0, 1, 2, 3"
        )
    return tuple(int(seed) for seed in seeds)


def check_hyperparameters(
    hyperparameters: Mapping[str, Any] | None, seeds: tuple[int, ...] | None, parts: Sequence[Any]
) -> Hyperparameters:
    """Arrays by name, one row a seed; every seed's own are tried on the functions that take them.

    Raises:
      TypeError, ValueError: for what does not fit, by name; what a part says of a value that it refuses.
    """
    functions = [part for part in parts if callable(part)]
    if hyperparameters is None:
        if functions:
            raise TypeError(
                "train: `estimator` or `optimizer` is a function, but there are no `hyperparameters` for it"
            )
        return None
    if not isinstance(hyperparameters, Mapping) or not hyperparameters:
        raise TypeError(f"train: `hyperparameters` must map names to arrays, not {hyperparameters!r}")
    if seeds is None or not functions:
        raise ValueError(
            "train: `hyperparameters` need `seeds`, one for each row, and an `estimator` or `optimizer` that "
            "is a function of them"
        )
    # By way of the host: on whatever devices they lay, rows are taken from them.
    arrays = {name: jnp.asarray(np.asarray(values)) for name, values in hyperparameters.items()}
    for name, values in arrays.items():
        if values.shape != (len(seeds),):
            raise ValueError(
                f"train: `hyperparameters[{name!r}]` must have shape ({len(seeds)},), a number for each of "
                f"the seeds, not {values.shape}"
            )
    for row in range(len(seeds)):
        for part in functions:
            part({name: np.asarray(values)[row] for name, values in arrays.items()})
    return arrays
