"""When the two-phase pass of a structured transition is worth it, and in which form: decided from shapes.

The numbers were measured on one CPU core, on whole windows with either choice in turn; what came of them is
in `benchmarks/speed`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jtrunc.base import PyTree
from jtrunc.structure import Stack, Structure
from jtrunc.trees import is_inexact, num_time_steps

ROWS_PER_WIDTH = 4
"""The two-phase pass is taken while rows × this ≤ width."""

WIDE_KERNELS, WIDTHS_IN_ROWS = 4, 2
"""With kernels so many times as wide as the hidden state, an LSTM's, it is taken while rows ≤ width × 2."""

LIGHT_PASS = 1 << 15
"""So few multiplications in a step that it costs by its number of operations: the two-phase pass has fewer,
since losses and products with inputs wait until after the scan."""

ROWS_TO_TURN, SIZE_TO_TURN, STEPS_TO_TURN = range(8, 65), 1 << 19, 20
"""For so many rows, and from so many numbers in the kernels and steps on, the forward products gain more from
kernels on the left than it costs to transpose them once."""

SIZE_ON_THE_LEFT = 1 << 13
"""From so many numbers in a kernel on, δWᵀ is faster with the kernel on the left (windows of an LSTM of 50
units with 1, 4, 16, 64 rows: 0.99, 0.87, 0.92, 0.98); below, transposing the result costs more than it gains
(tanh of 50 units: 1.01 to 1.04)."""

ROWS_TO_READ_AHEAD, GATES_TO_READ_AHEAD = 2, 2
"""From so many rows and so many gates on, projected inputs are read one step early (LSTM and GRU of 20 to 512
units, 2 to 31 rows: 0.74 to 0.92 of the window; one row of a GRU 1.05, no gates 1.06 to 1.3)."""

ROWS_TO_PROJECT_INSIDE = 32
"""From so many rows on, inputs are projected inside the scan: the product is full, and the array of all
projections no longer fits the caches."""


def two_phase_pays(structure: Any, theta: PyTree, hidden: PyTree, inputs: PyTree) -> bool:
    """Whether the two-phase pass is possible and faster: few rows beside the width; decided from shapes.

    With R rows (batch) and width n, the plain pass spends R n² flops a step on dW and moves n² numbers for
    it, so it loses where R is small; from R ≈ n/4 on both are bound by the same products, if these are large
    enough to matter at all. An LSTM, whose kernel is 4 n wide, gains up to R = n.
    """
    if structure is None or not all(is_inexact(leaf) for leaf in jax.tree.leaves(hidden)):
        return False
    if not _equal_rows(structure, hidden, first_step(inputs)):
        return False
    layer = structure
    if isinstance(structure, Stack):
        layer, theta, hidden = structure.layers[0], theta[0], hidden[0]
    rows, width = num_rows(layer, hidden, inputs)
    size = _kernel_size(layer, theta)
    few_rows = rows == 1 or rows * ROWS_PER_WIDTH <= width or rows * size <= LIGHT_PASS
    wide = size >= WIDE_KERNELS * width**2 and rows <= WIDTHS_IN_ROWS * width
    return width > 0 and (few_rows or wide)


def _kernel_size(structure: Structure, theta: PyTree) -> int:
    """Multiplications of one row with all kernels that read the hidden state."""
    affine = jax.eval_shape(structure.affine, theta)
    return sum(weights.hidden_kernel.size for weights in affine.values() if weights.hidden_kernel is not None)


def _equal_rows(structure: Structure | Stack, hidden: PyTree, inputs_t: PyTree) -> bool:
    """Whether each layer has maps, on features with the same leading axes: broadcasts take the plain pass."""
    if isinstance(structure, Stack):
        for depth, layer in enumerate(structure.layers):
            if not _equal_rows(layer, hidden[depth], inputs_t):
                return False
            inputs_t = jax.eval_shape(partial(structure.rise, depth), inputs_t, hidden[depth])
        return True
    of_hidden = jax.eval_shape(structure.hidden_features, hidden, inputs_t)
    of_inputs = jax.eval_shape(structure.input_features, inputs_t)
    features = [*of_hidden.values(), *of_inputs.values()]
    return len({f.shape if jnp.issubdtype(f.dtype, jnp.integer) else f.shape[:-1] for f in features}) == 1


def num_rows(structure: Structure, hidden: PyTree, inputs: PyTree) -> tuple[int, int]:
    """Rows and width of the widest hidden features; width 0 where there are none."""
    features = jax.eval_shape(structure.hidden_features, hidden, first_step(inputs))
    widest = max(features.values(), key=lambda feature: feature.shape[-1], default=None)
    return (0, 0) if widest is None else (widest.size // widest.shape[-1], widest.shape[-1])


def first_step(inputs: PyTree) -> PyTree:
    """Shapes and dtypes of the inputs of one step."""
    return jax.eval_shape(lambda tree: jax.tree.map(lambda leaf: leaf[0], tree), inputs)


def turning_pays(
    structure: Structure, kernels: tuple[jax.Array, ...], hidden: PyTree, inputs: PyTree
) -> bool:
    """Whether the forward products of a window are faster with the hidden kernels transposed, on the left."""
    rows, _ = num_rows(structure, hidden, inputs)
    size = sum(kernel.size for kernel in kernels)
    return rows in ROWS_TO_TURN and size >= SIZE_TO_TURN and num_time_steps(inputs) >= STEPS_TO_TURN


def reading_ahead_pays(
    structure: Structure, kernels: tuple[jax.Array, ...], hidden: PyTree, inputs: PyTree
) -> bool:
    """Whether projected inputs had better be read one step early: there are several rows, and gates."""
    rows, width = num_rows(structure, hidden, inputs)
    outputs = sum(kernel.shape[-1] for kernel in kernels)
    return rows >= ROWS_TO_READ_AHEAD and outputs >= GATES_TO_READ_AHEAD * width


def left_pays(kernel: jax.Array) -> bool:
    """Whether δWᵀ is faster with this kernel on the left."""
    return kernel.size >= SIZE_ON_THE_LEFT
