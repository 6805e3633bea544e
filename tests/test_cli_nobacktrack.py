"""The command `reproduce nobacktrack`: the runs, the judging of claims, what is written."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest

import jtrunc
from jtrunc.cli import main
from jtrunc.experiments import nobacktrack_runs as runs
from jtrunc.experiments.nobacktrack_figures import (
    BPTT,
    FIGURES,
    KALMAN_RTRL,
    RTRL,
    descent,
    euclidean,
    kalman,
)
from jtrunc.experiments.nobacktrack_runs import Curve, Method, Text
from jtrunc.tasks import counting

FILE = np.asarray(counting.sequences(jax.random.key(3), 200, shortest=1, longest=4).inputs[:, 0])
LEVELS = {"aⁿbⁿ": 0.14, "aⁿbᵖ": 0.28, "CTW depth 9": 1.0}


@pytest.fixture(autouse=True)
def in_float32():
    with jax.enable_x64(False):
        yield


def curve(*bits: float, label: str = "run") -> Curve:
    """Two seeds with the same bits, up to 1000 characters, of which the last point is the last tenth."""
    ends = np.linspace(900, 1000, len(bits), dtype=np.int64)
    return Curve(label, ends, np.repeat(np.array([bits]).T, 2, axis=1), 1.0)


def test_averages_of_a_curve():
    one = Curve("run", np.array([100, 900, 1000]), np.array([[4.0], [2.0], [1.0]]), 1.0)
    np.testing.assert_allclose(one.cumulative[:, 0], [4.0, 2000 / 900, 2.1])
    np.testing.assert_allclose(one.final, [1.0])
    assert one.median_at(1000) == 1.0 and one.median_at(50) == 4.0
    assert 2.0 < one.median_at(300) < 4.0
    lost = one._replace(bits=np.array([[4.0], [2.0], [np.nan]]))
    assert lost.final.tolist() == [math.inf]


@pytest.mark.parametrize("window", [1, 15])
def test_points_are_whole_windows_and_mark_the_last_tenth(window):
    ends = runs.points(20_000, window)
    assert (np.diff(ends) > 0).all() and (ends % window == 0).all()
    assert abs(ends[-1] - 20_000) <= window and min(abs(ends - 18_000)) <= window


def plain(params, alpha: np.ndarray, steps: int) -> np.ndarray:
    """RTRL and its descent as a loop over eq. 4, 12, 37 and 48; the losses in bits, gradients of bits."""
    theta = {name: np.array(leaf, np.float64) for name, leaf in params.recurrent.items()}
    phi = {name: np.array(leaf, np.float64) for name, leaf in params.readout.items()}
    size, hidden, losses = runs.WIDTH, np.zeros(runs.WIDTH), []
    influence = {name: np.zeros((size, *leaf.shape)) for name, leaf in theta.items()}
    units = np.arange(size)
    for t in range(steps):
        x, y = FILE[t % len(FILE)], FILE[(t + 1) % len(FILE)]
        a = 1 / (1 + np.exp(-hidden))
        jacobian = np.diag(alpha) + theta["hidden_kernel"].T * (a * (1 - a))
        influence = {name: np.tensordot(jacobian, leaf, 1) for name, leaf in influence.items()}
        influence["hidden_kernel"][units, :, units] += a
        influence["input_kernel"][units, x, units] += 1
        influence["bias"][units, units] += 1
        hidden = alpha * hidden + a @ theta["hidden_kernel"] + theta["input_kernel"][x] + theta["bias"]
        a = 1 / (1 + np.exp(-hidden))
        logits = a @ phi["kernel"] + phi["bias"]
        p = np.exp(logits - logits.max())
        p /= p.sum()
        losses.append(-np.log2(p[y]))
        error = (p - np.eye(len(p))[y]) / math.log(2)
        into_state = (phi["kernel"] @ error) * a * (1 - a)
        rate = 0.5 / math.sqrt(t + 1)
        phi = {"kernel": phi["kernel"] - rate * np.outer(a, error), "bias": phi["bias"] - rate * error}
        theta = {name: theta[name] - rate * np.tensordot(into_state, influence[name], 1) for name in theta}
    return np.array(losses)


@pytest.mark.slow
def test_the_run_is_the_papers_descent_on_bits_for_every_seed():
    text, steps = Text("blocks", FILE, 3, LEVELS, leaky=True), 900
    program = runs.compile_program(
        Method("RTRL", FIGURES[1].methods[-1].estimator, descent(0.5)), text, [0, 4]
    )
    found = runs.run(program, "RTRL", steps, 1.0)
    assert not np.allclose(found.bits[:, 0], found.bits[:, 1], rtol=0.01)
    for i, seed in enumerate((0, 4)):
        alpha = np.asarray(runs._feedback(True, jax.random.key(seed)), np.float64)
        params = jax.tree.map(lambda leaf, i=i: leaf[i], program.states.params)
        losses = plain(params, alpha, steps)
        starts = np.append(0, found.characters[:-1])
        expected = [losses[a:b].mean() for a, b in zip(starts, found.characters, strict=True)]
        np.testing.assert_allclose(found.bits[:, i], expected, rtol=1e-3)
        assert not np.allclose(found.bits[:, 1 - i], expected, rtol=1e-2)


def test_a_run_that_blows_up_is_a_result():
    text = Text("blocks", FILE, 3, LEVELS, leaky=True)
    exploding = descent(1e38)
    method = Method("RTRL", jtrunc.rtrl, exploding)
    found = runs.run(runs.compile_program(method, text, [0]), "RTRL", 400, 1.0)
    assert np.isnan(found.bits[-1]).all() and np.isinf(found.final).all()


GOOD = {
    1: {**{euclidean(k): (3.0, 2.3) for k in (1, 2, 10)}, RTRL: (3.0, 2.0)},
    2: {**{euclidean(k): (3.0, 2.05) for k in (1, 2, 10)}, RTRL: (3.0, 2.0)},
    3: {**{kalman(k): (3.0, 2.05) for k in (1, 2, 10)}, KALMAN_RTRL: (3.0, 2.0)},
    4: {**{kalman(k): (3.0, 2.2) for k in (1, 2, 10)}, RTRL: (3.0, 2.1), BPTT: (3.0, 2.0)},
    5: {kalman(1): (0.3, 0.17), KALMAN_RTRL: (0.2, 0.15), BPTT: (0.3, 0.27)},
    6: {**{kalman(k): (3.0, 2.05) for k in (1, 2, 10)}, RTRL: (3.0, 2.1), BPTT: (3.0, 2.0)},
}
BAD = {
    1: {RTRL: (3.0, 2.2)},
    2: {euclidean(2): (3.0, 2.4)},
    3: {kalman(10): (0.9, math.nan), kalman(1): (0.5, 0.9)},
    4: {BPTT: (3.0, 2.9), RTRL: (0.8, 0.9)},
    5: {kalman(1): (0.3, 0.29), KALMAN_RTRL: (0.3, 0.3), BPTT: (0.3, 0.2)},
    6: {kalman(2): (3.0, 1.0)},
}
"""Curves that turn every verdict of a figure around."""


@pytest.mark.parametrize("number", FIGURES)
def test_claims_are_judged_by_the_numbers(number):
    def verdicts(bits: dict[str, tuple[float, ...]]) -> set[bool]:
        curves = {label: curve(*values, label=label) for label, values in bits.items()}
        return {claim.holds(curves, LEVELS) for claim in FIGURES[number].claims}

    assert verdicts(GOOD[number]) == {True}
    assert verdicts({**GOOD[number], **BAD[number]}) == {False}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "50"], "--steps must be at least"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--data", "some.txt"], "figure 6 only"),
        (["--figure", "6", "--data", "no/such.txt"], "does not exist"),
    ],
)
def test_wrong_usage_leaves_no_folder(arguments, message, capsys, tmp_path):
    output = tmp_path / "run"
    assert main(["reproduce", "nobacktrack", "--quick", *arguments, "--output", str(output)]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def quick(number: int, folder, *arguments: str) -> dict:
    command = ["reproduce", "nobacktrack", "--quick", "--figure", str(number), *arguments]
    assert main([*command, "--output", str(folder)]) == 0
    assert (folder / f"nobacktrack-figure-{number}.png").stat().st_size > 10_000
    return json.loads((folder / f"nobacktrack-figure-{number}.json").read_text())


@pytest.mark.slow
def test_a_quick_figure_writes_picture_and_numbers(tmp_path, capsys):
    found = quick(5, tmp_path / "run")
    assert list(found["runs"]) == [method.label for method in FIGURES[5].methods]
    assert [claim["claim"] for claim in found["claims"]] == [claim.text for claim in FIGURES[5].claims]
    for one in found["runs"].values():
        assert one["microseconds_per_character"] > 0
        assert len(one["characters"]) == len(one["bits_since_last_point"])
    shown = capsys.readouterr().out
    assert "equal time" in shown and "claim of the paper" in shown


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3, 4, 6])
def test_every_other_figure_runs(number, tmp_path, monkeypatch):
    """Its first and its last algorithm: rank ten takes long to compile."""
    figure = FIGURES[number]
    methods = figure.methods[:: len(figure.methods) - 1]
    monkeypatch.setitem(FIGURES, number, figure._replace(methods=methods, claims=()))
    arguments = []
    if number == 6:
        path = tmp_path / "text.txt"
        path.write_text("Tomorrow, and tomorrow, and tomorrow, creeps in this petty pace. " * 40)
        arguments = ["--data", str(path)]
    found = quick(number, tmp_path / "run", *arguments)
    assert found["text"] == ("text.txt" if number == 6 else "synthetic music")
    bits = found["runs"][methods[0].label]["bits_since_last_point"]
    assert bits[-1][0] < 0.9 * bits[0][0]
