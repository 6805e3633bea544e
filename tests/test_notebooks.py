"""The notebooks run from a fresh kernel, cell by cell, without a warning, and draw what they promise.

They are stored as scripts (jupytext's percent format), which are the source of truth. ``JTRUNC_SMALL=1``
shortens their runs; every cell is executed all the same.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jupytext
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
CELL_SECONDS = 300


def run(notebook: Any) -> list[Any]:
    """Executes a notebook in a kernel of its own and returns its code cells, with their outputs."""
    # One device, as a reader has; conftest's other flags only make compilation faster.
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    env = os.environ | {
        "JTRUNC_SMALL": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags),
        "PYTHONWARNINGS": "default",
    }
    client = NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3")
    client.execute(env=env, cwd=str(ROOT))
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: Any, stream: str) -> str:
    """What a cell wrote to stdout or stderr."""
    return "".join(output.text for output in cell.outputs if output.get("name") == stream)


def test_all_notebooks_are_found():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{i:02d}" for i in range(len(NOTEBOOKS))]
    assert len(NOTEBOOKS) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path):
    cells = run(jupytext.read(path))
    assert all(cell.execution_count for cell in cells)
    for cell in cells:
        assert printed(cell, "stderr") == "", cell.source
        assert "nan" not in printed(cell, "stdout").split(), cell.source
        pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        assert len(pictures) == cell.source.count("plt.show()"), cell.source
    assert any("plt.show()" in cell.source for cell in cells)


@pytest.mark.slow
def test_a_failing_cell_fails():
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run(jupytext.reads("# %%\nprint(1)\n\n# %%\n1 / 0\n", fmt="py:percent"))
