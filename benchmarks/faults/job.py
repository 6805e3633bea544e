"""A run to be killed: two seeds of online ARTBP with evaluations and forty checkpoints.

python benchmarks/faults/job.py FOLDER begins it in FOLDER/run or goes on with it, and writes
FOLDER/outcome.json when it is done: hashes of everything that it gives back.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jtrunc
from jtrunc import cells, training
from jtrunc.tasks import synthetic_language
from jtrunc.training.configuration import hash_tree

NUM_UPDATES = 4000


class Parts(NamedTuple):
    """What is trained; made once, so that it is compiled once."""

    model: cells.Model
    estimator: jtrunc.GradientEstimator
    optimizer: optax.GradientTransformation
    data: Any


@cache
def parts() -> Parts:
    language = synthetic_language.brackets()
    symbols = len(language.symbols)
    model = cells.model(cells.tanh(symbols, 8), symbols, cells.softmax_cross_entropy)
    estimator = jtrunc.online_artbp(model.system, jtrunc.truncation.polynomial(5, 4))
    streams = synthetic_language.sequences(jax.random.key(1), 1000, 4, language=language)
    return Parts(model, estimator, optax.adam(1e-2), jax.tree.map(np.asarray, tuple(streams)))


def train(
    folder: Path, num_updates: int = NUM_UPDATES, every: int = 100, resume: bool = False
) -> training.TrainResult:
    """The run in a folder, from its beginning or where it was left; a checkpoint every `every` updates."""
    model, estimator, optimizer, data = parts()
    return training.train(
        model.system,
        model.init,
        model.initial_hidden((4,)),
        estimator,
        optimizer,
        data,
        window=50,
        num_updates=num_updates,
        seeds=2,
        log_every=5,
        eval_data={"held out": jax.tree.map(lambda leaf: leaf[:100], data)},
        eval_every=2 * every,
        checkpoint_every=every,
        out_dir=folder,
        resume=resume,
    )


def hashes(result: training.TrainResult) -> dict[str, str]:
    """Of everything that a run gives back."""
    parts = {"state": result.state, "history": result.history, "evaluations": result.evaluations}
    return {name: hash_tree(part) for name, part in parts.items()}


def main() -> None:
    folder = Path(sys.argv[1])
    result = train(folder / "run", resume=(folder / "run" / "config.json").exists())
    (folder / "outcome.json").write_text(json.dumps(hashes(result)) + "\n")


if __name__ == "__main__":
    main()
