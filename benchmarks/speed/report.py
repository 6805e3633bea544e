"""All answers in one place: report.md with every target, verdict and floor, and targets.png.

Reads the JSON that the questions wrote: python benchmarks/speed/report.py [--out FOLDER].
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness import RESULTS, Spread, markdown
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from run_all import QUESTIONS

FLOORS = ("GEMM floor", "D·J", "trace alone", "products alone")
"""Contestants that do less than the work: what the hardware needs for it at the least."""

JUDGED = {"target": ("ratio", "share of an epoch", "compile s"), "memory target": ("share of memory",)}
"""For each column of targets, the columns where what it judges may stand, the first that is filled."""


COLOURS = {"met": "tab:blue", "MISSED": "tab:red"}


class Finding(NamedTuple):
    """One target.

    Attributes:
      value: what was measured, with quartiles where there were rounds.
      target: as in "≤ 0.8".
      floor: the ratio of the hardware's floor in the same case, or None.
    """

    question: str
    case: str
    contestant: str
    value: Spread
    target: str
    verdict: str
    floor: float | None

    @property
    def limit(self) -> float:
        return float(self.target.split()[1])

    def share(self, value: float) -> float:
        """A value beside the target: 1 at it, less where it is met with room."""
        return self.limit / value if self.target.startswith("≥") else value / self.limit


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder, in the order in which the questions are asked."""
    paths = [folder / f"{question}.json" for question in QUESTIONS]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def findings(record: Mapping[str, Any]) -> list[Finding]:
    """Every target of a question, in the order of its rows."""
    rows = record["rows"]
    found = []
    for row in rows:
        for column, places in JUDGED.items():
            if row.get(column) is None:
                continue
            value = next(row[place] for place in places if row.get(place) is not None)
            verdict = row[column.replace("target", "verdict")]
            floor = floor_of(rows, row["case"]) if column == "target" and row.get("ratio") else None
            name = f"{row['contestant']} (memory)" if column != "target" else row["contestant"]
            found.append(
                Finding(record["question"], row["case"], name, as_spread(value), row[column], verdict, floor)
            )
    return found


def floor_of(rows: Sequence[Mapping[str, Any]], case: str) -> float | None:
    """The ratio of the case's floor, which is 1 where it is the baseline."""
    floors = (row for row in rows if row.get("case") == case and row.get("contestant") in FLOORS)
    row = next(floors, None)
    return None if row is None else as_spread(row["ratio"] or 1.0).median


def as_spread(value: Any) -> Spread:
    return Spread(**value) if isinstance(value, dict) else Spread(value, value, value)


def table(found: Sequence[Finding]) -> str:
    """One row a target: share is 1 at the target and less where it is met."""
    rows = [
        finding._asdict() | {"floor": finding.floor, "share": finding.share(finding.value.median)}
        for finding in found
    ]
    return markdown(rows)


def absent(record: Mapping[str, Any]) -> list[str]:
    """Peers that were not installed."""
    rows = (row for row in record["rows"] if row.get("verdict") == "not installed")
    return [f"{record['question']}: {row['contestant']} ({row['case']}) was not installed" for row in rows]


def report(records: Sequence[Mapping[str, Any]]) -> str:
    """The whole Markdown: where the numbers come from, all targets, then every question's own table."""
    found = [finding for record in records for finding in findings(record)]
    missed = sum(finding.verdict != "met" for finding in found)
    machines = dict.fromkeys(
        f"{record['processor']} ({record['device']}), jax {record['jax']}, {record['cores']} core(s), "
        f"{record['clock']} clock{', quick sizes: times mean nothing' if record['quick'] else ''}"
        for record in records
    )
    lines = ["# Speed", "", *(f"- {machine}" for machine in machines)]
    lines += [
        "",
        f"{len(found)} targets, {missed} missed. A floor is what the case's bare products or passes take,",
    ]
    lines += ["by the same measure; share is measured / target, more than 1 where it is missed.", ""]
    lines += ["![targets](targets.png)", "", table(found) if found else "No target was judged.", ""]
    lines += [f"- {line}" for record in records for line in absent(record)]
    for record in records:
        spreads = [{key: _spread_or(value) for key, value in row.items()} for row in record["rows"]]
        lines += ["", f"## {record['question']}", "", markdown(spreads)]
    return "\n".join(lines) + "\n"


def _spread_or(value: Any) -> Any:
    return Spread(**value) if isinstance(value, dict) else value


def picture(found: Sequence[Finding]) -> Figure:
    """Every measured value as a share of its target: left of the line is met; floors as open diamonds."""
    half = (len(found) + 1) // 2
    columns = [found[:half], found[half:]] if len(found) > 24 else [found]
    height = 1.4 + 0.21 * max(len(column) for column in columns)
    figure = Figure(figsize=(9.5 * len(columns), height), layout="constrained")
    missed = sum(finding.verdict != "met" for finding in found)
    figure.suptitle(f"What is asked of jtrunc's speed and memory: {len(found)} targets, {missed} missed")
    shares = [f.share(value) for f in found for value in (f.value.median, f.floor) if value is not None]
    limits = min([*shares, 0.5]) / 1.3, max([*shares, 1.0]) * 1.3
    ticks = [tick for tick in (0.01, 0.03, 0.1, 0.3, 1, 3, 10) if limits[0] < tick < limits[1]]
    for place, column in enumerate(columns, start=1):
        axes = figure.add_subplot(1, len(columns), place)
        _draw(axes, column)
        axes.set_xlim(limits)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    return figure


def _draw(axes: Axes, found: Sequence[Finding]) -> None:
    shares = [finding.share(finding.value.median) for finding in found]
    axes.axvspan(1, 1e9, color="tab:red", alpha=0.06, linewidth=0)
    axes.axvline(1, color="black", linewidth=1, label="target")
    for verdict, colour in COLOURS.items():
        rows = [row for row, finding in enumerate(found) if finding.verdict == verdict]
        for row in rows:
            value = found[row].value
            ends = [found[row].share(value.low), found[row].share(value.high)]
            axes.plot(ends, [row, row], color=colour, linewidth=2)
        axes.plot([shares[row] for row in rows], rows, "o", color=colour, markersize=4, label=verdict.lower())
    floors = {row: f.share(f.floor) for row, f in enumerate(found) if f.floor is not None}
    axes.plot(
        [*floors.values()], [*floors], "D", color="black", fillstyle="none", markersize=5, label="floor"
    )
    axes.set_xscale("log")
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlabel("measured / target (left of the line: met)")
    rows = range(len(found))
    axes.set_yticks(rows, [f"{f.question}: {f.case}: {f.contestant}" for f in found], fontsize=7)
    values = axes.secondary_yaxis("right")
    values.set_yticks(rows, [f"{f.value.median:.3g} ({f.target})" for f in found], fontsize=7)
    for row in range(1, len(found)):
        if found[row].question != found[row - 1].question:
            axes.axhline(row - 0.5, color="grey", linewidth=0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="best", fontsize=7)


def write(folder: Path) -> tuple[Path, Path]:
    """Writes report.md and targets.png beside the JSON files."""
    records = read(folder)
    if not records:
        raise ValueError(f"{folder} has no results: run the questions first, or name their folder with --out")
    text, image = folder / "report.md", folder / "targets.png"
    text.write_text(report(records), encoding="utf-8")
    picture([finding for record in records for finding in findings(record)]).savefig(image, dpi=110)
    return text, image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder with the JSON (%(default)s)")
    options, _ = parser.parse_known_args()  # run_all.py hands on the options of the questions
    for path in write(options.out):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
