"""`jtrunc plan`, `jtrunc audit` and shadows of `jtrunc train`, from the command line to the files."""

from __future__ import annotations

import json

import jax
import pytest

from jtrunc.cli import main
from jtrunc.experiments.plan import num_bytes

SUBJECT = ["--task", "brackets:steps=2000", "--cell", "tanh:width=4"]


@pytest.fixture(autouse=True)
def as_users_run_it():
    """In float32."""
    with jax.enable_x64(False):
        yield


@pytest.mark.slow
def test_plan_prints_a_table_and_a_reason(tmp_path, capsys):
    options = ["--estimators", "bptt:window=20", "rtrl", "online-artbp:mean-length=4", "--memory", "1M"]
    assert main(["plan", *SUBJECT, *options, "--output", str(tmp_path / "plan")]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert found["reason"] in printed and found["recommended"] in ("rtrl", "online-artbp:mean-length=4")
    choices = found["choices"]
    assert [choice["claim"] for choice in choices.values()] == ["exact inside an update", "exact", "unbiased"]
    assert choices["bptt:window=20"]["depth"] >= 40 and choices["rtrl"]["window"] == 1
    assert choices["online-artbp:mean-length=4"]["flops_are_a_bound"]
    lines = {line.split()[0]: line for line in printed.splitlines() if line.endswith(("yes", "no"))}
    assert set(lines) == set(choices)
    assert f"{choices['rtrl']['total_bytes']:,}" in lines["rtrl"]


@pytest.mark.slow
def test_audit_prints_tables_and_draws(tmp_path, capsys):
    folder = tmp_path / "audit"
    estimators = ["truncated-bptt:length=2", "rtrl", "windowed-bptt:backward-steps=9,loss-steps=5", "uoro"]
    sizes = ["--trained", "500", "--steps", "30", "--warm-up", "10", "--draws", "40", "--lag-draws", "8"]
    arguments = [*SUBJECT, "--estimators", *estimators, *sizes, "--lags", "0", "3", "--output", str(folder)]
    assert main(["audit", *arguments]) == 0
    printed = capsys.readouterr().out
    found = json.loads((folder / "audit.json").read_text())["findings"]
    assert list(found) == estimators
    cut, exact, windowed, random = found.values()
    assert exact["bias"]["value"] < 1e-4 < cut["bias"]["value"]
    assert abs(windowed["arrived"]["value"] - 1) < 0.2  # a sum, not a mean over five losses
    assert random["noise"] > 0 and random["num_draws"] == 40 and random["bias"]["low"] == 0
    assert cut["by_lag"]["3"]["arrived"]["value"] == 0 and exact["signal_to_noise"]["readout/bias"] is None
    assert {len(line.split()) for line in printed.splitlines() if line.startswith("rtrl")} == {9, 3}
    assert (folder / "bias_and_noise.png").stat().st_size > 10_000
    drawn = json.loads((folder / "bias_and_noise.json").read_text())["estimators"]
    assert set(drawn) == set(found)


@pytest.mark.slow
def test_shadows_are_in_the_metrics_and_in_a_picture(tmp_path):
    shadow, folder = "truncated-bptt:length=5", tmp_path / "run"
    arguments = ["train", *SUBJECT, "--streams", "2", "--steps", "100", "--output", str(folder)]
    watched = ["--estimator", "artbp:mean-length=3,window=5", "--shadows", shadow, "bptt:window=5"]
    assert main([*arguments, *watched]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    cosines = [line[f"cosine/{shadow}"] for line in lines if "loss" in line]
    assert cosines and all(-1.001 <= cosine[0] <= 1.001 for cosine in cosines)
    assert (folder / "alignment.png").exists()
    exact = ["--estimator", shadow, "--shadows", "bptt:window=5", "--output", str(tmp_path / "same")]
    assert main([*arguments[:-2], *exact]) == 0
    numbers = json.loads((tmp_path / "same" / "alignment.json").read_text())["curves"]["bptt:window=5"]
    assert numbers["middle"] == pytest.approx([1] * len(numbers["middle"]), abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--memory", "lots"], "--memory must be a number of bytes such as 500M or 16G, got 'lots'"),
        (["plan", "--memory", "0M"], "--memory must be a number"),
        (["plan", "--estimators", "rtrl", "rtrl"], "--estimators must be at least one, none twice"),
        (["audit", "--streams", "0"], "--streams must be at least 1"),
        (["audit", "--steps", "5000"], "--warm-up and --steps ask for 5100 steps of 1 streams, but only"),
        (["audit", "--trained", "0", "--warm-up", "0", "--lags", "3"], "--lags 3 is beyond --warm-up 0"),
        (["train", "--shadows", "rtrl"], "--shadows: rtrl consumes 1 of 1 steps an update, truncated-bptt"),
        (["train", "--shadows", "rtlr"], "unknown estimator 'rtlr': did you mean 'rtrl'?"),
    ],
)
def test_refusals_leave_nothing(arguments, message, tmp_path, capsys):
    folder = tmp_path / "none"
    assert main([*arguments[:1], *SUBJECT, *arguments[1:], "--output", str(folder)]) == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()


def test_units_of_memory():
    assert [num_bytes(text) for text in ("", "16G", "500MB", "2k", "1.5M")] == [
        None, 16 * 10**9, 5 * 10**8, 2000, 1_500_000,
    ]  # fmt: skip
