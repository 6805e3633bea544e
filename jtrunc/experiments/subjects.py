"""What an audit and a plan are about: a task, a cell and the estimators that are compared on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jtrunc
from jtrunc import cells
from jtrunc.diagnostics.plan import Make
from jtrunc.experiments.names import Choice, choose
from jtrunc.experiments.parts import CELLS, ESTIMATORS, TASKS, Tokens


@dataclass(frozen=True)
class Subject:
    """A model and estimators of its gradient."""

    task: str = "characters"
    """characters, words, copy, anbn, ... (`jtrunc list` has all), with options: copy:longest=20."""
    data: Path | None = None
    """Text file or folder of text files; without it `characters` reads Python's own library."""
    cell: str = "tanh:width=16"
    """Recurrent cell, with options: lstm:width=256,layers=2 (see `jtrunc list`)."""
    streams: int = 1
    """Parallel streams that share the parameters (the batch)."""
    estimators: tuple[str, ...] = (
        "bptt:window=100",
        "truncated-bptt:length=5",
        "truncated-bptt:length=20",
        "online-artbp:mean-length=10",
        "rtrl",
        "nobacktrack",
        "uoro",
        "snap",
    )
    """Gradient estimators, with options, separated by blanks (see `jtrunc list`)."""
    output: Path = Path("runs/subject")
    """Folder for the results; it must not exist yet, or be empty."""


def read(subject: Subject) -> tuple[Tokens, cells.Model]:
    """The task's data and the model that reads them."""
    if subject.streams < 1:
        raise ValueError(f"--streams must be at least 1, got {subject.streams}")
    task, cell = choose(subject.task, TASKS, "task"), choose(subject.cell, CELLS, "cell")
    tokens = task.make(subject.data, **task.options)
    made = cell.make(tokens.num_classes, **cell.options)
    model = cells.model(made, tokens.num_classes, cells.softmax_cross_entropy)
    print(f"{tokens.summary}\n{cell.label}, {subject.streams} streams", flush=True)
    return tokens, model


def constructors(subject: Subject, system: jtrunc.System) -> dict[str, tuple[Make, int]]:
    """By their notation, ``system -> estimator`` and the steps that its updates are given.

    Estimators that could average over their losses add them up here, like all others.
    """
    choices = [choose(text, ESTIMATORS, "estimator") for text in subject.estimators]
    if len({choice.full_label for choice in choices}) < len(choices) or not choices:
        raise ValueError(
            f"--estimators must be at least one, none twice, got {' '.join(subject.estimators)!r}"
        )
    return {choice.label: (_constructor(choice), _make(choice, system).window) for choice in choices}


def _constructor(choice: Choice) -> Make:
    return lambda system: _make(choice, system).estimator


def _make(choice: Choice, system: jtrunc.System) -> Any:
    sums = {"average": False} if "average" in choice.options else {}
    return choice.make(system, **{**choice.options, **sums})
