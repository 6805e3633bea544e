"""What the adaptive truncation paper trains on, with which settings, and what it reports.

Source: Aicher, Foti & Fox, "Adaptively truncating backpropagation through time to control gradient bias"
(2019), section 5 and appendix C. What the text leaves open follows the published runs (errata 13), and:

- A symbol is looked up in an embedding, standard normal at the start; LSTMs start as in `cells.lstm`.
- Training data are read in a circle, and stream b of a copy task starts b steps into its own: blocks of a
  fixed length would put all streams into one phase, and every minibatch of losses with them.
- BPTT(2K, K) runs over lags 0 … 2K (eq. 16, errata 9), so that K = 5 just reaches the ten steps that the
  copy task wants; the paper's K = 5 fails. Fixed K = 4, not in the paper, is the length that cannot work.
- The copy data end with a whole block, so that reading them in a circle breaks no rule (errata 14).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

from jtrunc import cells
from jtrunc.backward.unroll import unroll
from jtrunc.base import Params, PyTree
from jtrunc.experiments.problems import Problem, embedded, held_short, word_problem
from jtrunc.tasks import book_order, copying, events, point_process, self_exciting, words

Scale = Literal["small", "full"]
TRAIN, VALID, TEST = 1000, 1001, 1002
"""Seeds of the data, whatever the seed of a run."""


class Size(NamedTuple):
    """What a user may make smaller.

    Attributes:
      width: units of a layer.
      streams: B.
      steps: of each stream of the training data, 0: all there are.
    """

    width: int
    streams: int
    steps: int


class Experiment(NamedTuple):
    """The paper's settings for a task.

    Attributes:
      title: of the picture.
      problem: ``(size, folder of data or None) -> Problem``.
      sizes: by name of the scale.
      epochs: by name of the scale; the paper gives none.
      learning_rate: γ, before the factor √K.
      lengths: of fixed truncation, K.
      tolerances: of adaptive truncation, δ.
      num_lags: R.
      fit_from: τ / R.
      initial_length, min_length, max_length: K₀ and the range of K.
      num_times: losses of a window that an estimate follows back, of each stream.
      perplexity: whether scores are exp(nats); else nats.
      target: a score that tells a run that has learned from one that has not, or None.
      too_short: the lengths that are said to fail.
      published: rows of the paper's table, by label of the method: mean (standard deviation) of the best
        validation score, of the test score there, and of `measures`.
    """

    title: str
    problem: Callable[[Size, Path | None], Problem]
    sizes: Mapping[str, Size]
    epochs: Mapping[str, int]
    learning_rate: float
    lengths: tuple[int, ...]
    num_lags: int
    initial_length: int
    min_length: int
    max_length: int
    published: Mapping[str, tuple[str, ...]]
    tolerances: tuple[float, ...] = (0.9, 0.5, 0.1)
    fit_from: float = 0.9
    num_times: int = 1
    perplexity: bool = True
    target: float | None = None
    too_short: tuple[int, ...] = ()


def lstms(num_symbols: int, embedding: int, width: int, layers: int) -> cells.Model:
    """A stack of LSTMs behind an embedding."""
    cell = cells.stack([cells.lstm(size, width) for size in (embedding, *[width] * (layers - 1))])
    return embedded(cell, num_symbols, embedding)


def copy_problem(length: int | tuple[int, int], size: Size, data: Path | None) -> Problem:
    """The copy task; validation and test data are a quarter of the training data each."""
    if data is not None:
        raise ValueError(f"the copy tasks are synthetic, but --data names {str(data)!r}: leave out --data")
    draw = partial(whole_blocks, streams=size.streams, length=length)
    train = [_rolled(leaf) for leaf in draw(TRAIN, size.steps)]
    held_out = -(-size.steps // 80) * 20
    symbols = copying.num_classes()
    return Problem(
        summary=f"copy task, m = {length}: best perplexity 1, without memory"
        f" {copying.memoryless_perplexity():.3f}",
        model=lstms(symbols, 6, size.width, layers=2),
        train=tuple(train),
        valid=draw(VALID, held_out),
        test=draw(TEST, held_out),
    )


def book_order_problem(size: Size, data: Path | None) -> Problem:
    """Book Order: marks and gaps of one stock's order book; the state goes on from line to line."""
    if data is None:
        raise ValueError(
            "task 'book-order' needs --data: the folder of time-1-train.txt and its three sisters"
        )
    parts = [events.lanes(part, size.streams).inputs for part in book_order.load(data)]
    return point_process_problem("Book Order, times in minutes", parts, size, 1000.0)


def words_problem(name: str, load: Callable[[Path], words.Corpus], size: Size, data: Path | None) -> Problem:
    """Next words; an embedding as wide as the one layer of LSTM."""
    if data is None:
        raise ValueError(f"task {name!r} needs --data: the folder of its three files")
    return word_problem(
        load(data), lambda count: lstms(count, size.width, size.width, layers=1), size.streams, size.steps
    )


def self_exciting_problem(size: Size, data: Path | None) -> Problem:
    """A stationary self-exciting process; held-out parts are a quarter of the training part each.

    Time since the beginning tells nothing there, and grows without bound: the network reads 0 instead.
    """
    if data is not None:
        raise ValueError(f"the process is synthetic, but --data names {str(data)!r}: leave out --data")
    lengths = (size.steps, max(1, size.steps // 4), max(1, size.steps // 4))
    seeds = zip((TRAIN, VALID, TEST), lengths, strict=True)
    lanes = [self_exciting.sequences(jax.random.key(seed), steps, size.streams) for seed, steps in seeds]
    bounds = [self_exciting.negative_log_likelihood(part) for part in lanes]
    parts = [(events.Event(part.events.mark, part.events.gap, 0 * part.events.time), part.targets)
             for part in lanes]  # fmt: skip
    named = f"self-exciting process, its own loss {bounds[1]:.4f} (validation) and {bounds[2]:.4f} (test)"
    return point_process_problem(named, parts, size, 1.0)


def point_process_problem(summary: str, parts: Sequence[PyTree], size: Size, scale: float) -> Problem:
    """Two layers of LSTM on marked events, an embedding as wide as they are."""
    train, valid, test = held_short(parts, size.steps)
    cell = cells.stack([cells.lstm(size.width + point_process.NUM_TIME_FEATURES, size.width),
                        cells.lstm(size.width, size.width)])  # fmt: skip
    num_marks = 1 + int(max(np.max(part[1].mark) for part in parts))
    model = partial(point_process.model, cell, num_marks, size.width)
    return Problem(
        summary=f"{summary}; {np.size(train[0].mark):,} events to learn from",
        model=model(),
        train=train,
        valid=valid,
        test=test,
        measures=partial(_point_process_measures, model(loss=point_process.score), scale),
    )


def _point_process_measures(
    model: cells.Model, scale: float, params: Params, data: PyTree
) -> dict[str, float]:
    """RMSE of the expected time of the next event, and how often the likeliest mark is wrong."""
    hidden = model.initial_hidden(np.shape(data[0].mark)[1:])
    _, (_, scores) = jax.jit(partial(unroll, model.system))(params, hidden, data)
    error = math.sqrt(float(np.mean(np.asarray(scores.squared_error, np.float64))))
    return {f"{scale:g} RMSE(t)": scale * error, "0-1 loss": float(np.mean(scores.mark_error))}


def whole_blocks(
    seed: int, steps: int, streams: int, length: int | tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Streams of the copy task that end with a block: (inputs, targets), int32, (steps, streams).

    Of many streams the first ones that do so; a block's law is that of the task, given that it fits.

    >>> inputs, targets = whole_blocks(0, steps=60, streams=3, length=(5, 10))
    >>> bool((targets[-5:] < 6).all() and (inputs[:5] < 6).all())
    True
    """
    shortest = length if isinstance(length, int) else length[0]
    key, blank = jax.random.key(seed), copying.num_classes() - 2
    drawn = copying.sequences(key, steps + 1, 32 * streams, length=length)
    inputs, targets = (np.asarray(leaf) for leaf in drawn)
    ends = (targets[-1] == blank) & (targets[-2] != blank)
    if steps < 2 * shortest or ends.sum() < streams:
        raise ValueError(
            f"--steps {steps} is too short for whole blocks of the copy task; try a multiple of 20"
        )
    return inputs[:-1, ends][:, :streams], targets[:-1, ends][:, :streams]


def _rolled(rows: np.ndarray) -> np.ndarray:
    """Stream b starts b steps later in its circle."""
    return np.stack([np.roll(column, -b) for b, column in enumerate(rows.T)], axis=1)


_COPY = Experiment(
    title="copy task",
    problem=partial(copy_problem, 10),
    sizes={"small": Size(50, 64, 4000), "full": Size(50, 64, 4000)},
    epochs={"small": 40, "full": 40},
    learning_rate=1.0,
    lengths=(4, 5, 10, 15, 20, 30),
    too_short=(4, 5),
    num_lags=100,
    fit_from=0.8,
    initial_length=15,
    min_length=2,
    max_length=100,
    target=1.05,
    published={
        "K=5": ("1.655 (0.012)", "1.646 (0.012)"),
        "K=10": ("1.035 (0.007)", "1.036 (0.005)"),
        "K=15": ("1.038 (0.005)", "1.039 (0.003)"),
        "K=20": ("1.045 (0.009)", "1.040 (0.006)"),
        "K=30": ("1.044 (0.007)", "1.043 (0.004)"),
        "delta=0.9": ("1.018 (0.005)", "1.022 (0.006)"),
        "delta=0.5": ("1.024 (0.003)", "1.027 (0.002)"),
        "delta=0.1": ("1.029 (0.004)", "1.030 (0.005)"),
    },
)

_WORDS = Experiment(
    title="words",
    problem=lambda size, data: words_problem("ptb", words.penn_treebank_words, size, data),
    sizes={"small": Size(128, 16, 16000), "full": Size(900, 32, 0)},
    epochs={"small": 8, "full": 20},
    learning_rate=10.0,
    lengths=(10, 50, 100, 200, 300),
    num_lags=400,
    initial_length=100,
    min_length=10,
    max_length=400,
    published={
        "K=10": ("99.7 (0.6)", "99.9 (0.8)"),
        "K=50": ("110.4 (0.4)", "110.8 (0.8)"),
        "K=100": ("116.2 (0.5)", "116.9 (0.5)"),
        "K=200": ("125.2 (1.2)", "126.1 (0.9)"),
        "K=300": ("161.5 (0.5)", "161.2 (0.3)"),
        "delta=0.9": ("100.1 (0.5)", "99.0 (0.5)"),
        "delta=0.5": ("90.1 (0.4)", "89.5 (0.3)"),
        "delta=0.1": ("88.1 (0.2)", "87.2 (0.2)"),
    },
)

EXPERIMENTS = {
    "ptb": _WORDS._replace(title="Penn Treebank words"),
    "wikitext-2": _WORDS._replace(
        title="WikiText-2 words",
        problem=lambda size, data: words_problem("wikitext-2", words.wikitext2, size, data),
        sizes={"small": Size(128, 16, 16000), "full": Size(512, 32, 0)},
        published={
            "K=10": ("144.2 (0.4)", "136.5 (1.3)"),
            "K=50": ("133.4 (2.9)", "127.2 (2.8)"),
            "K=100": ("134.4 (0.3)", "127.8 (0.5)"),
            "K=200": ("130.3 (1.1)", "124.6 (0.7)"),
            "K=300": ("129.6 (1.4)", "124.0 (2.2)"),
            "delta=0.9": ("130.0 (1.3)", "124.1 (2.2)"),
            "delta=0.5": ("127.2 (0.7)", "121.7 (0.6)"),
            "delta=0.1": ("127.5 (0.6)", "121.9 (1.2)"),
        },
    ),
    "copy": _COPY._replace(title="copy task, m = 10"),
    "copy-variable": _COPY._replace(
        title="copy task, m from 5 to 10",
        problem=partial(copy_problem, (5, 10)),
        too_short=(4,),
        published={
            "K=5": ("1.46 (0.01)", "1.47 (0.01)"),
            "K=10": ("1.41 (0.02)", "1.39 (0.02)"),
            "K=15": ("1.39 (0.03)", "1.37 (0.03)"),
            "K=20": ("1.39 (0.03)", "1.35 (0.03)"),
            "K=30": ("1.33 (0.02)", "1.31 (0.01)"),
            "delta=0.9": ("1.37 (0.02)", "1.35 (0.02)"),
            "delta=0.5": ("1.33 (0.01)", "1.32 (0.02)"),
            "delta=0.1": ("1.31 (0.01)", "1.29 (0.01)"),
        },
    ),
    "book-order": Experiment(
        title="Book Order",
        problem=book_order_problem,
        sizes={"small": Size(128, 64, 0), "full": Size(128, 64, 0)},
        epochs={"small": 5, "full": 20},
        learning_rate=0.1,
        lengths=(3, 6, 9, 15, 21),
        num_lags=200,
        initial_length=6,
        min_length=1,
        max_length=100,
        perplexity=False,
        published={
            "K=3": ("-4.983 (0.013)", "-4.694 (0.015)", "3.9705 (0.0016)", "0.3827 (0.0003)"),
            "K=6": ("-4.905 (0.006)", "-4.716 (0.006)", "3.9691 (0.0007)", "0.3959 (0.0009)"),
            "K=9": ("-4.898 (0.005)", "-4.732 (0.005)", "3.9634 (0.0003)", "0.3944 (0.0011)"),
            "K=15": ("-4.875 (0.007)", "-4.734 (0.004)", "3.9619 (0.0011)", "0.3971 (0.0010)"),
            "K=21": ("-4.831 (0.026)", "-4.719 (0.019)", "3.9622 (0.0001)", "0.4316 (0.0336)"),
            "delta=0.9": ("-4.930 (0.016)", "-4.745 (0.009)", "3.9641 (0.0007)", "0.3932 (0.0006)"),
            "delta=0.5": ("-4.890 (0.003)", "-4.733 (0.013)", "3.9662 (0.0043)", "0.3953 (0.0002)"),
            "delta=0.1": ("-4.867 (0.001)", "-4.739 (0.002)", "3.9634 (0.0003)", "0.3954 (0.0001)"),
        },
    ),
    "self-exciting": Experiment(
        title="self-exciting process",
        problem=self_exciting_problem,
        sizes={"small": Size(32, 64, 2000), "full": Size(128, 64, 4000)},
        epochs={"small": 10, "full": 20},
        learning_rate=0.1,
        lengths=(1, 3, 9, 21),
        num_lags=50,
        initial_length=6,
        min_length=1,
        max_length=50,
        perplexity=False,
        published={},
    ),
}
