"""Metrics files, pictures and the progress bar."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jtrunc.training import CheckpointError, progress
from jtrunc.training.metrics import MetricsFile, columns, read_metrics, split_columns, train_columns
from jtrunc.training.plots import Curve, band, bin_means, learning_curves
from jtrunc.training.progress import Progress

LINES = [{"update": u, "loss": 1.0 / u} for u in (1, 2, 3)]


def test_lines_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    values = np.asarray([0.1, 1 / 3, 1e-30, np.nan, np.inf, -np.inf], np.float32)
    MetricsFile(path).append([{"update": np.int64(1), "loss": values}])
    MetricsFile(path).append([])
    np.testing.assert_array_equal(np.asarray(read_metrics(path)[0]["loss"], np.float32), values)
    assert "null" in path.read_text() and "NaN" not in path.read_text()  # valid JSON
    assert read_metrics(tmp_path / "absent.jsonl") == []
    with pytest.raises(TypeError, match="metrics hold numbers"):
        MetricsFile(path).append([{"update": object(), "loss": values}])


def test_torn_tail_and_later_lines_are_dropped(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    none = file.sha256
    assert file.truncate_to(none) == []
    file.append(LINES[:2])
    two = file.sha256
    file.append(LINES[2:])
    whole = file.path.read_text()
    file.path.write_text(whole + '{"upd')
    assert read_metrics(file.path) == LINES
    assert file.truncate_to(two) == LINES[:2]
    assert file.sha256 == two
    assert read_metrics(file.path) == LINES[:2]
    assert file.truncate_to(none) == [] == read_metrics(file.path)
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]


def test_lines_with_nothing_behind_them_are_left_alone(tmp_path: Path, monkeypatch: Any) -> None:
    """They may lie on a disk that can only be read."""
    file = MetricsFile(tmp_path / "m.jsonl")
    file.append(LINES)
    monkeypatch.delattr(os, "truncate")
    assert file.truncate_to(file.sha256) == LINES


def test_any_flipped_bit_of_the_lines_is_refused_and_behind_them_dropped(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.append(LINES[:2])
    kept, sha256 = file.path.read_bytes(), file.sha256
    file.append(LINES[2:3])
    whole = file.path.read_bytes()
    for place in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        file.path.write_bytes(damaged)
        if place // 8 >= len(kept):
            assert file.truncate_to(sha256) == LINES[:2] and file.path.read_bytes() == kept
            continue
        with pytest.raises(CheckpointError, match=r"m\.jsonl lacks lines, or they are not those"):
            file.truncate_to(sha256)
        assert file.path.read_bytes() == damaged


@pytest.mark.parametrize("damaged", [b"nonsense", b'{"update": \xb2}'])
def test_a_damaged_line_is_named(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"update": 1}\n' + damaged + b'\n{"update": 2}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2 is not JSON"):
        read_metrics(path)


def test_columns_of_training_and_of_splits() -> None:
    lines = [{"update": 1, "loss": [1, 2]}, {"update": 1, "split": "test", "nats": 3.0}]
    assert train_columns(lines)["loss"].shape == (1, 2)
    assert split_columns(lines)["test"]["nats"].tolist() == [3.0]
    assert columns([]) == {}


def test_a_picture_lies_beside_its_numbers(tmp_path: Path) -> None:
    x = np.arange(1, 11)
    y = np.outer(1 / x, [1.0, 2.0, 3.0])
    png = learning_curves(
        {"many": Curve(x, y), "one": Curve(x, 1 / x)}, tmp_path / "new" / "loss", x_label="steps",
        y_label="loss (nats)", quantiles=(0.0, 0.5, 1.0), log_log=True, levels={"best": 0.1},
    )  # fmt: skip
    assert png.read_bytes()[:4] == b"\x89PNG"
    numbers = json.loads(png.with_suffix(".json").read_text())
    np.testing.assert_allclose(numbers["curves"]["many"]["high"], 3 / x)
    np.testing.assert_allclose(numbers["curves"]["one"]["middle"], 1 / x)
    assert numbers["levels"] == {"best": 0.1}


def test_seeds_with_an_x_of_their_own_meet_on_one() -> None:
    x = np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    grid, low, _, high = band(x, 2 * x, (0.0, 0.5, 1.0))
    np.testing.assert_allclose(grid, [0.5, 2.5, 4.5])
    np.testing.assert_allclose(low, [1.0 if g == 0.5 else 2 * min(g, 4.0) for g in grid])
    np.testing.assert_allclose(high, [2.0, 5.0, 9.0])


def test_binned_means_keep_the_mean() -> None:
    x = np.arange(1.0, 1001.0)
    y = np.random.default_rng(0).normal(size=(1000, 2))
    for log in (False, True):
        curve = bin_means(x, y, 50, log=log)
        assert len(curve.x) <= 50 and (np.diff(curve.x) > 0).all()
    whole = bin_means(x, y, 1)
    np.testing.assert_allclose(whole.y, y.mean(axis=0, keepdims=True))


def test_a_curve_of_one_point_is_seen(tmp_path: Path) -> None:
    """An evaluation at the end alone: among points at other heights, its place has its colour."""
    image = pytest.importorskip("matplotlib.image")

    def blue(name: str, curve: Curve) -> int:
        png = learning_curves({"once": curve}, tmp_path / name, x_label="", y_label="")
        red, _, blue = np.moveaxis(image.imread(png)[..., :3], -1, 0)
        return int((blue - red > 0.1).sum())

    nothing = blue("nothing", Curve([1.0], [np.nan]))  # the legend's own line
    assert blue("single", Curve([1.0], [2.0])) > nothing + 50
    assert blue("seeds", Curve([1.0], [[1.0, 2.0, 3.0]])) > blue("single", Curve([1.0], [2.0])) + 50


def test_curves_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`curves` is empty"):
        learning_curves({}, tmp_path / "a", x_label="", y_label="")
    with pytest.raises(ValueError, match=r"'a' has x of shape \(2,\) and y of shape \(3,\)"):
        learning_curves({"a": Curve([1, 2], [1, 2, 3])}, tmp_path / "a", x_label="", y_label="")


@pytest.mark.parametrize(
    ("seconds", "show", "shown"),
    [(0.001, True, False), (0.1, True, True), (3.0, True, True), (3.0, None, False), (3.0, False, False)],
)
def test_a_bar_only_for_long_runs_that_want_one(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seconds: float,
    show: bool,
    shown: bool,
) -> None:
    now = iter(np.arange(1000) * seconds)
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    bar = Progress(100, 0, show)
    for done in range(1, 6):
        bar.advance_to(done, 1e6 * done, 0.5)
    bar.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("loss 0.5" in captured.err) == shown
    if shown:
        assert "5M steps" in captured.err and "steps/s" in captured.err


def test_a_bar_that_is_asked_for_needs_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"pip install 'jtrunc\[experiments\]'"):
        Progress(10, 0, True)
    Progress(10, 0, None).close()
