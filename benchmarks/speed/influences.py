"""The forward family online, per step, against dense RTRL of the same network (n = 64): time and memory.

Each call makes updates of one step inside one scan, each with a step of SGD, as online learning does. "state
bytes" is what the estimator carries from step to step, hidden state and random key included; "temporary
bytes" what the compiled program needs beside its arguments and results. A linear recurrent unit has complex
states and exact influence of the size of θ; the rest approximates RTRL, with bias (SnAp, e-prop, RFLO) or
with variance.
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
from harness import Effort, bytes_of, compare, compile_program, main_by_case

import jtrunc
from jtrunc import cells

FEATURES, CLASSES, RATE = 32, 32, 1e-3

Make = Callable[[jtrunc.System], jtrunc.GradientEstimator]

EXACT: dict[str, Make] = {"rtrl": jtrunc.rtrl}
RANDOM: dict[str, Make] = {
    "uoro": jtrunc.uoro,
    "nobacktrack": jtrunc.nobacktrack,
    "nobacktrack, rank 10": partial(jtrunc.nobacktrack, rank=10),
    "kf_rtrl": jtrunc.kf_rtrl,
    "optimal_kronecker_sum": jtrunc.optimal_kronecker_sum,
    "optimal_kronecker_sum, 4 terms": partial(jtrunc.optimal_kronecker_sum, terms=4),
}
BIASED: dict[str, Make] = {"snap(1)": partial(jtrunc.snap, order=1), "eprop": jtrunc.eprop}


class Case(NamedTuple):
    """A cell and what carries its influence."""

    name: str
    cell: Callable[[int, int], cells.Cell]
    contestants: dict[str, Make]
    width: int = 64
    steps: int = 100

    def __str__(self) -> str:
        return f"{self.name} n={self.width}"


CASES = (
    Case("tanh", cells.tanh, EXACT | BIASED | RANDOM),
    Case("leaky", partial(cells.leaky, rate=0.5), EXACT | BIASED | {"rflo": jtrunc.rflo}),
    Case("linear recurrent", cells.linear_recurrent, EXACT | {"diagonal_rtrl": jtrunc.diagonal_rtrl}),
)
SMALL = tuple(case._replace(width=4, steps=3) for case in CASES[1:])


def measure_case(case: Case, effort: Effort) -> list[dict[str, Any]]:
    model = cells.model(case.cell(FEATURES, case.width), CLASSES, cells.softmax_cross_entropy)
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (case.steps, FEATURES), jnp.float32)
    inputs = (x, jax.random.randint(keys[1], (case.steps,), 0, CLASSES))
    params, hidden = model.init(keys[2]), model.initial_hidden()
    programs, state_bytes = {}, {}
    for name, make in case.contestants.items():
        estimator = make(model.system)
        state = estimator.init(params, hidden, keys[3])
        state_bytes[name] = bytes_of(state)
        programs[name] = compile_program(online_updates(estimator), params, state, inputs)
    work = dict.fromkeys(programs, float(case.steps))
    rows = compare(str(case), programs, "rtrl", {}, effort, work)
    return [row | memory(programs, state_bytes, row["contestant"]) for row in rows]


def online_updates(estimator: jtrunc.GradientEstimator) -> Callable[..., Any]:
    """One update of the estimator and one step of SGD for each row of the inputs."""

    def run(params: jtrunc.Params, state: Any, inputs: Any) -> Any:
        def step(carry: Any, inputs_t: Any) -> tuple[Any, jax.Array]:
            params, state = carry
            estimate, state = estimator.update(params, state, inputs_t)
            params = jax.tree.map(lambda p, g: p - RATE * g, params, estimate.grads)
            return (params, state), estimate.loss

        rows = jax.tree.map(lambda leaf: leaf[:, None], inputs)
        return jax.lax.scan(step, (params, state), rows)

    return run


def memory(programs: dict[str, Any], state_bytes: dict[str, int], name: str) -> dict[str, Any]:
    return {
        "state bytes": state_bytes[name],
        "share of rtrl's": state_bytes[name] / state_bytes["rtrl"],
        "temporary bytes": programs[name].temp_bytes,
    }


if __name__ == "__main__":
    main_by_case("influences", __doc__, CASES, SMALL, measure_case)
