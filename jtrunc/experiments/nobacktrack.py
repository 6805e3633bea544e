"""Figures 1 to 6 of the NoBackTrack paper: low-rank influence against RTRL and truncated BPTT, online.

Source: Ollivier, Tallec & Charpiat, "Training recurrent networks online without backtracking" (2015),
section 2. What it leaves open is settled in `nobacktrack_runs`; its claims are in `nobacktrack_figures`.

The paper gives every algorithm the same *time*. Here each reads the same number of characters, against which
the left panel is drawn; the right one is drawn against the seconds of one run on the machine at hand. A dot
marks what an algorithm had reached when rank-one NoBackTrack was done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from jtrunc.experiments.nobacktrack_figures import FIGURES, Figure
from jtrunc.experiments.nobacktrack_runs import (
    FIRST_POINT,
    Curve,
    Text,
    compile_program,
    finite_or_inf,
    measure,
    run,
)
from jtrunc.experiments.report import fresh_folder, table, write_json

QUANTILES = (0.1, 0.5, 0.9)
QUICK_STEPS = 3000


@dataclass(frozen=True)
class NoBackTrack:
    """Figures 1 to 6 of the NoBackTrack paper: 20 units that predict characters, one update a character.

    1 and 2: Euclidean NoBackTrack and RTRL on music, at 1/√t and 0.03/√t. 3: their Kalman versions.
    4: Kalman NoBackTrack, RTRL and truncated BPTT on music. 5: on aⁿbⁿ, with a leaky network. 6: on
    Shakespeare. Writes a picture, all numbers as JSON, and what became of each claim of the paper.
    """

    figure: Literal[1, 2, 3, 4, 5, 6] = 5
    """Which figure."""
    output: Path | None = None
    """Folder for the results; it must not exist yet, or be empty. Default: runs/nobacktrack-figure-N."""
    steps: int = 0
    """Characters of each run; 0: 4 million in figure 5 (ten minutes), a million in 2 and 6, else 300,000."""
    seeds: int = 5
    """Runs of each algorithm, with seeds 0, 1, ...: initial weights, signs, feedback."""
    data: Path | None = None
    """Text file or folder for figure 6; without it Python's own library stands in for Shakespeare."""
    quick: bool = False
    """See in seconds that all works: 3000 characters, one seed, short files; too little for any claim."""

    def run(self) -> list[Path]:
        return reproduce(self)


def reproduce(config: NoBackTrack) -> list[Path]:
    """Runs one figure, prints its tables, writes PNG and JSON; returns their paths."""
    figure, name = FIGURES[config.figure], f"nobacktrack-figure-{config.figure}"
    steps = config.steps or (QUICK_STEPS if config.quick else figure.steps)
    if steps < 10 * FIRST_POINT:
        raise ValueError(f"--steps must be at least {10 * FIRST_POINT}, or 0 for the default, got {steps}")
    if config.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {config.seeds}")
    text = figure.text(config.data, config.quick)
    folder = fresh_folder(config.output or Path("runs") / name)
    levels = ", ".join(f"{label} {level:.4f}" for label, level in text.levels.items())
    print(f"Figure {config.figure}: {text.name}, a file of {len(text.tokens):,} characters, read in a circle")
    print(f"Bits a character: {levels}", flush=True)
    curves = all_runs(figure, text, steps, 1 if config.quick else config.seeds)
    verdicts = report(figure, text, curves)
    records = {label: _record(curve) for label, curve in curves.items()}
    result = write_json(
        folder / f"{name}.json",
        config,
        text=text.name,
        levels=dict(text.levels),
        runs=records,
        claims=verdicts,
    )
    return [picture(figure, text, curves, folder / f"{name}.png"), result]


def all_runs(figure: Figure, text: Text, steps: int, seeds: int) -> dict[str, Curve]:
    """First the time of one run of each algorithm, in alternation, then all seeds of one after the other."""
    alone = {method.label: compile_program(method, text, [0]) for method in figure.methods}
    microseconds = measure(alone)
    curves = {}
    for method in figure.methods:
        program = compile_program(method, text, range(seeds)) if seeds > 1 else alone[method.label]
        curves[method.label] = run(program, method.label, steps, microseconds[method.label])
    return curves


def equal_time(curves: dict[str, Curve]) -> float:
    """Seconds that the first method of a figure, rank-one NoBackTrack, needs for its characters."""
    first = next(iter(curves.values()))
    return float(_seconds(first)[-1])


def _seconds(curve: Curve) -> np.ndarray:
    return curve.characters * curve.microseconds * 1e-6


def report(figure: Figure, text: Text, curves: dict[str, Curve]) -> list[dict[str, Any]]:
    """Prints the numbers and the claims; returns the claims with their verdicts."""
    seconds, rows = equal_time(curves), []
    for label, curve in curves.items():
        low, middle, high = np.quantile(curve.final, QUANTILES, method="nearest")
        then = curve.median_at(min(curve.characters[-1], seconds / curve.microseconds * 1e6))
        mean = np.median(finite_or_inf(curve.cumulative[-1]))
        lost = f"{np.isinf(curve.final).sum()}/{len(curve.final)}"
        numbers = [float(x) for x in (middle, low, high, mean, then, curve.microseconds)]
        rows.append([label, *numbers, lost])
    header = ["algorithm", "final", "10 %", "90 %", "whole run", "equal time", "µs/character", "not finite"]
    print(
        f"\nBits a character (medians over seeds), {next(iter(curves.values())).characters[-1]:,} characters."
    )
    print("Final: last tenth of the run. Equal time: when the first algorithm of the table was done.")
    print(table(header, rows))
    verdicts = [
        {"claim": claim.text, "rule": claim.rule, "held": claim.holds(curves, text.levels)}
        for claim in figure.claims
    ]
    words = [["held" if v["held"] else "did not hold", v["claim"], v["rule"]] for v in verdicts]
    print(f"\n{table(['', 'claim of the paper', 'rule'], words)}", flush=True)
    return verdicts


def _record(curve: Curve) -> dict[str, Any]:
    def plain(array: np.ndarray) -> Any:
        return [plain(row) if np.ndim(row) else float(row) if np.isfinite(row) else None for row in array]

    return {
        "characters": curve.characters.tolist(),
        "bits_since_last_point": plain(curve.bits),
        "bits_since_start": plain(curve.cumulative),
        "final_bits": plain(curve.final),
        "microseconds_per_character": curve.microseconds,
    }


def picture(figure: Figure, text: Text, curves: dict[str, Curve], path: Path) -> Path:
    """Bits a character since the point before, against characters and against seconds, all logarithmic.

    The paper calls its axis the average log-loss. Its curves rise again within a few characters, which an
    average since the start cannot do on a logarithmic axis; so the average here is a running one.
    """
    canvas = Picture(figsize=(12, 5.6), layout="constrained")
    panels = canvas.subplots(1, 2, sharey=True)
    seconds = equal_time(curves)
    for i, curve in enumerate(curves.values()):
        low, middle, high = np.quantile(finite_or_inf(curve.bits), QUANTILES, axis=1, method="nearest")
        reached = min(curve.characters[-1], seconds / curve.microseconds * 1e6)
        for axes, x, dot in (
            (panels[0], curve.characters, reached),
            (panels[1], _seconds(curve), reached * curve.microseconds * 1e-6),
        ):
            axes.loglog(x, middle, color=f"C{i}", linewidth=1.4, label=curve.label)
            axes.fill_between(x, low, np.minimum(high, 1e3), color=f"C{i}", alpha=0.12, linewidth=0)
            axes.plot(dot, curve.median_at(reached), "o", color=f"C{i}", markersize=5)
    for axes, label in zip(panels, ("characters read", "seconds of one run"), strict=True):
        _dress(axes, text)
        axes.set(xlabel=label)
    panels[1].axvline(seconds, color="0.7", linewidth=0.8)
    panels[0].set(ylabel="bits a character", ylim=_limits(text, curves))
    handles, labels = panels[0].get_legend_handles_labels()
    canvas.legend(handles, labels, fontsize="small", loc="outside lower center", ncols=5)
    canvas.suptitle(f"{figure.title}: {text.name}")
    canvas.savefig(path, dpi=150)
    return path


def _dress(axes: Axes, text: Text) -> None:
    for (label, level), style in zip(text.levels.items(), ("-", "--", "-.", ":"), strict=False):
        axes.axhline(level, color="0.3", linestyle=style, linewidth=0.9, label=label)
    axes.grid(True, which="both", axis="y", linewidth=0.3, alpha=0.5)
    axes.grid(True, which="major", axis="x", linewidth=0.3, alpha=0.5)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())


def _limits(text: Text, curves: dict[str, Curve]) -> tuple[float, float]:
    """From below the source to a little above what ignorance costs; what is worse leaves the frame."""
    highest = max(np.max(curve.bits, where=np.isfinite(curve.bits), initial=0) for curve in curves.values())
    lowest = min(text.levels.values())
    return 0.8 * lowest, min(1.1 * math.log2(text.num_symbols), 1.05 * float(highest))
