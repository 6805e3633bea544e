"""Small systems that the tests run on: by hand, which needs nothing but the protocol, and from the cells."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtrunc import cells
from jtrunc.base import Params, System
from jtrunc.cells.model import reading_first
from jtrunc.structure import Affine, Stack, Structure, transition_of
from tests.reference import to_vector, window


class Case(NamedTuple):
    """A system with everything that an estimator needs; `inputs` has `length` steps."""

    system: System
    params: Params
    hidden: Any
    inputs: Any

    def window(self, start: int, stop: int) -> Any:
        return window(self.inputs, start, stop)


def _normal(generator: np.random.Generator, *shape: int, dtype: Any = jnp.float64) -> jax.Array:
    return jnp.asarray(generator.normal(size=shape), dtype)


# What a maker returns for different lengths has one system: what is compiled for it is compiled once.


@cache
def _scalar_system() -> System:
    def transition(theta: jax.Array, hidden: jax.Array, inputs: jax.Array) -> jax.Array:
        return jnp.tanh(theta[0] * hidden + theta[1] * inputs)

    def loss(params: Params, hidden: jax.Array, inputs: jax.Array) -> tuple[jax.Array, tuple[()]]:
        return 0.5 * (params.readout * hidden - inputs) ** 2, ()

    return System(transition, loss)


def scalar(length: int, dtype: Any = jnp.float64) -> Case:
    """One tanh unit, three parameters: small enough to draw 2·10⁵ estimates in a second."""
    generator = np.random.default_rng(1)
    params = Params(jnp.asarray([1.2, 0.4], dtype), jnp.asarray(0.7, dtype))
    inputs = _normal(generator, length, dtype=dtype)
    return Case(_scalar_system(), params, jnp.asarray(0.3, dtype), inputs)


@cache
def _tanh_system() -> System:
    def transition(theta: dict[str, jax.Array], hidden: jax.Array, inputs: jax.Array) -> jax.Array:
        return jnp.tanh(hidden @ theta["W"] + inputs @ theta["U"] + theta["b"])

    def loss(params: Params, hidden: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        prediction = hidden @ params.readout
        return 0.5 * jnp.sum((prediction - inputs) ** 2), prediction

    return System(transition, loss)


def tanh(length: int, width: int = 3, dtype: Any = jnp.float64) -> Case:
    """A tanh network with a linear readout; its memory outlives the window."""
    generator = np.random.default_rng(2)
    theta = {
        "W": 0.9 * jnp.asarray(np.linalg.qr(generator.normal(size=(width, width)))[0], dtype),
        "U": _normal(generator, 2, width, dtype=dtype),
        "b": 0.1 * _normal(generator, width, dtype=dtype),
    }
    params = Params(theta, _normal(generator, width, 2, dtype=dtype))
    inputs = _normal(generator, length, 2, dtype=dtype)
    return Case(_tanh_system(), params, jnp.zeros(width, dtype), inputs)


class Nested(NamedTuple):
    """A state of many kinds: floats in a dict, a complex number, an integer clock and a key."""

    cells: dict[str, jax.Array]
    phasor: jax.Array
    clock: jax.Array
    key: jax.Array


class Datum(NamedTuple):
    x: jax.Array
    labels: dict[str, jax.Array]


@cache
def _nested_system(dtype: Any) -> System:
    def transition(theta: dict[str, Any], hidden: Nested, inputs: Datum) -> Nested:
        key, draw = jax.random.split(hidden.key)
        noise = jax.random.normal(draw, (2,), dtype)
        a, b = hidden.cells["a"], hidden.cells["b"]
        drive = inputs.x + theta["rates"][0] * b + jnp.asarray(0.1, dtype) * noise
        phasor = theta["turn"] * hidden.phasor * jnp.where(hidden.clock % 2 == 0, 1, -1) + a.sum()
        cells = {"a": jnp.tanh(theta["rates"][1] * a + drive), "b": a + jnp.abs(phasor) ** 2 / 10}
        return Nested(cells, phasor / 2, hidden.clock + 1, key)

    def loss(params: Params, hidden: Nested, inputs: Datum) -> tuple[jax.Array, dict[str, jax.Array]]:
        chosen = params.readout.labels["scale"][inputs.labels["which"]]
        prediction = chosen * hidden.cells["a"].sum() + (params.recurrent["turn"] * hidden.phasor).imag
        return (prediction - inputs.x.sum()) ** 2, {"prediction": prediction, "clock": hidden.clock}

    return System(transition, loss)


def nested(length: int, dtype: Any = jnp.float64) -> Case:
    """NamedTuples and dicts everywhere, complex, integer and key leaves, tied weights in the loss."""
    complex_dtype = jnp.result_type(dtype, jnp.complex64)
    generator = np.random.default_rng(3)
    turn = jnp.asarray(0.5 + 0.4j, complex_dtype)
    rates = (jnp.asarray(0.6, dtype), _normal(generator, 2, dtype=dtype))
    readout = Datum(jnp.zeros((0,), dtype), {"scale": _normal(generator, 3, dtype=dtype)})
    hidden = Nested(
        {"a": jnp.zeros(2, dtype), "b": jnp.ones(2, dtype)},
        jnp.asarray(0.2 - 0.1j, complex_dtype),
        jnp.int32(0),
        jax.random.key(5),
    )
    which = jnp.asarray(generator.integers(3, size=length), jnp.int32)
    inputs = Datum(_normal(generator, length, 2, dtype=dtype), {"which": which})
    return Case(_nested_system(dtype), Params({"turn": turn, "rates": rates}, readout), hidden, inputs)


def exploding(length: int) -> Case:
    """Linear and expanding: |∂F/∂s| = 1e200, so that a cotangent two edges back is infinite."""

    def transition(theta: jax.Array, hidden: jax.Array, inputs: jax.Array) -> jax.Array:
        return inputs + theta + jnp.float64(1e200) * (hidden - jax.lax.stop_gradient(hidden))

    def loss(params: Params, hidden: jax.Array, inputs: jax.Array) -> tuple[jax.Array, tuple[()]]:
        return hidden + inputs, ()

    return Case(
        System(transition, loss), Params(jnp.float64(0.5)), jnp.float64(0), jnp.arange(1.0, length + 1)
    )


def elementwise(length: int, dtype: Any = jnp.float64) -> Case:
    """Units of a leaky integrator and a complex phasor, none of which reads another unit's past."""

    def combine(own: dict[str, jax.Array], hidden: dict[str, jax.Array], inputs: Any, p: Any) -> Any:
        turned = jnp.exp(jax.lax.complex(-jnp.exp(own["decay"]), own["turn"])) * hidden["phasor"]
        leaky = jnp.tanh(jax.nn.sigmoid(own["keep"]) * hidden["leaky"]) + hidden["phasor"].imag
        return {"leaky": leaky + p["drive"], "phasor": turned + p["drive"]}

    structure = Structure(
        affine=lambda theta: {"drive": Affine(None, theta["input_kernel"], theta["bias"])},
        hidden_features=lambda hidden, inputs: {},
        input_features=lambda inputs: {"drive": inputs},
        combine=combine,
        elementwise=lambda theta: theta["own"],
    )

    def loss(params: Params, hidden: dict[str, jax.Array], inputs: jax.Array) -> tuple[jax.Array, tuple[()]]:
        read = params.readout * hidden["leaky"] + hidden["phasor"].real - 2 * hidden["phasor"].imag
        return jnp.sum((read - inputs) ** 2), ()

    generator = np.random.default_rng(6)
    theta = {
        "own": {name: _normal(generator, 3, dtype=dtype) for name in ("decay", "turn", "keep")},
        "input_kernel": _normal(generator, 3, 3, dtype=dtype),
        "bias": _normal(generator, 3, dtype=dtype),
    }
    hidden = {
        "leaky": jnp.zeros(3, dtype),
        "phasor": jnp.full(3, 0.3 + 0.2j, jnp.result_type(dtype, jnp.complex64)),
    }
    params = Params(theta, _normal(generator, 3, dtype=dtype))
    system = System(transition_of(structure), loss, structure)
    return Case(system, params, hidden, _normal(generator, length, 3, dtype=dtype))


CELLS: dict[str, Callable[[int], cells.Cell]] = {
    "tanh": lambda width: cells.tanh(2, width),
    "leaky": lambda width: cells.leaky(2, width, rate=0.3),
    "preactivation": lambda width: cells.preactivation(2, width, feedback=np.linspace(0.1, 0.8, width)),
    "gru": lambda width: cells.gru(2, width),
    "lstm": lambda width: cells.lstm(2, width),
    "linear_recurrent": lambda width: cells.linear_recurrent(2, width, max_radius=0.95),
    "stack": lambda width: cells.stack([cells.leaky(2, width, rate=0.3), cells.tanh(width, width)]),
    "gated_stack": lambda width: cells.stack([cells.lstm(2, width), cells.gru(width, width)]),
}


@cache
def _model(name: str, width: int) -> cells.Model:
    return cells.model(CELLS[name](width), 2, lambda prediction, target: jnp.sum((prediction - target) ** 2))


def structured(name: str, length: int, width: int = 3, dtype: Any = jnp.float64) -> Case:
    """A cell of the library with a linear readout, away from its initial zeros."""
    model = _model(name, width)
    generator = np.random.default_rng(7)
    params = jax.tree.map(
        lambda leaf: leaf + 0.2 * _normal(generator, *leaf.shape, dtype=dtype),
        model.init(jax.random.key(3), dtype),
    )
    inputs = (_normal(generator, length, 2, dtype=dtype), _normal(generator, length, 2, dtype=dtype))
    return Case(model.system, params, model.initial_hidden((), dtype), inputs)


def relu(length: int, width: int) -> Case:
    """A rectified network on symbols: all units are dead at the first step, unit 0 at the second as well."""
    structure = Structure(
        affine=lambda theta: {"units": Affine(theta["hidden_kernel"], theta["input_kernel"], theta["bias"])},
        hidden_features=lambda hidden, inputs: {"units": hidden},
        input_features=lambda inputs: {"units": inputs[0]},
        combine=lambda elementwise, hidden, inputs, p: jax.nn.relu(p["units"] + inputs[1]),
    )

    def loss(params: Params, hidden: jax.Array, inputs: Any) -> tuple[jax.Array, tuple[()]]:
        return jnp.sum((hidden - 1.0) ** 2), ()

    generator = np.random.default_rng(5)
    theta = {
        "hidden_kernel": jnp.asarray(generator.uniform(0.1, 0.6, (width, width))),
        "input_kernel": jnp.asarray(generator.uniform(0.1, 1.0, (3, width))),
        "bias": jnp.asarray(generator.uniform(0.1, 0.5, width)),
    }
    symbols = jax.nn.one_hot(np.resize([0, 0, 1, 2, 1], length), 3, dtype=jnp.float64)
    drift = jnp.zeros((length, width)).at[0].set(-50.0).at[1:2, 0].set(-50.0)
    system = System(transition_of(structure), loss, structure)
    return Case(system, Params(theta), jnp.zeros(width), (symbols, drift))


def tied(length: int) -> Case:
    """A declared structure in which one number serves several units: a leak and a bias that they share."""
    width = 3
    structure = Structure(
        affine=lambda theta: {
            "units": Affine(theta["W"], theta["U"], jnp.broadcast_to(theta["bias"], (width,)))
        },
        hidden_features=lambda hidden, inputs: {"units": hidden},
        input_features=lambda inputs: {"units": inputs},
        combine=lambda keep, hidden, inputs, p: jax.nn.sigmoid(keep) * hidden + jnp.tanh(p["units"]),
        elementwise=lambda theta: jnp.broadcast_to(theta["keep"], (width,)),
    )

    def loss(params: Params, hidden: jax.Array, inputs: jax.Array) -> tuple[jax.Array, tuple[()]]:
        return jnp.sum((hidden - 1.0) ** 2), ()

    generator = np.random.default_rng(15)
    theta = {
        "W": jnp.asarray(0.5 * generator.normal(size=(width, width))),
        "U": jnp.asarray(generator.normal(size=(2, width))),
        "bias": jnp.float64(0.3),
        "keep": jnp.float64(-0.5),
    }
    system = System(transition_of(structure), loss, structure)
    inputs = jnp.asarray(generator.normal(size=(length, 2)))
    return Case(system, Params(theta), jnp.zeros(width), inputs)


def symbols(length: int) -> Case:
    """A small LSTM on integers, which are looked up instead of multiplied."""
    model = cells.model(cells.lstm(3, 2), 3, cells.softmax_cross_entropy)
    params, hidden = model.init(jax.random.key(4), jnp.float64), model.initial_hidden((), jnp.float64)
    text = np.resize([0, 2, 1, 1, 2], length + 1)
    return Case(model.system, params, hidden, (jnp.asarray(text[:-1]), jnp.asarray(text[1:])))


@cache
def batched(system: System) -> System:
    """The system with a batch axis in front of state and inputs; its loss is the mean over the batch."""

    def loss(params: Params, hidden: Any, inputs: Any) -> tuple[jax.Array, Any]:
        losses, aux = jax.vmap(system.loss, in_axes=(None, 0, 0))(params, hidden, inputs)
        return losses.mean(), aux

    return System(jax.vmap(system.transition, in_axes=(None, 0, 0)), loss)


def exposed(case: Case) -> System:
    """The transition of a case on inputs ``(inputs, weights)`` with the loss ℓₜ = weights · hₜ.

    The gradient of one such step is the influence, seen through the weights.
    """
    system, structure = case.system, case.system.structure
    if isinstance(structure, Stack):
        structure = Stack(
            tuple(reading_first(layer) for layer in structure.layers),  # pyright: ignore[reportArgumentType]
            structure.outputs,
            lambda inputs, output: (system.structure.pass_up(inputs[0], output), inputs[1]),
        )
    elif structure is not None:
        structure = reading_first(structure)
    return System(
        lambda theta, hidden, inputs: system.transition(theta, hidden, inputs[0]),
        lambda params, hidden, inputs: (inputs[1] @ to_vector(hidden), ()),
        structure,
    )


CASES = {"scalar": scalar, "tanh": tanh, "nested": nested}
