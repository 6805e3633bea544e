"""Metrics as JSON lines: one object a line, appended, safe against a kill at any moment.

Every line is valid JSON, which has no word for what is not finite: infinities are the numbers ``1e999`` and
``-1e999``, which overflow to infinity wherever numbers are read as float64, and NaN is ``null``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jtrunc.training.checkpoint import CheckpointError

Line = dict[str, Any]
"""One line of metrics; a train line has ``update``, an evaluation also ``split``."""


class MetricsFile:
    """Appends lines to a file; what was appended is on the disk when `append` returns.

    Args:
      path: the file; it is created with the first line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of all lines that were appended or kept: checkpoints hold it, so that none gets lost unnoticed."""
        return self._hash.hexdigest()

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write lines behind those that are there.

        Raises:
          OSError: naming the file and what to do, if they cannot be written (a full disk, a lost mount).
        """
        text = "".join(to_json(line) + "\n" for line in lines)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                _sync(file.fileno())
        except OSError as error:
            raise OSError(
                error.errno,
                f"could not append to the metrics file ({error.strerror}); checkpoints written so far are "
                "intact: make room or restore access, then resume",
                str(self.path),
            ) from error
        self._hash.update(text.encode())

    def truncate_to(self, sha256: str) -> list[Line]:
        """Drop whatever lies behind the lines of this hash, torn or damaged lines too; return those lines.

        Raises:
          CheckpointError: if the file does not begin with such lines; it stays as it is.
        """
        digest, size = hashlib.sha256(), 0
        if self.path.exists():
            with self.path.open("rb") as file:
                for row in file:
                    if digest.hexdigest() == sha256:
                        break
                    digest.update(row)
                    size += len(row)
        if digest.hexdigest() != sha256:
            raise CheckpointError(
                f"{self.path} lacks lines, or they are not those that were there when the checkpoint was "
                "written; put the file back, or begin a new run"
            )
        if self.path.exists() and self.path.stat().st_size > size:  # else it may only be read
            os.truncate(self.path, size)
        self._hash = digest
        return read_metrics(self.path)


def read_metrics(path: str | Path) -> list[Line]:
    """The lines of a metrics file, oldest first; [] if there is no file.

    A last line that was cut off by a kill is left out; ``null`` is read as NaN.

    Raises:
      ValueError: naming file and line number, if any other line is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = path.read_bytes().split(b"\n")
    lines = []
    for number, row in enumerate(rows[:-1], start=1):
        try:
            lines.append(_with_nan(json.loads(row.decode("utf-8"))))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}); mend or remove that line"
            ) from error
    return lines


def columns(lines: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Lines as one array per name, (lines,) or (lines, seeds).

    Example:

      >>> columns([{"update": 1, "loss": [0.5, 0.25]}, {"update": 2, "loss": [0.5, 0.125]}])["loss"].shape
      (2, 2)
    """
    rows = list(lines)
    return {name: np.asarray([row[name] for row in rows]) for name in (rows[0] if rows else {})}


def train_columns(lines: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The columns of the lines that report training."""
    return columns(line for line in lines if "split" not in line)


def split_columns(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """The columns of the evaluations, by name of the split."""
    rows = [line for line in lines if "split" in line]
    names = dict.fromkeys(line["split"] for line in rows)
    return {name: columns(_without_split(line) for line in rows if line["split"] == name) for name in names}


def _without_split(line: Mapping[str, Any]) -> Line:
    return {name: value for name, value in line.items() if name != "split"}


def to_json(value: Any) -> str:
    """Valid JSON of numbers, text, NumPy arrays, and lists and mappings of them, on one line.

    Example:

      >>> to_json({"bias": [0.5, math.inf, -math.inf, math.nan], "split": "test"})
      '{"bias": [0.5, 1e999, -1e999, null], "split": "test"}'
    """
    try:
        return json.dumps(value, default=_plain, allow_nan=False)
    except ValueError:  # something in it is not finite
        return _to_json_by_parts(value)


def _to_json_by_parts(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(name)}: {to_json(part)}" for name, part in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(to_json, value)) + "]"
    if isinstance(value, float):
        return "null" if math.isnan(value) else "1e999" if value > 0 else "-1e999"
    plain = _plain(value)
    if not isinstance(plain, (float, list)):
        raise TypeError(f"metrics hold numbers, text, arrays, lists and mappings, not {value!r}")
    return to_json(plain)


def _with_nan(value: Any) -> Any:
    """What JSON holds, with NaN for null."""
    if isinstance(value, dict):
        return {name: _with_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_with_nan(part) for part in value]
    return math.nan if value is None else value


def _plain(value: Any) -> Any:
    """NumPy numbers and arrays as Python ones."""
    return np.asarray(value).tolist()


def _sync(descriptor: int) -> None:
    """fsync, where the file supports it (a pipe or a terminal does not)."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
