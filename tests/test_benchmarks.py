"""The speed benchmarks: every question runs in small form, and the harness computes what it says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "speed"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmarks_speed_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(FOLDER))  # the report imports its neighbours by name, as scripts do
harness, run_all, report = load("harness"), load("run_all"), load("report")
sys.path.remove(str(FOLDER))


class Clock:
    """A clock that contestants move on; `order` is who did, in turn."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def contestant(self, name: str, seconds: float) -> Any:
        def run() -> None:
            self.now += seconds
            self.order.append(name)

        return run

    def __call__(self) -> float:
        return self.now


def test_a_ratio_is_that_of_the_medians_with_the_quartiles_of_the_rounds():
    found = harness.ratio(np.array([1.0, 4.0, 9.0]), np.array([1.0, 1.0, 3.0]))
    assert found == (4.0, 2.0, 3.5)  # within rounds 1, 4 and 3, whose median is 3


def test_contestants_take_turns_in_a_rotated_order():
    clock = Clock()
    runs = {name: clock.contestant(name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    found = harness.alternate(runs, harness.Effort(rounds=4, seconds=0.0, clock=clock))
    assert "".join(clock.order[-12:]) == "abcbcacababc"
    assert {name: values.tolist() for name, values in found.items()} == {
        "a": [1.0] * 4,
        "b": [2.0] * 4,
        "c": [4.0] * 4,
    }


def test_a_turn_is_long_enough():
    clock = Clock()
    found = harness.alternate({"a": clock.contestant("a", 0.25)}, harness.Effort(2, 0.9, clock))
    assert found["a"].tolist() == [0.25, 0.25]
    assert len(clock.order) == 1 + 3 + 2 * 4  # one to warm up, three to calibrate, two turns of four


@pytest.mark.parametrize(
    ("at_least", "value", "verdict"),
    [(False, 0.8, "met"), (False, 0.81, "MISSED"), (True, 0.81, "met"), (True, 0.79, "MISSED")],
)
def test_targets(at_least, value, verdict):
    assert harness.Target(0.8, at_least).verdict(value) == verdict


def test_compare_scales_by_work_and_judges_the_ratio():
    clock = Clock()
    programs = {
        name: harness.Program(clock.contestant(name, seconds), ((),), compile_seconds=0.5, temp_bytes=7)
        for name, seconds in (("plain", 2.0), ("ours", 3.0))
    }
    effort = harness.Effort(rounds=3, seconds=0.0, clock=clock)
    plain, ours = harness.compare(
        "case", programs, "plain", {"ours": harness.Target(0.7)}, effort, {"plain": 2, "ours": 6}
    )
    assert (plain["µs per step"].median, ours["µs per step"].median) == pytest.approx((1e6, 5e5))
    assert (plain["ratio"], plain["verdict"]) == (None, None)
    assert (ours["ratio"].median, ours["target"], ours["verdict"]) == (0.5, "≤ 0.7", "met")
    assert harness.markdown([ours]).splitlines()[2].startswith("| case | ours | 5e+05 [5e+05, 5e+05] | 0.5")


def test_only_keeps_the_cases_named_so(monkeypatch, tmp_path, capsys):
    def measure(case: str, effort: Any) -> list[dict[str, Any]]:
        assert effort == harness.Effort(rounds=2)
        return [{"case": case, "ratio": 1.0}]

    cases = ["n=20", "n=200", "n=64"]
    arguments = ["question", "--rounds", "2", "--out", str(tmp_path), "--only"]
    monkeypatch.setattr(sys, "argv", [*arguments, "n=20"])
    harness.main_by_case("question", None, cases, ["tiny"], measure)
    record = json.loads((tmp_path / "question.json").read_text(encoding="utf-8"))
    assert [row["case"] for row in record["rows"]] == cases[:2]
    monkeypatch.setattr(sys, "argv", [*arguments, "n=21"])
    with pytest.raises(SystemExit):
        harness.main_by_case("question", None, cases, ["tiny"], measure)
    assert "no such case among n=20, n=200, n=64" in capsys.readouterr().err


def record(question: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    where = {"jax": "0", "device": "cpu", "processor": "p", "cores": 1, "system": "s"}
    return {"question": question, "quick": False, "clock": "wall", **where, "rows": rows}


def judged_row(case: str, contestant: str, ratio: float | None, target: str | None) -> dict[str, Any]:
    spread = None if ratio is None else {"median": ratio, "low": ratio - 0.1, "high": ratio + 0.1}
    row = {"case": case, "contestant": contestant, "ratio": spread, "target": target, "verdict": None}
    if target is not None and ratio is not None:
        limit = harness.Target(float(target.split()[1]), target.startswith("≥"))
        row["verdict"] = limit.verdict(ratio)
    return row


def test_report_finds_targets_with_their_values_and_floors():
    rows = [
        judged_row("a", "plain", None, None),
        judged_row("a", "ours", 0.5, "≤ 0.8"),
        judged_row("a", "GEMM floor", 0.4, None),
        judged_row("b", "theirs", 4.0, "≥ 5"),
        {"case": "c", "contestant": "ours", "compile s": 2.0, "target": "≤ 1.5", "verdict": "MISSED"},
    ]
    memory = {"memory target": "≤ 0.05", "memory verdict": "met", "share of memory": 0.02}
    rows[1] |= memory
    found = report.findings(record("rtrl", rows))
    assert [(f.contestant, f.value.median, f.target, f.verdict, f.floor) for f in found] == [
        ("ours", 0.5, "≤ 0.8", "met", 0.4),
        ("ours (memory)", 0.02, "≤ 0.05", "met", None),
        ("theirs", 4.0, "≥ 5", "MISSED", None),
        ("ours", 2.0, "≤ 1.5", "MISSED", None),
    ]
    shares = [f.share(f.value.median) for f in found]
    assert shares == pytest.approx([0.625, 0.4, 1.25, 4 / 3])  # more than one exactly where it is missed


def test_a_floor_that_is_the_baseline_is_one():
    rows = [judged_row("a", "D·J", None, None), judged_row("a", "rtrl", 0.5, "≤ 1.2")]
    assert [f.floor for f in report.findings(record("rtrl", rows))] == [1.0]


def test_report_writes_one_table_and_one_picture(tmp_path):
    rows = [judged_row("a", "ours", 0.5 + 0.1 * i, "≤ 0.8") for i in range(30)]
    peer = harness.not_installed("a", "PyTorch nn.LSTM")
    for question, its_rows in (("rtrl", rows), ("peers", [peer])):
        text = json.dumps(record(question, its_rows))
        (tmp_path / f"{question}.json").write_text(text, encoding="utf-8")
    markdown, image = report.write(tmp_path)
    text = markdown.read_text(encoding="utf-8")
    assert "30 targets, 26 missed." in text
    assert "- peers: PyTorch nn.LSTM (a) was not installed" in text
    assert "## peers" in text and text.index("## rtrl") < text.index("## peers")
    assert image.stat().st_size > 10_000


def test_report_of_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="has no results"):
        report.write(tmp_path)


def test_run_all_asks_every_question():
    helpers = {"harness", "pinning", "pytorch", "report", "run_all"}
    assert set(run_all.QUESTIONS) == {path.stem for path in FOLDER.glob("*.py")} - helpers


@pytest.mark.slow
@pytest.mark.parametrize("question", run_all.QUESTIONS)
def test_quick_run(question, tmp_path):
    # One device; conftest's other flags make compilation faster.
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags)}
    script = [str(FOLDER / f"{question}.py"), "--quick", "--out", str(tmp_path)]
    command = [sys.executable, "-W", "error", *script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / f"{question}.json").read_text(encoding="utf-8"))
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(record["rows"]) > 2
    if hasattr(os, "sched_setaffinity"):
        assert record["cores"] == 1
