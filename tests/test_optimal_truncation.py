"""The law of least variance: its prediction against enumeration, its minimum against another solver.

Two kinds of oracle. Variances and expectations are enumerated over every cut pattern, or every sequence of
windows, of a short stream with `tests.reference`; minima are those of SLSQP on the survival function itself,
in which the problem is convex. Prediction and stream are made equal, not nearly so: the stream ends in
silence, so that no contribution is lost at its end, and begins at a position drawn from the law's own share
of positions, so that it is stationary.
"""

from __future__ import annotations

from functools import cache, partial
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import LinearConstraint, minimize

import jtrunc
from jtrunc import cells, truncation
from jtrunc.backward.optimal import optimal_probabilities, uncorrelated
from jtrunc.diagnostics import gradient_norms, lag_products, truncation_variance
from tests import reference, systems
from tests.compare import add, assert_close, differ
from tests.reference import to_vector
from tests.systems import Case

pytestmark = pytest.mark.slow  # nearly all of its time is compilation

LAGS = 40
NORMS = {
    "slow": 0.95 ** np.arange(LAGS + 1),
    "fast": 0.6 ** np.arange(LAGS + 1),
    "plateau": np.where(np.arange(LAGS + 1) < 12, 1.0, 0.7 ** (np.arange(LAGS + 1) - 12.0)),
    "power": 1.0 / (1.0 + np.arange(LAGS + 1)),
    "single": (np.arange(LAGS + 1) == 20).astype(float),
}


def padded(norms: Any) -> np.ndarray:
    """Norms of LAGS lags, the later ones 0: one compiled program serves every test."""
    return np.pad(np.asarray(norms, float), (0, LAGS + 1 - len(norms)))


def silent_after(case: Case, scored: int) -> Case:
    """The case with losses on its first `scored` steps alone; inputs become ``(inputs, whether scored)``."""
    weights = (jnp.arange(len(case.inputs)) < scored).astype(case.inputs.dtype)

    def loss(params, hidden, inputs):
        value, aux = case.system.loss(params, hidden, inputs[0])
        return inputs[1] * value, aux

    system = jtrunc.System(lambda theta, h, inputs: case.system.transition(theta, h, inputs[0]), loss)
    return case._replace(system=system, inputs=(case.inputs, weights))


def law_of(table: Any) -> reference.Law:
    return lambda elapsed, state: float(table[min(elapsed, len(table)) - 1])


def shares(table: np.ndarray) -> np.ndarray:
    """(N,): the share of the steps of a stream that are the i-th of their window; the last has all later."""
    reached = np.concatenate([[1.0], np.cumprod(1 - table[:-1])])
    reached[-1] /= table[-1]
    return reached / reached.sum()


# The prediction.


def test_a_constant_law_adds_the_geometric_excess():
    for norms in NORMS.values():
        expected = np.sum(norms**2 * (0.9 ** -np.arange(LAGS + 1.0) - 1))
        found = float(truncation_variance(truncation.constant(0.1), norms))
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        as_row = truncation_variance(truncation.constant(0.1), norms, products=norms[None] ** 2)
        np.testing.assert_allclose(float(as_row), expected, rtol=1e-12)
        assert not np.isclose(found, truncation_variance(truncation.polynomial(10, 4), norms), rtol=1e-3)
    assert float(truncation_variance(truncation.constant(0.0), NORMS["slow"])) == 0
    assert float(truncation_variance(truncation.every(5), NORMS["slow"])) == 0


TABLE = np.array([0.6, 0.05, 0.3, 0.2])
SCORED = 6


@cache
def short_stream() -> tuple[Case, reference.Linearised, jax.Array]:
    """A stream of SCORED steps, then silence, and its products at all distances."""
    case = systems.tanh(3 * SCORED - 2)
    silent = silent_after(case, SCORED)
    run = reference.linearise(case.system, case.params, case.hidden, case.window(0, SCORED))
    return case, run, lag_products(silent.system, silent.params, silent.hidden, silent.inputs, SCORED - 1)


def contributions(run: reference.Linearised) -> np.ndarray:
    """v[t, j], (T, T, p): what loss j adds to the gradient through hₜ."""
    found = np.zeros((run.length, run.length, run.state_by_theta.shape[2]))
    for j in range(run.length):
        cotangent = run.loss_by_state[j]
        for t in reversed(range(j + 1)):
            found[t, j] = cotangent @ run.state_by_theta[t]
            cotangent = cotangent @ run.state_by_state[t]
    return found


def weighted_norms(run: reference.Linearised) -> np.ndarray:
    """φₖ = √E‖v_{t,t+k}‖² over the steps of the stream, 0 where its losses end, (SCORED,)."""
    squares = np.sum(contributions(run) ** 2, axis=-1)
    return np.sqrt([np.trace(squares, offset=lag) / run.length for lag in range(run.length)])


def enumerated_variance(run: reference.Linearised, table: np.ndarray) -> float:
    """Over all cut patterns, from every position at which a window can stand at the first step."""
    exact = np.asarray(to_vector(reference.bptt(run)))
    total = 0.0
    for position, share in enumerate(shares(table), start=1):
        for pattern in reference.cut_patterns(law_of(table), run, elapsed=position):
            estimate = to_vector(reference.artbp(run, pattern.cuts, pattern.probabilities))
            total += share * pattern.probability * float(np.sum((np.asarray(estimate) - exact) ** 2))
    return total


@pytest.mark.parametrize("table", [TABLE, np.array([0.25])], ids=["table", "constant"])
def test_the_prediction_with_products_is_the_enumerated_variance(table):
    _, run, products = short_stream()
    exact, norms = enumerated_variance(run, table), weighted_norms(run)
    law = truncation.tabulated(table)
    predicted = SCORED * float(truncation_variance(law, norms, products=products))
    np.testing.assert_allclose(predicted, exact, rtol=1e-10)
    uncorrelated_losses = SCORED * float(truncation_variance(law, norms))
    one_step = SCORED * float(truncation_variance(law, norms, products=products[:1]))
    assert abs(uncorrelated_losses / exact - 1) > 0.05 and abs(one_step / exact - 1) > 1e-3


def test_weighted_norms_are_those_of_the_contributions():
    """φₖ counts from the loss: k = 0 is the step whose state it reads."""
    case, run, _ = short_stream()
    inputs = case.window(0, SCORED)
    norms = gradient_norms(case.system, case.params, case.hidden, inputs, SCORED - 1, weighted=True)
    last = np.linalg.norm(contributions(run)[:, -1], axis=-1)
    np.testing.assert_allclose(norms[0], last[::-1], rtol=1e-10)
    assert differ(norms[0], last)


# The minimum.


@pytest.mark.parametrize("mean_length", [8.0, 30.0])
@pytest.mark.parametrize("name", NORMS)
def test_no_other_law_of_the_same_mean_length_has_less_variance(name, mean_length):
    norms = NORMS[name]
    law = truncation.optimal(norms, mean_length)
    c = np.asarray(truncation.probabilities(law, 20_000))
    assert ((c >= 0) & (c < 1)).all()
    lengths = np.concatenate([[1.0], np.cumprod(1 - c)])
    np.testing.assert_allclose(lengths.sum(), mean_length, rtol=1e-6)
    others = [truncation.constant(1 / mean_length), *(truncation.polynomial(mean_length, a) for a in (4, 6))]
    least = float(truncation_variance(law, norms))
    assert least < 0.97 * min(float(truncation_variance(other, norms)) for other in others)
    generator = np.random.default_rng(3)
    for scale in (0.01, 0.1, 0.5):  # its neighbours, whose variance is at best as much lower as lengths grow
        near = c[:123] * np.exp(scale * generator.normal(size=123))
        neighbour = of_mean_length(np.minimum(near, 0.99), mean_length)
        assert float(truncation_variance(truncation.tabulated(neighbour), norms)) > least * (1 - 1e-9)


def of_mean_length(c: np.ndarray, mean_length: float) -> np.ndarray:
    """The law whose hazards are proportional to these and that has this mean length."""
    low, high = 1e-9, 1e9
    for _ in range(200):
        middle = np.sqrt(low * high)
        scaled = -np.expm1(middle * np.log1p(-c))
        with np.errstate(divide="ignore"):
            reached = np.concatenate([[1.0], np.cumprod(1 - scaled[:-1])])
            longer = reached[:-1].sum() + reached[-1] / scaled[-1] > mean_length
        low, high = (middle, high) if longer else (low, middle)
    return -np.expm1(np.sqrt(low * high) * np.log1p(-c))


def test_a_memory_of_one_step_wants_the_constant_law():
    """G(i)² / G(i + 1) is least for a geometric G, and then depends on nothing else."""
    norms = padded([1.0, 1.0])
    found = truncation.optimal(norms, 5.0)
    np.testing.assert_allclose(truncation.probabilities(found, 20), 0.2, atol=2e-3)
    least, constant = (float(truncation_variance(law, norms)) for law in (found, truncation.constant(0.2)))
    np.testing.assert_allclose(least, constant, rtol=1e-6)
    assert truncation.probabilities(truncation.optimal(padded([1.0, 1.0, 1.0]), 5.0), 1)[0] > 0.3


@pytest.mark.parametrize("norms", [[1.0, 0.7, 0.5, 0.3], [0.2, 0.1, 0.1, 1.0]])
def test_another_solver_finds_the_same_minimum(norms):
    """SLSQP on G(2) … G(M) at G(1) = 1, ΣG = L₀, G decreasing, beyond M geometric as between M − 1 and M.

    M is less than the library's N, so that its minimum may be higher, and is by less than 1e-4.
    """
    squares, mean_length, size = np.square(norms), 4.0, 30
    reaches = np.arange(size)[:, None] + np.arange(len(norms))

    def extended(tail: Any) -> tuple[jax.Array, jax.Array]:
        """G with its geometric tail, and how many positions each entry stands for."""
        reached = jnp.concatenate([jnp.ones(1), tail])
        ratio = jnp.minimum(reached[-1] / reached[-2], 0.999999)
        counts = jnp.append(jnp.ones(size - 1), 1 / (1 - ratio))
        return jnp.concatenate([reached, reached[-1] * ratio ** jnp.arange(1.0, len(norms))]), counts

    @jax.jit
    @jax.value_and_grad
    def second_moment(tail: Any) -> jax.Array:
        reached, counts = extended(tail)
        return counts @ (reached[:size, None] ** 2 / reached[reaches] @ squares) / mean_length

    @jax.jit
    @jax.value_and_grad
    def length(tail: Any) -> jax.Array:
        reached, counts = extended(tail)
        return counts @ reached[:size]

    start = (1 - 1 / mean_length) ** np.arange(1, size)
    steps_down = np.eye(size - 2, size - 1) - np.eye(size - 2, size - 1, k=1)
    excess = {
        "type": "eq",
        "fun": lambda tail: float(length(tail)[0]) - mean_length,
        "jac": lambda tail: np.asarray(length(tail)[1]),
    }
    found = minimize(
        lambda tail: tuple(map(np.asarray, second_moment(tail))),
        start,
        jac=True,
        method="SLSQP",
        bounds=[(1e-9, 1.0)] * (size - 1),
        constraints=[LinearConstraint(steps_down, 0.0, np.inf), excess],
        options={"maxiter": 400, "ftol": 1e-13},
    )
    least = float(truncation_variance(truncation.optimal(padded(norms), mean_length), padded(norms)))
    other = float(second_moment(found.x)[0]) - squares.sum()
    assert -1e-4 < least / other - 1 < 1e-6
    assert float(second_moment(start)[0]) - squares.sum() > 1.02 * other


@pytest.mark.slow
def test_single_precision_and_tiny_norms():
    """Norms down to 1e-60 and a factor up to e^L: logs keep them; the law is that of float64."""
    logs = np.log(0.25) * np.arange(LAGS + 1) * 2
    double = np.asarray(optimal_probabilities(uncorrelated(jnp.asarray(logs)), 6.0))
    single = optimal_probabilities(uncorrelated(jnp.asarray(logs, jnp.float32)), 6.0)
    assert single.dtype == jnp.float32 and bool(jnp.isfinite(single).all())
    rates = [float(truncation_variance(truncation.tabulated(c), np.exp(logs / 2))) for c in (double, single)]
    np.testing.assert_allclose(rates[1], rates[0], rtol=1e-4)
    reached = np.concatenate([[1.0], np.cumprod(1 - np.asarray(single, float)[:-1])])
    np.testing.assert_allclose(reached[:-1].sum() + reached[-1] / float(single[-1]), 6.0, rtol=3e-6)


BAD = {
    "three axes": ((np.ones((2, 2, 2)), 4.0), {}, "gradient_norms"),
    "empty": ((np.ones(0), 4.0), {}, "gradient_norms"),
    "negative": (([1.0, -1.0], 4.0), {}, "gradient_norms"),
    "nan": (([1.0, np.nan], 4.0), {}, "gradient_norms"),
    "all zero": (([0.0, 0.0], 4.0), {}, "gradient_norms"),
    "mean length": (([1.0, 1.0], 1.0), {}, "mean_length"),
    "endless": (([1.0, 1.0], np.inf), {}, "mean_length"),
    "products of one axis": (([1.0, 1.0], 4.0), {"products": [1.0, 1.0]}, "products"),
    "products of other lags": (([1.0, 1.0], 4.0), {"products": np.ones((2, 3))}, "products"),
    "products that are not finite": (([1.0, 1.0], 4.0), {"products": [[1.0, np.inf]]}, "products"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name):
    arguments, options, named = BAD[name]
    with pytest.raises(ValueError, match=f"truncation.optimal: `{named}`"):
        truncation.optimal(*arguments, **options)


# Unbiased, by enumeration: every sequence of windows, each as the library answers when it draws it.

REACH, TIMES = 2, 1
STEPS = 6


@cache
def scalar_stream() -> tuple[Case, reference.Linearised]:
    case = systems.scalar(2 * STEPS)
    run = reference.linearise(case.system, case.params, case.hidden, case.window(0, STEPS))
    return silent_after(case, STEPS), run


class Answers:
    """What an estimator answers to each window of the stream, found by drawing keys until all have come."""

    def __init__(self, estimator: Any) -> None:
        self.case, self.run = scalar_stream()
        self.init, self.update = estimator.init, jax.jit(estimator.update)
        self.grads: dict[tuple[int, int], Any] = {}
        self.states = {0: self.init(self.case.params, self.case.hidden, jax.random.key(0))}
        for start in range(STEPS):
            self.draw_all(start)

    def draw_all(self, start: int) -> None:
        inputs = jax.tree.map(lambda leaf: leaf[start : start + STEPS], self.case.inputs)
        for key in jax.random.split(jax.random.key(start), 400):
            estimate, state = self.update(self.case.params, self.states[start]._replace(key=key), inputs)
            length = min(int(estimate.num_steps), STEPS - start)  # the rest is silence
            same = self.grads.setdefault((start, length), estimate.grads)
            assert_close(estimate.grads, same, rtol=1e-12)
            if estimate.num_steps == length:
                self.states.setdefault(start + length, state)
            if all((start, length) in self.grads for length in range(1, STEPS - start + 1)):
                return
        raise AssertionError(f"400 draws without every window that starts at {start}: {sorted(self.grads)}")

    def total(self, windows: tuple[int, ...]) -> Any:
        starts = np.cumsum([0, *windows[:-1]])
        return add(*(self.grads[int(start), length] for start, length in zip(starts, windows, strict=True)))


def expectation(run: reference.Linearised, law_at: Any, total: Any) -> Any:
    """Over all sequences of windows; `law_at` says by which law a window that starts there is drawn."""

    def chance(windows: tuple[int, ...]) -> float:
        starts = np.cumsum([0, *windows[:-1]])
        return float(np.prod([reference.window_probability(law_at(int(start)), run, int(start), length)
                              for start, length in zip(starts, windows, strict=True)]))  # fmt: skip

    return reference.expectation((chance(w), total(w)) for w in reference.window_sequences(STEPS))


@pytest.mark.slow
def test_online_artbp_with_the_optimal_law_is_exact():
    law = truncation.optimal(padded([1.0, 0.8, 0.5]), 3.0)
    answers = Answers(jtrunc.online_artbp(scalar_stream()[0].system, law))
    table = np.asarray(truncation.probabilities(law, STEPS))
    exact = reference.bptt(answers.run)
    assert_close(expectation(answers.run, lambda start: law_of(table), answers.total), exact, rtol=1e-12)
    skewed = law_of(np.roll(table, 1))
    assert differ(expectation(answers.run, lambda start: skewed, answers.total), exact)


def test_artbp_with_the_optimal_law_is_exact():
    """Every cut pattern, as `artbp` answers to the keys that draw it."""
    law, (case, run) = truncation.optimal(padded([1.0, 0.8, 0.5]), 3.0), scalar_stream()
    patterns = list(reference.cut_patterns(law_of(np.asarray(truncation.probabilities(law, STEPS))), run))
    estimator = jtrunc.artbp(case.system, law)
    inputs = jax.tree.map(lambda leaf: leaf[:STEPS], case.inputs)

    def grads(key):
        return estimator.update(case.params, estimator.init(case.params, case.hidden, key), inputs)[0].grads

    draws = jax.jit(jax.vmap(grads))(jax.random.split(jax.random.key(7), 20_000))
    drawn = np.concatenate([np.reshape(leaf, (20_000, -1)) for leaf in jax.tree.leaves(draws)], axis=1)
    answers = np.stack([to_vector(reference.artbp(run, p.cuts, p.probabilities)) for p in patterns])
    nearest = np.argmin(np.abs(drawn[:, None] - answers[None]).max(axis=2), axis=1)
    np.testing.assert_allclose(drawn, answers[nearest], rtol=1e-9, atol=1e-12)
    firsts = np.array([np.flatnonzero(nearest == pattern)[0] for pattern in range(len(patterns))])
    chances = np.array([pattern.probability for pattern in patterns])
    np.testing.assert_allclose(chances @ drawn[firsts], to_vector(reference.bptt(run)), rtol=1e-12)
    assert np.sum((np.bincount(nearest) - 20_000 * chances) ** 2 / (20_000 * chances)) < 90  # χ²₃₁: 1e-7


# The adaptive form.


@cache
def adaptive() -> Answers:
    estimator = jtrunc.adaptive_artbp(
        scalar_stream()[0].system, 3.0, num_lags=REACH, num_times=TIMES, weighted=True
    )
    return Answers(estimator)


def adaptive_laws() -> tuple[np.ndarray, np.ndarray]:
    """The law before the measurement has been passed by the stream, and the one after."""
    states = adaptive().states
    return np.asarray(states[0].probabilities), np.asarray(states[STEPS - 1].probabilities)


@pytest.mark.slow
def test_a_law_waits_until_the_stream_has_passed_its_data():
    case, states = scalar_stream()[0], adaptive().states
    first, second = adaptive_laws()
    np.testing.assert_allclose(first, truncation.probabilities(truncation.polynomial(3.0, 4), 32))
    window = jax.tree.map(lambda leaf: leaf[: REACH + TIMES], case.inputs)
    norms = gradient_norms(case.system, case.params, case.hidden, window, REACH, weighted=True)
    measured = truncation.probabilities(truncation.optimal(norms, 3.0), 32)
    np.testing.assert_allclose(second, measured, rtol=1e-6, atol=1e-9)
    assert differ(first, second, by=0.05)
    for start, state in states.items():
        passed = start >= REACH + TIMES
        np.testing.assert_array_equal(state.probabilities, second if passed else first)
        assert int(state.wait) == (max(REACH + TIMES - start, 0) if start else 0)


def test_adaptive_artbp_is_exact_while_its_law_changes():
    answers, (first, second) = adaptive(), adaptive_laws()
    exact = reference.bptt(answers.run)

    def law_at(start: int) -> reference.Law:
        return law_of(second if start >= REACH + TIMES else first)

    assert_close(expectation(answers.run, law_at, answers.total), exact, rtol=1e-12)
    assert differ(expectation(answers.run, lambda start: law_of(first), answers.total), exact)


@pytest.mark.parametrize("mutant", ["factors of the next law", "law chosen by the draw", "no factor"])
def test_laws_that_are_not_what_was_drawn_are_rejected(mutant):
    """Windows cut by one law and weighted by another: at once, by their own length, or not at all."""
    run, (first, second) = adaptive().run, adaptive_laws()

    def weights(start: int, length: int) -> reference.Law:
        if mutant == "no factor":
            return reference.never()
        if mutant == "law chosen by the draw":
            return law_of(first if length <= 2 else second)
        return law_of(second)

    def total(windows: tuple[int, ...]) -> Any:
        starts = np.cumsum([0, *windows[:-1]])
        return add(*(reference.online_artbp(run, int(start), length, weights(int(start), length))
                     for start, length in zip(starts, windows, strict=True)))  # fmt: skip

    assert differ(expectation(run, lambda start: law_of(first), total), reference.bptt(run))


def test_measurements_that_say_nothing_change_no_law():
    """Norms that are not finite, and a network without memory: the law stays, the clock runs on."""
    case, answers = scalar_stream()[0], adaptive()
    inputs = jax.tree.map(lambda leaf: leaf[:STEPS], case.inputs)
    nan = (jnp.full_like(inputs[0], jnp.nan), inputs[1])
    forgetful = case.params._replace(recurrent=case.params.recurrent.at[0].set(0.0))
    for params, given in ((case.params, nan), (forgetful, inputs)):
        estimate, state = answers.update(params, answers.states[0], given)
        assert int(estimate.aux.diagnostics["estimation_steps"]) == REACH + TIMES
        np.testing.assert_array_equal(state.pending, answers.states[0].pending)
        assert int(state.countdown) == 999


# Sampled, on a trained network.

DRAWS, STREAM = 20_000, 24


@cache
def trained() -> Case:
    """A network that has learned to average what it reads with a memory of ten steps."""
    model = cells.model(cells.tanh(2, 8), 2, lambda prediction, target: jnp.sum((prediction - target) ** 2))
    signs = np.random.default_rng(11).choice([-1.0, 1.0], size=(400 * 20 + STREAM, 2))
    averages = np.zeros_like(signs)
    for t in range(1, len(signs)):
        averages[t] = 0.9 * averages[t - 1] + 0.3 * signs[t]
    data = jnp.asarray(signs), jnp.asarray(averages)
    estimator, optimizer = jtrunc.bptt(model.system), optax.adam(0.01)
    params, hidden = model.init(jax.random.key(0), jnp.float64), model.initial_hidden((), jnp.float64)

    def step(carry, inputs):
        params, state = carry
        estimate, _ = estimator.update(params, estimator.init(params, hidden), inputs)
        updates, state = optimizer.update(estimate.grads, state)
        return (optax.apply_updates(params, updates), state), estimate.loss

    windows = jax.tree.map(lambda leaf: leaf[: 400 * 20].reshape(400, 20, 2), data)
    start = (params, optimizer.init(params))  # pyright: ignore[reportArgumentType]
    (params, _), losses = jax.jit(partial(jax.lax.scan, step))(start, windows)
    assert losses[-50:].mean() < 0.5 * losses[:50].mean()
    return Case(model.system, params, hidden, jax.tree.map(lambda leaf: leaf[400 * 20 :], data))


@cache
def draws_of_artbp() -> Any:
    """``(c by steps since the last cut, keys, steps since the last cut at the start) -> gradients of θ``."""
    case = trained()

    def grads(table, key, elapsed):
        estimator = jtrunc.artbp(case.system, truncation.tabulated(table))
        state = estimator.init(case.params, case.hidden, key)._replace(elapsed=elapsed)
        return estimator.update(case.params, state, case.inputs)[0].grads.recurrent

    return jax.jit(jax.vmap(grads, in_axes=(None, 0, 0)))


def sampled_excess(law: truncation.Truncation) -> np.ndarray:
    """(DRAWS,): ‖estimate − exact‖² of `artbp`, its first step at a position drawn as often as it occurs."""
    table = truncation.probabilities(law, 2000)
    starts = np.random.default_rng(5).choice(2000, size=DRAWS, p=shares(np.asarray(table)))
    keys = jax.random.split(jax.random.key(12), DRAWS)
    drawn = draws_of_artbp()(table, keys, jnp.asarray(starts, jnp.int32))
    case = trained()
    plain = jtrunc.bptt(case.system)
    estimate, _ = plain.update(case.params, plain.init(case.params, case.hidden), case.inputs)
    pairs = zip(jax.tree.leaves(drawn), jax.tree.leaves(estimate.grads.recurrent), strict=True)
    return sum(np.sum(np.reshape(d - e[None], (DRAWS, -1)) ** 2, axis=1) for d, e in pairs)  # pyright: ignore


@pytest.mark.slow
def test_variances_sampled_on_a_trained_network_are_the_predicted_ones():
    """Each variance and each ratio within its error bar, at a false-alarm rate of 1e-6 apiece.

    The prediction for a law that is two steps longer lies outside of it, and so does that without products.
    """
    case = trained()
    silence = 2 * (STREAM - 1)
    longer = jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, silence), (0, 0))), case.inputs)
    system = jtrunc.System(
        lambda theta, hidden, inputs: case.system.transition(theta, hidden, inputs[0]),
        lambda params, hidden, inputs: (inputs[1] * case.system.loss(params, hidden, inputs[0])[0], ()),
    )
    scored = jnp.concatenate([jnp.ones(STREAM), jnp.zeros(silence)])
    products = lag_products(system, case.params, case.hidden, (longer, scored), STREAM - 1)
    measured = gradient_norms(
        case.system, case.params, case.hidden, case.inputs, 12, num_times=12, weighted=True
    )
    norms = np.pad(np.sqrt(np.mean(np.square(measured), axis=0)), (0, STREAM - 13))
    predict = partial(truncation_variance, gradient_norms=norms, products=products)
    laws = {
        "constant": truncation.constant(1 / 6),
        "polynomial": truncation.polynomial(6.0, 4),
        "optimal": truncation.optimal(padded(norms), 6.0),
        "products": truncation.optimal(norms, 6.0, products=products),
    }
    limit, predicted = NormalDist().inv_cdf(1 - 1e-6 / 2), {k: float(predict(v)) for k, v in laws.items()}
    sampled = {name: sampled_excess(law) / STREAM for name, law in laws.items()}
    means = {name: squares.mean() for name, squares in sampled.items()}
    bars = {name: limit * squares.std(ddof=1) / np.sqrt(DRAWS) for name, squares in sampled.items()}
    for name in laws:
        assert abs(means[name] - predicted[name]) < bars[name], name
        bar = bars[name] / means[name] + bars["constant"] / means["constant"]
        ratio, expected = means[name] / means["constant"], predicted[name] / predicted["constant"]
        assert abs(ratio - expected) < bar * ratio
    assert abs(means["constant"] - float(predict(truncation.constant(1 / 8)))) > bars["constant"]
    assert abs(means["constant"] - float(truncation_variance(laws["constant"], norms))) > bars["constant"]
    assert predicted["products"] < predicted["optimal"] < 0.8 * predicted["polynomial"]
    assert means["optimal"] + bars["optimal"] < means["polynomial"] - bars["polynomial"]


def test_lag_zero_and_the_unit_of_the_norms_do_not_matter():
    """No cut lies at lag 0; 1e-20 squared is no number in float32."""
    with jax.enable_x64(False):
        expected = truncation.probabilities(truncation.optimal([1.0, 1.0, 1.0], 4.0), 3)
        for norms in ([1e5, 1.0, 1.0], [1.0, 1e-25, 1e-25], [0.0, 1e-25, 1e-25]):
            found = truncation.probabilities(truncation.optimal(norms, 4.0), 3)
            np.testing.assert_allclose(found, expected, atol=2e-3)
        traced = jax.jit(lambda norms: truncation.probabilities(truncation.optimal(norms, 4.0), 3))
        assert np.isnan(traced(jnp.array([1.0, jnp.nan, 1.0]))).all()
