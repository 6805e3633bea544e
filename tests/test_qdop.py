"""The quasi-diagonal preconditioner: its updates, its invariance, and its place in optax."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtrunc
from jtrunc.base import Params
from jtrunc.optimizers import feed_metric, metric_of, qdop, quasi_diagonal, scale_by_qdop
from jtrunc.training.step import init_state, train_step
from tests.compare import assert_close, differ
from tests.test_quasi_diagonal import WEIGHTS, dense, unit


def step(tx: Any, gradient: Any, state: Any = None, **extra: Any) -> tuple[Any, Any]:
    """One update by gradients alone, from the initial state unless there is another."""
    return tx.update(gradient, tx.init(gradient) if state is None else state, **extra)


def test_the_first_two_updates_by_hand() -> None:
    tx = qdop(prior=4.0, decay=0.5)
    first, state = step(tx, {"bias": jnp.array([1.0]), "kernel": jnp.array([[2.0]])})
    # J = [[1, 2], [2, 4]]; [[5, 2], [2, 8]]⁻¹ (1, 2) = (4, 8)/36.
    np.testing.assert_allclose(unit(first, 0), [-1 / 9, -2 / 9], rtol=1e-12)
    second, _ = step(tx, {"bias": jnp.array([1.0]), "kernel": jnp.array([[-1.0]])}, state)
    # J = [[1/2, 1], [1, 2]] + [[1, −1], [−1, 1]] = diag(3/2, 3).
    np.testing.assert_allclose(unit(second, 0), [-1 / 5.5, 1 / 7], rtol=1e-12)


def test_decay_follows_the_timestep_where_it_is_passed_and_the_count_elsewhere() -> None:
    tx, gradient = scale_by_qdop(prior=1.0), jnp.float64(1.0)
    state: Any = tx.init(gradient)
    pivots = []
    for timestep in (None, None, 100, None):
        _, state = step(tx, gradient, state, timestep=timestep)
        pivots.append(float(state.factors.pivots))
    expected = [1.0]
    for gamma in (2**-0.5, 0.1, 101**-0.5):
        expected.append((1 - gamma) * expected[-1] + 1)
    np.testing.assert_allclose(pivots, expected, rtol=1e-12)
    assert int(state.count) == 101


def transformed(params: Params, alpha: jax.Array, beta: jax.Array) -> Params:
    """The parameters that give on α x + β the function that `params` give on x."""
    theta = dict(params.recurrent)
    theta["input_kernel"] = theta["input_kernel"] / alpha[:, None]
    theta["bias"] = theta["bias"] - beta @ theta["input_kernel"]
    return params._replace(recurrent=theta)


def losses(tx: Any, alphas: list[Any], betas: list[Any]) -> np.ndarray:
    """Online learning from α x + β, one row for each α and β: 60 updates on windows of 5 steps.

    They come after 20 updates that only gather statistics, for without a prior the first steps are large.
    """
    net = jtrunc.cells.model(jtrunc.cells.leaky(3, 4, 0.7), 2, lambda y, target: jnp.sum((y - target) ** 2))
    x = jnp.asarray(np.random.default_rng(7).normal(size=(80, 5, 3)))
    target = jnp.tanh(x[..., :2] - x[..., 1:]) + 0.1
    estimator, hidden = jtrunc.bptt(net.system), net.initial_hidden(dtype=jnp.float64)

    def online(carry: Any, window: Any) -> Any:
        params, state, opt_state, count = carry
        estimate, state = estimator.update(params, state, window)
        updates, opt_state = tx.update(estimate.grads, opt_state, params)
        updates = jax.tree.map(lambda leaf: jnp.where(count < 20, 0, leaf), updates)
        return (optax.apply_updates(params, updates), state, opt_state, count + 1), estimate.loss

    def run(alpha: jax.Array, beta: jax.Array) -> jax.Array:
        params = transformed(net.init(jax.random.key(3), jnp.float64), alpha, beta)
        inputs = x * alpha[None, None] + beta[None, None], target
        return jax.lax.scan(online, (params, estimator.init(params, hidden), tx.init(params), 0), inputs)[1]

    return np.asarray(jax.jit(jax.vmap(run))(jnp.array(alphas), jnp.array(betas)))


@pytest.mark.slow
def test_the_function_learned_does_not_depend_on_scale_and_offset_of_the_inputs() -> None:
    ones, scale, zeros, offset = [1.0, 1.0, 1.0], [3.0, -0.2, 1.0], [0.0, 0.0, 0.0], [1.0, 2.0, -1.5]
    plain, both = losses(qdop(0.0, decay=0.0), [ones, scale], [zeros, offset])
    assert plain[-20:].mean() < 0.2 * plain[:20].mean()  # it learns
    np.testing.assert_allclose(both, plain, rtol=1e-10)
    # A diagonal matrix knows the scale and not the offset; a prior in the old coordinates knows neither.
    diagonal = qdop(0.0, decay=0.0, bias_of=lambda path: None)
    plain, scaled, shifted = losses(diagonal, [ones, scale, ones], [zeros, zeros, offset])
    np.testing.assert_allclose(scaled, plain, rtol=1e-10)
    assert differ(shifted, plain, by=0.05)
    plain, scaled = losses(qdop(10.0, decay=0.0), [ones, scale], [zeros, zeros])
    assert differ(scaled, plain, by=0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_types_and_a_chain_under_jit(dtype: str) -> None:
    generator = np.random.default_rng(8)
    params, gradient = dense(generator, dtype=dtype), dense(generator, dtype=dtype)
    tx = optax.chain(optax.clip_by_global_norm(1.0), qdop(prior=2.0))
    state = tx.init(params)
    jitted = jax.jit(lambda gradient, state: tx.update(gradient, state, timestep=jnp.int32(4)))
    updates, new = jitted(gradient, state)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, new)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    wide = {leaf.dtype for leaf in jax.tree.leaves(metric_of(new).scales)}
    assert wide == {jnp.promote_types(dtype, jnp.float32)}
    clipped, _ = optax.clip_by_global_norm(1.0).update(gradient, optax.EmptyState())
    plain = qdop(prior=2.0)
    expected, _ = step(plain, clipped)
    np.testing.assert_allclose(
        np.asarray(updates["kernel"], float),
        np.asarray(expected["kernel"], float),
        rtol=2e-2 if dtype == "bfloat16" else 1e-5,
    )


def test_a_unit_of_mixed_dtypes_keeps_its_state_types() -> None:
    params = {"bias": jnp.ones(2, jnp.float64), "kernel": jnp.ones((3, 2), jnp.bfloat16)}
    tx = qdop()
    updates, state = step(tx, params)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, tx.init(params))
    assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)


def test_vmap_over_seeds_priors_and_decays() -> None:
    generator = np.random.default_rng(9)
    gradients = [dense(generator) for _ in range(3)]
    stacked: Any = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    priors, decays = jnp.array([0.5, 1.0, 7.0]), jnp.array([0.0, 0.5, 0.9])

    def two_updates(gradient: Any, prior: Any, decay: Any) -> Any:
        tx = qdop(prior, decay=decay)
        _, state = step(tx, gradient)
        updates, state = step(tx, jax.tree.map(jnp.sin, gradient), state)
        return updates, metric_of(state).scales

    together = jax.vmap(two_updates)(stacked, priors, decays)
    alone = [two_updates(*each) for each in zip(gradients, [0.5, 1.0, 7.0], [0.0, 0.5, 0.9], strict=True)]
    assert_close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone), rtol=1e-12)


def test_the_metric_is_found_in_nested_states() -> None:
    generator = np.random.default_rng(10)
    params = Params(dense(generator), dense(generator))
    gradient = Params(dense(generator), dense(generator))
    reference = qdop(Params(3.0, 5.0), decay=0.1)
    expected, state = step(reference, gradient)
    metric = metric_of(state)
    np.testing.assert_allclose(metric.scales.readout["bias"], 1 / (5 + gradient.readout["bias"] ** 2))

    injected = optax.inject_hyperparams(qdop)(prior=9.0, decay=0.1)
    start: Any = injected.init(params)
    start.hyperparams["prior"] = jnp.float64(3.0)  # the prior is data there, and may change
    updates, state = step(injected, gradient, start)
    assert_close(metric_of(state).scales.recurrent, metric.scales.recurrent, rtol=1e-12)
    assert_close(updates.recurrent, expected.recurrent, rtol=1e-12)

    masked = optax.masked(qdop(3.0, decay=0.1), Params(True, False))
    updates, state = step(masked, gradient)
    assert_close(metric_of(state).scales.recurrent, metric.scales.recurrent, rtol=1e-12)
    assert_close(updates.readout, gradient.readout)

    parts: Any = {"kalman": qdop(3.0, decay=0.1), "adam": optax.adam(0.1)}
    labels: Any = Params("kalman", "adam")
    partitioned = optax.partition(parts, labels)
    _, state = step(partitioned, gradient, params=gradient)
    assert_close(metric_of(state).scales.recurrent, metric.scales.recurrent, rtol=1e-12)
    with pytest.raises(ValueError, match="contains 0 states of qdop"):
        metric_of(optax.adam(0.1).init(params))
    with pytest.raises(ValueError, match="contains 2 states of qdop"):
        metric_of(optax.chain(qdop(), qdop()).init(params))


def test_dead_inputs_are_finite_and_stay_where_they_are() -> None:
    generator = np.random.default_rng(11)
    for prior in (0.0, 2.0):
        tx = qdop(prior)
        state = tx.init(dense(generator))
        for _ in range(3):
            gradient = dense(generator)
            gradient["kernel"] = gradient["kernel"].at[1].set(0.0)
            gradient["bias"] = gradient["bias"].at[0].set(0.0)
            updates, state = step(tx, gradient, state)
            kernel, bias = np.asarray(updates["kernel"]), np.asarray(updates["bias"])
            assert np.isfinite(kernel).all() and np.isfinite(bias).all()
            assert kernel[1, 0] == 0 and bias[0] == 0
        assert kernel[2, 0] != 0 and kernel[0, 1] != 0  # a weight moves though its bias has no gradient
    zero = jax.tree.map(jnp.zeros_like, gradient)
    updates, _ = step(tx, zero)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("leaf", ["bias", "kernel", "alone"])
def test_what_is_not_finite_or_overflows_shows(bad: float, leaf: str) -> None:
    gradient = dense(np.random.default_rng(12), dtype=np.float32) | {"alone": jnp.ones(2, jnp.float32)}
    gradient[leaf] = gradient[leaf].at[..., 0].set(bad)
    tx = qdop(1.0)
    updates, state = step(tx, gradient)
    assert np.isnan(np.asarray(updates[leaf])[..., 0]).all()
    assert np.isfinite(np.asarray(updates[leaf])[..., 1]).all()  # the other unit is not touched
    again, _ = step(tx, jax.tree.map(jnp.ones_like, gradient), state)
    assert np.isnan(np.asarray(again[leaf])[..., 0]).all()  # J does not forget it


def test_the_train_step_passes_the_timestep() -> None:
    net = jtrunc.cells.model(jtrunc.cells.tanh(2, 3), 2, jtrunc.cells.softmax_cross_entropy)
    tx = qdop(prior=3.0, decay=lambda t: jnp.where(t == 4, 0.0, jnp.nan))
    estimator = jtrunc.bptt(net.system)
    state = init_state(estimator, tx, net.init, net.initial_hidden(), jax.random.key(0))
    state, metrics = jax.jit(train_step, static_argnums=(0, 1))(
        estimator, tx, state, (jnp.ones((4, 2), jnp.float32), jnp.zeros(4, jnp.int32))
    )
    assert int(metrics.non_finite) == 0
    assert int(optax.tree.get(state.opt_state, "count")) == 4


class WithMetric(NamedTuple):
    hidden: Any
    metric: Any


def test_feed_metric_replaces_the_metric_and_keeps_its_types() -> None:
    generator = np.random.default_rng(13)
    params = Params(dense(generator, dtype=np.float32), dense(generator, dtype=np.float32))
    tx = optax.chain(optax.clip(1.0), qdop(2.0))
    _, opt_state = step(tx, params)
    state = WithMetric(jnp.zeros(2), quasi_diagonal.identity(params.recurrent))
    fed = feed_metric(state, opt_state)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, fed)
    expected = metric_of(opt_state)
    assert_close(fed.metric.scales, expected.scales.recurrent)
    assert_close(fed.metric.slopes, expected.slopes.recurrent)
    solved = quasi_diagonal.solve(expected, params).recurrent
    assert_close(quasi_diagonal.solve(fed.metric, params.recurrent), solved, rtol=1e-6)
    assert differ(quasi_diagonal.solve(state.metric, params.recurrent), solved)

    streams = jax.vmap(lambda hidden: state._replace(hidden=hidden))(jnp.zeros((4, 2)))
    per_stream = feed_metric(streams, opt_state)
    assert jax.tree.map(jax.typeof, streams) == jax.tree.map(jax.typeof, per_stream)
    assert_close(jax.tree.map(lambda leaf: leaf[3], per_stream.metric), fed.metric, rtol=1e-12)

    without = WithMetric(jnp.zeros(2), None)
    assert feed_metric(without, optax.adam(0.1).init(params)) is without
    assert feed_metric(opt_state, opt_state) is opt_state


def test_feed_metric_with_a_rule_of_the_users() -> None:
    params = Params({"W": jnp.ones((3, 2)), "b": jnp.ones(2)}, {"V": jnp.ones(2)})

    def bias_of(path: Any) -> Any:
        return ("recurrent", "b") if path[-1] == "W" else None

    tx = qdop(1.0, bias_of=bias_of)
    _, opt_state = step(tx, params)
    state = WithMetric((), quasi_diagonal.identity(params.recurrent))
    fed = feed_metric(feed_metric(state, tx.init(params)), opt_state)
    assert fed.metric.layout.biases == (1, None)
    np.testing.assert_allclose(fed.metric.slopes["W"], 0.5)
    assert jax.tree.map(jax.typeof, fed) == jax.tree.map(jax.typeof, feed_metric(state, tx.init(params)))


def test_feed_metric_without_a_fitting_optimiser() -> None:
    generator = np.random.default_rng(14)
    params = Params(dense(generator), dense(generator))
    state = WithMetric((), quasi_diagonal.identity(params.recurrent))
    for opt_state in (
        optax.adam(0.1).init(params),
        qdop().init(params.recurrent),
        qdop().init(params._replace(recurrent=())),
    ):
        with pytest.raises(ValueError, match="contains 0 states of qdop over the same"):
            feed_metric(state, opt_state)
    wide = params._replace(recurrent=dense(generator, weights=WEIGHTS + 1))
    with pytest.raises(ValueError, match=r"shape \(4, 2\) meets a metric of shape \(3, 2\)"):
        feed_metric(state, qdop().init(wide))
    across = qdop(bias_of=lambda path: ("readout", "bias") if path == ("recurrent", "kernel") else None)
    with pytest.raises(ValueError, match="from the readout"):
        feed_metric(state, across.init(params))


NOT_REAL: Any = 1j
PARAMS: Any = {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))}


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: qdop("20"), TypeError, "`prior` must be a real number, not '20'"),
        (lambda: qdop(-1.0), ValueError, r"`prior` must lie in \[0.0, inf\), not -1.0"),
        (lambda: qdop(np.nan), ValueError, "`prior` must lie"),
        (lambda: qdop(decay=1.0), ValueError, r"`decay` must lie in \[0.0, 1.0\), not 1.0"),
        (lambda: qdop(decay=jnp.ones(2)), ValueError, "`decay` must be one number"),
        (lambda: qdop(decay=True), TypeError, "`decay` must be a real number, not True"),
        (lambda: qdop(learning_rate=NOT_REAL), TypeError, "`learning_rate` must be a real number"),
        (lambda: qdop({"bias": 1.0}).init(PARAMS), ValueError, "`prior` has structure"),
        (lambda: qdop(jnp.ones(2)).init(PARAMS), ValueError, r"leaf of shape \(2,\) for .* \(3, 2\)"),
        (lambda: qdop().init({"bias": jnp.ones(3), "kernel": jnp.ones((3, 2))}), ValueError, "last axes"),
        (lambda: qdop().init({"bias": jnp.ones(2), "kernel": jnp.ones(())}), ValueError, "last axes"),
        (lambda: qdop().init({"count": jnp.int32(1)}), TypeError, "int32, which has no gradient"),
        (lambda: qdop().init(PARAMS | {"bias": 1j * jnp.ones(2)}), TypeError, "both real or both complex"),
        (lambda: qdop(bias_of=lambda path: ("b",)).init(PARAMS), ValueError, "not a leaf of `params`"),
        (lambda: qdop(bias_of=lambda path: ("bias",)).init(PARAMS), ValueError, "the leaf itself"),
        (
            lambda: quasi_diagonal.identity(
                [jnp.ones(2)] * 3,
                lambda path: {0: (1,), 1: (2,)}.get(path[0]),  # type: ignore[call-overload]
            ),
            ValueError,
            "has a bias itself",
        ),
        (lambda: qdop().update({"bias": jnp.ones(2)}, qdop().init(PARAMS)), ValueError, "has structure"),
        (
            lambda: qdop().update(PARAMS | {"bias": jnp.ones(3)}, qdop().init(PARAMS)),
            ValueError,
            r"leaf \('bias',\) has shape \(3,\)",
        ),
    ],
)
def test_bad_input(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()
