"""The demonstration: the first paper's figure, then a small language model."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from jtrunc.experiments.influence_balancing import InfluenceBalancing
from jtrunc.experiments.runs import Setup, compare


@dataclass(frozen=True)
class Demo:
    """Two minutes: influence balancing in full, then truncated BPTT beside ARTBP on a real text."""

    output: Path = Path("runs/demo")
    """Folder for the results; where it is taken, a number is added."""

    def run(self) -> list[Path]:
        folder = unused(self.output)
        print("1. Influence balancing (figure 3 of the ARTBP paper)", flush=True)
        first = InfluenceBalancing(output=folder / "influence-balancing").run()
        print("\n2. A character LSTM on the source text of Python's standard library", flush=True)
        setup = Setup(
            task="characters:max-characters=1000000",
            cell="lstm:width=128,forget-bias=1",
            learning_rate=4e-3,
            steps=30_000,
            evaluate_every=6_000,
        )
        estimators = ("truncated-bptt:length=20", "online-artbp:mean-length=20,alpha=4")
        second = compare(setup, estimators, folder / "characters")
        print("\nPictures and results:")
        return [*first, *second]


def unused(path: Path) -> Path:
    """The path, or the first of path-2, path-3, ... that does not exist."""
    names = itertools.chain([path], (path.with_name(f"{path.name}-{i}") for i in itertools.count(2)))
    return next(name for name in names if not name.exists())
