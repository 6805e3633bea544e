"""The command `reproduce target-propagation`: cells, table and claims, pictures, what is written and kept."""

from __future__ import annotations

import contextlib
import io
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtrunc import cells
from jtrunc.cli import main
from jtrunc.experiments import parts, target_propagation, target_propagation_runs
from jtrunc.experiments import target_propagation_figures as figures
from jtrunc.experiments.names import choose
from jtrunc.experiments.target_propagation_tables import TABLES, Method, Settings, grid_of
from jtrunc.tasks import words

TINY = [
    "--block-lengths",
    "2",
    "--widths",
    "4",
    "--streams",
    "2",
    "--blocks",
    "3",
    "--steps",
    "28",
    "--epochs",
    "2",
]
RATES = ["--rate", "0.1", "--hidden-rate", "0.1", "--penalty", "1", "--dual-rate", "1"]


def made_up_corpus(folder: Path, max_vocabulary: int | None) -> words.Corpus:
    """200 words to learn from."""
    letters = np.random.default_rng(0).choice(list("aaabbcd"), 500)
    (folder / "text.txt").write_text("\n".join(" ".join(row) for row in letters.reshape(50, 10)) + "\n")
    return words.words(folder / "text.txt", fractions=(0.4, 0.3, 0.3), max_vocabulary=max_vocabulary)


@pytest.fixture(autouse=True)
def in_float32():
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="module")
def made_up(tmp_path_factory) -> Any:
    """The tables with a corpus of 200 words; the folder of their data."""
    with pytest.MonkeyPatch.context() as patch:
        for name, given in list(TABLES.items()):
            patch.setitem(TABLES, name, given._replace(load=made_up_corpus))
        yield tmp_path_factory.mktemp("data")
    target_propagation.corpus_of.cache_clear()
    target_propagation.prepare.cache_clear()


def command(data: Path, folder: Path, *more: str) -> int:
    given = ["--data", str(data), "--methods", "K=2,width=4", "B=2,H=1,width=4", "--output", str(folder)]
    return main(["reproduce", "target-propagation", *TINY, *RATES, *given, *more])


@pytest.fixture(scope="module")
def finished(made_up, tmp_path_factory) -> tuple[Path, Path, str]:
    """A tiny run of BPTT and of target propagation: data, folder, and what it printed."""
    folder, shown = tmp_path_factory.mktemp("target") / "run", io.StringIO()
    with jax.enable_x64(False), contextlib.redirect_stdout(shown):
        assert command(made_up, folder) == 0
    return made_up, folder, shown.getvalue()


@pytest.mark.slow
def test_cells_are_trained_and_kept(finished):
    data, folder, shown = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert [run["label"] for run in summary["runs"]] == ["B=2,H=1,width=4", "K=2,width=4"]
    target, bptt = summary["runs"]
    for run in (target, bptt):
        assert np.shape(run["valid"]) == np.shape(run["loss"]) == (2, 2), "epochs and seeds"
        assert run["best"] == np.min(run["valid"], axis=0).tolist() and run["epochs"] == [1.0, 2.0]
        assert f"{np.exp(run['best']).mean():.2f}" in shown
    assert np.min(target["primal_residual"]) > 0.0
    for words_shown in ("48 of 220", "6 for B = 2", "lambda=1,u=1,h=0.1,theta=0.1", "BPTT (K = B)"):
        assert words_shown in shown
    assert (folder / "hidden_steps.png").stat().st_size > 10_000 < (folder / "curves.png").stat().st_size

    config = target_propagation.TargetPropagation(
        data=data, block_lengths=(2,), widths=(4,), streams=2, blocks=3, steps=28, epochs=2,
        rate=0.1, output=folder.parent / "other",
    )  # fmt: skip
    none = target_propagation.run_one(config, (Method(2, 0, width=4), Settings(1.0, 1.0, 0.1, 0.1)))
    np.testing.assert_allclose(none["loss"][0], bptt["loss"][0], rtol=1e-5)
    np.testing.assert_allclose(none["valid"][0], bptt["valid"][0], rtol=1e-5)
    assert np.abs(np.subtract(target["valid"][0], bptt["valid"][0])).min() > 1e-4

    path = folder / "B=2,H=1,width=4" / "lambda=1,u=1,h=0.1,theta=0.1" / "result.json"
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert command(data, folder, "--resume") == 0
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert command(data, folder, "--resume", "--seeds", "3") == 2 == command(data, folder)


def test_an_estimator_has_what_its_cell_asks_for(monkeypatch):
    given: list[dict[str, Any]] = []
    fake = lambda system, block_length, penalty, **options: given.append(  # noqa: E731
        {"penalty": penalty, "block_length": block_length} | options
    )
    monkeypatch.setattr(target_propagation_runs.jtrunc, "target_propagation", fake)
    system = cells.model(cells.gru(3, 4), 3, cells.softmax_cross_entropy).system
    make: Any = partial(target_propagation_runs.estimator_of, system, streams=5, steps=60)
    settings = Settings(penalty=0.5)
    make(table=TABLES["batch"], method=Method(10, 2), settings=settings)
    make(table=TABLES["minibatch"], method=Method(20, 5), settings=settings)
    make(table=TABLES["hidden-steps-zero"], method=Method(20, 0, "predicted", False), settings=settings)
    said = [
        (g["block_length"], g["penalty"], g["hidden_steps"], g["initial"], g["num_blocks"]) for g in given
    ]
    assert said == [(10, 0.1, 2, "persistent", 6), (20, 0.1, 5, "forward", 3), (20, 0.0, 0, "predicted", 3)]


def test_tables_have_the_cells_of_the_paper():
    def labels(name: str, **options: Any) -> list[str]:
        config = target_propagation.TargetPropagation(table=name, **options)  # type: ignore[arg-type]
        return [method.label for method in target_propagation.chosen(config)]

    assert len(labels("minibatch")) == len(labels("batch")) == len(labels("text8")) == 12
    for name in ("minibatch", "batch", "text8"):
        assert set(TABLES[name].published) == set(labels(name))
    assert TABLES["minibatch"].published["B=10,H=2"] == 131.04 and TABLES["batch"].published["K=20"] == 183.91
    assert TABLES["text8"].published["B=5,H=5"] == 241.47
    two = [f"B=20,{rest}" for rest in ("H=1", "H=0", "H=0")]
    assert labels("hidden-steps-zero")[:3] == [
        f"{two[0]},forward",
        f"{two[1]},forward",
        f"{two[2]},forward,lambda=0",
    ]
    assert labels("hidden-size", widths=(8, 16))[3:] == [
        f"{m},width=16" for m in ("B=10,H=2", "B=10,H=5", "K=10")
    ]
    assert labels("minibatch", methods=("K=5", "B=20,H=5")) == ["K=5", "B=20,H=5"]
    points = [point.label(Method(5, 1)) for point in grid_of(Method(5, 1))]
    assert len(set(points)) == 81 and points[0] == "lambda=1,u=1,h=0.1,theta=0.1"
    assert [point.label(Method(5)) for point in grid_of(Method(5))] == [
        "theta=0.1",
        "theta=0.01",
        "theta=0.001",
    ]


def result(method: Method, *perplexities: float, **settings: float) -> dict[str, Any]:
    """A run whose seeds end with these perplexities."""
    best = np.log(perplexities).tolist()
    return {
        "method": method._asdict(), "label": method.label, "settings": Settings(**settings)._asdict(),
        "epochs": [1.0], "valid": [best], "best": best, "diverged": False,
    }  # fmt: skip


def held(name: str, results: list[dict[str, Any]]) -> list[bool]:
    return [claim["held"] for claim in figures.claims(TABLES[name], figures.best_settings(results))]


def test_table_one_is_judged_by_its_numbers(capsys):
    good = [
        result(Method(10, 1), 90, 92),
        result(Method(10, 2), 93),
        result(Method(10, 5), 95),
        result(Method(10), 88),
    ]
    assert held("minibatch", good) == [True, True, True]
    assert held("minibatch", [result(Method(10, 1), 94), *good[1:]]) == [True, False, True]
    assert held("minibatch", [*good[:3], result(Method(10), 90.9)]) == [True, True, True]
    assert held("minibatch", [*good[:3], result(Method(10), 91.1)]) == [False, True, True]
    assert held("minibatch", good[:3]) == []
    better = result(Method(10, 1), 80, 82, penalty=1.0)
    assert held("minibatch", [*good, better, result(Method(10, 1), 99)]) == [False, True, True]
    assert held("minibatch", [*good[:3], result(Method(10), math.inf)]) == [False, True, True]
    figures.print_table(TABLES["minibatch"], figures.best_settings([*good, better]))
    shown = capsys.readouterr().out
    assert "H-steps = 1   81.00 (1.41)  130.93" in shown and "91.00" not in shown
    assert "129.50" in shown, "decimals as in the paper"
    narrow = [result(Method(10, 1, width=4), 90), result(Method(10, width=4), 88)]
    figures.print_table(TABLES["minibatch"], figures.best_settings(narrow))
    assert "130.93" in capsys.readouterr().out, "the paper's, whatever the width"


def test_table_two_is_judged_by_its_numbers(capsys):
    one, none = Method(20, 1, "predicted"), Method(20, 0, "predicted")
    good = [result(one, 90, 93), result(none, 89, 91), result(none._replace(penalized=False), 92, 96)]
    assert held("hidden-steps-zero", good) == [True, True]
    figures.print_table(TABLES["hidden-steps-zero"], figures.best_settings(good))
    shown = capsys.readouterr().out
    assert "-1.50 (0.71)" in shown and "-0.40" in shown and "+2.50 (0.71)" in shown and "+2.36" in shown
    same = [result(one, 90), result(none, 90), result(none._replace(penalized=False), 90.001)]
    assert held("hidden-steps-zero", same) == [True, False], "equal is not worse"
    forward = [result(method._replace(initial="forward"), 90) for method in (one, none)]
    forward += [result(none._replace(initial="forward", penalized=False), 95)]
    assert held("hidden-steps-zero", forward) == [True], "from the forward states λ cannot matter"


def test_figure_three_is_judged_by_its_numbers(tmp_path, capsys):
    numbers = {8: (95, 96, 100), 16: (92, 93, 90), 32: (90, 91, 85)}
    results = [
        result(Method(10, steps, width=width), perplexity)
        for width, row in numbers.items()
        for steps, perplexity in zip((2, 5, None), row, strict=True)
    ]
    assert held("hidden-size", results) == [True] * 4
    assert held("hidden-size", [*results[:2], result(Method(10, width=8), 80), *results[3:]]) == [False] * 4
    best = figures.best_settings(results)
    figures.print_table(TABLES["hidden-size"], best)
    assert "   16  92.00                93.00 " in capsys.readouterr().out
    for path in figures.pictures(TABLES["hidden-size"], best, tmp_path):
        assert path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--block-lengths", "5", "0"], "--block-lengths must be at least 1, got 5 0"),
        (["--penalty", "-1"], "--penalty must be finite and not negative"),
        (["--rate", "inf"], "--rate must be finite"),
        (["--methods", "B=10,H=3"], "unknown method 'B=10,H=3'"),
        (["--steps", "20"], "--steps 20 is too short: an update of all methods takes 160"),
        (["--resume"], "no run to resume"),
    ],
)
def test_wrong_usage_leaves_no_folder(arguments, message, capsys, tmp_path, made_up):
    output = tmp_path / "run"
    given = ["--data", str(made_up), "--output", str(output)]
    assert main(["reproduce", "target-propagation", *given, *arguments]) == 2
    assert message in capsys.readouterr().err and not output.exists()
    assert main(["reproduce", "target-propagation", "--table", "text8", "--output", str(output)]) == 2
    assert "--table text8 needs --data: the folder of the file text8" in capsys.readouterr().err


def test_the_estimator_by_name():
    text = "target-propagation:block-length=3,blocks=2,num-blocks=6,initial=predicted,hidden-rate=0.5"
    chosen = choose(text, parts.ESTIMATORS, "estimator")
    model = cells.model(cells.gru(5, 4), 5, cells.softmax_cross_entropy)
    estimator, window, consumed = chosen.make(model.system, **chosen.options)
    params, hidden = jax.eval_shape(model.init, jax.random.key(0)), model.initial_hidden((2,))
    state = jax.eval_shape(estimator.init, params, hidden)
    inputs = jnp.zeros((window, 2), jnp.int32)
    estimate, after = jax.eval_shape(estimator.update, params, state, (inputs, inputs))
    assert window == consumed == 6 and "primal_residual" in estimate.aux.diagnostics
    assert after.multipliers.shape == after.free.shape == (6, 2, 4)


def test_adagrad_by_name_has_steps_of_any_scale():
    chosen = choose("adagrad", parts.OPTIMIZERS, "optimizer")
    optimizer = chosen.make(0.1, **chosen.options)
    gradient = jnp.array([3.0, -1e-3, 0.0])
    step, state = optimizer.update(gradient, optimizer.init(gradient))
    np.testing.assert_allclose(step, [-0.1, 0.1, 0.0], rtol=1e-4)
    step, _ = optimizer.update(2 * gradient, state)
    np.testing.assert_allclose(step, np.array([-0.2, 0.2, 0.0]) / math.sqrt(5), rtol=1e-4)
