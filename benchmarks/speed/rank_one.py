"""Rank-one estimators, per step: against the forward step and the gradient of its loss alone, in one scan.

The baseline goes forward, and finds ∂ℓ/∂h and the readout's gradient at each step and sums them; nothing of
it depends on θ's gradient. The estimators find the readout's gradient too, and after every chunk of steps SGD
moves all of the parameters, inside the same program; "readout trained" is the baseline with SGD on the
readout at the same moments, so that either reading of the ratio can be had. All are judged against the
first, the cheaper.

Floors, each alone in a scan: "signs", a key split and as many random signs as the state has numbers;
"trace", one pass that rescales the θ-sized trace (one for each stream) in place, which is also the bandwidth
of a copy of this size. "GB/s" is what reading and writing that trace once a step amounts to: a contestant
that updates at every step and comes near to the floor's is bound by memory.

A network has dense inputs, a softmax readout and |θ| = n (n + features + 1). A user's cell declares no
structure: the network again, written by hand, and coupled oscillators.
"""

from __future__ import annotations

if __name__ == "__main__":
    from pinning import pin_to_one_core

    pin_to_one_core()

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from any_cell import oscillators
from harness import Effort, Program, Target, compare, compile_program, main_by_case

import jtrunc
from jtrunc import cells

FEATURES, CLASSES, RATE = 32, 32, 1e-3
BASELINE, TRAINED = "forward + loss gradient", "forward + loss gradient, readout trained"
SIGNS, TRACE = "signs alone", "trace alone"
ESTIMATORS: dict[str, Callable[[jtrunc.System], jtrunc.GradientEstimator]] = {
    "uoro": jtrunc.uoro,
    "nobacktrack": jtrunc.nobacktrack,
}


class Case(NamedTuple):
    """A cell, how often its parameters move, how many streams it reads, and the bound on the ratio."""

    kind: str
    width: int
    chunk: int
    limit: float | None
    steps: int = 1600
    streams: int = 1

    def __str__(self) -> str:
        streams = f", {self.streams} streams," if self.streams > 1 else ""
        moment = "step" if self.chunk == 1 else f"{self.chunk} steps"
        return f"{self.kind}{streams} n={self.width}, SGD every {moment}"


CASES = (
    *(Case("tanh", n, 1, limit) for n, limit in ((20, 6.5), (64, 6.5), (128, 6.5), (512, 8.0))),
    *(Case("tanh", n, 16, limit) for n, limit in ((20, 2.5), (64, None), (128, None), (512, 3.5))),
    *(Case("own network", n, 1, 11.0) for n in (20, 64, 128, 512)),
    Case("oscillators", 16, 1, 11.0),
    Case("own network", 64, 16, None),
    *(Case("tanh", n, chunk, None, 32, streams=64) for n in (64, 128) for chunk in (1, 16)),
    *(Case("tanh", 512, chunk, None, 16, streams=64) for chunk in (1, 16)),
)
SMALL = (Case("tanh", 4, 2, 6.5, steps=4, streams=2), Case("oscillators", 2, 1, 11.0, steps=4))


class Contest(NamedTuple):
    """A system, its arguments, and its inputs (steps, ...)."""

    system: jtrunc.System
    params: jtrunc.Params
    hidden: Any
    inputs: Any


def contest(case: Case) -> Contest:
    """One stream, or a leading axis of streams in `hidden` and a second one in `inputs`."""
    found = oscillators_of(case) if case.kind == "oscillators" else network_of(case)
    if case.streams == 1:
        return found
    hidden = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (case.streams, *leaf.shape)), found.hidden)
    shifts = jax.tree.map(
        lambda leaf: jnp.stack([jnp.roll(leaf, stream, 0) for stream in range(case.streams)], 1), found.inputs
    )
    return found._replace(hidden=hidden, inputs=shifts)


def network_of(case: Case) -> Contest:
    model = cells.model(cells.tanh(FEATURES, case.width), CLASSES, cells.softmax_cross_entropy)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (case.steps, FEATURES), jnp.float32)
    targets = jax.random.randint(keys[1], (case.steps,), 0, CLASSES)
    system = own_tanh(model.system) if case.kind.startswith("own") else model.system
    return Contest(system, model.init(keys[2]), model.initial_hidden(), (x, targets))


def own_tanh(system: jtrunc.System) -> jtrunc.System:
    """The same network with a transition as anyone would write it."""

    def transition(theta: Any, hidden: jax.Array, inputs: Any) -> jax.Array:
        from_input = inputs[0] @ theta["input_kernel"] + theta["bias"]
        return jnp.tanh(hidden @ theta["hidden_kernel"] + from_input)

    return jtrunc.System(transition, system.loss)


def oscillators_of(case: Case) -> Contest:
    """Of the benchmark of arbitrary cells: its windows laid end to end."""
    found = oscillators(case.width, updates=-(-case.steps // 50))
    inputs = jax.tree.map(lambda leaf: leaf.reshape(-1)[: case.steps], found.windows)
    return Contest(found.system, found.params, found.hidden, inputs)


def sgd(params: Any, grads: Any) -> Any:
    return jax.tree.map(lambda param, grad: param - RATE * grad, params, grads)


def in_chunks(inputs: Any, chunk: int) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape(-1, chunk, *leaf.shape[1:]), inputs)


def online_program(case: Case, contest: Contest, estimator: jtrunc.GradientEstimator) -> Program:
    """A step of SGD after every chunk."""
    estimator = jtrunc.per_stream(estimator) if case.streams > 1 else estimator

    def run(params: jtrunc.Params, state: Any, inputs: Any) -> Any:
        def update(carry: Any, rows: Any) -> tuple[Any, jax.Array]:
            params, state = carry
            estimate, state = estimator.update(params, state, rows)
            return (sgd(params, estimate.grads), state), estimate.loss

        return jax.lax.scan(update, (params, state), in_chunks(inputs, case.chunk))

    state = estimator.init(contest.params, contest.hidden, jax.random.key(1))
    return compile_program(run, contest.params, state, contest.inputs)


def forward_program(case: Case, contest: Contest, trained: bool) -> Program:
    """Forward steps and the gradient of each loss in the state and the readout."""

    def step(params: jtrunc.Params, hidden: Any, inputs: Any) -> tuple[Any, jax.Array, Any]:
        hidden = contest.system.transition(params.recurrent, hidden, inputs)

        def loss(readout: Any, hidden: Any) -> jax.Array:
            return contest.system.loss(params._replace(readout=readout), hidden, inputs)[0]

        value, grads = jax.value_and_grad(loss, (0, 1))(params.readout, hidden)
        return hidden, value, grads

    def streams_step(params: jtrunc.Params, hidden: Any, inputs: Any) -> tuple[Any, jax.Array, Any]:
        hidden, values, (readouts, cotangents) = jax.vmap(step, (None, 0, 0))(params, hidden, inputs)
        return hidden, jnp.mean(values), (jax.tree.map(lambda g: jnp.mean(g, 0), readouts), cotangents)

    step_of = streams_step if case.streams > 1 else step

    def run(params: jtrunc.Params, hidden: Any, inputs: Any) -> Any:
        def advance(carry: Any, inputs_t: Any) -> tuple[Any, jax.Array]:
            params, hidden, total = carry
            hidden, value, grads = step_of(params, hidden, inputs_t)
            return (params, hidden, jax.tree.map(jnp.add, total, grads)), value

        def chunk(carry: Any, rows: Any) -> tuple[Any, jax.Array]:
            params, hidden, (before, cotangents) = carry
            total = jax.tree.map(jnp.zeros_like, before), cotangents
            (_, hidden, total), values = jax.lax.scan(advance, (params, hidden, total), rows)
            params = params._replace(readout=sgd(params.readout, total[0]))
            return (params, hidden, total), values

        start = params, hidden, jax.tree.map(jnp.zeros_like, (params.readout, hidden))
        if trained:
            return jax.lax.scan(chunk, start, in_chunks(inputs, case.chunk))
        return jax.lax.scan(advance, start, inputs)

    return compile_program(run, contest.params, contest.hidden, contest.inputs)


def floor_programs(case: Case, contest: Contest) -> dict[str, Program]:
    """The random signs, and one pass over the trace, each alone."""
    numbers = sum(leaf.size for leaf in jax.tree.leaves(contest.hidden))
    trace = jnp.ones((case.streams, trace_numbers(contest)), jnp.float32)

    def signs_of(key: jax.Array) -> jax.Array:
        return jtrunc.rademacher(key, (numbers // case.streams,), jnp.float32)

    def signs(keys: jax.Array, total: jax.Array) -> jax.Array:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            keys, total = carry
            keys, draws = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
            return (keys, total + jax.vmap(signs_of)(draws)), None

        return jax.lax.scan(step, (keys, total), length=case.steps)[0]

    def rescale(trace: jax.Array, factors: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda trace, factor: (trace * factor, None), trace, factors)[0]

    keys = jax.random.split(jax.random.key(2), case.streams)
    totals = jnp.zeros((case.streams, numbers // case.streams), jnp.float32)
    return {
        SIGNS: compile_program(signs, keys, totals),
        TRACE: compile_program(rescale, trace, jnp.full(case.steps, 0.999, jnp.float32)),
    }


def trace_numbers(contest: Contest) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(contest.params.recurrent))


def measure_case(case: Case, effort: Effort) -> list[dict[str, Any]]:
    network = contest(case)
    programs = {
        BASELINE: forward_program(case, network, trained=False),
        TRAINED: forward_program(case, network, trained=True),
        **{name: online_program(case, network, make(network.system)) for name, make in ESTIMATORS.items()},
        **floor_programs(case, network),
    }
    targets = {} if case.limit is None else dict.fromkeys(ESTIMATORS, Target(case.limit))
    work = dict.fromkeys(programs, float(case.steps))
    rows = compare(str(case), programs, BASELINE, targets, effort, work)
    traffic = 2 * 4 * case.streams * trace_numbers(network)
    return [row | bandwidth(row, traffic) for row in rows]


def bandwidth(row: dict[str, Any], traffic: int) -> dict[str, Any]:
    """Bytes of the trace read and written once a step, over the time that the step took."""
    if row["contestant"] not in (*ESTIMATORS, TRACE):
        return {}
    return {"trace bytes a step": traffic, "GB/s": 1e-3 * traffic / row["µs per step"].median}


if __name__ == "__main__":
    main_by_case("rank_one", __doc__, CASES, SMALL, measure_case)
