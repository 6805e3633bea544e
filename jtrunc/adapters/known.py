"""The declared structure of flax's own cells: simple, LSTM and GRU (same mathematics in linen and nnx)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc.base import PyTree
from jtrunc.cells.gated import AffineMaps, Elementwise, gru_structure, lstm_structure
from jtrunc.structure import Structure


class Form(NamedTuple):
    """What is known of one of flax's own cells.

    Attributes:
      structure: the declaration, whose `input_features` reads the plain xₜ.
      functions: its gate and activation functions; the structure holds if they are elementwise.
      dtype: what the cell was told to compute in, or None (promote as numpy does).
    """

    structure: Structure
    functions: tuple[Elementwise, ...]
    dtype: Any


def simple(affine: AffineMaps, activation: Elementwise, residual: bool) -> Structure:
    """hₜ = φ(Wᵢ xₜ + Wₕ hₜ₋₁ + b), with `residual` φ(Wᵢ xₜ + Wₕ hₜ₋₁ + b + hₜ₋₁); one map, "units"."""

    def combine(elementwise: PyTree, hidden: jax.Array, inputs: PyTree, p: dict[str, jax.Array]) -> jax.Array:
        return activation(p["units"] + hidden if residual else p["units"])

    return Structure(
        affine=affine,
        hidden_features=lambda hidden, inputs: {"units": hidden},
        input_features=lambda x: {"units": x},
        combine=combine,
    )


lstm = lstm_structure
gru = gru_structure


def usable(form: Form | None, params: PyTree, carry: PyTree, x: PyTree) -> Structure | None:
    """The form's structure where it equals the cell to rounding: elementwise functions, one dtype; else None.

    An xₜ of another dtype than the example's is promoted as flax does.
    """
    if form is None or not isinstance(x, jax.Array):
        return None
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((params, carry, x))}
    if len(dtypes) != 1 or (form.dtype is not None and jnp.dtype(form.dtype) not in dtypes):
        return None
    (dtype,) = dtypes
    if not all(is_elementwise(function, dtype) for function in form.functions):
        return None

    def input_features(x: jax.Array) -> dict[str, jax.Array]:
        promoted = form.dtype if form.dtype is not None else jnp.promote_types(x.dtype, dtype)
        return form.structure.input_features(jnp.asarray(x, promoted))

    return form.structure._replace(input_features=input_features)


def is_elementwise(function: Elementwise, dtype: Any) -> bool:
    """Whether a function gives each number of an array what it gives that number alone.

    Tried on 3 × 4 numbers of both signs, so that functions of a whole row, column or array are found out.
    A function that fails on them counts as not elementwise: the cell then runs as flax wrote it.
    """
    probe = np.linspace(-2.7, 3.1, 12).reshape(4, 3).T
    with jax.ensure_compile_time_eval():
        try:
            together = function(jnp.asarray(probe, dtype))
            alone = [function(jnp.full((1, 1), value, dtype)) for value in probe.ravel()]
            if together.shape != probe.shape or together.dtype != dtype:
                return False
            alone = np.asarray(jnp.stack(alone).astype(jnp.float32)).reshape(probe.shape)
            together = np.asarray(together.astype(jnp.float32))
        except Exception:  # whatever a stranger's function may raise
            return False
    tolerance = 8 * float(jnp.finfo(dtype).eps)
    return np.allclose(together, alone, rtol=tolerance, atol=tolerance)
