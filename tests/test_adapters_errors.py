"""The adapters' names, and what they say to bad input."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jtrunc
from jtrunc import adapters

KEY, X = jax.random.key(0), jnp.zeros((4, 3))


def mean_square(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.mean((prediction - target) ** 2)


def rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


def linen_gru() -> Any:
    return nn.GRUCell(5, param_dtype=jnp.float64)


def nnx_gru() -> Any:
    return nnx.GRUCell(3, 5, param_dtype=jnp.float64, rngs=rngs())


class _Wrapped(nn.RNNCellBase):
    """A linen cell with something done to its output."""

    dropout: float = 0.0
    normalise: bool = False
    carry_dtype: Any = jnp.float64
    pair: bool = True

    @nn.compact
    def __call__(self, carry: Any, x: Any) -> Any:
        carry, output = nn.GRUCell(5, param_dtype=jnp.float64)(carry, x)
        if self.dropout:
            output = nn.Dropout(self.dropout, deterministic=False)(output)
        if self.normalise:
            output = nn.BatchNorm(use_running_average=False, param_dtype=jnp.float64)(output)
        carry = jnp.concatenate([carry, carry], -1) if self.carry_dtype is None else carry
        return (carry, output) if self.pair else output

    @nn.nowrap
    def initialize_carry(self, rng: Any, input_shape: tuple[int, ...]) -> Any:
        return jnp.zeros((*input_shape[:-1], 5))

    @property
    def num_feature_axes(self) -> int:
        return 1


class NnxDropout(nnx.RNNCellBase):
    """An nnx cell with dropout on its output."""

    def __init__(self) -> None:
        self.cell = nnx_gru()
        self.dropout = nnx.Dropout(0.5, rngs=rngs())

    def __call__(self, carry: Any, inputs: Any) -> Any:
        carry, output = self.cell(carry, inputs)
        return carry, self.dropout(output)

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        return self.cell.initialize_carry(input_shape, rngs)


LINEN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no key": ({"key": None}, ValueError, r"key is missing.*jax\.random\.key"),
    "no inputs": ({"inputs": None}, ValueError, r"inputs is missing.*batch axes"),
    "legacy key": ({"key": jnp.zeros(2, jnp.uint32)}, TypeError, r"key must be one typed key"),
    "several keys": ({"key": jax.random.split(KEY, 3)}, TypeError, r"key must be one typed key"),
    "seed for a key": ({"key": 0}, TypeError, r"key must be one typed key.*int 0"),
    "not a cell": ({"cell": nn.Dense(4)}, TypeError, r"cell must be a flax\.linen recurrent cell.*Dense"),
    "not a module": ({"cell": jnp.tanh}, TypeError, r"cell must be a flax\.linen recurrent cell"),
    "nothing": ({"cell": None}, TypeError, r"cell must be .*NoneType None"),
    "RNN": ({"cell": nn.RNN(nn.GRUCell(4))}, TypeError, r"cell must be .*RNN"),
    "class": ({"cell": nn.GRUCell}, TypeError, r"cell must be an instance.*GRUCell"),
    "empty stack": ({"cell": []}, ValueError, r"cell: an empty list"),
    "one wrong in a stack": ({"cell": [linen_gru(), nn.Dense(4)]}, TypeError, r"cell must be .*Dense"),
    "nnx cell": ({"cell": nnx_gru()}, TypeError, r"cell is a flax\.nnx module.*adapters\.nnx"),
    "nnx readout": ({"readout": nnx.Linear(5, 2, rngs=rngs())}, TypeError, r"readout is a flax\.nnx module"),
    "readout class": ({"readout": nn.Dense}, TypeError, r"readout must be an instance"),
    "readout": (
        {"readout": 2},
        TypeError,
        r"readout must be a flax\.linen module, a function or None.*int 2",
    ),
    "embed": ({"embed": 50}, TypeError, r"embed must be a flax\.linen module, a function or None.*int 50"),
    "loss": ({"loss": "mse"}, TypeError, r"loss must be a function.*'mse'"),
    "tokens": ({"inputs": jnp.zeros(4, jnp.int32)}, TypeError, r"int32\[4\].*embedding.*one_hot"),
    "dropout": ({"cell": _Wrapped(dropout=0.5)}, ValueError, r"not a pure function.*deterministic"),
    "dropout in readout": (
        {"readout": nn.Dropout(0.5, deterministic=False)},
        ValueError,
        r"Dropout is not a pure",
    ),
    "batch norm": (
        {"cell": _Wrapped(normalise=True)},
        ValueError,
        r"not a pure function.*running statistics",
    ),
    "carry grows": ({"cell": _Wrapped(carry_dtype=None)}, TypeError, r"_Wrapped must return a carry of the"),
    "no pair": ({"cell": _Wrapped(pair=False)}, TypeError, r"_Wrapped must return \(carry, output\)"),
}

NNX: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not a cell": (
        {"cell": nnx.Linear(3, 4, rngs=rngs())},
        TypeError,
        r"cell must be a flax\.nnx recurrent.*Linear",
    ),
    "class": ({"cell": nnx.GRUCell}, TypeError, r"cell must be an instance.*GRUCell"),
    "empty stack": ({"cell": (), "inputs": X}, ValueError, r"cell: an empty list"),
    "linen cell": ({"cell": linen_gru()}, TypeError, r"cell is a flax\.linen module.*adapters\.linen"),
    "linen readout": ({"readout": nn.Dense(2)}, TypeError, r"readout is a flax\.linen module"),
    "no inputs": ({"inputs": None, "cell": NnxDropout()}, ValueError, r"inputs is missing.*in_features"),
    "no inputs of embed": (
        {"inputs": None, "embed": nnx.Embed(5, 3, rngs=rngs())},
        ValueError,
        r"inputs is missing",
    ),
    "loss": ({"loss": None}, TypeError, r"loss must be a function"),
    "key": ({"key": 3}, TypeError, r"key must be one typed key"),
    "dropout": ({"cell": NnxDropout()}, ValueError, r"changes its own state .*count.*eval\(\)"),
    "batch norm": (
        {
            "cell": nnx.GRUCell(3, 5, rngs=rngs()),
            "readout": nnx.BatchNorm(5, rngs=rngs()),
            "inputs": jnp.zeros((4, 3), jnp.float32),
        },
        ValueError,
        r"BatchNorm changes its own state .*(mean|var)",
    ),
    "tokens": ({"inputs": jnp.zeros(4, jnp.int32)}, TypeError, r"int32\[4\].*embedding"),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen_refuses(name: str) -> None:
    changes, error, message = LINEN[name]
    good = {"cell": linen_gru(), "readout": nn.Dense(2), "loss": mean_square, "key": KEY, "inputs": X}
    arguments = good | changes
    with pytest.raises(error, match=f"(?s){message}"):
        adapters.linen(arguments.pop("cell"), arguments.pop("readout"), arguments.pop("loss"), **arguments)


@pytest.mark.parametrize("name", NNX)
def test_nnx_refuses(name: str) -> None:
    changes, error, message = NNX[name]
    arguments = {"cell": nnx_gru(), "readout": None, "loss": mean_square, "inputs": X} | changes
    with pytest.raises(error, match=f"(?s){message}"):
        adapters.nnx(arguments.pop("cell"), arguments.pop("readout"), arguments.pop("loss"), **arguments)


def test_nnx_refuses_shared_parameters() -> None:
    cell = nnx.GRUCell(3, 3, rngs=rngs())
    with pytest.raises(ValueError, match=r"GRUCell\.dense_\S+ and GRUCell\.dense_\S+ are the same parameter"):
        adapters.nnx([cell, cell], None, mean_square)


def test_nnx_takes_the_cell_in_evaluation_mode() -> None:
    cell = NnxDropout()
    cell.eval()
    system, params, hidden = adapters.nnx(cell, None, mean_square, inputs=X)
    x = jnp.ones((4, 3))
    assert jnp.array_equal(system.transition(params.recurrent, hidden, (x, ())), cell(hidden, x)[0])


def test_linen_takes_a_key_in_the_carry() -> None:
    """The remedy that the message on dropout names: randomness carried in the hidden state."""

    class Noisy(nn.RNNCellBase):
        @nn.compact
        def __call__(self, carry: Any, x: Any) -> Any:
            key, hidden = carry
            key, draw = jax.random.split(key)
            hidden, _ = nn.GRUCell(5, param_dtype=jnp.float64)(hidden, x)
            hidden = hidden * jax.random.bernoulli(draw, 0.5, hidden.shape)
            return (key, hidden), hidden

        @nn.nowrap
        def initialize_carry(self, rng: Any, input_shape: tuple[int, ...]) -> Any:
            return rng, jnp.zeros((*input_shape[:-1], 5))

    system, params, hidden = adapters.linen(Noisy(), nn.Dense(2), mean_square, key=KEY, inputs=X)
    estimator = jtrunc.bptt(system)
    inputs = jnp.ones((6, 4, 3)), jnp.ones((6, 4, 2))
    estimate, state = estimator.update(params, estimator.init(params, hidden), inputs)
    assert jnp.isfinite(estimate.loss)
    assert not jnp.array_equal(jax.random.key_data(state.hidden[0]), jax.random.key_data(hidden[0]))
    assert 0 < jnp.mean(state.hidden[1] == 0) < 1


@pytest.mark.parametrize("loss", [lambda p, t: (p - t) ** 2, lambda p, t: ((p - t) ** 2, p)])
def test_a_loss_that_is_not_scalar(loss: Any) -> None:
    system, params, hidden = adapters.linen(linen_gru(), None, loss, key=KEY, inputs=X)
    with pytest.raises(ValueError, match=r"loss must return a scalar.*\(4, 5\).*batch"):
        system.loss(params, hidden, (X, jnp.zeros((4, 5))))


@pytest.mark.parametrize("inputs", [X, (X,), {"x": X, "target": X}])
def test_inputs_that_are_no_pair(inputs: Any) -> None:
    system, params, hidden = adapters.nnx(nnx_gru(), None, mean_square, inputs=X)
    with pytest.raises(TypeError, match=r"inputs must be a pair \(x, target\)"):
        system.transition(params.recurrent, hidden, inputs)


def test_names_are_functions_whatever_has_been_imported() -> None:
    for name in ("linen", "nnx"):
        importlib.import_module(f"jtrunc.adapters.{name}")
        assert inspect.isfunction(getattr(adapters, name))
