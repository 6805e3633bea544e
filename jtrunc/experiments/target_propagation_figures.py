"""Tables, claims and pictures of the target propagation experiments, from the results of their runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jtrunc.experiments.report import table
from jtrunc.experiments.target_propagation_tables import (
    HIDDEN_STEPS,
    PUBLISHED_CHANGES,
    Method,
    Table,
    figure_three,
    table_two,
)
from jtrunc.training.plots import Curve, learning_curves

Result = Mapping[str, Any]
Results = Mapping[Method, Result]
"""By method, the result of its best settings."""


def best_settings(results: Sequence[Result]) -> dict[Method, Result]:
    """The settings of each method with the lowest validation loss, mean over seeds."""
    best: dict[Method, Result] = {}
    for result in results:
        method = Method(**result["method"])
        if method not in best or np.mean(result["best"]) < np.mean(best[method]["best"]):
            best[method] = result
    return best


def perplexities(result: Result) -> np.ndarray:
    """The best on the validation data, of each seed."""
    return np.exp(np.asarray(result["best"], float))


def print_table(given: Table, results: Results) -> None:
    """What the paper has, ours beside it: mean (standard deviation over seeds)."""
    print("\nBest validation perplexity of all epochs, mean (standard deviation over seeds)")
    if given.methods is table_two:
        print(_table_two(results), flush=True)
    elif given.methods is figure_three:
        print(_figure_three(results), flush=True)
    else:
        print(_table_one(given, results), flush=True)


def _rows_and_columns(results: Results) -> tuple[list[int | None], list[int], list[int]]:
    """Steps on H, None for BPTT at the end; block lengths; widths."""
    steps = sorted({m.hidden_steps for m in results}, key=lambda s: np.inf if s is None else s)
    return steps, sorted({m.block_length for m in results}), sorted({m.width for m in results})


def row_label(hidden_steps: int | None) -> str:
    """As in the paper."""
    return "BPTT (K = B)" if hidden_steps is None else f"H-steps = {hidden_steps}"


def _table_one(given: Table, results: Results) -> str:
    steps, lengths, widths = _rows_and_columns(results)
    header, rows = [""], []
    for length in lengths:
        header += [f"B = {length}", "paper"]
    for width in widths:
        for number in steps:
            row = [f"{row_label(number)}{f', width {width}' if width else ''}"]
            for length in lengths:
                method = Method(length, number, width=width)
                paper = _published(given, method)
                row += [_cell(results, method), "" if paper is None else f"{paper:.2f}"]
            rows.append(row)
    return table(header, rows)


def _published(given: Table, method: Method) -> float | None:
    """The paper's number, whatever the width here."""
    return given.published.get(method._replace(width=0).label)


def _table_two(results: Results) -> str:
    rows = []
    for method, result in results.items():
        base = results.get(method._replace(hidden_steps=1, penalized=True))
        change, paper = "", ""
        if method.hidden_steps == 0 and base is not None:
            change = _mean_std(perplexities(result) - perplexities(base), sign="+")
            paper = f"{PUBLISHED_CHANGES[method.penalized]:+.2f}"
        rows.append([method.label, _mean_std(perplexities(result)), change, paper])
    return table(["", "perplexity", "change by no step", "paper"], rows)


def _figure_three(results: Results) -> str:
    steps, lengths, widths = _rows_and_columns(results)
    columns = [(length, number) for length in lengths for number in steps]
    header = ["units", *(f"B = {length}, {row_label(number)}" for length, number in columns)]
    rows = [
        [width, *(_cell(results, Method(length, number, width=width)) for length, number in columns)]
        for width in widths
    ]
    return table(header, rows)


def _cell(results: Results, method: Method) -> str:
    return _mean_std(perplexities(results[method])) if method in results else ""


def _mean_std(values: np.ndarray, sign: str = "") -> str:
    spread = f" ({values.std(ddof=1):.2f})" if len(values) > 1 and np.isfinite(values).all() else ""
    return f"{values.mean():{sign}.2f}{spread}"


def claims(given: Table, results: Results) -> list[dict[str, Any]]:
    """What the paper says of its table, and whether it held here; only what the runs at hand can tell."""
    means = {method: float(perplexities(result).mean()) for method, result in results.items()}
    if given.methods is table_two:
        return _claims_two(means)
    return _claims_three(means) if given.methods is figure_three else _claims_one(means)


def _claim(
    claim: str, left: float, right: float, what: str = "perplexity", strictly: bool = False
) -> dict[str, Any]:
    """Held if left ≤ right, or < where that is asked for, to the two decimals that are shown."""
    left, right = round(left, 2), round(right, 2)
    rule = f"{what}: {left:.2f} {'<' if strictly else '≤'} {right:.2f}"
    return {"claim": claim, "rule": rule, "held": left < right if strictly else left <= right}


def _claims_one(means: Mapping[Method, float]) -> list[dict[str, Any]]:
    found = []
    for bptt in (method for method in means if method.hidden_steps is None):
        one, *more = (bptt._replace(hidden_steps=number) for number in HIDDEN_STEPS)
        if one in means:
            name = f"BPTT is at least as good as target propagation, B = {bptt.block_length}"
            tried = [means[m] for m in (one, *more) if m in means]
            found.append(_claim(name, means[bptt], min(tried)))
        for other in more:
            if one in means and other in means:
                name = f"{other.hidden_steps} steps on H are no better than one, B = {bptt.block_length}"
                found.append(_claim(name, means[one], means[other]))
    return found


def _claims_two(means: Mapping[Method, float]) -> list[dict[str, Any]]:
    found = []
    for base in (method for method in means if method.hidden_steps == 1):
        none, free = base._replace(hidden_steps=0), base._replace(hidden_steps=0, penalized=False)
        if none in means:
            name = f"no step on H is better than one, B = {base.block_length} ({base.initial})"
            found.append(_claim(name, means[none], means[base]))
        # From the forward states λ cannot matter (errata 26): there is nothing to claim.
        if none in means and free in means and base.initial != "forward":
            name = f"λ = 0 is worse than λ > 0, B = {base.block_length} ({base.initial})"
            found.append(_claim(name, means[none], means[free], strictly=True))
    return found


def _claims_three(means: Mapping[Method, float]) -> list[dict[str, Any]]:
    found = []
    for length in sorted({method.block_length for method in means}):
        for number in sorted({m.hidden_steps for m in means if m.hidden_steps is not None}):
            trained = [m for m in means if (m.block_length, m.hidden_steps) == (length, number)]
            bptt = {m.width: means.get(m._replace(hidden_steps=None)) for m in trained}
            gaps = {m.width: means[m] / base - 1 for m in trained if (base := bptt[m.width])}
            if len(gaps) < 2:
                continue
            least, most = gaps[min(gaps)], gaps[max(gaps)]
            name = f"B = {length}, {number} steps on H"
            what = "excess over BPTT, %"
            found.append(_claim(f"{name}: better than BPTT with {min(gaps)} units", 100 * least, 0.0, what))
            found.append(_claim(f"{name}: BPTT gains with the units", 100 * least, 100 * most, what))
    return found


def pictures(given: Table, results: Results, folder: Path) -> list[Path]:
    """Validation curves of all methods, and the paper's figure."""
    curves = {
        method.label: Curve(result["epochs"], result["valid"])
        for method, result in results.items()
        if result["epochs"]
    }
    found = [
        learning_curves(
            curves,
            folder / "curves.png",
            x_label="epochs",
            y_label="validation loss (nats a word)",
            title=given.title,
        )
    ]
    if given.methods is figure_three:
        return [picture_of_widths(given, results, folder / "hidden_size.png"), *found]
    if given.methods is table_two:
        return found
    return [picture_of_steps(given, results, folder / "hidden_steps.png"), *found]


def picture_of_steps(given: Table, results: Results, path: Path) -> Path:
    """Perplexity against steps on H for each B, BPTT dashed; ours on the left, the paper's on the right."""
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    ours, theirs = figure.subplots(1, 2)
    steps, lengths, widths = _rows_and_columns(results)
    numbers = [number for number in steps if number is not None]
    for i, length in enumerate(lengths):
        shown = [m for m in results if (m.block_length, m.width) == (length, widths[0])]
        found = {m: perplexities(results[m]) for m in shown}
        paper = {m: np.array([value]) for m in found if (value := _published(given, m)) is not None}
        for axes, values in ((ours, found), (theirs, paper)):
            by_steps = {m.hidden_steps: v for m, v in values.items()}
            _steps_of(axes, numbers, by_steps, f"C{i}", f"B = {length}")
    for axes, title in ((ours, "here"), (theirs, "the paper")):
        axes.set(title=title, xlabel="steps on H", ylabel="validation perplexity", xticks=range(len(numbers)))
        axes.set_xticklabels([str(number) for number in numbers])
        axes.grid(True, linewidth=0.3, alpha=0.5)
    ours.legend(fontsize="small", title="dashed: BPTT, K = B")
    figure.suptitle(given.title)
    figure.savefig(path, dpi=150)
    return path


def _steps_of(
    axes: Axes, numbers: list[int], values: Mapping[int | None, np.ndarray], color: str, label: str
) -> None:
    """One B: every seed a dash, their mean a line; x is the position in `numbers`."""
    known = [(x, values[number]) for x, number in enumerate(numbers) if number in values]
    means = [of_seeds.mean() for _, of_seeds in known]
    axes.plot([x for x, _ in known], means, "o-", color=color, label=label, linewidth=1.3, markersize=4)
    for x, of_seeds in known:
        if len(of_seeds) > 1:
            axes.plot(np.full(len(of_seeds), x), of_seeds, "_", color=color, markersize=9)
    if None in values:
        axes.axhline(values[None].mean(), color=color, linestyle="--", linewidth=1.1)


def picture_of_widths(given: Table, results: Results, path: Path) -> Path:
    """Perplexity against units, and the excess over BPTT."""
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, lengths, widths = _rows_and_columns(results)
    for i, length in enumerate(lengths):
        bptt = {w: results.get(Method(length, None, width=w)) for w in widths}
        for j, number in enumerate(steps):
            rows = [(w, results.get(Method(length, number, width=w))) for w in widths]
            rows = [(w, r) for w, r in rows if r is not None]
            style: dict[str, Any] = {"color": f"C{j}", "marker": "os"[i % 2], "markersize": 4}
            style |= {"linestyle": "--" if number is None else "-", "linewidth": 1.3}
            name = f"BPTT, K = {length}" if number is None else f"B = {length}, {number} steps on H"
            left.plot([w for w, _ in rows], [perplexities(r).mean() for _, r in rows], label=name, **style)
            for w, r in rows:
                left.plot(np.full(len(r["best"]), w), perplexities(r), "_", color=f"C{j}", markersize=9)
            pairs = [(w, perplexities(r) / perplexities(base)) for w, r in rows if (base := bptt[w])]
            right.plot([w for w, _ in pairs], [100 * (ratio.mean() - 1) for _, ratio in pairs], **style)
    left.set(ylabel="validation perplexity")
    right.set(ylabel="excess over BPTT, %")
    for axes in (left, right):
        axes.set(xlabel="units of the GRU", xscale="log", xticks=widths)
        axes.set_xticklabels([str(width) for width in widths])
        axes.minorticks_off()
        axes.grid(True, linewidth=0.3, alpha=0.5)
    left.legend(fontsize="small")
    figure.suptitle(given.title)
    figure.savefig(path, dpi=150)
    return path
