"""What an experiment leaves behind: a fresh folder, tables, JSON with its provenance, pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import tqdm


def fresh_folder(path: Path) -> Path:
    """Makes the folder of a new run; nothing that exists is overwritten.

    Raises:
      ValueError: it is a file, or a folder that holds something.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"output {str(path)!r} exists and is not empty: name another folder with --output, delete this"
            " one, or go on with the run in it with --resume (train, compare, ptb-characters, adaptive,"
            " target-propagation)"
        )
    path.mkdir(parents=True, exist_ok=True)
    return path


def no_run(path: Path) -> ValueError:
    """What to raise where --resume finds no run."""
    return ValueError(f"no run to resume in {str(path)!r}: check --output, or leave out --resume")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned text: numbers to four significant digits and right-aligned, words left-aligned.

    >>> print(table(["run", "loss"], [["a", 1.0], ["bc", 12345.678]]))
    run       loss
    --------------
    a            1
    bc   1.235e+04
    """
    cells = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    numeric = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        parts = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True))
        return "  ".join(parts).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(header), rule, *(line(row) for row in cells)])


def provenance() -> dict[str, Any]:
    """What a reader needs to repeat a figure: versions, device, processor."""
    return {
        "jtrunc": version("jtrunc"),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "machine": platform.machine(),
    }


def write_json(path: Path, config: Any, **content: Any) -> Path:
    """Writes a dataclass of options and the results, with `provenance`."""
    options = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    path.write_text(json.dumps({"config": options, "provenance": provenance(), **content}, indent=1) + "\n")
    return path


@contextlib.contextmanager
def progress(total: int, label: str, unit: str = "steps") -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error; yields ``advance(by)``."""
    with tqdm.tqdm(total=total, desc=label, unit=unit, unit_scale=True, leave=False, mininterval=0.5) as bar:

        def advance(by: int) -> None:
            bar.update(min(by, total - bar.n))

        yield advance
