"""Several estimators on one stream: replicas, groups of parameters, shadows."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtrunc
from jtrunc import policies, training
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
