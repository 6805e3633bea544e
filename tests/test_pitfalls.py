"""Mistakes found in other implementations, each pinned: reverse mode, random truncation, jax itself."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jtrunc
from jtrunc import cells, truncation
from tests import reference, systems
from tests.compare import add, assert_close, differ
from tests.systems import Case


def update(estimator, case, key=None):
    state = estimator.init(case.params, case.hidden, key)
    return jax.jit(estimator.update)(case.params, state, case.inputs)[0]


def walk(estimator, case, chunk, length, key=None):
    """Estimates of consecutive chunks at fixed parameters; the last one may be short."""
    state, estimates = estimator.init(case.params, case.hidden, key), []
    update = jax.jit(estimator.update)
    for start in range(0, length, chunk):
        estimate, state = update(case.params, state, case.window(start, min(start + chunk, length)))
        estimates.append(estimate)
    return estimates


# Reverse mode.


def test_a_short_last_chunk_weighs_by_its_steps():
    """Losses and gradients are sums: 10 + 7 steps give the loss of 17, not the mean of two means."""
    case = systems.tanh(17)
    losses = jtrunc.unroll(case.system, case.params, case.hidden, case.inputs)[1][0]
    long, short = walk(jtrunc.bptt(case.system), case, 10, 17)
    np.testing.assert_allclose([long.loss, short.loss], [losses[:10].sum(), losses[10:].sum()], rtol=1e-12)
    mean = (long.loss + short.loss) / (long.num_steps + short.num_steps)
    np.testing.assert_allclose(mean, losses.mean(), rtol=1e-12)
    assert differ(0.5 * (long.loss / 10 + short.loss / 7), losses.mean())


@pytest.mark.parametrize("structured", [False, True])
def test_the_ragged_tail_is_counted(structured):
    """T = 17, L = 5: the last two steps are in the loss, in the gradient and in num_steps."""
    case = systems.tanh(17) if not structured else lstm_case(17)
    run = reference.linearise(*case)
    estimate = update(jtrunc.truncated_bptt(case.system, 5), case)
    assert estimate.num_steps == 17
    np.testing.assert_allclose(estimate.loss, run.losses.sum(), rtol=1e-12)
    assert_close(estimate.grads, reference.truncated_bptt(run, 5))
    dropped = reference.linearise(*case._replace(inputs=case.window(0, 15)))
    assert differ(estimate.grads, reference.truncated_bptt(dropped, 5))


def test_every_chunk_is_in_the_gradient():
    case = systems.tanh(15)
    chunks = walk(jtrunc.truncated_bptt(case.system, 5), case, 5, 15)
    whole = update(jtrunc.truncated_bptt(case.system, 5), case).grads
    assert_close(whole, add(*(chunk.grads for chunk in chunks)))
    assert differ(whole, chunks[-1].grads)


def lstm_case(length: int) -> Case:
    model = cells.model(cells.lstm(2, 3), 2, lambda y, target: (jnp.sum((y - target) ** 2), ()))
    generator = np.random.default_rng(3)
    inputs = tuple(jnp.asarray(generator.normal(size=(length, 2))) for _ in range(2))
    params = model.init(jax.random.key(1), jnp.float64)
    return Case(model.system, params, model.initial_hidden((), jnp.float64), inputs)


@pytest.mark.slow
def test_both_members_of_an_lstm_state_are_detached():
    case = lstm_case(8)
    grads = update(jtrunc.truncated_bptt(case.system, 4), case).grads
    assert_close(grads, reference.truncated_bptt(reference.linearise(*case), 4))

    def only_h_detached(params):
        hidden, total = case.hidden, 0.0
        for t, x in enumerate(reference.steps_of(case.inputs)):
            hidden = (hidden[0], jax.lax.stop_gradient(hidden[1])) if t == 4 else hidden
            hidden = case.system.transition(params.recurrent, hidden, x)
            total += case.system.loss(params, hidden, x)[0]
        return total

    assert differ(grads, jax.grad(only_h_detached)(case.params))


def test_an_infinite_cotangent_behind_a_cut_stays_there(key):
    """0 · inf is nan: behind the cuts the cotangent overflows, and yet the estimate is finite."""
    case = systems.exploding(6)
    exact = update(jtrunc.bptt(case.system), case).grads
    assert not np.isfinite(exact.recurrent)
    expected = {1: 6.0, 2: 6.0 + 3 * 1e200}
    for length, value in expected.items():
        truncated = update(jtrunc.truncated_bptt(case.system, length), case).grads
        np.testing.assert_allclose(truncated.recurrent, value, rtol=1e-12)
        offline = update(jtrunc.artbp(case.system, truncation.every(length)), case, key).grads
        np.testing.assert_allclose(offline.recurrent, value, rtol=1e-12)


def test_an_infinite_cotangent_is_cut_by_scan_too():
    case = systems.exploding(6)

    def loss(theta, law):
        def step(hidden, x):
            hidden = case.system.transition(theta, hidden, x)
            return hidden, hidden + x

        return jtrunc.scan(step, case.hidden, case.inputs, truncation=law)[1].sum()

    grad = jax.grad(loss)(case.params.recurrent, truncation.every(2))
    np.testing.assert_allclose(grad, 6.0 + 3 * 1e200, rtol=1e-12)
    assert not np.isfinite(jax.grad(loss)(case.params.recurrent, truncation.never()))


@pytest.mark.parametrize("make", ["tail", "phase", "window", "segment"])
def test_what_lies_beyond_the_last_step_cannot_poison_the_gradient(make, key):
    """hₜ = θ xₜ hₜ₋₁, whose last real step reaches 1e200: another step, run on padding and masked, would
    overflow to inf, and 0 · inf is nan. A window is padded to L, a segment to S, an online window to a chunk.
    """
    system = jtrunc.System(lambda theta, h, x: theta * x * h, lambda params, h, x: (jnp.log(h), ()))
    inputs = jnp.ones(7).at[6].set(1e200)
    case = Case(system, jtrunc.Params(jnp.float64(1.0)), jnp.float64(1.0), inputs)
    expected = {"tail": 1 + 2 + 3 + 4 + 5 + 1 + 2, "phase": 1 + 2 + 3 + 1 + 2 + 3 + 4}
    if make in ("tail", "phase"):
        estimator = jtrunc.truncated_bptt(system, 5)
        state = estimator.init(case.params, case.hidden)
        if make == "phase":
            _, state = estimator.update(case.params, state, jnp.ones(2))
        estimate, _ = jax.jit(estimator.update)(case.params, state, inputs)
        np.testing.assert_allclose(estimate.grads.recurrent, expected[make], rtol=1e-12)
    elif make == "segment":
        estimate = update(jtrunc.bptt(system, checkpoint=4), case)
        np.testing.assert_allclose(estimate.grads.recurrent, 28, rtol=1e-12)
    else:
        longer = case._replace(inputs=jnp.concatenate([inputs, jnp.full(4, 1e200)]))
        law = truncation.given(jnp.zeros(11).at[6].set(1), jnp.zeros(11))
        estimate = update(jtrunc.online_artbp(system, law), longer, key)
        assert estimate.num_steps == 7
        np.testing.assert_allclose(estimate.grads.recurrent, 28, rtol=1e-12)
        np.testing.assert_allclose(estimate.loss, np.log(1e200), rtol=1e-12)


def test_a_nan_loss_is_not_hidden(key):
    """The `where` of a cut stops what comes from behind it, and nothing else: a bad step still shows."""
    case = systems.tanh(6)
    case = case._replace(inputs=case.inputs.at[4].set(jnp.nan))
    for estimator in (jtrunc.bptt(case.system), jtrunc.truncated_bptt(case.system, 3)):
        estimate = update(estimator, case, key)
        assert not np.isfinite(estimate.loss)
        assert not np.isfinite(reference.to_vector(estimate.grads)).all()


@pytest.mark.slow
def test_integer_and_key_leaves_are_carried_along(key):
    """float0 cotangents: skipped, in every estimator, and the leaves come out as the system made them."""
    case = systems.nested(6)
    makers = [
        jtrunc.bptt(case.system),
        jtrunc.bptt(case.system, checkpoint=2),
        jtrunc.truncated_bptt(case.system, 4),
        jtrunc.artbp(case.system, truncation.constant(0.5)),
    ]
    expected, _ = jtrunc.unroll(case.system, case.params, case.hidden, case.inputs)
    for estimator in makers:
        _, state = jax.jit(estimator.update)(
            case.params, estimator.init(case.params, case.hidden, key), case.inputs
        )
        assert int(state.hidden.clock) == 6 and state.hidden.clock.dtype == jnp.int32
        assert state.hidden.key == expected.key != case.hidden.key


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 3, 6, 12])
def test_the_effective_learning_rate_does_not_change_with_the_length(length):
    """A system without memory: every truncation length gives the same gradient, neither summed nor averaged
    anew. BPTT(K₁, K₂) divides by K₂ always (eq. 15), so it gives the same mean for every K₂."""
    case = systems.tanh(12)
    remember = case.system.transition
    forgetful = case.system._replace(transition=lambda theta, h, x: remember(theta, jnp.zeros_like(h), x))
    case = case._replace(system=forgetful, inputs=jnp.broadcast_to(case.inputs[0], (12, 2)))
    whole = update(jtrunc.bptt(case.system), case).grads
    truncated = walk(jtrunc.truncated_bptt(case.system, length), case, length, 12)
    assert_close(add(*(estimate.grads for estimate in truncated)), whole)
    windowed = update(jtrunc.windowed_bptt(case.system, 12, length), case).grads
    assert_close(windowed, jax.tree.map(lambda g: g / 12, whole))


# Random truncation.


def test_a_cut_is_drawn_once_per_boundary(key):
    """c = 0.2 on 10⁴ boundaries: a fifth of them is cut, ± 6 deviations. Drawing anew at every step, and
    cutting all that lies behind, would leave about 1/0.2 steps of gradient for all boundaries but a few."""
    steps = 10_001
    system = jtrunc.System(lambda theta, h, x: h + theta, lambda params, h, x: (x * h, ()))
    case = Case(system, jtrunc.Params(jnp.float64(0.0)), jnp.float64(0.0), jnp.zeros(steps).at[::2].set(1.0))

    def edge_is_cut(cuts_key):
        estimator = jtrunc.artbp(system, truncation.constant(0.2))
        state = estimator.init(case.params, case.hidden, cuts_key)
        inputs = jnp.array([0.0, 1.0])
        grads = estimator.update(case.params, state, inputs)[0].grads
        return grads.recurrent

    values = np.asarray(jax.jit(jax.vmap(edge_is_cut))(jax.random.split(key, steps)))
    np.testing.assert_allclose(np.unique(values), [1.0, 1.0 + 1 / 0.8], rtol=1e-12)
    cut = np.mean(values == 1.0)
    assert abs(cut - 0.2) < 6 * np.sqrt(0.2 * 0.8 / steps)


@pytest.mark.parametrize("law", [truncation.constant(0.6), truncation.polynomial(2.0, 5.0)])
def test_the_factor_is_not_on_the_local_term(law, keys):
    """Readout gradients are plain sums (errata 4), whatever is drawn; recurrent ones are not."""
    case = systems.tanh(8)
    exact = update(jtrunc.bptt(case.system), case).grads
    estimator = jtrunc.artbp(case.system, law)
    drawn = [update(estimator, case, key).grads for key in keys[:6]]
    for grads in drawn:
        assert_close(grads.readout, exact.readout, rtol=1e-12)
    assert any(differ(grads.recurrent, exact.recurrent) for grads in drawn)


@pytest.mark.slow
def test_running_into_the_look_ahead_is_counted(keys):
    """A window that only the look-ahead ended is reported; one that a cut ended is not."""
    case = systems.tanh(4)
    for law, hit in ((truncation.never(), 1), (truncation.every(2), 0)):
        estimate = update(jtrunc.online_artbp(case.system, law), case, keys[0])
        assert estimate.aux.diagnostics["look_ahead_hits"] == hit
        assert estimate.num_steps == (4 if hit else 2)
    estimator = jtrunc.online_artbp(case.system, truncation.constant(0.2))

    def one(key):
        estimate, _ = estimator.update(
            case.params, estimator.init(case.params, case.hidden, key), case.inputs
        )
        return estimate.num_steps, estimate.aux.diagnostics["look_ahead_hits"]

    lengths, hits = jax.jit(jax.vmap(one))(jax.random.split(keys[1], 20_000))
    assert not np.any(np.asarray(hits)[np.asarray(lengths) < 4])
    for measured, expected in ((np.mean(lengths == 1), 0.2), (np.mean(hits), 0.8**4)):
        assert abs(measured - expected) < 6 * np.sqrt(expected * (1 - expected) / 20_000)


def test_a_window_is_not_divided_by_its_random_length(keys):
    """The readout's gradient of a window of L steps is the sum of its L immediate terms."""
    case = systems.tanh(16)
    estimator = jtrunc.online_artbp(case.system, truncation.constant(0.2))
    lengths = set()
    for key in keys[:6]:
        estimate = update(estimator, case, key)
        length = int(estimate.num_steps)
        window = reference.linearise(*case._replace(inputs=case.window(0, length)))
        assert_close(estimate.grads.readout, reference.bptt(window).readout)
        np.testing.assert_allclose(estimate.loss, window.losses.sum(), rtol=1e-12)
        lengths.add(length)
    assert len(lengths) > 2


def test_parameters_that_do_not_enter_the_window_get_zeros_not_nans(key):
    case = systems.nested(3)
    estimate = update(jtrunc.online_artbp(case.system, truncation.constant(0.9)), case, key)
    assert estimate.grads.readout.x.shape == (0,)
    assert np.isfinite(reference.to_vector(estimate.grads)).all()


# jax.


def test_no_private_modules_and_flax_only_in_the_adapters():
    package = Path(jtrunc.__file__).parent
    sources = {path.relative_to(package): path.read_text() for path in package.rglob("*.py")}
    assert len(sources) > 10
    for path, text in sources.items():
        assert not re.search(r"jax\._src|jax\.interpreters|make_jaxpr|\.jaxpr\b", text), path
        if path.parts[0] != "adapters":
            assert not re.search(r"^\s*(import|from) flax", text, re.MULTILINE), path


def shard_mean(case: Case, estimator, mesh, cast: bool, hidden, inputs):
    """The pmean of one gradient a device, the parameters cast to varying or not."""

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P())
    def mean_gradient(params, hidden, inputs):
        if cast:
            params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "data", to="varying"), params)
        state = estimator.init(params, hidden[0])
        grads = estimator.update(params, state, inputs[0])[0].grads
        return jax.tree.map(lambda leaf: jax.lax.pmean(leaf, "data"), grads)

    return jax.jit(mean_gradient)(case.params, hidden, inputs)


@pytest.mark.parametrize("make", [jtrunc.bptt, partial(jtrunc.truncated_bptt, length=3)])
def test_a_mean_over_devices_needs_varying_parameters(make, mesh):
    """With parameters cast to varying, pmean is the mean of the eight streams' gradients."""
    case = systems.tanh(6)
    estimator = make(case.system)
    scale = jnp.arange(1.0, 9.0)
    hidden = jnp.broadcast_to(case.hidden, (8, 3)) + 0.1 * scale[:, None]
    inputs = case.inputs[None] * scale[:, None, None] / 8
    one = jax.jit(lambda h, x: estimator.update(case.params, estimator.init(case.params, h), x)[0].grads)
    singles = [one(hidden[i], inputs[i]) for i in range(8)]
    mean = jax.tree.map(lambda g: g / 8, add(*singles))
    assert_close(shard_mean(case, estimator, mesh, True, hidden, inputs), mean)
    if make is jtrunc.bptt:
        assert differ(shard_mean(case, estimator, mesh, False, hidden, inputs), mean)


@pytest.mark.slow
@pytest.mark.parametrize("make", [jtrunc.artbp, jtrunc.online_artbp])
def test_random_truncation_over_devices(make, mesh, keys):
    """Eight devices, each with a key and a stream of its own, under the default checks of shard_map."""
    case = systems.tanh(6)
    estimator = make(case.system, truncation.constant(0.3))
    inputs = case.inputs[None] * jnp.arange(1.0, 9.0)[:, None, None] / 8

    def one(params, key, inputs):
        state = estimator.init(params, case.hidden + 0 * inputs[0, 0], key)
        return estimator.update(params, state, inputs)[0].grads

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P())
    def mean_gradient(params, keys, inputs):
        params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "data", to="varying"), params)
        grads = one(params, keys[0], inputs[0])
        return jax.tree.map(lambda leaf: jax.lax.pmean(leaf, "data"), grads)

    alone = jax.jit(one)
    singles = [alone(case.params, keys[i], inputs[i]) for i in range(8)]
    mean = jax.tree.map(lambda g: g / 8, add(*singles))
    assert_close(jax.jit(mean_gradient)(case.params, keys[:8], inputs), mean)
    assert differ(singles[0], singles[1])


def test_grads_go_straight_into_optax():
    """Structure and dtypes are those of params; no wrapping, no scaling, no waiting for a full window."""
    case = systems.tanh(10)
    optimizer = optax.adam(1e-2)
    estimator = jtrunc.truncated_bptt(case.system, 5)

    @jax.jit
    def step(params, moments, state):
        estimate, state = estimator.update(params, state, case.inputs)
        updates, moments = optimizer.update(estimate.grads, moments, params)
        return (
            optax.apply_updates(params, updates),
            moments,
            state._replace(hidden=case.hidden),
            estimate.loss,
        )

    params, state = case.params, estimator.init(case.params, case.hidden)
    moments, losses = optimizer.init(params), []
    for _ in range(60):
        params, moments, state, loss = step(params, moments, state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
