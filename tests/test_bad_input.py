"""Bad input: each case raises its exception at once, and the message names the argument and the value."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtrunc
from jtrunc import System, cells, truncation
from tests import systems
from tests.systems import Case

CASE = systems.tanh(6)
LAW = truncation.constant(0.3)


class Bad(NamedTuple):
    """A call, the exception it must raise, and words that the message must contain."""

    call: Callable[[], Any]
    error: type[Exception]
    words: tuple[str, ...]


def build(make: Callable[..., Any], *arguments: Any, **keywords: Any) -> Callable[[], Any]:
    return lambda: make(CASE.system, *arguments, **keywords)


def update(make: Callable[..., Any] = jtrunc.bptt, key: Any = None, **changes: Any) -> Callable[[], Any]:
    """A call that makes, initialises and updates an estimator on a changed case."""

    def call() -> Any:
        case: Case = CASE._replace(**changes)
        estimator = make(case.system)
        return estimator.update(case.params, estimator.init(case.params, case.hidden, key), case.inputs)

    return call


def system(transition: Any = None, loss: Any = None) -> System:
    return System(transition or CASE.system.transition, loss or CASE.system.loss)


def scalar_scan(**keywords: Any) -> Callable[[], Any]:
    return lambda: jtrunc.scan(lambda h, x: (h + x, h), jnp.float64(0), jnp.ones(3), **keywords)


truncated = partial(jtrunc.truncated_bptt, length=3)
windowed = partial(jtrunc.windowed_bptt, backward_steps=4, loss_steps=2)
artbp = partial(jtrunc.artbp, truncation=LAW)
online = partial(jtrunc.online_artbp, truncation=LAW)
adaptive = partial(jtrunc.adaptive_bptt, tolerance=0.5, num_lags=4, max_length=2)

LENGTHS = {
    "truncated: length 0": Bad(build(jtrunc.truncated_bptt, 0), ValueError, ("length", "0")),
    "truncated: length -3": Bad(build(jtrunc.truncated_bptt, -3), ValueError, ("length", "-3")),
    "truncated: length 2.5": Bad(build(jtrunc.truncated_bptt, 2.5), TypeError, ("length", "2.5")),
    "truncated: length True": Bad(build(jtrunc.truncated_bptt, True), TypeError, ("length", "True")),
    "truncated: length '5'": Bad(build(jtrunc.truncated_bptt, "5"), TypeError, ("length", "'5'")),
    "truncated: length None": Bad(build(jtrunc.truncated_bptt, None), TypeError, ("length", "None")),
    "bptt: checkpoint 0": Bad(build(jtrunc.bptt, checkpoint=0), ValueError, ("checkpoint", "0")),
    "bptt: checkpoint 1.5": Bad(build(jtrunc.bptt, checkpoint=1.5), TypeError, ("checkpoint", "1.5")),
    "bptt: checkpoint word": Bad(
        build(jtrunc.bptt, checkpoint="cube"), ValueError, ("checkpoint", "cube", "sqrt")
    ),
    "bptt: checkpoint True": Bad(build(jtrunc.bptt, checkpoint=True), TypeError, ("checkpoint", "True")),
    "windowed: K1 0": Bad(build(jtrunc.windowed_bptt, 0, 1), ValueError, ("backward_steps", "0")),
    "windowed: K2 0": Bad(build(jtrunc.windowed_bptt, 4, 0), ValueError, ("loss_steps", "0")),
    "windowed: K2 > K1": Bad(
        build(jtrunc.windowed_bptt, 4, 5), ValueError, ("loss_steps", "5", "backward_steps", "4")
    ),
    "windowed: K1 4.0": Bad(build(jtrunc.windowed_bptt, 4.0, 2), TypeError, ("backward_steps", "4.0")),
    "adaptive: tolerance 0": Bad(build(jtrunc.adaptive_bptt, 0.0), ValueError, ("tolerance", "0.0")),
    "adaptive: tolerance nan": Bad(build(jtrunc.adaptive_bptt, np.nan), ValueError, ("tolerance", "nan")),
    "adaptive: tolerance word": Bad(build(jtrunc.adaptive_bptt, "low"), TypeError, ("tolerance", "low")),
    "adaptive: lags 0": Bad(build(jtrunc.adaptive_bptt, 0.5, num_lags=0), ValueError, ("num_lags", "0")),
    "adaptive: min above max": Bad(
        build(jtrunc.adaptive_bptt, 0.5, min_length=9, max_length=5), ValueError, ("min_length", "9", "5")
    ),
    "adaptive: first K outside": Bad(
        build(jtrunc.adaptive_bptt, 0.5, initial_length=200), ValueError, ("initial_length", "200", "100")
    ),
    "adaptive: unit": Bad(build(jtrunc.adaptive_bptt, 0.5, unit="epochs"), ValueError, ("unit", "epochs")),
    "adaptive: every 0": Bad(
        build(jtrunc.adaptive_bptt, 0.5, estimate_every=0), ValueError, ("estimate_every", "0")
    ),
    "adaptive: tau outside": Bad(
        build(jtrunc.adaptive_bptt, 0.5, num_lags=50, fit_from=51), ValueError, ("fit_from", "51", "50")
    ),
    "adaptive: method": Bad(build(jtrunc.adaptive_bptt, 0.5, method="mean"), ValueError, ("method", "mean")),
    "adaptive: look-ahead": Bad(update(partial(adaptive, max_length=9)), ValueError, ("inputs", "6", "19")),
    "adaptive: streams": Bad(
        update(
            partial(adaptive, streams=True),
            hidden=jnp.float64(0),
            system=System(lambda theta, h, x: h, lambda params, h, x: (h, ())),
        ),
        ValueError,
        ("streams", "hidden"),
    ),
    "optimal: mean length": Bad(
        lambda: truncation.optimal([1.0, 1.0], 1e14),
        ValueError,
        ("mean_length", "100000000000000", "polynomial"),
    ),
    "variance: positions": Bad(
        lambda: jtrunc.diagnostics.truncation_variance(truncation.polynomial(5000, 4), [1.0, 1.0]),
        ValueError,
        ("num_positions", "8192"),
    ),
    "norms: no floats": Bad(
        lambda: jtrunc.diagnostics.gradient_norms(
            System(lambda theta, h, x: h, lambda params, h, x: (jnp.sum(params.recurrent), ())),
            CASE.params._replace(recurrent=jnp.ones(2)),
            jnp.int32(0),
            CASE.inputs,
            2,
        ),
        ValueError,
        ("hidden", "float"),
    ),
    "norms: window": Bad(
        lambda: jtrunc.diagnostics.gradient_norms(*CASE, 6), ValueError, ("inputs", "6", "num_lags", "7")
    ),
    "norms: parts": Bad(
        lambda: jtrunc.diagnostics.gradient_norms(*CASE, 2, parts=lambda tree: tree), TypeError, ("parts",)
    ),
    "windowed: K2 True": Bad(build(jtrunc.windowed_bptt, 4, True), TypeError, ("loss_steps", "True")),
}

LAWS = {
    "every: 0": Bad(lambda: truncation.every(0), ValueError, ("length", "0")),
    "every: 1.5": Bad(lambda: truncation.every(1.5), TypeError, ("length", "1.5")),  # pyright: ignore
    "every: True": Bad(lambda: truncation.every(True), TypeError, ("length", "True")),
    "constant: 1": Bad(lambda: truncation.constant(1.0), ValueError, ("`c`", "1.0")),
    "constant: -0.1": Bad(lambda: truncation.constant(-0.1), ValueError, ("`c`", "-0.1")),
    "constant: nan": Bad(lambda: truncation.constant(float("nan")), ValueError, ("`c`", "nan")),
    "polynomial: L0 = 1": Bad(lambda: truncation.polynomial(1, 4), ValueError, ("mean_length", "1")),
    "polynomial: L0 = -2": Bad(lambda: truncation.polynomial(-2, 4), ValueError, ("mean_length", "-2")),
    "polynomial: alpha = 2": Bad(lambda: truncation.polynomial(16, 2), ValueError, ("alpha", "2")),
    "polynomial: alpha = nan": Bad(
        lambda: truncation.polynomial(16, float("nan")), ValueError, ("alpha", "nan")
    ),
    "given: c = 1": Bad(
        lambda: truncation.given(np.array([0, 1]), np.array([0.5, 1.0])),
        ValueError,
        ("probabilities", "[0.5 1. ]"),
    ),
    "given: c < 0": Bad(
        lambda: truncation.given(np.array([0, 1]), np.array([-0.5, 0.1])),
        ValueError,
        ("probabilities", "-0.5"),
    ),
    "given: a cut of 2": Bad(
        lambda: truncation.given(np.array([0, 2]), np.array([0.5, 0.5])), ValueError, ("cuts", "2")
    ),
    "given: unequal": Bad(
        lambda: truncation.given(np.zeros(3), np.zeros(2)), ValueError, ("cuts", "probabilities", "3", "2")
    ),
    "given: a matrix": Bad(
        lambda: truncation.given(np.zeros((2, 2)), np.zeros((2, 2))), ValueError, ("cuts", "2, 2")
    ),
    "given: nothing": Bad(lambda: truncation.given(np.zeros(0), np.zeros(0)), ValueError, ("cuts", "0")),
    "from_probability: a number": Bad(lambda: truncation.from_probability(0.5), TypeError, ("fn", "0.5")),  # pyright: ignore
    "from_probability: no argument": Bad(
        lambda: truncation.from_probability(lambda: 0.5), TypeError, ("fn",)
    ),  # pyright: ignore
    "given: shorter than inputs": Bad(
        update(
            partial(jtrunc.artbp, truncation=truncation.given(np.zeros(4), np.zeros(4))), jax.random.key(0)
        ),
        ValueError,
        ("truncation.given", "4", "6"),
    ),
    "artbp: a number as law": Bad(build(jtrunc.artbp, 0.5), TypeError, ("truncation", "0.5")),
    "online: a word as law": Bad(
        build(jtrunc.online_artbp, "constant"), TypeError, ("truncation", "constant")
    ),
    "probability of shape (2,)": Bad(
        update(
            partial(jtrunc.artbp, truncation=truncation.from_probability(lambda elapsed: jnp.full(2, 0.5))),
            jax.random.key(0),
        ),
        (ValueError, TypeError),  # pyright: ignore
        ("2",),
    ),
}

KEYS = {
    "artbp: no key": Bad(update(artbp), ValueError, ("key", "None", "jax.random.key")),
    "online: no key": Bad(update(online), ValueError, ("key", "None", "jax.random.key")),
    "artbp: legacy key": Bad(
        update(artbp, jax.random.PRNGKey(0)), TypeError, ("key", "uint32", "jax.random.key")
    ),
    "online: legacy key": Bad(update(online, jax.random.PRNGKey(0)), TypeError, ("key", "uint32")),
    "online: an integer": Bad(update(online, 7), TypeError, ("key", "int", "jax.random.key")),
    "artbp: two keys": Bad(update(artbp, jax.random.split(jax.random.key(0))), ValueError, ("key", "(2,)")),
    "per_stream(artbp): no key": Bad(
        update(lambda s: jtrunc.per_stream(artbp(s)), hidden=jnp.zeros((2, 3)), inputs=jnp.zeros((6, 2, 2))),
        ValueError,
        ("key",),
    ),
    "scan: random law without key": Bad(scalar_scan(truncation=LAW), ValueError, ("key", "jax.random.key")),
    "scan: legacy key": Bad(
        scalar_scan(truncation=LAW, key=jax.random.PRNGKey(0)), TypeError, ("key", "uint32")
    ),
}

SYSTEMS = {
    "system: a function": Bad(lambda: jtrunc.bptt(lambda h: h), TypeError, ("system", "function")),  # pyright: ignore
    "system: a tuple": Bad(lambda: jtrunc.artbp((1, 2), LAW), TypeError, ("system", "tuple")),  # pyright: ignore
    "system: loss missing": Bad(
        lambda: jtrunc.truncated_bptt(System(CASE.system.transition, None), 3),  # pyright: ignore
        TypeError,
        ("loss", "None"),
    ),
    "with_resets: no system": Bad(lambda: jtrunc.with_resets(3, 0.0), TypeError, ("system", "int")),  # pyright: ignore
}

SHAPES = {
    "inputs: empty": Bad(update(inputs=jnp.zeros((0, 2))), ValueError, ("inputs", "0")),
    "inputs: no leaves": Bad(update(inputs=()), ValueError, ("inputs",)),
    "inputs: a scalar": Bad(update(inputs=jnp.float64(1)), ValueError, ("inputs", "scalar")),
    "inputs: unequal time axes": Bad(
        update(inputs={"x": jnp.zeros((6, 2)), "y": jnp.zeros((5, 2))}), ValueError, ("inputs", "6", "5")
    ),
    "inputs: a list of numbers": Bad(update(inputs=[1.0, 2.0]), TypeError, ("inputs", "float")),
    "params: not Params": Bad(update(params=CASE.params.recurrent), TypeError, ("params", "dict")),
    "params: integers": Bad(
        update(params=CASE.params._replace(readout=jnp.ones((3, 2), jnp.int32))),
        TypeError,
        ("params", "readout", "int32"),
    ),
    "transition: other structure": Bad(
        update(system=system(lambda theta, h, x: (h, h))), TypeError, ("hidden", "structure")
    ),
    "transition: other dtype": Bad(
        update(system=system(lambda theta, h, x: h.astype(jnp.float32))),
        TypeError,
        ("hidden", "float64", "float32"),
    ),
    "transition: other shape": Bad(
        update(system=system(lambda theta, h, x: jnp.concatenate([h, h]))),
        ValueError,
        ("hidden", "(3,)", "(6,)"),
    ),
    "transition: a broadcast": Bad(
        update(hidden=jnp.zeros(1), system=system(lambda theta, h, x: h + jnp.ones(3))),
        ValueError,
        ("hidden", "(1,)", "(3,)"),
    ),
    "loss: a vector": Bad(
        update(system=system(loss=lambda params, h, x: (h, ()))), ValueError, ("loss", "[3]", "scalar")
    ),
    "loss: without aux": Bad(
        update(system=system(loss=lambda params, h, x: h.sum())), TypeError, ("loss", "aux")
    ),
    "loss: an integer": Bad(
        update(system=system(loss=lambda params, h, x: (jnp.int32(1), ()))), TypeError, ("loss", "int32")
    ),
    "loss: complex": Bad(
        update(system=system(loss=lambda params, h, x: (h.sum() + 0j, ()))), TypeError, ("loss", "complex128")
    ),
    "per_stream: a scalar state": Bad(
        update(lambda s: jtrunc.per_stream(jtrunc.bptt(s)), hidden=jnp.float64(0)), ValueError, ("hidden",)
    ),
    "per_stream: inputs without streams": Bad(
        update(lambda s: jtrunc.per_stream(jtrunc.bptt(s)), hidden=jnp.zeros((6, 3)), inputs=jnp.zeros(6)),
        ValueError,
        ("inputs", "(6,)"),
    ),
    "with_resets: unlike the state": Bad(
        lambda: jtrunc.unroll(
            jtrunc.with_resets(CASE.system, jnp.zeros(4)),
            CASE.params,
            CASE.hidden,
            (jnp.zeros(6, bool), CASE.inputs),
        ),
        ValueError,
        ("initial_hidden", "(3,)", "(4,)"),
    ),
    "scan: f changes the carry": Bad(
        lambda: jtrunc.scan(
            lambda h, x: (h.astype(jnp.float32), h),
            jnp.float64(0),
            jnp.ones(3),
            truncation=truncation.never(),
        ),
        TypeError,
        ("carry", "float64", "float32"),
    ),
    "scan: no law": Bad(scalar_scan(truncation=3), TypeError, ("truncation", "3")),
    "scan: another length": Bad(
        lambda: jtrunc.scan(lambda h, x: (h, h), 0.0, jnp.ones(3), 5, truncation=truncation.never()),
        ValueError,
        ("length", "5", "3"),
    ),
    "scan: neither xs nor length": Bad(
        lambda: jtrunc.scan(lambda h, x: (h, h), 0.0, None, truncation=truncation.never()),
        ValueError,
        ("length",),
    ),
}

CELLS = {
    "cell: width 0": Bad(lambda: cells.lstm(2, 0), ValueError, ("width", "0")),
    "cell: input_size 1.5": Bad(lambda: cells.tanh(1.5, 2), TypeError, ("input_size", "1.5")),  # pyright: ignore
    "leaky: rate 0": Bad(lambda: cells.leaky(2, 3, 0.0), ValueError, ("rate", "0.0")),
    "leaky: rate nan": Bad(lambda: cells.leaky(2, 3, float("nan")), ValueError, ("rate", "nan")),
    "stack: empty": Bad(lambda: cells.stack([]), ValueError, ("cells",)),
    "model: output_size True": Bad(
        lambda: cells.model(cells.gru(2, 3), True, cells.softmax_cross_entropy),
        TypeError,
        ("output_size", "True"),
    ),
}

TABLE = LENGTHS | LAWS | KEYS | SYSTEMS | SHAPES | CELLS


def test_the_table_is_long_enough():
    assert len(TABLE) >= 40


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_refused(name):
    bad = TABLE[name]
    with pytest.raises(bad.error) as caught:
        bad.call()
    message = str(caught.value)
    for word in bad.words:
        assert re.search(re.escape(word), message), f"{word!r} is missing in: {message}"


EVERY_ESTIMATOR = {
    "bptt": jtrunc.bptt,
    "checkpointed": partial(jtrunc.bptt, checkpoint="sqrt"),
    "truncated": truncated,
    "windowed": windowed,
    "artbp": artbp,
    "online": online,
    "adaptive": adaptive,
    "targets": partial(jtrunc.target_propagation, block_length=3, penalty=0.1),
}


@pytest.mark.parametrize("name", EVERY_ESTIMATOR)
@pytest.mark.parametrize(
    "bad",
    [
        "inputs: empty",
        "inputs: unequal time axes",
        "params: integers",
        "transition: other dtype",
        "loss: a vector",
    ],
)
def test_every_estimator_checks_its_update(name, bad):
    changes = {
        "inputs: empty": {"inputs": jnp.zeros((0, 2))},
        "inputs: unequal time axes": {"inputs": (jnp.zeros((6, 2)), jnp.zeros((5, 2)))},
        "params: integers": {"params": CASE.params._replace(readout=jnp.ones((3, 2), jnp.int32))},
        "transition: other dtype": {"system": system(lambda theta, h, x: h.astype(jnp.float32))},
        "loss: a vector": {"system": system(loss=lambda params, h, x: (h, ()))},
    }[bad]
    with pytest.raises(TABLE[bad].error, match=TABLE[bad].words[0]):
        update(EVERY_ESTIMATOR[name], jax.random.key(0), **changes)()
    update(EVERY_ESTIMATOR[name], jax.random.key(0))()


def test_the_errors_come_at_trace_time():
    """Under jit as well: nothing is compiled, nothing runs."""
    estimator = truncated(CASE.system)
    state = estimator.init(CASE.params, CASE.hidden)
    with pytest.raises(ValueError, match="inputs"):
        jax.eval_shape(estimator.update, CASE.params, state, jnp.zeros((0, 2)))


def test_a_probability_of_one_does_not_pass_unseen():
    """c = 1 at run time cannot raise; it shows as nan instead of as a bias (errata 7)."""
    law = truncation.from_probability(lambda elapsed: jnp.where(elapsed == 2, 1.0, 0.1))
    estimate, _ = update(partial(jtrunc.artbp, truncation=law), jax.random.key(0))()
    assert np.isnan(jax.tree.leaves(estimate.grads)[0]).all()
