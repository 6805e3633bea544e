"""The command `reproduce influence-balancing`: the runs, the verdicts, what is written."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import jtrunc
from jtrunc.cli import main
from jtrunc.experiments.influence_balancing import Curve, InfluenceBalancing, run, verdict
from jtrunc.tasks import influence_balancing as task


@pytest.fixture(autouse=True)
def in_float32():
    with jax.enable_x64(False):
        yield


def curve(theta: list[float]) -> Curve:
    times = np.arange(1.0, len(theta) + 1) * 10
    return Curve("run", None, times, times * 2.0, np.array(theta), 0)


@pytest.mark.parametrize(
    ("final", "expected"),
    [(-1 / 6, "reaches θ*"), (-0.19, "reaches θ*"), (-0.3, "undecided"), (-0.6, "moves away")],
)
def test_the_verdict_is_read_from_the_distance_to_the_optimum(final, expected):
    assert verdict(curve([-0.5, final]), InfluenceBalancing()) == expected


def test_the_average_loss_is_taken_at_the_last_update_in_time():
    one = curve([0.0, 0.0, 0.0])
    assert np.isnan(one.average_loss(9))
    assert one.average_loss(10) == one.average_loss(29) == 2.0
    assert curve([0.0] * 5000).thinned().size <= 400


def plain_descent(length: int, config: InfluenceBalancing) -> tuple[list[float], list[float]]:
    """Truncated BPTT and its descent as a loop, from the paper's equations: θ and summed losses."""
    p, size = config.positive, config.positive + config.negative
    signal = np.array([1.0] * p + [-1.0] * config.negative)
    matrix = 0.5 * np.eye(size) + 0.5 * np.eye(size, k=1)
    theta, state, total, thetas, totals = config.initial_theta, np.zeros(size), 0.0, [], []
    for start in range(0, config.steps, length):
        influence, gradient = np.zeros(size), 0.0
        for _ in range(length):
            state, influence = matrix @ state + theta * signal, matrix @ influence + signal
            gradient += (state[0] - 1) * influence[0]
            total += 0.5 * (state[0] - 1) ** 2
        theta -= config.learning_rate / np.sqrt(1 + start + length) * gradient
        thetas.append(theta)
        totals.append(total)
    return thetas, totals


@pytest.mark.parametrize("length", [10, 100])
def test_the_run_is_the_papers_descent(length):
    config = InfluenceBalancing(steps=1000, learning_rate=3e-3)
    estimator = jtrunc.truncated_bptt(task.build().system, length)
    (found,) = run("run", estimator, (length, length), config, [None])
    thetas, totals = plain_descent(length, config)
    np.testing.assert_allclose(found.times, np.arange(length, 1001, length))
    # θ moves through zero, where only its absolute error means something in float32.
    np.testing.assert_allclose(found.theta, thetas, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(found.total_loss, totals, rtol=2e-5)
    longer = plain_descent(2 * length, config)[0]
    assert not np.allclose(found.theta[1::2], longer, rtol=1e-3)


@pytest.mark.slow
def test_every_seed_of_artbp_is_a_run_of_its_own():
    config = InfluenceBalancing(steps=2000)
    law = jtrunc.truncation.polynomial(16, 6.0)
    estimator = jtrunc.online_artbp(task.build().system, law)
    both = run("ARTBP", estimator, (600, 16), config, [0, 3])
    (alone,) = run("ARTBP", estimator, (600, 16), config, [3])
    np.testing.assert_array_equal(both[1].times, alone.times)
    np.testing.assert_array_equal(both[1].theta, alone.theta)
    assert not np.array_equal(both[0].theta[:50], both[1].theta[:50])
    assert all(one.times[-1] <= 2000 for one in both)


def test_a_rate_that_explodes_is_reported(tmp_path, capsys):
    command = ["reproduce", "influence-balancing", "--steps", "20000", "--learning-rate", "1e4"]
    assert main([*command, "--output", str(tmp_path / "run")]) == 1
    assert "not finite" in capsys.readouterr().err


@pytest.mark.slow
def test_reproduce_writes_picture_and_numbers(tmp_path, capsys):
    command = ["reproduce", "influence-balancing", "--steps", "10000", "--seeds", "2"]
    assert main([*command, "--lengths", "10", "200", "--output", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "influence_balancing.json").read_text())
    assert [r["seed"] for r in found["runs"]] == [None, None, 0, 1]
    assert found["optimum"] == pytest.approx(-1 / 6)
    assert found["runs"][0]["verdict"] == "moves away"
    assert set(found["runs"][0]["average_loss_to"]) == {"1000", "10000"}
    assert (tmp_path / "run" / "influence_balancing.png").stat().st_size > 0
    assert "moves away" in shown and str(tmp_path / "run" / "influence_balancing.png") in shown
