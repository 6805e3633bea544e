"""The command line: names with options, help, errors that help, folders that are never overwritten."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtrunc import cells
from jtrunc.cli import COMMANDS, EXTRA, main
from jtrunc.experiments import parts
from jtrunc.experiments.demo import unused
from jtrunc.experiments.names import choose, describe
from jtrunc.experiments.report import fresh_folder, table
from jtrunc.experiments.sampling import sample

SMALL = ["--task", "brackets:steps=2000", "--cell", "tanh:width=6", "--streams", "2", "--steps", "120"]


@pytest.fixture(autouse=True)
def as_users_run_it():
    """In float32."""
    with jax.enable_x64(False):
        yield


def example(system, *, length: int = 5, rate: float = 0.5, exact: bool = False):
    """One line."""


TABLE = {"example-part": example}


def test_choose_reads_options_and_defaults():
    choice = choose("example_part:length=7,exact=true", TABLE, "part")
    assert choice.options == {"length": 7, "rate": 0.5, "exact": True}
    assert choice.label == "example-part:length=7,exact=True"
    assert choice.full_label == "example-part:length=7,rate=0.5,exact=True"
    assert choose(choice.full_label, TABLE, "part").options == choice.options
    assert "One line." in describe(TABLE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exmple-part", "did you mean 'example-part'"),
        ("", "unknown part ''"),
        ("example-part:lenght=5", "did you mean 'length'"),
        ("example-part:length", "has no value"),
        ("example-part:length=", "must be of type int"),
        ("example-part:length=five", "must be of type int, got 'five'"),
        ("example-part:length=1.5", "must be of type int"),
        ("example-part:rate=x", "must be of type float"),
        ("example-part:exact=1", "must be true or false"),
    ],
)
def test_choose_refuses(text, message):
    with pytest.raises(ValueError, match="part") as error:
        choose(text, TABLE, "part")
    assert message in str(error.value)


def test_choose_names_an_option_that_is_missing():
    def needy(*, length: int): ...

    with pytest.raises(ValueError, match="needs length: write needy:length="):
        choose("needy", {"needy": needy}, "part")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_exits_well(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: jtrunc" in capsys.readouterr().out


def test_list_shows_every_part(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for names in (parts.TASKS, parts.CELLS, parts.ESTIMATORS, parts.OPTIMIZERS):
        assert all(name in shown for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "did you mean 'train'"),
        (["frobnicate"], "Known: train, compare"),
        (["train", "--estimator", "trucated-bptt"], "did you mean 'truncated-bptt'"),
        (["train", "--estimator", "truncated-bptt:lenght=3"], "did you mean 'length'"),
        (["train", "--task", "charcters"], "did you mean 'characters'"),
        (["train", "--cell", "lstn"], "did you mean 'lstm'"),
        (["train", "--optimizer", "adm"], "did you mean 'adam'"),
        (["train", *SMALL, "--learning-rate", "-1"], "--learning-rate must be positive"),
        (["train", *SMALL, "--seeds", "0"], "--seeds must be at least 1"),
        (["train", *SMALL, "--devices", "9"], "--devices 9: there are 8"),
        (["train", *SMALL, "--devices", "2", "--distributed", "auto"], "leave --devices out"),
        (["train", *SMALL, "--devices", "0"], "--streams 2 do not divide over 8 devices"),
        (["train", *SMALL, "--distributed", "here"], "address:port,processes,index"),
        (["train", *SMALL, "--cell", "lstm:layers=0"], "layers must be at least 1"),
        (["train", *SMALL, "--estimator", "truncated-bptt:length=0"], "length"),
        (["train", *SMALL, "--data", "somewhere"], "leave --data out"),
        (["train", "--data", "no/such/file"], "no/such/file"),
        (["train", "--task", "penn-treebank"], "needs --data"),
        (["compare", *SMALL, "--estimators", "bptt", "bptt"], "none twice"),
    ],
)
def test_wrong_usage_is_one_clear_line(arguments, message, capsys, tmp_path):
    if arguments[0] in ("train", "compare"):
        arguments = [*arguments, "--output", str(tmp_path / "run")]
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments", [["train", "--stpes", "5"], ["reproduce", "influense"], ["train", "--seeds", "x"]]
)
def test_unknown_options_exit_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "jtrunc" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["train", *SMALL], ["compare", *SMALL], ["reproduce", "influence-balancing"]]
)
def test_nothing_is_overwritten(command, capsys, tmp_path):
    kept = tmp_path / "kept.txt"
    kept.write_text("precious")
    assert main([*command, "--output", str(tmp_path)]) == 2
    assert "--output" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert kept.read_text() == "precious"


def test_resume_needs_a_run(capsys, tmp_path):
    assert main(["train", *SMALL, "--resume", "--output", str(tmp_path / "none")]) == 2
    assert "no run to resume" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_resume_refuses_another_configuration(capsys, tmp_path):
    command = ["train", *SMALL, "--output", str(tmp_path / "run")]
    assert main(command) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert main([*command, "--resume", "--learning-rate", "0.5"]) == 2
    assert "another configuration" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("part", ["training", "test"])
def test_a_text_that_has_changed_by_one_byte_is_not_resumed(part, capsys, tmp_path):
    """Neither the vocabulary nor any length changes; nor, with the test part, anything that trains."""
    text = tmp_path / "book.txt"
    text.write_bytes(b"to be or not to be, that is the question. " * 60)
    command = ["train", "--data", str(text), "--cell", "tanh:width=4", "--streams", "2", "--steps", "40"]
    command += ["--estimator", "truncated-bptt:length=5", "--output", str(tmp_path / "run")]
    assert main(command) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    content = bytearray(text.read_bytes())
    place = {"training": 30, "test": -30}[part]
    content[place] = ord("e") if content[place] != ord("e") else ord("o")
    text.write_bytes(content)
    assert main([*command, "--resume"]) == 2
    shown = capsys.readouterr().err
    assert "another configuration (SHA-256 of the text: " in shown and len(shown.splitlines()) == 1
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    text.write_bytes(b"to be or not to be, that is the question. " * 60)
    assert main([*command, "--resume"]) == 0


@pytest.mark.slow
def test_updates_that_may_be_skipped(capsys, tmp_path):
    """A learning rate that overflows at once: a failure with one line, after as many skips as were given."""
    command = ["train", *SMALL, "--optimizer", "sgd", "--learning-rate", "1e38"]
    command += ["--estimator", "truncated-bptt:length=5"]
    for limit in (0, 3):
        output = ["--output", str(tmp_path / str(limit))]
        assert main([*command, *output, "--max-non-finite", str(limit)]) == 1
        shown = capsys.readouterr().err
        assert "not finite at update" in shown and ("were skipped" in shown) == (limit > 0)
    assert main(["train", *SMALL, "--max-non-finite", "-1"]) == 2
    assert "--max-non-finite must be at least 0" in capsys.readouterr().err


def test_a_run_that_cannot_be_saved_ends_with_one_line(capsys, tmp_path, monkeypatch):
    from jtrunc.training import CheckpointError, checkpoint

    def fail(*arguments, **options):
        raise CheckpointError("could not write the checkpoint: make room")

    monkeypatch.setattr(checkpoint, "save", fail)
    assert main(["train", *SMALL, "--output", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "jtrunc: error: could not write the checkpoint: make room\n"


@pytest.mark.slow
def test_train_writes_what_it_promises(capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 60)
    folder = tmp_path / "run"
    command = ["train", "--data", str(text), "--cell", "gru:width=12", "--streams", "2", "--steps", "600"]
    command += ["--estimator", "truncated-bptt:length=5", "--seeds", "2", "--learning-rate", "0.02"]
    assert main([*command, "--output", str(folder)]) == 0
    shown = capsys.readouterr().out
    for name in ("curves.png", "summary.json", "samples.txt"):
        assert str(folder / name) in shown
        assert (folder / name).stat().st_size > 0
    (run,) = json.loads((folder / "summary.json").read_text())["runs"]
    assert run["seeds"] == [0, 1]
    assert run["test_bits"][0] != run["test_bits"][1]
    classes = len(set(text.read_text())) + 1
    assert all(0 < bits < 0.7 * math.log2(classes) for bits in run["test_bits"])


@pytest.mark.slow
def test_compare_makes_one_table_and_one_picture(capsys, tmp_path):
    estimators = ["truncated-bptt:length=6", "online-artbp:mean-length=6,look-ahead=40", "windowed-bptt"]
    assert main(["compare", *SMALL, "--estimators", *estimators, "--output", str(tmp_path / "c")]) == 0
    shown = capsys.readouterr().out
    assert all(shown.count(f"\n{name}") >= 1 for name in ("truncated-bptt", "online-artbp", "windowed-bptt"))
    summary = json.loads((tmp_path / "c" / "summary.json").read_text())
    assert len(summary["runs"]) == 3
    assert (tmp_path / "c" / "curves.png").stat().st_size > 0


@pytest.mark.parametrize("module", EXTRA)
def test_a_missing_extra_is_named_with_its_remedy(module):
    code = f"import sys; sys.modules[{module!r}] = None; from jtrunc import cli; sys.exit(cli.main(['list']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"jtrunc: error: {module} not installed; run: pip install 'jtrunc[experiments]'\n"


@pytest.mark.parametrize(("mean_length", "alpha"), [(16, 6.0), (50, 4.0), (5, 2.5)])
def test_long_enough_bounds_the_probability_of_a_longer_window(mean_length, alpha):
    lags = np.arange(1, parts.long_enough(mean_length, alpha) + 1)
    survival = np.prod(1 - (alpha - 1) / ((alpha - 2) * mean_length + lags))
    assert 0.1 * parts.HIT_PROBABILITY < survival <= parts.HIT_PROBABILITY


def test_sample_follows_a_certain_model():
    """A readout that ignores the hidden state and is sure of token 3 draws nothing else."""
    model = cells.model(cells.tanh(5, 4), 5, cells.softmax_cross_entropy)
    params = model.init(jax.random.key(0))
    bias = jnp.where(jnp.arange(5) == 3, 1e6, 0.0)
    certain = params._replace(readout={"kernel": 0 * params.readout["kernel"], "bias": bias})
    prompt = jnp.array([0, 1], jnp.int32)
    assert sample(model, certain, prompt, 7, jax.random.key(1)).tolist() == [3] * 7
    assert set(sample(model, params, prompt, 50, jax.random.key(1)).tolist()) != {3}
    with pytest.raises(ValueError, match="prompt"):
        sample(model, params, prompt[:0], 7, jax.random.key(1))
    with pytest.raises(ValueError, match="temperature"):
        sample(model, params, prompt, 7, jax.random.key(1), temperature=0.0)


def test_folders_and_tables(tmp_path):
    assert fresh_folder(tmp_path / "a" / "b").is_dir()
    assert fresh_folder(tmp_path / "a" / "b").is_dir()
    assert unused(tmp_path / "a") == tmp_path / "a-2"
    assert unused(tmp_path / "c") == tmp_path / "c"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="--output"):
        fresh_folder(tmp_path / "file")
    assert len({len(line) for line in table(["a", "b"], [["x", 1.0], ["yy", 22]]).splitlines()}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--seeds", "3", "--devices", "0"], ["--devices", "2"]])
def test_devices_change_no_result(arguments, tmp_path):
    """Seeds on eight devices, streams on two."""
    bits = []
    for name, options in (("spread", arguments), ("alone", arguments[:-2])):
        command = ["train", *SMALL, "--estimator", "truncated-bptt:length=5", *options]
        assert main([*command, "--output", str(tmp_path / name)]) == 0
        (run,) = json.loads((tmp_path / name / "summary.json").read_text())["runs"]
        bits.append(run["test_bits"])
    np.testing.assert_allclose(*bits, rtol=1e-5)
    assert len(set(bits[0])) == len(bits[0]) == (3 if "--seeds" in arguments else 1)
