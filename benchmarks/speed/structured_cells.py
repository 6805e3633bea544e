"""Gradient and SGD step of structured cells, against jax.grad through flax's own scan of the same cell.

The same cell, readout, loss and windows of 50 steps for all; "GEMM floor" is the matrix products alone, in
the order in which they depend on each other, each in the fastest form that is known here: what no arrangement
of the elementwise rest could beat.
Cases with more than one update run them in sequence inside one program, as online training does.
"""

from __future__ import annotations

if __name__ == "__main__":
    from pinning import pin_to_one_core

    pin_to_one_core()

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from harness import Effort, Target, compare, compile_program, main

import jtrunc
from jtrunc import adapters, cells
from jtrunc.backward.fused import matrix_on_the_left
from jtrunc.backward.thresholds import ROWS_TO_TURN

STEPS, FEATURES, CLASSES, RATE = 50, 64, 50, 1e-2

Update = Callable[[Any, Any, Any], tuple[Any, Any]]
"""``(params, state, (x, target)) -> (params, state)``."""


class Case(NamedTuple):
    """A cell, its sizes, and the bound on the ratio to flax."""

    kind: str
    width: int
    batch: int
    limit: float
    updates: int = 1

    def __str__(self) -> str:
        sequence = f", {self.updates} updates" if self.updates > 1 else ""
        return f"{self.kind} n={self.width} B={self.batch}{sequence}"


CASES = (
    Case("lstm", 512, 1, 0.80),
    Case("lstm", 512, 4, 0.80),
    Case("lstm", 1000, 20, 0.75),
    Case("lstm", 512, 64, 0.95),
    Case("tanh", 20, 1, 0.55, updates=200),
    Case("gru", 128, 1, 0.40),
)
SMALL = (Case("gru", 4, 1, 0.40, updates=2),)

FLAX = {"lstm": nn.OptimizedLSTMCell, "tanh": nn.SimpleCell, "gru": nn.GRUCell}
OWN = {"lstm": cells.lstm, "tanh": cells.tanh, "gru": cells.gru}
GATES = {"lstm": 4, "tanh": 1, "gru": 3}


class Network(nn.Module):
    """What a flax user writes: nn.scan over the cell, a dense readout of all steps at once."""

    cell: Any
    width: int

    @nn.compact
    def __call__(self, carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        scan = nn.scan(self.cell, variable_broadcast="params", split_rngs={"params": False})
        carry, outputs = scan(self.width, name="cell")(carry, x)
        return carry, nn.Dense(CLASSES, name="readout")(outputs)


def sgd(params: Any, grads: Any) -> Any:
    return jax.tree.map(lambda param, grad: param - RATE * grad, params, grads)


def flax_update(case: Case) -> Update:
    """jax.grad through flax's scan, on the parameters of the adapter."""
    network = Network(FLAX[case.kind], case.width)

    def update(params: jtrunc.Params, carry: Any, window: Any) -> tuple[jtrunc.Params, Any]:
        x, targets = window

        def loss(params: jtrunc.Params) -> tuple[jax.Array, Any]:
            variables = {"params": {"cell": params.recurrent, "readout": params.readout}}
            result: Any = network.apply(variables, carry, x)
            after, logits = result
            return jnp.sum(jax.vmap(cells.softmax_cross_entropy)(logits, targets)), after

        grads, after = jax.grad(loss, has_aux=True)(params)
        return sgd(params, grads), after

    return update


def jtrunc_update(system: jtrunc.System) -> tuple[jtrunc.GradientEstimator, Update]:
    estimator = jtrunc.truncated_bptt(system, STEPS)

    def update(params: jtrunc.Params, state: Any, window: Any) -> tuple[jtrunc.Params, Any]:
        estimate, state = estimator.update(params, state, window)
        return sgd(params, estimate.grads), state

    return estimator, update


def floor_update(case: Case) -> Update:
    """The products of the cell, its input projection and its readout; sums over gates in place of gates."""
    gates = GATES[case.kind]

    def update(weights: Any, hidden: jax.Array, window: Any) -> tuple[Any, jax.Array]:
        x, _ = window
        kernel, input_kernel, readout = weights
        turned = jax.lax.optimization_barrier(kernel.T)
        projected = _gate_sum(x @ input_kernel, gates)

        def forward(hidden: jax.Array, projected: jax.Array) -> tuple[jax.Array, jax.Array]:
            left = case.batch in ROWS_TO_TURN
            values = matrix_on_the_left(turned, hidden) if left else hidden @ kernel
            hidden = _gate_sum(values, gates) + projected
            return hidden, hidden

        def backward(cotangent: jax.Array, from_loss: jax.Array) -> tuple[jax.Array, jax.Array]:
            delta = jnp.concatenate([cotangent + from_loss] * gates, axis=-1)
            return matrix_on_the_left(kernel, delta), delta

        last, hiddens = jax.lax.scan(forward, hidden, projected)
        logits = hiddens @ readout
        _, deltas = jax.lax.scan(backward, jnp.zeros_like(hidden), logits @ readout.T, reverse=True)
        products = (_over_time(hiddens, deltas), _over_time(x, deltas), _over_time(hiddens, logits))
        return (sgd(weights, products) if case.updates > 1 else products), last

    return update


def _gate_sum(array: jax.Array, gates: int) -> jax.Array:
    return sum(jnp.split(array, gates, axis=-1))  # pyright: ignore


def _over_time(left: jax.Array, right: jax.Array) -> jax.Array:
    return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])


def in_sequence(update: Update, updates: int) -> Update:
    """One update, or all of so many windows in one program."""

    def run(params: Any, state: Any, windows: Any) -> tuple[Any, Any]:
        def step(carry: tuple[Any, Any], window: Any) -> tuple[Any, None]:
            return update(carry[0], carry[1], window), None

        return jax.lax.scan(step, (params, state), windows)[0]

    def run_one(params: Any, state: Any, windows: Any) -> tuple[Any, Any]:
        return update(params, state, jax.tree.map(lambda leaf: leaf[0], windows))

    return run if updates > 1 else run_one


def measure_case(case: Case, effort: Effort) -> list[dict[str, Any]]:
    x_key, target_key, key, floor_key = jax.random.split(jax.random.key(0), 4)
    shape = (case.updates, STEPS, case.batch)
    x = jax.random.normal(x_key, (*shape, FEATURES), jnp.float32)
    windows = (x, jax.random.randint(target_key, shape, 0, CLASSES))

    cell, readout = FLAX[case.kind](case.width), nn.Dense(CLASSES)
    system, params, hidden = adapters.linen(
        cell, readout, cells.softmax_cross_entropy, key=key, inputs=x[0, 0]
    )
    adapted, adapted_update = jtrunc_update(system)
    model = cells.model(OWN[case.kind](FEATURES, case.width), CLASSES, cells.softmax_cross_entropy)
    own, own_update = jtrunc_update(model.system)
    own_params, own_hidden = model.init(key), model.initial_hidden((case.batch,))
    weights, start = floor_arguments(case, floor_key)

    contestants = {
        "flax scan + jax.grad": (flax_update(case), params, hidden),
        "jtrunc, flax's cell": (adapted_update, params, adapted.init(params, hidden)),
        "jtrunc's cell": (own_update, own_params, own.init(own_params, own_hidden)),
        "GEMM floor": (floor_update(case), weights, start),
    }
    programs = {
        name: compile_program(in_sequence(update, case.updates), *arguments, windows)
        for name, (update, *arguments) in contestants.items()
    }
    plain, adapted_name, own_name, _ = programs
    check_same_step(params, programs[plain].run()[0][0], programs[adapted_name].run()[0][0])
    targets = dict.fromkeys((adapted_name, own_name), Target(case.limit))
    return compare(str(case), programs, plain, targets, effort)


def floor_arguments(case: Case, key: jax.Array) -> tuple[Any, jax.Array]:
    """Weights of the floor's products, small enough that its linear recurrence contracts."""
    inputs = (case.width, FEATURES)
    shapes = [(size, GATES[case.kind] * case.width) for size in inputs] + [(case.width, CLASSES)]
    keys = jax.random.split(key, 3)
    weights = [
        jax.random.normal(k, shape, jnp.float32) / (4 * sum(shape) ** 0.5)
        for k, shape in zip(keys, shapes, strict=True)
    ]
    return tuple(weights), jnp.zeros((case.batch, case.width), jnp.float32)


def check_same_step(before: Any, expected: Any, found: Any) -> None:
    """Both updates moved the parameters by the same vector: the contest is fair."""
    flat = [jax.flatten_util.ravel_pytree(tree)[0] for tree in (before, expected, found)]
    start, one, other = (np.asarray(leaf, np.float64) for leaf in flat)
    error = np.linalg.norm(one - other) / np.linalg.norm(one - start)
    if not error < 1e-2:
        raise AssertionError(f"the two steps differ by {error:.2g} of their length")


def measure(quick: bool, effort: Effort) -> list[dict[str, Any]]:
    return [row for case in (SMALL if quick else CASES) for row in measure_case(case, effort)]


if __name__ == "__main__":
    main("structured_cells", __doc__, measure)
