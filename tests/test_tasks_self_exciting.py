"""The self-exciting process against its list of past events, closed forms, and the time-rescaling theorem."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest
from scipy import integrate, stats

from jtrunc.tasks import point_process, self_exciting
from jtrunc.tasks.events import EventSequence, Lanes, lanes
from jtrunc.tasks.self_exciting import MUTUAL, Process


def rates(process: Process, times: Any, marks: Any, t: float) -> np.ndarray:
    """λ(t) from the list of events before t: (M,)."""
    branching = np.asarray(process.branching)
    past = [(s, m) for s, m in zip(times, marks, strict=True) if s < t]
    excited = [branching[:, m] * process.decay * math.exp(-process.decay * (t - s)) for s, m in past]
    return np.asarray(process.baseline) + sum(excited, np.zeros(len(branching)))


@pytest.fixture(scope="module")
def streams() -> Lanes:
    return jax.tree.map(np.asarray, self_exciting.sequences(jax.random.key(5), 2000, 200))


OTHER = Process(baseline=(0.3, 0.2), branching=((0.1, 0.5), (0.0, 0.7)), decay=2.5)


def test_residuals_are_those_of_the_list_of_events() -> None:
    """The compensator is the integral of the intensity; mark and time give back log λ of the mark."""
    generator = np.random.default_rng(1)
    sequences = [
        EventSequence(np.cumsum(generator.exponential(size=n)), generator.integers(0, 2, n))
        for n in (5, 4, 6)
    ]
    data = lanes(sequences, 2)  # 4 + 3 + 5 steps: the second stream begins inside a sequence
    data = jax.tree.map(lambda leaf: leaf.astype(float) if leaf.dtype == np.float32 else leaf, data)
    found = self_exciting.residuals(data, OTHER)
    for b in range(2):
        times, marks = [], []
        for t in range(6):
            mark, gap, _ = (leaf[t, b] for leaf in data.events)
            times = [0.0] if data.resets[t, b] else [*times, times[-1] + gap]
            marks = [mark] if data.resets[t, b] else [*marks, mark]
            after, next_mark = times[-1] + data.targets.gap[t, b], data.targets.mark[t, b]
            total, _ = integrate.quad(
                lambda s, times=times, marks=marks: rates(OTHER, times, marks, s).sum(), times[-1], after
            )
            np.testing.assert_allclose(found.compensator[t, b], total, rtol=1e-7)
            expected = total - math.log(rates(OTHER, times, marks, after)[next_mark])
            parts = found.parts.mark[t, b] + found.parts.time[t, b]
            np.testing.assert_allclose(parts, expected, rtol=1e-6, atol=1e-7)
    assert abs(float(found.parts.mark[0, 0]) - math.log(2)) > 1e-3


def z_scores(streams: Lanes, mean: np.ndarray) -> np.ndarray:
    """(count − rate · time) of each mark over streams, in standard errors; past the first 500 events."""
    marks, time = streams.events.mark[500:], streams.events.gap[500:].sum(axis=0, dtype=float)
    rest = np.stack([(marks == m).sum(axis=0) - mean[m] * time for m in range(2)])
    return np.abs(rest.mean(axis=1)) / rest.std(axis=1, ddof=1) * math.sqrt(rest.shape[1])


def test_mean_rates(streams: Lanes) -> None:
    """|z| < 5.1 of 200 independent streams but once in 10⁶ runs; rates 5 % off, or of Aᵀ, are seen."""
    mean = self_exciting.mean_rates()
    np.testing.assert_allclose(mean, [0.31 / 0.32, 0.36 / 0.32], rtol=1e-12)
    assert (z_scores(streams, mean) < 5.1).all()
    transposed = MUTUAL._replace(branching=np.transpose(MUTUAL.branching))
    for wrong in (1.05 * mean, 0.95 * mean, self_exciting.mean_rates(transposed)):
        assert (z_scores(streams, wrong) > 5.1).any()


WRONG = {
    "decay": MUTUAL._replace(decay=1.3),
    "baseline": MUTUAL._replace(baseline=(0.15, 0.35)),
    "branching": MUTUAL._replace(branching=((0.6, 0.2), (0.2, 0.5))),
}


def test_time_is_rescaled_to_a_poisson_process(streams: Lanes) -> None:
    """Compensators are Exp(1) and independent: p > 1e-6 but once in 10⁶ runs; wrong parameters have less."""
    found = np.asarray(self_exciting.residuals(streams).compensator)
    assert found.shape == (2000, 200)
    assert stats.kstest(found.ravel(), "expon").pvalue > 1e-6
    correlation = np.corrcoef(found[:-1].ravel(), found[1:].ravel())[0, 1]
    assert abs(correlation) * math.sqrt(found[1:].size) < 5
    wrong = np.asarray(self_exciting.residuals(streams, WRONG["decay"]).compensator)
    assert stats.kstest(wrong.ravel(), "expon").pvalue < 1e-6


@pytest.mark.parametrize("name", WRONG)
def test_no_other_process_has_less_loss_on_its_data(streams: Lanes, name: str) -> None:
    """The difference over 200 independent streams: more than 5 standard errors above 0."""
    true, wrong = (self_exciting.residuals(streams, p).parts for p in (MUTUAL, WRONG[name]))
    excess = np.mean(np.asarray(wrong.mark + wrong.time) - np.asarray(true.mark + true.time), axis=0)
    assert excess.mean() / excess.std(ddof=1) * math.sqrt(200) > 5


def test_the_bound_and_what_memory_is_worth(streams: Lanes) -> None:
    """0.705 nats an event with the past, 0.951 with the mean gap and the mark before; ± 5 standard errors."""
    assert abs(self_exciting.negative_log_likelihood(streams) - 0.705) < 0.04
    constant = point_process.constant_rate(streams, streams)
    assert abs(constant.mark + constant.time - 0.951) < 0.04


def test_streams_differ_and_a_key_gives_the_same(streams: Lanes) -> None:
    again, other = (self_exciting.sequences(jax.random.key(seed), 2000, 200) for seed in (5, 6))
    for leaf, same in zip(jax.tree.leaves(streams), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(leaf, same)
    first, gap = streams.events, streams.events.gap
    assert (gap != other.events.gap).mean() > 0.999 and (gap[:, 0] != gap[:, 1]).mean() > 0.999
    assert streams.resets.sum() == 200 and streams.resets[0].all()
    assert gap.dtype == first.time.dtype == np.float32 and first.mark.dtype == np.int32
    np.testing.assert_array_equal(first.mark[1:], streams.targets.mark[:-1])
    np.testing.assert_array_equal(gap[1:], streams.targets.gap[:-1])
    np.testing.assert_allclose(np.cumsum(gap, axis=0, dtype=float), first.time, rtol=1e-4)


@pytest.mark.slow
def test_same_data_without_x64(streams: Lanes) -> None:
    with jax.enable_x64(False):
        narrow = self_exciting.sequences(jax.random.key(5), 2000, 200)
    np.testing.assert_array_equal(streams.events.mark[:50], narrow.events.mark[:50])
    np.testing.assert_allclose(streams.events.gap[:50], narrow.events.gap[:50], rtol=1e-4)


BAD = {
    "explodes": (
        MUTUAL._replace(branching=((0.5, 0.6), (0.6, 0.5))),
        "eigenvalue of size 1.1.*less than 0.909",
    ),
    "critical": (Process((1.0,), ((1.0,),), 1.0), "eigenvalue of size 1, "),
    "inhibits": (MUTUAL._replace(branching=((0.1, -0.1), (0.1, 0.1))), "must not be negative"),
    "never begins": (MUTUAL._replace(baseline=(0.0, 0.0)), "one baseline must be positive"),
    "shapes": (MUTUAL._replace(baseline=(0.1,)), r"shape \(1,\) and process.branching \(2, 2\)"),
    "decay": (MUTUAL._replace(decay=0.0), "process.decay must be positive and finite, got 0.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_parameters(key: jax.Array, name: str) -> None:
    process, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        self_exciting.sequences(key, 3, process=process)


def test_bad_arguments(key: jax.Array) -> None:
    with pytest.raises(TypeError, match="typed key"):
        self_exciting.sequences(0, 3)  # pyright: ignore
    with pytest.raises(ValueError, match="num_streams must be at least 1, got 0"):
        self_exciting.sequences(key, 3, 0)
