"""The oracle is examined first: against jax.grad of the whole unrolled loss, and against itself."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference, systems
from tests.compare import add, assert_close, differ


def grad(case: systems.Case, weights=None):
    return jax.grad(reference.unrolled_loss, argnums=1, allow_int=True)(*case, weights)


@pytest.fixture(params=sorted(systems.CASES), scope="module")
def case(request) -> systems.Case:
    return systems.CASES[request.param](6)


@pytest.fixture(scope="module")
def run(case) -> reference.Linearised:
    return reference.linearise(*case)


def test_vectors_keep_every_kind_of_leaf():
    hidden = systems.nested(1).hidden
    vector = reference.to_vector(hidden)
    assert vector.shape == (6,)
    again = reference.from_vector(2 * vector, hidden)
    assert again.phasor == 2 * hidden.phasor and again.clock == hidden.clock and again.key == hidden.key


def test_losses_and_states_are_the_plain_ones(case, run):
    np.testing.assert_allclose(run.losses.sum(), reference.unrolled_loss(*case), rtol=1e-14)
    assert len(run.states) == run.length + 1 == 7


def test_bptt_is_the_gradient_of_the_unrolled_loss(case, run):
    assert_close(reference.bptt(run), grad(case), rtol=1e-12)


@pytest.mark.parametrize(("length", "phase"), [*itertools.product((1, 2, 4), (0, 3))])
def test_truncated_bptt_stops_the_gradient_where_the_stream_says(case, run, length, phase):
    weights = [float((phase + t) % length != 0) for t in range(1, run.length)]
    assert_close(reference.truncated_bptt(run, length, phase), grad(case, weights), rtol=1e-12)
    assert differ(reference.truncated_bptt(run, length, phase), reference.bptt(run))


def test_truncated_bptt_knows_its_phase(run):
    assert differ(reference.truncated_bptt(run, 4, 0), reference.truncated_bptt(run, 4, 3))


def test_artbp_scales_the_edges(case, run):
    cuts, probabilities = [0, 1, 0, 0, 1], [0.1, 0.2, 0.3, 0.4, 0.5]
    weights = [0.0 if cut else 1 / (1 - c) for cut, c in zip(cuts, probabilities, strict=True)]
    assert_close(reference.artbp(run, cuts, probabilities), grad(case, weights), rtol=1e-12)
    assert differ(
        reference.artbp(run, cuts, probabilities), reference.artbp_factor_dropped(run, cuts, probabilities)
    )


@pytest.mark.parametrize(("backward_steps", "loss_steps"), [(5, 5), (3, 2), (2, 1), (4, 4), (9, 6)])
def test_windowed_bptt_is_the_double_sum_of_equation_15(backward_steps, loss_steps):
    """Σ over the last K₂ losses and over lags 0 … K₁ of ∂ℓ/∂θₜ, each step having its own copy θₜ of θ."""
    case = systems.tanh(6)
    length = 6

    def losses(copies, readout):
        hidden, values = case.hidden, []
        for t, x in enumerate(reference.steps_of(case.inputs)):
            hidden = case.system.transition(copies[t], hidden, x)
            values.append(case.system.loss(case.params._replace(readout=readout), hidden, x)[0])
        return jnp.stack(values)

    by_copy, by_readout = jax.jacobian(losses, argnums=(0, 1))(
        [case.params.recurrent] * length, case.params.readout
    )
    scored = range(length - loss_steps, length)
    lags = range(max(length - 1 - backward_steps, 0), length)
    theta = jax.tree.map(
        lambda *leaves: sum(leaf[s] for leaf in leaves for s in scored), *(by_copy[t] for t in lags)
    )
    readout = sum(by_readout[s] for s in scored)
    expected = jax.tree.map(
        lambda leaf: leaf / loss_steps, case.params._replace(recurrent=theta, readout=readout)
    )
    run = reference.linearise(*case)
    assert_close(reference.windowed_bptt(run, backward_steps, loss_steps), expected, rtol=1e-12)


LAWS = {
    "constant": reference.constant(0.3),
    "polynomial": reference.polynomial(2.5, 4.0),
    "state": lambda elapsed, state: float(0.8 / (1 + np.exp(-reference.to_vector(state)[0])) / elapsed),
}


@pytest.mark.parametrize("law", sorted(LAWS))
def test_artbp_is_unbiased_over_all_cut_patterns(law, run):
    patterns = list(reference.cut_patterns(LAWS[law], run))
    assert len(patterns) == 2 ** (run.length - 1)

    def mean(estimate):
        return reference.expectation(
            (p.probability, estimate(run, p.cuts, p.probabilities)) for p in patterns
        )

    exact = reference.bptt(run)
    assert_close(mean(reference.artbp), exact, rtol=1e-12)
    assert differ(mean(reference.artbp_factor_dropped), exact)
    assert differ(mean(reference.artbp_factor_on_local_term), exact)


@pytest.mark.parametrize("law", sorted(LAWS))
def test_online_artbp_is_unbiased_over_all_window_sequences(law, run):
    def total(windows):
        starts = np.cumsum([0, *windows[:-1]])
        parts = [
            reference.online_artbp(run, int(s), w, LAWS[law]) for s, w in zip(starts, windows, strict=True)
        ]
        return add(*parts)

    sequences = list(reference.window_sequences(run.length))
    assert len(sequences) == 2 ** (run.length - 1)
    pairs = (
        (reference.sequence_probability(LAWS[law], run, windows), total(windows)) for windows in sequences
    )
    assert_close(reference.expectation(pairs), reference.bptt(run), rtol=1e-12)


@pytest.mark.parametrize(("mean", "alpha", "deviation"), [(16, 6, 20.0), (8, 4, 12.96)])
def test_the_polynomial_law_has_mean_length_L0(mean, alpha, deviation):
    """Errata 3: the mean is exactly L₀; the deviation's tail Σ k^(3−α) is what limits the digits."""
    law = reference.polynomial(mean, alpha)
    np.testing.assert_allclose(reference.mean_length(law, 200_000), mean, rtol=1e-6)
    np.testing.assert_allclose(reference.length_deviation(law, 200_000), deviation, rtol=1e-3)


def test_the_constant_law_is_geometric():
    np.testing.assert_allclose(
        reference.survival(reference.constant(0.25), 3), 0.75 ** np.arange(4), rtol=1e-14
    )
    np.testing.assert_allclose(reference.mean_length(reference.constant(0.25), 200), 4, rtol=1e-12)
