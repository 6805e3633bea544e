"""flax cells beside their adapted systems; what the tests of the adapters compare."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jtrunc import adapters

FEATURES, WIDTH, OUTPUTS = 3, 8, 2


class FlaxCase(NamedTuple):
    """An adapted system, and the same model as a flax user writes it.

    `step` is flax's own ``(theta, carry, x) -> (carry, output)``, `readout` its ``(params, output)``.
    """

    system: Any
    params: Any
    hidden: Any
    step: Callable[..., Any]
    readout: Callable[..., Any]


def squared_error(prediction: jax.Array, target: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    return jnp.sum((prediction - target) ** 2), {"prediction": prediction}


def data(length: int, batch: tuple[int, ...], features: int = FEATURES) -> tuple[jax.Array, jax.Array]:
    generator = np.random.default_rng(length)
    x = jnp.asarray(generator.normal(size=(length, *batch, features)))
    return x, jnp.asarray(generator.normal(size=(length, *batch, OUTPUTS)))


def flax_losses(case: FlaxCase, params: Any, carry: Any, inputs: Any) -> tuple[Any, jax.Array]:
    """flax's own cell under `jax.lax.scan`: the carry after the last step, and every step's loss."""

    def step(carry: Any, xs: Any) -> tuple[Any, jax.Array]:
        x, target = xs
        carry, output = case.step(params.recurrent, carry, x)
        return carry, squared_error(case.readout(params.readout, output), target)[0]

    return jax.lax.scan(step, carry, inputs)


def random_biases(params: Any) -> Any:
    """Parameters away from their initial zeros, so that a bias in the wrong place shows."""
    leaves, structure = jax.tree.flatten(params)
    generator = np.random.default_rng(7)
    return jax.tree.unflatten(structure, [leaf + 0.1 * generator.normal(size=leaf.shape) for leaf in leaves])


def case_of(adapted: Any, step: Callable[..., Any], readout: Callable[..., Any]) -> FlaxCase:
    system, params, hidden = adapted
    return FlaxCase(system, random_biases(params), hidden, step, readout)


def linen_case(cell: Any, batch: tuple[int, ...], x: Any = None) -> FlaxCase:
    """A linen cell or list of cells."""
    readout = nn.Dense(OUTPUTS, param_dtype=jnp.float64)
    x = data(1, batch)[0][0] if x is None else x
    adapted = adapters.linen(cell, readout, squared_error, key=jax.random.key(0), inputs=x)

    def apply(module: Any, theta: Any, *args: Any) -> Any:
        return module.apply({"params": theta}, *args)

    def step(theta: Any, carry: Any, x: Any) -> Any:
        if not isinstance(cell, list):
            return apply(cell, theta, carry, x)
        new = []
        for layer, theta_l, carry_l in zip(cell, theta, carry, strict=True):
            carry_l, x = apply(layer, theta_l, carry_l, x)
            new.append(carry_l)
        return tuple(new), x

    return case_of(adapted, step, lambda theta, output: apply(readout, theta, output))


def nnx_case(cell: Any, batch: tuple[int, ...], x: Any = None) -> FlaxCase:
    """An nnx cell or list of cells."""
    readout = nnx.Linear(WIDTH, OUTPUTS, param_dtype=jnp.float64, rngs=nnx.Rngs(1))
    x = data(1, batch)[0][0] if x is None else x
    adapted = adapters.nnx(cell, readout, squared_error, inputs=x)

    def apply(module: Any, theta: Any, *args: Any) -> Any:
        module = nnx.clone(module)
        nnx.update(module, theta)
        return module(*args)

    def step(theta: Any, carry: Any, x: Any) -> Any:
        if not isinstance(cell, list):
            return apply(cell, theta, carry, x)
        new = []
        for layer, theta_l, carry_l in zip(cell, theta, carry, strict=True):
            carry_l, x = apply(layer, theta_l, carry_l, x)
            new.append(carry_l)
        return tuple(new), x

    return case_of(adapted, step, lambda theta, output: apply(readout, theta, output))


class LinenLeaky(nn.RNNCellBase):
    """A cell of a user's own: a leaky unit whose output is a Dense of its state, not the state."""

    @nn.compact
    def __call__(self, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        drive = nn.Dense(WIDTH, param_dtype=jnp.float64)(jnp.concatenate([carry, x], axis=-1))
        carry = 0.7 * carry + 0.3 * jnp.tanh(drive)
        return carry, nn.Dense(WIDTH, param_dtype=jnp.float64)(carry)

    @nn.nowrap
    def initialize_carry(self, rng: Any, input_shape: tuple[int, ...]) -> jax.Array:
        return jnp.zeros((*input_shape[:-1], WIDTH))

    @property
    def num_feature_axes(self) -> int:
        return 1


class NnxLeaky(nnx.RNNCellBase):
    """The same in nnx."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.drive = nnx.Linear(FEATURES + WIDTH, WIDTH, param_dtype=jnp.float64, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, carry: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry = 0.7 * carry + 0.3 * jnp.tanh(self.drive(jnp.concatenate([carry, inputs], axis=-1)))
        return carry, self.out(carry)

    def initialize_carry(self, input_shape: tuple[int, ...], rngs: Any = None, carry_init: Any = None) -> Any:
        return jnp.zeros((*input_shape[:-1], WIDTH))

    @property
    def num_feature_axes(self) -> int:
        return 1


def _linen(cell_type: Any, **options: Any) -> Callable[[tuple[int, ...]], FlaxCase]:
    return lambda batch: linen_case(cell_type(WIDTH, param_dtype=jnp.float64, **options), batch)


def nnx_cell(cell_type: Any, in_features: int = FEATURES, seed: int = 0, **options: Any) -> Any:
    options = {"param_dtype": jnp.float64, "dtype": jnp.float64} | options
    return cell_type(in_features, WIDTH, rngs=nnx.Rngs(seed), **options)


def _nnx(cell_type: Any, **options: Any) -> Callable[[tuple[int, ...]], FlaxCase]:
    return lambda batch: nnx_case(nnx_cell(cell_type, **options), batch)


def _linen_stack(batch: tuple[int, ...]) -> FlaxCase:
    cells = [nn.LSTMCell, nn.GRUCell, nn.SimpleCell]
    return linen_case([cell(WIDTH, param_dtype=jnp.float64) for cell in cells], batch)


def _nnx_stack(batch: tuple[int, ...]) -> FlaxCase:
    cells = [(nnx.GRUCell, FEATURES), (nnx.OptimizedLSTMCell, WIDTH), (nnx.LSTMCell, WIDTH)]
    return nnx_case([nnx_cell(cell, size, seed=size) for cell, size in cells], batch)


def _linen_mixed_stack(batch: tuple[int, ...]) -> FlaxCase:
    return linen_case(
        [nn.MGUCell(WIDTH, param_dtype=jnp.float64), nn.LSTMCell(WIDTH, param_dtype=jnp.float64)], batch
    )


def _nnx_mixed_stack(batch: tuple[int, ...]) -> FlaxCase:
    return nnx_case([NnxLeaky(nnx.Rngs(0)), nnx_cell(nnx.GRUCell, WIDTH)], batch)


STRUCTURED: dict[str, Callable[[tuple[int, ...]], FlaxCase]] = {
    "linen_simple": _linen(nn.SimpleCell),
    "linen_simple_residual_relu": _linen(nn.SimpleCell, residual=True, activation_fn=nn.relu),
    "linen_lstm": _linen(nn.LSTMCell),
    "linen_optimized_lstm": _linen(nn.OptimizedLSTMCell, dtype=jnp.float64),
    "linen_lstm_hard": _linen(nn.LSTMCell, gate_fn=nn.hard_sigmoid, activation_fn=nn.soft_sign),
    "linen_gru": _linen(nn.GRUCell),
    "linen_gru_gelu": _linen(nn.GRUCell, activation_fn=nn.gelu),
    "linen_stack": _linen_stack,
    "nnx_simple": _nnx(nnx.SimpleCell),
    "nnx_simple_residual": _nnx(nnx.SimpleCell, residual=True),
    "nnx_lstm": _nnx(nnx.LSTMCell),
    "nnx_optimized_lstm": _nnx(nnx.OptimizedLSTMCell, dtype=None),
    "nnx_gru": _nnx(nnx.GRUCell),
    "nnx_gru_softsign": _nnx(nnx.GRUCell, activation_fn=nnx.soft_sign),
    "nnx_stack": _nnx_stack,
}

GENERIC: dict[str, Callable[[tuple[int, ...]], FlaxCase]] = {
    "linen_mgu": _linen(nn.MGUCell),
    "linen_own_cell": lambda batch: linen_case(LinenLeaky(), batch),
    "linen_softmax_gate": _linen(nn.LSTMCell, gate_fn=nn.softmax),
    "linen_mixed_stack": _linen_mixed_stack,
    "nnx_own_cell": lambda batch: nnx_case(NnxLeaky(nnx.Rngs(0)), batch),
    "nnx_softmax": _nnx(nnx.GRUCell, activation_fn=nnx.softmax),
    "nnx_mixed_stack": _nnx_mixed_stack,
}

STRUCTURED = {name: functools.cache(build) for name, build in STRUCTURED.items()}
GENERIC = {name: functools.cache(build) for name, build in GENERIC.items()}
CASES = STRUCTURED | GENERIC

EACH_CELL = [
    name
    for name in CASES
    if name.removeprefix("linen_").removeprefix("nnx_")
    in ("simple", "lstm", "optimized_lstm", "gru", "mgu", "stack", "own_cell")
]
"""Every cell once; the others differ in an option, or mix these."""
