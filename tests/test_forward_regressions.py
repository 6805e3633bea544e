"""Faults that a reader found in the forward family, each pinned by the system that showed it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtrunc
from jtrunc import Params, System
from jtrunc.structure import Affine, Structure, transition_of
from tests.compare import assert_close
from tests.reference import window

pytestmark = pytest.mark.slow  # nearly all of its time is compilation

FAMILY: dict[str, Callable[[System], Any]] = {
    "rtrl": jtrunc.rtrl,
    "snap": lambda system: jtrunc.snap(system, 2),
    "nobacktrack": jtrunc.nobacktrack,
    "uoro": jtrunc.uoro,
}
family = pytest.mark.parametrize("name", FAMILY)


def square(params: Params, hidden: Any, inputs: Any) -> tuple[jax.Array, tuple[()]]:
    return jnp.asarray(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(hidden))), ()


def steps(estimator: Any, params: Params, state: Any, inputs: Any) -> tuple[list[Any], Any]:
    grads, update = [], jax.jit(estimator.update)
    for t in range(len(jax.tree.leaves(inputs)[0])):
        one = window(inputs, t, t + 1)
        estimate, state = update(params, state, one)
        grads.append(estimate.grads)
    return grads, state


@family
def test_a_reset_cuts_an_infinite_influence(name):
    """√ at 0 has an infinite derivative: it must not outlive the sequence that it belongs to."""
    system = jtrunc.with_resets(
        System(lambda theta, h, x: jnp.sqrt(jnp.abs(theta * h)) + x, square), jnp.ones(2)
    )
    params = Params(jnp.ones(2))
    x = jnp.array([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    inputs = (jnp.array([False, False, False, True, False]), x)
    estimator = FAMILY[name](system)
    grads, _ = steps(estimator, params, estimator.init(params, jnp.zeros(2), jax.random.key(0)), inputs)
    finite = [bool(jnp.isfinite(g.recurrent).all()) for g in grads]
    assert not all(finite[:3]) and all(finite[3:])


def test_rtrl_needs_no_sparsity():
    """A transition that closes over a traced array, and one whose program cannot be read."""

    def gradient(matrix: jax.Array) -> jax.Array:
        system = System(lambda theta, h, x: jnp.tanh(matrix @ h + theta * x), square)
        estimator = jtrunc.rtrl(system)
        params = Params(jnp.ones(3))
        state = estimator.init(params, jnp.ones(3))
        return steps(estimator, params, state, jnp.ones((2, 3)))[0][1].recurrent

    def exact(matrix: jax.Array) -> jax.Array:
        def loss(theta: jax.Array) -> jax.Array:
            first = jnp.tanh(matrix @ jnp.ones(3) + theta)
            return jnp.sum(jnp.tanh(matrix @ first + theta) ** 2)

        return jax.grad(loss)(jnp.ones(3))

    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)))
    assert_close(jax.jit(gradient)(matrix), exact(matrix))
    convolving = System(lambda theta, h, x: jnp.tanh(jnp.convolve(h, theta, mode="same") + x), square)
    params, estimator = Params(jnp.ones(3)), jtrunc.rtrl(convolving)
    grads, _ = steps(estimator, params, estimator.init(params, jnp.ones(4)), jnp.ones((1, 4)))
    loss = lambda theta: jnp.sum(jnp.tanh(jnp.convolve(jnp.ones(4), theta, mode="same") + 1) ** 2)  # noqa: E731
    assert_close(grads[0].recurrent, jax.grad(loss)(jnp.ones(3)))


@pytest.mark.parametrize("name", ["snap", "nobacktrack"])
def test_what_needs_the_sparsity_says_so(name):
    def run(matrix: jax.Array) -> Any:
        system = System(lambda theta, h, x: jnp.tanh(matrix @ h + theta * x), square)
        params, estimator = Params(jnp.ones(3)), FAMILY[name](system)
        state = estimator.init(params, jnp.ones(3), jax.random.key(0))
        return estimator.update(params, state, jnp.ones((1, 3)))

    with pytest.raises(ValueError, match=r"system\.transition.*through `inputs`"):
        jax.jit(run)(jnp.eye(3))


@pytest.mark.parametrize("name", ["nobacktrack", "uoro"])
@pytest.mark.parametrize("length", [1, 3])
def test_a_state_narrower_than_the_parameters_keeps_its_dtype(name, length):
    system = System(lambda theta, h, x: jnp.tanh(theta * h.astype(theta.dtype) + x).astype(h.dtype), square)
    params, estimator = Params(jnp.ones(3)), FAMILY[name](system)
    state = estimator.init(params, jnp.ones(3, jnp.float32), jax.random.key(0))
    _, after = jax.jit(estimator.update)(params, state, jnp.ones((length, 3)))
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


def tied() -> System:
    """One matrix as hidden kernel and, transposed, as input kernel."""
    structure = Structure(
        affine=lambda theta: {"u": Affine(theta, theta.T, None)},
        hidden_features=lambda hidden, inputs: {"u": hidden},
        input_features=lambda inputs: {"u": inputs},
        combine=lambda elementwise, hidden, inputs, p: jnp.tanh(p["u"]),
    )
    return System(transition_of(structure), square, structure)


@pytest.mark.parametrize("name", ["nobacktrack", "uoro"])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_a_window_equals_its_steps(name, impl):
    """Also where a structure uses a parameter twice, and with keys whose draws depend on the batch."""
    generator = np.random.default_rng(1)
    params, estimator = Params(jnp.asarray(generator.normal(size=(3, 3)))), FAMILY[name](tied())
    inputs = jnp.asarray(generator.normal(size=(4, 3)))
    state = estimator.init(params, jnp.ones(3), jax.random.key(0, impl=impl))
    grads, last = steps(estimator, params, state, inputs)
    whole, after = jax.jit(estimator.update)(params, state, inputs)
    assert_close(whole.grads, jax.tree.map(lambda *leaves: sum(leaves), *grads))
    assert_close(after.hidden, last.hidden)


@family
def test_empty_parameters_and_python_numbers(name):
    system = System(lambda theta, h, x: jnp.tanh(theta["a"] * h + x), square)
    params, estimator = Params({"a": 0.5, "none": jnp.zeros((0, 3))}), FAMILY[name](system)
    state = estimator.init(params, jnp.ones(1), jax.random.key(0))
    estimate, _ = estimator.update(params, state, jnp.ones((1, 1)))
    h = np.tanh(1.5)
    assert_close(estimate.grads.recurrent["a"], jnp.asarray(2 * h * (1 - h**2)))


@family
def test_a_state_without_floats_is_refused(name):
    system = System(lambda theta, h, x: h + 1, lambda params, h, x: (params.recurrent * x, ()))
    with pytest.raises(ValueError, match="no floating-point entries"):
        FAMILY[name](system).init(Params(jnp.ones(())), jnp.int32(0), jax.random.key(0))


@pytest.mark.parametrize("name", ["nobacktrack", "uoro"])
def test_windows_equal_steps_where_the_structure_multiplies_parameters(name):
    """An embedding times a kernel, as in the point process: at zero it looked like no use at all."""
    structure = Structure(
        affine=lambda theta: {"units": Affine(theta["W"], theta["embedding"] @ theta["U"], None)},
        hidden_features=lambda hidden, inputs: {"units": hidden},
        input_features=lambda inputs: {"units": inputs},
        combine=lambda elementwise, hidden, inputs, p: jnp.tanh(p["units"]),
    )
    system = System(transition_of(structure), square, structure)
    generator = np.random.default_rng(21)
    shapes = {"W": (3, 3), "embedding": (2, 4), "U": (4, 3)}
    params = Params({name: jnp.asarray(generator.normal(size=shape)) for name, shape in shapes.items()})
    inputs, hidden = jnp.asarray(generator.normal(size=(3, 2))), jnp.zeros(3)
    estimator = FAMILY[name](system)
    state = estimator.init(params, hidden, jax.random.key(0))
    whole, _ = jax.jit(estimator.update)(params, state, inputs)
    grads, _ = steps(estimator, params, state, inputs)
    assert_close(whole.grads, jax.tree.map(lambda *parts: sum(parts), *grads))
