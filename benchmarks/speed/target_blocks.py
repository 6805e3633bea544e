"""Blocks in parallel: an iteration of target propagation against jax.grad through the plain jax.lax.scan.

The same cell, readout, losses and T steps for all. An iteration is one update: gradient, one step on the
free states, one on their multipliers. The augmented Lagrangian takes one pass over the blocks for it, ADMM
two; both begin where the last visit left the free states, so that nothing runs through all T steps. "bptt"
is this package's own pass over all T steps, one after the other: what the two-phase pass is worth without
any blocks. "products alone" are all products of weights with T · streams rows at once: as many flops as one
pass has, in no order. Cases with more streams show where that many rows fill the products without blocks.
"""

from __future__ import annotations

if __name__ == "__main__":
    from pinning import pin_to_one_core

    pin_to_one_core()

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import Effort, Program, Target, compare, compile_program, main_by_case

import jtrunc
from jtrunc import cells

FEATURES, CLASSES = 16, 16
PLAIN = "lax.scan + jax.grad"
METHODS: dict[str, Literal["augmented_lagrangian", "admm"]] = {
    "augmented Lagrangian": "augmented_lagrangian",
    "ADMM": "admm",
}
GATES = {"tanh": 1, "gru": 3}


class Case(NamedTuple):
    """A cell, its sizes, numbers of blocks T/B, and the bound on the augmented Lagrangian's ratio."""

    kind: str
    width: int
    streams: int = 1
    steps: int = 1000
    num_blocks: tuple[int, ...] = (20,)
    limit: float | None = None

    def __str__(self) -> str:
        return f"{self.kind} n={self.width}, streams={self.streams}, T={self.steps}"


COUNTS = (1, 2, 4, 8, 16, 20, 32, 64)
CASES = (
    Case("tanh", 20, limit=0.25),
    Case("tanh", 256, limit=0.45),
    Case("gru", 256),
    *(Case("tanh", width, steps=960, num_blocks=COUNTS) for width in (20, 256)),
    *(Case("tanh", width, streams) for width in (20, 256) for streams in (4, 16, 64, 256)),
)
SMALL = (Case("tanh", 4, streams=2, steps=12, num_blocks=(3,)),)


class Problem(NamedTuple):
    """A model and the steps that every contestant learns from."""

    model: cells.Model
    params: jtrunc.Params
    hidden: Any
    inputs: tuple[jax.Array, jax.Array]


def problem_of(case: Case) -> Problem:
    cell = getattr(cells, case.kind)(FEATURES, case.width)
    model = cells.model(cell, CLASSES, cells.softmax_cross_entropy)
    shape = (case.steps, case.streams)
    x = jax.random.normal(jax.random.key(1), (*shape, FEATURES), jnp.float32)
    inputs = (x, jax.random.randint(jax.random.key(2), shape, 0, CLASSES))
    return Problem(model, model.init(jax.random.key(0)), model.initial_hidden((case.streams,)), inputs)


def plain_gradient(system: jtrunc.System) -> Callable[..., Any]:
    def gradient(params: jtrunc.Params, hidden: Any, inputs: Any) -> tuple[jax.Array, jtrunc.Params]:
        def total_loss(params: jtrunc.Params) -> jax.Array:
            def step(hidden: Any, inputs_t: Any) -> tuple[Any, jax.Array]:
                hidden = system.transition(params.recurrent, hidden, inputs_t)
                return hidden, system.loss(params, hidden, inputs_t)[0]

            return jnp.sum(jax.lax.scan(step, hidden, inputs)[1])

        return jax.value_and_grad(total_loss)(params)

    return gradient


def update_of(estimator: jtrunc.GradientEstimator) -> Callable[..., Any]:
    def update(params: jtrunc.Params, state: Any, inputs: Any) -> Any:
        estimate, state = estimator.update(params, state, inputs)
        return estimate.loss, estimate.grads, state

    return update


def compiled_update(
    problem: Problem, estimator: jtrunc.GradientEstimator, effort: Effort
) -> tuple[Program, float]:
    """The second update, from the free states that the first one left; and the loss of the first."""
    params, hidden, inputs = problem[1:]
    arguments = (params, estimator.init(params, hidden), inputs)
    program = compile_program(update_of(estimator), *arguments, clock=effort.clock)
    loss, _, state = program.executable(*arguments)
    return program._replace(calls=((params, state, inputs),)), float(loss)


def compiled_products(problem: Problem, case: Case, effort: Effort) -> Program:
    """What one pass over all steps multiplies, as one product each for output, gradient and cotangent."""
    width, outputs = case.width, GATES[case.kind] * case.width
    shapes = {"recurrent": (width, outputs), "input": (FEATURES, outputs), "readout": (width, CLASSES)}
    keys = jax.random.split(jax.random.key(3), len(shapes))
    weights = {
        name: jax.random.normal(key, shape, jnp.float32)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    hiddens = jax.random.normal(jax.random.key(4), (case.steps * case.streams, width), jnp.float32)

    def products(weights: Any, hiddens: jax.Array, x: jax.Array) -> Any:
        features = {"recurrent": hiddens, "input": x, "readout": hiddens}
        values = {name: features[name] @ weight for name, weight in weights.items()}
        gradients = {name: features[name].T @ value for name, value in values.items()}
        cotangents = [values[name] @ weights[name].T for name in ("recurrent", "readout")]
        return gradients, cotangents

    x = problem.inputs[0].reshape(-1, FEATURES)
    return compile_program(products, weights, hiddens, x, clock=effort.clock)


def measure_case(case: Case, effort: Effort) -> list[dict[str, Any]]:
    problem = problem_of(case)
    system, params, hidden, inputs = problem.model.system, *problem[1:]
    programs = {PLAIN: compile_program(plain_gradient(system), params, hidden, inputs, clock=effort.clock)}
    loss, _ = programs[PLAIN].run()[0]
    programs["bptt"], _ = compiled_update(problem, jtrunc.bptt(system), effort)
    targets = {}
    for title, method in METHODS.items():
        for count in case.num_blocks:
            estimator = jtrunc.target_propagation(
                system, case.steps // count, 1.0, method, initial="persistent", num_blocks=count
            )
            name = f"{title}, {count} block{'s' if count > 1 else ''}"
            programs[name], first_loss = compiled_update(problem, estimator, effort)
            if method == "augmented_lagrangian":  # reads the true states first: the same steps, the same loss
                np.testing.assert_allclose(first_loss, loss, rtol=1e-4)
                targets |= {} if case.limit is None else {name: Target(case.limit)}
    programs["products alone"] = compiled_products(problem, case, effort)
    return compare(str(case), programs, PLAIN, targets, effort)


if __name__ == "__main__":
    main_by_case("target_blocks", __doc__, CASES, SMALL, measure_case)
