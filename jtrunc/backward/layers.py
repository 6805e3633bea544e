"""The layers of a structured transition in a window of dynamic length.

On the way out a step runs through all layers. On the way back a chunk of steps goes down layer by layer: a
loop for the δₜ of one layer alone, then one product per weight, and one for what the layer below receives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.backward.fused import (
    Layout,
    Named,
    Weights,
    backward_step,
    forward_step,
    fuse,
    layout_of,
    project_inputs,
    weight_cotangents,
)
from jtrunc.backward.thresholds import ROWS_TO_PROJECT_INSIDE, first_step, num_rows
from jtrunc.backward.window import Chunk
from jtrunc.base import PyTree
from jtrunc.devices import anchor, vary
from jtrunc.structure import Stack, Structure
from jtrunc.trees import add_into, partition_inexact, read_row, weighted_cotangent, write_row


class Layer(NamedTuple):
    """One layer with its fused weights; only the bottom one may have its inputs projected ahead."""

    structure: Structure
    layout: Layout
    weights: Weights


class Layers(NamedTuple):
    """A structured transition: a single structure is a stack of one.

    Attributes:
      each: from the bottom.
      rises: ``(inputs, hidden) -> inputs`` of the layer above, one for each layer but the last.
      split: a tree of the whole transition as a tuple of one tree a layer.
      join: the inverse.
      pull: from cotangents of the fused weights, one tree a layer, to that of θ.
    """

    each: tuple[Layer, ...]
    rises: tuple[Callable[[PyTree, PyTree], PyTree], ...]
    split: Callable[[PyTree], tuple[PyTree, ...]]
    join: Callable[[Iterable[PyTree]], PyTree]
    pull: Callable[[tuple[Weights, ...]], PyTree]

    @property
    def weights(self) -> tuple[Weights, ...]:
        """The fused weights, one tree a layer."""
        return tuple(layer.weights for layer in self.each)


def fuse_layers(structure: Structure | Stack, theta: PyTree, hidden: PyTree, inputs: PyTree) -> Layers:
    """The layers of a structure; of hidden state and inputs, leaves (T, ...), only shapes are read."""
    if isinstance(structure, Stack):
        stack, split, join = structure, tuple, tuple
    else:
        stack = Stack((structure,), (lambda hidden: hidden,))
        split, join = lambda tree: (tree,), lambda trees: next(iter(trees))
    rises = tuple(partial(stack.rise, depth) for depth in range(len(stack.layers) - 1))

    layouts, inputs_t = [], first_step(inputs)
    for depth, hidden_l in enumerate(split(hidden)):
        layer = stack.layers[depth]
        ahead = depth == 0 and num_rows(layer, hidden_l, inputs)[0] < ROWS_TO_PROJECT_INSIDE
        layout = layout_of(layer, split(theta)[depth], hidden_l, inputs_t)
        layouts.append(layout._replace(project_first=ahead))
        if depth < len(rises):
            inputs_t = jax.eval_shape(rises[depth], inputs_t, hidden_l)

    def fused(theta: PyTree) -> tuple[Weights, ...]:
        return tuple(map(fuse, stack.layers, layouts, split(theta)))

    weights, pull = jax.vjp(fused, theta)
    each = tuple(map(Layer, stack.layers, layouts, weights))
    return Layers(each, rises, split, join, lambda bars: pull(bars)[0])


def project_bottom(layers: Layers, inputs: PyTree) -> Named:
    """What the maps of the bottom layer add from the inputs of some steps, if that is projected ahead."""
    bottom = layers.each[0]
    return project_inputs(*bottom, inputs) if bottom.layout.project_first else {}


def forward_layers(layers: Layers, hidden: PyTree, inputs: PyTree, projected: Named) -> tuple[PyTree, PyTree]:
    """One transition, from the projected inputs of the bottom layer: hₜ, and what each layer saves."""
    new, saved = [], []
    for depth, (layer, hidden_l) in enumerate(zip(layers.each, layers.split(hidden), strict=True)):
        new_l, saved_l = forward_step(*layer, hidden_l, inputs, projected if depth == 0 else {})
        new.append(new_l)
        saved.append(saved_l)
        if depth < len(layers.rises):
            inputs = layers.rises[depth](inputs, new_l)
    return layers.join(new), tuple(saved)


def backward_layers(
    layers: Layers, sums: tuple[Weights, ...], chunk: Chunk, after_bar: PyTree, cotangent: list[jax.Array]
) -> tuple[tuple[Weights, ...], list[jax.Array]]:
    """Adds to `sums` the cotangents of the weights in a chunk; and that of the state in which it begins.

    Args:
      after_bar: of each hₜ from its own loss, like ``chunk.after``.
      cotangent: of the float leaves of the last hₜ from later steps.
    """
    before, after, after_bars = (list(layers.split(tree)) for tree in (chunk.before, chunk.after, after_bar))
    cotangents = layers.split(jax.tree.unflatten(jax.tree.structure(after_bar), cotangent))
    inputs, pulls = [chunk.inputs], []
    for rise, hidden in zip(layers.rises, after, strict=False):
        above, pull = _pull_rise(rise, inputs[-1], hidden)
        inputs.append(above)
        pulls.append(pull)

    new_sums, to_past = list(sums), list(cotangents)
    from_above = None
    for depth in reversed(range(len(layers.each))):
        steps = chunk._replace(before=before[depth], saved=chunk.saved[depth], inputs=inputs[depth])
        inputs_flow = depth > 0
        new_sums[depth], to_past[depth], inputs_bar = _backward_layer(
            layers.each[depth], inputs_flow, sums[depth], steps, after_bars[depth], cotangents[depth]
        )
        if inputs_flow:
            inputs_bar = inputs_bar if from_above is None else jax.tree.map(jnp.add, inputs_bar, from_above)
            from_above, below_bar = pulls[depth - 1](inputs_bar)
            after_bars[depth - 1] = jax.tree.map(jnp.add, after_bars[depth - 1], below_bar)
    return tuple(new_sums), jax.tree.leaves(to_past)


def _pull_rise(
    rise: Callable[[PyTree, PyTree], PyTree], inputs: PyTree, hidden: PyTree
) -> tuple[PyTree, Any]:
    """The inputs of the layer above at each step, and what pulls cotangents of their floats back."""
    leaves, restore = partition_inexact(inputs)

    def floats(leaves: list[jax.Array], hidden: PyTree) -> tuple[list[jax.Array], PyTree]:
        above = jax.vmap(rise)(restore(leaves), hidden)
        return partition_inexact(above)[0], above

    _, pull, above = jax.vjp(floats, leaves, hidden, has_aux=True)
    return above, pull


def _backward_layer(
    layer: Layer, inputs_flow: bool, sums: Weights, steps: Chunk, after_bar: PyTree, cotangent: PyTree
) -> tuple[Weights, PyTree, list[jax.Array]]:
    """One layer in a chunk: its weights added to `sums`, the state before it, the floats of its inputs."""
    structure, layout, weights = layer
    projected = project_inputs(*layer, steps.inputs) if layout.project_first else {}
    rows = (steps.before, steps.inputs, projected, steps.saved, after_bar)

    def step(carry: Any) -> Any:
        index, cotangent, elementwise_bar, (deltas, direct) = carry
        before, inputs_t, projected_t, saved, loss_bar = read_row(rows, index)
        total = jax.tree.map(jnp.add, cotangent, loss_bar)
        bars = backward_step(structure, layout, weights, before, inputs_t, projected_t, saved, total)
        cotangent = weighted_cotangent(read_row(steps.edges, index), bars.hidden)
        elementwise_bar = add_into(elementwise_bar, bars.elementwise)
        written = write_row(
            (deltas, direct),
            index,
            (layout.join(bars.deltas, layout.names), bars.inputs if inputs_flow else []),
        )
        return index - 1, cotangent, elementwise_bar, written

    num_outputs = sum(width for _, width in layout.widths)
    deltas = jnp.zeros((*steps.saved.shape[:-1], num_outputs), steps.saved.dtype)
    direct = jax.tree.map(jnp.zeros_like, partition_inexact(steps.inputs)[0]) if inputs_flow else []
    start = (steps.num_active - 1, cotangent, sums.elementwise, vary((deltas, direct), anchor(steps)))
    _, cotangent, elementwise_bar, (deltas, direct) = jax.lax.while_loop(
        lambda carry: carry[0] >= 0, step, start
    )
    by_name = layout.split(deltas, layout.names)
    bars, inputs_bar = weight_cotangents(structure, layout, weights, steps.before, steps.inputs, by_name)
    sums = add_into(sums, bars)._replace(elementwise=elementwise_bar)
    return sums, cotangent, jax.tree.map(jnp.add, inputs_bar, direct) if inputs_flow else []
