"""What the tests of the forward family share: given signs, influences read off gradients, windows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tests.forward_reference as forward
from tests import reference, systems
from tests.forward_reference import AffineMap
from tests.reference import to_vector
from tests.systems import Case


class Given:
    """A `noise` that hands out arrays set beforehand, in the order in which a step draws them.

    They come around again, because a step may be traced more than once.
    """

    def __init__(self) -> None:
        self.draws: list[jax.Array] = []

    def set(self, draws: Any) -> None:
        self.draws = list(draws)

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        draw = self.draws.pop(0)
        self.draws.append(draw)
        assert draw.shape == shape, (draw.shape, shape)
        return draw.astype(dtype)


def drawn_influences(
    make: Callable[..., Any],
    case: Case,
    patterns: tuple[np.ndarray, ...],
    *,
    chunk: int = 1,
    start: Callable[[Any], Any] = lambda state: state,
) -> np.ndarray:
    """(patterns, T, S, p): the influence that each step uses, for every pattern of signs.

    Args:
      make: ``(system, noise=...) -> estimator``.
      patterns: one array (patterns, updates, ...) for each draw of an update.
      chunk: steps an update.
      start: changes the first state.
    """
    given = Given()
    estimator = make(systems.exposed(case), noise=given)
    state = start(estimator.init(case.params, case.hidden, jax.random.key(0)))
    inputs = jax.tree.map(lambda leaf: leaf.reshape(-1, chunk, *leaf.shape[1:]), case.inputs)

    def rows(pattern: tuple[jax.Array, ...], weights: jax.Array) -> jax.Array:
        def step(state: Any, row: Any) -> Any:
            window, draws = row
            given.set(draws)
            estimate, state = estimator.update(case.params, state, (window, weights))
            return state, vector(estimate.grads.recurrent)

        return jax.lax.scan(step, state, (inputs, pattern))[1]

    # One weight vector for each number of the state and each step of an update.
    size = to_vector(case.hidden).size
    weights = jnp.eye(chunk * size).reshape(-1, chunk, size)
    over_weights = jax.vmap(rows, (None, 0))
    seen = np.asarray(jax.jit(jax.vmap(over_weights, (0, None)))(patterns, weights))
    seen = seen.reshape(len(seen), chunk, size, -1, seen.shape[-1])
    return np.moveaxis(seen, 3, 1).reshape(len(seen), -1, size, seen.shape[-1])


def walk(estimator: Any, case: Case, window: int, key: jax.Array | None = None) -> tuple[np.ndarray, Any]:
    """(updates, p + q): the gradients of consecutive windows at fixed parameters, and the last state.

    What is left over at the end is one shorter window.
    """
    length = len(jax.tree.leaves(case.inputs)[0])
    state, rows = estimator.init(case.params, case.hidden, key), []
    inputs = jax.tree.map(np.asarray, case.inputs)  # slices of NumPy arrays compile nothing
    for start in range(0, length, window):
        part = jax.tree.map(lambda leaf, at=start: leaf[at : at + window], inputs)
        row, state = _gradient_vector(estimator)(case.params, state, part)
        rows.append(row)
    return np.stack(rows), state


@cache
def _gradient_vector(estimator: Any) -> Callable[..., Any]:
    """A jitted update, kept: most of the tests' time is compilation."""

    @jax.jit
    def update(params: Any, state: Any, inputs: Any) -> Any:
        estimate, state = estimator.update(params, state, inputs)
        return vector(estimate.grads), state

    return update


def vector(grads: Any) -> jax.Array:
    """Gradients as a real vector: jax's gradient of a complex leaf is ∂x − i∂y, the vector is (∂x, ∂y)."""
    return to_vector(jax.tree.map(jnp.conj, grads))


def window_sums(rows: np.ndarray, window: int) -> np.ndarray:
    """Sums of rows over consecutive windows, the last one shorter."""
    return np.add.reduceat(rows, np.arange(0, len(rows), window), axis=0)


def same(actual: Any, expected: Any, rtol: float = 1e-10) -> None:
    """Finite, and equal to `rtol` of the largest entry."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def apart(actual: Any, expected: Any, by: float = 1e-3) -> bool:
    """Finite, and apart by more than `by` of the largest entry."""
    distance = np.abs(np.asarray(actual) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max()
    return bool(np.isfinite(distance)) and float(distance) > by


def assert_unbiased(draws: np.ndarray, run: reference.Linearised) -> None:
    """The mean over all patterns is the influence to 1e-12, though no single draw need be."""
    exact = forward.rtrl(run)
    same(draws.mean(axis=0), exact, 1e-12)
    assert apart(draws, np.broadcast_to(exact, draws.shape), 1e-2)


def affine_maps(case: Case, run: reference.Linearised) -> list[AffineMap]:
    """Where the maps of a structured tanh, leaky, LSTM or GRU case stand in θ, and what they read.

    In the alphabetical order of their names; read off the cells' documented parameters.
    """
    theta = case.params.recurrent
    at = jax.tree.map(np.asarray, reference.from_vector(jnp.arange(float(to_vector(theta).size)), theta))
    ones = np.ones((run.length, 1))
    hidden = np.stack([np.asarray(jax.tree.leaves(state)[-1]) for state in run.states[:-1]])
    x = np.asarray(case.inputs[0])

    def positions(*parts: np.ndarray) -> np.ndarray:
        return np.concatenate([np.atleast_2d(part) for part in parts]).astype(int)

    def full(group: dict[str, np.ndarray]) -> np.ndarray:
        return positions(group["hidden_kernel"], group["input_kernel"], group["bias"])

    everything = np.concatenate([hidden, x, ones], axis=1)
    if "gates" not in theta:
        return [AffineMap(full(at), everything)]
    candidate = at["candidate"]
    return [
        AffineMap(
            positions(candidate["hidden_kernel"], candidate["hidden_bias"]),
            np.concatenate([hidden, ones], axis=1),
        ),
        AffineMap(positions(candidate["input_kernel"], candidate["bias"]), np.concatenate([x, ones], axis=1)),
        AffineMap(full(at["gates"]), everything),
    ]
