"""Exact and rank-one online gradients of a tanh network, per step, against braintrace's learners.

braintrace's own cell (ValinaRNNCell) and readout, with the weights of jtrunc's; a call reads a whole
sequence, sums the gradient over it, and does not move the weights. "exact" is its SnAp of order two, which
for a dense recurrence is RTRL (its D_RTRL drops what goes from unit to unit), and finds the gradient of
jtrunc.rtrl, which is checked. Rank-one estimates are random, so that there are no equal numbers to check:
both libraries' are unbiased for this network.
"""

from __future__ import annotations

if __name__ == "__main__":
    from pinning import pin_to_one_core

    pin_to_one_core()

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import Effort, Program, Target, compare, compile_program, main_by_case, not_installed, optional

import jtrunc
from jtrunc import cells

brainstate, braintrace = optional("brainstate"), optional("braintrace")

FEATURES, CLASSES = 32, 32
LIMIT = Target(1.0)
EXACT, RANK_ONE = "braintrace SnAp(2), exact", "braintrace UORO"


class Case(NamedTuple):
    """A family of estimators, the width of the network, and the length of the sequence."""

    family: str
    width: int
    steps: int

    def __str__(self) -> str:
        return f"{self.family}, tanh n={self.width}"


CASES = tuple(
    Case(family, width, steps)
    for family in ("exact", "rank one")
    for width, steps in ((20, 400), (64, 200), (128, 40))
)
SMALL = (Case("exact", 4, 3), Case("rank one", 4, 3))

OURS: dict[str, dict[str, Callable[[jtrunc.System], jtrunc.GradientEstimator]]] = {
    "exact": {"rtrl": jtrunc.rtrl},
    "rank one": {"uoro": jtrunc.uoro, "nobacktrack": jtrunc.nobacktrack},
}
THEIRS = {"exact": EXACT, "rank one": RANK_ONE}


def our_program(estimator: jtrunc.GradientEstimator, params: Any, hidden: Any, inputs: Any) -> Program:
    """The gradient of the whole sequence in one update."""

    def run(params: jtrunc.Params, state: Any, inputs: Any) -> Any:
        estimate, state = estimator.update(params, state, inputs)
        return estimate.grads, state

    return compile_program(run, params, estimator.init(params, hidden, jax.random.key(1)), inputs)


def their_program(family: str, params: jtrunc.Params, inputs: Any) -> Program:
    """The gradient of the whole sequence by braintrace."""
    x, _ = inputs
    width, classes = params.readout["kernel"].shape

    class Network(brainstate.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = braintrace.nn.ValinaRNNCell(x.shape[-1], width, activation="tanh")
            self.readout = braintrace.nn.Linear(width, classes)
            kernels = [params.recurrent[name] for name in ("input_kernel", "hidden_kernel")]
            bias = params.recurrent["bias"]
            self.cell.W.weight.value = {"weight": jnp.concatenate(kernels), "bias": bias}
            self.readout.weight.value = {"weight": params.readout["kernel"], "bias": params.readout["bias"]}

        def update(self, x: jax.Array) -> jax.Array:
            return self.readout(self.cell(x))

    network = Network()
    method, options = (braintrace.SnAp, {"n": 2}) if family == "exact" else (braintrace.UORO, {})
    learner = braintrace.compile(network, method, x[0], **options)

    def loss(x: jax.Array, target: jax.Array) -> jax.Array:
        return cells.softmax_cross_entropy(learner(x), target)

    @brainstate.transform.jit
    def gradient(x: jax.Array, targets: jax.Array) -> Any:
        learner.reset_state()
        brainstate.nn.reset_all_states(network)
        return learner.etrace_grad(x, targets, step_fn=loss, reduction="sum")

    return Program(gradient, (inputs,), compile_seconds=0.0, temp_bytes=0)


def check_same_gradient(expected: jtrunc.Params, found: Any) -> None:
    """braintrace's kernel reads x and h together."""
    kernels = [expected.recurrent[name] for name in ("input_kernel", "hidden_kernel")]
    one, other = np.concatenate(kernels), np.asarray(found["cell", "W", "weight"]["weight"])
    error = np.linalg.norm(one - other) / np.linalg.norm(one)
    if not error < 1e-3:
        raise AssertionError(f"braintrace's gradient differs from rtrl's by {error:.2g} of its length")


def measure_case(case: Case, effort: Effort) -> list[dict[str, Any]]:
    model = cells.model(cells.tanh(FEATURES, case.width), CLASSES, cells.softmax_cross_entropy)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (case.steps, FEATURES), jnp.float32)
    inputs = (x, jax.random.randint(keys[1], (case.steps,), 0, CLASSES))
    params, hidden = model.init(keys[2]), model.initial_hidden()
    programs = {
        name: our_program(make(model.system), params, hidden, inputs)
        for name, make in OURS[case.family].items()
    }
    ours, theirs = list(programs), THEIRS[case.family]
    work = dict.fromkeys((*ours, theirs), float(case.steps))
    if braintrace is None:
        rows = compare(str(case), programs, ours[0], {}, effort, work)
        return [not_installed(str(case), theirs), *rows]
    with warnings.catch_warnings():
        # That the readout has no influence, and that SnAp widens to all units: both are meant.
        warnings.simplefilter("ignore", UserWarning)
        programs[theirs] = their_program(case.family, params, inputs)
        (found,) = programs[theirs].run()
    if case.family == "exact":
        check_same_gradient(programs[ours[0]].run()[0][0], found)
    return compare(str(case), programs, theirs, dict.fromkeys(ours, LIMIT), effort, work)


if __name__ == "__main__":
    main_by_case("online_peers", __doc__, CASES, SMALL, measure_case)
