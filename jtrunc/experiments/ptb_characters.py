"""Figure 4 of the ARTBP paper: character-level Penn Treebank, truncated BPTT against ARTBP.

Source: "Unbiasing truncated backpropagation through time" (2017), section 6.1. The paper gives neither the
width of its LSTM nor the length of training: 1000 units as in Cooijmans et al. (2016), to which it compares
itself, and 20 passes over the training text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from matplotlib.figure import Figure

from jtrunc.experiments.names import choose
from jtrunc.experiments.parts import ESTIMATORS
from jtrunc.experiments.runs import Run, Setup, claim, one_run, problem, report

PUBLISHED = {"truncated BPTT": 1.43, "ARTBP": 1.40}
"""Test bits per character in the paper."""


RUNS = {"truncated": "truncated-bptt:length=50", "artbp": "online-artbp:mean-length=50,alpha=4"}


class Scale(NamedTuple):
    """What differs between the full experiment and the one for a CPU."""

    width: int
    seeds: int
    steps: int
    learning_rate: float
    evaluate_every: int


SCALES = {
    "full": Scale(width=1000, seeds=6, steps=1_580_000, learning_rate=1e-4, evaluate_every=79_000),
    "small": Scale(width=128, seeds=2, steps=78_000, learning_rate=2e-3, evaluate_every=13_000),
}
"""Steps are those of each of the 64 streams; 79,000 are one pass over the training text."""


@dataclass(frozen=True)
class PtbCharacters:
    """Character-level Penn Treebank, windows of 50 against ARTBP: figure 4 of the ARTBP paper.

    LSTM with forget bias 2, 64 streams, Adam, truncated BPTT with L=50 beside ARTBP with L0=50, alpha=4.
    `--scale full` is the paper's experiment and wants a GPU; `--scale small` runs on a CPU and prints what
    is smaller. Writes bits per character against updates and against characters.
    """

    data: Annotated[Path, tyro.conf.Positional]
    """Folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt (Mikolov's split)."""
    scale: Literal["small", "full"] = "small"
    """Which configuration to run."""
    output: Path = Path("runs/ptb-characters")
    """Folder for the results; it must not exist yet, or be empty, unless --resume is given."""
    resume: bool = False
    """Go on with the runs in --output."""

    def run(self) -> list[Path]:
        return reproduce(self)


def reproduce(config: PtbCharacters) -> list[Path]:
    """Runs both estimators, prints tables, writes pictures and JSON; returns their paths."""
    scale = SCALES[config.scale]
    setup = Setup(
        task="penn-treebank",
        data=config.data,
        cell=f"lstm:width={scale.width},forget-bias=2",
        learning_rate=scale.learning_rate,
        streams=64,
        seeds=scale.seeds,
        steps=scale.steps,
        evaluate_every=scale.evaluate_every,
        resume=config.resume,
    )
    given = problem(setup)
    claim(config.resume, config.output)
    print(differences(scale), flush=True)
    runs = []
    for name, text in RUNS.items():
        chosen = choose(text, ESTIMATORS, "estimator")
        runs.append(one_run(setup, given, chosen, config.output / name, ("train", "valid", "test")))
    paths = report(runs, setup, config.output)
    print(f"The paper's test bits per character: {PUBLISHED}")
    return [picture(runs, setup.streams, config.output / "ptb_characters.png"), *paths]


def differences(scale: Scale) -> str:
    """What this configuration changes against the full one, line by line."""
    pairs = zip(Scale._fields, scale, SCALES["full"], strict=True)
    lines = [f"  {name}: {here:,} instead of {full:,}" for name, here, full in pairs if here != full]
    return "\n".join(["Other than in the full experiment:", *lines]) if lines else "The full experiment."


def picture(runs: list[Run], streams: int, path: Path) -> Path:
    """Bits per character of the three parts against updates and against characters, every seed a line."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 3, sharey=True)
    for column, part in enumerate(("train", "valid", "test")):
        for i, run in enumerate(runs):
            found = run.result.evaluations[part]
            style: dict[str, Any] = {"color": f"C{i}", "marker": "os"[i], "markersize": 3, "linewidth": 0.8}
            for seed in range(found["bits"].shape[1]):
                label = None if seed else run.label
                axes[0, column].plot(found["update"], found["bits"][:, seed], label=label, **style)
                axes[1, column].plot(run.timesteps * streams, found["bits"][:, seed], **style)
        axes[0, column].set(title=part, xlabel="updates")
        axes[1, column].set(xlabel="characters read")
    axes[0, 0].set(ylabel="bits per character")
    axes[1, 0].set(ylabel="bits per character")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
    return path
