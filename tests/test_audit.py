"""Audits: known truths of the estimators come out, and the statistics are right by themselves."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtrunc
from jtrunc import truncation
from jtrunc.diagnostics import errors
from jtrunc.diagnostics.audit import Audit, audit
from jtrunc.diagnostics.plan import Claim
from tests import reference, systems
from tests.reference import to_vector

WARM_UP, SCORED = 20, 40
LENGTHS = (2, 5, 10, 20)
SURE = 1 - 1e-6
"""Confidence of the intervals: a right estimator is suspected once in a million audits."""


def halved(system: jtrunc.System) -> jtrunc.GradientEstimator:
    """NoBackTrack, skewed: one per cent is missing."""
    estimator = jtrunc.nobacktrack(system, rank=4)

    def update(params: Any, state: Any, inputs: Any) -> Any:
        estimate, state = estimator.update(params, state, inputs)
        return estimate._replace(grads=jax.tree.map(lambda leaf: 0.9 * leaf, estimate.grads)), state

    return jtrunc.GradientEstimator(estimator.init, update)


ESTIMATORS: dict[str, Any] = {
    "bptt": jtrunc.bptt,
    **{f"cut {L}": (partial(jtrunc.truncated_bptt, length=L), L) for L in LENGTHS},
    "windowed": (partial(jtrunc.windowed_bptt, backward_steps=12, loss_steps=5, average=False), 13),
    "online_artbp": (partial(jtrunc.online_artbp, truncation=truncation.polynomial(10, 4)), 90),
    "rtrl": (jtrunc.rtrl, 1),
    "nobacktrack": (jtrunc.nobacktrack, 1),
    "uoro": (jtrunc.uoro, 1),
    "skewed": (halved, 4),
}


@cache
def found() -> Audit:
    case = systems.tanh(WARM_UP + SCORED)
    return audit(
        case.system, case.params, case.hidden, case.inputs, ESTIMATORS,
        key=jax.random.key(0), num_draws=2000, warm_up=WARM_UP, confidence=SURE, timed=False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_exact_gradient_is_that_of_the_scored_losses():
    case = systems.tanh(WARM_UP + SCORED)

    def total(params: Any) -> jax.Array:
        return jtrunc.unroll(case.system, params, case.hidden, case.inputs)[1][0][WARM_UP:].sum()

    np.testing.assert_allclose(to_vector(found().exact), to_vector(jax.grad(total)(case.params)), rtol=1e-12)
    assert found().num_scored == SCORED


@pytest.mark.slow
def test_exact_ones_are_exact():
    for name in ("bptt", "rtrl"):
        finding = found().findings[name]
        assert finding.num_draws == 1 and finding.noise == 0
        assert finding.bias.value < 1e-12 and abs(finding.arrived.value - 1) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["online_artbp", "nobacktrack", "uoro"])
def test_unbiased_ones_are_unbiased_within_their_intervals(name):
    finding = found().findings[name]
    assert finding.claim is Claim.UNBIASED and finding.num_draws == 2000
    assert finding.bias.low == 0 and finding.arrived.holds(1)
    assert finding.noise > 0 and finding.cosine.value < 1


@pytest.mark.slow
def test_a_skewed_one_is_found_out():
    """A tenth of the gradient is missing, and nothing else."""
    finding = found().findings["skewed"]
    assert finding.bias.low > 0 and finding.bias.holds(0.1)
    assert finding.arrived.holds(0.9) and not finding.arrived.holds(1)


@pytest.mark.slow
def test_noise_is_in_the_order_of_the_ranks():
    noise = {name: finding.noise for name, finding in found().findings.items()}
    assert noise["uoro"] > noise["nobacktrack"] > noise["skewed"] / 0.9 > noise["online_artbp"] > 0


def plain_gradients(length: int) -> np.ndarray:
    """Truncated BPTT by the plain loop of the oracle, window by window, over the scored steps."""
    case = systems.tanh(WARM_UP + SCORED)
    total, hidden = 0.0, case.hidden
    for start in range(0, WARM_UP + SCORED, length):
        window = case.window(start, start + length)
        if start >= WARM_UP:  # the cuts fall on the first scored step
            part = reference.linearise(case.system, case.params, hidden, window)
            total = total + to_vector(reference.bptt(part))
        hidden = jtrunc.unroll(case.system, case.params, hidden, window)[0]
    return np.asarray(total)


@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS)
def test_truncation_has_the_bias_of_the_plain_loop(length):
    exact = to_vector(found().exact)
    expected = np.linalg.norm(plain_gradients(length) - exact) / np.linalg.norm(exact)
    np.testing.assert_allclose(found().findings[f"cut {length}"].bias.value, expected, rtol=1e-9)
    assert expected > 1e-3


@pytest.mark.slow
def test_windows_that_overlap_score_every_loss_once():
    case, exact = systems.tanh(WARM_UP + SCORED), to_vector(found().exact)

    @jax.grad
    def gradient(params: Any, hidden: Any, start: int) -> jax.Array:
        window = case.window(start, min(start + 13, WARM_UP + SCORED))
        steps = start + jnp.arange(len(window))
        scored = (steps >= max(WARM_UP, start + 8)) & (steps < start + 13)
        return jnp.where(scored, jtrunc.unroll(case.system, params, hidden, window)[1][0], 0).sum()

    total, hidden = 0.0, case.hidden
    for start in range(0, WARM_UP + SCORED - 8, 5):
        total = total + to_vector(gradient(case.params, hidden, start))
        hidden = jtrunc.unroll(case.system, case.params, hidden, case.window(start, start + 5))[0]
    bias = np.linalg.norm(total - exact) / np.linalg.norm(exact)
    np.testing.assert_allclose(found().findings["windowed"].bias.value, bias, rtol=1e-9)


@pytest.mark.slow
def test_truncation_keeps_the_lags_that_it_reaches():
    """hₜ = θ hₜ₋₁ + xₜ, ℓₜ = hₜ, x = 1: a cut every L steps keeps a lag k in L − k of L windows' steps."""
    system = jtrunc.System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h, ()))
    params, inputs = jtrunc.Params(jnp.float64(0.9)), jnp.ones(400)
    estimators: dict[str, Any] = {"cut": (partial(jtrunc.truncated_bptt, length=8), 8), "snap": jtrunc.rtrl}
    result = audit(
        system, params, jnp.float64(10.0), inputs, estimators, key=jax.random.key(1), num_draws=2,
        warm_up=16, lags=(0, 2, 6, 8), lag_draws=1000, confidence=SURE, timed=False,
    )  # fmt: skip
    by_lag = result.findings["cut"].by_lag
    assert by_lag is not None
    for lag, share in ((0, 1.0), (2, 6 / 8), (6, 2 / 8), (8, 0.0)):
        assert by_lag[lag].arrived.holds(share), (lag, by_lag[lag])
    assert not by_lag[6].arrived.holds(0.5)
    exact = result.findings["snap"].by_lag
    assert exact is not None
    assert all(abs(of.arrived.value - 1) < 1e-12 and of.noise < 1e-12 for of in exact.values())


@pytest.mark.slow
def test_streams_and_estimators_that_need_a_structure():
    from jtrunc import cells

    model = cells.model(cells.tanh(3, 4), 2, cells.softmax_cross_entropy)
    params, key = model.init(jax.random.key(0), jnp.float64), jax.random.key(1)
    x = jax.random.normal(key, (30, 2, 3))
    inputs = (x, jnp.zeros((30, 2), jnp.int32))
    estimators: dict[str, Any] = {
        "batch": (jtrunc.bptt, 30),
        "rtrl": (lambda system: jtrunc.per_stream(jtrunc.rtrl(system)), 1),
        "kf-rtrl": (lambda system: jtrunc.per_stream(jtrunc.kf_rtrl(system)), 1),
    }
    hidden = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.initial_hidden((2,)))
    result = audit(
        model.system, params, hidden, inputs, estimators, key=key, num_draws=50, warm_up=5, lags=(1,),
        lag_draws=4, streams=2, confidence=SURE, timed=True,
    )  # fmt: skip
    for name in ("batch", "rtrl"):
        assert result.findings[name].bias.value < 1e-12
        assert result.findings[name].seconds_per_step > 0
    assert result.findings["kf-rtrl"].by_lag is None and result.findings["kf-rtrl"].bias.low == 0
    assert [finding.claim for finding in result.findings.values()] == [
        Claim.EXACT_INSIDE, Claim.EXACT, Claim.UNBIASED,
    ]  # fmt: skip
    groups = result.findings["kf-rtrl"].signal_to_noise
    assert len(groups) == len(jax.tree.leaves(params)) and all(value > 0 for value in groups.values())
    assert all(np.isinf(value) for value in result.findings["rtrl"].signal_to_noise.values())


@pytest.mark.slow
def test_chance_that_is_rare_is_drawn_all_the_same():
    """Two passes seldom differ where a cut has a probability of 0.05 % a step, many do."""
    case = systems.scalar(10)
    rare = partial(jtrunc.artbp, truncation=truncation.constant(5e-4))
    finding = audit(
        *case, estimators={"rare": rare, "exact": jtrunc.rtrl}, key=jax.random.key(0), num_draws=3000,
        confidence=SURE, timed=False,
    ).findings  # fmt: skip
    assert finding["rare"].num_draws == 3000 and finding["exact"].num_draws == 1
    assert finding["rare"].noise > 0 and finding["rare"].bias.low == 0
    assert finding["exact"].bias.value < 1e-12


@pytest.mark.slow
def test_parameters_of_no_size_are_parameters():
    case = systems.scalar(5)
    params = case.params._replace(readout={"scale": case.params.readout, "none": jnp.zeros((0, 2))})
    system = case.system._replace(
        loss=lambda params, h, x: case.system.loss(
            jtrunc.Params(params.recurrent, params.readout["scale"]), h, x
        )
    )
    given: dict[str, Any] = {"estimators": {"uoro": jtrunc.uoro}, "key": jax.random.key(0), "timed": False}
    found = audit(system, params, case.hidden, case.inputs, num_draws=40, **given).findings["uoro"]
    plain = audit(*case, num_draws=40, **given).findings["uoro"]
    np.testing.assert_allclose([found.noise, found.bias.value], [plain.noise, plain.bias.value], rtol=1e-12)
    assert np.isnan(found.signal_to_noise["readout/none"]) and found.noise > 0


def test_a_system_that_learns_its_readout_alone():
    system = jtrunc.System(lambda theta, h, x: 0.5 * h + x, lambda params, h, x: (params.readout * h, ()))
    found = audit(
        system, jtrunc.Params((), jnp.float64(1)), jnp.float64(0), jnp.ones(6),
        {"nobacktrack": (jtrunc.nobacktrack, 2)}, key=jax.random.key(0), num_draws=3, timed=False,
    ).findings["nobacktrack"]  # fmt: skip
    assert found.num_draws == 1 and found.bias.value < 1e-12


def test_statistics_of_errors_against_their_definitions(key):
    draws = np.asarray(jax.random.normal(key, (7, 3)) + 2.0)
    pairs = [draws[i] @ draws[j] for i in range(7) for j in range(7) if i != j]
    np.testing.assert_allclose(errors.relative_bias(draws, 2.0, 0.95).value, np.sqrt(np.mean(pairs)) / 2)
    without = []
    for left_out in range(7):
        kept = np.delete(draws, left_out, axis=0)
        without.append(np.mean([kept[i] @ kept[j] for i in range(6) for j in range(6) if i != j]))
    half = 1.959964 * np.sqrt(6 * np.var(without))
    low, high = errors.relative_bias(draws, 1.0, 0.95)[1:]
    np.testing.assert_allclose(high**2, np.mean(pairs) + half, rtol=1e-6)
    np.testing.assert_allclose(low**2, max(np.mean(pairs) - half, 0), rtol=1e-6)
    noise = np.sqrt(sum(np.var(draws[:, i], ddof=1) for i in range(3)))
    np.testing.assert_allclose(errors.relative_noise(draws, 2.0), noise / 2)


def test_intervals_of_bias_hold_as_often_as_they_say():
    """2,000 audits of 30 draws each: with bias near 95 % of the intervals hold it, without at least as many.

    The binomial standard error is 0.5 %; the bounds are six of them away, and the normal interval of 30 skew
    products is itself a few per cent short.
    """
    generator = np.random.default_rng(5)
    for mean, least in ((0.5, 0.90), (0.0, 0.95)):
        held = 0
        for _ in range(2000):
            draws = generator.normal(size=(30, 6)) + mean
            held += errors.relative_bias(draws, 1.0, 0.95).holds(mean * np.sqrt(6))
        assert held / 2000 > least - 0.03
        assert mean == 0.0 or held / 2000 < 0.99


SYSTEM = jtrunc.System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h, ()))
GOOD = {"params": jtrunc.Params(jnp.float64(0.5)), "hidden": jnp.float64(0), "inputs": jnp.ones(10)}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"num_draws": 1}, ValueError, "`num_draws` must be at least 2"),
        ({"lag_draws": 1}, ValueError, "`lag_draws` must be at least 2"),
        ({"warm_up": 10}, ValueError, "`warm_up` is 10, but `inputs` has 10 steps"),
        ({"warm_up": -1}, ValueError, "`warm_up` must be at least 0"),
        ({"lags": (3,), "warm_up": 2}, ValueError, "`lags` has 3, beyond `warm_up` = 2"),
        ({"confidence": 95}, ValueError, r"`confidence` must lie in \(0, 1\)"),
        ({"estimators": {}}, ValueError, "`estimators` must map"),
        ({"estimators": {"a": jtrunc.bptt(SYSTEM)}}, TypeError, "must be a function system -> estimator"),
        ({"estimators": {"a": (jtrunc.bptt, 0)}}, ValueError, "`window of a` must be at least 1"),
        (
            {"estimators": {"a": (partial(jtrunc.windowed_bptt, backward_steps=4, loss_steps=2), 5)}},
            ValueError,
            "scores none of its first 3 steps; give a `warm_up` of at least as many, not 0",
        ),
        ({"inputs": jnp.zeros(10)}, ValueError, "is zero or not finite"),
        ({"key": jax.random.PRNGKey(0)}, TypeError, "must be a typed key"),
        ({"streams": 0}, ValueError, "`streams` must be at least 1"),
    ],
)
def test_bad_input(changed, error, message):
    given: dict[str, Any] = {**GOOD, "estimators": {"a": jtrunc.bptt}, "key": jax.random.key(0), **changed}
    with pytest.raises(error, match=message):
        audit(SYSTEM, **given)
