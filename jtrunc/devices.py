"""Types under `jax.shard_map`: the carry of a loop over varying data must vary as that data does."""

from __future__ import annotations

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp

from jtrunc.base import PyTree
from jtrunc.trees import is_key


def anchor(*trees: PyTree) -> jax.Array:
    """False, varying over every mesh axis over which any leaf varies; derived from data, so always right."""
    return reduce(jnp.logical_or, map(_false_like, jax.tree.leaves(trees)), jnp.asarray(False))


def vary(tree: PyTree, anchored: jax.Array) -> PyTree:
    """`tree` with every leaf varying as the anchor does.

    Values are unchanged, and the compiled program has nothing of it. Transposed, it sums over the mesh axes
    that it added, so that the gradient with respect to replicated parameters is the sum over devices, as
    everywhere under `jax.shard_map`.
    """

    def cast(leaf: Any) -> Any:
        if not is_key(leaf):
            return jnp.where(anchored, leaf, leaf)
        data = jax.random.key_data(leaf)
        return jax.random.wrap_key_data(jnp.where(anchored, data, data), impl=jax.random.key_impl(leaf))

    return jax.tree.map(cast, tree)


def _false_like(leaf: Any) -> jax.Array:
    if is_key(leaf):
        leaf = jax.random.key_data(leaf)
    first = jnp.ravel(jnp.asarray(leaf))[:1]
    return jnp.any(jnp.zeros_like(first, dtype=bool))
