"""Full backpropagation through 10⁴ steps of a structured tanh cell (n = 256), checkpointed in segments.

Temporary memory is that of the compiled program's own analysis; "plain" is jax.grad through lax.scan of
the cell's transition, then its loss.
"""

from __future__ import annotations

if __name__ == "__main__":
    from pinning import pin_to_one_core

    pin_to_one_core()

from typing import Any, Literal

import jax
import jax.numpy as jnp
from harness import Effort, Program, Target, compare, compile_program, judged, main

import jtrunc
from jtrunc import cells

TIME, MEMORY = Target(0.80), Target(0.05)
FEATURES, CLASSES = 16, 16
PLAIN, JUDGED = "plain lax.scan + jax.grad", 'bptt, checkpoint="sqrt"'

Checkpoint = Literal["sqrt"] | int | None


def plain_gradient(system: jtrunc.System) -> Any:
    def gradient(params: jtrunc.Params, hidden: Any, inputs: Any) -> Any:
        def total_loss(params: jtrunc.Params) -> jax.Array:
            def step(hidden: Any, inputs_t: Any) -> tuple[Any, jax.Array]:
                hidden = system.transition(params.recurrent, hidden, inputs_t)
                return hidden, system.loss(params, hidden, inputs_t)[0]

            return jnp.sum(jax.lax.scan(step, hidden, inputs)[1])

        return jax.value_and_grad(total_loss)(params)

    return gradient


def bptt_gradient(system: jtrunc.System, checkpoint: Checkpoint) -> Any:
    estimator = jtrunc.bptt(system, checkpoint=checkpoint)

    def gradient(params: jtrunc.Params, hidden: Any, inputs: Any) -> Any:
        estimate, _ = estimator.update(params, estimator.init(params, hidden), inputs)
        return estimate.loss, estimate.grads

    return gradient


def measure(quick: bool, effort: Effort) -> list[dict[str, Any]]:
    steps, width = (64, 8) if quick else (10_000, 256)
    model = cells.model(cells.tanh(FEATURES, width), CLASSES, cells.softmax_cross_entropy)
    params, hidden = model.init(jax.random.key(0)), model.initial_hidden((1,))
    x = jax.random.normal(jax.random.key(1), (steps, 1, FEATURES), jnp.float32)
    inputs = (x, jax.random.randint(jax.random.key(2), (steps, 1), 0, CLASSES))
    segments: dict[str, Checkpoint] = {"none": None, '"sqrt"': "sqrt", str(steps // 40): steps // 40}

    programs = {PLAIN: compile_program(plain_gradient(model.system), params, hidden, inputs)}
    for name, checkpoint in segments.items():
        gradient = bptt_gradient(model.system, checkpoint)
        programs[f"bptt, checkpoint={name}"] = compile_program(gradient, params, hidden, inputs)
    rows = compare(f"T={steps} n={width}", programs, PLAIN, {JUDGED: TIME}, effort)
    return [row | memory_columns(programs, row["contestant"], quick) for row in rows]


def memory_columns(programs: dict[str, Program], name: str, quick: bool) -> dict[str, Any]:
    share = programs[name].temp_bytes / programs[PLAIN].temp_bytes
    bound = judged(share, MEMORY if name == JUDGED and not quick else None)
    return {
        "temporary bytes": programs[name].temp_bytes,
        "share of memory": share,
        "memory target": bound["target"],
        "memory verdict": bound["verdict"],
    }


if __name__ == "__main__":
    main("long_bptt", __doc__, measure)
