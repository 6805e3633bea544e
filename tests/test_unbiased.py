"""ARTBP is unbiased: first by enumerating every draw, then by sampling, with estimators that must fail.

The sampled tests compare the mean of N = 2·10⁵ estimates with the exact gradient, component by component:
z = √N (mean − exact) / deviation. The threshold is the two-sided Gaussian quantile that keeps the
false-alarm rate of a whole test (all its components together) at 1e-6. A bias b is then detected with
probability 1 − 1e-6 if √N |b| / deviation exceeds the threshold by 4.75. `power` computes that number
exactly, from an enumeration of the wrong estimator, and each wrong estimator is required to exceed it before
it is sampled: a test that rejects it does not do so by luck.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtrunc
from jtrunc import truncation
from tests import reference, systems
from tests.compare import add, assert_close, differ
from tests.reference import to_vector
from tests.systems import Case

DRAWS = 200_000
FALSE_ALARM = 1e-6
POWER_MARGIN = NormalDist().inv_cdf(1 - 1e-6)
STEPS = 5


def state_law(elapsed, hidden):
    """c looks at the time since the last cut and at the hidden state."""
    vector = jnp.ravel(jax.tree.leaves(hidden)[0])
    return 0.8 * jax.nn.sigmoid(2 * vector[0].real) / jnp.sqrt(jnp.asarray(elapsed, jnp.float64))


LAWS: dict[str, tuple[Any, reference.Law]] = {
    "constant": (truncation.constant(0.3), reference.constant(0.3)),
    "polynomial": (truncation.polynomial(2.5, 4.0), reference.polynomial(2.5, 4.0)),
    "state": (truncation.from_probability(state_law), lambda e, s: float(state_law(float(e), s))),
}


@cache
def scalar_run() -> tuple[Case, reference.Linearised]:
    case = systems.scalar(STEPS)
    return case, reference.linearise(*case)


# Enumeration, offline.


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(systems.CASES))
@pytest.mark.parametrize("law", LAWS)
def test_the_expectation_over_all_given_cuts_is_exact(name, law, key):
    case = systems.CASES[name](6)
    run = reference.linearise(*case)
    patterns = list(reference.cut_patterns(LAWS[law][1], run))

    def grads(cuts, probabilities):
        estimator = jtrunc.artbp(case.system, truncation.given(cuts, probabilities))
        return estimator.update(case.params, estimator.init(case.params, case.hidden, key), case.inputs)[
            0
        ].grads

    cuts = jnp.asarray([[*pattern.cuts, 0] for pattern in patterns])  # the last step's edge leads nowhere
    probabilities = jnp.asarray([[*pattern.probabilities, 0.0] for pattern in patterns])
    drawn = jax.jit(jax.vmap(grads))(cuts, probabilities)
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], drawn) for i in range(len(patterns))]
    assert len(each) == 32
    for pattern, estimate in zip(patterns, each, strict=True):
        assert_close(estimate, reference.artbp(run, pattern.cuts, pattern.probabilities))
    mean = reference.expectation((p.probability, g) for p, g in zip(patterns, each, strict=True))
    assert_close(mean, reference.bptt(run), rtol=1e-12)
    assert differ(add(*each), jax.tree.map(lambda g: 32 * g, reference.bptt(run)))


# Enumeration of what the laws draw by themselves: many keys, every estimate matched with its pattern.


def vectors(tree: Any, count: int) -> np.ndarray:
    """(count, components) of a tree whose leaves have a leading axis of draws."""
    return np.concatenate([np.reshape(leaf, (count, -1)) for leaf in jax.tree.leaves(tree)], axis=1)


@cache
def offline_draws(law: str) -> np.ndarray:
    """(DRAWS, 3): gradients of `artbp` on the scalar system, one a key."""
    case, _ = scalar_run()
    estimator = jtrunc.artbp(case.system, LAWS[law][0])

    def grads(key):
        return estimator.update(case.params, estimator.init(case.params, case.hidden, key), case.inputs)[
            0
        ].grads

    drawn = jax.jit(jax.vmap(grads))(jax.random.split(jax.random.key(1), DRAWS))
    return vectors(drawn, DRAWS)


@cache
def patterns_of(law: str) -> list[reference.Pattern]:
    return list(reference.cut_patterns(LAWS[law][1], scalar_run()[1]))


def table(law: str, estimate: Callable[..., Any]) -> np.ndarray:
    """(patterns, 3): what an estimator answers to each pattern."""
    run = scalar_run()[1]
    return np.stack([to_vector(estimate(run, p.cuts, p.probabilities)) for p in patterns_of(law)])


def chances(law: str) -> np.ndarray:
    return np.array([pattern.probability for pattern in patterns_of(law)])


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_a_law_draws_each_pattern_as_often_as_it_says(law):
    """Every draw equals the reference at one of the 16 patterns, and each is as frequent as eq. 10 says.

    Pearson's χ² with 15 degrees of freedom: P(χ² > 57.6) = 6e-7. One cut point redrawn at each step, a law
    shifted by one step or a δt that is not reset change a frequency by some percent, and χ² by hundreds.
    """
    drawn, answers, expected = offline_draws(law), table(law, reference.artbp), chances(law)
    nearest = np.argmin(np.abs(drawn[:, None] - answers[None]).max(axis=2), axis=1)
    np.testing.assert_allclose(drawn, answers[nearest], rtol=1e-9, atol=1e-12)
    counts = np.bincount(nearest, minlength=len(answers))
    assert (counts > 0).all()
    assert np.sum((counts - DRAWS * expected) ** 2 / (DRAWS * expected)) < 57.6
    shifted = chances_of_a_law_that_counts_from_zero(law)
    if shifted is not None:
        assert np.sum((counts - DRAWS * shifted) ** 2 / (DRAWS * shifted)) > 57.6


def chances_of_a_law_that_counts_from_zero(law: str) -> np.ndarray | None:
    """The skewed law that the frequencies must reject: δt = 0 on the first step after a cut."""
    if law == "constant":
        return None
    wrong = reference.polynomial(2.5, 4.0) if law == "polynomial" else LAWS[law][1]
    skewed = lambda e, s: wrong(e - 1 if law == "polynomial" else e + 1, s)  # noqa: E731
    return np.array([pattern.probability for pattern in reference.cut_patterns(skewed, scalar_run()[1])])


@pytest.mark.parametrize("law", LAWS)
def test_the_expectation_over_all_patterns_that_a_law_draws_is_exact(law):
    """Σ P(pattern) · (what jtrunc answered when it drew the pattern) to 1e-12: no sampling error left."""
    drawn, answers = offline_draws(law), table(law, reference.artbp)
    nearest = np.argmin(np.abs(drawn[:, None] - answers[None]).max(axis=2), axis=1)
    firsts = np.array([np.flatnonzero(nearest == pattern)[0] for pattern in range(len(answers))])
    mean = chances(law) @ drawn[firsts]
    np.testing.assert_allclose(mean, to_vector(reference.bptt(scalar_run()[1])), rtol=1e-12)


# Sampling.


def threshold(components: int) -> float:
    return NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * components))


def largest_z(samples: np.ndarray, exact: np.ndarray) -> float:
    """max |z| over the components; a component without spread is exact or infinitely far off."""
    error, deviation = np.abs(samples.mean(axis=0) - exact), samples.std(axis=0, ddof=1)
    rounding = 1e-12 * np.abs(exact).max()
    return float(np.max(error / np.maximum(deviation / np.sqrt(len(samples)), rounding)))


def power(values: np.ndarray, probabilities: np.ndarray, exact: np.ndarray) -> float:
    """max √N |bias| / deviation of an estimator with these values, exactly."""
    mean = probabilities @ values
    deviation = np.sqrt(probabilities @ (values - mean) ** 2)
    return float(np.max(np.sqrt(DRAWS) * np.abs(mean - exact) / np.maximum(deviation, 1e-12)))


def sampled(values: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """DRAWS rows of a table, drawn with NumPy."""
    generator = np.random.default_rng(2)
    return values[generator.choice(len(values), size=DRAWS, p=probabilities / probabilities.sum())]


@pytest.mark.parametrize("law", LAWS)
def test_sampled_artbp_passes(law):
    exact = np.asarray(to_vector(reference.bptt(scalar_run()[1])))
    samples = offline_draws(law)
    assert np.isfinite(samples).all()
    assert largest_z(samples, exact) < threshold(exact.size)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("mutant", [reference.artbp_factor_dropped, reference.artbp_factor_on_local_term])
def test_sampled_mutants_fail(law, mutant):
    exact = np.asarray(to_vector(reference.bptt(scalar_run()[1])))
    values = table(law, mutant)
    assert power(values, chances(law), exact) > threshold(exact.size) + POWER_MARGIN
    assert largest_z(sampled(values, chances(law)), exact) > threshold(exact.size)


def test_sampled_windows_without_the_factor_fail_through_the_library(key):
    """The same mutant made with jtrunc: the cuts of a law with c = 0.3, told that c = 0."""
    case, run = scalar_run()
    exact = np.asarray(to_vector(reference.bptt(run)))
    values = table("constant", reference.artbp_factor_dropped)
    assert power(values, chances("constant"), exact) > threshold(exact.size) + POWER_MARGIN

    def grads(cuts):
        law = truncation.given(cuts, jnp.zeros(STEPS))
        estimator = jtrunc.artbp(case.system, law)
        return estimator.update(case.params, estimator.init(case.params, case.hidden, key), case.inputs)[
            0
        ].grads

    cuts = jax.random.bernoulli(key, 0.3, (DRAWS, STEPS)).astype(jnp.int32)
    assert largest_z(vectors(jax.jit(jax.vmap(grads))(cuts), DRAWS), exact) > threshold(exact.size)


@pytest.mark.slow
def test_truncated_bptt_fails(key):
    """Windows of 2 whose phase is drawn afresh for each estimate: biased at any phase, and on average."""
    case, run = scalar_run()
    exact = np.asarray(to_vector(reference.bptt(run)))
    values = np.stack([to_vector(reference.truncated_bptt(run, 2, phase)) for phase in (0, 1)])
    assert power(values, np.array([0.5, 0.5]), exact) > threshold(exact.size) + POWER_MARGIN
    estimator = jtrunc.truncated_bptt(case.system, 2)
    start = estimator.init(case.params, case.hidden)
    _, later = estimator.update(case.params, start, case.window(0, 1))
    phases = [start, later._replace(hidden=start.hidden)]
    drawn = [estimator.update(case.params, state, case.inputs)[0].grads for state in phases]
    np.testing.assert_allclose(np.stack([to_vector(g) for g in drawn]), values, rtol=1e-10)
    coins = np.asarray(jax.random.bernoulli(key, 0.5, (DRAWS,)), int)
    assert largest_z(np.stack([to_vector(g) for g in drawn])[coins], exact) > threshold(exact.size)


# The online form. A stream of STEPS scored steps, then silence: the look-ahead never runs out, and windows
# that reach into the silence add nothing, so that the sum over all windows is unbiased without a boundary.


def silent_stream() -> Case:
    case = systems.scalar(2 * STEPS)
    scored = (jnp.arange(2 * STEPS) < STEPS).astype(jnp.float64)

    def loss(params, hidden, inputs):
        value, aux = case.system.loss(params, hidden, inputs[0])
        return inputs[1] * value, aux

    system = jtrunc.System(lambda theta, h, inputs: case.system.transition(theta, h, inputs[0]), loss)
    return case._replace(system=system, inputs=(case.inputs, scored))


def window_at(inputs: Any, position: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, position, STEPS), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_the_online_form_over_all_window_sequences_is_exact(law, key):
    """Every sequence of windows of the stream, each window computed by `online_artbp` with given cuts."""
    case, law = silent_stream(), LAWS[law][1]
    run = reference.linearise(*case)
    scored = reference.linearise(case.system, case.params, case.hidden, case.window(0, STEPS))

    states = [*run.states, *run.states[-1:] * STEPS]
    chosen = jnp.asarray(
        [[law(k, states[start + k]) for k in range(1, STEPS + 1)] for start in range(STEPS)], jnp.float64
    )

    @jax.jit
    def window(hidden, start, length):
        cuts = (jnp.arange(STEPS) == length - 1).astype(jnp.int32)
        estimator = jtrunc.online_artbp(case.system, truncation.given(cuts, chosen[start]))
        state = estimator.init(case.params, hidden, key)
        return estimator.update(case.params, state, window_at(case.inputs, start))

    estimates = {}
    for start in range(STEPS):
        for length in range(1, STEPS - start + 1):
            estimate, state = window(run.states[start], start, length)
            assert estimate.num_steps == length
            assert_close(state.hidden, run.states[start + length])
            assert_close(estimate.grads, reference.online_artbp(scored, start, length, law))
            np.testing.assert_allclose(
                estimate.loss, scored.losses[start : start + length].sum(), rtol=1e-12, atol=1e-15
            )
            estimates[start, length] = estimate.grads

    def total(windows):
        starts = np.cumsum([0, *windows[:-1]])
        return add(*(estimates[int(s), w] for s, w in zip(starts, windows, strict=True)))

    sequences = list(reference.window_sequences(STEPS))
    pairs = ((reference.sequence_probability(law, scored, w), total(w)) for w in sequences)
    assert_close(reference.expectation(pairs), reference.bptt(scored), rtol=1e-12)
    uniform = ((1 / len(sequences), total(w)) for w in sequences)
    assert differ(reference.expectation(uniform), reference.bptt(scored))


def pass_over_stream(law: Any, key: jax.Array) -> tuple[Any, jax.Array]:
    """The summed gradient of one online pass, and the lengths of its windows."""
    case = silent_stream()
    estimator = jtrunc.online_artbp(case.system, law)
    state = estimator.init(case.params, case.hidden, key)

    def step(carry, _):
        state, position, total = carry
        estimate, state = estimator.update(case.params, state, window_at(case.inputs, position))
        live = position < STEPS
        total = jax.tree.map(lambda a, b: a + jnp.where(live, b, 0), total, estimate.grads)
        return (state, position + estimate.num_steps, total), jnp.where(live, estimate.num_steps, 0)

    zeros = jax.tree.map(jnp.zeros_like, case.params)
    (_, _, total), lengths = jax.lax.scan(step, (state, jnp.int32(0), zeros), None, length=STEPS)
    return total, lengths


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_sampled_online_artbp_passes(law):
    """2·10⁵ online passes, in batches; every window length occurs, and the mean is the exact gradient."""
    _, run = scalar_run()
    exact = np.asarray(to_vector(reference.bptt(run)))
    keys = jax.random.split(jax.random.key(4), DRAWS)
    mapped = jax.jit(partial(jax.lax.map, partial(pass_over_stream, LAWS[law][0]), batch_size=20_000))
    totals, lengths = mapped(keys)
    assert set(np.unique(lengths)) >= set(range(STEPS + 1))
    assert largest_z(vectors(totals, DRAWS), exact) < threshold(exact.size)


@pytest.mark.slow
def test_one_window_a_key_is_what_the_batch_computes():
    """lax.map, one key after the other, equals vmap of the dynamic windows."""
    keys = jax.random.split(jax.random.key(5), 50)
    single = partial(pass_over_stream, LAWS["polynomial"][0])
    one_by_one, lengths = jax.jit(partial(jax.lax.map, single))(keys)
    together, lengths_together = jax.jit(jax.vmap(single))(keys)
    np.testing.assert_array_equal(lengths, lengths_together)
    assert len(np.unique(lengths)) > 3
    assert_close(together, one_by_one, rtol=1e-12)


# The position of the last cut survives from update to update.


EVERY_FOURTH = {
    "every": truncation.every(4),
    "almost surely": truncation.from_probability(lambda elapsed: jnp.where(elapsed >= 4, 1 - 2.0**-40, 0.0)),
}


@pytest.mark.parametrize("law", EVERY_FOURTH)
@pytest.mark.parametrize("chunk", [2, 3])
def test_the_clock_of_the_law_runs_on_across_updates(chunk, law, key):
    """A law that cuts after δt = 4 steps, fed in pieces of 3 or 2: it still cuts every 4 steps of the stream.

    In pieces of 2 every cut falls on a boundary between updates, and must not be made up for one step later.
    """
    case, law = systems.tanh(12), EVERY_FOURTH[law]
    run = reference.linearise(*case)
    estimator = jtrunc.artbp(case.system, law)
    state, cut_inside = estimator.init(case.params, case.hidden, key), False
    update = jax.jit(estimator.update)
    for start in range(0, 12, chunk):
        estimate, state = update(case.params, state, case.window(start, start + chunk))
        part = reference.piece(run, start, start + chunk)
        assert_close(estimate.grads, reference.truncated_bptt(part, 4, phase=start))
        cut_inside |= differ(estimate.grads, reference.bptt(part))
    assert cut_inside == (chunk == 3)
