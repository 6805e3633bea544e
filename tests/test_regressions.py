"""Mistakes that this project made once, each pinned where it was found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtrunc
from jtrunc import cells, truncation

PARAMS = jtrunc.Params(jnp.float64(0.9))
LINEAR = jtrunc.System(lambda theta, h, x: theta * h + x, lambda params, h, x: (h, ()))


def gradient(estimator, inputs, key=None, jit=True):
    state = estimator.init(PARAMS, jnp.float64(0.0), key)
    update = jax.jit(estimator.update) if jit else estimator.update
    return update(PARAMS, state, inputs)[0]


@pytest.mark.parametrize("num_steps", [15, 16, 17, 32])
def test_the_last_boundary_never_reweights_the_edge_before_it(num_steps, key):
    """A law that reads h and would cut only after the last step leaves the exact gradient."""
    law = truncation.from_probability(lambda elapsed, h: jnp.where(elapsed == num_steps, 1 - 1e-12, 0.0))
    inputs = jnp.arange(1.0, num_steps + 1)
    exact = gradient(jtrunc.bptt(LINEAR), inputs).grads.recurrent
    online = gradient(jtrunc.online_artbp(LINEAR, law), inputs, key)
    assert int(online.num_steps) == num_steps
    np.testing.assert_allclose(online.grads.recurrent, exact, rtol=1e-12)


@pytest.mark.parametrize("make", [jtrunc.artbp, jtrunc.online_artbp])
@pytest.mark.parametrize(
    "probability",
    [lambda elapsed: 1.5, lambda elapsed: -0.5, lambda elapsed, h: jnp.where(elapsed >= 3, 1.0, 0.01)],
)
def test_a_probability_outside_its_range_is_a_nan_gradient(make, probability, key):
    """Never a silent cap: c = 1 cannot be compensated."""
    estimate = gradient(make(LINEAR, truncation.from_probability(probability)), jnp.ones(9), key)
    assert np.isnan(estimate.grads.recurrent)


def test_an_argument_with_a_default_is_a_constant(key):
    """The idiom of binding early, ``lambda elapsed, c=0.1: c``, is a law of one argument."""
    law = truncation.from_probability(lambda elapsed, c=0.25: c)
    assert not law.reads_hidden
    np.testing.assert_allclose(truncation.probabilities(law, 3), [0.25, 0.25, 0.25])
    with pytest.raises(TypeError, match="elapsed"):
        truncation.from_probability(lambda a, b, c: 0.1)


def test_numpy_inputs_without_jit():
    """Several windows index their inputs with data; NumPy arrays are welcome."""
    estimator = jtrunc.truncated_bptt(LINEAR, 2)
    of_numpy = gradient(estimator, np.ones(5), jit=False).grads.recurrent
    np.testing.assert_allclose(of_numpy, gradient(estimator, jnp.ones(5)).grads.recurrent, rtol=1e-12)


@pytest.mark.parametrize("make", [cells.tanh, cells.gru, cells.lstm])
def test_cells_start_in_bfloat16(make, key):
    """The factorisation behind orthogonal kernels exists in wide types alone."""
    theta = make(3, 8).init(key, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(theta)} == {jnp.dtype(jnp.bfloat16)}


def test_a_system_without_state(key):
    """Nothing to carry is still a system."""
    stateless = jtrunc.System(lambda theta, h, x: (), lambda params, h, x: (params.recurrent * x, ()))
    params = jtrunc.Params(jnp.float64(2.0))
    estimator = jtrunc.online_artbp(stateless, truncation.constant(0.2))
    estimate, _ = estimator.update(params, estimator.init(params, (), key), jnp.ones(8))
    assert float(estimate.grads.recurrent) == int(estimate.num_steps)


def test_a_long_look_back_stores_no_state_of_the_steps_before_it():
    """Inputs beyond K₁ + 1 cost a copy of themselves, 16 bytes a step here, and no state of 256 bytes."""
    model = cells.model(cells.tanh(4, 64), 4, cells.softmax_cross_entropy)
    params, hidden = model.init(jax.random.key(0)), model.initial_hidden((1,))
    estimator = jtrunc.windowed_bptt(model.system, 20, 20)

    def temporaries(num_steps):
        inputs = (jnp.zeros((num_steps, 1, 4), jnp.float32), jnp.zeros((num_steps, 1), jnp.int32))
        lowered = jax.jit(estimator.update).lower(params, estimator.init(params, hidden), inputs)
        analysis = lowered.compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporaries(4000) - temporaries(400) < 3600 * 64 * 4 / 4


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"unroll": 2}])
def test_scan_promotes_and_accepts_what_lax_scan_does(options):
    """Python numbers as carry take the dtype that f gives them; empty xs and xs=() pass."""

    def f(carry, x):
        return carry * 0.5 + x, carry

    xs = jnp.arange(5, dtype=jnp.bfloat16)
    law = truncation.every(2)
    for init in (1.0, 0):
        ours = jtrunc.scan(f, init, xs, truncation=law, **options)
        theirs = jax.lax.scan(f, init, xs, **options)
        for a, b in zip(ours, theirs, strict=True):
            assert jnp.result_type(a) == jnp.result_type(b)
            np.testing.assert_array_equal(np.asarray(a, float), np.asarray(b, float))
    carry, ys = jtrunc.scan(lambda c, x: (c, c), jnp.float64(3), (), 3, truncation=law)
    assert float(carry) == 3.0
    assert ys.shape == (3,)
    carry, ys = jtrunc.scan(f, jnp.float64(3), jnp.zeros(0), truncation=law)
    assert float(carry) == 3.0
    assert ys.shape == (0,)
