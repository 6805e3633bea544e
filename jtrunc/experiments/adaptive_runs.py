"""One run of the adaptive truncation experiments: a method and a seed, epoch by epoch, resumable.

An epoch is a pass over the training data, T steps of each stream. Since K is data it is no fixed number of
updates: one compiled loop runs until a timestep is reached. After every epoch the validation score is taken,
and where it is the best so far, the test score; then the gradient norms on the next stretch of training data
tell the relative bias Δ̂(K) of the present K, for fixed and adaptive truncation alike. These norms are a
report, and no data of the method; the steps that an adaptive method reads for its own estimates are counted.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jtrunc
from jtrunc import diagnostics, optimizers
from jtrunc.base import GradientEstimator, Params, PyTree
from jtrunc.experiments.adaptive_tasks import Experiment
from jtrunc.experiments.jobs import read_result, write_result
from jtrunc.experiments.problems import Problem
from jtrunc.training import TrainState, checkpoint, evaluate, init_state, train_step
from jtrunc.training.metrics import MetricsFile
from jtrunc.training.stream import Stream, circular, window_at
from jtrunc.training.sums import MetricSums, add_update, no_sums

SAVE_EVERY = 60.0
"""Seconds between two checkpoints; they are written at the end of an epoch."""
DRAWS = 40
"""Single draws of the gradient norms that are kept for a picture."""


Report = Callable[[Params, PyTree, PyTree, int], dict[str, jax.Array]]
"""``(params, hidden, inputs, K) -> {name: array}``, see `norms_report`."""


class Method(NamedTuple):
    """Fixed truncation of length K, or adaptive truncation with tolerance δ; the other is None."""

    length: int | None = None
    tolerance: float | None = None

    @property
    def label(self) -> str:
        """``K=15`` or ``delta=0.5``."""
        return f"delta={self.tolerance:g}" if self.length is None else f"K={self.length}"


class Training(NamedTuple):
    """How a method is trained; the same for all.

    Attributes:
      epochs: passes over the training data.
      clip: gradients are clipped at clip / K; 0: not at all.
      weight_decay: added to the gradient, times the parameters.
      estimate_every: steps of a stream between two estimates of K.
    """

    epochs: int
    clip: float
    weight_decay: float
    estimate_every: int


class Program(NamedTuple):
    """A method on a problem, compiled.

    Attributes:
      init: ``key -> TrainState``.
      advance: ``(state, rows, until) -> (state, sums)``, updates until a timestep is reached.
      length: ``state -> K``, the present truncation length.
      report: what gradient norms say of K.
      stream: the training data.
    """

    init: Callable[[jax.Array], TrainState]
    advance: Callable[[TrainState, PyTree, int], tuple[TrainState, MetricSums]]
    length: Callable[[TrainState], int]
    report: Report
    stream: Stream


def estimator_of(experiment: Experiment, method: Method, system: Any, every: int) -> tuple[Any, int]:
    """The estimator, and how many steps of data it is given."""
    if method.length is not None:
        return jtrunc.windowed_bptt(system, 2 * method.length, method.length), 2 * method.length + 1
    estimator = jtrunc.adaptive_bptt(
        system,
        method.tolerance,
        num_lags=experiment.num_lags,
        min_length=experiment.min_length,
        max_length=experiment.max_length,
        initial_length=experiment.initial_length,
        estimate_every=every,
        unit="steps",
        fit_from=fit_from(experiment),
        num_times=experiment.num_times,
        streams=True,
    )
    return estimator, max(2 * experiment.max_length + 1, experiment.num_lags + experiment.num_times)


def fit_from(experiment: Experiment) -> int:
    """τ, steps."""
    return round(experiment.fit_from * experiment.num_lags)


def optimizer_of(experiment: Experiment, method: Method, training: Training) -> optax.GradientTransformation:
    """Descent with γ √K for fixed and adaptive truncation, and what the published runs add (errata 13)."""
    clip = (
        optimizers.clip_by_truncation_length(training.clip, length=method.length) if training.clip else None
    )
    return optax.chain(
        clip or optax.identity(),
        optax.add_decayed_weights(training.weight_decay),
        optimizers.scale_by_truncation_length(length=method.length),
        optax.scale(-experiment.learning_rate),
    )


def compile_report(experiment: Experiment, problem: Problem) -> Report:
    """`norms_report` of a problem, compiled."""
    return jax.jit(partial(norms_report, experiment, problem.model.system))


def compile_program(
    experiment: Experiment, problem: Problem, method: Method, training: Training, report: Report
) -> Program:
    """The compiled parts of all runs of a method; `report` from `compile_report` serves all methods."""
    estimator, window = estimator_of(experiment, method, problem.model.system, training.estimate_every)
    optimizer = optimizer_of(experiment, method, training)
    report_window = experiment.num_lags + experiment.num_times
    stream = circular(problem.train, max(window, report_window))
    hidden = problem.model.initial_hidden(num_streams(problem))

    def init(key: jax.Array) -> TrainState:
        return init_state(estimator, optimizer, jax.jit(problem.model.init), hidden, key)

    def length(state: TrainState) -> int:
        return int(state.estimator_state.chosen.length) if method.length is None else method.length

    return Program(
        init=init,
        advance=jax.jit(partial(_advance, estimator, optimizer, window, stream.length)),
        length=length,
        report=report,
        stream=stream,
    )


def num_streams(problem: Problem) -> tuple[int, ...]:
    """The batch shape, (B,)."""
    return jax.tree.leaves(problem.train)[0].shape[1:2]


def _advance(
    estimator: GradientEstimator,
    optimizer: optax.GradientTransformation,
    window: int,
    data_length: jax.Array,
    state: TrainState,
    rows: PyTree,
    until: Any,
) -> tuple[TrainState, MetricSums]:
    """Updates until a timestep is reached, or one of them is not finite."""

    def update(state: TrainState) -> Any:
        state, metrics = train_step(estimator, optimizer, state, window_at(rows, state.cursor, window))
        return state._replace(cursor=state.cursor % data_length), metrics

    def body(carry: tuple[TrainState, MetricSums]) -> tuple[TrainState, MetricSums]:
        state, metrics = update(carry[0])
        return state, add_update(carry[1], metrics)

    empty = no_sums(jax.eval_shape(update, state)[1])
    return jax.lax.while_loop(
        lambda carry: (carry[0].timestep < until) & (carry[1].non_finite == 0), body, (state, empty)
    )


def norms_report(
    experiment: Experiment, system: Any, params: Params, hidden: PyTree, inputs: PyTree, length: Any
) -> dict[str, jax.Array]:
    """What one minibatch of gradient norms says of K: Δ̂(K) and β̂ with 95 % bands, and the norms.

    Returns:
      relative_bias, decay_rate: scalars, and `..._band`: (2,); log_norms: (samples, R + 1); curve: (R + 1,),
      log of the mean, and curve_band: (2, R + 1).
    """
    logs = diagnostics.log_gradient_norms(
        system, params, hidden, inputs, experiment.num_lags, num_times=experiment.num_times, streams=True
    )

    def statistic(logs: jax.Array) -> dict[str, jax.Array]:
        curve = diagnostics.mean_log_norms(logs)
        log_decay = diagnostics.log_decay_rate(curve, fit_from(experiment))
        log_bias = diagnostics.log_absolute_bias(
            curve, log_decay, fit_from(experiment), experiment.max_length
        )
        bias = diagnostics.relative_bias(curve, log_bias)[length]
        return {"curve": curve, "decay_rate": jnp.exp(log_decay), "relative_bias": bias}

    lower, upper = diagnostics.bootstrap_bands(jax.random.key(0), logs, statistic)
    bands = {f"{name}_band": jnp.stack([lower[name], upper[name]]) for name in lower}
    return {**statistic(logs), **bands, "log_norms": logs}


class Progress(NamedTuple):
    """A run between two epochs: what a checkpoint holds, and the lines so far."""

    state: TrainState
    best: Params
    lines: list[dict[str, Any]]


def run(
    experiment: Experiment,
    problem: Problem,
    program: Program,
    method: Method,
    training: Training,
    seed: int,
    folder: Path,
    advance: Callable[[int], None] = lambda epochs: None,
) -> dict[str, Any]:
    """Trains one seed of a method, and writes ``result.json`` into its folder; a finished run is read.

    ``metrics.jsonl`` gets a line an epoch, ``checkpoints`` what an interrupted run needs to go on.
    """
    if (result := read_result(folder)) is not None:
        advance(training.epochs)
        return result
    folder.mkdir(parents=True, exist_ok=True)
    metrics = MetricsFile(folder / "metrics.jsonl")
    at = begin(program, seed, folder, metrics)
    last = at.lines[-1] if at.lines else {"seconds": 0.0, "processor_seconds": 0.0}
    clocks = time.monotonic() - last["seconds"], time.process_time() - last["processor_seconds"]
    advance(len(at.lines))
    saved = time.monotonic()
    while len(at.lines) < training.epochs and not (at.lines and at.lines[-1]["diverged"]):
        at = epoch(problem, program, experiment, at, clocks)
        metrics.append(at.lines[-1:])
        if time.monotonic() - saved > SAVE_EVERY:
            save(folder, at, metrics)
            saved = time.monotonic()
        advance(1)
    result = {"method": method.label, "seed": seed, "epochs": at.lines, **best_of(at.lines)}
    if not math.isinf(result["valid"]):
        result |= norms_at_best(experiment, problem, program, at) | measures(problem, at.best)
    write_result(folder, result)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


def epoch(
    problem: Problem, program: Program, experiment: Experiment, at: Progress, clocks: tuple[float, float]
) -> Progress:
    """One pass over the training data, the scores behind it, and what the gradient norms say then."""
    lines, length = at.lines, int(program.stream.length)
    number = len(lines) + 1
    state, sums = program.advance(at.state, program.stream.rows, number * length)
    valid = score(problem, state.params, problem.valid)
    previous = best_of(lines)
    improved = valid < previous["valid"]
    estimated = (lines[-1]["estimation_steps"] if lines else 0) + _total(sums, "estimation_steps")
    inputs = window_at(program.stream.rows, state.cursor, experiment.num_lags + experiment.num_times)
    hidden = state.estimator_state.hidden
    report = jax.device_get(program.report(state.params, hidden, inputs, program.length(state)))
    line = {
        "update": int(state.update),
        "epoch": number,
        "data_epochs": (int(state.timestep) + estimated) / length,
        "estimation_steps": estimated,
        "train": _sum(sums.loss) / max(1, int(sums.num_scored)),
        "valid": valid,
        "best_valid": min(valid, previous["valid"]),
        "best_test": score(problem, state.params, problem.test) if improved else previous["test"],
        "length": program.length(state),
        "mean_length": int(sums.num_steps) / max(1, int(sums.num_updates)),
        "unbounded_updates": int(_total(sums, "unbounded")),
        "decay_rate": float(report["decay_rate"]),
        "relative_bias": float(report["relative_bias"]),
        "relative_bias_band": report["relative_bias_band"].tolist(),
        "diverged": bool(sums.non_finite) or not math.isfinite(valid),
        "seconds": time.monotonic() - clocks[0],
        "processor_seconds": time.process_time() - clocks[1],
    }
    return Progress(state, state.params if improved else at.best, [*lines, line])


def score(problem: Problem, params: Params, data: PyTree) -> float:
    """Nats a step; a score that is not finite is inf, worse than all others."""
    hidden = problem.model.initial_hidden(num_streams(problem))
    nats = float(evaluate(problem.model.system, params, hidden, data).nats)
    return nats if math.isfinite(nats) else math.inf


def best_of(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The best validation score of some epochs, and the test score there, nats."""
    last: dict[str, Any] = lines[-1] if lines else {"best_valid": math.inf, "best_test": math.inf}
    return {"valid": last["best_valid"], "test": last["best_test"]}


def measures(problem: Problem, params: Params) -> dict[str, Any]:
    """The problem's other numbers, on the test data."""
    return {"measures": problem.measures(params, problem.test) if problem.measures else {}}


def norms_at_best(experiment: Experiment, problem: Problem, program: Program, at: Progress) -> dict[str, Any]:
    """Figure 3: gradient norms at the best parameters, on the validation data behind a look-back."""
    warm_up, window = experiment.num_lags, experiment.num_lags + experiment.num_times
    rows = circular(problem.valid, warm_up + window).rows
    hidden = problem.model.initial_hidden(num_streams(problem))
    before = jax.tree.map(lambda leaf: leaf[:warm_up], rows)
    hidden = evaluate(problem.model.system, at.best, hidden, before).hidden
    inputs = window_at(rows, jnp.int32(warm_up), window)
    found = jax.device_get(program.report(at.best, hidden, inputs, program.length(at.state)))
    draws = found.pop("log_norms")
    chosen = np.linspace(0, len(draws) - 1, min(DRAWS, len(draws))).astype(int)
    numbers = {name: np.asarray(leaf, float).round(6).tolist() for name, leaf in found.items()}
    return {"norms": {**numbers, "draws": np.round(draws[chosen], 3).astype(float).tolist()}}


def begin(program: Program, seed: int, folder: Path, metrics: MetricsFile) -> Progress:
    """From the newest checkpoint of the folder, or from the start."""
    state = program.init(jax.random.key(seed))
    at, lines_until = (state, state.params), metrics.sha256
    if checkpoint.list_steps(folder / "checkpoints"):
        restored = checkpoint.restore(folder / "checkpoints", at)
        at, lines_until = restored.state, restored.extra["metrics"]
    return Progress(at[0], at[1], metrics.truncate_to(lines_until))


def save(folder: Path, at: Progress, metrics: MetricsFile) -> None:
    """A checkpoint of a run between two epochs."""
    state, extra = (at.state, at.best), {"metrics": metrics.sha256}
    checkpoint.save(folder / "checkpoints", int(at.state.update), state, extra=extra, keep=2)


def _total(sums: MetricSums, name: str) -> float:
    return round(_sum(sums.diagnostics[name])) if name in sums.diagnostics else 0


def _sum(total: Any) -> float:
    return float(total.total) + float(total.rest)
