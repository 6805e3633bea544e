"""What a cell is, and stacks of cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import PyTree, Transition
from jtrunc.checks import check_size
from jtrunc.structure import Stack, Structure, transition_of


class Cell(NamedTuple):
    """A recurrent layer on plain inputs x: a structure, its initial parameters and its initial state.

    Attributes:
      init: ``(key, dtype=float32) -> theta``.
      initial_hidden: ``(batch_shape=(), dtype=float32) -> hidden``, zeros.
      output: ``hidden -> (..., width)``, what a readout or the layer above reads.
      structure: the declaration from which `transition` is derived.
      width: units in the output.
    """

    init: Callable[..., PyTree]
    initial_hidden: Callable[..., PyTree]
    output: Callable[[PyTree], jax.Array]
    structure: Structure | Stack
    width: int

    @property
    def transition(self) -> Transition:
        """``(theta, hidden, x) -> hidden`` on x of shape (..., input_size), or integer indices (...)."""
        return transition_of(self.structure)


def plain_input(x: jax.Array) -> jax.Array:
    """The features that every cell here reads from its input: the input itself."""
    return x


def variance_scaled(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    """A kernel (in, out) with standard deviation 1/√in (Glorot's forward criterion)."""
    return jax.random.normal(key, shape, dtype) / jnp.sqrt(jnp.asarray(shape[0], dtype))


def orthogonal(key: jax.Array, width: int, copies: int, dtype: Any) -> jax.Array:
    """`copies` orthogonal (width, width) kernels side by side: (width, copies · width)."""
    make = jax.nn.initializers.orthogonal()
    wide = jnp.promote_types(dtype, jnp.float32)  # the factorisation behind it knows no narrower type
    kernels = [make(k, (width, width), wide) for k in jax.random.split(key, copies)]
    return jnp.concatenate(kernels, axis=-1).astype(dtype)


def stack(cells: Sequence[Cell]) -> Cell:
    """Layers of cells, each reading the new output of the one below.

    h^l_t = F_l(h^{l-1}_t, h^l_{t-1}, θ_l) with h^0_t = x_t; θ and the hidden state are tuples, one entry
    a layer, and the output is that of the top layer.

    Args:
      cells: bottom first; the input size of each is the width of the one below.

    Raises:
      ValueError: no cells, or a cell that is itself a stack.

    Example:

      >>> from jtrunc import cells
      >>> two = cells.stack([cells.lstm(3, 8), cells.lstm(8, 8)])
      >>> theta = two.init(jax.random.key(0))
      >>> [c.shape for c, h in two.transition(theta, two.initial_hidden(), jnp.ones(3))]
      [(8,), (8,)]
    """
    if not cells:
        raise ValueError("stack: `cells` is empty; give at least one cell")
    layers = []
    for depth, cell in enumerate(cells):
        if isinstance(cell.structure, Stack):
            raise ValueError(f"stack: cell {depth} is itself a stack; pass its layers one by one")
        layers.append(cell.structure)

    def init(key: jax.Array, dtype: Any = jnp.float32) -> PyTree:
        keys = jax.random.split(key, len(cells))
        return tuple(cell.init(k, dtype) for cell, k in zip(cells, keys, strict=True))

    def initial_hidden(batch_shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> PyTree:
        return tuple(cell.initial_hidden(batch_shape, dtype) for cell in cells)

    def output(hidden: PyTree) -> jax.Array:
        return cells[-1].output(hidden[-1])

    structure = Stack(tuple(layers), tuple(cell.output for cell in cells))
    return Cell(init, initial_hidden, output, structure, cells[-1].width)


def zeros_hidden(width: int) -> Callable[..., jax.Array]:
    """``(batch_shape=(), dtype=float32) -> zeros (*batch_shape, width)``."""

    def initial_hidden(batch_shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> jax.Array:
        return jnp.zeros((*batch_shape, width), dtype)

    return initial_hidden


def check_sizes(cell: str, input_size: int, width: int) -> None:
    """Both sizes of a cell are positive integers, or a clear error."""
    check_size(cell, "input_size", input_size)
    check_size(cell, "width", width)
