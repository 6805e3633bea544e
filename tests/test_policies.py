"""Several estimators on one stream: replicas, groups of parameters, shadows."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtrunc
from jtrunc import optimizers, policies, training
from tests import systems
from tests.compare import assert_close, differ
from tests.reference import to_vector

CASE = systems.CASES["tanh"](7)
LAW = jtrunc.truncation.constant(0.4)


def run(estimator, key=None):
    """One jitted update from the initial state."""
    state = estimator.init(CASE.params, CASE.hidden, key)
    return jax.jit(estimator.update)(CASE.params, state, CASE.inputs)


def test_replicas_are_the_mean_of_their_members(key):
    single = jtrunc.artbp(CASE.system, LAW)
    estimate, state = run(policies.replicas(single, 3), key)
    singles = [run(single, member)[0] for member in jax.random.split(key, 3)]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *(one.grads for one in singles))
    assert_close(estimate.grads, mean)
    assert differ(singles[0].grads, singles[1].grads)
    assert_close(estimate.aux.loss, singles[0].aux.loss)
    assert_close(state.hidden, run(jtrunc.bptt(CASE.system))[1].hidden)


def test_replicas_must_stay_together(key):
    apart = policies.replicas(jtrunc.online_artbp(CASE.system, LAW), 2)
    with pytest.raises(ValueError, match=r"number of steps that is data"):
        run(apart, key)
    with pytest.raises(ValueError, match=r"`key` is None"):
        run(policies.replicas(jtrunc.artbp(CASE.system, LAW), 2))


def test_each_group_has_the_gradient_of_its_estimator():
    members = {"exact": jtrunc.bptt(CASE.system), "cut": jtrunc.truncated_bptt(CASE.system, 2)}
    grads = {name: run(member)[0].grads for name, member in members.items()}
    leaves, treedef = jax.tree.flatten(CASE.params)
    names = [("exact", "cut")[i % 2] for i in range(len(leaves))]
    mixed = jax.tree.leaves(run(policies.by_group(members, jax.tree.unflatten(treedef, names)))[0].grads)
    for i, (name, leaf) in enumerate(zip(names, mixed, strict=True)):
        assert_close(leaf, jax.tree.leaves(grads[name])[i])
    assert differ(grads["exact"].recurrent, grads["cut"].recurrent)
    prefix = policies.by_group(members, lambda params: jtrunc.Params("cut", "exact"))
    assert_close(run(prefix)[0].grads.recurrent, grads["cut"].recurrent)


def test_labels_and_members_fit():
    members = {"exact": jtrunc.bptt(CASE.system), "cut": jtrunc.truncated_bptt(CASE.system, 2)}
    with pytest.raises(
        ValueError, match=r"labels are \['exact', 'other'\], the estimators \['cut', 'exact'\]"
    ):
        run(policies.by_group(members, jtrunc.Params("exact", "other")))
    with pytest.raises(ValueError, match=r"members consume \[4, 7\] steps"):
        windowed = jtrunc.windowed_bptt(CASE.system, 6, 4)
        run(policies.by_group({**members, "cut": windowed}, jtrunc.Params("exact", "cut")))
    with pytest.raises(ValueError, match="at least one"):
        policies.by_group({}, jtrunc.Params("exact", "cut"))
    with pytest.raises(TypeError, match="'bptt' must be a GradientEstimator"):
        policies.with_shadows(members["exact"], {"bptt": jtrunc.bptt})  # pyright: ignore[reportArgumentType]


def test_shadows_are_watched_and_change_nothing():
    exact, cut = jtrunc.bptt(CASE.system), partial(jtrunc.truncated_bptt, CASE.system)
    estimate, state = run(
        policies.with_shadows(exact, {"two": cut(2), "all": cut(7), "rtrl": jtrunc.rtrl(CASE.system)})
    )
    alone, after = run(exact)
    assert_close((estimate.loss, estimate.grads, state.hidden), (alone.loss, alone.grads, after.hidden))
    found = estimate.aux.diagnostics
    for name in ("all", "rtrl"):
        np.testing.assert_allclose([found[f"cosine/{name}"], found[f"ratio/{name}"]], 1, rtol=1e-12)
    exact_grads, short = to_vector(alone.grads), to_vector(run(cut(2))[0].grads)
    cosine = exact_grads @ short / np.linalg.norm(exact_grads) / np.linalg.norm(short)
    np.testing.assert_allclose(found["cosine/two"], cosine, rtol=1e-12)
    assert 0 < cosine < 0.9999


def test_shadows_in_training_are_in_the_metrics():
    system = jtrunc.System(
        lambda theta, h, x: jnp.tanh(theta * h + x), lambda params, h, x: (0.5 * (h - x) ** 2, ())
    )
    estimator = policies.with_shadows(jtrunc.bptt(system), {"cut": jtrunc.truncated_bptt(system, 1)})
    result = training.train(
        system, jtrunc.Params(jnp.float32(0.3)), jnp.float32(0), estimator, optax.sgd(0.01),
        jnp.sin(jnp.arange(40, dtype=jnp.float32)), window=10, num_updates=8,
    )  # fmt: skip
    assert result.history["cosine/cut"].shape == (8,)
    assert np.all(np.abs(result.history["cosine/cut"]) <= 1 + 1e-6)


@pytest.mark.parametrize("by", ["all", "leaf"])
def test_clipped_estimates_have_the_norm_they_may(by):
    exact = run(jtrunc.bptt(CASE.system))[0]
    norms = {"all": [np.linalg.norm(to_vector(exact.grads))]}
    norms["leaf"] = [np.linalg.norm(leaf) for leaf in jax.tree.leaves(exact.grads)]
    limit = 1.01 * float(min(norms["leaf"]))  # of the arrays all but one are too long
    estimate = run(jtrunc.clipped(jtrunc.bptt(CASE.system), limit, by=by))[0]
    scales = [min(1.0, limit / norm) for norm in norms[by]] * (len(norms["leaf"]) if by == "all" else 1)
    for leaf, plain, scale in zip(*map(jax.tree.leaves, (estimate.grads, exact.grads)), scales, strict=True):
        np.testing.assert_allclose(leaf, scale * plain, rtol=1e-12)
    share = sum(scale < 1 for scale in scales) / len(scales)
    np.testing.assert_allclose(estimate.aux.diagnostics["clipped"], share, rtol=1e-6)
    free = run(jtrunc.clipped(jtrunc.bptt(CASE.system), 1e6, by=by))[0]
    assert_close(free.grads, exact.grads)
    assert free.aux.diagnostics["clipped"] == 0


def test_clipping_refuses_what_is_no_limit():
    exact = jtrunc.bptt(CASE.system)
    with pytest.raises(ValueError, match=r"clipped: `max_norm` must be positive and finite, not 0"):
        jtrunc.clipped(exact, 0)
    with pytest.raises(TypeError, match=r"`max_norm` must be a positive number, not '1'"):
        jtrunc.clipped(exact, "1")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"`by` must be 'all' or 'leaf', not 'row'"):
        jtrunc.clipped(exact, 1.0, by="row")  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_clipping_makes_an_unbiased_estimator_biased(key):
    """What the docstring says, by the audit, with and without a limit that draws often pass."""
    made = {
        "free": lambda system: jtrunc.artbp(system, LAW),
        "clipped": lambda system: jtrunc.clipped(jtrunc.artbp(system, LAW), 2.0),
    }
    found = jtrunc.audit(
        *CASE, estimators=made, key=key, num_draws=4000, confidence=1 - 1e-6, timed=False
    ).findings
    assert found["free"].bias.low == 0 and found["free"].arrived.holds(1)
    assert found["clipped"].bias.low > 0.01 and found["clipped"].arrived.high < 1


def test_a_running_norm_against_a_plain_loop():
    norms = [1.0, 2.0, 50.0, 0.5, 0.0, 9.0, float("nan"), 4.0]
    tx = optimizers.clip_by_running_norm(2.0, decay=0.8)
    state = tx.init(jnp.zeros(2))
    seen: list[float] = []
    for norm in norms:
        weights = 0.8 ** np.arange(len(seen))[::-1]
        limit = 2.0 * (weights @ seen) / weights.sum() if seen else np.inf
        update: Any
        update, state = tx.update(jnp.asarray([0.6, 0.8]) * norm, state)
        expected = min(norm, limit)
        np.testing.assert_allclose(np.linalg.norm(update), expected if np.isfinite(norm) else norm, rtol=1e-6)
        if np.isfinite(norm):
            seen.append(expected)
    assert seen[2] == pytest.approx(2 * (0.8 + 2) / 1.8)


@pytest.mark.parametrize(("given", "message"), [({"factor": 0}, "`factor`"), ({"decay": 1.0}, "`decay`")])
def test_a_running_norm_refuses_what_it_cannot_use(given, message):
    with pytest.raises(ValueError, match=message):
        optimizers.clip_by_running_norm(**given)
