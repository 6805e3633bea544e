"""Which parameters touch which coordinate of the state: found once, from the program, never from values.

A pattern is a property of the transition's graph: it holds for all values, so that one-hot inputs and dead
units erase nothing of it. Rows of ∂F/∂θ that share no parameter get one colour and cost one vjp together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.base import PyTree, Transition
from jtrunc.coordinates import Coordinates, as_aval
from jtrunc.devices import anchor, vary
from jtrunc.forward.structured import Units, read_theta
from jtrunc.trees import is_key, partition_inexact


class UnreadableError(ValueError):
    """The sparsity of a transition cannot be read off its program."""


class Pattern(NamedTuple):
    """The structural nonzeros of one transition.

    Attributes:
      by_theta: (S, P) booleans, P = entries of θ (a complex entry is one).
      by_hidden: (S, S) booleans.
    """

    by_theta: np.ndarray
    by_hidden: np.ndarray


def pattern_of(transition: Transition, theta: PyTree, hidden: PyTree, inputs: PyTree) -> Pattern:
    """The pattern of ∂F/∂θ and ∂F/∂h.

    Raises:
      ImportError: the optional package that reads it off the program is missing.
      UnreadableError: it cannot read this one.
    """
    return _read_pattern(transition, transition, (theta, hidden, inputs))


def _read_pattern(identity: Any, transition: Transition, arguments: tuple[PyTree, PyTree, PyTree]) -> Pattern:
    """The pattern of a function, remembered under `identity` and the shapes of its arguments."""
    avals = tuple(map(_raw_aval, jax.tree.leaves(arguments)))
    return _pattern(_Remembered(identity, transition), avals, jax.tree.structure(arguments))


class _RawAval(NamedTuple):
    """Shape and dtype of a leaf; of a key those of its raw data, and how to make it a key again."""

    shape: tuple[int, ...]
    dtype: Any
    key_impl: Any = None


def _raw_aval(leaf: Any) -> _RawAval:
    aval, impl = as_aval(leaf), None
    if is_key(leaf):
        aval, impl = jax.eval_shape(jax.random.key_data, leaf), jax.random.key_impl(leaf)
    return _RawAval(aval.shape, aval.dtype, impl)


class _Remembered:
    """A function that counts as equal to another of the same identity."""

    def __init__(self, identity: Any, function: Transition) -> None:
        self.identity, self.function = identity, function

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Remembered) and self.identity is other.identity

    def __hash__(self) -> int:
        return hash(id(self.identity))


@lru_cache(maxsize=32)
def _pattern(remembered: _Remembered, avals: tuple[_RawAval, ...], treedef: Any) -> Pattern:
    try:
        from asdex import jacobian_sparsity
    except ImportError as error:
        raise ImportError(
            "the sparsity of a transition without a declared structure is read off by asdex: "
            "install jtrunc[sparsity], declare `System.structure`, or take an estimator that needs no "
            "sparsity (uoro, rtrl)"
        ) from error

    with jax.ensure_compile_time_eval():
        raw = [jnp.zeros(aval.shape, aval.dtype) for aval in avals]
        theta, hidden, inputs = jax.tree.unflatten(treedef, raw)
        theta_space, hidden_space = Coordinates.of(theta), Coordinates.of(hidden)

        def run(theta_vector: Any, hidden_vector: Any, rest: Any, inputs: Any) -> jax.Array:
            theta_new = _with_vector(theta, theta_space, theta_vector)
            hidden_new = _with_vector(_keyed(rest, treedef, avals, 1), hidden_space, hidden_vector)
            new = remembered.function(theta_new, hidden_new, _keyed(inputs, treedef, avals, 2))
            return hidden_space.tangent_vector(partition_inexact(new)[0])

        arguments = (
            jnp.zeros(theta_space.size, theta_space.dtype),
            jnp.zeros(hidden_space.size, hidden_space.dtype),
            hidden,
            inputs,
        )
        try:
            found = [jacobian_sparsity(run, *arguments, argnums=argument) for argument in (0, 1)]
        except Exception as error:  # whatever the reader stumbles over, the remedy is the same
            raise UnreadableError(
                "the sparsity of `system.transition` cannot be read off its program: pass traced arrays "
                "through `inputs` or `hidden` instead of closing over them, declare `System.structure`, or "
                "take `uoro` or `rtrl`, which need no sparsity "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0]})"
            ) from error
    by_theta, by_hidden = (_dense(pattern) for pattern in found)
    return Pattern(_merge_complex(by_theta, theta_space), by_hidden)


def _keyed(tree: PyTree, treedef: Any, avals: tuple[_RawAval, ...], argument: int) -> PyTree:
    """Raw key data wrapped again, where the argument of the transition had keys."""
    template = jax.tree.unflatten(treedef, range(len(avals)))[argument]

    def wrap(leaf: jax.Array, index: int) -> jax.Array:
        impl = avals[index].key_impl
        return leaf if impl is None else jax.random.wrap_key_data(leaf, impl=impl)

    return jax.tree.map(wrap, tree, template)


def _with_vector(tree: PyTree, space: Coordinates, vector: jax.Array) -> PyTree:
    return partition_inexact(tree)[1](space.tangents(vector))


def _dense(pattern: Any) -> np.ndarray:
    dense = np.zeros(pattern.shape, bool)
    dense[pattern.rows, pattern.cols] = True
    return dense


def _merge_complex(by_theta: np.ndarray, space: Coordinates) -> np.ndarray:
    """Columns of real and imaginary parts as one column a complex entry."""
    blocks, start = [by_theta[:, :0]], 0
    for leaf in space.leaves:
        block = by_theta[:, start : start + leaf.size]
        start += leaf.size
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            block = block | by_theta[:, start : start + leaf.size]
            start += leaf.size
        blocks.append(block)
    return np.concatenate(blocks, axis=1)


def unit_pattern(
    units: Units, theta: PyTree, hidden: PyTree, inputs: PyTree
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Which parts of a unit each slot of a map, and each elementwise parameter, moves within a step.

    Returns:
      ``{map: (s, G)}`` and (s,) for each real coordinate of the elementwise parameters, booleans.
    """
    structure, width = units.structure, units.width

    def transition(theta: Any, hidden: PyTree, inputs: PyTree) -> PyTree:
        elementwise, preactivations = theta
        return structure.combine(elementwise, hidden, inputs, preactivations)

    affine, elementwise = jax.eval_shape(partial(read_theta, structure), theta)
    preactivations = {
        name: jax.ShapeDtypeStruct((slots * width,), jax.tree.leaves(affine[name])[0].dtype)
        for name, slots in units.slots.items()
    }
    arguments = ((elementwise, preactivations), hidden, inputs)
    found: np.ndarray = _read_pattern(structure.combine, transition, arguments).by_theta
    by_part = found.reshape(units.parts, width, -1).any(axis=1)
    columns = iter(np.split(by_part, range(width, found.shape[1], width), axis=1))
    of_elementwise = []
    for leaf in Coordinates.of(elementwise).leaves:
        real_parts = 2 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else 1
        of_elementwise += [next(columns).any(axis=1)] * real_parts
    maps = {
        name: np.stack([next(columns).any(axis=1) for _ in range(units.slots[name])], axis=1)
        for name in sorted(preactivations)
    }
    return maps, of_elementwise


def colours_of(pattern: np.ndarray) -> np.ndarray:
    """(S,) colours, greedily: rows of one colour have no column in common."""
    taken: list[np.ndarray] = []
    colours = np.zeros(len(pattern), np.int32)
    for row, columns in enumerate(pattern):
        free = [colour for colour, used in enumerate(taken) if not (used & columns).any()]
        if not free:
            free = [len(taken)]
            taken.append(np.zeros(pattern.shape[1], bool))
        colours[row] = free[0]
        taken[free[0]] |= columns
    return colours


def owners_of(pattern: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """(colours, P): the row that touches a parameter among those of a colour, or S where none does."""
    owners = np.full((colours.max(initial=0) + 1, pattern.shape[1]), len(pattern), np.int32)
    for row, columns in enumerate(pattern):
        owners[colours[row], columns] = row
    return owners


class SparseRows(NamedTuple):
    """The rows wᵢ of I = ∂F/∂θ, compressed.

    Attributes:
      trees: one tree like θ for each colour: the entries of all rows of that colour, which do not overlap.
      sum_by_row: ``(colour, tree) -> (S,)``: sums of a real tree like θ over what each row owns.
      pull: ``c -> Σᵢ cᵢ wᵢ``.
      owners: for each colour, which row owns each entry of each leaf of θ (S: none), where that is known.
    """

    trees: list[PyTree]
    sum_by_row: Callable[[int, PyTree], jax.Array]
    pull: Callable[[jax.Array], PyTree]
    owners: list[list[np.ndarray]] | None = None

    def squared_norms(self, weights: PyTree | None = None) -> jax.Array:
        """Σ_p weights_p |w_{i,p}|² for every row, (S,)."""
        return sum_over_colours(self, self.trees, self.trees, weights)


def sum_over_colours(
    rows: SparseRows, lefts: list[PyTree], rights: list[PyTree], weights: PyTree | None = None
) -> jax.Array:
    """⟨left, right⟩ row by row, (S,), with a tree of weights or none."""
    total: Any = None
    for colour, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        products = jax.tree.map(lambda a, b: (a * jnp.conj(b)).real, left, right)
        if weights is not None:
            products = jax.tree.map(jnp.multiply, products, weights)
        sums = rows.sum_by_row(colour, products)
        total = sums if total is None else total + sums
    assert total is not None
    return total


def sparse_rows(
    transition: Transition,
    theta: PyTree,
    hidden: PyTree,
    inputs: PyTree,
    pull: Callable[[jax.Array], PyTree],
) -> SparseRows:
    """The rows of I from one vjp a colour."""
    pattern = pattern_of(transition, theta, hidden, inputs).by_theta
    colours = colours_of(pattern)
    owners = owners_of(pattern, colours)
    space = Coordinates.of(hidden)
    leaves, treedef = jax.tree.flatten(theta)
    stops = np.cumsum([np.size(leaf) for leaf in leaves], dtype=int)  # none where θ has no leaf
    owner_leaves = [
        [part.reshape(np.shape(leaf)) for part, leaf in zip(np.split(row, stops)[:-1], leaves, strict=True)]
        for row in owners
    ]
    simple = [[Owners.of(owner, space.size) for owner in row] for row in owner_leaves]
    anchored = anchor(theta, hidden, inputs)
    trees = [
        pull(vary(jnp.asarray(colours == colour, space.dtype), anchored)) for colour in range(len(owners))
    ]

    def sum_by_row(colour: int, tree: PyTree) -> jax.Array:
        total = jnp.zeros(space.size + 1, space.dtype)
        for leaf, owner in zip(jax.tree.leaves(tree), simple[colour], strict=True):
            total = owner.add(total, leaf)
        return total[:-1]

    def pull_rows(cotangent: jax.Array) -> PyTree:
        padded = jnp.append(cotangent, jnp.zeros(1, cotangent.dtype))
        total: Any = None
        for tree, owner in zip(trees, simple, strict=True):
            terms = [
                (own.spread(padded, leaf.ndim) * leaf).astype(leaf.dtype)
                for leaf, own in zip(jax.tree.leaves(tree), owner, strict=True)
            ]
            total = terms if total is None else [a + b for a, b in zip(total, terms, strict=True)]
        return jax.tree.unflatten(treedef, total)

    return SparseRows(trees, sum_by_row, pull_rows, owner_leaves)


class Owners(NamedTuple):
    """Which row owns each entry of one leaf, as simply as it can be said.

    Attributes:
      axis: the one axis that the owner depends on, as for the kernel of an affine map, or None.
      rows: the owners along that axis, or of all entries.
      start: where these are ``start, start + 1, …``: that start, else None.
    """

    axis: int | None
    rows: np.ndarray
    start: int | None

    @classmethod
    def of(cls, owner: np.ndarray, size: int) -> Owners:
        """From an array of owners below `size`, or `size` for none."""
        axis, rows = None, owner
        for candidate in range(owner.ndim if owner.size else 0):
            line = owner[tuple(slice(None) if i == candidate else 0 for i in range(owner.ndim))]
            others = tuple(i for i in range(owner.ndim) if i != candidate)
            if owner.ndim > 1 and (owner == np.expand_dims(line, others)).all():
                axis, rows = candidate, line
                break
        steady = rows.ndim == 1 and rows.size > 0 and rows[-1] < size and (np.diff(rows) == 1).all()
        return cls(axis, rows, int(rows[0]) if steady else None)

    def add(self, total: jax.Array, leaf: jax.Array) -> jax.Array:
        """`total` (S + 1,) with the entries of a leaf added to their rows."""
        if self.axis is not None:
            # As a product: a sum over leading axes strides through memory.
            lines = jnp.moveaxis(leaf, self.axis, -1).reshape(-1, leaf.shape[self.axis])
            leaf = jnp.ones(len(lines), lines.dtype) @ lines
        leaf = leaf.astype(total.dtype)
        if self.start is not None:
            return total.at[self.start : self.start + leaf.size].add(leaf)
        return total.at[self.rows].add(leaf)

    def spread(self, padded: jax.Array, ndim: int) -> jax.Array:
        """Numbers a row (S + 1,) as numbers an entry, to be multiplied with a leaf of `ndim` axes."""
        if self.start is not None:
            values = padded[self.start : self.start + self.rows.size]
        else:
            values = padded[self.rows]
        if self.axis is None:
            return values
        return jnp.expand_dims(values, tuple(i for i in range(ndim) if i != self.axis))


def immediate_rows(
    transition: Transition,
    theta: PyTree,
    hidden: PyTree,
    inputs: PyTree,
    pull: Callable[[jax.Array], PyTree],
) -> PyTree:
    """I = ∂F/∂θ as a tree of rows, leaves (S, ...), from one vjp a colour."""
    sparse = sparse_rows(transition, theta, hidden, inputs, pull)
    size = Coordinates.of(hidden).size
    total: Any = None
    for tree, owner in zip(sparse.trees, sparse.owners or [], strict=True):
        rows = [
            jnp.where(jnp.arange(size).reshape(-1, *[1] * own.ndim) == own[None], leaf[None], 0)
            for leaf, own in zip(jax.tree.leaves(tree), owner, strict=True)
        ]
        total = rows if total is None else [a + b for a, b in zip(total, rows, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(theta), total)
