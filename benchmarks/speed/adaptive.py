"""Adaptive truncation on the copy task: what an estimate of K costs an epoch, and K as data an update.

The network is the one of Aicher et al. (2019), section 5.1: two layers of 50 LSTM units, batch 64, streams of
4000 steps. "estimates": `adaptive_bptt` makes the same updates (SGD) with an estimate before each and with
none, at a K that its limits hold fixed; what an estimate adds, once in an epoch of 4000/K updates, as a share
of the epoch. "updates": `adaptive_bptt`, whose K is data, against `windowed_bptt(2K, K)`, per step.
"""

from __future__ import annotations

if __name__ == "__main__":
    from pinning import pin_to_one_core

    pin_to_one_core()

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from harness import QUICK, Effort, Program, Target, alternate, compare, compile_program, judged, main, spread

import jtrunc
from jtrunc import cells
from jtrunc.tasks import copying

SHARE = Target(0.05)
NEVER, RATE = 2**30, 1e-3


class Case(NamedTuple):
    """Sizes; `updates` is how many of them a call makes."""

    width: int = 50
    batch: int = 64
    epoch: int = 4000
    num_lags: int = 100
    max_length: int = 100
    steps: int = 300
    overhead: tuple[int, ...] = (5, 15, 30)
    lengths: tuple[int, ...] = (5, 15, 50)


SMALL = Case(width=4, batch=2, epoch=60, num_lags=8, max_length=6, steps=12, overhead=(3,), lengths=(3,))


class Stream(NamedTuple):
    """A model and the tokens that it reads."""

    model: cells.Model
    params: jtrunc.Params
    hidden: Any
    data: tuple[jax.Array, jax.Array]


def stream_of(case: Case) -> Stream:
    classes = copying.num_classes()
    layers = [cells.lstm(classes, case.width), cells.lstm(case.width, case.width)]
    model = cells.model(cells.stack(layers), classes, cells.softmax_cross_entropy)
    length = case.steps + 2 * case.max_length + case.num_lags + 1
    data = copying.sequences(jax.random.key(1), length, case.batch)
    return Stream(model, model.init(jax.random.key(0)), model.initial_hidden((case.batch,)), data)


def updates_over(estimator: jtrunc.GradientEstimator, window: int, updates: int) -> Callable[..., Any]:
    """``(params, state, data) -> (params, state, steps consumed)``: many updates in one program."""

    def run(params: jtrunc.Params, state: Any, data: Any) -> Any:
        def update(carry: Any, _: None) -> tuple[Any, None]:
            params, state, cursor = carry
            inputs = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, cursor, window), data)
            estimate, state = estimator.update(params, state, inputs)
            params = jax.tree.map(lambda param, grad: param - RATE * grad, params, estimate.grads)
            return (params, state, cursor + estimate.num_steps), None

        return jax.lax.scan(update, (params, state, jnp.int32(0)), length=updates)[0]

    return run


def adaptive(stream: Stream, case: Case, length: int, every: int, fixed: bool) -> Program:
    """`adaptive_bptt` at K = `length`; `fixed`: whatever it estimates."""
    least, most = (length, length) if fixed else (1, case.max_length)
    estimator = jtrunc.adaptive_bptt(
        stream.model.system, 0.5, num_lags=case.num_lags, min_length=least, max_length=most,
        initial_length=None if every == 1 else length, estimate_every=every, streams=True,
    )  # fmt: skip
    window = max(2 * most + 1, case.num_lags + 1)
    return compiled(stream, estimator, window, -(-case.steps // length))


def compiled(stream: Stream, estimator: jtrunc.GradientEstimator, window: int, updates: int) -> Program:
    state = estimator.init(stream.params, stream.hidden)
    return compile_program(updates_over(estimator, window, updates), stream.params, state, stream.data)


def measure_estimates(stream: Stream, case: Case, effort: Effort) -> list[dict[str, Any]]:
    """What an estimate adds to an update, and its share of an epoch that has one."""
    rows = []
    for length in case.overhead:
        programs = {every: adaptive(stream, case, length, every, fixed=True) for every in (1, NEVER)}
        runs = {str(every): program.run for every, program in programs.items()}
        seconds = alternate(runs, effort)
        updates = -(-case.steps // length)
        estimate = (seconds["1"] - seconds[str(NEVER)]) / updates
        epoch = seconds[str(NEVER)] / updates * case.epoch / length
        share = spread(estimate / epoch)
        row = {"case": f"estimates, K = {length}", "contestant": "one estimate an epoch"}
        row |= {"ms": spread(1e3 * estimate), "epoch s": spread(epoch), "share of an epoch": share}
        rows.append(row | judged(share.median, None if effort == QUICK else SHARE))
    return rows


def measure_updates(stream: Stream, case: Case, effort: Effort) -> list[dict[str, Any]]:
    """K as data against K in the program."""
    rows = []
    for length in case.lengths:
        fixed = jtrunc.windowed_bptt(stream.model.system, 2 * length, length)
        updates = -(-case.steps // length)
        programs = {
            "windowed_bptt(2K, K)": compiled(stream, fixed, 2 * length + 1, updates),
            "adaptive_bptt": adaptive(stream, case, length, NEVER, fixed=False),
        }
        work = dict.fromkeys(programs, float(updates * length))
        rows += compare(f"updates, K = {length}", programs, next(iter(programs)), {}, effort, work)
    return rows


def measure(quick: bool, effort: Effort) -> list[dict[str, Any]]:
    case = SMALL if quick else Case()
    stream = stream_of(case)
    return measure_estimates(stream, case, effort) + measure_updates(stream, case, effort)


if __name__ == "__main__":
    main("adaptive", __doc__, measure)
