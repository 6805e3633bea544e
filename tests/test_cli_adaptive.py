"""The command `reproduce adaptive`: the runs, the table and its claims, what is written, how it goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtrunc.cli import main
from jtrunc.experiments import adaptive, adaptive_figures, adaptive_runs
from jtrunc.experiments.adaptive_runs import Method, Training, optimizer_of
from jtrunc.experiments.adaptive_tasks import EXPERIMENTS, Size, whole_blocks
from jtrunc.tasks import point_process

STEPS = 120
TINY = ["--steps", str(STEPS), "--epochs", "3", "--width", "4", "--streams", "4", "--estimate-every", "60"]


@pytest.fixture(autouse=True)
def in_float32():
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="module", autouse=True)
def small_lags():
    """The estimates look back 20 steps instead of 100."""
    with pytest.MonkeyPatch.context() as patch:
        small = EXPERIMENTS["copy"]._replace(num_lags=20, max_length=12, initial_length=6)
        patch.setitem(EXPERIMENTS, "copy", small)
        yield
    for cached in (adaptive.prepare, adaptive.report_of, adaptive.program_of):
        cached.cache_clear()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A tiny run of a fixed and of an adaptive method: its folder, and what it printed."""
    import contextlib
    import io

    folder, shown = tmp_path_factory.mktemp("adaptive") / "run", io.StringIO()
    with jax.enable_x64(False), contextlib.redirect_stdout(shown):
        assert command(folder) == 0
    return folder, shown.getvalue()


def command(folder: Path, *more: str) -> int:
    methods = ["--methods", "K=3", "delta=0.5"]
    return main(["reproduce", "adaptive", *TINY, *methods, "--seeds", "1", "--output", str(folder), *more])


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


@pytest.mark.slow
def test_table_pictures_and_numbers(finished):
    folder, shown = finished
    for name in ("curves.png", "gradient_norms.png"):
        assert (folder / name).stat().st_size > 10_000
    for words in (
        "paper",
        "1.024 (0.003)",
        "epochs to 1.05",
        "delta=0.5 goes to 1.0",
        "weight decay 1e-05",
        "width 4, streams 4, steps 120 (the paper: width 50, streams 64, steps 4000)",
    ):
        assert words in shown
    found = json.loads((folder / "summary.json").read_text())
    assert list(found["runs"]) == ["K=3", "delta=0.5"]
    for label, (run,) in found["runs"].items():
        valid = [line["valid"] for line in run["epochs"]]
        best = int(np.argmin(valid))
        assert run["valid"] == valid[best] == run["epochs"][-1]["best_valid"]
        assert run["test"] == run["epochs"][best]["best_test"] == run["epochs"][-1]["best_test"]
        assert f"{math.exp(run['valid']):.3f}" in shown
        assert np.shape(run["norms"]["curve"]) == (21,) and len(run["norms"]["draws"]) >= 4
        assert run["epochs"] == lines(folder / label / "seed-0")


@pytest.mark.slow
def test_epochs_count_the_data_of_the_estimates(finished):
    folder, _ = finished
    fixed, chosen = lines(folder / "K=3" / "seed-0"), lines(folder / "delta=0.5" / "seed-0")
    assert [line["data_epochs"] for line in fixed] == [1.0, 2.0, 3.0]
    assert [line["update"] * 3 for line in fixed] == [STEPS, 2 * STEPS, 3 * STEPS]
    read = 20 + EXPERIMENTS["copy"].num_times
    counts = [line["estimation_steps"] / read for line in chosen]
    assert counts == sorted(counts) and all(count == int(count) for count in counts)
    assert 3 <= counts[-1] <= 6, "two estimates an epoch, the first after 60 steps"
    for number, line in enumerate(chosen, start=1):
        overshoot = STEPS * line["data_epochs"] - line["estimation_steps"] - STEPS * number
        assert 0 <= overshoot < 12 and 2 <= line["length"] <= 12
    assert len({line["mean_length"] for line in chosen}) > 1, "K never moved"


@pytest.mark.slow
def test_a_finished_run_is_kept(finished, capsys):
    folder, _ = finished
    path = folder / "delta=0.5" / "seed-0" / "result.json"
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert command(folder, "--resume") == 0
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert command(folder, "--resume", "--clip", "0") == 2
    assert "made with --clip 1.0, not 0.0" in capsys.readouterr().err
    assert command(folder) == 2


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_stopped(finished, tmp_path, monkeypatch):
    folder, _ = finished
    config = adaptive.Adaptive(
        steps=STEPS, epochs=3, width=4, streams=4, estimate_every=60, methods=("K=3", "delta=0.5"),
        seeds=1, output=folder,
    )  # fmt: skip
    method = Method(tolerance=0.5)
    program = adaptive.program_of(config, method)  # the one that the command has compiled
    experiment, problem, training = adaptive.prepare(config)
    monkeypatch.setattr(adaptive_runs, "SAVE_EVERY", 0.0)

    def interrupt(epochs: int) -> None:
        if epochs:
            raise KeyboardInterrupt

    arguments = (experiment, problem, program, method, training, 0, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        adaptive_runs.run(*arguments, interrupt)
    assert len(lines(tmp_path / "run")) == 1 and not (tmp_path / "run" / "result.json").exists()
    adaptive_runs.run(*arguments)
    straight = lines(folder / "delta=0.5" / "seed-0")
    assert untimed(lines(tmp_path / "run")) == untimed(straight)
    adaptive_runs.run(*arguments[:-2], 1, tmp_path / "other")
    assert untimed(lines(tmp_path / "other")) != untimed(straight)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_step_is_that_of_the_published_runs(clip):
    """γ √K (clip(g) + decay · θ), for a fixed and for an adaptive method of the same K."""
    theta, grad, size = jnp.array([1.0, -2.0]), jnp.array([3.0, 4.0]), 16
    training = Training(1, clip, 0.01, 1)
    clipped = grad * (1 / size / 5 if clip else 1.0)
    expected = -1.0 * 4 * (clipped + 0.01 * theta)
    for method, extra in ((Method(length=size), {}), (Method(tolerance=0.5), {"truncation_length": size})):
        optimizer: Any = optimizer_of(EXPERIMENTS["copy"], method, training)
        step, _ = optimizer.update(grad, optimizer.init(theta), theta, **extra)
        np.testing.assert_allclose(step, expected, rtol=1e-6)


@pytest.mark.parametrize("length", [10, (5, 10)])
def test_the_copy_data_break_no_rule_where_the_circle_closes(length):
    inputs, targets = whole_blocks(3, 200, 5, length)
    for x, y in zip(inputs.T, targets.T, strict=True):
        at, sizes = 0, []
        while at < 200:
            m = int(np.argmax(x[at:] == 7))
            assert (y[at : at + m] == 6).all() and (x[at + m + 1 : at + 2 * m] == 6).all()
            assert (y[at + m : at + 2 * m] == x[at : at + m]).all()
            at, sizes = at + 2 * m, [*sizes, m]
        assert at == 200 and set(sizes) <= set(range(5, 11))
        assert (len(set(sizes)) == 1) is (length == 10)


def made(label: str, *valid: float, data: float = 1.0) -> dict[str, Any]:
    """A run with these perplexities, an epoch each, of `data` epochs of data."""
    best = np.log(np.minimum.accumulate(valid)).tolist()
    epochs = [{"best_valid": b, "data_epochs": data * (i + 1)} for i, b in enumerate(best)]
    return {"method": label, "valid": best[-1], "test": best[-1], "epochs": epochs}


def held(results: dict[str, list[dict[str, Any]]]) -> list[bool]:
    return [claim["held"] for claim in adaptive_figures.claims(EXPERIMENTS["copy"], results)]


def test_claims_are_judged_by_the_numbers():
    good = {
        "K=5": [made("K=5", 2.0, 1.6), made("K=5", 2.0, 1.7)],
        "K=15": [made("K=15", 1.5, 1.2, 1.02), made("K=15", 1.5, 1.2, 1.03)],
        "delta=0.5": [made("delta=0.5", 1.5, 1.02, data=1.1), made("delta=0.5", 1.2, 1.02, data=1.1)],
    }
    assert held(good) == [True, True, True, True, True]
    late = [made("delta=0.5", 1.5, 1.2, 1.02, data=1.1)] * 2
    assert held({**good, "delta=0.5": late}) == [True, True, True, False, False]
    between = [made("delta=0.5", 1.04, 1.04, 1.04, 1.02)] * 2
    assert held({**good, "delta=0.5": between}) == [True, True, True, False, True]
    stuck = [made("delta=0.5", 1.5, 1.2)] * 2
    bad = {"K=5": [good["K=5"][0], made("K=5", 1.04)], "K=15": good["K=15"], "delta=0.5": stuck}
    assert held(bad) == [False, True, False, False, False]
    diverged = {**good, "delta=0.5": [made("delta=0.5", math.inf)] * 2}
    assert held(diverged) == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--clip", "-1"], "--clip must not be negative"),
        (["--epochs", "-1"], "--epochs must not be negative"),
        (["--methods", "K=15", "K=0"], "unknown method 'K=0'"),
        (["--methods", "gamma=0.5"], "unknown method 'gamma=0.5'"),
        (["--methods", "delta=nan"], "unknown method 'delta=nan'"),
        (["--data", "some"], "leave out --data"),
        (["--task", "self-exciting", "--data", "some"], "leave out --data"),
        (["--task", "book-order"], "needs --data"),
        (["--task", "book-order", "--data", "no/such"], "does not exist"),
        (["--steps", "6"], "too short for whole blocks"),
        (["--resume"], "no run to resume"),
    ],
)
def test_wrong_usage_leaves_no_folder(arguments, message, capsys, tmp_path):
    output = tmp_path / "run"
    assert main(["reproduce", "adaptive", *arguments, "--output", str(output)]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.slow
def test_a_point_process_is_measured_by_its_predictions():
    problem = EXPERIMENTS["self-exciting"].problem(Size(4, 2, 32), None)
    params, hidden = problem.model.init(jax.random.key(0)), problem.model.initial_hidden((2,))
    events, targets = problem.test

    @jax.jit
    def step(hidden: Any, inputs: Any) -> Any:
        hidden = problem.model.system.transition(params.recurrent, hidden, inputs)
        said: Any = problem.model.predict(params, hidden)
        wrong = jnp.argmax(said.logits, axis=-1) != inputs[1].mark
        return hidden, wrong, jnp.square(point_process.expected_gap(said.intensity) - inputs[1].gap)

    wrong, squares = [], []
    for t in range(len(events.mark)):
        hidden, *said = step(hidden, jax.tree.map(lambda leaf, t=t: leaf[t], (events, targets)))
        wrong += said[0].tolist()
        squares += said[1].tolist()
    assert problem.measures is not None and len(wrong) == 16
    found = problem.measures(params, problem.test)
    assert found["0-1 loss"] == pytest.approx(np.mean(wrong))
    assert found["1 RMSE(t)"] == pytest.approx(math.sqrt(np.mean(squares)), rel=1e-4)
    assert (np.asarray(events.time) == 0).all()
