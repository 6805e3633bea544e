"""Tables 1 and 2 and figure 3 of the target propagation paper: words, target propagation against BPTT.

Source: Wiseman et al., "Training language models using target propagation" (2017), section 4. Methods,
settings and sizes are in `target_propagation_tables`, a run in `target_propagation_runs`, what is made of the
runs in `target_propagation_figures`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jtrunc.experiments.jobs import check_resume, claim, finite, read_result, run_all
from jtrunc.experiments.names import did_you_mean
from jtrunc.experiments.problems import Problem, word_problem
from jtrunc.experiments.report import progress, table, write_json
from jtrunc.experiments.target_propagation_figures import (
    best_settings,
    claims,
    pictures,
    print_table,
)
from jtrunc.experiments.target_propagation_runs import gru, run, window_of
from jtrunc.experiments.target_propagation_tables import (
    TABLES,
    Method,
    Settings,
    Size,
    grid_of,
)
from jtrunc.tasks import words

FREE = ("output", "resume", "jobs", "methods", "grid")
"""Options that may differ when a run is resumed."""

Item = tuple[Method, Settings]


@dataclass(frozen=True)
class TargetPropagation:
    """Target propagation against BPTT on words: the target propagation paper.

    Tables: minibatch and batch (table 1, Penn Treebank), text8 (table 1), hidden-steps-zero (table 2),
    hidden-size (figure 3). Trains every cell of the table, prints it beside the paper's, and writes pictures
    and all numbers as JSON. A cell has a folder of its own, with all its seeds in one program: with --resume,
    finished ones are kept, and others may be added by --methods and --grid.
    """

    table: Literal["minibatch", "batch", "text8", "hidden-steps-zero", "hidden-size"] = "minibatch"
    """Which table or figure."""
    data: Path | None = None
    """Folder of ptb.train.txt and its two sisters; for text8 the file text8, or its folder."""
    scale: Literal["small", "full"] = "small"
    """full is the paper's size, as far as it is known, and wants a GPU."""
    methods: tuple[str, ...] = ()
    """Some cells of the table, such as B=10,H=2 K=10, separated by blanks; default: all."""
    block_lengths: tuple[int, ...] = ()
    """B of the cells, and K; default: those of the paper."""
    widths: tuple[int, ...] = ()
    """Units of the GRU; default: those of the table. More than one makes columns of figure 3."""
    grid: bool = False
    """Every point of the paper's grid (table 3) for every cell; the table shows each cell's best."""
    output: Path = Path("runs/target-propagation")
    """Folder for the results; it must not exist yet, or be empty, unless --resume is given."""
    seeds: int = 2
    """Runs of each cell, with seeds 0, 1, ...: initial weights."""
    epochs: int = 0
    """Passes over the training data; 0: the table's default."""
    steps: int = 0
    """Steps of each stream of the training data; 0: the table's default."""
    streams: int = 0
    """Parallel streams; 0: the table's default."""
    blocks: int = 0
    """Blocks of an update in each stream; 0: the table's default (batch: all there are)."""
    vocabulary: int = 0
    """The most frequent words, others are <unk>; 0: the table's default."""
    penalty: float | None = None
    """The paper's lambda; default of this and the next three: the best of a small search."""
    dual_rate: float | None = None
    """Step of the multipliers u along h - h^."""
    hidden_rate: float | None = None
    """Learning rate of Adagrad on H."""
    rate: float | None = None
    """Learning rate of Adagrad on the parameters."""
    jobs: int = 1
    """Processes that share the cells, a core each."""
    resume: bool = False
    """Go on with the runs in --output; the other options must be those it was made with."""

    def run(self) -> list[Path]:
        return reproduce(self)


def reproduce(config: TargetPropagation) -> list[Path]:
    """Runs every cell, prints the table and the claims, writes pictures and JSON."""
    check(config)
    items = [(method, point) for method in chosen(config) for point in settings_of(config, method)]
    problem = prepare(config)
    claim(config, FREE)
    print(f"{problem.summary}\n{describe(config)}", flush=True)
    with progress(len(items), config.table, "runs") as advance:
        done = run_all(partial(run_one, config), items, config.jobs, lambda _: None)
        for (method, point), result in done:
            advance(1)
            print_line(f"{method.label} ({point.label(method)})", result)
    return report(config)


def check(config: TargetPropagation) -> None:
    """Raises a ValueError for an option that makes no sense, before anything is read or written."""
    for name in ("seeds", "jobs", "block_lengths", "widths"):
        values = getattr(config, name)
        if np.min(values, initial=1) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {_shown(values)}")
    for name in ("epochs", "steps", "streams", "blocks", "vocabulary", *Settings._fields):
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be finite and not negative, got {value}")
    if config.data is None:
        what = "the file text8" if config.table == "text8" else "ptb.train.txt and its two sisters"
        raise ValueError(f"--table {config.table} needs --data: the folder of {what}")
    check_resume(config)


def _shown(values: Any) -> str:
    return " ".join(map(str, values)) if isinstance(values, tuple) else str(values)


def all_methods(config: TargetPropagation) -> list[Method]:
    """The cells of the table."""
    given = TABLES[config.table]
    widths = config.widths or given.widths[config.scale]
    return given.methods(config.block_lengths or given.block_lengths, widths)


def chosen(config: TargetPropagation) -> list[Method]:
    """Those that --methods names."""
    known = {method.label: method for method in all_methods(config)}
    for label in config.methods:
        if label not in known:
            raise ValueError(f"unknown method {label!r} in --methods: {did_you_mean(label, list(known))}")
    return [known[label] for label in config.methods or known]


def settings_of(config: TargetPropagation, method: Method) -> list[Settings]:
    """The settings to run a method with."""
    if config.grid:
        return list(grid_of(method))
    given = {name: getattr(config, name) for name in Settings._fields if getattr(config, name) is not None}
    return [TABLES[config.table].settings._replace(**given)]


def size_of(config: TargetPropagation) -> Size:
    """The scale's size, with what the options change."""
    given = TABLES[config.table].sizes[config.scale]
    names = ("vocabulary", "streams", "steps", "blocks", "epochs")
    return given._replace(**{name: getattr(config, name) or getattr(given, name) for name in names})


@cache
def corpus_of(config: TargetPropagation) -> words.Corpus:
    """The words, read once a process."""
    assert config.data is not None
    return TABLES[config.table].load(config.data, size_of(config).vocabulary or None)


@cache
def prepare(config: TargetPropagation, width: int = 0) -> Problem:
    """Data and model, once a process and width; 0: that of the size."""
    size, lengths = size_of(config), {method.block_length for method in all_methods(config)}
    unit = math.lcm(*lengths) * (size.blocks or 1)
    model = partial(gru, width=width or size.width)
    return word_problem(corpus_of(config), model, size.streams, size.steps, unit)


def describe(config: TargetPropagation) -> str:
    """The size, beside that of the full scale, and how it is trained."""
    size, full = size_of(config), TABLES[config.table].sizes["full"]
    beside = "" if size == full else f" (full: {_sizes(full)})"
    points = "table 3" if config.grid else str(settings_of(config, Method(1, 1))[0].label(Method(1, 1)))
    windows = ", ".join(
        f"{window_of(prepare(config), size, length)} for B = {length}"
        for length in config.block_lengths or TABLES[config.table].block_lengths
    )
    return (
        f"{_sizes(size)}{beside}\nsteps of an update: {windows}; Adagrad on the parameters and on H, its sums"
        f" of squares begin at 0; {points}"
    )


def _sizes(size: Size) -> str:
    return ", ".join(f"{name} {value or 'all'}" for name, value in zip(Size._fields, size, strict=True))


def folder_of(config: TargetPropagation, item: Item) -> Path:
    """Where a method with its settings is kept."""
    method, point = item
    return config.output / method.label / point.label(method)


def run_one(config: TargetPropagation, item: Item) -> dict[str, Any]:
    """One method with its settings, all seeds."""
    if (result := read_result(folder_of(config, item))) is not None:
        return result
    problem, size = prepare(config, item[0].width), size_of(config)
    return run(problem, TABLES[config.table], *item, size, config.seeds, folder_of(config, item))


def print_line(label: str, result: dict[str, Any]) -> None:
    """A finished run in a line."""
    best = np.exp(np.asarray(result["best"]))
    what = "diverged; " if result["diverged"] else ""
    at = np.asarray(result["epochs"])[np.argmin(np.mean(result["valid"], axis=1))] if result["epochs"] else 0
    print(
        f"{label}: {what}best validation perplexity {' '.join(f'{x:.2f}' for x in best)}, mean best at epoch"
        f" {at:g}; {result['seconds']:.0f} s",
        flush=True,
    )


def report(config: TargetPropagation) -> list[Path]:
    """Table, claims, pictures and JSON of all finished runs of the folder."""
    found = read_results(config)
    results = best_settings(found)
    given = TABLES[config.table]
    print_table(given, results)
    verdicts = claims(given, results)
    said = [["held" if v["held"] else "did not hold", v["claim"], v["rule"]] for v in verdicts]
    print(f"\n{table(['', 'claim', 'rule'], said)}" if said else "", flush=True)
    summary = write_json(config.output / "summary.json", config, runs=finite(found), claims=verdicts)
    return [*pictures(given, results, config.output), summary]


def read_results(config: TargetPropagation) -> list[dict[str, Any]]:
    """The finished runs, in the order of the table."""
    order = {method.label: i for i, method in enumerate(all_methods(config))}
    found = [json.loads(path.read_text()) for path in sorted(config.output.glob("*/*/result.json"))]
    return sorted(found, key=lambda result: order[result["label"]])
