"""64 seeds in one program against one after another, per update of a seed.

Each contestant is `jtrunc.training`'s own loop. "one after another" is 64 calls of the program of one seed;
"one program" has the seeds side by side (vmap), or, where their windows have lengths of their own, one after
another inside it (`lax.map`), which saves only what a call costs.

- online, n = 20: a tanh network of 20 units reads random letters, one update a step.
- aⁿbⁿ: a network of 20 leaky units reads aⁿbⁿ on [1; 32], one update a step, Adam.
- influence balancing: ARTBP, L₀ = 16, α = 6, as in figure 3 of its paper; truncated BPTT beside it.
"""

from __future__ import annotations

if __name__ == "__main__":
    from pinning import pin_to_one_core

    pin_to_one_core()

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from harness import QUICK, Effort, Target, compare, compile_program, main_by_case

import jtrunc
from jtrunc import cells
from jtrunc.experiments.influence_balancing import LOOK_AHEAD
from jtrunc.probe import static_num_steps
from jtrunc.tasks import counting, influence_balancing
from jtrunc.training import seed_key
from jtrunc.training.chunk import Program, init_chunk, run_chunk
from jtrunc.training.seeds import SeedAxis
from jtrunc.training.stream import circular, window_at

SIDE_BY_SIDE = Target(1 / 2.5)


class Case(NamedTuple):
    """A task, a learner, and how many updates a call makes."""

    task: str
    learner: str
    updates: int
    target: Target | None = None
    seeds: int = 64

    def __str__(self) -> str:
        return f"{self.task}, {self.learner}"


class Parts(NamedTuple):
    """What `jtrunc.training.train` would be given."""

    system: jtrunc.System
    params: Any
    hidden: Any
    estimator: jtrunc.GradientEstimator
    optimizer: optax.GradientTransformation
    data: Any
    window: int


LEARNERS = {"nobacktrack": jtrunc.nobacktrack, "uoro": jtrunc.uoro, "rtrl": jtrunc.rtrl}
CASES = (
    Case("online, n = 20", "nobacktrack", 200, SIDE_BY_SIDE),
    Case("online, n = 20", "uoro", 200, SIDE_BY_SIDE),
    Case("online, n = 20", "rtrl", 100),
    Case("aⁿbⁿ", "nobacktrack", 200, SIDE_BY_SIDE),
    Case("influence balancing", "truncated BPTT", 200),
    Case("influence balancing", "ARTBP", 200),
)
SMALL = tuple(Case(task, learner, 2, seeds=3) for task, learner, *_ in (CASES[0], CASES[-1]))


def parts_of(case: Case) -> Parts:
    if case.task == "influence balancing":
        system, params, hidden = influence_balancing.build()
        if case.learner == "ARTBP":
            estimator, window = jtrunc.online_artbp(system, jtrunc.truncation.polynomial(16, 6)), LOOK_AHEAD
        else:
            estimator, window = jtrunc.truncated_bptt(system, 10), 10
        data = influence_balancing.inputs(LOOK_AHEAD)
        return Parts(system, params, hidden, estimator, optax.sgd(1e-4), data, window)
    key, length = jax.random.key(1), 10_000
    if case.task == "aⁿbⁿ":
        data = tuple(jnp.asarray(leaf[:, 0]) for leaf in counting.sequences(key, length))
        classes, cell, optimizer = 3, cells.leaky(3, 20, 0.5), optax.adam(1e-3)
    else:
        letters = jax.random.randint(key, (length + 1,), 0, 10)
        data, classes, cell, optimizer = (letters[:-1], letters[1:]), 10, cells.tanh(10, 20), optax.sgd(1e-3)
    model = cells.model(cell, classes, cells.softmax_cross_entropy)
    estimator = LEARNERS[case.learner](model.system)
    return Parts(model.system, model.init, model.initial_hidden(()), estimator, optimizer, data, 1)


def measure(case: Case, effort: Effort) -> list[dict[str, Any]]:
    given = parts_of(case)
    stream, keys = (
        circular(given.data, given.window),
        [seed_key(jax.random.key(0), i) for i in range(case.seeds)],
    )
    init, params = (given.params, None) if callable(given.params) else (None, given.params)
    shapes: Any = jax.eval_shape(init, keys[0]) if init else params
    inputs = window_at(stream.rows, jnp.int32(0), given.window)
    known = static_num_steps(given.estimator, shapes, given.hidden, inputs)
    solo = Program(given.estimator, given.optimizer, given.window, 4, case.updates)
    every = solo._replace(seed_axis=SeedAxis.VMAP if known else SeedAxis.MAP)
    states = [init_chunk(solo, init, params, given.hidden, key) for key in keys]
    together = init_chunk(every, init, params, given.hidden, jnp.stack(keys))

    def chunk(program: Program, state: Any) -> Any:
        return compile_program(lambda state: run_chunk(program, state, stream, case.updates), state)

    name = f"one program ({every.seed_axis.value})"
    programs = {
        "one after another": chunk(solo, states[0])._replace(calls=tuple((state,) for state in states)),
        name: chunk(every, together),
    }
    targets = {name: case.target} if case.target is not None and effort != QUICK else {}
    work = dict.fromkeys(programs, float(case.updates * case.seeds))
    rows = compare(f"{case}, {case.seeds} seeds", programs, "one after another", targets, effort, work)
    for row in rows:
        row["throughput"] = None if row["ratio"] is None else 1 / row["ratio"].median
    return rows


if __name__ == "__main__":
    main_by_case("seeds", __doc__, CASES, SMALL, measure)
