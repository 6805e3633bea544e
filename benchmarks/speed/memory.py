"""Temporary memory of a gradient over T steps, by the compiled programs' own analysis (tanh cell, n = 128).

"growth" is the factor from the second longest T to the longest: 1 for memory that does not depend on T, √10
for that of √T, 10 for that of T. The look-ahead of online_artbp is T. Inputs, parameters and gradients are
not counted.
"""

from __future__ import annotations

if __name__ == "__main__":
    from pinning import pin_to_one_core

    pin_to_one_core()

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from harness import Effort, compile_program, main

import jtrunc
from jtrunc import cells, truncation

CLASSES = 16
BACKWARD_STEPS, LOSS_STEPS = 99, 50
LAW = truncation.polynomial(mean_length=50, alpha=4)

ESTIMATORS: dict[str, Callable[[jtrunc.System], jtrunc.GradientEstimator]] = {
    "bptt": jtrunc.bptt,
    'bptt, checkpoint="sqrt"': lambda system: jtrunc.bptt(system, checkpoint="sqrt"),
    "truncated_bptt(50)": lambda system: jtrunc.truncated_bptt(system, 50),
    "windowed_bptt(99, 50), sliding": lambda s: jtrunc.windowed_bptt(s, BACKWARD_STEPS, LOSS_STEPS),
    "artbp(polynomial)": lambda system: jtrunc.artbp(system, LAW),
    "online_artbp(polynomial)": lambda system: jtrunc.online_artbp(system, LAW),
}


def temporary_bytes(estimator: jtrunc.GradientEstimator, model: cells.Model, steps: int, window: int) -> int:
    """Of a pass over T steps of tokens in overlapping windows, or in one update where the window is T."""
    params, hidden = model.init(jax.random.key(0)), model.initial_hidden((1,))
    tokens = jnp.zeros((steps, 1), jnp.int32)
    state = estimator.init(params, hidden, jax.random.key(1))

    def update(params: jtrunc.Params, state: Any, tokens: jax.Array) -> Any:
        estimate, state = estimator.update(params, state, (tokens, tokens))
        return estimate.loss, estimate.grads, state

    def slide(params: jtrunc.Params, state: Any, tokens: jax.Array) -> Any:
        def step(carry: Any, start: jax.Array) -> tuple[Any, jax.Array]:
            state, total = carry
            rows = jax.lax.dynamic_slice_in_dim(tokens, start, window)
            loss, grads, state = update(params, state, rows)
            return (state, jax.tree.map(jnp.add, total, grads)), loss

        starts = jnp.arange(0, steps - window + 1, LOSS_STEPS)
        return jax.lax.scan(step, (state, jax.tree.map(jnp.zeros_like, params)), starts)

    return compile_program(update if window == steps else slide, params, state, tokens).temp_bytes


def measure(quick: bool, effort: Effort) -> list[dict[str, Any]]:
    lengths, width = ((100, 200), 4) if quick else ((100, 1000, 10_000), 128)
    model = cells.model(cells.tanh(CLASSES, width), CLASSES, cells.softmax_cross_entropy)
    rows = []
    for name, make in ESTIMATORS.items():
        estimator = make(model.system)
        window = {steps: BACKWARD_STEPS + 1 if name.startswith("windowed") else steps for steps in lengths}
        found = {f"T={n}": temporary_bytes(estimator, model, n, window[n]) for n in lengths}
        longest, second = list(found.values())[:-3:-1]
        rows.append({"estimator": name, **found, "growth": longest / second})
    return rows


if __name__ == "__main__":
    main("memory", __doc__, measure)
