"""Figures 1 to 3 and tables C.1 to C.3 of the adaptive truncation paper: fixed against adaptive K.

Source: Aicher, Foti & Fox, "Adaptively truncating backpropagation through time to control gradient bias"
(2019), section 5 and appendix C. Settings are in `adaptive_tasks`, a run in `adaptive_runs`, what is made of
the runs in `adaptive_figures`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import jax

from jtrunc.experiments.adaptive_figures import claims, figure_one, figure_three, print_table, scores
from jtrunc.experiments.adaptive_runs import (
    Method,
    Program,
    Report,
    Training,
    compile_program,
    compile_report,
    run,
)
from jtrunc.experiments.adaptive_tasks import EXPERIMENTS, Experiment, Size
from jtrunc.experiments.jobs import check_resume, claim, finite, read_result, run_all
from jtrunc.experiments.problems import Problem
from jtrunc.experiments.report import progress, table, write_json

FREE = ("output", "resume", "jobs", "methods", "seeds")
"""Options that may differ when a run is resumed."""


@dataclass(frozen=True)
class Adaptive:
    """Fixed against adaptive truncation, BPTT(2K, K) each: the adaptive truncation paper.

    Tasks: copy and copy-variable (figure 1, table C.1), ptb and wikitext-2 (words; figure 2, table C.2),
    book-order (table C.3), self-exciting (a synthetic point process whose likelihood is known). Writes the
    table beside the paper's, figures 1 and 3 for the task, and all numbers as JSON. Every method and seed has
    a folder of its own: with --resume, finished ones are kept, and others may be added by --methods and
    --seeds.
    """

    task: Literal["copy", "copy-variable", "book-order", "self-exciting", "ptb", "wikitext-2"] = "copy"
    """What is learned."""
    data: Path | None = None
    """Folder of the data, for book-order, ptb and wikitext-2."""
    scale: Literal["small", "full"] = "small"
    """full is the paper's size; it differs from small for ptb and wikitext-2, and wants a GPU there."""
    methods: tuple[str, ...] = ()
    """Such as K=15 delta=0.5, separated by blanks; default: those of the paper."""
    output: Path = Path("runs/adaptive")
    """Folder for the results; it must not exist yet, or be empty, unless --resume is given."""
    seeds: int = 3
    """Runs of each method, with seeds 0, 1, ...: initial weights."""
    epochs: int = 0
    """Passes over the training data; 0: the task's default."""
    steps: int = 0
    """Steps of each stream of the training data; 0: the task's default."""
    width: int = 0
    """Units of a layer; 0: the task's default."""
    streams: int = 0
    """Parallel streams; 0: the task's default."""
    clip: float = 1.0
    """Gradients are clipped at this norm over K, as in the published runs; 0: not at all, as in the text."""
    weight_decay: float = 1e-5
    """Added to the gradient, times the parameters, as in the published runs; 0: as in the text."""
    estimate_every: int = 0
    """Steps of a stream between two estimates of K; 0: an epoch."""
    jobs: int = 1
    """Processes that share the runs, a core each."""
    resume: bool = False
    """Go on with the runs in --output; the other options must be those it was made with."""

    def run(self) -> list[Path]:
        return reproduce(self)


def reproduce(config: Adaptive) -> list[Path]:
    """Runs every method and seed, prints the table and the claims, writes pictures and JSON."""
    check(config)
    chosen = [read_method(text) for text in config.methods] or paper_methods(config)
    experiment, problem, training = prepare(config)
    claim(config, FREE)
    print(f"{problem.summary}\n{describe(config, training)}", flush=True)
    pairs = [(method, seed) for method in chosen for seed in range(config.seeds)]
    with progress(len(pairs) * training.epochs, config.task, "epochs") as advance:
        work = partial(run_one, config, **({"advance": advance} if config.jobs == 1 else {}))
        for (method, seed), result in run_all(work, pairs, config.jobs, lambda _: advance(training.epochs)):
            print_line(experiment, f"{method.label}, seed {seed}", result)
    return report(config, experiment)


def check(config: Adaptive) -> None:
    """Raises a ValueError for an option that makes no sense, before anything is read or written."""
    for name in ("seeds", "jobs"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(config, name)}")
    for name in ("epochs", "steps", "width", "streams", "estimate_every", "clip", "weight_decay"):
        if not getattr(config, name) >= 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {getattr(config, name)}")
    check_resume(config)


def read_method(text: str) -> Method:
    """``K=15`` or ``delta=0.5``.

    >>> read_method("K=15"), read_method("delta=0.5").label
    (Method(length=15, tolerance=None), 'delta=0.5')
    """
    name, _, value = text.partition("=")
    try:
        method = Method(length=int(value)) if name == "K" else Method(tolerance=float(value))
    except ValueError:
        method = Method()
    positive = (method.length or 0) > 0 or 0 < (method.tolerance or 0) < float("inf")
    if name not in ("K", "delta") or not positive:
        raise ValueError(f"unknown method {text!r} in --methods: write K=15 or delta=0.5")
    return method


def paper_methods(config: Adaptive) -> list[Method]:
    """Those of the paper's table."""
    experiment = EXPERIMENTS[config.task]
    return [Method(length=k) for k in experiment.lengths] + [
        Method(tolerance=d) for d in experiment.tolerances
    ]


@cache
def prepare(config: Adaptive) -> tuple[Experiment, Problem, Training]:
    """Settings and data, once a process."""
    experiment = EXPERIMENTS[config.task]
    problem = experiment.problem(size_of(config), config.data)
    epochs = config.epochs or experiment.epochs[config.scale]
    every = config.estimate_every or jax.tree.leaves(problem.train)[0].shape[0]
    return experiment, problem, Training(epochs, config.clip, config.weight_decay, every)


@cache
def report_of(config: Adaptive) -> Report:
    """What gradient norms say of K, compiled once a process for all methods."""
    experiment, problem, _ = prepare(config)
    return compile_report(experiment, problem)


@cache
def program_of(config: Adaptive, method: Method) -> Program:
    """A method's program, compiled once a process for all its seeds."""
    experiment, problem, training = prepare(config)
    return compile_program(experiment, problem, method, training, report_of(config))


def describe(config: Adaptive, training: Training) -> str:
    """The size and what the paper's text leaves open, as they are here."""
    size, full = size_of(config), EXPERIMENTS[config.task].sizes["full"]
    clip = f"clipped at {config.clip:g}/K" if config.clip else "not clipped"
    beside = "" if size == full else f" (the paper: {_sizes(full)})"
    return (
        f"{_sizes(size)}{beside}\n{training.epochs} epochs; gradients {clip}, weight decay"
        f" {config.weight_decay:g}; K estimated every {training.estimate_every:,} steps of a stream"
    )


def size_of(config: Adaptive) -> Size:
    """The scale's size, with what the options change."""
    given = EXPERIMENTS[config.task].sizes[config.scale]
    return Size(*(getattr(config, name) or getattr(given, name) for name in Size._fields))


def _sizes(size: Size) -> str:
    return ", ".join(f"{name} {value or 'all'}" for name, value in zip(Size._fields, size, strict=True))


def folder_of(config: Adaptive, label: str, seed: int) -> Path:
    """Where a method and seed is kept."""
    return config.output / label / f"seed-{seed}"


def run_one(config: Adaptive, pair: tuple[Method, int], advance: Any = lambda epochs: None) -> dict[str, Any]:
    """One method and seed."""
    method, seed = pair
    experiment, problem, training = prepare(config)
    folder = folder_of(config, method.label, seed)
    if (result := read_result(folder)) is not None:
        advance(training.epochs)
        return result
    program = program_of(config, method)
    return run(experiment, problem, program, method, training, seed, folder, advance)


def print_line(experiment: Experiment, label: str, result: dict[str, Any]) -> None:
    """A finished run in a line."""
    valid, test = scores(experiment, [result["valid"], result["test"]])
    last = result["epochs"][-1]
    what = "diverged; " if last["diverged"] else ""
    numbers = f"best validation {valid:.4f}, test {test:.4f}; {last['data_epochs']:.1f} epochs of data"
    print(f"{label}: {what}{numbers}, {last['seconds']:.0f} s", flush=True)


def report(config: Adaptive, experiment: Experiment) -> list[Path]:
    """Table, claims, pictures and JSON of all finished runs of the folder."""
    results = read_results(config)
    print_table(experiment, results)
    verdicts = claims(experiment, results)
    words = [["held" if v["held"] else "did not hold", v["claim"], v["rule"]] for v in verdicts]
    print(f"\n{table(['', 'claim', 'rule'], words)}" if words else "", flush=True)
    one = figure_one(experiment, results, config.output / "curves.png")
    three = figure_three(experiment, results, config.output / "gradient_norms.png")
    summary = write_json(config.output / "summary.json", config, runs=finite(results), claims=verdicts)
    return [one, three, summary]


def read_results(config: Adaptive) -> dict[str, list[dict[str, Any]]]:
    """The finished runs by method: fixed lengths first, shortest first, then tolerances, largest first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(
        config.output.glob("*/seed-*/result.json"), key=lambda path: int(path.parent.name[5:])
    ):
        found.setdefault(path.parent.parent.name, []).append(json.loads(path.read_text()))

    def order(label: str) -> tuple[int, float]:
        method = read_method(label)
        return (0, method.length) if method.length is not None else (1, -(method.tolerance or 0))

    return {label: found[label] for label in sorted(found, key=order)}
