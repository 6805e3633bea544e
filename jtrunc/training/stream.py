"""A circular stream of windows over data that lies on the device."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.base import PyTree


class Stream(NamedTuple):
    """Data whose time axis is read in a circle.

    Attributes:
      rows: leaves (length + window, ...): the data, and its first `window` rows once more behind its end.
        A dynamic slice that reaches beyond its array is moved back silently; with these rows none does.
      length: int32 scalar, the length of the data.
    """

    rows: PyTree
    length: jax.Array


def circular(data: PyTree, window: int) -> Stream:
    """Put `data` on the device as a circular `Stream` for windows of up to `window` steps.

    Args:
      data: leaves (length, ...), one common length of at least 1; it may be shorter than the window.
      window: the longest window that will be read.

    Raises:
      ValueError: if `data` is empty, or its leaves differ in length.
    """
    length = num_rows(data, "data")
    if length + window > np.iinfo(np.int32).max:
        raise ValueError(
            f"train: `data` has {length} steps, more than an int32 cursor can count; split it, or give the "
            "streams a batch axis"
        )
    order = np.arange(length + window) % length
    return Stream(jax.tree.map(lambda leaf: jnp.asarray(leaf)[order], data), jnp.int32(length))


def window_at(rows: PyTree, cursor: jax.Array, size: int) -> PyTree:
    """`size` rows from `cursor` on."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, cursor, size), rows)


def num_rows(data: PyTree, name: str) -> int:
    """The length of the time axis that all leaves share, or a ValueError that names the argument."""
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
    if len(lengths) != 1 or lengths <= {(), (0,)}:
        raise ValueError(
            f"train: `{name}` must hold arrays with one common time axis of at least one step in front, "
            f"but the leading axes are {sorted(lengths)}"
        )
    return lengths.pop()[0]


def lead_in_ends(window: int, num_scored: int) -> list[int]:
    """Where the short windows end that begin a stream for BPTT(K₁, K₂), so that each loss is scored once.

    A window of W = `window` inputs scores its last K₂ = `num_scored` steps only. Windows [0, r), [0, r + K₂),
    …, [0, W − K₂), r = W mod K₂ (or K₂), each from the initial state, score the steps before that.

    Example:

      >>> lead_in_ends(7, 3), lead_in_ends(6, 3), lead_in_ends(3, 3)
      ([1, 4], [3], [])
    """
    return list(range(window - num_scored, 0, -num_scored))[::-1]
