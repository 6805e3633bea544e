"""The affine maps of a structure with fused weights: a step out, a step back, and the weights' own share.

What depends on the inputs alone is projected for all steps at once, or in each step; which maps share
features, and with them a matrix product, is read off from the shapes (`Layout`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.backward.thresholds import left_pays
from jtrunc.base import PyTree
from jtrunc.structure import Structure, add_bias, project
from jtrunc.trees import cast_like, partition_inexact

Named = dict[str, jax.Array]


class Layout(NamedTuple):
    """How the maps of a structure are fused; static, computed from shapes.

    Attributes:
      hidden_groups: names of the maps that read the very same hidden features: one product each.
      input_groups: likewise for input features.
      widths: ``((name, outputs), ...)`` in the order of the fused arrays: maps of inputs alone, of both,
        of the hidden state alone, so that the columns of each product are contiguous.
      num_input_only: how many of the names read inputs alone.
      project_first: whether inputs are projected for all steps before the scan, or inside it.
    """

    hidden_groups: tuple[tuple[str, ...], ...]
    input_groups: tuple[tuple[str, ...], ...]
    widths: tuple[tuple[str, int], ...]
    num_input_only: int
    project_first: bool = True

    def split(self, array: jax.Array, names: tuple[str, ...]) -> Named:
        """The columns of a fused array of these maps, by name."""
        widths = dict(self.widths)
        stops = np.cumsum([widths[name] for name in names])[:-1].tolist()
        return dict(zip(names, jnp.split(array, stops, axis=-1), strict=True))

    def join(self, arrays: Named, names: tuple[str, ...]) -> jax.Array:
        """The inverse."""
        return jnp.concatenate([arrays[name] for name in names], axis=-1)

    @property
    def names(self) -> tuple[str, ...]:
        """All maps, in the order of the fused arrays."""
        return tuple(name for name, _ in self.widths)

    @property
    def input_only(self) -> tuple[str, ...]:
        """The maps whose preactivations are known before the scan."""
        return self.names[: self.num_input_only] if self.project_first else ()

    @property
    def saved(self) -> tuple[str, ...]:
        """The maps whose preactivations the forward pass must save: all the others."""
        return self.names[len(self.input_only) :]


class Weights(NamedTuple):
    """One fused kernel for each group of the layout, the biases by name, and the elementwise parameters.

    `turned` are the hidden kernels transposed, for a forward pass that is faster with them on the left.
    """

    hidden: tuple[jax.Array, ...]
    input: tuple[jax.Array, ...]
    biases: Named
    elementwise: PyTree
    turned: tuple[jax.Array, ...] = ()


def layout_of(structure: Structure, theta: PyTree, hidden: PyTree, inputs: PyTree) -> Layout:
    """Reads off, from the shapes of one step, which maps share features and in which order they lie."""
    affine = jax.eval_shape(structure.affine, theta)
    for name, weights in affine.items():
        if weights.hidden_kernel is None and weights.input_kernel is None:
            raise ValueError(f"structure: map {name!r} has no kernel; give it one, or make it elementwise")

    def kind(name: str) -> int:
        return 1 + (affine[name].hidden_kernel is not None) - (affine[name].input_kernel is not None)

    names = sorted(affine, key=kind)
    groups: list[tuple[tuple[str, ...], ...]] = []

    def record(hidden: PyTree, inputs: PyTree) -> None:
        reads_hidden = [name for name in names if affine[name].hidden_kernel is not None]
        reads_inputs = [name for name in names if affine[name].input_kernel is not None]
        groups.append(_sharing(structure.hidden_features(hidden, inputs), reads_hidden))
        groups.append(_sharing(structure.input_features(inputs), reads_inputs))

    jax.eval_shape(record, hidden, inputs)
    widths = tuple((name, next(w.shape[-1] for w in affine[name] if w is not None)) for name in names)
    return Layout(groups[0], groups[1], widths, sum(kind(name) == 0 for name in names))


def _sharing(features: Named, names: list[str]) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(id(features[name]), []).append(name)
    return tuple(tuple(group) for group in groups.values())


def fuse(structure: Structure, layout: Layout, theta: PyTree) -> Weights:
    """θ as the fused weights of `layout`."""
    affine = structure.affine(theta)

    def kernel(group: tuple[str, ...], side: str) -> jax.Array:
        return jnp.concatenate([getattr(affine[name], side) for name in group], axis=-1)

    return Weights(
        hidden=tuple(kernel(group, "hidden_kernel") for group in layout.hidden_groups),
        input=tuple(kernel(group, "input_kernel") for group in layout.input_groups),
        biases={name: bias for name in layout.names if (bias := affine[name].bias) is not None},
        elementwise=structure.elementwise(theta),
    )


def _products(
    layout: Layout, groups: tuple[tuple[str, ...], ...], kernels: tuple[jax.Array, ...], features: Named
) -> Named:
    """``a W`` of every map in these groups, one product a group."""
    values: Named = {}
    for group, kernel in zip(groups, kernels, strict=True):
        values |= layout.split(project(features[group[0]], kernel), group)
    return values


def project_inputs(structure: Structure, layout: Layout, weights: Weights, inputs: PyTree) -> Named:
    """What the maps add from the inputs alone, for all steps at once: ``a′(x) W′``, (T, ..., outputs)."""
    return _products(layout, layout.input_groups, weights.input, jax.vmap(structure.input_features)(inputs))


def project_hidden(
    structure: Structure, layout: Layout, weights: Weights, hidden: PyTree, inputs: PyTree
) -> Named:
    """What the maps add from the hidden state, for one step: ``a(h, x) W``."""
    features = structure.hidden_features(hidden, inputs)
    if not weights.turned:
        return _products(layout, layout.hidden_groups, weights.hidden, features)
    values: Named = {}
    for group, kernel in zip(layout.hidden_groups, weights.turned, strict=True):
        values |= layout.split(matrix_on_the_left(kernel, features[group[0]]), group)
    return values


def forward_step(
    structure: Structure, layout: Layout, weights: Weights, hidden: PyTree, inputs: PyTree, projected: Named
) -> tuple[PyTree, jax.Array]:
    """One transition from projected inputs: hₜ, and the preactivations to save, fused."""
    if not layout.project_first:
        features = structure.input_features(inputs)
        projected = _products(layout, layout.input_groups, weights.input, features)
    values = project_hidden(structure, layout, weights, hidden, inputs)
    preactivations = {}
    for name in layout.names:
        terms = [side[name] for side in (values, projected) if name in side]
        preactivations[name] = add_bias(sum(terms[1:], terms[0]), weights.biases.get(name))
    new_hidden = structure.combine(weights.elementwise, hidden, inputs, preactivations)
    return new_hidden, layout.join(preactivations, layout.saved)


class StepCotangents(NamedTuple):
    """What one backward step yields: of the preactivations, hₜ₋₁, the elementwise parameters, xₜ."""

    deltas: Named
    hidden: PyTree
    elementwise: PyTree
    inputs: list[jax.Array]


def backward_step(
    structure: Structure,
    layout: Layout,
    weights: Weights,
    hidden: PyTree,
    inputs: PyTree,
    projected: Named,
    saved: jax.Array,
    cotangent: PyTree,
) -> StepCotangents:
    """From the cotangent of hₜ to those of everything that step t read, except the weights of its maps."""
    input_leaves, restore = partition_inexact(inputs)
    preactivations = layout.split(saved, layout.saved)
    for name in layout.names:
        if name not in preactivations:
            preactivations[name] = add_bias(projected[name], weights.biases.get(name))

    def combine(
        elementwise: PyTree, hidden: PyTree, leaves: list[jax.Array], preactivations: Named
    ) -> PyTree:
        return structure.combine(elementwise, hidden, restore(leaves), preactivations)

    _, pull_combine = jax.vjp(combine, weights.elementwise, hidden, input_leaves, preactivations)
    elementwise_bar, *direct, deltas = pull_combine(cotangent)
    through_products = _pull_hidden(structure, layout, weights, hidden, inputs, deltas)
    hidden_bar, inputs_bar = jax.tree.map(jnp.add, tuple(direct), through_products)
    return StepCotangents(deltas, hidden_bar, elementwise_bar, inputs_bar)


def _pull_hidden(
    structure: Structure, layout: Layout, weights: Weights, hidden: PyTree, inputs: PyTree, deltas: Named
) -> tuple[PyTree, list[jax.Array]]:
    """The cotangents of hₜ₋₁ and xₜ through `hidden_features` alone: δ Wᵀ, then back through these."""
    input_leaves, restore = partition_inexact(inputs)

    def features(hidden: PyTree, leaves: list[jax.Array]) -> list[jax.Array]:
        by_name = structure.hidden_features(hidden, restore(leaves))
        return [by_name[group[0]] for group in layout.hidden_groups]

    values, pull_features = jax.vjp(features, hidden, input_leaves)
    bars = []
    for group, kernel, value in zip(layout.hidden_groups, weights.hidden, values, strict=True):
        delta = layout.join(deltas, group)
        pulled = matrix_on_the_left(kernel, delta) if left_pays(kernel) else delta @ kernel.T
        bars.append(pulled.astype(value.dtype))
    return pull_features(bars)


def matrix_on_the_left(matrix: jax.Array, vectors: jax.Array) -> jax.Array:
    """``M a`` for every a of `vectors`: (outputs, features) and (..., features) to (..., outputs).

    The same as ``vectors @ matrix.T``, which XLA on a CPU computes 1.3 to 1.9 times as slowly for 2 to 64
    vectors and a large matrix: it is fast where the matrix stands on the left. The first barrier keeps it
    there, since the compiler rewrites (M aᵀ)ᵀ as a Mᵀ; the second makes all that read the result share one
    transposition (measured: `benchmarks/speed`).
    """
    rows = vectors.reshape(-1, vectors.shape[-1])
    product = jax.lax.optimization_barrier(matrix @ rows.T)
    return jax.lax.optimization_barrier(product.T).reshape(*vectors.shape[:-1], matrix.shape[0])


def weight_cotangents(
    structure: Structure,
    layout: Layout,
    weights: Weights,
    hiddens: PyTree,
    inputs: PyTree,
    deltas: Named,
) -> tuple[Weights, list[jax.Array]]:
    """Phase two: the cotangents of all kernels and biases, and of the inputs through their projection.

    Args:
      hiddens: hₜ₋₁ for every step, leaves (T, ...).
      deltas: δₜ of each map, (T, ..., outputs).
    """
    input_leaves, restore = partition_inexact(inputs)
    of_input = {name: deltas[name] for name in _members(layout.input_groups)}
    of_hidden = {name: deltas[name] for name in _members(layout.hidden_groups)}

    # A preactivation is as wide as the widest of its terms, and so is its δ: casts are differentiated too.
    def input_products(kernels: Any, leaves: list[jax.Array]) -> Named:
        products = project_inputs(structure, layout, weights._replace(input=kernels), restore(leaves))
        return cast_like(products, of_input)

    def hidden_products(kernels: Any) -> Named:
        features = jax.vmap(structure.hidden_features)(hiddens, inputs)
        return cast_like(_products(layout, layout.hidden_groups, kernels, features), of_hidden)

    _, pull_input = jax.vjp(input_products, weights.input, input_leaves)
    input_bar, inputs_bar = pull_input(of_input)
    _, pull_hidden = jax.vjp(hidden_products, weights.hidden)
    (hidden_bar,) = pull_hidden(of_hidden)
    biases_bar = {
        name: jnp.sum(_rows(deltas[name]), axis=0).astype(bias.dtype) for name, bias in weights.biases.items()
    }
    no_elementwise = jax.tree.map(jnp.zeros_like, weights.elementwise)
    return Weights(hidden_bar, input_bar, biases_bar, no_elementwise), inputs_bar


def _rows(array: jax.Array) -> jax.Array:
    return array.reshape(-1, array.shape[-1])


def _members(groups: tuple[tuple[str, ...], ...]) -> list[str]:
    return [name for group in groups for name in group]
