"""Resets cut influence exactly, Euler steps are Euler steps, and streams draw as they are told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtrunc
from jtrunc import Params, System, cells, truncation
from jtrunc.combinators import continuous_time
from jtrunc.structure import Structure, transition_of
from tests import systems
from tests.compare import assert_close, differ
from tests.reference import from_vector, to_vector
from tests.systems import Case


def shifted(tree: Any, seed: int = 0) -> Any:
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(0.3 * generator.normal(size=leaf.shape)), tree)


def cell_case(cell: cells.Cell, batch: tuple[int, ...] = ()) -> Case:
    """Nine steps of a cell with two inputs, a readout and a squared error."""
    model = cells.model(cell, 2, lambda y, target: 0.5 * jnp.sum((y - target) ** 2))
    generator = np.random.default_rng(1)
    inputs = tuple(jnp.asarray(generator.normal(size=(9, *batch, 2))) for _ in range(2))
    params = shifted(model.init(jax.random.key(0), jnp.float64))
    return Case(model.system, params, shifted(model.initial_hidden(batch, jnp.float64), 2), inputs)


CASES: dict[str, Callable[[], Case]] = {
    "lstm": lambda: cell_case(cells.lstm(2, 2)),
    "linear recurrent": lambda: cell_case(cells.linear_recurrent(2, 2)),
    "stack": lambda: cell_case(cells.stack([cells.lstm(2, 2), cells.preactivation(2, 2, feedback=0.5)])),
    "nested": lambda: systems.nested(9),
}


def by_state(transition: Any, theta: Any, hidden: Any, *inputs: Any) -> list[np.ndarray]:
    """D = ∂F/∂h for each of these inputs, as matrices over the real coordinates of all float leaves."""

    @jax.jit
    @jax.jacfwd
    def jacobian(vector: jax.Array, x: Any) -> jax.Array:
        return to_vector(transition(theta, from_vector(vector, hidden), x))

    return [np.asarray(jacobian(to_vector(hidden), x)) for x in inputs]


# Resets.


@pytest.mark.parametrize("name", CASES)
def test_nothing_passes_a_reset(name: str) -> None:
    """D = 0 for every leaf, and h is that of the initial state; none of this without a reset."""
    case = CASES[name]()
    system, plain = jtrunc.with_resets(case.system, case.hidden), case.system.transition
    first, x = (jax.tree.map(lambda leaf, t=t: leaf[t], case.inputs) for t in (0, 1))
    theta = case.params.recurrent
    later = plain(theta, case.hidden, first)
    (expected,) = by_state(plain, theta, later, x)
    assert np.abs(expected).max(axis=1).min() > 1e-6, "every coordinate depends on the state before"
    transitions = [system.transition]
    if system.structure is not None:
        transitions.append(transition_of(system.structure))
    for transition in transitions:
        cut, kept = by_state(transition, theta, later, (jnp.bool(True), x), (jnp.bool(False), x))
        assert not cut.any()
        np.testing.assert_allclose(kept, expected, rtol=1e-14)
        fresh = plain(theta, case.hidden, x)
        assert_close(to_vector(transition(theta, later, (True, x))), to_vector(fresh), rtol=1e-15)
        assert differ(transition(theta, later, (False, x)), fresh)


def test_a_reset_leaves_the_immediate_influence() -> None:
    """∂F/∂θ at a reset is that of a step from the initial state."""
    case = CASES["stack"]()
    transition = jtrunc.with_resets(case.system, case.hidden).transition
    x, theta = jax.tree.map(lambda leaf: leaf[0], case.inputs), case.params.recurrent
    later = case.system.transition(theta, case.hidden, x)

    @jax.jit
    @jax.jacrev
    def immediate(theta: Any, hidden: Any, reset: jax.Array) -> jax.Array:
        return to_vector(transition(theta, hidden, (reset, x)))

    reset, fresh = immediate(theta, later, jnp.bool(True)), immediate(theta, case.hidden, jnp.bool(False))
    assert_close(reset, fresh, rtol=1e-15)
    assert differ(reset, immediate(theta, later, jnp.bool(False)))


@pytest.mark.parametrize("name", CASES)
def test_a_reset_stops_infinite_influence(name: str) -> None:
    """A tangent or cotangent that is already infinite must not turn into 0 · inf = nan."""
    case = CASES[name]()
    transition = jtrunc.with_resets(case.system, case.hidden).transition
    x = jax.tree.map(lambda leaf: leaf[1], case.inputs)

    def run(reset: bool, vector: jax.Array) -> jax.Array:
        return to_vector(transition(case.params.recurrent, from_vector(vector, case.hidden), (reset, x)))

    vector = to_vector(case.hidden)
    infinite = jnp.full_like(vector, jnp.inf)
    assert not np.asarray(jax.jvp(partial(run, True), (vector,), (infinite,))[1]).any()
    assert not np.isfinite(jax.jvp(partial(run, False), (vector,), (infinite,))[1]).all()


def test_only_the_streams_that_are_reset_are_cut() -> None:
    """A reset a stream (B,), on a stack with a batch axis in the system."""
    case = cell_case(cells.stack([cells.lstm(2, 2), cells.gru(2, 3)]), (3,))
    transition = jtrunc.with_resets(case.system, jax.tree.map(jnp.zeros_like, case.hidden)).transition
    x, resets = jax.tree.map(lambda leaf: leaf[0], case.inputs), jnp.asarray([False, True, False])
    stream = to_vector(jax.tree.map(lambda leaf: leaf * 0 + jnp.arange(3.0)[:, None], case.hidden))
    (jacobian,) = by_state(transition, case.params.recurrent, case.hidden, (resets, x))
    cut = np.asarray(stream == 1)
    assert not jacobian[cut].any() and not jacobian[:, cut].any()
    assert np.abs(jacobian[~cut]).max(axis=1).min() > 1e-6


@pytest.mark.parametrize("name", ["lstm", "linear recurrent"])
def test_a_reset_cuts_the_combination_as_well(name: str) -> None:
    """At fixed preactivations, which is what e-prop and the Kronecker engines differentiate."""
    case = CASES[name]()
    structure = jtrunc.with_resets(case.system, case.hidden).structure
    assert isinstance(structure, Structure)
    x, theta = jax.tree.map(lambda leaf: leaf[0], case.inputs), case.params.recurrent
    p = {name: jnp.ones_like(jax.tree.leaves(w)[0][0]) for name, w in structure.affine(theta).items()}

    def combine(reset: bool, vector: jax.Array) -> jax.Array:
        hidden = from_vector(vector, case.hidden)
        return to_vector(structure.combine(structure.elementwise(theta), hidden, (reset, x), p))

    jacobians = [jax.jacobian(partial(combine, reset))(to_vector(case.hidden)) for reset in (True, False)]
    assert not np.asarray(jacobians[0]).any() and np.asarray(jacobians[1]).any()


# Continuous time.

STEP = 0.125
RATES: dict[str, Callable[[], Case]] = {
    "tanh": lambda: cell_case(cells.tanh(2, 3)),
    "lstm": lambda: cell_case(cells.lstm(2, 2)),
    "linear recurrent": lambda: cell_case(cells.linear_recurrent(2, 2)),
}


@pytest.mark.parametrize("name", RATES)
def test_a_step_of_continuous_time_is_euler(name: str) -> None:
    """f = Id + δt F, ∂f/∂h = Id + δt ∂F/∂h; the structure says the same."""
    case = RATES[name]()
    system = continuous_time(case.system, STEP)
    assert isinstance(system.structure, Structure)
    arguments = case.params.recurrent, case.hidden, jax.tree.map(lambda leaf: leaf[0], case.inputs)
    rate = case.system.transition(*arguments)
    expected = jax.tree.map(lambda h, slope: h + STEP * slope, case.hidden, rate)
    (slopes,) = by_state(case.system.transition, *arguments)
    for transition in (system.transition, transition_of(system.structure)):
        assert_close(transition(*arguments), expected, rtol=1e-15)
        assert differ(transition(*arguments), rate)
        assert_close(by_state(transition, *arguments)[0], np.eye(len(slopes)) + STEP * slopes, rtol=1e-14)


@pytest.mark.parametrize("name", ["tanh", "stack"])
def test_gradients_in_continuous_time(name: str) -> None:
    """bptt, by the structure, is jax.grad of Euler steps written out; layers step one after the other."""
    layers = [cells.tanh(2, 3), cells.gru(3, 2)][: 1 if name == "tanh" else 2]
    case = cell_case(layers[0] if name == "tanh" else cells.stack(layers))
    estimator = jtrunc.bptt(continuous_time(case.system, STEP))
    estimate, _ = jax.jit(estimator.update)(
        case.params, estimator.init(case.params, case.hidden), case.inputs
    )

    @partial(jax.jit, static_argnums=0)
    @partial(jax.grad, argnums=1)
    def gradient(time_step: float, params: Params, hidden: Any, inputs: Any) -> jax.Array:
        def step(hidden: Any, inputs: Any) -> tuple[Any, jax.Array]:
            (x, target), new = inputs, []
            for layer, theta, h in zip(layers, thetas(params), hidden, strict=True):
                new.append(h + time_step * layer.transition(theta, h, x))
                x = new[-1]
            prediction = x @ params.readout["kernel"] + params.readout["bias"]
            return tuple(new), 0.5 * jnp.sum((prediction - target) ** 2)

        return jax.lax.scan(step, hidden, inputs)[1].sum()

    def thetas(params: Params) -> Any:
        return (params.recurrent,) if name == "tanh" else params.recurrent

    hidden = (case.hidden,) if name == "tanh" else case.hidden
    assert_close(estimate.grads, gradient(STEP, case.params, hidden, case.inputs), rtol=1e-12)
    assert differ(estimate.grads, gradient(2 * STEP, case.params, hidden, case.inputs))


def test_half_the_time_step_halves_the_error() -> None:
    """dh/dt = i h − h turns and decays: h(1) = exp(i − 1), with an error of order δt."""
    rate = System(lambda theta, h, x: theta * h, lambda params, h, x: (jnp.abs(h), ()))
    theta, errors = jnp.complex128(1j - 1), []
    for steps in (64, 128):
        system = continuous_time(rate, 1 / steps)
        hidden, _ = jtrunc.unroll(system, Params(theta), jnp.complex128(1), jnp.zeros(steps))
        errors.append(abs(complex(hidden) - np.exp(1j - 1)))
    np.testing.assert_allclose(errors[0] / errors[1], 2, rtol=0.02)
    assert errors[1] < 0.01


def test_leaves_without_a_rate_take_their_new_value() -> None:
    """The clock ticks by one and the key moves on as F says, whatever δt; dtypes stay."""
    case = systems.nested(3, jnp.float32)
    x = jax.tree.map(lambda leaf: leaf[0], case.inputs)
    arguments = case.params.recurrent, case.hidden, x
    rate, new = case.system.transition(*arguments), continuous_time(case.system, 0.25).transition(*arguments)
    assert new.clock == rate.clock == 1 and (new.key == rate.key).all()
    assert [leaf.dtype for leaf in jax.tree.leaves(new)] == [leaf.dtype for leaf in jax.tree.leaves(rate)]
    expected = jax.tree.map(lambda h, slope: h + 0.25 * slope, case.hidden.cells, rate.cells)
    assert_close(new.cells, expected, rtol=1e-6)
    assert_close(new.phasor, case.hidden.phasor + 0.25 * rate.phasor, rtol=1e-6)


@pytest.mark.parametrize(
    ("time_step", "error"),
    [(0.0, ValueError), (-0.1, ValueError), (np.nan, ValueError), (np.inf, ValueError), (True, TypeError)],
)
def test_time_steps_that_are_refused(time_step: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"`time_step`.*{time_step}"):
        continuous_time(systems.tanh(3).system, time_step)


def test_a_rate_unlike_the_state_is_refused() -> None:
    with pytest.raises(TypeError, match="`system` must be a jtrunc"):
        continuous_time(lambda theta, h, x: h, 0.1)  # pyright: ignore
    wrong = continuous_time(System(lambda theta, h, x: jnp.ones(3), lambda params, h, x: (h, ())), 0.1)
    with pytest.raises(ValueError, match=r"the rate changes the shape of `hidden` from \(\) to \(3,\)"):
        jtrunc.unroll(wrong, Params(()), jnp.float64(0), jnp.zeros(2))
    tupled = continuous_time(System(lambda theta, h, x: (h,), lambda params, h, x: (h, ())), 0.1)
    with pytest.raises(TypeError, match="the rate changes the structure of `hidden`"):
        jtrunc.unroll(tupled, Params(()), jnp.float64(0), jnp.zeros(2))


# Streams.

LAW = truncation.constant(0.4)


def streams(count: int) -> Case:
    """Several streams of a tanh network, all different."""
    case, generator = systems.tanh(8), np.random.default_rng(4)
    hidden = jnp.asarray(generator.normal(size=(count, *case.hidden.shape)))
    return case._replace(hidden=hidden, inputs=jnp.asarray(generator.normal(size=(8, count, 2))))


def one_by_one(estimator: Any, case: Case, keys: list[jax.Array]) -> list[Any]:
    """The gradient of every stream by itself, each with the key given."""
    update, gradients = jax.jit(estimator.update), []
    for stream, key in enumerate(keys):
        state = estimator.init(case.params, case.hidden[stream], key)
        gradients.append(update(case.params, state, case.inputs[:, stream])[0].grads)
    return gradients


def test_streams_share_their_noise_or_do_not() -> None:
    """The mean over streams, of the estimates with one key for all or with one each (split from it)."""
    case, key = streams(4), jax.random.key(3)
    estimator = jtrunc.artbp(case.system, LAW)
    independent, shared = jtrunc.per_stream(estimator), jtrunc.per_stream(estimator, noise="shared")
    update, means = jax.jit(independent.update), []
    for batched, keys in ((independent, list(jax.random.split(key, 4))), (shared, [key] * 4)):
        estimate, _ = update(case.params, batched.init(case.params, case.hidden, key), case.inputs)
        expected = jax.tree.map(lambda *g: sum(g) / 4, *one_by_one(estimator, case, keys))
        assert_close(estimate.grads, expected, rtol=1e-13)
        means.append(estimate.grads)
    assert differ(*means)


def test_equal_streams_with_shared_noise_stay_equal() -> None:
    """Through several updates of an estimator with data-dependent windows; with a key each they part."""
    case = systems.tanh(8)
    hidden, inputs = jnp.stack([case.hidden] * 4), jnp.stack([case.inputs] * 4, axis=1)
    online = jtrunc.online_artbp(case.system, LAW)
    independent, shared = jtrunc.per_stream(online), jtrunc.per_stream(online, noise="shared")
    update = jax.jit(independent.update)
    for estimator, equal in ((shared, True), (independent, False)):
        state, steps = estimator.init(case.params, hidden, jax.random.key(0)), []
        for _ in range(5):
            estimate, state = update(case.params, state, inputs)
            steps.append(np.asarray(estimate.num_steps))
        lengths = np.asarray(steps)
        assert (lengths == lengths[:, :1]).all() == equal
        assert len(set(lengths[:, 0].tolist())) > 1, "the lengths vary from update to update"


def test_independent_keys_are_the_default() -> None:
    """One key a stream, split from the key given: bit for bit what `vmap` over split keys makes."""
    case, key = streams(3), jax.random.key(1)
    estimator = jtrunc.artbp(case.system, LAW)
    init = jax.vmap(lambda hidden, key: estimator.init(case.params, hidden, key))
    expected = jax.tree.leaves(init(case.hidden, jax.random.split(key, 3)))
    state = jax.tree.leaves(jtrunc.per_stream(estimator).init(case.params, case.hidden, key))
    shared = jax.tree.leaves(jtrunc.per_stream(estimator, noise="shared").init(case.params, case.hidden, key))
    assert all((leaf == other).all() for leaf, other in zip(state, expected, strict=True))
    assert not all((leaf == other).all() for leaf, other in zip(shared, expected, strict=True))


@pytest.mark.parametrize("noise", ["common", None, True])
def test_other_noise_is_refused(noise: Any) -> None:
    with pytest.raises(ValueError, match=f'"independent" or "shared", not {noise!r}'):
        jtrunc.per_stream(jtrunc.bptt(systems.tanh(3).system), noise=noise)


def test_shared_noise_needs_a_key_too() -> None:
    case = streams(2)
    with pytest.raises(ValueError, match="`key` is None"):
        jtrunc.per_stream(jtrunc.artbp(case.system, LAW), noise="shared").init(case.params, case.hidden)
