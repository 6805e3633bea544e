"""What every question of this folder shares: alternated timing, ratios with spreads, tables, JSON.

All contestants of a case live in one process and take turns: in every round each runs once, for at least
50 ms, and the order rotates from round to round, so that a slow phase of the machine hits all of them.
Compilation is timed apart. A ratio is that of the medians; its quartiles are those of the ratios within
rounds.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Clock = Callable[[], float]
"""Seconds since some moment."""

RESULTS = Path(__file__).parents[1] / "results"


class Spread(NamedTuple):
    """A median and its quartiles."""

    median: float
    low: float
    high: float


class Target(NamedTuple):
    """A bound on a ratio."""

    limit: float
    at_least: bool = False

    def verdict(self, value: float) -> str:
        met = value >= self.limit if self.at_least else value <= self.limit
        return "met" if met else "MISSED"


class Program(NamedTuple):
    """A compiled function bound to its arguments.

    Attributes:
      executable: the function.
      calls: the arguments of each call that `run` makes.
      compile_seconds: tracing, lowering and compilation.
      temp_bytes: temporary memory by the program's own analysis.
    """

    executable: Callable[..., Any]
    calls: tuple[tuple[Any, ...], ...]
    compile_seconds: float
    temp_bytes: int

    def run(self) -> list[Any]:
        """Makes the calls; does not wait for the results."""
        return [self.executable(*arguments) for arguments in self.calls]


class Effort(NamedTuple):
    """How long to measure.

    Attributes:
      rounds: rounds of one turn each.
      seconds: the least that a turn takes.
      clock: seconds, of the wall or of this process.
    """

    rounds: int = 9
    seconds: float = 0.05
    clock: Clock = time.perf_counter


QUICK = Effort(rounds=1, seconds=0.0)


def compile_program(function: Callable[..., Any], *args: Any, clock: Clock = time.perf_counter) -> Program:
    """Compile a function for these arguments, which it will be called with."""
    start = clock()
    executable = jax.jit(function).lower(*args).compile()
    seconds = clock() - start
    analysis = executable.memory_analysis()
    return Program(executable, (args,), seconds, analysis.temp_size_in_bytes if analysis else 0)


def bytes_of(tree: Any) -> int:
    """Of all leaves together; a typed key counts as its data."""

    def size(leaf: Any) -> int:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return (jax.random.key_data(leaf) if is_key else leaf).nbytes

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def alternate(runs: Mapping[str, Callable[[], Any]], effort: Effort) -> dict[str, np.ndarray]:
    """Seconds per call of each contestant, one number a round."""
    repetitions = {name: _repetitions(run, effort) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(effort.rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(_seconds_per_call(runs[name], repetitions[name], effort.clock))
    return {name: np.array(values) for name, values in seconds.items()}


def _repetitions(run: Callable[[], Any], effort: Effort) -> int:
    """Enough calls to fill a turn, judged by the fastest of three after a first that warms up."""
    jax.block_until_ready(run())
    fastest = min(_seconds_per_call(run, 1, effort.clock) for _ in range(3))
    return max(1, math.ceil(effort.seconds / max(fastest, 1e-9)))


def _seconds_per_call(run: Callable[[], Any], repetitions: int, clock: Clock) -> float:
    start = clock()
    for _ in range(repetitions):
        result = run()
    jax.block_until_ready(result)
    return (clock() - start) / repetitions


def spread(values: np.ndarray) -> Spread:
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return Spread(median, low, high)


def ratio(seconds: np.ndarray, baseline: np.ndarray) -> Spread:
    """The ratio of the medians, and the quartiles of the ratios within rounds."""
    rounds = spread(seconds / baseline)
    return Spread(float(np.median(seconds) / np.median(baseline)), rounds.low, rounds.high)


def compare(
    case: str,
    programs: Mapping[str, Program],
    baseline: str,
    targets: Mapping[str, Target],
    effort: Effort,
    work: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Time contestants against a baseline: one row of the table each.

    Args:
      case: what the contestants have in common.
      baseline: the name of the contestant that ratios are taken to.
      targets: bounds on ratios; they bind on a CPU only.
      effort: how long to measure; after a quick run nothing is judged.
      work: steps that one call processes, by name; times are then microseconds per step, else
        milliseconds per call.
    """
    if effort == QUICK:
        targets = {}
    seconds = alternate({name: program.run for name, program in programs.items()}, effort)
    unit, scale = ("ms", 1e3) if work is None else ("µs per step", 1e6)
    per_unit = {name: values / (work[name] if work else 1.0) for name, values in seconds.items()}
    rows = []
    for name, program in programs.items():
        against = ratio(per_unit[name], per_unit[baseline])
        row = {"case": case, "contestant": name, unit: Spread(*(scale * v for v in spread(per_unit[name])))}
        row |= {"ratio": None if name == baseline else against}
        row |= judged(against.median, targets.get(name))
        rows.append(row | {"compile s": program.compile_seconds, "rounds": len(seconds[name])})
    return rows


def judged(value: float, target: Target | None) -> dict[str, Any]:
    """The columns `target` and `verdict`; bounds are for the CPU."""
    if target is None or jax.default_backend() != "cpu":
        return {"target": None, "verdict": None}
    sign = "≥" if target.at_least else "≤"
    return {"target": f"{sign} {target.limit:g}", "verdict": target.verdict(value)}


def optional(name: str) -> Any:
    """A peer's package, or None where it is not installed."""
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def not_installed(case: str, contestant: str) -> dict[str, Any]:
    """The row of a peer that is not there."""
    return {"case": case, "contestant": contestant, "ratio": None, "target": None, "verdict": "not installed"}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table; columns in the order in which the rows first name them."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(name)) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, Spread):
        return f"{value.median:.3g} [{value.low:.3g}, {value.high:.3g}]"
    if value is None:
        return "—"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(name: str, question: str | None, measure: Callable[[bool, Effort], list[dict[str, Any]]]) -> None:
    """The command line of a question: measure, print the table, write NAME.json.

    Args:
      question: the module's docstring; its first line heads the table.
      measure: ``(quick, effort) -> rows``; quick asks for tiny sizes.
    """
    options = _parser(question).parse_args()
    _report(name, question, options, measure(options.quick, _effort(options)))


def main_by_case(
    name: str,
    question: str | None,
    cases: Sequence[Any],
    small: Sequence[Any],
    measure: Callable[[Any, Effort], list[dict[str, Any]]],
) -> None:
    """`main` for a question that is asked case by case; ``--only TEXT`` keeps the cases named so.

    Args:
      cases: each with a name, its `str`.
      small: what ``--quick`` measures instead.
      measure: ``(case, effort) -> rows``.
    """
    parser = _parser(question)
    parser.add_argument("--only", default="", metavar="TEXT", help="only the cases whose name contains this")
    options = parser.parse_args()
    chosen = [case for case in (small if options.quick else cases) if options.only in str(case)]
    if not chosen:
        parser.error(f"--only {options.only!r}: no such case among {', '.join(map(str, cases))}")
    rows = [row for case in chosen for row in measure(case, _effort(options))]
    _report(name, question, options, rows)


def _parser(question: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? times mean nothing")
    parser.add_argument("--rounds", type=int, default=Effort().rounds, help="turns of each contestant")
    parser.add_argument(
        "--clock",
        choices=["wall", "process"],
        default="wall",
        help="process: CPU time of this process, for a machine that others use too",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (%(default)s)")
    return parser


def _effort(options: argparse.Namespace) -> Effort:
    clock = time.process_time if options.clock == "process" else time.perf_counter
    return QUICK if options.quick else Effort(rounds=options.rounds, clock=clock)


def _report(
    name: str, question: str | None, options: argparse.Namespace, rows: Sequence[Mapping[str, Any]]
) -> None:
    print(f"\n{(question or name).splitlines()[0]}\n\n{markdown(rows)}\n", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"question": name, "quick": options.quick, "clock": options.clock, **machine()}
    record["rows"] = [{key: _plain(value) for key, value in row.items()} for row in rows]
    path = options.out / f"{name}.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": cores,
        "system": platform.system(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _plain(value: Any) -> Any:
    return value._asdict() if isinstance(value, Spread) else value
