"""Types under `jax.shard_map`: the carry of a loop over varying data must vary as that data does."""

from __future__ import annotations

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp

from jtrunc.base import PyTree


def anchor(*trees: PyTree) -> jax.Array:
    """False, varying over every mesh axis over which any leaf varies; derived from data, so always right."""
    return reduce(jnp.logical_or, map(_false_like, jax.tree.leaves(trees)), jnp.asarray(False))


def vary(tree: PyTree, anchored: jax.Array) -> PyTree:
    """`tree` with every leaf varying as the anchor does.

    Values are unchanged, and the compiled program has nothing of it. Transposed, it sums over the mesh axes
    that it added, so that the gradient with respect to replicated parameters is the sum over devices, as
    everywhere under `jax.shard_map`.
    """
    return jax.tree.map(lambda leaf: jnp.where(anchored, leaf, leaf), tree)


def _false_like(leaf: Any) -> jax.Array:
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    first = jnp.ravel(jnp.asarray(leaf))[:1]
    return jnp.any(jnp.zeros_like(first, dtype=bool))
