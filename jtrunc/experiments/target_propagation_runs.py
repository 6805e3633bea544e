"""One run of the target propagation experiments: a method and its settings, all seeds in one program."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jtrunc
from jtrunc import cells, training
from jtrunc.base import GradientEstimator, System
from jtrunc.experiments.jobs import write_result
from jtrunc.experiments.parts import adagrad
from jtrunc.experiments.problems import Problem
from jtrunc.experiments.target_propagation_tables import Method, Settings, Size, Table


def gru(num_words: int, width: int) -> cells.Model:
    """A GRU that reads words, and a softmax over the same words."""
    return cells.model(cells.gru(num_words, width), num_words, cells.softmax_cross_entropy)


def window_of(problem: Problem, size: Size, block_length: int) -> int:
    """Steps of an update: `size.blocks` blocks, or all there are."""
    return size.blocks * block_length or len(problem.train[0])


def estimator_of(
    system: System, table: Table, method: Method, settings: Settings, streams: int, steps: int
) -> GradientEstimator:
    """Target propagation with ADMM on streams of so many steps, or BPTT cut where its blocks would end."""
    if method.hidden_steps is None:
        return jtrunc.truncated_bptt(system, method.block_length)
    return jtrunc.target_propagation(
        system,
        method.block_length,
        settings.penalty / streams if method.penalized else 0.0,
        hidden_steps=method.hidden_steps,
        hidden_optimizer=adagrad(settings.hidden_rate),
        dual_optimizer=optax.sgd(settings.dual_rate),
        initial=method.initial or table.initial,
        num_blocks=steps // method.block_length,
    )


def run(
    problem: Problem, table: Table, method: Method, settings: Settings, size: Size, seeds: int, folder: Path
) -> dict[str, Any]:
    """Trains all seeds and writes ``result.json``; an interrupted run in the folder goes on where it was."""
    model, steps = problem.model, len(problem.train[0])
    window = window_of(problem, size, method.block_length)
    updates = steps // window
    start = time.monotonic(), time.process_time()
    diverged = False
    try:
        trained = training.train(
            model.system,
            model.init,
            model.initial_hidden((size.streams,)),
            estimator_of(model.system, table, method, settings, size.streams, steps),
            adagrad(settings.rate),
            problem.train,
            window=window,
            num_updates=updates * size.epochs,
            seeds=seeds,
            log_every=updates,
            eval_data={"valid": problem.valid},
            eval_every=updates * size.evaluate_every,
            out_dir=folder / "run",
            resume=(folder / "run" / "config.json").exists(),
            progress=False,
        )
    except training.NonFiniteError as error:
        trained, diverged = error.result, True
    result = {"method": method._asdict(), "label": method.label, "settings": settings._asdict()}
    result |= _numbers(trained, updates, seeds) | {
        "diverged": diverged,
        "seconds": time.monotonic() - start[0],
        "processor_seconds": time.process_time() - start[1],
    }
    write_result(folder, result)
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    return result


def _numbers(trained: training.TrainResult, updates: int, seeds: int) -> dict[str, Any]:
    """Losses by epoch and seed, in nats a word, and the best of the validation."""
    found = trained.evaluations.get("valid", {"update": np.zeros(0), "nats": np.zeros((0, seeds))})
    nats = np.where(np.isfinite(found["nats"]), found["nats"], math.inf)
    numbers = {
        "epochs": (found["update"] / updates).tolist(),
        "valid": nats.tolist(),
        "best": np.min(nats, axis=0, initial=math.inf).tolist(),
    }
    for name in ("loss", "primal_residual", "dual_residual"):
        if name in trained.history:
            numbers[name] = np.asarray(jax.device_get(trained.history[name]), float).tolist()
    return numbers
