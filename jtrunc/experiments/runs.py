"""One training run of a token task, and the two commands that are made of such runs."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import jtrunc
from jtrunc import cells, training
from jtrunc.experiments.names import Choice, choose
from jtrunc.experiments.parts import CELLS, ESTIMATORS, OPTIMIZERS, TASKS, Tokens, Windowed
from jtrunc.experiments.report import fresh_folder, no_run, table, write_json
from jtrunc.experiments.sampling import sample
from jtrunc.training.placement import STREAMS, place
from jtrunc.training.plots import Curve, learning_curves
from jtrunc.training.processes import from_first, is_first
from jtrunc.training.seeds import SEEDS

STEPS_PER_LINE = 500


@dataclass(frozen=True)
class Setup:
    """What runs share that are to be compared."""

    task: str = "characters"
    """characters, words, copy, anbn, ... (`jtrunc list` has all), with options: copy:longest=20."""
    data: Path | None = None
    """Text file or folder of text files to learn from; without it `characters` reads Python's own library."""
    cell: str = "lstm:width=128"
    """Recurrent cell, with options: lstm:width=256,layers=2 (see `jtrunc list`)."""
    optimizer: str = "adam"
    """Optimiser, with options: sgd:momentum=0.9 (see `jtrunc list`)."""
    learning_rate: float = 2e-3
    """Learning rate; gradients are sums over a window's steps and means over the streams."""
    streams: int = 16
    """Parallel streams that the text is laid out in (the batch)."""
    seeds: int = 1
    """Independent runs, with seeds 0, 1, ..., in one program."""
    steps: int = 50_000
    """Time steps of each stream to train on; a run has steps / (window length) updates."""
    evaluate_every: int = 10_000
    """Time steps between two evaluations on the validation data."""
    max_non_finite: int = 0
    """Updates of a run that may be skipped because they are NaN or infinite; the next one stops it."""
    devices: int = 1
    """Devices that the seeds are spread over, or with one seed the streams; 0: all that there are."""
    distributed: str = ""
    """Several processes, all of their devices: "auto" on a cluster, or address:port,processes,index."""
    resume: bool = False
    """Go on with the run in --output."""


class Run(NamedTuple):
    """A finished run.

    Attributes:
      label: the estimator in command-line notation.
      result: `jtrunc.training.TrainResult` with a leading axis of seeds.
      timesteps: at each evaluation, (evaluations,), averaged over seeds.
      test_bits: bits a token on the test data, (seeds,).
      seconds: of training and evaluation.
    """

    label: str
    result: training.TrainResult
    timesteps: np.ndarray
    test_bits: np.ndarray
    seconds: float


class Problem(NamedTuple):
    """Task, model and devices, read and made once for all runs; of the streams those of this process."""

    tokens: Tokens
    model: cells.Model
    data: dict[str, Any]
    mesh: Mesh | None = None

    @property
    def hidden(self) -> Any:
        """The initial state of the streams."""
        return self.model.initial_hidden(self.data["train"][0].shape[1:2])


def problem(setup: Setup) -> Problem:
    """Reads the task's data and makes the model; prints what was read."""
    task, cell = choose(setup.task, TASKS, "task"), choose(setup.cell, CELLS, "cell")
    choose(setup.optimizer, OPTIMIZERS, "optimizer")
    for name in ("streams", "seeds", "steps", "evaluate_every"):
        if getattr(setup, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(setup, name)}")
    if setup.max_non_finite < 0:
        raise ValueError(f"--max-non-finite must be at least 0, got {setup.max_non_finite}")
    if not setup.learning_rate > 0:
        raise ValueError(f"--learning-rate must be positive, got {setup.learning_rate}")
    mesh = devices_of(setup)
    tokens = task.make(setup.data, **task.options)
    made = cell.make(tokens.num_classes, **cell.options)
    model = cells.model(made, tokens.num_classes, cells.softmax_cross_entropy)
    data = {name: tuple(getattr(tokens, name)(setup.streams)) for name in ("train", "valid", "test")}
    length = len(data["train"][0])
    if is_first():
        shape = f"{length:,} steps in each of {setup.streams} streams"
        print(f"{tokens.summary}\n{cell.label}, {shape}", flush=True)
    if mesh is not None and STREAMS in mesh.axis_names:
        own = setup.streams // jax.process_count()
        mine = slice(own * jax.process_index(), own * (jax.process_index() + 1))
        data = {name: tuple(leaf[:, mine] for leaf in split) for name, split in data.items()}
    return Problem(tokens, model, data, mesh)


def devices_of(setup: Setup) -> Mesh | None:
    """A mesh with one axis, for the seeds where there are several, else for the streams; None: one device."""
    count = jax.device_count() if setup.distributed or not setup.devices else setup.devices
    if not 0 < count <= jax.device_count():
        raise ValueError(f"--devices {setup.devices}: there are {jax.device_count()}; 0 takes all of them")
    if count == 1:
        return None
    axis = SEEDS if setup.seeds > 1 else STREAMS
    if axis == STREAMS and setup.streams % count:
        raise ValueError(f"--streams {setup.streams} do not divide over {count} devices: take a multiple")
    return jax.make_mesh((count,), (axis,), devices=jax.devices()[:count])


def one_run(
    setup: Setup,
    given: Problem,
    estimator: Choice,
    folder: Path,
    splits: tuple[str, ...] = ("valid",),
    shadows: Sequence[Choice] = (),
) -> Run:
    """Trains every seed with one estimator, in a folder of its own; goes on with the run if it holds one.

    Shadows are watched beside it. The named splits of the data are evaluated on the way, of training data as
    much as there is held out.
    """
    system = given.model.system
    optimizer = choose(setup.optimizer, OPTIMIZERS, "optimizer")
    made, window, consumed = _watched(estimator, shadows, system)
    held_out = max(len(given.data[name][0]) for name in ("valid", "test"))
    log_every = max(1, round(STEPS_PER_LINE / consumed))
    lines_per_evaluation = max(1, round(setup.evaluate_every / consumed / log_every))
    start = time.monotonic()
    result = training.train(
        system,
        given.model.init,
        given.hidden,
        made,
        optimizer.make(setup.learning_rate, **optimizer.options),
        given.data["train"],
        window=window,
        num_updates=max(1, round(setup.steps / consumed)),
        seeds=setup.seeds,
        mesh=given.mesh,
        log_every=log_every,
        max_non_finite=setup.max_non_finite,
        eval_data={name: tuple(leaf[:held_out] for leaf in given.data[name]) for name in splits},
        eval_every=lines_per_evaluation * log_every,
        out_dir=folder,
        resume=from_first(lambda: (folder / "config.json").exists()),
        config={
            "task": choose(setup.task, TASKS, "task").full_label,
            "cell": choose(setup.cell, CELLS, "cell").full_label,
            "estimator": estimator.full_label,
            **({"shadows": [shadow.full_label for shadow in shadows]} if shadows else {}),
            "optimizer": f"{optimizer.full_label} {setup.learning_rate}",
            **given.tokens.fingerprint,
        },
        progress=True,
    )
    layout = place(given.mesh, setup.seeds, given.data["test"])
    hidden, data = layout.hidden(given.hidden), layout.data(given.data["test"])
    test = training.evaluate(system, result.params, hidden, data, seed_axis=True)
    at = np.searchsorted(result.history["update"], result.evaluations["valid"]["update"])
    timesteps = result.history["timestep"][at].mean(axis=1)
    return Run(estimator.label, result, timesteps, test.bits, time.monotonic() - start)


def _watched(estimator: Choice, shadows: Sequence[Choice], system: jtrunc.System) -> Windowed:
    """The estimator, with shadows that read the same windows."""
    main = estimator.make(system, **estimator.options)
    others = {shadow.label: shadow.make(system, **shadow.options) for shadow in shadows}
    for label, other in others.items():
        if (other.window, other.consumed) != (main.window, main.consumed):
            raise ValueError(
                f"--shadows: {label} consumes {other.consumed} of {other.window} steps an update, "
                f"{estimator.label} {main.consumed} of {main.window}; give them the same, by their options"
            )
    if not others:
        return main
    members = {label: other.estimator for label, other in others.items()}
    return main._replace(estimator=jtrunc.with_shadows(main.estimator, members))


def train(setup: Setup, estimator: str, shadows: tuple[str, ...], output: Path) -> list[Path]:
    """The command `train`: one estimator; returns the paths of pictures, summary and sample."""
    chosen = choose(estimator, ESTIMATORS, "estimator")
    watched = [choose(text, ESTIMATORS, "estimator") for text in shadows]
    given = begin(setup, [chosen], output, watched)
    runs = [one_run(setup, given, chosen, output, shadows=watched)]
    if not is_first():
        return []
    paths = report(runs, setup, output) + samples(runs, given, output)
    return [alignment(runs[0], watched, output / "alignment.png"), *paths] if watched else paths


def alignment(run: Run, shadows: Sequence[Choice], path: Path) -> Path:
    """How well the shadows' gradients agreed with the one that trained, over time."""
    history = run.result.history
    curves = {
        shadow.label: Curve(history["timestep"], history[f"cosine/{shadow.label}"]) for shadow in shadows
    }
    label = f"cosine with the gradient of {run.label}"
    return learning_curves(curves, path, x_label="time steps of each stream", y_label=label)


def compare(setup: Setup, estimators: tuple[str, ...], output: Path) -> list[Path]:
    """The command `compare`: several estimators, each in a subfolder; returns the paths of its results."""
    chosen = [choose(text, ESTIMATORS, "estimator") for text in estimators]
    if len({choice.full_label for choice in chosen}) < len(chosen) or not chosen:
        raise ValueError(f"--estimators must be at least one, none twice, got {' '.join(estimators)!r}")
    given = begin(setup, chosen, output)
    runs = []
    for choice in chosen:
        if is_first():
            print(f"{choice.label} ...", flush=True)
        runs.append(one_run(setup, given, choice, output / re.sub("[:,]", "-", choice.label)))
    if not is_first():
        return []
    return report(runs, setup, output) + samples(runs, given, output)


def begin(setup: Setup, estimators: list[Choice], output: Path, shadows: Sequence[Choice] = ()) -> Problem:
    """The problem, once every option has been read and before the folder is made: a refusal leaves none."""
    if setup.distributed:
        if setup.devices > 1:
            raise ValueError(
                f"--devices {setup.devices} with --distributed: every device of every process takes part; "
                "leave --devices out"
            )
        training.start_processes(setup.distributed)
    given = problem(setup)
    for estimator in estimators:
        _watched(estimator, shadows, given.model.system)
    from_first(lambda: claim(setup.resume, output))
    return given


def claim(resume: bool, output: Path) -> None:
    """A fresh folder for a new run, an existing one for a resumed run, or a ValueError with the remedy."""
    if not resume:
        fresh_folder(output)
    elif not output.is_dir():
        raise no_run(output)


def report(runs: list[Run], setup: Setup, folder: Path) -> list[Path]:
    """Prints the table, draws the picture, writes the summary as JSON."""
    header = ["estimator", "seed", "train", "valid", "test", "updates", "steps", "seconds"]
    rows, records = [], []
    for run in runs:
        history, valid = run.result.history, run.result.evaluations["valid"]
        last = max(1, len(history["loss"]) // 20)
        train_bits = history["loss"][-last:].mean(axis=0) / np.log(2)
        for i, seed in enumerate(run.result.seeds or ()):
            bits = [round(float(x), 4) for x in (train_bits[i], valid["bits"][-1, i], run.test_bits[i])]
            counts = [int(history["update"][-1]), int(history["timestep"][-1, i])]
            rows.append([run.label, str(seed), *bits, *counts, round(run.seconds, 1)])
        records.append(_record(run, train_bits))
    print("\nBits per token: training (mean of the last 5 % of the run), validation, test")
    print(table(header, rows), flush=True)
    summary = write_json(folder / "summary.json", setup, runs=records)
    return [picture(runs, folder / "curves.png"), summary]


def _record(run: Run, train_bits: np.ndarray) -> dict[str, Any]:
    valid = run.result.evaluations["valid"]
    return {
        "estimator": run.label,
        "seeds": list(run.result.seeds or ()),
        "train_bits": train_bits.tolist(),
        "valid_bits": valid["bits"].tolist(),
        "valid_updates": valid["update"].tolist(),
        "valid_timesteps": run.timesteps.tolist(),
        "test_bits": run.test_bits.tolist(),
        "seconds": run.seconds,
    }


def picture(runs: list[Run], path: Path) -> Path:
    """Bits per token against time steps, in training and in validation, with bands over the seeds."""
    curves = {}
    for run in runs:
        history, valid = run.result.history, run.result.evaluations["valid"]
        curves[f"{run.label}, training"] = Curve(history["timestep"], history["loss"] / np.log(2))
        curves[f"{run.label}, validation"] = Curve(run.timesteps, valid["bits"])
    seeds = len(runs[0].result.seeds or ())
    title = f"median and 10 to 90 % of {seeds} seeds" if seeds > 1 else ""
    return learning_curves(
        curves, path, x_label="time steps of each stream", y_label="bits per token", title=title
    )


def samples(runs: list[Run], given: Problem, folder: Path, num_tokens: int = 300) -> list[Path]:
    """Shows and saves what the first seed of each run writes after 100 characters of the test data.

    Returns the path of the file; [] for tasks that are no text.
    """
    vocabulary = given.tokens.vocabulary
    if vocabulary is None:
        return []
    prompt = jnp.asarray(given.data["test"][0][:100, 0])
    parts = []
    for run in runs:
        params: jtrunc.Params = jax.tree.map(lambda leaf: leaf[0], run.result.params)
        drawn = sample(given.model, params, prompt, num_tokens, jax.random.key(0), temperature=0.8)
        text = vocabulary.decode(np.asarray(drawn))
        parts.append(f"--- {run.label} writes (seed 0, temperature 0.8):\n{text}\n")
    print("\n" + "\n".join(parts), flush=True)
    (folder / "samples.txt").write_text("\n".join(parts), encoding="utf-8")
    return [folder / "samples.txt"]
