"""Structured transitions in the forward direction: immediate influences as outer products.

For hₜ = combine(e, hₜ₋₁, xₜ, p) with p = f W, f = [a(hₜ₋₁, xₜ), a′(xₜ), 1], everything about a step follows
from a few vectors, because `combine` acts unit by unit:

    C = ∂h/∂p,   E = ∂h/∂hₜ₋₁ at fixed p,   ∂h/∂e      (numbers per unit)
    I = C ⊗ f,   D = C Wᵀ ∂a/∂h + E
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import PyTree
from jtrunc.coordinates import Coordinates
from jtrunc.forward.rank_one import squared_norm
from jtrunc.linearize import linear_map, transposed
from jtrunc.structure import Affine, Structure, add_bias, project
from jtrunc.trees import is_inexact, partition_inexact

Named = dict[str, jax.Array]


class Units(NamedTuple):
    """The static part of a structured step: n units with s real numbers of state each, S = s · n.

    Attributes:
      structure: the declaration.
      width: n.
      parts: s; a complex leaf of the state counts twice.
      slots: ``{map: G}``: the map has G · n outputs, G for each unit.
    """

    structure: Structure
    width: int
    parts: int
    slots: dict[str, int]


def read_theta(structure: Structure, theta: PyTree) -> tuple[dict[str, Affine], PyTree]:
    """θ as a structure reads it: the weights of its maps, and the elementwise parameters."""
    return structure.affine(theta), structure.elementwise(theta)


def units_of(structure: Any, theta: PyTree, hidden: PyTree) -> Units | None:
    """The units of a structure on one row of state, or None where the forward shortcuts do not apply.

    They apply where every leaf of the state is floating point of shape (n,), every map is real and has a
    multiple of n outputs, and every elementwise parameter has shape (n,).
    """
    leaves = jax.tree.leaves(hidden)
    if not isinstance(structure, Structure) or not leaves:
        return None
    if any(jnp.ndim(leaf) != 1 or not is_inexact(leaf) for leaf in leaves):
        return None
    width = leaves[0].shape[0]
    affine, elementwise = jax.eval_shape(partial(read_theta, structure), theta)
    kernels = jax.tree.leaves(affine)
    fits = (
        width > 0
        and all(leaf.shape == (width,) for leaf in [*leaves, *jax.tree.leaves(elementwise)])
        and all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in kernels)
        and all(leaf.shape[-1] % width == 0 for leaf in kernels)
    )
    if not fits:
        return None
    slots = {name: jax.tree.leaves(weights)[0].shape[-1] // width for name, weights in affine.items()}
    return Units(structure, width, Coordinates.of(hidden).size // width, slots)


def required_units(owner: str, structure: Any, theta: PyTree, hidden: PyTree) -> Units:
    """`units_of`, or a clear error for an algorithm that cannot do without."""
    units = units_of(structure, theta, hidden)
    if units is None:
        raise ValueError(
            f"{owner}: `system.structure` must be one Structure on a state with leaves of shape (n,), "
            f"not {type(structure).__name__} here; declare it (and take `per_stream` for a "
            "batch), or take `rtrl`, `snap` or `uoro`"
        )
    return units


class UnitStep(NamedTuple):
    """One linearised structured step; all arrays.

    Attributes:
      hidden: hₜ.
      features: ``{map: (F,)}``, f = [a, a′, 1] with the parts that the map has.
      by_map: ``{map: (s, G, n)}``, C.
      by_elementwise: (s, n) for every real coordinate of the elementwise parameters.
      by_hidden: (s, s, n), E: [new part, old part, unit].
    """

    hidden: PyTree
    features: Named
    by_map: Named
    by_elementwise: list[jax.Array]
    by_hidden: jax.Array


def preactivations_of(units: Units, theta: PyTree, hidden: PyTree, inputs: PyTree) -> Named:
    """p of every map, (outputs,)."""
    of_hidden = units.structure.hidden_features(hidden, inputs)
    of_inputs = units.structure.input_features(inputs)
    return {
        name: _affine(weights, of_hidden.get(name), of_inputs.get(name))
        for name, weights in units.structure.affine(theta).items()
    }


def unit_step(
    units: Units, theta: PyTree, hidden: PyTree, inputs: PyTree, preactivations: Named | None = None
) -> UnitStep:
    """Runs one step, from its preactivations where they are known, and takes its derivatives unit by unit."""
    if preactivations is None:
        preactivations = preactivations_of(units, theta, hidden, inputs)
    structure, space = units.structure, Coordinates.of(hidden)
    weights, elementwise = read_theta(structure, theta)
    of_hidden, of_inputs = structure.hidden_features(hidden, inputs), structure.input_features(inputs)
    features = {
        name: _augmented(map_weights, of_hidden.get(name), of_inputs.get(name), space.dtype)
        for name, map_weights in weights.items()
    }
    leaves, restore = partition_inexact(hidden)

    def combine(elementwise: PyTree, leaves: list[jax.Array], preactivations: Named) -> Any:
        return jax.tree.leaves(structure.combine(elementwise, restore(leaves), inputs, preactivations))

    new_leaves, push = linear_map(combine, elementwise, leaves, preactivations)
    no_elementwise, no_leaves, no_map = jax.tree.map(jnp.zeros_like, (elementwise, leaves, preactivations))

    def unit_vector(tangents: Any) -> jax.Array:
        return space.tangent_vector(push(*tangents)).reshape(units.parts, units.width)

    by_map = {}
    for name, slots in units.slots.items():
        columns = []
        for slot in range(slots):
            ones = jnp.zeros_like(preactivations[name]).reshape(slots, -1).at[slot].set(1).ravel()
            columns.append(unit_vector((no_elementwise, no_leaves, no_map | {name: ones})))
        by_map[name] = jnp.stack(columns, axis=1)
    by_elementwise = [unit_vector((basis, no_leaves, no_map)) for basis in _unit_basis(elementwise)]
    by_hidden = [unit_vector((no_elementwise, basis, no_map)) for basis in _unit_basis(leaves)]
    new_hidden = jax.tree.unflatten(jax.tree.structure(hidden), new_leaves)
    return UnitStep(new_hidden, features, by_map, by_elementwise, jnp.stack(by_hidden, axis=1))


def _affine(weights: Affine, of_hidden: Any, of_inputs: Any) -> jax.Array:
    terms = []
    if weights.hidden_kernel is not None:
        terms.append(project(of_hidden, weights.hidden_kernel))
    if weights.input_kernel is not None:
        terms.append(project(of_inputs, weights.input_kernel))
    return add_bias(sum(terms[1:], terms[0]), weights.bias)


def _augmented(weights: Affine, of_hidden: Any, of_inputs: Any, dtype: Any) -> jax.Array:
    parts = []
    for kernel, feature in ((weights.hidden_kernel, of_hidden), (weights.input_kernel, of_inputs)):
        if kernel is not None:
            if jnp.issubdtype(feature.dtype, jnp.integer):
                feature = jax.nn.one_hot(feature, kernel.shape[0], dtype=dtype)
            parts.append(feature.astype(dtype))
    if weights.bias is not None:
        parts.append(jnp.ones(1, dtype))
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _unit_basis(tree: PyTree) -> list[PyTree]:
    """Tangents that move one real part of one leaf, in all units at once."""
    leaves, treedef = jax.tree.flatten(tree)
    basis = []
    for index, leaf in enumerate(leaves):
        directions = (1, 1j) if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else (1,)
        for direction in directions:
            tangents = [jnp.zeros_like(other) for other in leaves]
            tangents[index] = jnp.full_like(leaf, direction)
            basis.append(jax.tree.unflatten(treedef, tangents))
    return basis


def preactivation_jacobian(units: Units, theta: PyTree, hidden: PyTree, inputs: PyTree) -> Named:
    """∂p/∂hₜ₋₁ of every map that reads the hidden state: ``{map: (outputs, S)}``.

    The rows of Wᵀ are pulled through the features; where a feature is a leaf of the state this is Wᵀ itself.
    """
    space = Coordinates.of(hidden)
    leaves, restore = partition_inexact(hidden)
    jacobians = {}
    for name, weights in units.structure.affine(theta).items():
        if weights.hidden_kernel is not None:
            pull = transposed(
                lambda leaves, name=name: units.structure.hidden_features(restore(leaves), inputs)[name],
                leaves,
            )
            dtype = jax.eval_shape(units.structure.hidden_features, hidden, inputs)[name].dtype
            rows = jax.vmap(lambda row, pull=pull: space.cotangent_vector(pull(row)))
            jacobians[name] = rows(weights.hidden_kernel.T.astype(dtype))
    return jacobians


def state_jacobian(units: Units, theta: PyTree, step: UnitStep, hidden: PyTree, inputs: PyTree) -> jax.Array:
    """D = C Wᵀ ∂a/∂h + E, (S, S)."""
    size, width = units.parts * units.width, units.width
    jacobian = jnp.einsum("abi,ij->aibj", step.by_hidden, jnp.eye(width, dtype=step.by_hidden.dtype))
    jacobian = jacobian.reshape(size, size)
    for name, rows in preactivation_jacobian(units, theta, hidden, inputs).items():
        rows = rows.reshape(units.slots[name], width, size)
        scaled = jnp.sum(step.by_map[name][..., None] * rows[None], axis=1)
        jacobian = jacobian + scaled.reshape(size, size)
    return jacobian


def map_cotangents(units: Units, step: UnitStep, cotangent: jax.Array) -> Named:
    """δ = Cᵀ c for every map, (outputs,)."""
    parts = cotangent.reshape(units.parts, 1, units.width)
    return {name: jnp.sum(parts * by_map, axis=0).ravel() for name, by_map in step.by_map.items()}


class Weights(NamedTuple):
    """Cotangents in the coordinates of a structure: ``{map: (F, outputs)}``, and the elementwise ones."""

    maps: Named
    elementwise: list[jax.Array]


def pull_weights(units: Units, step: UnitStep, cotangent: jax.Array) -> Weights:
    """cᵀ I in the coordinates of the structure: f ⊗ δ for every map."""
    deltas = map_cotangents(units, step, cotangent)
    maps = {name: step.features[name][:, None] * delta[None] for name, delta in deltas.items()}
    parts = cotangent.reshape(units.parts, units.width)
    return Weights(maps, [jnp.sum(parts * by, axis=0) for by in step.by_elementwise])


def theta_cotangent(units: Units, theta: PyTree, weights: Weights) -> PyTree:
    """A tree like θ from cotangents in the coordinates of the structure (one real number each)."""
    (affine, elementwise), pull = _coordinates_of_theta(units, theta)
    bars = {name: split_features(affine[name], array) for name, array in weights.maps.items()}
    bars = jax.tree.map(lambda bar, like: bar.astype(like.dtype), bars, affine)
    space = Coordinates.of(elementwise)
    leaves, treedef = jax.tree.flatten(elementwise)
    vector = jnp.concatenate([jnp.zeros(0, space.dtype), *weights.elementwise])
    return pull((bars, jax.tree.unflatten(treedef, space.cotangents(vector) if leaves else [])))


def _coordinates_of_theta(units: Units, theta: PyTree) -> tuple[Any, Any]:
    read = partial(read_theta, units.structure)
    return jax.eval_shape(read, theta), transposed(read, theta)


def in_coordinates(units: Units, theta: PyTree, tree: PyTree) -> tuple[dict[str, Affine], PyTree]:
    """A tree like θ in the coordinates of the structure."""
    tangents = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), tree, theta)
    return linear_map(partial(read_theta, units.structure), theta)[1](tangents)


def split_features(weights: Affine, array: jax.Array) -> Affine:
    """Rows of an array (F, outputs) as the parts of a map: hidden kernel, input kernel, bias."""
    start, parts = 0, []
    for kernel in weights[:2]:
        stop = start + (0 if kernel is None else kernel.shape[0])
        parts.append(None if kernel is None else array[start:stop])
        start = stop
    return Affine(*parts, bias=None if weights.bias is None else array[start])


def join_features(weights: Affine) -> jax.Array:
    """The parts of a map as one array (F, outputs)."""
    parts = [kernel for kernel in weights[:2] if kernel is not None]
    if weights.bias is not None:
        parts.append(weights.bias[None])
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def num_features(weights: Affine) -> int:
    """F of a map."""
    return sum(math.prod(part.shape[:-1]) for part in weights if part is not None)


def unit_sums(units: Units, theta: PyTree, tree: PyTree) -> jax.Array:
    """Sums of a real tree like θ over the parameters of each unit, (n,)."""
    affine, elementwise = in_coordinates(units, theta, tree)
    dtype = jnp.result_type(jnp.float32, *[leaf.real for leaf in jax.tree.leaves((affine, elementwise))])
    total = jnp.zeros(units.width, dtype)
    for leaf in jax.tree.leaves(elementwise):
        total = total + leaf.real
    for name, weights in affine.items():
        columns = jnp.sum(join_features(weights), axis=0)
        total = total + jnp.sum(columns.reshape(units.slots[name], units.width), axis=0)
    return total


def is_rearrangement(units: Units, theta: PyTree) -> bool:
    """Whether the structure uses each entry of θ once at most: norms are then the same in its coordinates.

    Asked at numbers between 1 and 2, where the derivative of a product of parameters is neither 0 nor 1.
    """
    with jax.ensure_compile_time_eval():
        (affine, elementwise), pull = _coordinates_of_theta(units, jax.tree.map(_between_one_and_two, theta))
        ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), (affine, elementwise))
        uses = [jnp.abs(leaf) for leaf in jax.tree.leaves(pull(ones))]
        return all(bool(((leaf == 0) | (leaf == 1)).all()) for leaf in uses)


def _between_one_and_two(leaf: jax.Array) -> jax.Array:
    fractions = (jnp.arange(leaf.size) + 1) / (leaf.size + 1)
    return (1 + fractions).reshape(leaf.shape).astype(leaf.dtype)


def pulled_norm(units: Units, step: UnitStep, cotangent: jax.Array) -> jax.Array:
    """‖cᵀ I‖, from factors alone: ‖f ⊗ δ‖ = ‖f‖ ‖δ‖."""
    deltas = map_cotangents(units, step, cotangent)
    outer = sum(squared_norm(step.features[name]) * squared_norm(deltas[name]) for name in deltas)
    parts = cotangent.reshape(units.parts, units.width)
    return jnp.sqrt(outer + squared_norm([jnp.sum(parts * by, axis=0) for by in step.by_elementwise]))


def row_norms(step: UnitStep) -> jax.Array:
    """‖wᵢ‖ of the rows of I, (S,), from factors alone."""
    squares = sum(jnp.square(by) for by in step.by_elementwise)
    for name, by_map in step.by_map.items():
        squares = squares + jnp.sum(jnp.square(by_map), axis=1) * squared_norm(step.features[name])
    return jnp.sqrt(squares).reshape(-1)
