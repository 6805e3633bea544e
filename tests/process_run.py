"""A run that one process makes alone, or several together: python -m tests.process_run WHERE OUT_DIR HOW."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jtrunc
from jtrunc.training import TrainResult, start_processes, train
from tests import systems
from tests.systems import Case, batched

NUM_UPDATES, STREAMS, SEEDS = 240, 4, (4, 0, 2)


def case() -> Case:
    """Streams that differ, from states that differ."""
    one, generator = systems.tanh(60), np.random.default_rng(8)
    hidden, inputs = generator.normal(size=(STREAMS, 3)), generator.normal(size=(60, STREAMS, 2))
    return one._replace(system=batched(one.system), hidden=hidden, inputs=inputs)


def own(case: Case) -> Case:
    """The streams that this process loads."""
    first, count = jax.process_index(), jax.process_count()
    mine = slice(first * STREAMS // count, (first + 1) * STREAMS // count)
    return case._replace(hidden=case.hidden[mine], inputs=case.inputs[:, mine])


def run_streams(mesh: Any = None, **options: Any) -> TrainResult:
    """Windows of random length, cut alike in all streams."""
    system, params, hidden, inputs = own(case())
    estimator = jtrunc.online_artbp(system, jtrunc.truncation.constant(0.3))
    arguments = (system, params, hidden, estimator, optax.adam(1e-2), inputs)
    splits = {"valid": inputs[:9]}
    return train(*arguments, window=7, num_updates=NUM_UPDATES, log_every=2, mesh=mesh, eval_data=splits,
                 eval_every=100, **options)  # fmt: skip


def run_seeds(mesh: Any = None) -> TrainResult:
    """Three seeds, which two processes cannot share evenly, each with its rate; and NaN in the data."""
    system, params, hidden, inputs = systems.tanh(60)
    inputs = jnp.asarray(inputs).at[9].set(jnp.nan)

    def optimizer(h: Any) -> optax.GradientTransformation:
        return optax.sgd(h["rate"])

    rates = {"rate": np.array([0.01, 0.003, 0.03])}
    arguments = (system, params, hidden, jtrunc.nobacktrack(system), optimizer, inputs)
    return train(*arguments, window=2, num_updates=20, seeds=SEEDS, hyperparameters=rates, mesh=mesh,
                 max_non_finite=1, eval_data={"valid": inputs[:9]})  # fmt: skip


def main(where: str, out_dir: str, how: str) -> None:
    start_processes(where)
    jax.config.update("jax_enable_x64", True)
    devices = (jax.device_count(),)
    run_streams(
        jax.make_mesh(devices, ("data",)), out_dir=out_dir, resume=how == "resume", checkpoint_every=4
    )
    result = run_seeds(jax.make_mesh(devices, ("seeds",)))
    arrays = jax.tree.leaves((result.params, result.history, result.evaluations))
    np.savez(Path(out_dir) / f"seeds-{jax.process_index()}.npz", *arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
