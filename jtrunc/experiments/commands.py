"""The commands, as frozen dataclasses: a field is an option, its docstring the help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jtrunc.experiments import parts
from jtrunc.experiments.adaptive import Adaptive
from jtrunc.experiments.audit import Audit as Audit
from jtrunc.experiments.demo import Demo as Demo
from jtrunc.experiments.influence_balancing import InfluenceBalancing
from jtrunc.experiments.names import describe
from jtrunc.experiments.nobacktrack import NoBackTrack
from jtrunc.experiments.plan import Plan as Plan
from jtrunc.experiments.ptb_characters import PtbCharacters
from jtrunc.experiments.runs import Setup, compare, train
from jtrunc.experiments.target_propagation import TargetPropagation


@dataclass(frozen=True)
class Train(Setup):
    """Train a recurrent network on a stream of tokens with one gradient estimator.

    The folder --output gets the metrics as JSON lines, a picture, a summary as JSON, and checkpoints.
    After Ctrl-C or a crash, the same command with --resume continues the run, exactly.
    """

    estimator: str = "truncated-bptt:length=50"
    """Gradient estimator, with options: online-artbp:mean-length=50,alpha=4 (see `jtrunc list`)."""
    shadows: tuple[str, ...] = ()
    """Estimators that are watched beside it on the same windows; how well they agree is in the metrics."""
    output: Path = Path("runs/train")
    """Folder for the results; it must not exist yet, or be empty, unless --resume is given."""

    def run(self) -> list[Path]:
        return train(self, self.estimator, self.shadows, self.output)


@dataclass(frozen=True)
class Compare(Setup):
    """Train with several gradient estimators on one task: one table and one picture.

    Every estimator gets the same data, initial parameters and (on average) number of time steps, and a folder
    of its own below --output. With --resume, finished runs are kept and the interrupted one goes on.
    """

    estimators: tuple[str, ...] = ("truncated-bptt:length=50", "online-artbp:mean-length=50,alpha=4")
    """Gradient estimators, with options, separated by blanks (see `jtrunc list`)."""
    output: Path = Path("runs/compare")
    """Folder for the results; it must not exist yet, or be empty, unless --resume is given."""

    def run(self) -> list[Path]:
        return compare(self, self.estimators, self.output)


@dataclass(frozen=True)
class Reproduce:
    """Repeat an experiment of a paper."""

    experiment: (
        Annotated[InfluenceBalancing, tyro.conf.subcommand("influence-balancing", prefix_name=False)]
        | Annotated[PtbCharacters, tyro.conf.subcommand("ptb-characters", prefix_name=False)]
        | Annotated[NoBackTrack, tyro.conf.subcommand("nobacktrack", prefix_name=False)]
        | Annotated[Adaptive, tyro.conf.subcommand("adaptive", prefix_name=False)]
        | Annotated[TargetPropagation, tyro.conf.subcommand("target-propagation", prefix_name=False)]
    )

    def run(self) -> list[Path]:
        return self.experiment.run()


@dataclass(frozen=True)
class List:
    """The tasks, cells, estimators and optimisers, with their options and defaults."""

    def run(self) -> list[Path]:
        for title, table in {
            "tasks (--task)": parts.TASKS,
            "cells (--cell)": parts.CELLS,
            "estimators (--estimator, --estimators)": parts.ESTIMATORS,
            "optimisers (--optimizer)": parts.OPTIMIZERS,
        }.items():
            print(f"{title}\n{describe(table)}\n")
        return []
