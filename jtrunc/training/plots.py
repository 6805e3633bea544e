"""Pictures of runs: a PNG, and beside it the JSON with the numbers that it shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jtrunc.training.extras import require


class Curve(NamedTuple):
    """One line of a picture.

    Attributes:
      x: (points,), or (points, seeds) where seeds are sampled at different x (random windows).
      y: (points,) or (points, seeds).
    """

    x: Any
    y: Any


def learning_curves(
    curves: Mapping[str, Curve],
    path: str | Path,
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    quantiles: tuple[float, float, float] = (0.1, 0.5, 0.9),
    log_log: bool = False,
    levels: Mapping[str, float] | None = None,
) -> Path:
    """Draw curves with a band over their seeds, as PNG, with the drawn numbers in a JSON file beside it.

    Args:
      curves: by label.
      path: of the PNG; the JSON gets its name with ``.json``.
      x_label, y_label: with units, such as ``"loss (nats per step)"``.
      title: above the axes.
      quantiles: lower edge of the band, line, upper edge, over the seeds.
      log_log: logarithmic axes; points that are not positive are left out.
      levels: horizontal lines by label, such as an optimum.

    Returns:
      The path of the PNG.

    Raises:
      ValueError: without curves, or if x and y of a curve do not fit.
      ImportError: if matplotlib is not installed.
    """
    if not curves:
        raise ValueError("learning_curves: `curves` is empty; give at least one {label: Curve(x, y)}")
    bands = {label: band(*curve, quantiles, name=label) for label, curve in curves.items()}
    figure, axes = new_figure()
    for index, (label, (x, low, middle, high)) in enumerate(bands.items()):
        dashes = ("-", "--", ":")[index // 10 % 3]  # there are ten colours
        lone = len(x) == 1  # a line and an area through one point are nothing to see
        (line,) = axes.plot(x, middle, dashes, marker="o" if lone else "", label=label)
        if np.ndim(curves[label].y) > 1:
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=4 if lone else 0)
    for label, level in (levels or {}).items():
        axes.axhline(level, color="0.4", linestyle="--", linewidth=1, label=label)
    if log_log:
        log_log_axes(axes)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.legend()
    numbers = {
        "x_label": x_label,
        "y_label": y_label,
        "quantiles": list(quantiles),
        "levels": dict(levels or {}),
        "curves": {
            label: dict(zip(("x", "low", "middle", "high"), (a.tolist() for a in arrays), strict=True))
            for label, arrays in bands.items()
        },
    }
    return save_figure(figure, numbers, path)


def band(
    x: Any, y: Any, quantiles: Sequence[float] = (0.1, 0.5, 0.9), *, name: str = "curve"
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``(x, low, middle, high)`` over the seeds; seeds with an x of their own meet on the median x.

    Example:

      >>> x, low, middle, high = band([1, 2], [[0.0, 4.0], [1.0, 1.0]], (0.0, 0.5, 1.0))
      >>> low.tolist(), middle.tolist(), high.tolist()
      ([0.0, 1.0], [2.0, 1.0], [4.0, 1.0])
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.shape not in (y.shape, y.shape[:1]) or y.ndim not in (1, 2):
        raise ValueError(
            f"learning_curves: the curve {name!r} has x of shape {x.shape} and y of shape {y.shape}; "
            "give y as (points,) or (points, seeds), and x as (points,) or like y"
        )
    if y.ndim == 1:
        return x, y, y, y
    if x.ndim == 2:
        grid = np.median(x, axis=1)
        y = np.stack([np.interp(grid, x[:, i], y[:, i]) for i in range(y.shape[1])], axis=1)
        x = grid
    low, middle, high = np.quantile(y, quantiles, axis=1)
    return x, low, middle, high


def bin_means(x: Any, y: Any, bins: int = 200, *, log: bool = False) -> Curve:
    """The means of x and y within bins of equal width in x (or in log x): a long curve made light.

    Args:
      x: (points,), ascending; positive if `log`.
      y: (points,) or (points, seeds).
      bins: at most so many points come out; empty bins are left out.

    Example:

      >>> curve = bin_means([1, 2, 3, 4], [1.0, 3.0, 5.0, 7.0], bins=2)
      >>> curve.x.tolist(), curve.y.tolist()
      ([1.5, 3.5], [2.0, 6.0])
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    scale = np.log(x) if log else x
    edges = np.linspace(scale[0], scale[-1], bins + 1)[1:-1]
    starts = np.unique(np.concatenate([[0], np.searchsorted(scale, edges)]))
    starts = starts[starts < len(x)]
    counts = np.diff(np.append(starts, len(x)))
    total = np.add.reduceat(y, starts, axis=0)
    return Curve(np.add.reduceat(x, starts) / counts, total / counts.reshape(-1, *(1,) * (y.ndim - 1)))


def log_log_axes(axes: Any) -> None:
    """Logarithmic axes with a light grid."""
    axes.set_xscale("log", nonpositive="mask")
    axes.set_yscale("log", nonpositive="mask")
    axes.grid(True, which="both", linewidth=0.3, alpha=0.5)


def new_figure(width: float = 7.0, height: float = 4.5) -> tuple[Any, Any]:
    """A figure and its axes, drawn by Agg, without any global state of pyplot; sizes in inches."""
    figure = require("matplotlib.figure", "drawing a picture").Figure(
        figsize=(width, height), layout="constrained"
    )
    require("matplotlib.backends.backend_agg", "drawing a picture").FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def save_figure(figure: Any, numbers: Mapping[str, Any], path: str | Path) -> Path:
    """Write a figure as PNG and its numbers as JSON beside it; folders are made if need be."""
    path = Path(path).with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    path.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return path
