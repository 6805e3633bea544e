"""Sums of metrics over the updates of one line, made on the device and as good as in 64 bits."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import PyTree
from jtrunc.training.step import StepMetrics
from jtrunc.trees import wide_dtype


class Sum(NamedTuple):
    """A sum in two parts: ``total + rest`` is right to about twice the digits of their dtype.

    Attributes:
      total: the rounded sum.
      rest: what rounding has cut off it, so that 10⁶ float32 losses add up without loss.
    """

    total: jax.Array
    rest: jax.Array


class MetricSums(NamedTuple):
    """The metrics of some successive updates, summed.

    Attributes:
      num_updates: int32, how many updates.
      loss: `Sum` over the scored steps (nats).
      num_steps: int32, steps consumed.
      num_scored: int32, steps scored.
      grad_norm: `Sum` of the gradients' norms.
      non_finite: int32, the bits of all updates together.
      good: int32, updates before the first that is not finite; `num_updates` if all is well.
      diagnostics: a `Sum` for each of the estimator's named scalars.
      num_skipped: int32, how many of the updates were skipped; None where none is.
    """

    num_updates: jax.Array
    loss: Sum
    num_steps: jax.Array
    num_scored: jax.Array
    grad_norm: Sum
    non_finite: jax.Array
    good: jax.Array
    diagnostics: dict[str, Sum]
    num_skipped: jax.Array | None = None


def no_sums(metrics: StepMetrics) -> MetricSums:
    """Sums over no update, for metrics of these shapes."""

    def empty(leaf: jax.Array) -> Sum:
        zero = jnp.zeros(leaf.shape, wide_dtype(leaf))
        return Sum(zero, zero)

    none = jnp.int32(0)
    diagnostics = {name: empty(leaf) for name, leaf in metrics.diagnostics.items()}
    num_skipped = None if metrics.num_skipped is None else none
    return MetricSums(
        none, empty(metrics.loss), none, none, empty(metrics.grad_norm), none, none, diagnostics, num_skipped
    )


def add_update(sums: MetricSums, metrics: StepMetrics) -> MetricSums:
    """The sums with one more update.

    Example: ten million and one, three times; float32 alone ends at 30000004.

      >>> one, norm = jnp.int32(1), jnp.float32(1)
      >>> metrics = StepMetrics(jnp.float32(1e7 + 1), one, one, norm, jnp.int32(0), {})
      >>> sums = no_sums(metrics)
      >>> for _ in range(3):
      ...     sums = add_update(sums, metrics)
      >>> float(sums.loss.total) + float(sums.loss.rest)
      30000003.0
    """
    non_finite = sums.non_finite | metrics.non_finite
    return MetricSums(
        num_updates=sums.num_updates + 1,
        loss=_add(sums.loss, metrics.loss),
        num_steps=sums.num_steps + metrics.num_steps,
        num_scored=sums.num_scored + metrics.num_scored,
        grad_norm=_add(sums.grad_norm, metrics.grad_norm),
        non_finite=non_finite,
        good=sums.good + (non_finite == 0),
        diagnostics={name: _add(sums.diagnostics[name], leaf) for name, leaf in metrics.diagnostics.items()},
        num_skipped=jax.tree.map(jnp.add, sums.num_skipped, metrics.num_skipped),
    )


def empty_rows(row: PyTree, capacity: int) -> PyTree:
    """Zeros for `capacity` rows of these shapes."""
    return jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), row)


def _add(sum: Sum, term: jax.Array) -> Sum:
    """Knuth's two-sum: the rounding error of one addition is a number of the same dtype, exactly."""
    term = jnp.asarray(term, sum.total.dtype)
    total = sum.total + term
    rounded = total - sum.total
    error = (sum.total - (total - rounded)) + (term - rounded)
    # An infinite total has no rounding error: inf − inf would make it NaN.
    return Sum(total, sum.rest + jnp.where(jnp.isfinite(total), error, 0))
