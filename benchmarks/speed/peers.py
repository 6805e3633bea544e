"""Training windows of an LSTM (n = 512, 50 steps), against PyTorch's nn.LSTM on one thread and flax's RNN.

The same weights, windows, loss and SGD for all, which is checked. A call makes several updates in sequence,
inside one program where the contestant is one; PyTorch's is a loop in Python. Without PyTorch the ratios are
those to flax's scan, and nothing is judged.
"""

from __future__ import annotations

if __name__ == "__main__":
    from pinning import pin_to_one_core

    pin_to_one_core()

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import structured_cells
from flax import nnx
from harness import Effort, Program, Target, compare, compile_program, main_by_case, not_installed
from pytorch import PYTORCH, torch, training_windows
from structured_cells import (
    CLASSES,
    FEATURES,
    RATE,
    STEPS,
    Update,
    check_same_step,
    in_sequence,
    jtrunc_update,
    sgd,
)

import jtrunc
from jtrunc import adapters, cells

LIMIT = Target(1.0)
KERNELS = ("hidden_kernel", "input_kernel", "bias")
SCAN, LINEN, NNX, ADAPTED, OWN = (
    "flax scan + jax.grad",
    "flax.linen.RNN + jax.grad",
    "flax.nnx.RNN + jax.grad",
    "jtrunc, flax's cell",
    "jtrunc's cell",
)


class Case(NamedTuple):
    """Sizes, and how many updates a call makes."""

    width: int
    batch: int
    updates: int

    def __str__(self) -> str:
        return f"lstm n={self.width} B={self.batch}, {self.updates} updates"


CASES = (Case(512, 1, 10), Case(512, 4, 10), Case(512, 64, 6))
SMALL = (Case(4, 2, 2),)


class Contestant(NamedTuple):
    """An update, what it starts from, and ``params -> jtrunc.Params`` of jtrunc's own LSTM."""

    update: Update
    params: Any
    state: Any
    read: Callable[[Any], jtrunc.Params]


def linen_params(own: jtrunc.Params) -> jtrunc.Params:
    """The weights of jtrunc's LSTM as those of flax.linen.OptimizedLSTMCell."""
    theta = {}
    split = {name: jnp.split(leaf, 4, axis=-1) for name, leaf in own.recurrent.items()}
    for gate, hidden, inputs, bias in zip("ifgo", *(split[name] for name in KERNELS), strict=True):
        theta |= {f"h{gate}": {"kernel": hidden, "bias": bias}, f"i{gate}": {"kernel": inputs}}
    return own._replace(recurrent=theta)


def from_linen(params: jtrunc.Params) -> jtrunc.Params:
    def joined(side: str, leaf: str) -> jax.Array:
        return jnp.concatenate([params.recurrent[side + gate][leaf] for gate in "ifgo"], axis=-1)

    parts = joined("h", "kernel"), joined("i", "kernel"), joined("h", "bias")
    return params._replace(recurrent=dict(zip(KERNELS, parts, strict=True)))


def summed_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.sum(jax.vmap(cells.softmax_cross_entropy)(logits, targets))


class LinenNetwork(nn.Module):
    """What a flax user writes today: nn.RNN over the cell, a dense readout of all steps at once."""

    width: int

    @nn.compact
    def __call__(self, carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        cell = nn.OptimizedLSTMCell(self.width, parent=None)
        rnn = nn.RNN(cell, time_major=True, return_carry=True, name="rnn")
        carry, outputs = rnn(x, initial_carry=carry)
        return carry, nn.Dense(CLASSES, name="readout")(outputs)


def linen_rnn(case: Case, own: jtrunc.Params, hidden: Any) -> Contestant:
    network = LinenNetwork(case.width)

    def update(params: jtrunc.Params, carry: Any, window: Any) -> tuple[jtrunc.Params, Any]:
        x, targets = window

        def loss(params: jtrunc.Params) -> tuple[jax.Array, Any]:
            variables = {"params": {"rnn": {"cell": params.recurrent}, "readout": params.readout}}
            result: Any = network.apply(variables, carry, x)
            return summed_loss(result[1], targets), result[0]

        grads, after = jax.grad(loss, has_aux=True)(params)
        return sgd(params, grads), after

    return Contestant(update, linen_params(own), hidden, from_linen)


class NnxNetwork(nnx.Module):
    """The same in flax's newer library."""

    def __init__(self, case: Case, own: jtrunc.Params) -> None:
        rngs = nnx.Rngs(0)
        self.cell = nnx.OptimizedLSTMCell(FEATURES, case.width, rngs=rngs)
        self.rnn = nnx.RNN(self.cell, time_major=True, return_carry=True, rngs=False)
        self.readout = nnx.Linear(case.width, CLASSES, rngs=rngs)
        for name, variable in self.variables().items():
            variable.set_value(own.recurrent[name])
        self.readout.kernel.set_value(own.readout["kernel"])

    def variables(self) -> dict[str, Any]:
        cell: Any = self.cell
        return dict(zip(KERNELS, (cell.dense_h.kernel, cell.dense_i.kernel, cell.dense_h.bias), strict=True))

    def weights(self) -> jtrunc.Params:
        theta = {name: variable[...] for name, variable in self.variables().items()}
        readout: Any = self.readout
        return jtrunc.Params(theta, {"kernel": readout.kernel[...], "bias": readout.bias[...]})


def nnx_rnn(case: Case, own: jtrunc.Params, hidden: Any) -> Contestant:
    graph, start, rest = nnx.split(NnxNetwork(case, own), nnx.Param, ...)

    def update(params: Any, carry: Any, window: Any) -> tuple[Any, Any]:
        x, targets = window

        def loss(params: Any) -> tuple[jax.Array, Any]:
            network = nnx.merge(graph, params, rest)
            result: Any = network.rnn(x, initial_carry=carry)
            return summed_loss(network.readout(result[1]), targets), result[0]

        grads, after = jax.grad(loss, has_aux=True)(params)
        return sgd(params, grads), after

    return Contestant(update, start, hidden, lambda params: nnx.merge(graph, params, rest).weights())


def by_jtrunc(system: jtrunc.System, params: jtrunc.Params, hidden: Any, read: Any) -> Contestant:
    estimator, update = jtrunc_update(system)
    return Contestant(update, params, estimator.init(params, hidden), read)


def contestants_of(case: Case, key: jax.Array) -> dict[str, Contestant]:
    """Everybody but PyTorch; the first is the one by whom the others are checked."""
    model = cells.model(cells.lstm(FEATURES, case.width), CLASSES, cells.softmax_cross_entropy)
    own, hidden = model.init(key), model.initial_hidden((case.batch,))
    cell, readout = nn.OptimizedLSTMCell(case.width), nn.Dense(CLASSES)
    example = jnp.zeros((case.batch, FEATURES), jnp.float32)
    adapted, *_ = adapters.linen(cell, readout, cells.softmax_cross_entropy, key=key, inputs=example)
    by_scan = structured_cells.flax_update(structured_cells.Case("lstm", case.width, case.batch, 1.0))
    as_linen = linen_params(own)
    return {
        OWN: by_jtrunc(model.system, own, hidden, lambda params: params),
        ADAPTED: by_jtrunc(adapted, as_linen, hidden, from_linen),
        SCAN: Contestant(by_scan, as_linen, hidden, from_linen),
        LINEN: linen_rnn(case, own, hidden),
        NNX: nnx_rnn(case, own, hidden),
    }


def measure_case(case: Case, effort: Effort) -> list[dict[str, Any]]:
    x_key, target_key, key = jax.random.split(jax.random.key(0), 3)
    shape = (case.updates, STEPS, case.batch)
    x = jax.random.normal(x_key, (*shape, FEATURES), jnp.float32)
    windows = (x, jax.random.randint(target_key, shape, 0, CLASSES))
    contestants = contestants_of(case, key)
    own, state = contestants[OWN].params, contestants[OWN].state
    programs = {
        name: compile_program(in_sequence(one.update, case.updates), one.params, one.state, windows)
        for name, one in contestants.items()
    }
    moved = {name: one.read(programs[name].run()[0][0]) for name, one in contestants.items()}
    if torch is not None:
        run = training_windows(own, state.hidden, windows, RATE)
        programs[PYTORCH] = Program(run, ((),), compile_seconds=0.0, temp_bytes=0)
        moved[PYTORCH] = run()
    for found in moved.values():
        check_same_step(own, moved[OWN], found)
    if torch is None:
        return [not_installed(str(case), PYTORCH), *compare(str(case), programs, SCAN, {}, effort)]
    return compare(str(case), programs, PYTORCH, dict.fromkeys((OWN, ADAPTED), LIMIT), effort)


if __name__ == "__main__":
    main_by_case("peers", __doc__, CASES, SMALL, measure_case)
