"""RTRL of a tanh network, per step: against its own matrix product, forward mode and NumPy.

The network has n units, dense inputs and a softmax readout; |θ| = n (n + features + 1). A call takes the
whole window: in one update of the estimator, which returns the gradient and the influence, or ("online") in
updates of one step inside one scan, each with a step of SGD. "D·J" is the floor of RTRL as it is written:
the product (n, n)·(n, |θ|) alone, in a scan that carries J, with rows of D rescaled at each step by data.
XLA copies a carry that a product writes to; with two steps unrolled it copies half as often, which the second
floor shows. No online RTRL goes below it; with θ fixed in a window the sum of products can be ordered better.

The others start from the same state and find the same gradient, which is checked:

- "jax.jacfwd" differentiates the summed loss of a `lax.scan`, all |θ| tangents at once, in shorter windows
  where the full one would take long: its cost per step does not depend on them.
- "jax.jacrev a step" is RTRL as a user of JAX writes it: D and I from `jax.jacrev` of the transition.
- "NumPy" is J = D @ J, the immediate term added in place on the diagonal, and c @ J; "NumPy, two buffers"
  also reuses its memory, which is what decides NumPy's speed here.
"""

from __future__ import annotations

if __name__ == "__main__":
    from pinning import pin_to_one_core

    pin_to_one_core()

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import Effort, Program, Target, compare, compile_program, main_by_case

import jtrunc
from jtrunc import cells

FEATURES, CLASSES, RATE = 32, 32, 1e-3
STRUCTURED, GENERIC, ONLINE, FLOOR = "rtrl", "rtrl, structure=None", ", online", "D·J"
FORWARD, PER_STEP, NUMPY, BUFFERED = "jax.jacfwd", "jax.jacrev a step", "NumPy", "NumPy, two buffers"


class Case(NamedTuple):
    """A network, and the bounds on our cost over the floor's, and on others' over ours."""

    width: int
    steps: int
    to_floor: float
    numpy: float
    forward_steps: int
    dtype: Any = jnp.float32

    def __str__(self) -> str:
        return f"n={self.width} {jnp.dtype(self.dtype).name}"


CASES = (
    Case(20, 100, to_floor=1.2, numpy=5.0, forward_steps=20),
    Case(64, 100, to_floor=1.1, numpy=5.0, forward_steps=2),
    Case(128, 40, to_floor=1.1, numpy=5.0, forward_steps=0),  # the tangents of jacfwd would take gigabytes
    Case(20, 100, to_floor=1.2, numpy=2.5, forward_steps=0, dtype=jnp.float64),
    Case(64, 100, to_floor=1.1, numpy=2.5, forward_steps=0, dtype=jnp.float64),
    Case(128, 40, to_floor=1.1, numpy=2.5, forward_steps=0, dtype=jnp.float64),
)
SMALL = (Case(4, 3, to_floor=1.2, numpy=2.5, forward_steps=3, dtype=jnp.float64),)
FORWARD_MODE = Target(8.0, at_least=True)

Gradient = Callable[[jtrunc.Params, Any, Any], Any]
"""``(params, state, (x, target)) -> (gradient, whatever else must be computed)``."""


class Contest(NamedTuple):
    """The network and its window, in one precision."""

    system: jtrunc.System
    params: jtrunc.Params
    hidden: jax.Array
    inputs: tuple[jax.Array, jax.Array]


def contest(case: Case) -> Contest:
    model = cells.model(cells.tanh(FEATURES, case.width), CLASSES, cells.softmax_cross_entropy)
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (case.steps, FEATURES), case.dtype)
    targets = jax.random.randint(keys[1], (case.steps,), 0, CLASSES)
    hidden = jax.random.uniform(keys[2], (case.width,), case.dtype)
    return Contest(model.system, model.init(keys[3], case.dtype), hidden, (x, targets))


def estimator_gradient(estimator: jtrunc.GradientEstimator) -> Gradient:
    def gradient(params: jtrunc.Params, state: Any, inputs: Any) -> Any:
        estimate, state = estimator.update(params, state, inputs)
        return estimate.grads, (estimate.loss, state)

    return gradient


def online_updates(estimator: jtrunc.GradientEstimator) -> Callable[..., Any]:
    """One update of the estimator and one step of SGD for each row of the inputs."""

    def run(params: jtrunc.Params, state: Any, inputs: Any) -> Any:
        def step(carry: Any, inputs_t: Any) -> tuple[Any, None]:
            params, state = carry
            estimate, state = estimator.update(params, state, inputs_t)
            return (jax.tree.map(lambda p, g: p - RATE * g, params, estimate.grads), state), None

        rows = jax.tree.map(lambda leaf: leaf[:, None], inputs)
        return jax.lax.scan(step, (params, state), rows)[0]

    return run


def forward_mode(system: jtrunc.System) -> Gradient:
    """jax.jacfwd of the summed loss through time; the readout's gradient left out."""

    def gradient(params: jtrunc.Params, hidden: jax.Array, inputs: Any) -> Any:
        def total_loss(theta: Any) -> jax.Array:
            def step(hidden: jax.Array, inputs_t: Any) -> tuple[jax.Array, jax.Array]:
                hidden = system.transition(theta, hidden, inputs_t)
                return hidden, system.loss(params, hidden, inputs_t)[0]

            return jnp.sum(jax.lax.scan(step, hidden, inputs)[1])

        return jtrunc.Params(jax.jacfwd(total_loss)(params.recurrent)), ()

    return gradient


def jacobians_a_step(system: jtrunc.System) -> Gradient:
    """J ← D J + I with D and I from jax.jacrev; each leaf of J has the state in front."""

    def gradient(params: jtrunc.Params, hidden: jax.Array, inputs: Any) -> Any:
        def step(carry: Any, inputs_t: Any) -> tuple[Any, None]:
            hidden, influence, total = carry
            immediate, across = jax.jacrev(system.transition, argnums=(0, 1))(
                params.recurrent, hidden, inputs_t
            )
            hidden = system.transition(params.recurrent, hidden, inputs_t)
            influence = jax.tree.map(lambda j, i: jnp.tensordot(across, j, 1) + i, influence, immediate)
            grads, cotangent = jax.grad(lambda p, h: system.loss(p, h, inputs_t)[0], (0, 1))(params, hidden)
            through = jax.tree.map(lambda j: jnp.tensordot(cotangent, j, 1), influence)
            grads = grads._replace(recurrent=through)
            return (hidden, influence, jax.tree.map(jnp.add, total, grads)), None

        influence = jax.tree.map(lambda p: jnp.zeros((*hidden.shape, *p.shape), p.dtype), params.recurrent)
        zeros = jax.tree.map(jnp.zeros_like, params)
        hidden, influence, total = jax.lax.scan(step, (hidden, influence, zeros), inputs)[0]
        return total, (hidden, influence)

    return gradient


def numpy_gradient(params: jtrunc.Params, hidden: np.ndarray, inputs: Any, *, buffered: bool) -> Any:
    """RTRL as NumPy's users write it; J is (n, n, features of h, x and 1), unit o's weights together."""
    kernel = np.vstack([params.recurrent[name] for name in ("hidden_kernel", "input_kernel")])
    bias, readout = params.recurrent["bias"], params.readout
    width, size = len(hidden), len(kernel) + 1
    influence = np.zeros((width, width, size), kernel.dtype)
    spare = np.empty((width, width * size), kernel.dtype) if buffered else None
    diagonal = np.arange(width)
    grads = np.zeros(width * size, kernel.dtype)
    readout_grads = {name: np.zeros_like(leaf) for name, leaf in readout.items()}
    for x, target in zip(*inputs, strict=True):
        features = np.concatenate([hidden, x])
        hidden = np.tanh(features @ kernel + bias)
        slope = 1.0 - hidden * hidden
        across = slope[:, None] * kernel[:width].T
        old = influence.reshape(width, -1)
        influence = np.matmul(across, old, out=spare).reshape(width, width, size)
        spare = old if buffered else None
        influence[diagonal, diagonal, :-1] += slope[:, None] * features
        influence[diagonal, diagonal, -1] += slope
        logits = hidden @ readout["kernel"] + readout["bias"]
        error = np.exp(logits - logits.max())
        error /= error.sum()
        error[target] -= 1.0
        grads += (readout["kernel"] @ error) @ influence.reshape(width, -1)
        readout_grads["kernel"] += np.outer(hidden, error)
        readout_grads["bias"] += error
    by_feature = grads.reshape(width, size).T
    names = ("hidden_kernel", "input_kernel", "bias")
    parts = (by_feature[:width], by_feature[width:-1], by_feature[-1])
    return jtrunc.Params(dict(zip(names, parts, strict=True)), readout_grads), influence


def product_floor(unroll: int) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """``(D (n, n), factors of its rows (steps, n), J (n, |θ|)) -> J``."""

    def run(across: jax.Array, factors: jax.Array, influence: jax.Array) -> jax.Array:
        def step(influence: jax.Array, factor: jax.Array) -> tuple[jax.Array, None]:
            return (factor[:, None] * across) @ influence, None

        return jax.lax.scan(step, influence, factors, unroll=unroll)[0]

    return run


def floor_arguments(case: Case, params: jtrunc.Params) -> tuple[jax.Array, jax.Array, jax.Array]:
    """An orthogonal D, whose rows are scaled by less than one, and a J of ones."""
    factors = jax.random.uniform(jax.random.key(1), (case.steps, case.width), case.dtype, 0.9, 1.0)
    size = sum(leaf.size for leaf in jax.tree.leaves(params.recurrent))
    return params.recurrent["hidden_kernel"], factors, jnp.ones((case.width, size), case.dtype)


def our_programs(case: Case, contest: Contest) -> dict[str, Program]:
    system, params, hidden, inputs = contest
    programs = {}
    for name, ours in ((STRUCTURED, system), (GENERIC, system._replace(structure=None))):
        estimator = jtrunc.rtrl(ours)
        start = params, estimator.init(params, hidden), inputs
        programs[name] = compile_program(estimator_gradient(estimator), *start)
        programs[name + ONLINE] = compile_program(online_updates(estimator), *start)
    floor = floor_arguments(case, params)
    programs[FLOOR] = compile_program(product_floor(1), *floor)
    programs[f"{FLOOR}, two steps unrolled"] = compile_program(product_floor(2), *floor)
    return programs


def other_programs(case: Case, contest: Contest) -> tuple[dict[str, Program], dict[str, float]]:
    """Everybody else, and the steps of a call of each."""
    system, params, hidden, inputs = contest
    programs = {PER_STEP: compile_program(jacobians_a_step(system), params, hidden, inputs)}
    if case.forward_steps:
        short = jax.tree.map(lambda leaf: leaf[: case.forward_steps], inputs)
        programs[FORWARD] = compile_program(forward_mode(system), params, hidden, short)
    arrays = jax.tree.map(np.asarray, (params, hidden, inputs))
    for name, buffered in ((NUMPY, False), (BUFFERED, True)):
        run = partial(numpy_gradient, buffered=buffered)
        programs[name] = Program(run, (arrays,), compile_seconds=0.0, temp_bytes=0)
    steps = {name: float(case.forward_steps if name == FORWARD else case.steps) for name in programs}
    return programs, steps


def check_same_gradient(contest: Contest, programs: dict[str, Program], steps: dict[str, float]) -> None:
    """All compute the gradient that backpropagation finds: the contest is fair."""
    system, params, hidden, inputs = contest
    exact = jtrunc.bptt(system)
    reference = jax.jit(exact.update)
    for name, program in programs.items():
        window = jax.tree.map(lambda leaf, name=name: leaf[: int(steps[name])], inputs)
        expected = reference(params, exact.init(params, hidden), window)[0].grads
        found = program.run()[0][0]
        pairs = zip(jax.tree.leaves(expected.recurrent), jax.tree.leaves(found.recurrent), strict=True)
        error = max(float(np.linalg.norm(e - f) / np.linalg.norm(e)) for e, f in pairs)
        if not error < 1e-3:
            raise AssertionError(f"the gradient of {name!r} is off by {error:.2g} of its length")


def measure_case(case: Case, effort: Effort) -> list[dict[str, Any]]:
    with jax.enable_x64(case.dtype == jnp.float64):
        network = contest(case)
        ours = our_programs(case, network)
        others, steps = other_programs(case, network)
        steps |= dict.fromkeys(ours, float(case.steps))
        windows = {name: ours[name] for name in (STRUCTURED, GENERIC)}
        check_same_gradient(network, windows | others, steps)
        bounds: dict[str, Target] = dict.fromkeys(
            (STRUCTURED, GENERIC, STRUCTURED + ONLINE), Target(case.to_floor)
        )
        rows = compare(f"{case}, to the floor", ours, FLOOR, bounds, effort, steps)
        bounds = {NUMPY: Target(case.numpy, at_least=True), FORWARD: FORWARD_MODE}
        rivals = {STRUCTURED: ours[STRUCTURED], **others}
        return rows + compare(f"{case}, to {STRUCTURED}", rivals, STRUCTURED, bounds, effort, steps)


if __name__ == "__main__":
    main_by_case("rtrl", __doc__, CASES, SMALL, measure_case)
