"""Gradient and SGD step of a user's own two functions, against jax.grad through lax.scan of the same two.

No structure is declared: this is the price of the generic path. All contestants run their windows in
sequence inside one program, and cut the gradient where a window begins.
"""

from __future__ import annotations

if __name__ == "__main__":
    from pinning import pin_to_one_core

    pin_to_one_core()

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from harness import Effort, Target, compare, compile_program, main

import jtrunc
from jtrunc import truncation

STEPS, RATE = 50, 1e-3
LIMIT = Target(1.03)

Update = Callable[[Any, Any, Any], tuple[Any, Any]]
"""``(params, state, inputs) -> (params, state)``."""


class Case(NamedTuple):
    """A system, its arguments, and windows of inputs with leading axes (updates, steps)."""

    name: str
    system: jtrunc.System
    params: jtrunc.Params
    hidden: Any
    windows: Any


def oscillators(units: int, updates: int) -> Case:
    """A simulator of coupled, damped, driven oscillators; 2 · units numbers of state; one is observed."""

    def transition(theta: Any, hidden: Any, inputs: Any) -> Any:
        position, velocity = hidden
        drive, _ = inputs
        force = theta["coupling"] @ jnp.sin(position) - position + theta["drive"] * drive
        velocity = velocity + 0.1 * (force - jax.nn.softplus(theta["damping"]) * velocity)
        return position + 0.1 * velocity, velocity

    def loss(params: jtrunc.Params, hidden: Any, inputs: Any) -> tuple[jax.Array, Any]:
        return jnp.square(params.readout @ hidden[0] - inputs[1]), ()

    keys = jax.random.split(jax.random.key(0), 4)
    theta = {
        "coupling": 0.3 * jax.random.normal(keys[0], (units, units), jnp.float32) / units**0.5,
        "damping": jnp.zeros(units, jnp.float32),
        "drive": jax.random.normal(keys[1], (units,), jnp.float32),
    }
    params = jtrunc.Params(theta, jax.random.normal(keys[2], (units,), jnp.float32))
    drive = jax.random.normal(keys[3], (updates, STEPS), jnp.float32)
    hidden = (jnp.zeros(units, jnp.float32), jnp.zeros(units, jnp.float32))
    system = jtrunc.System(transition, loss)
    return Case(f"oscillators, state {2 * units}", system, params, hidden, (drive, jnp.sin(drive)))


def own_lstm(width: int, batch: int, updates: int) -> Case:
    """An LSTM as anyone would write it, with squared error; inputs are as wide as the state."""

    def transition(theta: Any, hidden: Any, inputs: Any) -> Any:
        cell, output = hidden
        x, _ = inputs
        gates = jnp.concatenate([x, output], axis=-1) @ theta["kernel"] + theta["bias"][None]
        write, forget, candidate, read = jnp.split(gates, 4, axis=-1)
        cell = jax.nn.sigmoid(forget + 1.0) * cell + jax.nn.sigmoid(write) * jnp.tanh(candidate)
        return cell, jax.nn.sigmoid(read) * jnp.tanh(cell)

    def loss(params: jtrunc.Params, hidden: Any, inputs: Any) -> tuple[jax.Array, Any]:
        return jnp.mean(jnp.square(hidden[1] @ params.readout - inputs[1])), ()

    keys = jax.random.split(jax.random.key(0), 3)
    kernel = jax.random.normal(keys[0], (2 * width, 4 * width), jnp.float32) / (2 * width) ** 0.5
    readout = jax.random.normal(keys[1], (width, width), jnp.float32) / width**0.5
    params = jtrunc.Params({"kernel": kernel, "bias": jnp.zeros(4 * width, jnp.float32)}, readout)
    x = jax.random.normal(keys[2], (updates, STEPS, batch, width), jnp.float32)
    hidden = (jnp.zeros((batch, width), jnp.float32), jnp.zeros((batch, width), jnp.float32))
    return Case(f"own LSTM n={width} B={batch}", jtrunc.System(transition, loss), params, hidden, (x, x))


def sgd(params: Any, grads: Any) -> Any:
    return jax.tree.map(lambda param, grad: param - RATE * grad, params, grads)


def through_scan(system: jtrunc.System, scan: Callable[..., Any]) -> Update:
    """jax.grad through a scan over the two functions."""

    def update(params: jtrunc.Params, hidden: Any, inputs: Any) -> tuple[jtrunc.Params, Any]:
        def total_loss(params: jtrunc.Params) -> tuple[jax.Array, Any]:
            def step(hidden: Any, inputs_t: Any) -> tuple[Any, jax.Array]:
                hidden = system.transition(params.recurrent, hidden, inputs_t)
                return hidden, system.loss(params, hidden, inputs_t)[0]

            after, losses = scan(step, hidden, inputs)
            return jnp.sum(losses), after

        grads, after = jax.grad(total_loss, has_aux=True)(params)
        return sgd(params, grads), after

    return update


def by_estimator(estimator: jtrunc.GradientEstimator) -> Update:
    def update(params: jtrunc.Params, state: Any, inputs: Any) -> tuple[jtrunc.Params, Any]:
        estimate, state = estimator.update(params, state, inputs)
        return sgd(params, estimate.grads), state

    return update


def in_sequence(update: Update) -> Update:
    def run(params: Any, state: Any, windows: Any) -> tuple[Any, Any]:
        def step(carry: tuple[Any, Any], inputs: Any) -> tuple[Any, None]:
            return update(carry[0], carry[1], inputs), None

        return jax.lax.scan(step, (params, state), windows)[0]

    return run


def every(length: int) -> Callable[..., Any]:
    """jtrunc.scan, cut every `length` steps."""

    def scan(f: Any, init: Any, xs: Any) -> Any:
        return jtrunc.scan(f, init, xs, truncation=truncation.every(length))

    return scan


def measure_case(case: Case, effort: Effort) -> list[dict[str, Any]]:
    exact = jtrunc.bptt(case.system)
    truncated = jtrunc.truncated_bptt(case.system, STEPS)
    contestants = {
        "lax.scan + jax.grad": (through_scan(case.system, jax.lax.scan), case.hidden),
        "bptt": (by_estimator(exact), exact.init(case.params, case.hidden)),
        "truncated_bptt": (by_estimator(truncated), truncated.init(case.params, case.hidden)),
        "jtrunc.scan, every(25)": (through_scan(case.system, every(25)), case.hidden),
    }
    programs = {
        name: compile_program(in_sequence(update), case.params, state, case.windows)
        for name, (update, state) in contestants.items()
    }
    plain, *ours = programs
    return compare(case.name, programs, plain, dict.fromkeys(ours, LIMIT), effort)


def measure(quick: bool, effort: Effort) -> list[dict[str, Any]]:
    cases = (
        [oscillators(units=2, updates=2)]
        if quick
        else [oscillators(units=16, updates=100), own_lstm(width=256, batch=16, updates=2)]
    )
    return [row for case in cases for row in measure_case(case, effort)]


if __name__ == "__main__":
    main("any_cell", __doc__, measure)
