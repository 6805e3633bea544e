"""Laws of random truncation at equal mean length: python benchmarks/papers/optimal_truncation.py [--quick].

An LSTM is trained for a short while on the copy task or on the source text of Python's library. Then, at
fixed parameters and on new data, each law's variance is predicted, from norms by lag and from all products of
contributions, and sampled: ‖estimate − exact‖² of ARTBP a step, over independent draws of the cuts. The
stream is stationary (its first step stands at a position of a window drawn as often as it occurs) and its
losses end in silence, so that the prediction from products has no approximation but its last lag.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jtrunc
from jtrunc import cells, training, truncation
from jtrunc.diagnostics import gradient_norms, lag_products, truncation_variance
from jtrunc.experiments.report import provenance, table
from jtrunc.tasks import copying, corpora, text
from jtrunc.training import plots

UNITS, STREAMS, WINDOW = 24, 16, 30
HORIZON = 4000
"""Steps since the last cut over which laws are tabulated."""


class Effort(NamedTuple):
    """How long to train, how many steps to measure, how far back, and how often to draw the cuts."""

    num_updates: int = 4000
    num_steps: int = 200
    num_lags: int = 50
    num_draws: int = 2000


class Network(NamedTuple):
    """A trained system, the state it is in, and inputs ``(inputs, whether losses count)`` from there on."""

    system: jtrunc.System
    params: jtrunc.Params
    hidden: Any
    inputs: Any
    loss: float


def copy_data(num_steps: int) -> tuple[int, Any, Any]:
    """Classes, training streams and one new stream of the copy task, 10 symbols at a time."""
    train = copying.sequences(jax.random.key(0), 20_000, STREAMS, length=10)
    return copying.num_classes(), train, copying.sequences(jax.random.key(1), num_steps, 1, length=10)


def text_data(num_steps: int) -> tuple[int, Any, Any]:
    """The same of the characters of Python's library."""
    corpus = corpora.python_standard_library(1_000_000)
    lanes = text.lanes(corpus.train, STREAMS), text.lanes(corpus.valid[: num_steps + 1], 1)
    train, new = (tuple(jnp.asarray(part) for part in lane[:2]) for lane in lanes)
    return corpus.vocabulary.size, train, new


TASKS = {"copy": copy_data, "text": text_data}


def trained(task: str, effort: Effort) -> Network:
    """Truncated BPTT with Adam, then a new stream whose first steps let the state settle."""
    settle, silence = 100, 2 * effort.num_lags
    classes, data, new = TASKS[task](settle + effort.num_steps + silence)
    model = cells.model(cells.lstm(classes, UNITS), classes, cells.softmax_cross_entropy)
    result = training.train(
        model.system,
        model.init,
        model.initial_hidden((STREAMS,)),
        jtrunc.truncated_bptt(model.system, WINDOW),
        optax.adam(0.003),
        data,
        window=WINDOW,
        num_updates=effort.num_updates,
        log_every=max(1, effort.num_updates // 20),
    )
    first, rest = (jax.tree.map(lambda leaf, part=part: leaf[part], new)
                   for part in (slice(settle), slice(settle, None)))  # fmt: skip
    hidden, _ = jtrunc.unroll(model.system, result.params, model.initial_hidden((1,)), first)
    scored = (jnp.arange(effort.num_steps + silence) < effort.num_steps).astype(float)
    system = jtrunc.System(
        lambda theta, hidden, inputs: model.system.transition(theta, hidden, inputs[0]),
        lambda params, hidden, inputs: (inputs[1] * model.system.loss(params, hidden, inputs[0])[0], ()),
    )
    return Network(system, result.params, hidden, (rest, scored), float(result.history["loss"][-1]))


def sampled(network: Network, effort: Effort, law: truncation.Truncation, draw: Any) -> np.ndarray:
    """(num_draws,): ‖estimate − exact‖² a step."""
    probabilities = truncation.probabilities(law, HORIZON)
    reached = np.append(1.0, np.asarray(truncation.survival(law, HORIZON - 1), float))
    generator = np.random.default_rng(0)
    elapsed = generator.choice(HORIZON, size=effort.num_draws, p=reached / reached.sum())
    keys = jax.random.split(jax.random.key(2), effort.num_draws)
    squares = draw(probabilities, keys, jnp.asarray(elapsed, jnp.int32))
    return np.asarray(squares, float) / effort.num_steps


def drawing(network: Network, effort: Effort) -> Any:
    """``(c, keys, steps since the last cut) -> ‖estimate − exact‖²``, compiled once for all laws."""
    system, params, hidden, _, _ = network
    inputs = jax.tree.map(lambda leaf: leaf[: effort.num_steps], network.inputs)
    plain = jtrunc.bptt(system)
    exact = jax.jit(plain.update)(params, plain.init(params, hidden), inputs)[0].grads.recurrent

    def one(probabilities: jax.Array, drawn: tuple[jax.Array, jax.Array]) -> jax.Array:
        key, elapsed = drawn
        estimator = jtrunc.artbp(system, truncation.tabulated(probabilities))
        state = estimator.init(params, hidden, key)._replace(elapsed=elapsed)
        grads = estimator.update(params, state, inputs)[0].grads.recurrent
        leaves = zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True)
        return sum((jnp.sum((a - b) ** 2) for a, b in leaves), jnp.zeros(()))

    def draw(probabilities: jax.Array, keys: jax.Array, elapsed: jax.Array) -> jax.Array:
        return jax.lax.map(partial(one, probabilities), (keys, elapsed), batch_size=20)

    return jax.jit(draw)


def compare(task: str, mean_lengths: list[float], effort: Effort) -> list[dict[str, Any]]:
    """A row for each mean length and law."""
    network = trained(task, effort)
    arguments = network.params, network.hidden, network.inputs
    measure = jax.jit(partial(lag_products, network.system, num_lags=effort.num_lags))
    products = measure(*arguments)
    scored = jax.tree.map(lambda leaf: leaf[: effort.num_steps], network.inputs)
    options = {"num_lags": effort.num_lags, "num_times": effort.num_steps - effort.num_lags, "weighted": True}
    norms = jax.jit(partial(gradient_norms, network.system, **options))(*arguments[:2], scored)
    draw, rows = drawing(network, effort), []
    for mean_length in mean_lengths:
        laws = {
            "constant": truncation.constant(1 / mean_length),
            "polynomial, α = 4": truncation.polynomial(mean_length, 4),
            "polynomial, α = 6": truncation.polynomial(mean_length, 6),
            "optimal for norms": truncation.optimal(norms, mean_length),
            "optimal for products": truncation.optimal(norms, mean_length, products=products),
        }
        for name, law in laws.items():
            squares = sampled(network, effort, law, draw)
            rows.append({
                "task": task, "training loss (nats)": network.loss, "mean length": mean_length, "law": name,
                "from norms": float(truncation_variance(law, norms)),
                "from products": float(truncation_variance(law, norms, products=products)),
                "sampled": float(squares.mean()),
                "standard error": float(squares.std(ddof=1) / math.sqrt(len(squares))),
                "c by steps since the last cut": np.asarray(truncation.probabilities(law, 150)).tolist(),
                "norms by lag": np.sqrt(np.mean(np.square(norms), axis=0)).tolist(),
            })  # fmt: skip
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    """Variances a step; each law's over that of the constant law, as predicted and as sampled."""
    lines = []
    for row in rows:
        same = (row["task"], row["mean length"], "constant")
        base = next(other for other in rows if (other["task"], other["mean length"], other["law"]) == same)
        ratios = [row[key] / base[key] for key in ("from norms", "from products", "sampled")]
        lines.append([
            row["task"], row["mean length"], row["law"], row["from norms"], row["from products"],
            f"{row['sampled']:.4g} ± {row['standard error']:.2g}", *ratios,
        ])  # fmt: skip
    header = ["task", "L₀", "law", "norms", "products", "sampled", "ratio: norms", "products", "sampled"]
    return table(header, lines)


def draw_laws(rows: list[dict[str, Any]], path: Path) -> None:
    """The probabilities of a cut by steps since the last, for the first mean length of each task."""
    figure, axes = plots.new_figure(9.0, 4.5)
    styles = dict(zip(TASKS, ("-", "--"), strict=True))
    shortest = min(row["mean length"] for row in rows)
    shown = [row for row in rows if row["mean length"] == shortest]
    colors = {law: f"C{i}" for i, law in enumerate(dict.fromkeys(row["law"] for row in shown))}
    for row in shown:
        c = row["c by steps since the last cut"]
        label = f"{row['task']}: {row['law']}" if row["law"].startswith("optimal") else row["law"]
        if row["law"].startswith("optimal") or row["task"] == shown[0]["task"]:
            axes.semilogy(range(1, len(c) + 1), c, styles[row["task"]], color=colors[row["law"]], label=label)
    axes.set(xlabel="steps since the last cut", ylabel="probability of a cut", ylim=(1e-4, 1))
    axes.set_title(f"laws of mean length {shortest:g}")
    axes.legend(fontsize=8)
    plots.save_figure(figure, {"rows": rows, "provenance": provenance()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=[*TASKS, "all"], default="all")
    parser.add_argument("--mean-length", type=float, nargs="+", default=[16.0, 50.0])
    parser.add_argument("--quick", action="store_true", help="a small run of everything")
    parser.add_argument("--out", type=Path, default=Path("runs/optimal-truncation"))
    options = parser.parse_args()
    effort = Effort(40, 40, 10, 20) if options.quick else Effort()
    tasks = list(TASKS) if options.task == "all" else [options.task]
    rows = [row for task in tasks for row in compare(task, options.mean_length, effort)]
    print(report(rows))
    draw_laws(rows, options.out / "optimal_truncation.png")


if __name__ == "__main__":
    main()
