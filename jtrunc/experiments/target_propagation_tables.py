"""What the target propagation paper reports, with which methods and settings, and at which size.

Source: Wiseman, Chopra, Ranzato, Szlam, Sun, Chintala & Vasilache, "Training language models using target
propagation" (2017), section 4. The paper gives neither the units of its GRU, nor the size of a minibatch, nor
the vocabulary and split of text8. Here, for the full size, as in the published code: 100 units and 32 blocks
an update (there in one stream, here 8 in each of 4). Words of text8 that occur less than ten times are <unk>.

- The GRU reads words by an embedding of each gate (one-hot inputs). Target propagation starts every epoch
  from zeros; BPTT goes on with the state it has.
- θ and H are moved by Adagrad without an initial sum of squares (ε = 1e-10 under the root), the multipliers
  by the residual: u ← u + α (h − ĥ) (errata 25). In the minibatch mode H starts at the forward states in
  every update, and Adagrad on H with it; the multipliers of a block stay from epoch to epoch (errata 26).
- C is a sum over the streams and the loss a mean: the estimator's penalty is λ / streams.
- BPTT (K = B) reads the same windows, as many updates, and is cut where the blocks end: it is what target
  propagation becomes without steps on H.
- λ and the step sizes are those of `Table.settings` in every cell, unless a grid is asked for. They were
  searched for among the points of table 3 in the cell B = 10, H-steps = 1 (the rate of θ: K = 10), one seed,
  on the validation data: the rate of θ, then λ, the rate of H and the rate of u, one after the other, from
  λ = 0.1, 0.01 for H and 0.1 for u. In minibatches the best rates are the smallest, and λ tells nothing
  (perplexity 73.2 to 73.4): table 2, which is about λ, is run with the largest.
- Perplexities are those of the best epoch, as in the published code (the text: of the final parameters).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from jtrunc.targets.options import Initial
from jtrunc.tasks import words

HIDDEN_STEPS = (1, 2, 5)
"""Of table 1."""


class Method(NamedTuple):
    """A cell of a table.

    Attributes:
      block_length: B, or K of BPTT.
      hidden_steps: on H in an update; None: BPTT.
      initial: where H starts; None: as the table has it.
      penalized: whether λ > 0.
      width: of the GRU; 0: that of the size.
    """

    block_length: int
    hidden_steps: int | None = None
    initial: Initial | None = None
    penalized: bool = True
    width: int = 0

    @property
    def label(self) -> str:
        """``K=10``, ``B=10,H=2`` or ``B=20,H=0,predicted,lambda=0,width=32``: the name of its folder."""
        if self.hidden_steps is None:
            parts = [f"K={self.block_length}"]
        else:
            parts = [f"B={self.block_length}", f"H={self.hidden_steps}", self.initial or ""]
            parts += [] if self.penalized else ["lambda=0"]
        return ",".join(filter(None, [*parts, f"width={self.width}" if self.width else ""]))


class Settings(NamedTuple):
    """A point of the grid of table 3.

    Attributes:
      penalty: λ of the paper.
      dual_rate: α of the multipliers u.
      hidden_rate: of Adagrad on H.
      rate: of Adagrad on θ.
    """

    penalty: float = 0.1
    dual_rate: float = 0.1
    hidden_rate: float = 0.01
    rate: float = 0.1

    def label(self, method: Method) -> str:
        """The settings that the method has, as the name of a folder."""
        if method.hidden_steps is None:
            return f"theta={self.rate:g}"
        return f"lambda={self.penalty:g},u={self.dual_rate:g},h={self.hidden_rate:g},theta={self.rate:g}"


GRID = {
    "penalty": (1.0, 0.1, 0.01),
    "dual_rate": (1.0, 0.1, 0.01),
    "hidden_rate": (0.1, 0.01, 0.001),
    "rate": (0.1, 0.01, 0.001),
}
"""Table 3."""

PUBLISHED_CHANGES = {True: -0.40, False: 2.36}
"""Table 2: the change of perplexity by no step on H, with λ > 0 and with λ = 0."""


def grid_of(method: Method) -> Iterator[Settings]:
    """Every point of table 3; for BPTT, of the learning rates."""
    if method.hidden_steps is None:
        return (Settings(rate=rate) for rate in GRID["rate"])
    return itertools.starmap(Settings, itertools.product(*GRID.values()))


class Size(NamedTuple):
    """What a user may make smaller.

    Attributes:
      vocabulary: the most frequent words, others are <unk>; 0: all.
      width: units of the GRU.
      streams: S.
      steps: of each stream of the training data, 0: all there are; rounded down to whole updates.
      blocks: in an update, of each stream; 0: all.
      epochs: passes over the training data.
      evaluate_every: epochs.
    """

    vocabulary: int
    width: int
    streams: int
    steps: int
    blocks: int
    epochs: int
    evaluate_every: int = 1


class Table(NamedTuple):
    """A table or figure of the paper.

    Attributes:
      title: of the picture.
      load: ``(file or folder, most words or None) -> corpus``.
      initial: where H starts.
      methods: ``(block lengths, widths) -> methods``.
      block_lengths: those of the paper.
      sizes: by name of the scale.
      published: validation perplexities by label of the method.
      settings: the best of a search at the small scale, over the points of the grid of one cell.
      widths: of figure 3, by name of the scale.
    """

    title: str
    load: Callable[[Path, int | None], words.Corpus]
    initial: Initial
    methods: Callable[[tuple[int, ...], tuple[int, ...]], list[Method]]
    block_lengths: tuple[int, ...]
    sizes: Mapping[str, Size]
    settings: Settings
    published: Mapping[str, float] = {}
    widths: Mapping[str, tuple[int, ...]] = {"small": (0,), "full": (0,)}


def penn_treebank(data: Path, max_vocabulary: int | None) -> words.Corpus:
    """Penn Treebank words."""
    return words.penn_treebank_words(data, max_vocabulary=max_vocabulary)


def text8(data: Path, max_vocabulary: int | None) -> words.Corpus:
    """text8 words."""
    return words.text8_words(data, max_vocabulary=max_vocabulary)


def table_one(block_lengths: tuple[int, ...], widths: tuple[int, ...]) -> list[Method]:
    """Steps on H by block length, and BPTT with K = B."""
    return [
        Method(length, steps, width=width)
        for width in widths
        for length in block_lengths
        for steps in (*HIDDEN_STEPS, None)
    ]


def table_two(block_lengths: tuple[int, ...], widths: tuple[int, ...]) -> list[Method]:
    """No steps on H, with and without λ, from the forward states and from those predicted the last time.

    From the forward states r = 0, and λ can make no difference (errata 26). The published code starts a block
    where the one before it ends if that starts from zeros: r is not 0 there, nor is it with "predicted".
    """
    starts: tuple[Initial, ...] = ("forward", "predicted")
    return [
        method
        for width in widths
        for length in block_lengths
        for start in starts
        for method in (
            Method(length, 1, start, width=width),
            Method(length, 0, start, width=width),
            Method(length, 0, start, False, width=width),
        )
    ]


def figure_three(block_lengths: tuple[int, ...], widths: tuple[int, ...]) -> list[Method]:
    """2 and 5 steps on H, and BPTT, by the width of the GRU."""
    return [
        Method(length, steps, width=width)
        for length in block_lengths
        for width in widths
        for steps in (2, 5, None)
    ]


def published(rows: str) -> dict[str, float]:
    """Perplexities for B = 5, 10 and 20 by label, from a row for each number of steps on H and for BPTT.

    >>> published("1 2 3   4 5 6   7 8 9   10 11 12")["B=10,H=5"]
    8.0
    """
    methods = [Method(length, steps) for steps in (*HIDDEN_STEPS, None) for length in (5, 10, 20)]
    return {method.label: float(number) for method, number in zip(methods, rows.split(), strict=True)}


_MINIBATCH = Table(
    title="Penn Treebank, minibatches (table 1)",
    load=penn_treebank,
    initial="forward",
    methods=table_one,
    block_lengths=(5, 10, 20),
    sizes={
        "small": Size(2000, 64, 4, 50_000, 8, 5),
        "full": Size(0, 100, 4, 0, 8, 30),
    },
    settings=Settings(penalty=0.01, dual_rate=0.01, hidden_rate=0.001, rate=0.1),
    published=published(
        "137.27 130.93 127.43   137.31 131.04 127.91   137.37 132.95 128.56   135.73 129.50 128.16"
    ),
)

TABLES = {
    "minibatch": _MINIBATCH,
    "batch": _MINIBATCH._replace(
        title="Penn Treebank, one update an epoch (table 1)",
        initial="persistent",
        sizes={
            "small": Size(1000, 64, 20, 2000, 0, 40, 2),
            "full": Size(0, 100, 20, 0, 0, 1000, 10),
        },
        settings=Settings(penalty=1.0, dual_rate=0.1, hidden_rate=0.01, rate=0.1),
        published=published(
            "192.00 201.08 180.08   204.14 189.70 179.42   226.16 184.60 188.99   188.31 182.58 183.91"
        ),
    ),
    "text8": _MINIBATCH._replace(
        title="text8, minibatches (table 1)",
        load=text8,
        sizes={
            "small": Size(2000, 64, 4, 50_000, 8, 5),
            "full": Size(0, 100, 4, 0, 8, 5),
        },
        published=published(
            "242.02 220.11 205.67   242.23 216.54 206.54   241.47 216.87 204.60   229.22 209.87 201.07"
        ),
    ),
    "hidden-steps-zero": _MINIBATCH._replace(
        title="Penn Treebank, minibatches, no steps on H (table 2)",
        methods=table_two,
        block_lengths=(20,),
        settings=_MINIBATCH.settings._replace(penalty=1.0),
        published={},
    ),
    "hidden-size": _MINIBATCH._replace(
        title="Penn Treebank, minibatches, by the width of the GRU (figure 3)",
        methods=figure_three,
        block_lengths=(10,),
        widths={"small": (16, 32, 64, 128), "full": (25, 50, 100, 200, 400)},
        published={},
    ),
}
"""By name of the option --table."""
