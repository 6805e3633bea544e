"""Small operations on pytrees that mix float leaves with integer and key leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jtrunc.base import PyTree


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf carries gradients: real or complex floating point."""
    return jnp.issubdtype(jnp.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype, jnp.inexact)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed key, or an array of them."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_concrete(value: Any) -> bool:
    """Whether a value is known while tracing, rather than a tracer."""
    return not isinstance(value, Tracer)


def partition_inexact(tree: PyTree) -> tuple[list[jax.Array], Callable[[list[jax.Array]], PyTree]]:
    """The float leaves of a tree, and a function that puts others in their place.

    Example:

      >>> leaves, restore = partition_inexact({"h": jnp.ones(2), "count": jnp.int32(3)})
      >>> len(leaves), restore([2.0 * leaves[0]])["h"].tolist()
      (1, [2.0, 2.0])
    """
    leaves, treedef = jax.tree.flatten(tree)
    inexact = [is_inexact(leaf) for leaf in leaves]

    def restore(replacements: list[jax.Array]) -> PyTree:
        new = iter(replacements)
        merged = [next(new) if carries else leaf for leaf, carries in zip(leaves, inexact, strict=True)]
        return jax.tree.unflatten(treedef, merged)

    return [leaf for leaf, carries in zip(leaves, inexact, strict=True) if carries], restore


def inexact_part(tree: PyTree) -> PyTree:
    """The tree with None in the place of every leaf that carries no gradient.

    Example:

      >>> inexact_part({"h": 1.0, "count": 3})
      {'count': None, 'h': 1.0}
    """
    return jax.tree.map(lambda leaf: leaf if is_inexact(leaf) else None, tree)


def with_inexact_part(tree: PyTree, part: PyTree) -> PyTree:
    """The tree with its float leaves replaced by those of `part`."""
    return partition_inexact(tree)[1](jax.tree.leaves(part))


def select(condition: jax.Array, on_true: PyTree, on_false: PyTree) -> PyTree:
    """`on_true` where a scalar condition holds, else `on_false`, leaf by leaf; key leaves too."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def num_time_steps(inputs: PyTree) -> int:
    """The length of the time axis that all leaves of checked `inputs` share."""
    return jax.tree.leaves(inputs)[0].shape[0]


def split_at(tree: PyTree, index: int) -> tuple[PyTree, PyTree]:
    """The first `index` steps of every leaf, and the rest."""
    return jax.tree.map(lambda leaf: leaf[:index], tree), jax.tree.map(lambda leaf: leaf[index:], tree)


def concatenate(trees: list[PyTree]) -> PyTree:
    """Trees joined along the time axis."""
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def cotangent_tree(tree: PyTree, leaves: list[jax.Array]) -> PyTree:
    """Cotangents of the float leaves put into the structure of `tree`; integers and keys get float0."""
    new = iter(leaves)
    return jax.tree.map(
        lambda leaf: next(new) if is_inexact(leaf) else np.zeros(leaf.shape, jax.dtypes.float0), tree
    )


def no_cotangent(leaf: jax.Array) -> Any:
    """A zero cotangent of the type that JAX expects for `leaf`."""
    return cotangent_tree(leaf, [jnp.zeros_like(leaf)])


def weighted_cotangent(weight: jax.Array, cotangent: PyTree) -> PyTree:
    """``w · λ`` leaf by leaf, and exactly 0 where w = 0: a cut must stop infinities too (0 · inf is nan).

    A boolean weight keeps or cuts: one operation less.
    """

    def scale(leaf: jax.Array) -> jax.Array:
        if weight.dtype == bool:
            return jnp.where(weight, leaf, jnp.zeros_like(leaf))
        # The weight is cast, so that a float32 law never widens a bfloat16 or complex state.
        return jnp.where(weight == 0, jnp.zeros_like(leaf), weight.astype(leaf.real.dtype) * leaf)

    return jax.tree.map(scale, cotangent)


def read_row(tree: PyTree, index: Any) -> PyTree:
    """Row `index`, which may be data, of every leaf."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), tree)


def read_rows(tree: PyTree, first: Any, count: int) -> PyTree:
    """`count` rows of every leaf from `first` on, which may be data but must leave room for them."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, count, 0), tree)


def write_row(tree: PyTree, index: Any, row: PyTree) -> PyTree:
    """Every leaf with its row `index`, which may be data, replaced."""
    return jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, index, 0), tree, row)


def repeated(tree: PyTree, count: int) -> PyTree:
    """`count` rows of a tree."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf))), tree)


def strongly_typed(tree: PyTree) -> PyTree:
    """Leaves as arrays without weak types, so that a state has the same type before and after an update."""

    def strong(leaf: Any) -> jax.Array:
        if is_key(leaf):
            return leaf
        return jnp.asarray(leaf, dtype=jnp.result_type(leaf))

    return jax.tree.map(strong, tree)


def accumulator(tree: PyTree) -> PyTree:
    """Zeros in which to sum many terms: the dtypes of `tree`, but at least 32 bits wide."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=wide_dtype(leaf)), tree)


def add_into(total: PyTree, terms: PyTree) -> PyTree:
    """``total + terms`` in the dtypes of `total`."""
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, terms)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """`tree` in the dtypes of `like`."""
    return jax.tree.map(lambda leaf, other: leaf.astype(other.dtype), tree, like)


def wide_dtype(leaf: Any) -> Any:
    """The dtype in which to sum values like `leaf`: its own, but at least 32 bits wide."""
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def inner_product(a: PyTree, b: PyTree) -> jax.Array:
    """Re ⟨a, b⟩ over all leaves, summed in at least float32."""

    def of_leaves(a: jax.Array, b: jax.Array) -> jax.Array:
        dtype = wide_dtype(a)
        return jnp.sum((a.astype(dtype).conj() * b.astype(dtype)).real)

    return sum(jax.tree.leaves(jax.tree.map(of_leaves, a, b)), start=jnp.zeros((), jnp.float32))


def norm_in_parts(tree: PyTree) -> tuple[jax.Array, jax.Array]:
    """The global norm of the float leaves as m · r, m = the largest magnitude: no square over- or underflows.

    m = 1 where all are zero or one is not finite; r then shows it (the maximum alone may drop a NaN).
    """
    leaves = [
        jnp.abs(leaf).astype(wide_dtype(leaf.real))
        for leaf in jax.tree.leaves(tree)
        if is_inexact(leaf) and leaf.size
    ]
    largest = jnp.float32(0)
    for leaf in leaves:
        largest = jnp.maximum(largest, jnp.max(leaf))
    largest = jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1)
    squares = [jnp.sum(jnp.square(leaf / largest.astype(leaf.dtype))) for leaf in leaves]
    return largest, jnp.sqrt(sum(squares, start=jnp.float32(0)))


def clip_to_norm(tree: PyTree, limit: Any) -> tuple[PyTree, jax.Array]:
    """The float leaves scaled down together to a global norm of at most `limit`, and whether they were.

    A tree that is not finite comes back as it is, and so do integer and key leaves. Dtypes are kept.

    Example:

      >>> tree, clips = clip_to_norm({"a": jnp.float32(3), "b": jnp.float32(4)}, 2.5)
      >>> {name: float(leaf) for name, leaf in tree.items()}, bool(clips)
      ({'a': 1.5, 'b': 2.0}, True)
    """
    largest, relative = norm_in_parts(tree)
    clips = jnp.isfinite(relative) & (relative > limit / largest)

    def clip(leaf: jax.Array) -> jax.Array:
        if not is_inexact(leaf):
            return leaf
        wide = leaf.astype(wide_dtype(leaf))
        clipped = (wide / largest.astype(wide.real.dtype)) * (limit / relative).astype(wide.real.dtype)
        return jnp.where(clips, clipped.astype(leaf.dtype), leaf)

    return jax.tree.map(clip, tree), clips
