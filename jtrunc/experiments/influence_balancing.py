"""Figure 3 of the ARTBP paper: a short positive influence against a longer, larger negative one.

Truncated backpropagation sees the positive influence first, so for short windows its *sign* is wrong; ARTBP
with windows of 16 steps on average is right in expectation. Source: "Unbiasing truncated backpropagation
through time" (2017), section 6.1; what it leaves open is settled in errata 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import jtrunc
from jtrunc import optimizers
from jtrunc.experiments.report import fresh_folder, progress, table, write_json
from jtrunc.tasks import influence_balancing as task
from jtrunc.training import TrainState, init_state, train_step

MILESTONES = (10**3, 10**4, 10**5, 10**6)
LOOK_AHEAD = 4096
"""Of ARTBP: with L₀ = 16, α = 6 a window is longer with probability 9e-10; every hit is counted."""
HIGHEST_SHOWN = 1e3
"""Of the picture's loss axis."""


@dataclass(frozen=True)
class InfluenceBalancing:
    """Truncated BPTT against ARTBP on influence balancing: figure 3 of the ARTBP paper.

    Truncated BPTT with windows of 10 and 100 steps moves away from the optimum, windows of 200 and every
    run of ARTBP (16 steps on average) reach it. Writes a picture, a table and all curves as JSON.
    """

    output: Path = Path("runs/influence-balancing")
    """Folder for the results; it must not exist yet, or be empty."""
    steps: int = 1_000_000
    """Time steps of each run."""
    seeds: int = 5
    """Runs of ARTBP, with seeds 0, 1, ... (truncated BPTT is deterministic here: one run a length)."""
    positive: int = 10
    """p: agents with a positive influence."""
    negative: int = 13
    """n: agents with a negative influence."""
    lengths: tuple[int, ...] = (10, 100, 200)
    """Window lengths of truncated BPTT."""
    mean_length: int = 16
    """L0: ARTBP's mean window length."""
    alpha: float = 6.0
    """ARTBP's exponent: the probability of a window of length L falls like L^-alpha."""
    learning_rate: float = 3e-4
    """eta0 of plain gradient descent on the window's sum, with eta0/sqrt(1 + t) at time step t."""
    initial_theta: float = task.INITIAL_THETA
    """Where theta starts; any value but the optimum shows the same signs."""

    def run(self) -> list[Path]:
        return reproduce(self)


class Curve(NamedTuple):
    """One run: after each of its updates the time step t, the loss summed over 1..t, and θ; float64, (U,)."""

    label: str
    seed: int | None
    times: np.ndarray
    total_loss: np.ndarray
    theta: np.ndarray
    look_ahead_hits: int

    def average_loss(self, t: int) -> float:
        """The average loss over time steps 1..t, at the last update not after t (nan if there is none)."""
        i = int(np.searchsorted(self.times, t, side="right")) - 1
        return float(self.total_loss[i] / self.times[i]) if i >= 0 else float("nan")

    def thinned(self) -> np.ndarray:
        """Indices of at most 400 updates, evenly spread over the logarithm of their number."""
        return np.unique(np.geomspace(1, len(self.times), 400).astype(int)) - 1


def run(
    label: str,
    estimator: jtrunc.GradientEstimator,
    window: tuple[int, int],
    config: InfluenceBalancing,
    seeds: list[int | None],
) -> list[Curve]:
    """Plain online gradient descent from every seed, as one program; one curve a seed.

    Args:
      window: the steps of look-ahead that an update is given, and how many it consumes on average.
      seeds: None stands for a deterministic run.

    Raises:
      FloatingPointError: a loss or θ that is not finite.
    """
    _, params, hidden = task.build(config.positive, config.negative, config.initial_theta)
    schedule = optimizers.inverse_square_root(config.learning_rate)
    optimizer = optax.chain(optimizers.scale_by_timestep_schedule(schedule), optax.scale(-1.0))
    inputs, num_updates = task.inputs(window[0]), max(1, config.steps // window[1] // 20)

    def update(state: TrainState, _: None) -> tuple[TrainState, Any]:
        state, metrics = train_step(estimator, optimizer, state, inputs)
        hits = metrics.diagnostics.get("look_ahead_hits", 0)
        return state, (state.timestep, metrics.loss, state.params.recurrent, hits)

    # One seed after the other: their windows have lengths of their own, and each costs its own length.
    scan = jax.jit(partial(jax.lax.map, lambda state: jax.lax.scan(update, state, length=num_updates)))
    keys = jax.vmap(jax.random.key)(jnp.array([seed or 0 for seed in seeds]))
    states = jax.vmap(lambda key: init_state(estimator, optimizer, params, hidden, key))(keys)
    records = []
    with progress(config.steps, label) as advance:
        while (before := int(states.timestep.min())) < config.steps:
            states, record = scan(states)
            records.append([np.asarray(leaf, np.float64) for leaf in record])
            if not all(np.isfinite(leaf).all() for leaf in records[-1]):
                raise FloatingPointError(f"{label}: not finite after step {before}; lower the learning rate")
            advance(int(states.timestep.min()) - before)
    return _curves(label, seeds, records, config.steps)


def _curves(label: str, seeds: list[int | None], records: list[list[np.ndarray]], steps: int) -> list[Curve]:
    """Joins the chunks' records, and drops the updates that lie beyond `steps`."""
    times, losses, thetas, hits = (np.concatenate(leaves, axis=1) for leaves in zip(*records, strict=True))
    curves = []
    for i, seed in enumerate(seeds):
        kept = times[i] <= steps
        rows = times[i][kept], losses[i][kept].cumsum(), thetas[i][kept]
        curves.append(Curve(label, seed, *rows, int(hits[i][kept].sum())))
    return curves


def all_runs(config: InfluenceBalancing) -> list[Curve]:
    """The runs of the figure: one of truncated BPTT for each length, and ARTBP from every seed."""
    system = task.build(config.positive, config.negative).system
    curves = []
    for length in config.lengths:
        estimator = jtrunc.truncated_bptt(system, length)
        curves += run(f"truncated BPTT L={length}", estimator, (length, length), config, [None])
    law = jtrunc.truncation.polynomial(config.mean_length, config.alpha)
    label = f"ARTBP L0={config.mean_length} α={config.alpha:g}"
    window = (LOOK_AHEAD, config.mean_length)
    return curves + run(label, jtrunc.online_artbp(system, law), window, config, list(range(config.seeds)))


def verdict(curve: Curve, config: InfluenceBalancing) -> str:
    """``reaches θ*``: within a tenth of the initial distance; ``moves away``: further than at the start."""
    optimum = task.optimum(config.positive, config.negative)
    start, end = abs(config.initial_theta - optimum), abs(curve.theta[-1] - optimum)
    return "reaches θ*" if end < 0.1 * start else "moves away" if end > start else "undecided"


def picture(curves: list[Curve], path: Path) -> Path:
    """Figure 3's axes: the average loss over time steps 1..t against t, both logarithmic."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    labels = list(dict.fromkeys(curve.label for curve in curves))
    for curve in curves:
        at, style = curve.thinned(), labels.index(curve.label)
        axes.loglog(
            curve.times[at],
            curve.total_loss[at] / curve.times[at],
            color=f"C{style}",
            marker="osD^v<>p"[style % 8],
            markevery=40,
            markersize=4,
            linewidth=0.8,
            label=None if curve.seed else curve.label,
        )
    axes.set(xlabel="time step t", ylabel="average loss over time steps 1..t", title="Influence balancing")
    # What diverges leaves the frame: with all of it inside, the other curves would be one line.
    axes.set_ylim(top=min(axes.get_ylim()[1], HIGHEST_SHOWN))
    axes.legend(fontsize="small", loc="lower left")
    figure.savefig(path, dpi=150)
    return path


def reproduce(config: InfluenceBalancing) -> list[Path]:
    """Runs the experiment, prints its table, writes PNG and JSON; returns their paths."""
    folder = fresh_folder(config.output)
    curves = all_runs(config)
    optimum = task.optimum(config.positive, config.negative)
    milestones = [t for t in MILESTONES if t <= config.steps]
    header = ["run", "seed", "final θ", *(f"loss, 1..1e{len(str(t)) - 1}" for t in milestones), "verdict"]
    rows = []
    for curve in curves:
        seed = "-" if curve.seed is None else str(curve.seed)
        losses = [curve.average_loss(t) for t in milestones]
        rows.append([curve.label, seed, float(curve.theta[-1]), *losses, verdict(curve, config)])
    print(f"\nInfluence balancing: θ from {config.initial_theta} towards θ* = {optimum:.4f}, average loss")
    print(table(header, rows), flush=True)
    records = [_record(curve, config) for curve in curves]
    result = write_json(folder / "influence_balancing.json", config, optimum=optimum, runs=records)
    return [picture(curves, folder / "influence_balancing.png"), result]


def _record(curve: Curve, config: InfluenceBalancing) -> dict[str, Any]:
    at = curve.thinned()
    return {
        "label": curve.label,
        "seed": curve.seed,
        "verdict": verdict(curve, config),
        "final_theta": float(curve.theta[-1]),
        "average_loss_to": {str(t): curve.average_loss(t) for t in MILESTONES if t <= config.steps},
        "look_ahead_hits": curve.look_ahead_hits,
        "times": curve.times[at].tolist(),
        "average_loss": (curve.total_loss[at] / curve.times[at]).tolist(),
        "theta": curve.theta[at].tolist(),
    }
