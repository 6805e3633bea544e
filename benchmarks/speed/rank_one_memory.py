"""Memory of the rank-one estimators against units and steps: state and temporary bytes, by their programs.

One update over T steps of a tanh network with n units (softmax readout, dense inputs), for several T at
each n. "bytes a step" is what each step of a longer window adds: 0 for memory that does not depend on T.
Inputs, parameters and gradients are not counted. "numbers / (n + |θ|)" is state and temporary memory at the
longest T, in numbers of four bytes: bounded where memory is O(n + |θ|). The last column is what the dense
influence of RTRL would take, n |θ| numbers.
"""

from __future__ import annotations

if __name__ == "__main__":
    from pinning import pin_to_one_core

    pin_to_one_core()

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from harness import Effort, bytes_of, compile_program, main

import jtrunc
from jtrunc import cells

FEATURES, CLASSES = 32, 32
ESTIMATORS: dict[str, Callable[[jtrunc.System], jtrunc.GradientEstimator]] = {
    "uoro": jtrunc.uoro,
    "nobacktrack": jtrunc.nobacktrack,
}


def row(name: str, make: Any, width: int, lengths: tuple[int, ...], structured: bool) -> dict[str, Any]:
    model = cells.model(cells.tanh(FEATURES, width), CLASSES, cells.softmax_cross_entropy)
    system = model.system if structured else model.system._replace(structure=None)
    params, hidden = model.init(jax.random.key(0)), model.initial_hidden()
    estimator = make(system)
    state = estimator.init(params, hidden, jax.random.key(1))
    temporary = []
    for steps in lengths:
        inputs = (jnp.zeros((steps, FEATURES), jnp.float32), jnp.zeros(steps, jnp.int32))
        temporary.append(compile_program(estimator.update, params, state, inputs).temp_bytes)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params.recurrent))
    found = {f"T={steps}": size for steps, size in zip(lengths, temporary, strict=True)}
    return {
        "estimator": name if structured else f"{name}, structure=None",
        "n": width,
        "state bytes": bytes_of(state),
        **found,
        "bytes a step": (temporary[-1] - temporary[0]) / (lengths[-1] - lengths[0]),
        "numbers / (n + |θ|)": (bytes_of(state) + temporary[-1]) / 4 / (width + numbers),
        "influence of rtrl": 4 * width * numbers,
    }


def measure(quick: bool, effort: Effort) -> list[dict[str, Any]]:
    widths, lengths = ((4,), (4, 8)) if quick else ((64, 128, 256, 512), (100, 1000, 10_000))
    declarations = (True,) if quick else (True, False)
    return [
        row(name, make, width, lengths, structured)
        for name, make in ESTIMATORS.items()
        for structured in declarations
        for width in widths
    ]


if __name__ == "__main__":
    main("rank_one_memory", __doc__, measure)
