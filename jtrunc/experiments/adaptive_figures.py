"""Table, claims and pictures of the adaptive truncation experiments, from the results of their runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jtrunc.experiments.adaptive_tasks import Experiment
from jtrunc.experiments.report import table

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""By label of the method, the results of its seeds."""

FAILED = 1.2
"""A method has failed if its best score is beyond this multiple of the target."""


def scores(experiment: Experiment, nats: Any) -> np.ndarray:
    """Perplexities, or nats, as the paper's table has them."""
    return np.exp(np.asarray(nats, float)) if experiment.perplexity else np.asarray(nats, float)


def final(experiment: Experiment, runs: Sequence[Mapping[str, Any]], part: str) -> np.ndarray:
    """The score of each seed at its best validation parameters."""
    return scores(experiment, [run[part] for run in runs])


def column(run: Mapping[str, Any], name: str) -> np.ndarray:
    """A number of every epoch of a run."""
    return np.asarray([line[name] for line in run["epochs"]], float)


def median_over_seeds(runs: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """A number of every epoch, the median over seeds; a run that ended early keeps its last."""
    columns = [column(run, name) for run in runs]
    longest = max(len(values) for values in columns)
    return np.median([np.pad(values, (0, longest - len(values)), "edge") for values in columns], axis=0)


def data_until(experiment: Experiment, runs: Sequence[Mapping[str, Any]], level: float) -> float:
    """Epochs of data until the best validation score is at most a level, medians over seeds; or inf.

    >>> lines = [{"data_epochs": 1.0, "best_valid": 2.0}, {"data_epochs": 2.0, "best_valid": 0.5}]
    >>> data_until(_NATS, [{"epochs": lines}], 1.0), data_until(_NATS, [{"epochs": lines}], 0.1)
    (2.0, inf)
    """
    reached = scores(experiment, median_over_seeds(runs, "best_valid")) <= level
    return float(median_over_seeds(runs, "data_epochs")[reached.argmax()]) if reached.any() else math.inf


def print_table(experiment: Experiment, results: Results) -> None:
    """Scores at the best validation parameters beside the paper's, mean (standard deviation over seeds)."""
    kind = "PPL" if experiment.perplexity else "NLL"
    names = list(next(iter(results.values()))[0].get("measures", {}))
    header = ["method", f"valid {kind}", "paper", f"test {kind}", "paper"]
    header += [title for name in names for title in (name, "paper")]
    if experiment.target is not None:
        header.append(f"epochs to {experiment.target}")
    rows = []
    for label, runs in results.items():
        ours = [_mean_std(final(experiment, runs, part)) for part in ("valid", "test")]
        ours += [_mean_std([run["measures"][name] for run in runs]) for name in names]
        theirs = experiment.published.get(label, ("",) * len(ours))
        pairs = [cell for pair in zip(ours, theirs, strict=True) for cell in pair]
        reached = [] if experiment.target is None else [data_until(experiment, runs, experiment.target)]
        rows.append([label, *pairs, *reached, _last_lengths(runs), len(runs), _minutes(runs)])
    print("\nAt the best validation parameters, mean (standard deviation over seeds); epochs count the data")
    print("that estimates read, their median over seeds; K: mean of the last epoch")
    print(table([*header, "K", "seeds", "minutes"], rows), flush=True)


def _last_lengths(runs: Sequence[Mapping[str, Any]]) -> float:
    return float(np.mean([run["epochs"][-1]["mean_length"] for run in runs]))


def _minutes(runs: Sequence[Mapping[str, Any]]) -> float:
    return float(np.mean([run["epochs"][-1]["processor_seconds"] for run in runs])) / 60


def _mean_std(values: Any) -> str:
    values = np.asarray(values, float)
    spread = f" ({values.std(ddof=1):.3f})" if len(values) > 1 and np.isfinite(values).all() else ""
    return f"{values.mean():.3f}{spread}"


def claims(experiment: Experiment, results: Results) -> list[dict[str, Any]]:
    """What the paper says of its figure, and whether it held here; only what the methods at hand can tell.

    Adaptive truncation is set beside the fixed length that is best in the end, at the score that this one
    ends with, and, where the task has a target, beside the one that is there first.
    """
    fixed = {label: runs for label, runs in results.items() if label.startswith("K=")}
    adaptive = {label: runs for label, runs in results.items() if label not in fixed}
    found = []
    if experiment.target is not None:
        found += _claims_of_learning(experiment, fixed, adaptive)
    if fixed and adaptive:
        best, level, data = best_fixed(experiment, fixed)
        found += [_no_more_data(experiment, label, adaptive[label], best, level, data) for label in adaptive]
    if fixed and adaptive and experiment.target is not None:
        target = experiment.target
        fastest = {label: data_until(experiment, runs, target) for label, runs in fixed.items()}
        first = min(fastest, key=fastest.__getitem__)
        found += [
            _no_more_data(experiment, label, adaptive[label], first, target, fastest[first])
            for label in adaptive
        ]
    return found


def _no_more_data(
    experiment: Experiment,
    label: str,
    runs: Sequence[Mapping[str, Any]],
    other: str,
    level: float,
    data: float,
) -> dict[str, Any]:
    needed = data_until(experiment, runs, level)
    return {
        "claim": f"{label} reaches {level:.4g} in no more data than {other}",
        "rule": f"epochs to this validation score, median over seeds: {needed:.1f} ≤ {data:.1f}",
        "held": needed <= data and math.isfinite(needed),
    }


def best_fixed(experiment: Experiment, fixed: Results) -> tuple[str, float, float]:
    """The fixed length with the lowest median validation score, this score, and the data it took."""
    curves = {label: median_over_seeds(runs, "best_valid") for label, runs in fixed.items()}
    medians = {label: float(scores(experiment, curve)[-1]) for label, curve in curves.items()}
    best = min(medians, key=medians.__getitem__)
    return best, medians[best], data_until(experiment, fixed[best], medians[best])


def _claims_of_learning(experiment: Experiment, fixed: Results, adaptive: Results) -> list[dict[str, Any]]:
    target = experiment.target or math.nan
    tests = {label: final(experiment, runs, "test") for label, runs in {**fixed, **adaptive}.items()}
    found = []
    too_short = [f"K={length}" for length in experiment.too_short]
    for label, values in tests.items():
        if label in too_short:
            rule = f"best test score of all seeds {values.min():.3f} > {FAILED * target:.3f}"
            held = bool(values.min() > FAILED * target)
            found.append({"claim": f"{label} fails", "rule": rule, "held": held})
        else:
            rule = f"worst test score of all seeds {values.max():.3f} < {target}"
            held = bool(values.max() < target)
            found.append({"claim": f"{label} goes to 1.0", "rule": rule, "held": held})
    return found


def figure_one(experiment: Experiment, results: Results, path: Path) -> Path:
    """Test score, K and Δ̂(K) against epochs that count the data of the estimates."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, centre, right = figure.subplots(1, 3)
    for i, (label, runs) in enumerate(results.items()):
        style: dict[str, Any] = _style(i, label)
        x = median_over_seeds(runs, "data_epochs")
        for j, run in enumerate(runs):
            thin = style | {"linewidth": 0.5, "alpha": 0.5, "label": None}
            left.plot(column(run, "data_epochs"), scores(experiment, column(run, "best_test")), **thin)
            if j:
                centre.plot(column(run, "data_epochs"), column(run, "mean_length"), **thin)
                right.plot(column(run, "data_epochs"), _shown(column(run, "relative_bias")), **thin)
        left.plot(x, scores(experiment, median_over_seeds(runs, "best_test")), **style)
        x = column(runs[0], "data_epochs")
        centre.plot(x, column(runs[0], "mean_length"), **style)
        right.plot(x, _shown(column(runs[0], "relative_bias")), **style)
        low, high = column(runs[0], "relative_bias_band").T
        right.fill_between(x, _shown(low), _shown(high), color=style["color"], alpha=0.15, linewidth=0)
    for tolerance in experiment.tolerances:
        right.axhline(tolerance, color="0.5", linestyle=":", linewidth=0.9)
    kind = "perplexity" if experiment.perplexity else "negative log likelihood (nats)"
    left.set(ylabel=f"test {kind} at the best validation so far")
    centre.set(ylabel="truncation length K", yscale="log")
    right.set(ylabel="estimated relative bias Δ̂(K), dotted: δ", yscale="log", ylim=(1e-3, 1e2))
    _plain_ticks(centre)
    if experiment.perplexity:
        left.set(yscale="log")
        _plain_ticks(left)
    for axes in (left, centre, right):
        axes.set(xlabel="epochs of data, those of the estimates among them")
        axes.grid(True, linewidth=0.3, alpha=0.5)
    figure.legend(*left.get_legend_handles_labels(), fontsize="small", loc="outside lower center", ncols=8)
    figure.suptitle(experiment.title)
    figure.savefig(path, dpi=150)
    return path


def _style(index: int, label: str) -> dict[str, Any]:
    """Fixed lengths dashed and coloured, adaptive ones solid and dark, as in the paper."""
    if label.startswith("K="):
        return {"color": f"C{index}", "linestyle": "--", "linewidth": 1.3, "label": label}
    shade = ["0", "0.35", "0.6"][index % 3]
    return {"color": shade, "linestyle": "-", "linewidth": 1.6, "label": label.replace("delta", "δ")}


def _shown(values: np.ndarray) -> np.ndarray:
    """An unbounded relative bias leaves the frame at its top."""
    return np.clip(np.nan_to_num(values, nan=1e9, posinf=1e9), 1e-9, 1e9)


def _plain_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def figure_three(experiment: Experiment, results: Results, path: Path) -> Path:
    """Gradient norms φₖ at the best parameters of the first seed: single draws, their mean, the fit."""
    shown = {label: runs[0] for label, runs in results.items() if "norms" in runs[0]}
    columns = min(4, max(1, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    figure = Figure(figsize=(max(3.6 * columns, 7.2), 3.0 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (label, run) in zip(panels, shown.items(), strict=False):
        norms = run["norms"]
        lags = np.arange(len(norms["curve"]))
        for draw in norms["draws"]:
            axes.semilogy(lags, np.exp(draw), color="0.75", linewidth=0.5)
        axes.fill_between(lags, *np.exp(norms["curve_band"]), color="C0", alpha=0.3, linewidth=0)
        axes.semilogy(lags, np.exp(norms["curve"]), color="C0", linewidth=1.6)
        start = round(experiment.fit_from * experiment.num_lags)
        tail = lags[start:]
        middle = np.mean(norms["curve"][start:]) - np.log(norms["decay_rate"]) * tail.mean()
        axes.semilogy(tail, np.exp(middle + np.log(norms["decay_rate"]) * tail), "C3--", linewidth=1.6)
        axes.set(title=f"{label}: decay {norms['decay_rate']:.3f} a step")
    for axes in panels[-columns:]:
        axes.set(xlabel="lag k")
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    panels[0].set(ylabel="norm of ∂ℓₛ/∂hₛ₋ₖ")
    figure.suptitle(f"{experiment.title}: grey: single draws, blue: mean, red: fitted decay")
    figure.savefig(path, dpi=150)
    return path


_NATS = Experiment("", lambda size, data: (), {}, {}, 0, (), 1, 1, 1, 1, {}, perplexity=False)  # type: ignore
