"""The point process: likelihood against numerical integration, the model against formulas, data by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

import jtrunc
from jtrunc import cells
from jtrunc.tasks import book_order, events, point_process
from jtrunc.tasks.events import Event, EventSequence, Target
from jtrunc.tasks.point_process import Intensity
from tests.compare import assert_close, differ

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "book_order"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no folder shared/data beside the repository")

GRID = [(a, w) for a in (-3.0, 0.0, 6.5) for w in (-4.0, -0.3, -1e-9, 0.0, 1e-9, 0.3, 4.0)]
LEVELS, SLOPES = (jnp.asarray(column) for column in zip(*GRID, strict=True))
ALL = Intensity(LEVELS, SLOPES)


def intensity(a: float, w: float) -> Callable[[float], float]:
    """λ as eq. 11 has it."""
    return lambda d: math.exp(a + w * d)


def reach(a: float, w: float) -> float:
    """A gap by which Λ is 30, or as near to its limit as a double can tell."""
    r = w * math.exp(-a)
    return 30 * math.exp(-a) if abs(r) < 1e-6 else math.log1p(30 * r) / w if r > -1 / 31 else 40 / abs(w)


def density(a: float, w: float) -> Callable[[float], float]:
    """f from log_density's own arithmetic in plain Python."""

    def f(d: float) -> float:
        total = math.exp(a) * d if w == 0 else math.exp(a) * math.expm1(w * d) / w
        return math.exp(a + w * d - total)

    return f


def integral(function: Callable[[float], float], end: float) -> float:
    pieces = [0.0, *(end * 2.0**-k for k in range(12, -1, -1))]
    parts = [integrate.quad(function, *pair, epsabs=0, epsrel=1e-11)[0] for pair in pairwise(pieces)]
    return math.fsum(parts)


@pytest.fixture(scope="module")
def compiled() -> dict[str, np.ndarray]:
    """Every function on the whole grid, at a gap each, in one program."""

    @jax.jit
    def run(gaps: jax.Array) -> dict[str, jax.Array]:
        return {
            "log_intensity": point_process.log_intensity(ALL, gaps),
            "compensator": point_process.compensator(ALL, gaps),
            "log_survival": point_process.log_survival(ALL, gaps),
            "log_density": point_process.log_density(ALL, gaps),
            "none": point_process.log_probability_of_none(ALL),
            "expected_gap": point_process.expected_gap(ALL),
        }

    return {name: np.asarray(value) for name, value in run(GAPS).items()}


GAPS = jnp.asarray([0.4 * reach(a, w) / 30 for a, w in GRID])


@pytest.mark.parametrize("index", range(len(GRID)))
def test_likelihood_is_that_of_the_intensity(compiled: dict[str, np.ndarray], index: int) -> None:
    """Λ = ∫ λ, S = e^−Λ, f = λ S; ∫ f is 1, or 1 − exp(e^a / w) where w < 0."""
    (a, w), gap = GRID[index], float(GAPS[index])
    found = {name: values[index] for name, values in compiled.items()}
    total = integral(intensity(a, w), gap)
    assert 1e-3 < total < 40
    np.testing.assert_allclose(found["compensator"], total, rtol=1e-9)
    np.testing.assert_allclose(found["log_survival"], -total, rtol=1e-9)
    np.testing.assert_allclose(math.exp(found["log_intensity"]), intensity(a, w)(gap), rtol=1e-12)
    np.testing.assert_allclose(found["log_density"], math.log(density(a, w)(gap)), rtol=1e-8, atol=1e-9)
    mass = integral(density(a, w), reach(a, w))
    np.testing.assert_allclose(mass, -math.expm1(found["none"]), rtol=1e-8)
    assert (found["none"] == -math.inf) == (w >= 0)


@pytest.mark.parametrize("index", range(len(GRID)))
def test_expected_gap_is_the_integral_of_its_definition(compiled: dict[str, np.ndarray], index: int) -> None:
    """∫ d f / ∫ f: eq. 13, given that an event comes."""
    (a, w), f = GRID[index], density(*GRID[index])
    end = reach(a, w)
    mean = integral(lambda d: d * f(d), end) / integral(f, end)
    np.testing.assert_allclose(compiled["expected_gap"][index], mean, rtol=1e-8)
    assert abs(w) < 1e-6 or abs(compiled["expected_gap"][index] * math.exp(a) - 1) > 1e-4


def test_float32_is_right_to_its_rounding_and_smooth_through_zero() -> None:
    """Values and slopes in float32 against float64, from w d = −60 to 80, by powers of ten through 0."""
    sizes = [10.0**-k for k in range(0, 12)]
    slopes = np.array([0.0, *sizes, *(-s for s in sizes), 80.0, -60.0])
    levels = np.where(slopes == 80.0, -75.0, 0.3)

    def summed(slopes: jax.Array, levels: jax.Array) -> jax.Array:
        return jnp.sum(point_process.compensator(Intensity(levels, slopes), jnp.ones_like(slopes)))

    @jax.jit
    def both(slopes: jax.Array, levels: jax.Array) -> tuple[jax.Array, ...]:
        value = point_process.compensator(Intensity(levels, slopes), jnp.ones_like(slopes))
        return value, *jax.grad(summed, (0, 1))(slopes, levels)

    wide = both(jnp.asarray(slopes), jnp.asarray(levels))
    narrow = both(jnp.asarray(slopes, jnp.float32), jnp.asarray(levels, jnp.float32))
    for right, found in zip(wide, narrow, strict=True):
        assert found.dtype == np.float32 and np.isfinite(found).all()
        np.testing.assert_allclose(found, right, rtol=1e-5)
    # dΛ/dw at w = 0 is e^a d² / 2.
    np.testing.assert_allclose(wide[1][0], math.exp(0.3) / 2, rtol=1e-12)
    # What the naive formula makes of it: 0/0 at 0, and no correct digit at w = 1e-8.
    with np.errstate(invalid="ignore", divide="ignore"):
        naive = (np.exp(slopes.astype(np.float32)) - 1) / slopes.astype(np.float32)
    assert np.isnan(naive[0]) and not 0.9 < naive[9] < 1.1


def test_expected_gap_in_float32() -> None:
    levels = jnp.asarray([-9.0, -3.0, 0.0, 6.7, 7.0])
    slopes = jnp.asarray([1.0, -5.0, 0.0, -3.0, 40.0])
    expected_gap = jax.jit(point_process.expected_gap)
    wide = expected_gap(Intensity(levels, slopes))
    narrow = expected_gap(Intensity(levels.astype(jnp.float32), slopes.astype(jnp.float32)))
    assert narrow.dtype == np.float32
    np.testing.assert_allclose(narrow, wide, rtol=2e-6)


MARKS, EMBEDDING, STEPS = 3, 4, 4


def stream(steps: int = STEPS) -> tuple[Event, Target]:
    generator = np.random.default_rng(7)
    marks, gaps = generator.integers(0, MARKS, (2, steps, 2)), generator.exponential(size=(2, steps, 2))
    times = jnp.asarray(np.cumsum(gaps[0], axis=0))
    marks, gaps = jnp.asarray(marks, jnp.int32), jnp.asarray(gaps)
    return Event(marks[0], gaps[0], times), Target(marks[1], gaps[1])


def build(width: int = 5, **options: Any) -> tuple[point_process.Model, Any]:
    """Two LSTM layers and parameters away from their initial values."""
    cell = cells.stack([cells.lstm(EMBEDDING + 2, width), cells.lstm(width, width)])
    net = point_process.model(cell, MARKS, EMBEDDING, **options)
    params, generator = net.init(jax.random.key(0), jnp.float64), np.random.default_rng(8)
    return net, jax.tree.map(lambda leaf: leaf + jnp.asarray(0.2 * generator.normal(size=leaf.shape)), params)


@pytest.mark.slow
def test_model_is_its_formulas() -> None:
    """Embedding, concatenation, two cells, two readouts, written out; loss and gradient of a window."""
    net, params = build()
    inputs, hidden = stream(), net.initial_hidden((2,), jnp.float64)
    lower, upper = cells.lstm(EMBEDDING + 2, 5).transition, cells.lstm(5, 5).transition

    def by_hand(params: Any) -> Any:
        (bottom, top), (low, high), total = params.recurrent, hidden, 0.0
        for t in range(STEPS):
            (mark, gap, time), (next_mark, next_gap) = jax.tree.map(lambda leaf, t=t: leaf[t], inputs)
            x = jnp.concatenate([bottom["embedding"][mark], gap[:, None], time[:, None]], axis=1)
            low = lower(bottom["cell"], low, x)
            high = upper(top, high, low[1])
            of_mark, of_time = params.readout["mark"], params.readout["time"]
            logits = jax.nn.log_softmax(high[1] @ of_mark["kernel"] + of_mark["bias"][None])
            a, w = high[1] @ of_time["kernel"] + of_time["bias"], of_time["slope"]
            log_f = a + w * next_gap - jnp.exp(a) / w * (jnp.exp(w * next_gap) - 1)
            total += jnp.mean(-log_f - logits[jnp.arange(2), next_mark])
        return total

    estimator = jtrunc.bptt(net.system)
    state, update = estimator.init(params, hidden), jax.jit(estimator.update)
    estimate, _ = update(params, state, inputs)
    loss, grads = jax.jit(jax.value_and_grad(by_hand))(params)
    assert_close(estimate.loss, loss)
    assert_close(estimate.grads, grads, rtol=1e-8)
    parts = estimate.aux.loss
    np.testing.assert_allclose(jnp.sum(parts.mark + parts.time), loss, rtol=1e-12)
    # Another mark, or another time, is another gradient.
    event, target = inputs
    for other in (event._replace(mark=2 - event.mark), event._replace(time=event.time + 1.0)):
        changed, _ = update(params, state, (other, target))
        assert differ(changed.grads, grads)


@pytest.mark.slow
def test_engines_agree_on_the_folded_embedding() -> None:
    """The structure, which holds a product of parameters, against the generic path and forward mode."""
    net = point_process.model(cells.tanh(EMBEDDING + 2, 5), MARKS, EMBEDDING)
    params = net.init(jax.random.key(0), jnp.float64)
    inputs = jax.tree.map(lambda leaf: leaf[:, 0], stream())
    hidden = net.initial_hidden((), jnp.float64)
    plain = net.system._replace(structure=None)
    found = []
    for estimator in (jtrunc.bptt(plain), jtrunc.bptt(net.system), jtrunc.rtrl(net.system)):
        found.append(jax.jit(estimator.update)(params, estimator.init(params, hidden), inputs)[0].grads)
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])
    assert set(found[0].recurrent) == {"embedding", "cell"}
    read = np.unique(inputs[0].mark)  # rows of marks that came have a gradient, and no others
    assert np.flatnonzero(np.abs(found[0].recurrent["embedding"]).min(axis=1)).tolist() == read.tolist()


def test_score_reports_errors_of_both_predictions() -> None:
    logits = jnp.asarray([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    rates = jnp.asarray([1.0, 2.0, 4.0])
    prediction = point_process.Prediction(logits, Intensity(jnp.log(rates), jnp.asarray(0.0)))
    target = Target(jnp.asarray([0, 0, 0]), jnp.asarray([1.5, 0.5, 1.25]))
    loss, scores = jax.jit(point_process.score)(prediction, target)
    assert_close(loss, scores.mark + scores.time)
    np.testing.assert_allclose(scores.mark_error, 1 / 3, rtol=1e-12)
    np.testing.assert_allclose(scores.squared_error, (0.25 + 0.0 + 1.0) / 3, rtol=1e-9)
    np.testing.assert_allclose(scores.time, (1.5 + 1.0 - math.log(2) + 5.0 - math.log(4)) / 3, rtol=1e-12)


def test_wrong_sizes() -> None:
    with pytest.raises(ValueError, match="the cell has input size 6, but it reads 7 features"):
        net = point_process.model(cells.stack([cells.gru(6, 2), cells.tanh(2, 2)]), 2, 5)
        jax.eval_shape(net.init, jax.random.key(0))
    with pytest.raises(ValueError, match="`num_marks` must be at least 1"):
        point_process.model(cells.tanh(4, 2), 0, 2)
    with pytest.raises(ValueError, match="num_nodes must be at least 1"):
        point_process.expected_gap(ALL, num_nodes=0)


def sequence(*times: float) -> EventSequence:
    return EventSequence(np.array(times), np.arange(len(times)) % 2)


def test_lanes_predict_each_event_but_the_first_once_and_never_across_sequences() -> None:
    generator = np.random.default_rng(2)
    times = [1e3 + np.cumsum(generator.exponential(1e-3, size=n)) for n in (7, 5, 9, 2)]
    marks = [generator.integers(0, 3, len(row)) for row in times]
    data = [EventSequence(*pair) for pair in zip(times, marks, strict=True)]
    streams = events.lanes(data, 3)
    assert {leaf.shape for leaf in jax.tree.leaves(streams)} == {(6, 3)}  # 6 + 4 + 8 + 1 = 19 steps
    flat = jax.tree.map(lambda leaf: leaf.T.ravel(), streams)
    gaps = np.concatenate([np.diff(row) for row in times])[:18]
    np.testing.assert_array_equal(flat.targets.gap, gaps.astype(np.float32))
    np.testing.assert_array_equal(flat.targets.mark, np.concatenate([row[1:] for row in marks])[:18])
    np.testing.assert_array_equal(flat.events.mark, np.concatenate([row[:-1] for row in marks])[:18])
    assert np.flatnonzero(flat.resets).tolist() == [0, 6, 10, 12]  # 12: a stream that begins inside
    assert flat.events.gap[0] == np.float32(times[0][0]) and flat.events.gap[7] == np.float32(gaps[6])
    # Differences of times in float32 would be another thing.
    assert np.abs(np.diff(times[0].astype(np.float32)) / np.diff(times[0]) - 1).max() > 1e-3
    assert streams.inputs == (streams.events, streams.targets)
    assert streams.inputs_with_resets[0] is streams.resets


BAD_SEQUENCES = {
    "decreasing": ([sequence(1.0, 0.5)], 1, r"sequence 0: time 0.5 of event 1 lies before"),
    "before the beginning": (
        [sequence(0.0, 1.0), sequence(-1.0, 0.0)],
        1,
        "sequence 1: time -1.0 of event 0",
    ),
    "one event": ([sequence(1.0)], 1, r"sequence 0 has times of shape \(1,\)"),
    "a mark too many": ([EventSequence(np.ones(2), np.zeros(3))], 1, r"marks of shape \(3,\)"),
    "not a number": ([sequence(0.0, math.nan, 1.0)], 1, "sequence 0: time nan of event 1"),
    "an infinite time": ([sequence(0.0, math.inf)], 1, "sequence 0: time inf of event 1"),
    "half a mark": ([EventSequence(np.arange(2.0), np.array([0.5, 1.7]))], 1, "marks must be integers"),
    "a negative mark": ([EventSequence(np.arange(2.0), np.array([0, -1]))], 1, "marks must be integers"),
    "too many streams": ([sequence(0.0, 1.0)], 2, "num_streams = 2 needs at least as many steps"),
    "no sequence": ([], 1, "the 0 sequences have 0"),
}


@pytest.mark.parametrize("name", BAD_SEQUENCES)
def test_bad_sequences(name: str) -> None:
    sequences, num_streams, message = BAD_SEQUENCES[name]
    with pytest.raises(ValueError, match=message):
        events.lanes(sequences, num_streams)


FILES = {
    "time-1-train.txt": "0.0 0.5 2.0\n0.1 0.2\n",
    "event-1-train.txt": "1 2 2\n2 1\n",
    "time-1-test.txt": "0.5 1.0\n0.25 1.5\n0.5 0.75\n0 3\n",
    "event-1-test.txt": "1 1\n2 2\n1 2\n2 1\n",
}


def write(folder: Path, **changed: str) -> Path:
    for name, content in (FILES | {k.replace("_", "-") + ".txt": v for k, v in changed.items()}).items():
        (folder / name).write_text(content)
    return folder


def test_book_order_by_hand(tmp_path: Path) -> None:
    data = book_order.load(write(tmp_path), verify=False)
    assert [len(part) for part in data] == [2, 2, 2]
    assert data.train[0].times.tolist() == [0.0, 0.5, 2.0] and data.train[0].marks.tolist() == [0, 1, 1]
    assert data.test[1].times.tolist() == [0.0, 3.0] and data.valid[1].marks.tolist() == [1, 1]
    seconds = book_order.load(tmp_path, unit="seconds", verify=False)
    assert seconds.train[0].times.tolist() == [0.0, 30.0, 120.0]


def test_bad_book_order(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"time-1-train.txt does not exist; give the folder .*NeuralPoint"):
        book_order.load(tmp_path)
    with pytest.raises(
        ValueError, match=r"time-1-train.txt is not the published file.*21fdd877.*verify=False"
    ):
        book_order.load(write(tmp_path))
    with pytest.raises(ValueError, match="unit must be one of minutes, seconds, milliseconds, got 'hours'"):
        book_order.load(tmp_path, unit="hours")
    for changed, message in (
        ({"event_1_train": "1 2\n2 1\n"}, "train files .* lines of unequal length"),
        ({"event_1_train": "1 2 3\n2 1\n"}, r"event-1-train.txt .* marks beside 1 \(buy\)"),
        ({"time_1_test": "0.5 x\n"}, "time-1-test.txt has a line that is not all numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            book_order.load(write(tmp_path, **changed), verify=False)


@needs_data
def test_book_order_is_the_published_one() -> None:
    """Counts, and what the docstring says of unit, cut and reference."""
    data = book_order.load(DATA)
    assert [len(part) for part in data] == [100, 50, 50]
    assert [sum(len(s.times) for s in part) for part in data] == [331_900, 41_450, 41_450]
    times = np.stack([s.times for s in data.train])
    milliseconds = times * book_order.UNITS["milliseconds"]
    assert np.abs(milliseconds - milliseconds.round()).max() < 1e-4
    held_out = (*data.valid, *data.test)
    assert abs(sum(s.times[-1] for s in (*data.train, *held_out)) - 510.8) < 0.05
    agree = np.mean([a.marks[-1] == b.marks[0] for a, b in zip(data.train, held_out, strict=True)])
    elsewhere = np.mean([a.marks[-1] == b.marks[0] for a, b in zip(data.train, data.train[1:], strict=False)])
    assert agree > 0.6 and elsewhere < 0.54
    train, test = events.lanes(data.train, 64), events.lanes(data.test, 50)
    assert train.resets.shape == (5184, 64) and test.resets.shape == (828, 50) and test.resets.sum() == 50
    assert events.lanes(data.train, 100).events.time[0].max() == np.float32(times[:, 0].max())
    constant = point_process.constant_rate(train, test)
    assert abs(constant.mark + constant.time + 5.14) < 0.005 and abs(constant.mark_error - 0.383) < 5e-4
    assert abs(math.sqrt(constant.squared_error) - 0.00394) < 5e-6
