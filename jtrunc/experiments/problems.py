"""What experiments learn from: a model, and data in three parts that can be held short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc import cells
from jtrunc.base import Params, PyTree, System
from jtrunc.tasks import text, words


class Problem(NamedTuple):
    """A model and what it learns.

    Attributes:
      summary: one line for the reader.
      model: `cells.Model`; its loss is a mean over the streams.
      train: leaves (T, B, ...), read in a circle.
      valid: parameters are chosen on it.
      test: no choice is made on it.
      measures: ``(params, data) -> {name: number}`` for the table, or None.
    """

    summary: str
    model: cells.Model
    train: PyTree
    valid: PyTree
    test: PyTree
    measures: Callable[[Params, PyTree], dict[str, float]] | None = None


def embedded(cell: cells.Cell, num_symbols: int, embedding: int) -> cells.Model:
    """An embedding, a cell that reads it and a softmax readout over the same symbols.

    θ = {"embedding": (num_symbols, embedding), "cell": of the cell}; inputs are pairs of integers (B,).
    """
    plain = cells.model(cell, num_symbols, cells.softmax_cross_entropy)

    def init(key: jax.Array, dtype: Any = jnp.float32) -> Params:
        table_key, key = jax.random.split(key)
        params = plain.init(key, dtype)
        table = jax.random.normal(table_key, (num_symbols, embedding), dtype)
        return params._replace(recurrent={"embedding": table, "cell": params.recurrent})

    def transition(theta: PyTree, hidden: PyTree, inputs: PyTree) -> PyTree:
        return cell.transition(theta["cell"], hidden, theta["embedding"][inputs[0]])

    return plain._replace(system=System(transition, plain.system.loss), init=init)


def word_problem(
    corpus: words.Corpus, model: Callable[[int], cells.Model], streams: int, steps: int, unit: int = 1
) -> Problem:
    """Next words.

    Args:
      corpus: words in three parts.
      model: made for a number of words.
      streams: B.
      steps: of each stream, see `held_short`.
      unit: the training part is cut down to a multiple of so many steps.

    Raises:
      ValueError: the streams are shorter than a unit.
    """
    parts = [tuple(text.lanes(part, streams)) for part in (corpus.train, corpus.valid, corpus.test)]
    train, valid, test = held_short(parts, steps)
    length = len(train[0]) // unit * unit
    if not length:
        raise ValueError(f"--steps {len(train[0])} is too short: an update of all methods takes {unit}")
    train = tuple(leaf[:length] for leaf in train)
    used = f"{np.size(train[0]):,} of {len(corpus.train):,}"
    size = corpus.vocabulary.size
    summary = f"{corpus.source.name}: {used} to learn from, {size:,} different"
    return Problem(summary, model(size), train, valid, test)


def held_short(parts: Sequence[PyTree], steps: int) -> list[PyTree]:
    """The first steps of every training stream, and a quarter of them held out; 0: all there are."""
    limits = (steps or None, *[max(1, steps // 4) if steps else None] * 2)
    return [
        jax.tree.map(lambda leaf, limit=limit: leaf[:limit], part)
        for part, limit in zip(parts, limits, strict=True)
    ]
