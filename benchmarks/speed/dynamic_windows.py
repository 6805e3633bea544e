"""Windows whose length is data (online ARTBP, L₀ = 50, α = 4), per processed step, against windows of 50.

Each contestant makes its updates (SGD) over a stream of tokens inside one program. "padded" runs every
window over the whole look-ahead of 1000 steps with the steps beyond its end masked. Eight seeds have
windows of their own lengths; "one after another" is eight calls of the program of one seed.
"""

from __future__ import annotations

if __name__ == "__main__":
    from pinning import pin_to_one_core

    pin_to_one_core()

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import QUICK, Clock, Effort, Program, Target, compare, compile_program, judged, main, spread

import jtrunc
from jtrunc import cells, truncation
from jtrunc.backward.masked import with_mask

CLASSES, RATE, WINDOW, SEEDS = 50, 1e-3, 50, 8
LAW = truncation.polynomial(mean_length=WINDOW, alpha=4)
COMPILATION, PADDING, MAPPED = Target(1.5), Target(7.0, at_least=True), Target(1.1)


class Case(NamedTuple):
    """A cell, its sizes, the bound on the ratio to fixed windows, and how many updates a call makes."""

    kind: str
    width: int
    batch: int
    limit: float | None
    updates: int
    padded_updates: int
    look_ahead: int = 1000

    def __str__(self) -> str:
        return f"{self.kind} n={self.width} B={self.batch}"


CASES = (
    Case("tanh", 20, 1, 1.8, updates=200, padded_updates=20),
    Case("tanh", 256, 16, 1.35, updates=40, padded_updates=2),
    Case("lstm", 256, 16, None, updates=20, padded_updates=1),
)
SMALL = (Case("tanh", 4, 1, None, updates=3, padded_updates=2, look_ahead=64),)
CELLS = {"tanh": cells.tanh, "lstm": cells.lstm}


class Stream(NamedTuple):
    """A model and the tokens that it reads, long enough for every window to look ahead."""

    system: jtrunc.System
    params: jtrunc.Params
    hidden: Any
    tokens: jax.Array


def stream_of(case: Case) -> Stream:
    model = cells.model(CELLS[case.kind](CLASSES, case.width), CLASSES, cells.softmax_cross_entropy)
    length = 3 * case.updates * WINDOW + case.look_ahead
    tokens = jax.random.randint(jax.random.key(1), (length, case.batch), 0, CLASSES)
    return Stream(model.system, model.init(jax.random.key(0)), model.initial_hidden((case.batch,)), tokens)


def updates_over(estimator: jtrunc.GradientEstimator, window: int, updates: int) -> Callable[..., Any]:
    """``(params, state, tokens) -> (params, state, steps processed)``: many updates in one program."""

    def run(params: jtrunc.Params, state: Any, tokens: jax.Array) -> Any:
        def update(carry: Any, _: None) -> tuple[Any, None]:
            params, state, cursor = carry
            rows = jax.lax.dynamic_slice_in_dim(tokens, cursor, window + 1)
            estimate, state = estimator.update(params, state, (rows[:-1], rows[1:]))
            params = jax.tree.map(lambda param, grad: param - RATE * grad, params, estimate.grads)
            return (params, state, cursor + estimate.num_steps), None

        return jax.lax.scan(update, (params, state, jnp.int32(0)), length=updates)[0]

    return run


def padded_artbp(system: jtrunc.System) -> jtrunc.GradientEstimator:
    """A window by masking: the same law, all of the look-ahead is run; the weights are left out.

    The state is a pair of hidden state and key, as of `online_artbp`.
    """
    exact = jtrunc.bptt(with_mask(system))

    def update(params: jtrunc.Params, state: Any, inputs: Any) -> tuple[jtrunc.Estimate, Any]:
        key, draw = jax.random.split(state.key)
        look_ahead = len(inputs[0])
        elapsed = jnp.arange(1, look_ahead + 1)
        c = jax.vmap(lambda i: LAW.probability(truncation.Boundary(i - 1, i)))(elapsed)
        cuts = (jax.random.uniform(draw, (look_ahead,)) < c).at[-1].set(True)
        length = jnp.argmax(cuts) + 1
        estimate, after = exact.update(params, exact.init(params, state.hidden), (elapsed <= length, inputs))
        return estimate._replace(num_steps=length), state._replace(hidden=after.hidden, key=key)

    return jtrunc.GradientEstimator(jtrunc.online_artbp(system, LAW).init, update)


def measure_windows(case: Case, effort: Effort) -> list[dict[str, Any]]:
    """Dynamic against fixed windows, and padded against dynamic ones."""
    stream = stream_of(case)
    fixed, dynamic, padded = (
        jtrunc.truncated_bptt(stream.system, WINDOW),
        jtrunc.online_artbp(stream.system, LAW),
        padded_artbp(stream.system),
    )
    contestants = {
        "fixed windows of 50": (fixed, WINDOW, case.updates),
        "online_artbp": (dynamic, case.look_ahead, case.updates),
        f"padded to {case.look_ahead}": (padded, case.look_ahead, case.padded_updates),
    }
    programs = {name: compiled(stream, *contestant) for name, contestant in contestants.items()}
    first, second, third = programs
    mean_length = float(steps_of(programs[second])) / case.updates
    work = {
        first: float(WINDOW * case.updates),
        second: mean_length * case.updates,
        third: mean_length * case.padded_updates,  # of the same law; its own few draws would be noise
    }
    targets = {} if case.limit is None else {second: Target(case.limit)}
    rows = compare(str(case), programs, first, targets, effort, work)
    padding = {third: Target(PADDING.limit, at_least=True)}
    two = {name: programs[name] for name in (second, third)}
    rows += compare(f"{case}, to online_artbp", two, second, padding, effort, work)[1:]
    return [row | {"mean window": WINDOW if row["contestant"] == first else mean_length} for row in rows]


def compiled(stream: Stream, estimator: jtrunc.GradientEstimator, window: int, updates: int) -> Program:
    state = estimator.init(stream.params, stream.hidden, jax.random.key(2))
    return compile_program(updates_over(estimator, window, updates), stream.params, state, stream.tokens)


def steps_of(program: Program) -> np.ndarray:
    """Steps that a call processes: where its cursor stops."""
    return np.asarray(program.run()[0][2])


def measure_compilation(case: Case, effort: Effort) -> list[dict[str, Any]]:
    """Tracing, lowering and compilation of one update, anew each time, in a process that has traced."""
    stream = stream_of(case)
    inputs = (stream.tokens[: case.look_ahead], stream.tokens[1 : case.look_ahead + 1])
    seconds = np.array([compile_once(stream, inputs, effort.clock) for _ in range(min(effort.rounds, 3))])
    target = COMPILATION if effort != QUICK and case.limit else None
    bound = judged(float(np.median(seconds)), target)
    return [
        {"case": f"{case}, one update", "contestant": "compilation", **bound, "compile s": spread(seconds)}
    ]


def compile_once(stream: Stream, inputs: Any, clock: Clock) -> float:
    estimator = jtrunc.online_artbp(stream.system, LAW)
    state = estimator.init(stream.params, stream.hidden, jax.random.key(2))
    return compile_program(estimator.update, stream.params, state, inputs, clock=clock).compile_seconds


def measure_seeds(case: Case, effort: Effort) -> list[dict[str, Any]]:
    """Eight seeds in one program against eight runs."""
    stream = stream_of(case)
    estimator = jtrunc.online_artbp(stream.system, LAW)
    solo = updates_over(estimator, case.look_ahead, case.updates)
    keys = jax.random.split(jax.random.key(3), SEEDS)
    states = jax.vmap(lambda key: estimator.init(stream.params, stream.hidden, key))(keys)
    calls = [
        (stream.params, jax.tree.map(lambda leaf, i=i: leaf[i], states), stream.tokens) for i in range(SEEDS)
    ]

    def mapped(params: jtrunc.Params, states: Any, tokens: jax.Array) -> Any:
        return jax.lax.map(lambda state: solo(params, state, tokens), states)

    together = (stream.params, states, stream.tokens)
    programs = {
        "one after another": compile_program(solo, *calls[0])._replace(calls=tuple(calls)),
        "lax.map": compile_program(mapped, *together),
        "vmap": compile_program(jax.vmap(solo, in_axes=(None, 0, None)), *together),
    }
    steps = float(np.sum(programs["lax.map"].run()[0][2]))
    name = f"{case}, {SEEDS} seeds"
    work = dict.fromkeys(programs, steps)
    return compare(name, programs, "one after another", {"lax.map": MAPPED}, effort, work)


def measure(quick: bool, effort: Effort) -> list[dict[str, Any]]:
    cases = SMALL if quick else CASES
    rows = [row for case in cases for row in measure_windows(case, effort)]
    rows += [row for case in cases for row in measure_compilation(case, effort)]
    return rows + measure_seeds(cases[0]._replace(updates=2 if quick else 50), effort)


if __name__ == "__main__":
    main("dynamic_windows", __doc__, measure)
