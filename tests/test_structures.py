"""Structures beyond those of the library's cells, each against the plain path, its oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtrunc
from jtrunc import cells, truncation
from jtrunc.backward.thresholds import two_phase_pays
from jtrunc.structure import Affine, Stack, Structure, transition_of
from tests.compare import assert_close, differ
from tests.systems import Case

STEPS, WIDTH = 20, 3
LAW = truncation.given(jnp.zeros(STEPS).at[8].set(1), jnp.zeros(STEPS))


class Shape(NamedTuple):
    """A structure, and whether it is run in two phases."""

    structure: Structure | Stack
    rows: tuple[int, ...] = ()
    two_phases: bool = True


def tanh(
    hidden_features: Callable[[Any, Any], Any] = lambda hidden, x: hidden,
    input_features: Callable[[Any], Any] = lambda x: x,
) -> Structure:
    return Structure(
        affine=lambda theta: {"units": Affine(theta["W"], theta["U"], theta["b"])},
        hidden_features=lambda hidden, x: {"units": hidden_features(hidden, x)},
        input_features=lambda x: {"units": input_features(x)},
        combine=lambda elementwise, hidden, x, p: jnp.tanh(p["units"]),
    )


def gated_by_hidden_alone() -> Structure:
    return Structure(
        affine=lambda theta: {"units": Affine(theta["W"]), "gate": Affine(theta["U"], None, theta["b"])},
        hidden_features=lambda hidden, x: {"units": hidden, "gate": hidden},
        input_features=lambda x: {},
        combine=lambda elementwise, hidden, x, p: jnp.tanh(p["units"] * jax.nn.sigmoid(p["gate"]) + x),
    )


def without_maps() -> Structure:
    return Structure(
        affine=lambda theta: {},
        hidden_features=lambda hidden, x: {},
        input_features=lambda x: {},
        combine=lambda keep, hidden, x, p: jnp.tanh(keep * hidden + x),
        elementwise=lambda theta: theta["b"],
    )


def normalised(hidden: jax.Array) -> jax.Array:
    """No number at the zeros of a buffer that no step has filled."""
    return hidden / jnp.sqrt(jnp.sum(hidden**2))


def stack(above: Structure, output: Callable[[Any], Any] = lambda hidden: hidden, **options: Any) -> Stack:
    return Stack((tanh(), above), (output, lambda hidden: hidden), **options)


SHAPES = {
    "gates without inputs": Shape(gated_by_hidden_alone(), rows=(2,)),
    "undefined at zero": Shape(tanh(lambda hidden, x: normalised(hidden))),
    "undefined at zero, above": Shape(stack(tanh(), normalised)),
    "hidden features that read the layer below": Shape(
        stack(tanh(lambda hidden, x: hidden * x, lambda x: jnp.ones_like(x)))
    ),
    "one number a step passed up": Shape(
        Stack(
            (tanh(lambda hidden, x: hidden, lambda x: x[0]),) * 2,
            (lambda hidden: hidden,) * 2,
            lambda inputs, output: (output * inputs[1], inputs[1]),
        )
    ),
    "a layer without maps": Shape(stack(without_maps()), two_phases=False),
    "a layer that broadcasts": Shape(
        stack(tanh(input_features=lambda x: jnp.mean(x, axis=0, keepdims=True))), rows=(2,), two_phases=False
    ),
}


def case_of(name: str) -> Case:
    structure, rows, _ = SHAPES[name]
    generator = np.random.default_rng(4)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(0.5 * generator.normal(size=shape))

    def layer() -> tuple[Any, jax.Array]:
        theta = {"W": normal(WIDTH, WIDTH), "U": normal(WIDTH, WIDTH), "b": normal(WIDTH)}
        return theta, normal(*rows, WIDTH)

    pairs = [layer() for _ in structure.layers] if isinstance(structure, Stack) else []
    theta, hidden = tuple(zip(*pairs, strict=True)) if pairs else layer()
    inputs = normal(STEPS, *rows, WIDTH)
    if name == "one number a step passed up":
        inputs = (inputs, normal(STEPS))

    def loss(params: jtrunc.Params, hidden: Any, x: Any) -> tuple[jax.Array, tuple[()]]:
        return sum(jnp.sum((leaf - 0.3) ** 2) for leaf in jax.tree.leaves(hidden)) + jnp.zeros(()), ()

    system = jtrunc.System(transition_of(structure), loss, structure)
    return Case(system, jtrunc.Params(theta), hidden, inputs)


def gradient(estimator: jtrunc.GradientEstimator, case: Case) -> jtrunc.Params:
    state = estimator.init(case.params, case.hidden)
    return jax.jit(estimator.update)(case.params, state, case.inputs)[0].grads


@pytest.mark.parametrize("name", SHAPES)
def test_any_structure_is_its_plain_transition(name):
    case = case_of(name)
    plain = case._replace(system=case.system._replace(structure=None))
    pays = two_phase_pays(case.system.structure, case.params.recurrent, case.hidden, case.inputs)
    assert pays == SHAPES[name].two_phases
    whole = gradient(jtrunc.bptt(plain.system), plain)
    assert_close(gradient(jtrunc.bptt(case.system), case), whole, rtol=1e-12)
    window = gradient(jtrunc.online_artbp(plain.system, LAW), plain)
    assert_close(gradient(jtrunc.online_artbp(case.system, LAW), case), window, rtol=1e-12)
    assert differ(window, whole)


def test_inputs_behind_a_window_cannot_poison_it():
    case = case_of("undefined at zero")
    estimator = jtrunc.online_artbp(case.system, LAW)
    expected = gradient(estimator, case)
    assert_close(gradient(estimator, case._replace(inputs=case.inputs.at[9:].set(jnp.nan))), expected)
    inside = gradient(estimator, case._replace(inputs=case.inputs.at[8:].set(jnp.nan)))
    assert not np.isfinite(inside.recurrent["U"]).any()


@pytest.mark.parametrize("make", [jtrunc.bptt, lambda system: jtrunc.online_artbp(system, LAW)])
def test_parameters_narrower_than_the_state_keep_their_dtype(make):
    """float32 parameters and inputs, and a state in float64."""
    model = cells.model(cells.lstm(2, WIDTH), 2, lambda y, target: jnp.sum((y - target) ** 2))
    params = model.init(jax.random.key(0), jnp.float32)
    hidden = model.initial_hidden((2,), jnp.float64)
    inputs = (jnp.ones((STEPS, 2, 2), jnp.float32), jnp.zeros((STEPS, 2, 2), jnp.float32))
    case = Case(model.system, params, hidden, inputs)
    grads = gradient(make(model.system), case)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))
    plain = case._replace(system=model.system._replace(structure=None))
    assert_close(grads, gradient(make(plain.system), plain), rtol=1e-5)
