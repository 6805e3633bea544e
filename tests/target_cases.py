"""What the tests of target propagation share: cases, rows of states, and gradients as real vectors."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc import cells, targets
from tests import systems
from tests.reference import from_vector, to_vector
from tests.systems import Case
from tests.target_reference import forward_states


def deep(length: int, width: int) -> Case:
    """Two layers of LSTM with a linear readout, away from their initial zeros."""
    stack = cells.stack([cells.lstm(2, width), cells.lstm(width, width)])
    model = cells.model(stack, 2, lambda prediction, target: jnp.sum((prediction - target) ** 2))
    generator = np.random.default_rng(11)
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.float64), jax.random.key(0))
    params = jax.tree.map(
        lambda leaf: jnp.asarray(generator.normal(size=leaf.shape) / np.sqrt(leaf.shape[0])), shapes
    )
    inputs = tuple(jnp.asarray(generator.normal(size=(length, 2))) for _ in range(2))
    return Case(model.system, params, model.initial_hidden((), jnp.float64), inputs)


def plain(case: Case) -> Case:
    """The same system without its declared structure."""
    return case._replace(system=case.system._replace(structure=None))


CASES = {
    "tanh": lambda length: systems.tanh(length),
    "nested": systems.nested,
    "stack": lambda length: deep(length, 6),
    "plain stack": lambda length: plain(deep(length, 6)),
}


def stacked(states: list[Any]) -> Any:
    """Leaves (N, ...) from a list of N states."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def row(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def rows_of(tree: Any, count: int) -> np.ndarray:
    """(N, n): every block's float leaves as a real vector."""
    return np.stack([np.asarray(to_vector(row(tree, b))) for b in range(count)])


def floats_only(tree: Any) -> Any:
    """None in the place of leaves that carry no gradient, as the multipliers have it."""
    return jax.tree.map(lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.inexact) else None, tree)


class Point(NamedTuple):
    """A point (H, θ, y) of a problem.

    Attributes:
      states: H, a list over the blocks.
      multipliers: (N, n).
    """

    case: Case
    block_length: int
    states: list[Any]
    multipliers: np.ndarray


@cache
def forward_point(kind: str, length: int, block_length: int) -> Point:
    """The forward states, and multipliers of the size of a gradient."""
    case = CASES[kind](length)
    ends = forward_states(*case, block_length=block_length)
    shape = (len(ends), to_vector(case.hidden).size)
    return Point(case, block_length, ends, 0.3 * np.random.default_rng(13).normal(size=shape))


def point(kind: str, length: int, block_length: int) -> Point:
    """A point away from the forward states."""
    at = forward_point(kind, length, block_length)
    return moved(at, 0.1 * np.random.default_rng(17).normal(size=at.multipliers.shape))


def moved(at: Point, step: np.ndarray) -> Point:
    """H + step, (N, n)."""
    vectors = np.stack([np.asarray(to_vector(state)) for state in at.states]) + step
    states = [from_vector(v, state) for v, state in zip(jnp.asarray(vectors), at.states, strict=True)]
    return at._replace(states=states)


class Slopes(NamedTuple):
    """L, its terms, and its gradients as real vectors: (p + q,), (N, n), (N, n)."""

    value: jax.Array
    terms: targets.Terms
    params: np.ndarray
    free: np.ndarray
    multipliers: np.ndarray


def slopes(
    at: Point, penalty: float, loss_on: str = "predicted", constraint: Any = targets.quadratic
) -> Slopes:
    """`targets.objective` and its gradients with respect to everything that it depends on."""
    case, block_length, states, multipliers = at
    differentiated = _differentiated(case.system, block_length, loss_on, constraint)
    rows = list(jnp.asarray(multipliers))
    (value, terms), bars = differentiated(case.params, case.hidden, states, rows, case.inputs, penalty)
    return Slopes(value, terms, np.asarray(bars[0]), np.stack(bars[1]), np.stack(bars[2]))


@cache
def _differentiated(system: Any, block_length: int, loss_on: Any, constraint: Any) -> Any:
    """Kept, because most of the tests' time is compilation."""

    @jax.jit
    def at(params: Any, start: Any, states: Any, multipliers: Any, inputs: Any, penalty: Any) -> Any:
        def value(theta: jax.Array, free: list[jax.Array], rows: list[jax.Array]) -> Any:
            put = [from_vector(r, state) for r, state in zip(free, states, strict=True)]
            dual = [from_vector(r, state) for r, state in zip(rows, states, strict=True)]
            return targets.objective(
                system, from_vector(theta, params), start, stacked(put), inputs, block_length=block_length,
                penalty=penalty, multipliers=floats_only(stacked(dual)), constraint=constraint,
                loss_on=loss_on,
            )  # fmt: skip

        arguments = (to_vector(params), list(map(to_vector, states)), multipliers)
        return jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)(*arguments)

    return at


class Walk(NamedTuple):
    """Several updates with gradient descent on θ: what each returned, and where it ended.

    Attributes:
      grads, loss, diagnostics: a row for each update.
      params: the last ones.
      state: the last `TargetState`.
    """

    grads: Any
    loss: jax.Array
    diagnostics: dict[str, jax.Array]
    params: Any
    state: Any


def descend(params: Any, grads: Any, rate: float) -> Any:
    """θ − rate · g, with jax's gradient of a complex leaf, which is ∂x − i∂y."""
    return jax.tree.map(lambda p, g: p - rate * jnp.conj(g), params, grads)


def walk(estimator: Any, case: Case, windows: Any, rate: float, state: Any = None) -> Walk:
    """All updates in one `lax.scan`, so the state keeps its types; windows: leaves (updates, T, ...)."""
    state = estimator.init(case.params, case.hidden) if state is None else state

    def step(carry: Any, window: Any) -> Any:
        params, state = carry
        estimate, state = estimator.update(params, state, window)
        out = estimate.grads, estimate.loss, estimate.aux.diagnostics
        return (descend(params, estimate.grads, rate), state), out

    (params, state), out = jax.jit(lambda *start: jax.lax.scan(step, start, windows))(case.params, state)
    grads, loss, diagnostics = out
    return Walk(grads, loss, diagnostics, params, state)


def windows_of(case: Case, num_windows: int, updates: int) -> Any:
    """The inputs of a data set cut into windows, visited in turn: leaves (updates, T, ...)."""

    def cut(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(num_windows, -1, *leaf.shape[1:])[np.arange(updates) % num_windows]

    return jax.tree.map(cut, case.inputs)
