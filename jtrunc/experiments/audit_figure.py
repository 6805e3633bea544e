"""The picture of an audit: bias against noise, area = cost; and what arrives by lag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jtrunc.diagnostics import Audit, Finding
from jtrunc.training.plots import new_figure, save_figure

FLOOR = 1e-3
"""Where bias and noise that are smaller, or 0, are drawn."""

_AREA = 60.0


def draw(found: Audit, path: Path) -> Path:
    """One panel of bias and noise; one of lags where they were measured."""
    lags = any(finding.by_lag for finding in found.findings.values())
    figure, axes = new_figure(12.5 if lags else 7.5, 5.0)
    if lags:
        figure.clear()
        axes, by_lag = figure.subplots(1, 2)
        _draw_lags(by_lag, found)
    numbers = _draw_bias(axes, found)
    for handle in figure.legend(loc="outside right center", fontsize="small").legend_handles:
        handle.set_sizes([_AREA])
    return save_figure(figure, {"floor": FLOOR, "estimators": numbers}, path)


def _draw_bias(axes: Any, found: Audit) -> dict[str, Any]:
    findings = found.findings
    costs = {name: _seconds(finding) for name, finding in findings.items()}
    cheapest = min(costs.values())
    numbers = {}
    for index, (name, finding) in enumerate(findings.items()):
        bias, low, high = (max(end, FLOOR) for end in finding.bias)
        noise = max(finding.noise, FLOOR)
        color, relative = _color(index), costs[name] / cheapest
        axes.plot([low, high], [noise, noise], color=color, linewidth=1)
        axes.scatter([bias], [noise], s=_AREA * np.sqrt(relative), color=color, alpha=0.7, label=name)
        numbers[name] = {"bias": [bias, low, high], "noise": noise, "relative_cost": relative}
    axes.set(xscale="log", yscale="log")
    for limits, set_limits in ((axes.get_xlim(), axes.set_xlim), (axes.get_ylim(), axes.set_ylim)):
        set_limits(FLOOR / 1.6, max(limits[1], 2.0))
    axes.axvline(FLOOR, color="0.8", linewidth=0.8, zorder=0)
    axes.axhline(FLOOR, color="0.8", linewidth=0.8, zorder=0)
    axes.set(
        xlabel=f"relative bias, {found.confidence:.0%} interval (grey line: {FLOOR:g} or less)",
        ylabel="relative noise of one pass (grey line: none)",
        title="Bias and noise of the gradient; area: √time a step",
    )
    axes.grid(True, linewidth=0.3, alpha=0.5)
    return numbers


def _draw_lags(axes: Any, found: Audit) -> None:
    for index, finding in enumerate(found.findings.values()):
        if not finding.by_lag:
            continue
        lags = np.array(list(finding.by_lag))
        ends = np.array([lag.arrived for lag in finding.by_lag.values()])
        error = np.abs(ends[:, 1:] - ends[:, :1]).T
        # Estimators that agree lie on top of each other: a little to the side, each is seen.
        x = lags + 1 + 0.02 * (index - len(found.findings) / 2) * (lags + 1)
        axes.errorbar(x, ends[:, 0], error, color=_color(index), marker="o", markersize=3, linewidth=1)
    ticks = sorted({lag for finding in found.findings.values() for lag in finding.by_lag or ()})
    axes.set_xscale("log")
    axes.set_xticks([lag + 1 for lag in ticks], [str(lag) for lag in ticks])
    axes.minorticks_off()
    axes.set(
        ylim=(-0.5, 2.5),
        xlabel="lag (steps between θ's influence and the loss)",
        ylabel="share of the gradient that arrives (0: lost, 1: all)",
        title="What arrives, by lag",
    )
    axes.grid(True, linewidth=0.3, alpha=0.5)


def _seconds(finding: Finding) -> float:
    """Measured, or else operations: only ratios are drawn."""
    measured, counted = finding.seconds_per_step, finding.cost.flops_per_step
    return measured if np.isfinite(measured) else counted or 1.0


def _color(index: int) -> str:
    return f"C{index % 10}"
