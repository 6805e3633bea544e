"""Quasi-diagonal matrices against dense NumPy ones, and which bias belongs to which weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import jtrunc
from jtrunc.optimizers import quasi_diagonal
from jtrunc.optimizers.layout import layout_of, path_of
from tests.compare import differ

WEIGHTS, UNITS = 3, 2


def dense(
    generator: np.random.Generator, weights: int = WEIGHTS, units: int = UNITS, dtype: Any = float
) -> Any:
    """Random parameters (or gradients) of one affine map with biases."""
    shapes = {"bias": (units,), "kernel": (weights, units)}
    return {name: jnp.asarray(generator.normal(size=shape), dtype) for name, shape in shapes.items()}


def unit(tree: Any, i: int) -> np.ndarray:
    """The bias and then the weights of unit i."""
    return np.concatenate([np.asarray(tree["bias"])[i : i + 1], np.asarray(tree["kernel"])[:, i]])


def completed(matrix: np.ndarray) -> np.ndarray:
    """Rows and diagonal of the bias and the diagonal as in `matrix`; the rest M₀ⱼ M₀ₖ/M₀₀."""
    kept = np.outer(matrix[:, 0], matrix[0]) / matrix[0, 0]
    np.fill_diagonal(kept, np.diag(matrix))
    return kept


def grown(gradients: list[Any], decay: float) -> Any:
    factors = quasi_diagonal.zeros(gradients[0])
    for gradient in gradients:
        factors = quasi_diagonal.accumulate(factors, gradient, jnp.asarray(decay))
    return factors


def prior_like(tree: Any, value: float) -> Any:
    return jax.tree.map(lambda leaf: jnp.full((), value, leaf.real.dtype), tree)


@pytest.mark.parametrize("is_complex", [False, True])
def test_solve_is_the_inverse_of_the_completed_matrix(is_complex: bool) -> None:
    generator = np.random.default_rng(1)
    gradients = [dense(generator) for _ in range(5)]
    if is_complex:
        gradients = [jax.tree.map(lambda a, b: a + 1j * b, g, dense(generator)) for g in gradients]
    v = gradients[-1]
    metric = quasi_diagonal.inverse(grown(gradients, 0.3), prior_like(v, 0.7))
    solved = jax.tree.map(np.asarray, quasi_diagonal.solve(metric, v))
    norms = 0.0
    for i in range(UNITS):
        matrix = sum(
            0.7 ** (4 - t) * np.outer(unit(g, i), unit(g, i).conj()) for t, g in enumerate(gradients)
        )
        matrix = np.asarray(matrix) + 0.7 * np.eye(1 + WEIGHTS)
        expected = np.linalg.solve(completed(matrix), unit(v, i))
        np.testing.assert_allclose(unit(solved, i), expected, rtol=1e-12)
        norms += (unit(v, i).conj() @ expected).real
        # Neither the full matrix nor its diagonal: both are far off.
        assert differ(np.linalg.solve(matrix, unit(v, i)), expected, by=0.05)
        assert differ(unit(v, i) / np.diag(matrix), expected, by=0.05)
    np.testing.assert_allclose(quasi_diagonal.squared_norm(metric, v), norms, rtol=1e-12)


def test_one_weight_a_unit_is_solved_exactly() -> None:
    generator = np.random.default_rng(2)
    gradients = [dense(generator, weights=1) for _ in range(3)]
    metric = quasi_diagonal.inverse(grown(gradients, 0.0), prior_like(gradients[0], 0.1))
    solved = quasi_diagonal.solve(metric, gradients[0])
    for i in range(UNITS):
        matrix = sum(np.outer(unit(g, i), unit(g, i)) for g in gradients) + 0.1 * np.eye(2)
        np.testing.assert_allclose(
            unit(solved, i), np.linalg.solve(matrix, unit(gradients[0], i)), rtol=1e-12
        )


def test_the_completed_matrix_keeps_each_two_by_two_block_and_has_the_largest_determinant() -> None:
    generator = np.random.default_rng(3)
    gradients = [dense(generator, units=1) for _ in range(6)]
    metric = quasi_diagonal.inverse(grown(gradients, 0.0), prior_like(gradients[0], 0.0))
    restore = ravel_pytree(gradients[0])[1]
    basis = jax.vmap(lambda v: ravel_pytree(quasi_diagonal.solve(metric, restore(v)))[0])
    inverse = np.asarray(basis(jnp.eye(1 + WEIGHTS)))
    np.testing.assert_allclose(inverse, inverse.T, rtol=1e-12)
    assert np.linalg.eigvalsh(inverse).min() > 0
    matrix = np.sum([np.outer(unit(g, 0), unit(g, 0)) for g in gradients], axis=0)
    kept = np.linalg.inv(inverse)
    np.testing.assert_allclose(kept[0], matrix[0], rtol=1e-10)
    np.testing.assert_allclose(np.diag(kept), np.diag(matrix), rtol=1e-10)
    assert differ(kept[1:, 1:], matrix[1:, 1:], by=0.1)
    assert np.linalg.det(kept) > 1.01 * np.linalg.det(matrix)


def test_reduce_and_expand_are_transposes() -> None:
    generator = np.random.default_rng(4)
    metric = quasi_diagonal.inverse(
        grown([dense(generator) for _ in range(4)], 0.1), prior_like(dense(generator), 1.0)
    )
    v, w = dense(generator), dense(generator)
    left = optax.tree.vdot(quasi_diagonal.reduce(metric, v), w)
    np.testing.assert_allclose(left, optax.tree.vdot(v, quasi_diagonal.expand(metric, w)), rtol=1e-12)
    assert differ(left, optax.tree.vdot(v, quasi_diagonal.reduce(metric, w)))


def test_float32_stays_positive_where_differences_of_entries_would_not() -> None:
    """An input that is nearly constant: M₀ₖ² is M₀₀Mₖₖ but for one part in 10⁸."""
    generator = np.random.default_rng(5)
    bias = generator.normal(size=(1000, 1)).astype(np.float32)
    kernel = (bias * (1 + 1e-4 * generator.normal(size=bias.shape)))[:, None].astype(np.float32)
    start = quasi_diagonal.zeros({"bias": bias[0], "kernel": kernel[0]})
    grow = jax.jit(lambda factors, g: (quasi_diagonal.accumulate(factors, g, jnp.float32(0)), ()))
    factors, _ = jax.lax.scan(grow, start, {"bias": bias, "kernel": kernel})
    x, y = bias.astype(np.float64).ravel(), kernel.astype(np.float64).ravel()
    exact = (y @ y) - (x @ y) ** 2 / (x @ x)
    assert factors.pivots["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(factors.pivots["kernel"].item(), exact, rtol=1e-2)
    naive = np.float32(y @ y) - np.float32(x @ y) ** 2 / np.float32(x @ x)
    assert abs(naive - exact) > 0.5 * exact


def biases_by_name(params: Any) -> dict[str, str | None]:
    names = ["/".join(map(str, path_of(path))) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return {
        name: None if bias is None else names[bias]
        for name, bias in zip(names, layout_of(params).biases, strict=True)
        if "bias" not in name
    }


def test_which_bias_belongs_to_which_weights() -> None:
    key = jax.random.key(0)
    cells = jtrunc.cells
    net = cells.model(cells.stack([cells.gru(2, 3), cells.tanh(3, 4)]), 2, cells.softmax_cross_entropy)
    assert biases_by_name(net.init(key)) == {
        "recurrent/0/candidate/hidden_kernel": "recurrent/0/candidate/hidden_bias",
        "recurrent/0/candidate/input_kernel": "recurrent/0/candidate/bias",
        "recurrent/0/gates/hidden_kernel": "recurrent/0/gates/bias",
        "recurrent/0/gates/input_kernel": "recurrent/0/gates/bias",
        "recurrent/1/hidden_kernel": "recurrent/1/bias",
        "recurrent/1/input_kernel": "recurrent/1/bias",
        "readout/kernel": "readout/bias",
    }
    assert biases_by_name({"embedding": jnp.ones((3, 2)), "kernel": jnp.ones((2, 2))}) == {
        "embedding": None,
        "kernel": None,
    }


def test_which_bias_belongs_to_which_weights_in_flax_cells() -> None:
    import flax.linen as nn
    from flax import nnx

    x, c = jnp.zeros((1, 2)), jnp.zeros((1, 3))
    linen_params = {
        cell: jax.eval_shape(module(3).init, jax.random.key(0), carry, x)["params"]
        for cell, module, carry in [("lstm", nn.LSTMCell, (c, c)), ("gru", nn.GRUCell, c)]
    }
    lstm, gru = biases_by_name(linen_params["lstm"]), biases_by_name(linen_params["gru"])
    assert lstm == {f"{side}{gate}/kernel": f"h{gate}/bias" for side in "hi" for gate in "ifgo"}
    assert gru == {f"{side}{gate}/kernel": f"i{gate}/bias" for side in "hi" for gate in "rz"} | {
        "hn/kernel": "hn/bias",
        "in/kernel": "in/bias",
    }
    params = nnx.to_pure_dict(nnx.state(nnx.LSTMCell(2, 3, rngs=nnx.Rngs(0)), nnx.Param))
    names = {"i": "ii", "f": "if_", "g": "ig", "o": "io"}
    assert biases_by_name(params) == {f"h{gate}/kernel": f"h{gate}/bias" for gate in "ifgo"} | {
        f"{name}/kernel": f"h{gate}/bias" for gate, name in names.items()
    }
