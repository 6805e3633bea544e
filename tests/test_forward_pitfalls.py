"""Mistakes found in other implementations of forward mode, each pinned; memory; and bad input."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtrunc
from tests import reference, systems
from tests.compare import add, assert_close
from tests.forward_cases import apart, same, vector, walk
from tests.systems import Case

RANK_ONE = {
    "nobacktrack": jtrunc.nobacktrack,
    "rank two": partial(jtrunc.nobacktrack, rank=2),
    "split": partial(jtrunc.nobacktrack, rank=2, split=True),
    "uoro": jtrunc.uoro,
}
KRONECKER = {
    "kf_rtrl": jtrunc.kf_rtrl,
    "one term": jtrunc.optimal_kronecker_sum,
    "two terms": partial(jtrunc.optimal_kronecker_sum, terms=2),
}
RANDOM = RANK_ONE | KRONECKER


def carried(state: Any) -> list[jax.Array]:
    """The float leaves of a state beside the hidden state."""
    leaves = jax.tree.leaves(state._replace(hidden=()))
    return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]


@pytest.mark.slow
@pytest.mark.parametrize("name", RANDOM)
def test_the_influence_starts_at_zero_and_the_first_step_is_exact(name, key):
    """Nothing lies before the first step, so nothing is random in it (UORO: in its mean, by enumeration)."""
    case = systems.structured("lstm", 1)
    exact = reference.bptt(reference.linearise(*case))
    estimator = RANDOM[name](case.system)
    state = estimator.init(case.params, case.hidden, key)
    assert carried(state) and not any(np.any(leaf) for leaf in carried(state))
    estimate, after = jax.jit(estimator.update)(case.params, state, case.inputs)
    assert np.isfinite(vector(estimate.grads)).all()
    if name != "uoro":
        assert_close(estimate.grads, exact)
    assert any(np.any(leaf) for leaf in carried(after))


class Windows(NamedTuple):
    """An estimator, the system it runs on, the steps of its shortest window, and those of its longest."""

    make: Callable[..., Any]
    kind: str
    shortest: int = 1
    longest: int = 6


WINDOWS = {
    "nobacktrack": Windows(jtrunc.nobacktrack, "nested"),
    "nobacktrack, structured": Windows(jtrunc.nobacktrack, "lstm", longest=37),
    "rank two": Windows(partial(jtrunc.nobacktrack, rank=2), "linear_recurrent"),
    "rank two, stack": Windows(partial(jtrunc.nobacktrack, rank=2), "stack"),
    "split": Windows(partial(jtrunc.nobacktrack, rank=2, split=True), "gru"),
    "kalman": Windows(partial(jtrunc.nobacktrack, norms="kalman"), "lstm"),
    "uoro": Windows(jtrunc.uoro, "nested"),
    "uoro, structured": Windows(jtrunc.uoro, "gru", longest=37),
    "memory": Windows(partial(jtrunc.uoro, memory=2), "gru", shortest=2),
    "kf_rtrl": Windows(jtrunc.kf_rtrl, "gru"),
    "two terms": Windows(partial(jtrunc.optimal_kronecker_sum, terms=2), "lstm"),
}
"""37 steps are more than one chunk of the fast paths, and a ragged one."""


@pytest.mark.slow
@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_is_as_many_updates_of_one_step(name, key):
    """The same key: the same draws, the same sum, the same state."""
    make, kind, shortest, longest = WINDOWS[name]
    case = systems.nested(longest) if kind == "nested" else systems.structured(kind, longest)
    estimator = make(case.system)
    steps, state = walk(estimator, case, shortest, key)
    rows, after = walk(estimator, case, longest, key)
    same(rows.sum(axis=0), steps.sum(axis=0))
    for mine, other in zip(carried(after), carried(state), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-12)
    others = [walk(estimator, case, shortest, jax.random.key(seed))[0].sum(axis=0) for seed in range(6)]
    assert any(apart(other, steps.sum(axis=0)) for other in others)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rank two", "memory", "two terms"])
def test_no_key_is_used_twice(name, key):
    """jax's checker follows every key through init and two windows."""
    make, kind = WINDOWS[name][:2]
    case = systems.structured(kind, 4)
    estimator = make(case.system)

    def two_updates(key: jax.Array) -> Any:
        state = estimator.init(case.params, case.hidden, key)
        first, state = estimator.update(case.params, state, case.inputs)
        return first.grads, estimator.update(case.params, state, case.inputs)[0].grads

    with jax.debug_key_reuse(True):
        jax.jit(two_updates)(jax.random.clone(key))


@pytest.mark.slow
@pytest.mark.parametrize("width", [16, 61, 161])
@pytest.mark.parametrize("name", ["rtrl", "nobacktrack", "uoro"])
def test_finite_at_several_sizes(name, width, key):
    """Products with zeros made inside jit have returned garbage at some sizes (pitfalls, XLA): none here."""
    case = systems.structured("tanh", 3, width, jnp.float32)
    estimator = getattr(jtrunc, name)(case.system)
    state = estimator.init(case.params, case.hidden, key)
    estimate, state = jax.jit(estimator.update)(case.params, state, case.inputs)
    assert all(np.isfinite(leaf).all() for leaf in [*jax.tree.leaves(estimate.grads), *carried(state)])


def mixed(length: int) -> Case:
    """A state of float32, bfloat16 and complex64 leaves, each of which carries a parameter's influence on."""

    def transition(theta: Any, hidden: Any, inputs: jax.Array) -> Any:
        half = jnp.tanh(theta["half"] * hidden["half"] + inputs.astype(jnp.bfloat16))
        turn = theta["turn"] * hidden["turn"] + inputs
        return {"half": half, "turn": turn, "full": 0.5 * hidden["full"] + theta["full"] * inputs}

    def loss(params: Any, hidden: Any, inputs: jax.Array) -> Any:
        total = hidden["half"].astype(jnp.float32) + hidden["turn"].imag + hidden["full"]
        return total * inputs, ()

    theta = {
        "half": jnp.bfloat16(0.75),
        "turn": jnp.complex64(0.5 + 0.5j),
        "full": jnp.float32(0.5),
    }
    hidden = {"half": jnp.bfloat16(0.5), "turn": jnp.complex64(1.0), "full": jnp.float32(1.0)}
    inputs = jnp.asarray(np.random.default_rng(14).normal(size=length), jnp.float32)
    return Case(systems.System(transition, loss), systems.Params(theta), hidden, inputs)


@pytest.mark.slow
def test_no_leaf_is_left_out_for_its_dtype():
    """float32, bfloat16 and complex64: each influence equals reverse mode, but for rounding."""
    case = mixed(4)
    estimator = jtrunc.bptt(case.system)
    exact = estimator.update(case.params, estimator.init(case.params, case.hidden), case.inputs)[0].grads
    for make in (jtrunc.rtrl, partial(jtrunc.snap, order=1)):
        estimator, parts = make(case.system), []
        state, update = estimator.init(case.params, case.hidden), jax.jit(estimator.update)
        for t in range(4):
            estimate, state = update(case.params, state, case.window(t, t + 1))
            parts.append(jax.tree.map(lambda g: g.astype(jnp.result_type(g, jnp.float32)), estimate.grads))
        total = add(*parts)
        for name, tolerance in (("half", 0.05), ("turn", 1e-5), ("full", 1e-5)):
            np.testing.assert_allclose(total.recurrent[name], exact.recurrent[name], rtol=tolerance)
            assert total.recurrent[name] != 0


@pytest.mark.slow
def test_a_parameter_that_several_units_share_gets_all_of_its_gradient():
    """Shared numbers break the assumption that units own their parameters; the gradient must not."""
    case = systems.tied(6)
    exact = vector(reference.bptt(reference.linearise(*case)))
    same(walk(jtrunc.rtrl(case.system), case, 2)[0].sum(axis=0), exact)
    same(walk(jtrunc.snap(case.system, 3), case, 2)[0].sum(axis=0), exact)


# Batches of streams.


STREAMS, KEYS = 16, 3000


def stream_gradients(noise: Any, same_streams: bool) -> np.ndarray:
    """(KEYS, p + q): gradients of 16 streams of `uoro`, one key each."""
    case = systems.tanh(4, 2)
    x = jnp.repeat(case.inputs[:, None], STREAMS, axis=1)
    if not same_streams:
        x = x + jnp.asarray(np.random.default_rng(16).normal(size=x.shape))
    hidden = jnp.repeat(case.hidden[None], STREAMS, axis=0)
    estimator = jtrunc.per_stream(jtrunc.uoro(case.system), noise=noise)

    def grads(key: jax.Array) -> jax.Array:
        state = estimator.init(case.params, hidden, key)
        return vector(estimator.update(case.params, state, x)[0].grads)

    return np.asarray(jax.jit(jax.vmap(grads))(jax.random.split(jax.random.key(3), KEYS)))


@pytest.mark.slow
def test_streams_draw_for_themselves_unless_told_otherwise():
    """Of 16 equal streams, shared noise is as noisy as one, and independent noise has 1/16 of the variance.

    The ratio of two variances from 3000 draws each is known to some 8 %.
    """
    case = systems.tanh(4, 2)
    exact = np.asarray(vector(reference.bptt(reference.linearise(*case))))
    independent, shared = (stream_gradients(noise, True) for noise in ("independent", "shared"))
    ratio = shared.var(axis=0).sum() / independent.var(axis=0).sum()
    assert 11 < ratio < 23
    for samples in (independent, shared):
        noisy = samples.std(axis=0) > 1e-9
        error = np.abs(samples.mean(axis=0) - exact)[noisy]
        assert (error < 5.5 * samples.std(axis=0)[noisy] / np.sqrt(KEYS)).all()
        same(samples.mean(axis=0)[~noisy], exact[~noisy])


# Memory, by the compiled program's own analysis.


@cache
def temporary_bytes(name: str, width: int, length: int, structured: bool) -> int:
    dtype = jnp.float32
    if structured:
        case = systems.structured("tanh", length, width, dtype)
    else:
        case = systems.tanh(length, width, dtype)
    estimator = RANDOM[name](case.system)
    state = estimator.init(case.params, case.hidden, jax.random.key(0))

    def grads_only(params: Any, state: Any, inputs: Any) -> Any:
        estimate, state = estimator.update(params, state, inputs)
        return estimate.loss, estimate.grads, state

    analysis = jax.jit(grads_only).lower(case.params, state, case.inputs).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "structured"), [("nobacktrack", True), ("nobacktrack", False), ("uoro", True)]
)
def test_rank_one_needs_memory_for_the_parameters_and_not_for_time(name, structured):
    """O(n + |θ|): twice the units are four times the parameters, and would be eight times a dense influence.

    Between T = 500 and 2000 only per-step scalars of the output may grow, by 8 bytes a step.
    """
    short, long = (temporary_bytes(name, 64, length, structured) for length in (500, 2000))
    assert long - short <= 1500 * 16
    wide = temporary_bytes(name, 128, 500, structured)
    assert wide / short < 5
    parameters = 128 * (128 + 2 + 1)
    assert wide < 40 * 4 * parameters < 0.4 * 4 * 128 * parameters


def test_rtrl_says_how_many_bytes_it_would_need():
    """n = 64 units, |θ| = 64 · 67 in float32: 64 · 4288 · 4 = 1,097,728 bytes, at trace time."""
    case = systems.structured("tanh", 1, 64, jnp.float32)
    for system in (case.system, case.system._replace(structure=None)):
        estimator = jtrunc.rtrl(system, memory_limit=1_000_000)
        with pytest.raises(
            ValueError, match=r"(?s)1[,_]?097[,_]?728.*memory_limit|memory_limit.*1[,_]?097[,_]?728"
        ):
            jax.eval_shape(estimator.init, case.params, case.hidden)
        enough = jtrunc.rtrl(system, memory_limit=1_097_728)
        jax.eval_shape(enough.init, case.params, case.hidden)


# Bad input.

CASE = systems.structured("tanh", 3)
PLAIN = CASE.system._replace(structure=None)


class Bad(NamedTuple):
    """A call, the exception it must raise, and words that the message must contain."""

    call: Callable[[], Any]
    error: type[Exception]
    words: tuple[str, ...]


def update(make: Callable[..., Any], key: Any = None, **changes: Any) -> Callable[[], Any]:
    """A call that makes, initialises and traces an estimator on a changed case."""

    def call() -> Any:
        case = CASE._replace(**changes)
        estimator = make(case.system)
        state = estimator.init(case.params, case.hidden, key)
        return jax.eval_shape(estimator.update, case.params, state, case.inputs)

    return call


def needs_structure(make: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return update(lambda system: make(system, *arguments), jax.random.key(0), system=PLAIN)


EVERY = RANDOM | {
    "rtrl": jtrunc.rtrl,
}
BAD = {
    "rtrl: memory_limit 0": Bad(
        lambda: jtrunc.rtrl(CASE.system, memory_limit=0).init(CASE.params, CASE.hidden),
        ValueError,
        ("rtrl", "memory_limit", "0"),
    ),
    "rtrl: memory_limit 1.5": Bad(
        lambda: jtrunc.rtrl(CASE.system, memory_limit=1.5),  # pyright: ignore
        TypeError,
        ("rtrl", "memory_limit", "1.5"),
    ),
    "snap: order 0": Bad(lambda: jtrunc.snap(CASE.system, 0), ValueError, ("snap", "order", "0")),
    "snap: order 1.0": Bad(
        lambda: jtrunc.snap(CASE.system, 1.0),  # pyright: ignore
        TypeError,
        ("snap", "order", "1.0"),
    ),
    "nobacktrack: rank 0": Bad(
        lambda: jtrunc.nobacktrack(CASE.system, 0), ValueError, ("nobacktrack", "rank", "0")
    ),
    "nobacktrack: rank 2.0": Bad(
        lambda: jtrunc.nobacktrack(CASE.system, 2.0),  # pyright: ignore
        TypeError,
        ("nobacktrack", "rank", "2.0"),
    ),
    "nobacktrack: norms": Bad(
        lambda: jtrunc.nobacktrack(CASE.system, norms="fisher"),  # pyright: ignore
        ValueError,
        ("nobacktrack", "norms", "fisher", "kalman"),
    ),
    "uoro: memory 0": Bad(lambda: jtrunc.uoro(CASE.system, memory=0), ValueError, ("uoro", "memory", "0")),
    "uoro: window of 3, memory 2": Bad(
        update(lambda system: jtrunc.uoro(system, memory=2), jax.random.key(0)),
        ValueError,
        ("uoro", "inputs", "3", "2"),
    ),
    "ok: terms 0": Bad(
        lambda: jtrunc.optimal_kronecker_sum(CASE.system, 0),
        ValueError,
        ("optimal_kronecker_sum", "terms", "0"),
    ),
    "kf_rtrl: no structure": Bad(needs_structure(jtrunc.kf_rtrl), ValueError, ("kf_rtrl", "structure")),
    "ok: no structure": Bad(
        needs_structure(jtrunc.optimal_kronecker_sum), ValueError, ("optimal_kronecker_sum", "structure")
    ),
    "eprop: no structure": Bad(needs_structure(jtrunc.eprop), ValueError, ("eprop", "structure")),
    "diagonal_rtrl: units that read each other": Bad(
        update(jtrunc.diagonal_rtrl), ValueError, ("diagonal_rtrl", "units", "structure")
    ),
    "diagonal_rtrl: no structure": Bad(
        update(jtrunc.diagonal_rtrl, system=PLAIN), ValueError, ("diagonal_rtrl", "structure")
    ),
    "noise: a number": Bad(
        lambda: jtrunc.uoro(CASE.system, noise=1.0),  # pyright: ignore
        TypeError,
        ("uoro", "noise", "float"),
    ),
    "noise: another shape": Bad(
        update(
            lambda system: jtrunc.uoro(system, noise=lambda key, shape, dtype: jnp.ones(7)),
            jax.random.key(0),
        ),
        ValueError,
        ("uoro", "noise", "(7,)", "(3,)"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    bad = BAD[name]
    with pytest.raises(bad.error) as caught:
        bad.call()
    for word in bad.words:
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_estimator_checks_what_it_is_given(name):
    make, key = EVERY[name], jax.random.key(0) if name in RANDOM else None
    with pytest.raises(TypeError, match="system"):
        make(lambda theta, hidden, inputs: hidden)  # pyright: ignore[reportArgumentType]
    if name in RANDOM:
        with pytest.raises(ValueError, match="key"):
            update(make)()
    with pytest.raises(TypeError, match="params"):
        update(make, key, params=CASE.params.recurrent)()
    with pytest.raises(ValueError, match="inputs"):
        update(make, key, inputs=jax.tree.map(lambda leaf: leaf[:0], CASE.inputs))()
    update(make, key)()
