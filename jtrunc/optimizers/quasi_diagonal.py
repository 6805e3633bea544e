"""Quasi-diagonal matrices over a tree of parameters: what a unit's bias has to do with its weights.

A unit is one output of an affine map, p = v₀ + Σₖ vₖ xₖ: its bias is entry 0, its incoming weights are the
entries k. Of a symmetric positive definite matrix M over these parameters, one block a unit, only M₀₀, M₀ₖ
and Mₖₖ are kept. Let A be the map ``v₀ ↦ v₀, vₖ ↦ vₖ − mₖ v₀`` with the slopes mₖ = M₀ₖ/M₀₀, and Dₖ = Mₖₖ −
M₀ₖ²/M₀₀ the Schur complements. Take

    Q = A⁻¹ diag(M₀₀, D₁, D₂, …) A⁻ᵀ,    so that    Q⁻¹ = Aᵀ diag(1/M₀₀, 1/D₁, 1/D₂, …) A.

Since A⁻¹ adds mₖ v₀ to vₖ, Q₀₀ = M₀₀, Q₀ₖ = mₖ M₀₀ = M₀ₖ and Qₖₖ = Dₖ + mₖ² M₀₀ = Mₖₖ: Q is M on the 2×2
block of each weight with its bias. The entries that were not kept become Qⱼₖ = M₀ⱼ M₀ₖ/M₀₀, and Q⁻¹ has zeros
there: of all matrices with these entries Q has the largest determinant (Dempster 1972). M > 0 gives M₀₀ > 0
and Dₖ > 0, hence Q > 0. All costs are linear in the number of parameters.

Inputs in other units, x′ₖ = αₖ xₖ + βₖ, turn gradients into v′ₖ = αₖ vₖ + βₖ v₀, hence m′ₖ = αₖ mₖ + βₖ and
D′ₖ = αₖ² Dₖ: the same step in other coordinates. A diagonal matrix knows αₖ but not βₖ.

Complex parameters: M is Hermitian, M₀ₖ stands for E[vₖ v̄₀], and transposes are conjugated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtrunc.base import PyTree
from jtrunc.optimizers.layout import BiasOf, Layout, layout_of, path_of
from jtrunc.trees import cast_like, wide_dtype


class QuasiDiagonal(NamedTuple):
    """The inverse Q⁻¹ = Aᵀ diag(scales) A of a quasi-diagonal matrix, over a tree of parameters.

    Attributes:
      slopes: a tree like the parameters: mₖ for weights with a bias (their shape), else a scalar 0.
      scales: a tree like the parameters: 1/M₀₀ for biases, 1/Dₖ for weights with a bias, 1/Mₖₖ for leaves
        without one; real, in the shapes of the parameters. Both are float32 or wider.
      layout: which leaf is the bias of which.
    """

    slopes: PyTree
    scales: PyTree
    layout: Layout


class Factors(NamedTuple):
    """A quasi-diagonal matrix J = A⁻¹ diag(pivots) A⁻ᵀ ≥ 0 that grows by outer products.

    Attributes:
      slopes: mₖ = J₀ₖ/J₀₀, as in `QuasiDiagonal`.
      pivots: J₀₀ for biases, Dₖ = Jₖₖ − J₀ₖ²/J₀₀ for weights with a bias, Jₖₖ for leaves without one.
      layout: which leaf is the bias of which.
    """

    slopes: PyTree
    pivots: PyTree
    layout: Layout


def identity(params: PyTree, bias_of: BiasOf | None = None) -> QuasiDiagonal:
    """The Euclidean metric: slopes 0, scales 1.

    Args:
      params: a tree of floating-point arrays, such as ``params.recurrent``.
      bias_of: which bias belongs to a leaf; default: `sibling_bias`.

    Raises:
      TypeError, ValueError: a leaf that is not floating point; a bias that does not fit (see `layout_of`).

    Example:

      >>> metric = identity({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
      >>> metric.layout.biases, float(squared_norm(metric, metric.scales))
      ((None, 0), 9.0)
    """
    layout = layout_of(params, bias_of)
    scales = jax.tree.map(lambda leaf: jnp.ones(jnp.shape(leaf), _real(leaf)), params)
    return QuasiDiagonal(_slopes(params, layout), scales, layout)


def zeros(params: PyTree, bias_of: BiasOf | None = None) -> Factors:
    """J = 0 over `params`, float32 or wider; arguments and errors as for `identity`."""
    layout = layout_of(params, bias_of)
    pivots = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), _real(leaf)), params)
    return Factors(_slopes(params, layout), pivots, layout)


def reduce(metric: QuasiDiagonal, v: PyTree) -> PyTree:
    """A v: subtract from each entry its slope times the bias entry of its unit.

        (A v)₀ = v₀,    (A v)ₖ = vₖ − mₖ v₀

    Args:
      v: a tree like the parameters.

    Returns:
      The same tree, float32 or wider.

    Raises:
      ValueError: a tree of another structure or of other shapes.

    Example:

      >>> metric = QuasiDiagonal({"bias": 0.0, "kernel": jnp.array([[2.0]])}, None, Layout((None, 0)))
      >>> metric = metric._replace(scales={"bias": jnp.array([1.0]), "kernel": jnp.array([[0.5]])})
      >>> v = {"bias": jnp.array([1.0]), "kernel": jnp.array([[5.0]])}
      >>> reduce(metric, v)["kernel"].item(), expand(metric, v)["bias"].item()
      (3.0, -9.0)
    """
    leaves = _matching(metric.scales, v)
    slopes = jax.tree.leaves(metric.slopes)
    reduced = [
        leaf if bias is None else leaf - slope * _per_weight(leaves[bias], leaf)
        for leaf, slope, bias in zip(leaves, slopes, metric.layout.biases, strict=True)
    ]
    return _in_structure(metric.scales, reduced)


def expand(metric: QuasiDiagonal, v: PyTree) -> PyTree:
    """Aᵀ v, the transpose of `reduce`: subtract from each bias the slopes times its unit's weights.

        (Aᵀ v)₀ = v₀ − Σₖ m̄ₖ vₖ,    (Aᵀ v)ₖ = vₖ

    Arguments, result, errors and an example as for `reduce`.
    """
    leaves = _matching(metric.scales, v)
    expanded = list(leaves)
    for leaf, slope, bias in zip(leaves, jax.tree.leaves(metric.slopes), metric.layout.biases, strict=True):
        if bias is not None:
            over_weights = tuple(range(leaf.ndim - leaves[bias].ndim))
            expanded[bias] = expanded[bias] - jnp.sum(jnp.conj(slope) * leaf, axis=over_weights)
    return _in_structure(metric.scales, expanded)


def solve(metric: QuasiDiagonal, v: PyTree) -> PyTree:
    """Q⁻¹ v = Aᵀ (scales · A v); arguments, result and errors as for `reduce`."""
    return expand(metric, jax.tree.map(jnp.multiply, metric.scales, reduce(metric, v)))


def squared_norm(metric: QuasiDiagonal, v: PyTree) -> jax.Array:
    """vᵀ Q⁻¹ v = Σ scales · |A v|², a real scalar, positive for v ≠ 0: the norm of Appendix B, eq. 59.

    Arguments and errors as for `reduce`.
    """
    terms = jax.tree.map(
        lambda scale, leaf: jnp.sum(scale * _squared(leaf)), metric.scales, reduce(metric, v)
    )
    return jnp.asarray(sum(jax.tree.leaves(terms), jnp.float32(0)))


def accumulate(factors: Factors, gradient: PyTree, decay: jax.Array) -> Factors:
    """J ← (1 − γ) J + MatrixReduce(g gᵀ), on the factors (paper, eq. 24 and 26 with outer products).

    With a = (1 − γ) J₀₀ and the residuals rₖ = gₖ − mₖ g₀ under the old slopes:

        J₀₀ ← a + g₀²,    mₖ ← mₖ + rₖ g₀/J₀₀,    Dₖ ← (1 − γ) Dₖ + rₖ² a/J₀₀

    the one-pass recursion of a weighted regression of gₖ on g₀ (West 1979). No term is negative, so that J
    stays positive semidefinite in floating point too, where Jₖₖ − J₀ₖ²/J₀₀ would cancel.

    Args:
      gradient: g, a tree like the parameters.
      decay: γ in [0, 1], a real scalar.

    Raises:
      ValueError: a gradient of another structure or of other shapes.
    """
    g = _matching(factors.pivots, gradient)
    old_slopes, old_pivots = jax.tree.leaves(factors.slopes), jax.tree.leaves(factors.pivots)
    decayed = [(1 - decay.astype(pivot.dtype)) * pivot for pivot in old_pivots]
    slopes, pivots = [], []
    for k, bias in enumerate(factors.layout.biases):
        slope, residual, share = old_slopes[k], g[k], 1
        if bias is not None:
            total = decayed[bias] + _squared(g[bias])
            gain = jnp.where(total == 0, 0, jnp.conj(g[bias]) / total)
            residual = g[k] - slope * _per_weight(g[bias], g[k])
            slope = slope + residual * _per_weight(gain, g[k])
            share = _per_weight(jnp.where(total == 0, 1, decayed[bias] / total), g[k])
        slopes.append(slope)
        pivots.append(decayed[k] + share * _squared(residual))
    return Factors(_like(factors.slopes, slopes), _like(factors.pivots, pivots), factors.layout)


def inverse(factors: Factors, prior: PyTree) -> QuasiDiagonal:
    """(J + Λ)⁻¹ for a diagonal Λ ≥ 0.

        M₀₀ = J₀₀ + λ₀,    M₀ₖ/M₀₀ = mₖ J₀₀/M₀₀,    Mₖₖ − M₀ₖ²/M₀₀ = Dₖ + λₖ + mₖ² J₀₀ λ₀/M₀₀

    An entry of which nothing is known, neither from J nor from Λ (a pivot of exactly 0), gets scale 0: it
    does not move. A pivot that is not finite gives a scale of nan, so that an overflow shows.

    Args:
      prior: Λ, a tree like the parameters, each leaf a scalar or in the shape of the parameter.
    """
    pivots, slopes = jax.tree.leaves(factors.pivots), jax.tree.leaves(factors.slopes)
    priors = [_wide(leaf) for leaf in jax.tree.leaves(prior)]
    totals = [pivot + diagonal.astype(pivot.dtype) for pivot, diagonal in zip(pivots, priors, strict=True)]
    for k, bias in enumerate(factors.layout.biases):
        if bias is not None:
            known = jnp.where(totals[bias] == 0, 0, pivots[bias] / totals[bias])
            shrunk = slopes[k] * _per_weight(known, pivots[k])
            from_bias = jnp.broadcast_to(priors[bias].astype(known.dtype), known.shape)
            # |m · shrunk| and not |m|² · …: a slope that stands for a tiny J₀₀ would overflow.
            totals[k] = totals[k] + jnp.abs(shrunk) * jnp.abs(slopes[k]) * _per_weight(from_bias, pivots[k])
            slopes[k] = shrunk
    scales = [_reciprocal(total) for total in totals]
    return QuasiDiagonal(_like(factors.slopes, slopes), _like(factors.pivots, scales), factors.layout)


def _matching(like: PyTree, v: PyTree) -> list[jax.Array]:
    """The leaves of `v`, float32 or wider, if it has the structure and shapes of `like`."""
    if jax.tree.structure(v) != jax.tree.structure(like):
        raise ValueError(
            f"quasi-diagonal: the tree has structure {jax.tree.structure(v)}, not that of the parameters, "
            f"{jax.tree.structure(like)}; pass a gradient of the same parameters"
        )
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(v), jax.tree.leaves(like), strict=True
    ):
        if jnp.shape(leaf) != jnp.shape(other):
            raise ValueError(
                f"quasi-diagonal: the leaf {path_of(path)} has shape {jnp.shape(leaf)}, its parameter "
                f"{jnp.shape(other)}; pass a gradient of the same parameters (jax.vmap for many)"
            )
    return [_wide(leaf) for leaf in jax.tree.leaves(v)]


def _slopes(params: PyTree, layout: Layout) -> PyTree:
    leaves, treedef = jax.tree.flatten(params)
    pairs = zip(leaves, layout.biases, strict=True)
    shapes = [() if bias is None else jnp.shape(leaf) for leaf, bias in pairs]
    slopes = [jnp.zeros(shape, wide_dtype(leaf)) for shape, leaf in zip(shapes, leaves, strict=True)]
    return jax.tree.unflatten(treedef, slopes)


def _per_weight(bias: jax.Array, leaf: jax.Array) -> jax.Array:
    """A value per unit, with the axes that broadcast it to the unit's weights."""
    return jnp.expand_dims(bias, tuple(range(leaf.ndim - bias.ndim)))


def _reciprocal(pivot: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(pivot), jnp.where(pivot == 0, 0, 1 / pivot), jnp.nan)


def _squared(leaf: jax.Array) -> jax.Array:
    return jnp.square(leaf.real) + jnp.square(leaf.imag) if jnp.iscomplexobj(leaf) else jnp.square(leaf)


def _wide(leaf: Any) -> jax.Array:
    return jnp.asarray(leaf, wide_dtype(leaf))


def _real(leaf: Any) -> Any:
    return jnp.zeros((), wide_dtype(leaf)).real.dtype


def _in_structure(tree: PyTree, leaves: list[jax.Array]) -> PyTree:
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _like(tree: PyTree, leaves: list[jax.Array]) -> PyTree:
    """The leaves in the structure of `tree`, and in its dtypes, which a unit may mix."""
    return cast_like(_in_structure(tree, leaves), tree)
